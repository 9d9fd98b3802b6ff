#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Installs the modules for the running kernel, in the folder that modprobe
# prefers to the kernel's own, or removes them.
#
# usage: install.sh FOLDER | --uninstall
#
# INSTALL_MOD_PATH   a folder instead of /

. "$(dirname "$0")/common.sh"

base=${INSTALL_MOD_PATH:-}
modules=(hv_netvsc.ko pci-hyperv.ko)
release=${HYPERV_RUST_KERNEL:-$(uname -r)}
updates=$base/lib/modules/$release/updates

update_lists() {
	local args=()
	command -v depmod >/dev/null || die "depmod is missing" "apt-get install kmod"
	[ -z "$base" ] || args=(-b "$base")
	depmod "${args[@]}" "$release"
	# hv_netvsc may be loaded by the initramfs, which has its own copy.
	if [ -z "$base" ] && command -v update-initramfs >/dev/null && [ -e "/boot/initrd.img-$release" ]; then
		update-initramfs -u -k "$release"
	fi
}

if [ "$1" = --uninstall ]; then
	[ "$(id -u)" -eq 0 ] || die "removing modules needs root" "sudo make uninstall"
	found=no
	for dir in "$base"/lib/modules/*/updates; do
		for module in "${modules[@]}"; do
			[ -e "$dir/$module" ] || continue
			rm "$dir/$module"
			say "removed $dir/$module"
			release=$(basename "$(dirname "$dir")")
			found=yes
		done
		[ $found = no ] || update_lists
	done
	[ $found = yes ] || say "nothing is installed"
	say "the kernel's own drivers are back with the next boot; take initcall_blacklist=init_hv_pci_drv off its command line"
	exit
fi

for module in "${modules[@]}"; do
	[ -e "$1/$module" ] || die "$1/$module is not built yet" "make"
	built_for=$(tr '\0' '\n' <"$1/$module" | sed -n 's/^vermagic=\([^ ]*\).*/\1/p')
	[ "$built_for" = "$release" ] ||
		die "$module was built for kernel $built_for, the running one is $release" \
			"make KERNEL=$release, then make install" \
			"or boot $built_for"
done
[ "$(id -u)" -eq 0 ] || die "installing modules needs root" "sudo make install"
[ -d "$base/lib/modules/$release" ] || die "there is no $base/lib/modules/$release"
mkdir -p "$updates"
for module in "${modules[@]}"; do
	install -m 644 "$1/$module" "$updates/$module"
	say "installed $updates/$module"
done
update_lists
cat >&2 <<EOF

hv_netvsc is used from the next boot on.
hv_pci takes over from the kernel's built-in driver when the kernel's command line has
    initcall_blacklist=init_hv_pci_drv
README.md shows how, and the way back.
EOF
