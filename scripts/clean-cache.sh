#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Removes what the other scripts keep in the cache folder.

. "$(dirname "$0")/common.sh"

[ -d "$cache" ] || exit 0
need_root
with_lock build-root
for dir in "$cache"/root-* "$cache"/kernel-* "$cache"/arm64-* "$cache"/cargo-target-* "$cache"/cargo "$cache"/image "$cache"/apt "$cache"/log; do
	[ -e "$dir" ] || continue
	say "removing $dir"
	rm -rf --one-file-system "$dir"
done
