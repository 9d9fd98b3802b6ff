#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Writes apt's configuration for the build root, taken from this machine's own.
#
# usage: host-apt.sh DIRECTORY
#
# DIRECTORY/sources.list   trixie and trixie-backports from this machine's mirror
# DIRECTORY/apt.conf       its proxies and checks

. "$(dirname "$0")/common.sh"

out=$1

# The address of the first Debian archive (not security, not third parties').
host_mirror() {
	local uri list
	uri=$(apt-get indextargets --format "\$(REPO_URI) \$(RELEASE) \$(COMPONENT) \$(ORIGIN)" \
		'Created-By: Packages' 2>/dev/null |
		awk '$3 == "main" && ($4 == "Debian" || $4 == "") && $1 !~ /security/ && $2 !~ /security/ &&
			$1 ~ /\/debian\/?$|^mirror/ { print $1; exit }')
	case $uri in
	mirror+file:*)
		# A list of mirrors in a file, as on cloud images.
		list=/${uri#mirror+file:}
		list=$(sed 's,//*,/,g; s,/$,,' <<<"$list")
		uri=$(awk '/^[a-z]+:/ { print $1; exit }' "$list" 2>/dev/null || :)
		;;
	mirror*) uri= ;;
	esac
	printf '%s' "${uri%/}"
}

mirror=${HYPERV_RUST_MIRROR:-}
if [ -z "$mirror" ] && command -v apt-get >/dev/null; then
	mirror=$(host_mirror)
fi
[ -n "$mirror" ] ||
	die "this machine's apt knows no mirror of Debian" \
		"make HYPERV_RUST_MIRROR=URL with the URL of a Debian mirror"

cat >"$out/sources.list.new" <<EOF
deb $mirror trixie main
deb $mirror trixie-backports main
EOF
{
	echo 'APT::Install-Recommends "false";'
	echo 'Acquire::Languages "none";'
	if command -v apt-config >/dev/null; then
		apt-config dump |
			grep -E '^Acquire::(http|https|ftp|Retries|Check-Valid-Until|Check-Date|ForceIPv[46])(::| )' |
			grep -v ' "";$' || :
	fi
} >"$out/apt.conf.new"
mv "$out/sources.list.new" "$out/sources.list"
mv "$out/apt.conf.new" "$out/apt.conf"
