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
modules=(hv_netvsc.ko hv_pci.ko)
release=${HYPERV_RUST_KERNEL:-$(uname -r)}

# A VF, or on some machines the disk, is needed before the root file system is there,
# and the C hv_netvsc is in the initramfs anyway: without ours there, it would be first.
initramfs_conf=$base/usr/share/initramfs-tools/modules.d/hyperv-rust
modprobe_conf=$base/etc/modprobe.d/hyperv-rust.conf

update_lists() {
	depmod ${base:+-b "$base"} "$1"
	if [ -z "$base" ] && [ -e "/boot/initrd.img-$1" ] && command -v update-initramfs >/dev/null; then
		say "updating the initramfs of $1"
		update-initramfs -u -k "$1"
	fi
}

need_permission() {
	[ "$(id -u)" -eq 0 ] || die "$1 modules needs root" "sudo make $2"
	command -v depmod >/dev/null || die "depmod is missing" "apt-get install kmod"
}

uninstall() {
	local dir module found=no here
	need_permission removing uninstall
	rm -f "$initramfs_conf" "$modprobe_conf"
	for dir in "$base"/lib/modules/*; do
		here=no
		for module in "${modules[@]}"; do
			[ -e "$dir/updates/$module" ] || continue
			rm "$dir/updates/$module"
			say "removed $dir/updates/$module"
			here=yes found=yes
		done
		if [ $here = yes ]; then
			rmdir --ignore-fail-on-non-empty "$dir/updates"
			update_lists "$(basename "$dir")"
		fi
	done
	[ $found = yes ] || say "nothing is installed"
	cat >&2 <<-EOF

		The kernel's own drivers are used from the next boot on, if
		    initcall_blacklist=init_hv_pci_drv
		is no longer on the kernel's command line: take it off before you boot.
	EOF
}

if [ "$1" = --uninstall ]; then
	uninstall
	exit
fi

built=$1/stripped
for module in "${modules[@]}"; do
	[ -e "$built/$module" ] || die "$1/$module is not built yet" "make"
	built_for=$(tr '\0' '\n' <"$built/$module" | sed -n 's/^vermagic=\([^ ]*\).*/\1/p')
	[ "$built_for" = "$release" ] ||
		die "$module was built for kernel $built_for, the running one is $release" \
			"make KERNEL=$release, then make install" \
			"or boot $built_for"
done
need_permission installing install
folder=$base/lib/modules/$release
[ -d "$folder" ] || die "there is no $folder" "install the image package of kernel $release"

mkdir -p "$folder/updates"
for module in "${modules[@]}"; do
	install -m 644 "$built/$module" "$folder/updates/$module"
	say "installed $folder/updates/$module"
done
install -D -m 644 "$(dirname "$0")/modprobe.conf" "$modprobe_conf"
if [ -d "$(dirname "$initramfs_conf")" ]; then
	printf '%s\n' hv_netvsc hv_pci >"$initramfs_conf"
fi
update_lists "$release"
cat >&2 <<EOF

hv_netvsc is used from the next boot on.
hv_pci takes over from the kernel's built-in driver when the kernel's command line has
    initcall_blacklist=init_hv_pci_drv
README.md shows how, and the way back.
EOF
