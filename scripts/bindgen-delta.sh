#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
#
# Generates bindings for what the kernel's own bindings crate lacks.
#
# usage: bindgen-delta.sh OUTPUT HEADER KERNEL_BINDINGS_RMETA PARAMETERS BINDGEN_OPTION... -- C_FLAG...
#
# PARAMETERS holds options of bindgen, one a line, like the kernel's file of
# this name.  A line "--redefine NAME" asks for an item of our own although the
# kernel's crate has one: such as a structure that is opaque there.
#
# bindgen runs twice.  The first run shows which items are needed at all, the
# second leaves out those which the kernel's crate has (the users import them
# from there, so that both crates speak of the same types).

set -eu

out=$1 header=$2 kernel=$3 parameters=$4
shift 4

options=$(grep -Ev '^(#|--redefine |$)' "$parameters" || :)

# One word an option, patterns stay as they are.
set -f
# shellcheck disable=SC2086
"${BINDGEN:-bindgen}" "$header" $options -o "$out.all" "$@"

sed -En 's/^ *--redefine +//p' "$parameters" | sort -u >"$out.own"
# The metadata lists every item of the crate, with its kind.
RUSTC_BOOTSTRAP=1 "${RUSTC:-rustc}" -Zls=items "$kernel" |
	sed -En 's/.* (Struct|Union|Enum|TyAlias|Const|Static \{[^}]*\}|Fn|Mod) ([A-Za-z0-9_]+) .*/\2/p' |
	sort -u | comm -23 - "$out.own" >"$out.kernel"
if ! [ -s "$out.kernel" ]; then
	echo "$0: no items found in $kernel" >&2
	exit 1
fi
sed -En 's/^ *pub (struct|union|enum|type|const|static|static mut|fn|mod) ([A-Za-z0-9_]+).*/\2/p' "$out.all" |
	grep -v '^_bindgen_ty_' | sort -u | comm -12 - "$out.kernel" |
	sed 's/^/--blocklist-item\n/' >"$out.block"
# shellcheck disable=SC2046,SC2086
"${BINDGEN:-bindgen}" "$header" $options $(cat "$out.block") -o "$out" "$@"
rm -f "$out.all" "$out.own" "$out.kernel" "$out.block"
