#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Makes the build root, a Debian trixie with every tool that the modules, the
# lab and the checks need, and prints its path.  A finished one is used again.
#
# Everything runs in there, so that one toolchain serves all machines: the
# kernel's Rust metadata depends on the very build of rustc.

. "$(dirname "$0")/common.sh"

suite=trixie
root_key=$(key "$top/scripts/build-root.sh" "$top/scripts/packages" <<<"$(uname -m)")
root=$cache/root-$root_key

if [ -e "$root/etc/hyperv-rust-root" ]; then
	realpath "$root"
	exit
fi

install_mmdebstrap() {
	export DEBIAN_FRONTEND=noninteractive
	apt-get install -y --no-install-recommends mmdebstrap debian-archive-keyring ||
		{ apt-get update && apt-get install -y --no-install-recommends mmdebstrap debian-archive-keyring; }
}

find_keyring() {
	local file
	for file in /usr/share/keyrings/debian-archive-keyring.{pgp,gpg}; do
		if [ -e "$file" ]; then
			printf '%s' "$file"
			return
		fi
	done
}

make_root() {
	local packages
	packages=$(sed 's/#.*//' "$top/scripts/packages" | xargs | tr ' ' ',')
	# The namespace takes all mounts with it, however this ends.
	unshare -m --propagation private -- \
		mmdebstrap --mode=root --variant=apt --skip=cleanup/apt/lists \
		--keyring="$keyring" --aptopt="$tmp.apt/apt.conf" --include="$packages" \
		$suite "$tmp" "$tmp.apt/sources.list"
	cp "$tmp.apt/apt.conf" "$tmp/etc/apt/apt.conf.d/90host"
	# Where the other scripts look for it.
	rm -f "$tmp"/etc/apt/sources.list.d/*
	cp "$tmp.apt/sources.list" "$tmp/etc/apt/sources.list"
	mkdir -p "$tmp/kernel"
	touch "$tmp/etc/resolv.conf" "$tmp/etc/hosts"
	# What the kernel's metadata depends on.
	chroot "$tmp" dpkg-query -W rustc rust-src bindgen libclang1-19 gcc-14 >"$tmp/etc/hyperv-rust-toolchain"
	echo "$root_key" >"$tmp/etc/hyperv-rust-root"
}

need_root
with_lock build-root
if [ -e "$root/etc/hyperv-rust-root" ]; then
	echo "$root"
	exit
fi
root=$cache/root-$root_key

[ "$(uname -m)" = x86_64 ] ||
	die "this is a $(uname -m) machine: the drivers and the lab are for x86_64" "use an x86_64 machine"
need_space "$cache" 5000 "the build root"

# What an interrupted run left.
rm -rf --one-file-system "$cache"/root-*.tmp "$cache"/root-*.tmp.apt

if ! command -v mmdebstrap >/dev/null; then
	command -v apt-get >/dev/null ||
		die "mmdebstrap is missing, and this is not a Debian system, which would install it" \
			"install mmdebstrap and Debian's archive keyring"
	step "installing mmdebstrap" install_mmdebstrap
fi
keyring=$(find_keyring)
[ -n "$keyring" ] ||
	die "Debian's archive keyring is missing from /usr/share/keyrings" \
		"apt-get install debian-archive-keyring"

tmp=$root.tmp
mkdir "$tmp.apt"
"$top/scripts/host-apt.sh" "$tmp.apt"
say "build root: $(sed -n '1s/^deb //p' "$tmp.apt/sources.list") -> $root"
step "making the build root (a few minutes, about 900 MB to download)" make_root
rm -rf "$tmp.apt"
mv "$tmp" "$root"
echo "$root"
