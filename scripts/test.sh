#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Runs every check, one line each, and ends with "N passed, N failed".
#
# usage: test.sh [--lint]    --lint: only what needs no virtual machine

. "$(dirname "$0")/common.sh"

lint_only=no
[ "${1:-}" != --lint ] || lint_only=yes

build=$top/build
passed=0 failed=0

took() {
	printf '%d:%02d min since the start' $((SECONDS / 60)) $((SECONDS % 60))
}

# result STATUS TITLE
result() {
	if [ "$1" -eq 0 ]; then
		((passed += 1))
		echo "ok $((passed + failed)) - $2"
	else
		((failed += 1))
		echo "not ok $((passed + failed)) - $2"
	fi
}

# check TITLE COMMAND...: a check that either passes or fails.
check() {
	local title=$1 status=0
	shift
	say "$title ($(took))"
	"$@" 9>&- || status=$?
	result $status "$title"
}

# counted TITLE PATTERN COMMAND...: a program which counts its own checks; PATTERN
# (for sed) turns its totals into "PASSED FAILED".  No total is a failure.
counted() {
	local title=$1 pattern=$2 log status=0 p f ps=0 fs=0
	shift 2
	log=$(mktemp)
	say "$title ($(took))"
	"$@" 2>&1 | tee "$log" || status=$?
	while read -r p f; do
		((ps += p, fs += f)) || :
	done < <(sed -En "$pattern" "$log")
	rm -f "$log"
	if ((ps + fs == 0)) || { [ $status -ne 0 ] && [ $fs -eq 0 ]; }; then
		((failed += 1))
		echo "not ok - $title ended with status $status after $ps passed, $fs failed"
	fi
	((passed += ps, failed += fs)) || :
	echo "# $title: $ps passed, $fs failed"
}

check "the modules build" "$top/scripts/build-modules.sh" "$build"
check "the lab's programs build" "$top/scripts/build-tools.sh" "$build"
built=$failed

tree=$("$top/scripts/kernel-tree.sh")
root=$("$top/scripts/build-root.sh")
in_root=("$top/scripts/in-root.sh" --kernel "$tree")
cargo=("${in_root[@]}" cargo --locked --color never)
CARGO_TARGET_DIR=$(cargo_target "$root")
export CARGO_TARGET_DIR
manifest=(--manifest-path "$top/tools/Cargo.toml")
cd "$top"

mapfile -t kernel_rust < <(find rust drivers -name '*.rs' | sort)
mapfile -t kernel_files < <(find rust drivers Kbuild -name '*.rs' -o -name '*.[ch]' -o -name Kbuild | sort)
mapfile -t shell < <(grep -rlE '^#!/bin/(ba)?sh' scripts tools/image .ci 2>/dev/null | sort)
mapfile -t rest < <(find Documentation -name '*.rst' 2>/dev/null | sort)

check_rest() {
	local file status=0
	for file in "${rest[@]}"; do
		"${in_root[@]}" python3 -m docutils --report=2 --exit-status=2 --writer=null "$file" || status=1
	done
	return $status
}

# Warnings are errors here, so that nothing that was built before hides one.
kernel_clippy() {
	"$top/scripts/build-modules.sh" "$build/clippy" CLIPPY=1 KRUSTFLAGS=-Dwarnings
}

check "rustfmt: kernel code" "${in_root[@]}" rustfmt --check --color never "${kernel_rust[@]}"
check "rustfmt: host code" "${cargo[@]}" fmt "${manifest[@]}" --all --check -- --color never
check "clippy: kernel code" kernel_clippy
check "clippy: host code" "${cargo[@]}" clippy "${manifest[@]}" --workspace --all-targets --release -- -D warnings
check "checkpatch" "${in_root[@]}" perl /kernel/scripts/checkpatch.pl --no-tree --quiet --no-summary --terse --color=never \
	--ignore FILE_PATH_CHANGES,SPDX_LICENSE_TAG --file "${kernel_files[@]}"
check "shellcheck" "${in_root[@]}" shellcheck -x -P SCRIPTDIR "${shell[@]}"
if [ ${#rest[@]} -gt 0 ]; then
	check "reST: Documentation" check_rest
else
	result 1 "reST: Documentation is missing"
fi
counted "messages of the scripts" 's/^([0-9]+) passed, ([0-9]+) failed$/\1 \2/p' "$top/scripts/test-messages.sh"
counted "unit tests" 's/^test result: .* ([0-9]+) passed; ([0-9]+) failed.*/\1 \2/p' \
	"${cargo[@]}" test "${manifest[@]}" --workspace --release --no-fail-fast

if [ $lint_only = no ] && [ "$built" -ne 0 ]; then
	result 1 "scenarios: not run, for the build failed"
elif [ $lint_only = no ]; then
	check "the guest image is made" "$top/scripts/lab.sh" --prepare
	# Both driver sets in one run, which compares them.  The limit is for a machine
	# that hangs: every check has a deadline of its own.
	counted "scenarios" 's/^([0-9]+) passed, ([0-9]+) failed$/\1 \2/p' \
		timeout -k 30 65m "$top/scripts/lab.sh" test --output "$build/lab-output"
	# Fails on no figure, only when one could not be measured.
	check "the benchmark gives every figure" \
		timeout -k 30 15m "$top/scripts/lab.sh" bench --quick --output "$build/bench-quick"
fi

say "all done ($(took))"
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
