#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Switches a running machine between the kernel's own drivers and ours, without a
# reboot.  The network is away for some seconds.  If it does not return in time,
# what was there before is put back, so this can be done over ssh.  Needs no other
# file of the repository.

set -u

usage() {
	cat <<'END'
usage: switch-drivers.sh c|rust [OPTION...]
       switch-drivers.sh status

Switches hv_netvsc and hv_pci to the kernel's own drivers (c) or to ours (rust).  A
driver that is built into the kernel, or that a disk in use depends on, stays.
Nothing changes for the next boot; see "make install" for that.

  --timeout SECONDS  put back what was there if the network is not back by then (60)
  --check COMMAND    succeeds when the network is back (default: every default
                     gateway answers ARP or neighbour discovery)
  --modules FOLDER   where our modules are (/lib/modules/RELEASE/updates)
  --stock-pci FILE   the kernel's own hv_pci as a module (pci-hyperv.ko of the kernel)
  --reboot           reboot if what was there cannot be put back either

Exit code: 0 switched, 1 nothing was changed, 2 the network did not return, and what
was there before is back, 3 it is not back.
All is written to /run/switch-drivers.log, too.
END
}

die() {
	printf 'error: %s\n' "$1" >&2
	shift
	[ $# -eq 0 ] || printf '  fix: %s\n' "$@" >&2
	exit 1
}

release=$(uname -r)
state=/run/switch-drivers
log=$state.log

say() {
	echo "$(cut -d' ' -f1 /proc/uptime) $*"
}

# The set that a driver is of: c, rust, or none if it is not loaded.
set_of() {
	local module
	if ! module=$(readlink "/sys/bus/vmbus/drivers/$1/module"); then
		echo none
		return
	fi
	case ${module##*/} in
	# Both have the same name, and only ours is not from the kernel's tree.
	hv_netvsc) if grep -q O /sys/module/hv_netvsc/taint; then echo rust; else echo c; fi ;;
	hv_pci) echo rust ;;
	*) echo c ;;
	esac
}

# The loaded module of a driver; nothing if it is built in or not there.
module_of() {
	local module
	module=$(basename "$(readlink "/sys/bus/vmbus/drivers/$1/module")" 2>/dev/null) || return
	[ -e "/sys/module/$module/initstate" ] && echo "$module"
}

# file_of DRIVER SET: the module's file.
file_of() {
	local name=$1
	if [ "$2" = rust ]; then
		find "$modules" -maxdepth 1 -name "$name.ko" 2>/dev/null
	elif [ "$name" = hv_netvsc ]; then
		find "/lib/modules/$release/kernel" -name "hv_netvsc.ko*" | head -n 1
	elif [ -n "$stock_pci" ]; then
		echo "$stock_pci"
	elif ! grep -q initcall_blacklist=init_hv_pci_drv /proc/cmdline; then
		# That would keep the module from being loaded, too.
		find "/lib/modules/$release/kernel" -name "pci-hyperv.ko*" | head -n 1
	fi
}

# Disks behind hv_pci that are mounted, swapped to or part of something else.
disks_in_use() {
	local block device guid
	for block in /sys/class/block/*; do
		device=$(realpath "$block")
		for guid in /sys/bus/vmbus/drivers/hv_pci/*-*; do
			case $device in */"${guid##*/}"/*) ;; *) continue ;; esac
			if grep -q "^/dev/${block##*/} " /proc/self/mounts /proc/swaps ||
				[ -n "$(ls "$block/holders" 2>/dev/null)" ]; then
				echo "${block##*/}"
			fi
		done
	done
}

