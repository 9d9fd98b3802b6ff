#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Provokes the scripts' error messages, and looks for cause and fix in them.

. "$(dirname "$0")/common.sh"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0

# expect TITLE CAUSE FIX COMMAND...: the command fails and its message has both texts.
expect() {
	local title=$1 cause=$2 fix=$3 text
	shift 3
	if text=$("$@" 2>&1); then
		echo "not ok - $title: no error"
	elif ! grep -qF -- "$cause" <<<"$text"; then
		echo "not ok - $title: no \"$cause\" in: $text"
	elif ! grep -F -- "$fix" <<<"$text" | grep -q '^  fix: '; then
		echo "not ok - $title: no fix with \"$fix\" in: $text"
	else
		((passed += 1))
		echo "ok - $title"
		return
	fi
	((failed += 1))
}

check_kdir() {
	"$top/scripts/in-root.sh" "$top/scripts/check-kdir.sh" "$work/tree"
}

tree=$work/tree
config=$tree/include/config/auto.conf
expect "KDIR that does not exist" "there is no such folder" "make without KDIR=" check_kdir
mkdir -p "$tree/include/config" "$tree/rust" "$tree/scripts"
expect "KDIR that is not a kernel tree" "not a prepared kernel tree" "make modules_prepare" check_kdir
touch "$tree/Makefile"
printf 'CONFIG_%s=y\n' X86_64 MODULES PCI_MSI NET INET HYPERV_VMBUS >"$config"
echo 7.1.9-test >"$tree/include/config/kernel.release"
expect "kernel that is too old" "need 7.2 or later" "use a kernel of series 7.2" check_kdir
echo 7.2.0-test >"$tree/include/config/kernel.release"
expect "kernel without Rust" "without CONFIG_RUST" "use a kernel with CONFIG_RUST=y" check_kdir
echo CONFIG_RUST=y >>"$config"
echo 'CONFIG_RUSTC_VERSION_TEXT="rustc 1.2.3 (of long ago)"' >>"$config"
expect "tree without metadata" "lacks the kernel's Rust metadata" "make KERNEL=7.2.0-test" check_kdir
touch "$tree"/rust/lib{core,ffi,bindings,build_error,kernel,pin_init,zerocopy}.rmeta \
	"$tree"/rust/lib{macros,zerocopy_derive}.so "$tree/scripts/target.json"
expect "tree without a linker script for modules" "not prepared for modules" "make modules_prepare" check_kdir
touch "$tree/scripts/module.lds"
expect "tree that was not built" "has no Module.symvers" "make in that tree" check_kdir
echo >"$tree/Module.symvers"
expect "wrong rustc" 'of "rustc 1.2.3 (of long ago)"' "TOOLCHAIN=host" check_kdir
expect "TOOLCHAIN=host without KDIR" "needs a KDIR" "make TOOLCHAIN=host KDIR=" \
	env KDIR= TOOLCHAIN=host "$top/scripts/build-modules.sh" "$work/out"

expect "kernel release that does not exist" "no kernel 1.2.3-none" "make KERNEL=" \
	env HYPERV_RUST_KERNEL=1.2.3-none "$top/scripts/kernel-tree.sh"

expect "cache folder that cannot be made" "cannot write to the cache folder" "HYPERV_RUST_CACHE" \
	env HYPERV_RUST_CACHE=/proc/none "$top/scripts/build-root.sh"
mkdir "$work/small"
expect "no disk space" "no disk space" "HYPERV_RUST_CACHE" \
	unshare -m sh -c 'mount -t tmpfs -o size=50m tmpfs "$1" && HYPERV_RUST_CACHE=$1 "$0"' \
	"$top/scripts/build-root.sh" "$work/small"

cp -r "$top/scripts" "$work/scripts"
chmod -R a+rX "$work"
expect "no root" "needs root" "sudo make" \
	setpriv --reuid=65534 --regid=65534 --clear-groups \
	env HYPERV_RUST_CACHE="$work/cache-of-nobody" "$work/scripts/build-root.sh"

# A system without mmdebstrap and without apt-get: a PATH with all else.
mkdir "$work/bin"
for dir in /usr/local/sbin /usr/local/bin /usr/sbin /usr/bin /sbin /bin; do
	for file in "$dir"/*; do
		case ${file##*/} in
		mmdebstrap | apt-get | apt-config) ;;
		*) ln -sf "$file" "$work/bin/" ;;
		esac
	done
done
expect "missing tool" "mmdebstrap is missing" "install mmdebstrap" \
	env PATH="$work/bin" HYPERV_RUST_CACHE="$work/cache" "$top/scripts/build-root.sh"

printf '#!/bin/sh\n' >"$work/bin/mmdebstrap"
chmod +x "$work/bin/mmdebstrap"
expect "no mirror of Debian" "knows no mirror of Debian" "HYPERV_RUST_MIRROR" \
	env PATH="$work/bin" HYPERV_RUST_MIRROR= HYPERV_RUST_CACHE="$work/cache" "$top/scripts/build-root.sh"

mkdir -p "$work/built/stripped"
printf 'vermagic=1.2.3-other SMP\0' |
	tee "$work/built/stripped/hv_netvsc.ko" >"$work/built/stripped/hv_pci.ko"
expect "installing for another kernel" "was built for kernel 1.2.3-other" "make KERNEL=" \
	"$top/scripts/install.sh" "$work/built"
expect "installing before building" "is not built yet" "make" "$top/scripts/install.sh" "$work/none"

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
