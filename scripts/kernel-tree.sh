#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Prepares Debian's cloud kernel for building Rust modules, and prints the path
# of a folder with:
#
#   release     the kernel's release, as uname -r says it
#   build/      KDIR: the headers package and the Rust metadata it lacks
#   image/      the unpacked image packages: vmlinuz and the stock modules
#   scripts/    checkpatch.pl and what it reads
#   selftests/  the kernel's tests of network drivers, and what they are made of
#   stock/      source of the kernel's hv_pci, which the image has built in
#
# usage: kernel-tree.sh [--update]
#
# By default the newest cloud kernel of the series below in trixie-backports
# which has headers and source of the same version; HYPERV_RUST_KERNEL=RELEASE
# names another.  The newest is looked up once a week, or with --update.

. "$(dirname "$0")/common.sh"

# The series that is built and tested for if nothing else is said.
series=7.2

update=no
[ "${1:-}" != --update ] || update=yes

root=$("$top/scripts/build-root.sh")
make_cache
tree_key=$(key "$top/scripts/kernel-tree.sh" "$root/etc/hyperv-rust-toolchain" </dev/null)
wanted=${HYPERV_RUST_KERNEL:-newest-$series}
choice=$cache/kernel-$wanted-$tree_key.choice

# A choice is one line: RELEASE VERSION (of the packages).
read_choice() {
	read -r release version <"$choice"
	tree=$cache/kernel-$release-$(key <<<"$version $tree_key")
}

is_fresh() {
	[ -e "$choice" ] && [ $update = no ] &&
		{ [ "$wanted" != "newest-$series" ] || [ -n "$(find "$choice" -mtime -7)" ]; }
}

if is_fresh; then
	read_choice
	if [ -e "$tree/release" ]; then
		echo "$tree"
		exit
	fi
fi

in_root() {
	"$top/scripts/in-root.sh" "$@"
}

# The mirror and the proxies are those of today.
update_indexes() {
	mkdir -p "$cache/apt"
	"$top/scripts/host-apt.sh" "$cache/apt"
	cp "$cache/apt/sources.list" "$root/etc/apt/sources.list"
	cp "$cache/apt/apt.conf" "$root/etc/apt/apt.conf.d/90host"
	in_root apt-get update -o APT::Update::Error-Mode=any
}

# Versions of a package in the indexes, newest first.
versions() {
	in_root apt-cache madison "$1" | awk '{ print $3 }' | sort -uVr
}

has_version() {
	versions "$1" | grep -qxF "$2"
}

source_package() {
	sed -E 's/^([0-9]+\.[0-9]+).*/linux-source-\1/' <<<"$1"
}

# Succeeds if the release $1 has image, headers and source of version $2.
is_complete() {
	has_version "linux-image-$1" "$2" && has_version "linux-headers-$1" "$2" &&
		has_version "$(source_package "$1")" "$2"
}

# Releases that are wanted, newest first.
releases() {
	if [ "$wanted" != "newest-$series" ]; then
		echo "$wanted"
	else
		in_root apt-cache pkgnames "linux-image-$series." |
			sed -En 's/^linux-image-([0-9.]+\+deb13-cloud-amd64)$/\1/p' | sort -Vr
	fi
}

# Prints "RELEASE VERSION" of the kernel that is wanted.
choose() {
	local rel v
	for rel in $(releases); do
		for v in $(versions "linux-image-$rel"); do
			if is_complete "$rel" "$v"; then
				echo "$rel $v"
				return
			fi
		done
	done
	return 1
}

# The packages of version $version that the packages given depend on, with these.
closure() {
	in_root apt-cache depends --recurse --no-recommends --no-suggests --no-enhances \
		--no-conflicts --no-breaks --no-replaces "$@" |
		grep -E '^linux-(image|binary|modules|base|headers|kbuild)-[0-9]' | sort -u |
		while read -r name; do
			! has_version "$name" "$version" || echo "$name=$version"
		done
}

fetch() {
	mkdir -p "$tmp/deb"
	chmod 777 "$tmp/deb"
	# shellcheck disable=SC2046
	in_root sh -c 'cd "$0" && exec apt-get download "$@"' "$tmp/deb" \
		$(closure "linux-image-$release" "linux-headers-$release") \
		"$(source_package "$release")=$version"
}

unpack() {
	local deb
	mkdir -p "$tmp/image" "$tmp/headers" "$tmp/source"
	for deb in "$tmp"/deb/*.deb; do
		case $deb in
		*/linux-headers-* | */linux-kbuild-*) in_root dpkg-deb -x "$deb" "$tmp/headers" ;;
		*/linux-source-*)
			in_root dpkg-deb --fsys-tarfile "$deb" | in_root tar -xf - -C "$tmp" --wildcards '*.tar.xz'
			in_root tar -xf "$(echo "$tmp"/usr/src/linux-source-*.tar.xz)" \
				-C "$tmp/source" --strip-components=1
			rm -rf "${tmp:?}/usr"
			;;
		*) in_root dpkg-deb -x "$deb" "$tmp/image" ;;
		esac
	done
	rm -rf "$tmp/deb"
	# Not needed, and large.
	rm -rf "$tmp/image/usr/share"
	in_root depmod -b "$tmp/image/usr" "$release" || in_root depmod -b "$tmp/image" "$release"
}

