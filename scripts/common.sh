# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# Sourced by the other scripts: messages, progress, locking, cache keys.
#
# Results of a script go to stdout, everything meant for people to stderr.

set -euo pipefail

# Used by the scripts that source this file.
# shellcheck disable=SC2034
top=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
# Downloads and everything slow to build live here, outside the checkout.
cache=${HYPERV_RUST_CACHE:-/var/cache/hyperv-rust}
# Without it bash goes on after Ctrl-C when what it waits for ends by itself just then.
trap 'exit 130' INT

say() {
	printf '== %s\n' "$*" >&2
}

# die CAUSE FIX...: one line for the cause, one for each line of the fix.
die() {
	printf '\nerror: %s\n' "$1" >&2
	shift
	[ $# -eq 0 ] || printf '  fix: %s\n' "$@" >&2
	exit 1
}

need_root() {
	[ "$(id -u)" -eq 0 ] ||
		die "this needs root: it makes a build root, which takes chroot and mount" \
			"sudo make"
	unshare -m true 2>/dev/null ||
		die "no permission for a private mount namespace (unshare -m)" \
			"in a container, give it CAP_SYS_ADMIN (docker run --privileged), or use a virtual machine"
}

# need_space DIRECTORY MEGABYTES WHAT_FOR
need_space() {
	local free
	free=$(df -Pm "$1" | awk 'NR == 2 { print $4 }')
	[ "$free" -ge "$2" ] ||
		die "no disk space: $3 takes $2 MB, $1 has $free MB free" \
			"free some space there, or set HYPERV_RUST_CACHE to a folder on another disk"
}

make_cache() {
	mkdir -p "$cache/log" 2>/dev/null ||
		die "cannot write to the cache folder $cache" \
			"set HYPERV_RUST_CACHE to a folder that can be written"
	cache=$(realpath "$cache")
}

# key FILE...: 12 hex digits that stand for the contents of these files and for stdin.
key() {
	cat "$@" - | sha256sum | cut -c1-12
}

# cargo_target ROOT: the folder for what cargo builds with the compiler in this build root.
# Each checkout has its own: cargo does not tell the same crate of two checkouts apart.
cargo_target() {
	printf '%s/cargo-target-%s' "$cache" "$(key "$1/etc/hyperv-rust-toolchain" <<<"$top")"
}

# with_lock NAME: holds the lock until the script ends.
with_lock() {
	make_cache
	exec 9>"$cache/$1.lock"
	if ! flock -n 9; then
		say "another run is working on $1, waiting for it"
		flock 9
	fi
}

# step TITLE COMMAND...: runs the command with its output in a log file, shows
# that it is alive, and shows the end of the log when it fails.
step() {
	local title=$1 log status=0 start=$SECONDS next=10 pid
	shift
	log=$cache/log/$(tr -cs 'a-zA-Z0-9\n' '-' <<<"$title" | cut -c1-60)-$$.log
	say "$title"
	# In a process group of its own, so that all of it can be ended.
	set -m
	"$@" >"$log" 2>&1 9>&- </dev/null &
	pid=$!
	set +m
	trap 'kill -- -$pid 2>/dev/null; wait $pid || :; exit 130' INT TERM
	while kill -0 $pid 2>/dev/null; do
		sleep 0.5
		if ((SECONDS - start >= next)); then
			printf '   %3d s: %s\n' $((SECONDS - start)) \
				"$(tail -c 400 "$log" | tr '\r' '\n' | grep -v '^ *$' | tail -n 1 | cut -c1-90)" >&2
			((next += 10))
		fi
	done
	wait $pid || status=$?
	trap 'exit 130' INT
	trap - TERM
	if [ $status -ne 0 ]; then
		tail -n 40 "$log" >&2
		die "failed: $title (exit status $status)" "the full log is $log"
	fi
	rm -f "$log"
	say "done in $((SECONDS - start)) s"
}