# Prints commands that give the synthetic interfaces the addresses and routes that they have now, once
# they exist again.  A number of an interface is not kept, a name is if it is free.
network() {
	local dir name up
	for dir in /sys/bus/vmbus/drivers/hv_netvsc/*/net/*; do
		[ -e "$dir" ] || continue
		name=${dir##*/}
		up=$(ip -o link show dev "$name" up)
		[ -n "$up" ] || continue
		echo "ip link set dev $name mtu $(cat "$dir/mtu") up"
		ip -o address show dev "$name" scope global | awk -v name="$name" \
			'{ print "ip address replace " $4 " dev " name ($3 == "inet6" ? " nodad" : "") }'
		# Those of the addresses come with them.
		for family in -4 -6; do
			ip "$family" route show dev "$name" | grep -v 'proto kernel' |
				sed "s/ linkdown//; s/ expires [^ ]*//; s/^/ip $family route replace /; s/\$/ dev $name/"
		done
	done
}

restore_network() {
	local command
	for _ in $(seq 100); do
		# shellcheck disable=SC2046 # One word for each interface.
		ls -d $(sed -n 's/^ip link set dev \([^ ]*\) .*/\/sys\/class\/net\/\1/p' $state.network) \
			>/dev/null 2>&1 && break
		sleep 0.1
	done
	while read -r command; do
		$command || say "failed: $command"
	done <$state.network
}

# Whether the gateways that there were answer.
gateways_answer() {
	local gateway name
	while read -r gateway name; do
		# They need not answer this, but it makes the kernel ask for their address.
		ping -q -c 1 -W 1 -I "$name" "$gateway" >/dev/null 2>&1
		ip neighbour show to "$gateway" dev "$name" | grep -Eq 'REACHABLE|DELAY|PROBE|STALE' || return 1
	done <$state.gateways
}

network_is_back() {
	if [ -n "$check" ]; then
		bash -c "$check" >/dev/null 2>&1
	else
		gateways_answer
	fi
}

# load DRIVER FILE
load() {
	local needed parameters=()
	for needed in $(modinfo -F depends "$2" | tr , ' '); do
		modprobe "$needed"
	done
	[ "$1" = hv_netvsc ] && read -ra parameters <$state.parameters
	insmod "$2" "${parameters[@]}" && say "loaded $2"
}

# replace LIST: by what the list has, a driver and its module's file in each line.  hv_netvsc comes first, since a VF
# that is there before gets the name of its interface.
replace() {
	local driver file module failed=0
	while read -r driver file; do
		module=$(module_of "$driver") || continue
		if rmmod "$module"; then
			say "removed $module"
		else
			failed=1
		fi
	done <$state.new
	while read -r driver file; do
		load "$driver" "$file" || failed=1
	done <"$1"
	restore_network
	return $failed
}

# wait_for_network UNTIL: at most until there have been so many seconds.
wait_for_network() {
	until network_is_back; do
		[ $SECONDS -lt "$1" ] || return 1
		sleep 0.5
	done
}

put_back() {
	say "$1, putting back what was there"
	replace $state.old
	if wait_for_network $((SECONDS + timeout)); then
		say "what was there before is back"
		echo 2 >$state.result
		return
	fi
	say "the network has not returned"
	if [ "$reboot" = yes ]; then
		say "rebooting"
		sync
		echo b >/proc/sysrq-trigger
	fi
	echo 3 >$state.result
}

# The dead man's timer, a process of its own, since the one that switches may hang in the kernel.  Who makes the folder
# decides how it ends.
timer() {
	sleep $((timeout + 5))
	mkdir $state.end 2>/dev/null || return
	kill -KILL "$1"
	put_back "nothing was heard for $((timeout + 5)) s"
}

work() {
	local failed='' timer
	trap '' HUP INT TERM PIPE
	echo $$ >$state.pid
	timer $$ &
	timer=$!
	if ! replace $state.new; then
		failed="a module could not be replaced"
	elif ! wait_for_network "$timeout"; then
		failed="the network has not returned within $timeout s"
	fi
	mkdir $state.end 2>/dev/null || return
	kill -KILL $timer
	if [ -n "$failed" ]; then
		put_back "$failed"
	else
		say "the network is back"
		echo 0 >$state.result
	fi
}