# Builds what the kernel's own build has in rust/, with its configuration and compilers.
metadata() {
	local headers=$tmp/headers/usr/src/linux-headers-$release
	local cc
	cc=$(sed -En 's/^CONFIG_CC_VERSION_TEXT="([^ ]+) .*/\1/p' "$headers/.config")
	cp "$headers/.config" "$tmp/source/.config"
	# At a fixed path, for it goes into the metadata.
	in_tree() {
		in_root --kernel "$tmp" make --no-print-directory -C /kernel/source CC="$cc" "$@"
	}
	in_tree olddefconfig
	diff -u "$headers/.config" "$tmp/source/.config" ||
		die "the configuration of $release changes with this toolchain"
	in_tree -j"$(nproc)" prepare
	# The same compiler on the same source gives the same mangled names as in the
	# image; otherwise the modules would not load.
	grep -oE '[[:space:]]_R[A-Za-z0-9_]+' "$headers/Module.symvers" | tr -d '[:blank:]' | sort -u >"$tmp/symbols"
	in_root sh -c 'nm --defined-only "$0"/rust/*.o' "$tmp/source" 2>/dev/null | awk '{ print $NF }' |
		sort -u | comm -23 "$tmp/symbols" - >"$tmp/missing"
	echo "$(wc -l <"$tmp/symbols") Rust symbols in the image, $(wc -l <"$tmp/missing") not in the rebuilt crates"
	[ -s "$tmp/symbols" ] && ! [ -s "$tmp/missing" ] ||
		die "the rebuilt Rust crates differ from those of the stock image"
	rm "$tmp/symbols" "$tmp/missing"
}

# In the tree of the kernel's source, where the tests find each other.
selftests() {
	local tests=tools/testing/selftests
	mkdir "$tmp/selftests"
	(
		cd "$tmp/source"
		cp -r --parents $tests/net/lib $tests/drivers/net/lib $tests/drivers/net/*.{py,c} \
			$tests/*.h tools/net/ynl/pyynl Documentation/netlink/specs "$tmp/selftests/"
	)
}

# One folder, which may be moved: nothing in it names its path.
assemble() {
	local headers=$tmp/headers/usr/src/linux-headers-$release
	local common
	common=$(echo "$tmp"/headers/usr/src/linux-headers-*-common)
	mv "$headers" "$tmp/build"
	mv "$common" "$tmp/common"
	mv "$tmp"/headers/usr/lib/linux-kbuild-* "$tmp/kbuild"
	rm -rf "$tmp/headers" "$tmp/build/scripts" "$tmp/build/tools" \
		"$tmp/common/scripts" "$tmp/common/tools"
	ln -s ../kbuild/scripts ../kbuild/tools "$tmp/common/"
	ln -s ../kbuild/tools "$tmp/build/"
	mkdir -p "$tmp/build/scripts" "$tmp/build/rust/kernel" "$tmp/scripts"
	(cd "$tmp/build/scripts" && ln -s ../../kbuild/scripts/* .)
	cat >"$tmp/build/Makefile" <<-'EOF'
		KBUILD_OUTPUT := $(patsubst %/,%,$(dir $(realpath $(lastword $(MAKEFILE_LIST)))))
		include $(KBUILD_OUTPUT)/../common/Makefile
	EOF
	cp "$tmp/source/scripts/target.json" "$tmp/build/scripts/"
	cp "$tmp"/source/rust/*.rmeta "$tmp"/source/rust/*.so "$tmp/build/rust/"
	cp "$tmp"/source/rust/kernel/generated_arch_*_asm.rs "$tmp/build/rust/kernel/"
	cp "$tmp/source/.clippy.toml" "$tmp/source/.rustfmt.toml" "$tmp/common/"
	cp "$tmp"/source/scripts/{checkpatch.pl,spelling.txt,const_structs.checkpatch} "$tmp/scripts/"
	selftests
	mkdir "$tmp/stock"
	cp "$tmp/source/drivers/pci/controller/pci-hyperv.c" "$tmp/stock/"
	rm -rf "$tmp/source"
	echo "$release" >"$tmp/release"
}

need_root
with_lock kernel

if ! is_fresh; then
	if ! (step "looking for the newest kernel packages" update_indexes); then
		[ -e "$choice" ] || exit 1
		say "using the kernel chosen earlier"
	else
		found=$(choose) ||
			die "no kernel ${wanted/#newest-/of series } with image, headers and source of one version in trixie-backports" \
				"make KERNEL=RELEASE with a release that has them" \
				"make KDIR=FOLDER with a prepared kernel tree of your own"
		echo "$found" >"$choice.new"
		mv "$choice.new" "$choice"
	fi
fi
read_choice
if ! [ -e "$tree/release" ]; then
	need_space "$cache" 4000 "preparing the kernel tree"
	rm -rf --one-file-system "$cache"/kernel-*.tmp
	tmp=$tree.tmp
	mkdir "$tmp"
	step "downloading kernel $release ($version)" fetch
	step "unpacking it" unpack
	step "building its Rust metadata (4 minutes on 2 cores)" metadata
	assemble
	mv "$tmp" "$tree"
fi
echo "$tree"
