#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Builds hv_netvsc.ko and hv_pci.ko, and in stripped/ the same without what only
# debuggers read, as they are installed.
#
# usage: build-modules.sh [--arm64] OUTPUT_FOLDER [VARIABLE=VALUE of kbuild]...
#
# --arm64          with clang for arm64, not for this machine
# KDIR             a prepared kernel tree; empty: Debian's cloud kernel
# TOOLCHAIN=host   this machine's own tools, not those of the build root

. "$(dirname "$0")/common.sh"

arch=x86 tree_script=kernel-tree.sh strip=strip flags=()
if [ "$1" = --arm64 ]; then
	arch=arm64 tree_script=arm64-tree.sh strip=llvm-strip flags=(ARCH=arm64 LLVM=1)
	shift
fi
out=$1
shift
kdir=${KDIR:-}
if [ -z "$kdir" ]; then
	tree=$("$top/scripts/$tree_script")
	run=("$top/scripts/in-root.sh" --kernel "$tree")
	kdir=/kernel/build
	[ $arch = x86 ] || kdir=/kernel/source
elif [ -e "$kdir" ]; then
	kdir=$(realpath "$kdir")
	run=("$top/scripts/in-root.sh")
	# The parts of a headers package are at several places.
	for dir in "$kdir" /usr/src /usr/lib/linux-kbuild-*; do
		case $dir/ in
		/usr/src/ | /usr/lib/*) [[ $kdir == /usr/src/* && -d $dir ]] || continue ;;
		esac
		run+=(--bind "$dir")
	done
fi
if [ "${TOOLCHAIN:-}" = host ]; then
	run=()
	[ -n "${KDIR:-}" ] || die "TOOLCHAIN=host needs a KDIR" "make TOOLCHAIN=host KDIR=FOLDER"
fi

"${run[@]}" "$top/scripts/check-kdir.sh" "$kdir" $arch

mkdir -p "$out"
out=$(realpath "$out")
exec 9>"$out/.lock"
flock 9
"${run[@]}" make --no-print-directory -C "$kdir" M="$top" MO="$out" -j"$(nproc)" "${flags[@]}" modules "$@" 9>&-
mkdir -p "$out/stripped"
for module in "$out"/*.ko; do
	"${run[@]}" $strip --strip-debug -p -o "$out/stripped/${module##*/}" "$module"
done
# What sudo makes belongs to whom called it.
[ -z "${SUDO_UID:-}" ] || chown -R "$SUDO_UID:${SUDO_GID:-$SUDO_UID}" "$out"