# Decides what has to be replaced and says what stays.
plan() {
	local driver current file disks
	: >$state.new
	: >$state.old
	for driver in hv_netvsc hv_pci; do
		current=$(set_of $driver)
		[ "$current" != "$wanted" ] || continue
		if [ "$current" != none ] && [ -z "$(module_of $driver)" ]; then
			echo "$driver stays: it is built into this kernel" >&2
			continue
		fi
		file=$(file_of $driver "$wanted")
		if [ -z "$file" ]; then
			if [ $driver = hv_pci ] && [ "$wanted" = c ]; then
				echo "hv_pci stays: the kernel's own is no module, or is kept from registering" >&2
				continue
			fi
			die "there is no $driver of the set '$wanted'" "make install, or --modules FOLDER"
		fi
		[ "$(modinfo -F vermagic "$file" | cut -d' ' -f1)" = "$release" ] ||
			die "$file is not for the running kernel, $release" "make KERNEL=$release, then make install"
		disks=
		[ $driver != hv_pci ] || disks=$(disks_in_use | xargs)
		if [ -n "$disks" ]; then
			echo "hv_pci stays: in use behind it: $disks" >&2
			continue
		fi
		echo "$driver $file" >>$state.new
		[ "$current" = none ] || echo "$driver $(file_of $driver "$current")" >>$state.old
	done
	while read -r driver file; do
		[ -n "$file" ] || die "the file of the loaded $driver is gone, so it could not be put back" \
			"install it again, or --modules FOLDER"
	done <$state.old
}

if [ "${1:-}" = --work ]; then
	work
	exit
fi

export timeout=60 check='' reboot=no
modules=/lib/modules/$release/updates stock_pci=
wanted=${1:-}
case $wanted in
c | rust) shift ;;
status)
	for driver in hv_netvsc hv_pci; do
		echo "$driver: $(set_of $driver)"
	done
	exit
	;;
-h | --help)
	usage
	exit
	;;
*)
	usage >&2
	exit 1
	;;
esac
while [ $# -gt 0 ]; do
	case $1 in
	--reboot)
		reboot=yes
		shift
		continue
		;;
	--timeout | --check | --modules | --stock-pci) [ $# -ge 2 ] || die "$1 needs a value" "switch-drivers.sh --help" ;;
	*) die "unknown option $1" "switch-drivers.sh --help" ;;
	esac
	case $1 in
	--timeout) timeout=$2 ;;
	--check) check=$2 ;;
	--modules) modules=$2 ;;
	--stock-pci) stock_pci=$2 ;;
	esac
	shift 2
done
[[ $timeout =~ ^[1-9][0-9]*$ ]] || die "--timeout takes a number of seconds, not '$timeout'"
[ "$(id -u)" -eq 0 ] || die "to load modules needs root" "sudo $0 $wanted"
for tool in ip ping modinfo insmod rmmod setsid; do
	command -v $tool >/dev/null || die "$tool is missing" "apt-get install iproute2 iputils-ping kmod util-linux"
done
if [ -e $state.pid ] && kill -0 "$(cat $state.pid)" 2>/dev/null; then
	die "the drivers are being switched" "wait for it: tail -f $log"
fi

plan
if [ ! -s $state.new ]; then
	echo "there is nothing to switch"
	exit 0
fi
ip route show default | awk '{ for (i = 1; i < NF; i++) { if ($i == "via") g = $(i + 1); if ($i == "dev") print g, $(i + 1) } }' >$state.gateways
if [ -z "$check" ]; then
	[ -s $state.gateways ] || die "there is no default gateway to tell that the network is back" \
		"--check 'ping -c 1 -W 1 ADDRESS'"
fi
network_is_back || die "the check of the network fails already: ${check:-the default gateway does not answer}" \
	"--check COMMAND"
network >$state.network
(
	cd /sys/module/hv_netvsc/parameters 2>/dev/null && grep -s . ring_size debug | tr ':\n' '= '
) >$state.parameters
rm -f $state.result
rm -rf $state.end
: >$log
# From here on it goes its way, whatever becomes of the terminal.
setsid bash "$0" --work </dev/null >>$log 2>&1 &
tail -n +1 -f $log &
follower=$!
until [ -e $state.result ]; do
	sleep 0.5
done
sleep 1
kill $follower
exit "$(cat $state.result)"
