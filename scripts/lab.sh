#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Runs hvlab in the build root with the stock kernel, the guest image and our modules.
#
# usage: lab.sh COMMAND [ARGUMENT]...    see build/hvlab --help
#        lab.sh --prepare                only makes the guest image and prints its path

. "$(dirname "$0")/common.sh"

tree=$("$top/scripts/kernel-tree.sh")
make_cache
run=("$top/scripts/in-root.sh" --kernel "$tree")

# make_archive PROGRAM: prints the path of what it makes.
make_archive() {
	(
		with_lock image
		"${run[@]}" env IMAGE_CACHE="$cache/image" KERNEL_IMAGE=/kernel/image \
			"$top/tools/image/$1" 9>&- | tail -n 1
	)
}

# Whether this command line names a scenario that needs the kernel's selftests, or none, which means
# all.
wants_selftests() {
	local named=
	[ "${1:-}" = test ] || return 1
	shift
	while [ $# -gt 0 ]; do
		case $1 in
		selftests | selftests-all) return 0 ;;
		--*=* | --list | --keep | --help) ;;
		--*) shift || break ;; # with what comes next
		*) named=1 ;;
		esac
		shift || break
	done
	[ ! "$named" ]
}

image=$(make_archive make-image)
if [ "${1:-}" = --prepare ]; then
	echo "$image"
	exit
fi

[ -x "$top/build/hvlab" ] || die "build/hvlab is missing" "make tools"
release=$(cat "$tree/release")
export HVLAB_KERNEL=/kernel/image/usr/lib/modules/$release/vmlinuz
export HVLAB_IMAGE=$image
export HVLAB_MODULES=$top/build/stripped
if wants_selftests "$@"; then
	HVLAB_SELFTESTS=$(make_archive make-selftests)
	export HVLAB_SELFTESTS
fi
exec "${run[@]}" "$top/build/hvlab" "$@"
