#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Tells whether Rust modules can be built against a kernel tree with the rustc
# that is found here, and if not, why and what to do.
#
# usage: check-kdir.sh KDIR [arm64]

. "$(dirname "$0")/common.sh"

# The series whose internal Rust interfaces the modules know.
oldest=7.2
newest=7.3

# is_older SERIES SERIES
is_older() {
	[ "$1" != "$2" ] && printf '%s\n' "$1" "$2" | sort -CV
}

kdir=$1
arch=${2:-x86}
config=$kdir/include/config/auto.conf

[ -d "$kdir" ] ||
	die "KDIR=$kdir: there is no such folder" \
		"make without KDIR= builds for Debian's cloud kernel and prepares all that itself"
[ -e "$kdir/Makefile" ] && [ -e "$config" ] ||
	die "KDIR=$kdir is not a prepared kernel tree (no Makefile or no include/config/auto.conf)" \
		"make modules_prepare in that tree, or install the headers package of the kernel"
release=$(cat "$kdir/include/config/kernel.release" 2>/dev/null || echo RELEASE)
series=$(sed -En 's/^([0-9]+\.[0-9]+).*/\1/p' <<<"$release")
! is_older "${series:-$oldest}" $oldest ||
	die "KDIR=$kdir is of kernel $release: the modules need $oldest or later" \
		"use a kernel of series $oldest or $newest: apt-cache search cloud-amd64 lists Debian's"
grep -q '^CONFIG_RUST=y' "$config" ||
	die "KDIR=$kdir is of a kernel built without CONFIG_RUST: it cannot load Rust modules" \
		"use a kernel with CONFIG_RUST=y, such as linux-image-cloud-amd64 of trixie-backports"
case $arch in
arm64) machine=ARM64 target='' tools="bindgen clang ld.lld" ;;
*) machine=X86_64 target=scripts/target.json tools="bindgen gcc ld" ;;
esac
for option in $machine MODULES PCI_MSI NET INET; do
	grep -q "^CONFIG_$option=y" "$config" ||
		die "KDIR=$kdir is of a kernel without CONFIG_$option, which the drivers need"
done
grep -q '^CONFIG_HYPERV_VMBUS=[ym]' "$config" || grep -q '^CONFIG_HYPERV=[ym]' "$config" ||
	die "KDIR=$kdir is of a kernel without the VMBus driver (CONFIG_HYPERV_VMBUS)" \
		"use a kernel with Hyper-V support"

missing=
for file in rust/lib{core,ffi,bindings,build_error,kernel,pin_init,zerocopy}.rmeta \
	rust/lib{macros,zerocopy_derive}.so $target; do
	[ -e "$kdir/$file" ] || missing="$missing $file"
done
if [ -n "$missing" ]; then
	die "KDIR=$kdir lacks the kernel's Rust metadata:$missing" \
		"Debian's headers never have it: make KERNEL=$release rebuilds it from the kernel's source" \
		"a tree of your own: make modules_prepare in it" \
		"other distributions: look for a package with it (Ubuntu: linux-lib-rust-*)"
fi
# Debian has it with the architecture.
[ -e "$kdir/scripts/module.lds" ] || [ -e "$kdir/arch/$arch/module.lds" ] ||
	die "KDIR=$kdir has no scripts/module.lds: it is not prepared for modules" "make modules_prepare in that tree"
[ -s "$kdir/Module.symvers" ] ||
	die "KDIR=$kdir has no Module.symvers: it was prepared, but not built" \
		"make in that tree, or copy the file from the headers package of the same kernel"

command -v rustc >/dev/null ||
	die "rustc is missing" "apt-get install rustc, or leave out TOOLCHAIN=host"
have=$(rustc --version)
want=$(sed -En 's/^CONFIG_RUSTC_VERSION_TEXT="?([^"]*)"?$/\1/p' "$config")
[ "$have" = "$want" ] ||
	die "wrong rustc for KDIR=$kdir: its metadata is of \"$want\", here is \"$have\"" \
		"make TOOLCHAIN=host KDIR=$kdir on the machine whose rustc built that kernel" \
		"or make modules_prepare in that tree with this rustc"
for tool in $tools; do
	command -v "$tool" >/dev/null ||
		die "$tool is missing" "apt-get install bindgen build-essential, or leave out TOOLCHAIN=host"
done

! is_older $newest "${series:-$newest}" ||
	say "warning: untested with kernel $release, only with $oldest and $newest: if the modules do not build, use one of these"
