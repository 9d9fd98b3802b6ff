#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Runs a command in the build root, in the current folder of this checkout.
#
# usage: in-root.sh [--kernel FOLDER] [--bind FOLDER]... COMMAND [ARGUMENT]...
#
# --kernel mounts a folder made by kernel-tree.sh on /kernel; --bind shows
# another folder of this machine at the same path.  The checkout, the cache and
# /tmp are at their own paths.  All mounts are made in a private namespace and
# vanish with the command.  Within the root this just runs the command.

. "$(dirname "$0")/common.sh"

inside() {
	local dir
	# The root becomes a mount point, which / of a system is expected to be.
	mount --bind "$root" "$root"
	for dir in proc sys dev; do
		mount --rbind "/$dir" "$root/$dir"
	done
	mount -t tmpfs -o mode=755 tmpfs "$root/run"
	mkdir -m 1777 "$root/run/lock"
	mount --bind /tmp "$root/tmp"
	for dir in "$cache" "$top" "${binds[@]}"; do
		mkdir -p "$root$dir"
		mount --bind "$dir" "$root$dir"
	done
	if [ -n "$kernel" ]; then
		mount --bind "$kernel" "$root/kernel"
	fi
	# Names and certificates as on this machine.
	for dir in /etc/resolv.conf /etc/hosts; do
		if [ -e "$dir" ] && [ -e "$root$dir" ]; then
			mount --bind "$(realpath "$dir")" "$root$dir"
		fi
	done
	local bundle=/etc/ssl/certs/ca-certificates.crt
	for dir in "${SSL_CERT_FILE:-}" "${CURL_CA_BUNDLE:-}" $bundle; do
		if [ -f "$dir" ]; then
			mount --bind "$(realpath "$dir")" "$root$bundle"
			break
		fi
	done

	local env=(HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 TERM="${TERM:-dumb}"
		HYPERV_RUST_CACHE="$cache" CARGO_HOME="$cache/cargo"
		CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$cache/cargo-target}")
	local name
	for name in http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY ALL_PROXY all_proxy \
		SOURCE_DATE_EPOCH RUST_BACKTRACE; do
		[ -z "${!name:-}" ] || env+=("$name=${!name}")
	done
	while read -r name; do
		env+=("$name=${!name}")
	done < <(compgen -e | grep -E '^(HVLAB|HYPERV_RUST|CARGO_HTTP|CARGO_NET|CARGO_SOURCE|CARGO_REGISTR(Y|IES))_' | grep -v HYPERV_RUST_CACHE)
	cd /
	# shellcheck disable=SC2016
	exec chroot "$root" /usr/bin/env -i "${env[@]}" \
		/bin/sh -c 'cd "$0" && exec "$@"' "$cwd" "$@"
}

if [ -e /etc/hyperv-rust-root ]; then
	while [ "${1:-}" = --kernel ] || [ "${1:-}" = --bind ]; do
		shift 2
	done
	exec "$@"
fi

kernel='' binds=() root='' cwd=$top
while :; do
	case ${1:-} in
	--kernel) kernel=$2 ;;
	--bind) binds+=("$2") ;;
	--inside) root=$2 ;;
	*) break ;;
	esac
	shift 2
done
case $PWD/ in
"$top"/*) cwd=$PWD ;;
esac

if [ -n "$root" ]; then
	inside "$@"
fi

need_root
root=$("$top/scripts/build-root.sh")
make_cache
args=(--inside "$root")
[ -z "$kernel" ] || args+=(--kernel "$kernel")
for dir in "${binds[@]}"; do
	args+=(--bind "$dir")
done
HYPERV_RUST_CACHE=$cache exec unshare -m --propagation private -- "$0" "${args[@]}" "$@"
