#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Builds the programs of tools/ into a folder.
#
# usage: build-tools.sh OUTPUT_FOLDER

. "$(dirname "$0")/common.sh"

out=$1
root=$("$top/scripts/build-root.sh")
target=$(cargo_target "$root")
mkdir -p "$out" "$target"
# Another run may use the same folder.
exec 9>"$target/.lock"
flock 9
CARGO_TARGET_DIR=$target "$top/scripts/in-root.sh" \
	cargo build --manifest-path "$top/tools/Cargo.toml" --workspace --bins --release --locked 9>&-
# QEMU's plugin cannot be linked statically (see .cargo/config.toml).
CARGO_TARGET_DIR=$target/plugin "$top/scripts/in-root.sh" env RUSTFLAGS="-C target-feature=-crt-static" \
	cargo rustc --manifest-path "$top/tools/Cargo.toml" --package insncount --lib --crate-type cdylib \
	--release --locked 9>&-
for file in "$target"/x86_64-unknown-linux-gnu/release/* "$target"/plugin/x86_64-unknown-linux-gnu/release/*.so; do
	if [ -f "$file" ] && [ -x "$file" ]; then
		name=$out/$(basename "$file")
		cmp -s "$file" "$name" || { cp "$file" "$name.new" && mv "$name.new" "$name"; }
	fi
done
[ -z "${SUDO_UID:-}" ] || chown -R "$SUDO_UID:${SUDO_GID:-$SUDO_UID}" "$out"
