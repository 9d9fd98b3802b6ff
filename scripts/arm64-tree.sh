#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Prepares Debian's arm64 kernel for building Rust modules on this machine, and
# prints the path of a folder with:
#
#   release      the kernel's release
#   config.diff  how its configuration differs from Debian's
#   source/      KDIR: the source with what modules_prepare makes, and the list
#                of what Debian's kernel exports
#
# usage: arm64-tree.sh
#
# It is the arm64 counterpart of the kernel that kernel-tree.sh has chosen: the
# same source, the configuration of the same flavour.  Debian builds it with gcc,
# and the build root has no gcc that makes arm64 code: this is for clang (LLVM=1),
# by which the options that depend on the compiler differ.

. "$(dirname "$0")/common.sh"

root=$("$top/scripts/build-root.sh")
amd64=$("$top/scripts/kernel-tree.sh")
make_cache
release=$(sed 's/amd64$/arm64/' "$amd64/release")
tree=$cache/kernel-$release-$(key "$top/scripts/arm64-tree.sh" "$root/etc/hyperv-rust-toolchain" <<<"${amd64##*/}")

if [ -e "$tree/release" ]; then
	echo "$tree"
	exit
fi

in_root() {
	"$top/scripts/in-root.sh" "$@"
}

headers_package=linux-headers-$release
source_package=$(sed -E 's/^([0-9]+\.[0-9]+).*/linux-source-\1/' <<<"$release")

# The build root's apt as if that were arm64.
apt_options=(-o APT::Architecture=arm64 -o APT::Architectures::=arm64
	-o Dir::State::status=/dev/null -o Dir::State::Lists="$cache/apt/arm64/lists"
	-o Dir::Cache="$cache/apt/arm64")

update_indexes() {
	mkdir -p "$cache"/apt/arm64/{lists,archives}/partial
	"$top/scripts/host-apt.sh" "$cache/apt"
	cp "$cache/apt/sources.list" "$root/etc/apt/sources.list"
	cp "$cache/apt/apt.conf" "$root/etc/apt/apt.conf.d/90host"
	in_root apt-get "${apt_options[@]}" update -o APT::Update::Error-Mode=any
}

versions() {
	in_root apt-cache "${apt_options[@]}" madison "$1" | awk '{ print $3 }' | sort -u
}

# The newest version that both packages have.
newest() {
	comm -12 <(versions "$headers_package") <(versions "$source_package") | sort -rV | head -n 1
}

fetch() {
	mkdir "$tmp/deb"
	chmod 777 "$tmp/deb"
	# shellcheck disable=SC2016
	in_root sh -c 'cd "$0" && exec "$@"' "$tmp/deb" apt-get "${apt_options[@]}" download \
		"$headers_package=$version" "$source_package=$version"
}

unpack() {
	mkdir "$tmp/headers" "$tmp/source" "$tmp/package"
	in_root dpkg-deb -x "$(echo "$tmp"/deb/linux-headers-*.deb)" "$tmp/headers"
	in_root dpkg-deb -x "$(echo "$tmp"/deb/linux-source-*.deb)" "$tmp/package"
	in_root tar -xf "$(echo "$tmp"/package/usr/src/linux-source-*.tar.xz)" \
		-C "$tmp/source" --strip-components=1
	rm -rf "$tmp/deb" "$tmp/package"
}

# Builds what modules need, the Rust crates above all.
prepare() {
	local headers=$tmp/headers/usr/src/$headers_package
	local source=$tmp/source
	cp "$headers/.config" "$source/.config"
	# As Debian names its kernel.
	sed -E 's/^[0-9.]+//' <<<"$release" >"$source/localversion"
	# At a fixed path, for it goes into the metadata.
	in_tree() {
		in_root --kernel "$tmp" make --no-print-directory -C /kernel/source ARCH=arm64 LLVM=1 "$@"
	}
	in_tree olddefconfig
	diff -U0 --label Debian --label here "$headers/.config" "$source/.config" >"$tmp/config.diff" || [ $? -eq 1 ]
	in_tree -j"$(nproc)" modules_prepare
	local made
	made=$(cat "$source/include/config/kernel.release")
	[ "$made" = "$release" ] || die "the source is of kernel $made, not of $release"

	# With another compiler the configuration is not the same, but what the crates
	# export has to be, or the list would be that of another kernel.
	cp "$headers/Module.symvers" "$source/"
	grep -oE '[[:space:]]_R[A-Za-z0-9_]+' "$source/Module.symvers" | tr -d '[:blank:]' | sort -u >"$tmp/symbols"
	in_root sh -c 'llvm-nm --defined-only "$0"/rust/*.o' "$source" 2>/dev/null | awk '{ print $NF }' |
		sort -u | comm -23 "$tmp/symbols" - >"$tmp/missing"
	echo "$(wc -l <"$tmp/symbols") Rust symbols in Debian's kernel, $(wc -l <"$tmp/missing") not in the rebuilt crates"
	[ -s "$tmp/symbols" ] && ! [ -s "$tmp/missing" ] ||
		die "the rebuilt Rust crates differ from those of Debian's kernel"
	rm -r "$tmp/symbols" "$tmp/missing" "$tmp/headers"
}

# What no module includes, two gigabytes.
trim() {
	local dir
	cd "$tmp/source"
	rm -rf Documentation block certs crypto drivers fs init io_uring ipc kernel lib mm net \
		samples security sound tools/testing usr virt
	for dir in arch/*/; do
		[ "$dir" = arch/arm64/ ] || rm -rf "$dir"
	done
	# Modules would make what comes of these anew each time.
	rm rust/kernel/*.rs.S
}

need_root
with_lock arm64
if [ -e "$tree/release" ]; then
	echo "$tree"
	exit
fi
need_space "$cache" 4000 "preparing the arm64 kernel tree"
step "looking for Debian's arm64 kernel packages" update_indexes
version=$(newest)
[ -n "$version" ] ||
	die "trixie-backports has no $headers_package with $source_package of the same version" \
		"make update, then make arm64: for a newer kernel" \
		"make arm64 KERNEL=RELEASE with the release of an amd64 kernel that has an arm64 counterpart"
rm -rf --one-file-system "$cache"/arm64-*.tmp
# Not kernel-*.tmp, which kernel-tree.sh takes for its own.
tmp=$cache/arm64-$release.tmp
mkdir "$tmp"
step "downloading $source_package and $headers_package ($version)" fetch
step "unpacking them" unpack
step "preparing the arm64 kernel tree (5 minutes on 2 cores)" prepare
step "removing the source that no module needs" trim
echo "$release" >"$tmp/release"
mv "$tmp" "$tree"
echo "$tree"
