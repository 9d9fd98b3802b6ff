// SPDX-License-Identifier: GPL-2.0
//! What users and their programs read of hv_netvsc: ethtool, ip, sysfs, modinfo, and
//! the kernel's log.

use std::thread;
use std::time::Duration;

use lab_control::{Fault, Kind, Setting};
use regex::Regex;

use super::compare::{section, Kept};
use super::ending::account_for;
use super::guest::{Boot, Guest, Nic, COMMAND};
use super::vf::{bonded, BONDING};
use super::{Context, Result};

/// The name of the scenario.
pub const NAME: &str = "texts";

/// What is shown of an interface: section, command, and what is masked in its lines.
const SHOWN: &[(&str, &str, Masks)] = &[
    ("ethtool", "ethtool eth0", &[]),
    ("ethtool -i", "ethtool -i eth0", &[]),
    ("ethtool -k", "ethtool -k eth0", &[]),
    ("ethtool -l", "ethtool -l eth0", &[]),
    ("ethtool -g", "ethtool -g eth0", &[]),
    ("ethtool -x", "ethtool -x eth0", &[]),
    ("ethtool -d", "ethtool -d eth0", &[]),
    ("ethtool -T", "ethtool -T eth0", &[]),
    ("ethtool -S", "ethtool -S eth0", &[(": [0-9]+$", ": N")]),
    ("ethtool -P", "ethtool -P eth0", &[]),
    ("ethtool -c", "ethtool -c eth0", &[]),
    ("ethtool -a", "ethtool -a eth0", &[]),
    ("ethtool -m", "ethtool -m eth0", &[]),
    ("ethtool -u", "ethtool -u eth0", &[]),
    ("ethtool -e", "ethtool -e eth0", &[]),
    ("ethtool -t", "ethtool -t eth0", &[]),
    ("ethtool --show-fec", "ethtool --show-fec eth0", &[]),
    ("ethtool --show-eee", "ethtool --show-eee eth0", &[]),
    ("ethtool --show-priv-flags", "ethtool --show-priv-flags eth0", &[]),
    ("ethtool --show-rxfh context", "ethtool -x eth0 context 1", &[]),
    (
        "rx-flow-hash",
        "for i in tcp4 udp4 sctp4 ah4 esp4 tcp6 udp6 sctp6 ah6 esp6 ip4 ip6; do \
         echo $i; ethtool -n eth0 rx-flow-hash $i; done",
        &[],
    ),
    (
        "rx-flow-hash set",
        "for i in tcp4 udp4 sctp4 tcp6 udp6 sctp6; do for f in sd sdfn sdf mvn; do \
         echo $i $f; ethtool -N eth0 rx-flow-hash $i $f; echo $?; done; ethtool -n eth0 rx-flow-hash $i; \
         ethtool -N eth0 rx-flow-hash $i sdfn; done",
        &[],
    ),
    (
        "setters that are refused",
        "for o in '-L eth0 rx 1' '-L eth0 combined 0' '-L eth0 combined 65' '-G eth0 rx 5' '-G eth0 rx 100000' \
         '-G eth0 rx-mini 1' '-X eth0 hfunc xor' '-X eth0 weight 1 1 1' '-X eth0 context new' '-C eth0 rx-usecs 1' \
         '-A eth0 rx on' '-s eth0 speed 10' '-s eth0 autoneg on' '-s eth0 wol g' '-s eth0 duplex half' \
         '-K eth0 rxhash off' '-K eth0 rxhash on' '-K eth0 sg off' '-K eth0 sg on' '-K eth0 rxvlan off' \
         '-K eth0 hw-tc-offload on' '--set-fec eth0 encoding rs' '-r eth0' '-p eth0 1' '--reset eth0 all'; do \
         echo $o; ethtool $o; echo $?; done",
        &[],
    ),
    (
        "settings of ip",
        "for o in 'mtu 67' 'mtu 65536' 'mtu 65522' 'address 01:00:00:00:00:01' 'address 00:00:00:00:00:00' \
         'txqueuelen 100' 'txqueuelen 1000' 'vf 0 mac 60:45:bd:00:00:01' 'numtxqueues 3' 'xdp off'; do \
         echo $o; ip link set eth0 $o; echo $?; done",
        &[],
    ),
    (
        "ip link",
        "ip -d -s link show eth0",
        &[("^ +[0-9 ]+$", "N"), ("^[0-9]+: ", "N: ")],
    ),
    ("ip -j", "ip -j -d link show eth0", &[("\"ifindex\":[0-9]+", "\"ifindex\":N")]),
    (
        "sysfs tree",
        "cd /sys/class/net/eth0/ && find . | LC_ALL=C sort | while read f; do stat -c '%A %n' $f; done",
        &[],
    ),
    (
        "sysfs values",
        "cd /sys/class/net/eth0/ && for f in *; do [ -f $f ] && case $f in ifindex|iflink|carrier*_c*) ;; \
         *) echo \"$f: $(cat $f 2>&1)\";; esac; done",
        &[("^IFINDEX=.*", "IFINDEX=N"), ("^(carrier_.*_count|carrier_changes): .*", "$1: N")],
    ),
    (
        "sysfs queues",
        "cd /sys/class/net/eth0/queues && for f in */*; do [ -f $f ] && echo \"$f: $(cat $f 2>&1)\"; done; true",
        &[],
    ),
    (
        "driver",
        "cd /sys/bus/vmbus/drivers/hv_netvsc && ls -l | awk '{print $1, $9, $10, $11}'; \
         cat /sys/class/net/eth0/device/uevent; ls -l /sys/class/net/eth0/device/driver/module | awk '{print $11}'",
        &[("^total.*", "total")],
    ),
    (
        "module",
        "cd /sys/module/hv_netvsc && ls -l . parameters drivers 2>&1 | awk '{print $1, $9, $10, $11}' ; \
         for f in parameters/*; do echo \"$f: $(cat $f)\"; done",
        &[("^total.*", "total")],
    ),
    (
        "modinfo",
        // What is not of the build and its signature.
        "modinfo hv_netvsc | grep -E '^(name|license|description|author|alias|parm|softdep|version)'",
        &[],
    ),
];

/// Patterns and what they are replaced with.
type Masks = &'static [(&'static str, &'static str)];

/// The lines of the log that are compared.
const LINES: &str = "hv_netvsc|joined to|VF |unable to|hv_vmbus: (un)?registering driver hv_netvsc";

/// What the guest may take to read a message.
const READ: Duration = Duration::from_millis(200);
/// Where a step begins in the log.
const MARK: &str = "lab: step ";

/// Differences that are to stay.
pub const KEPT: &[Kept] = &[];

/// What the host sends, and what the guest may have to say about it.
const SENT: &[(&str, Kind, u64, &[&str])] = &[
    ("inband message without type", Kind::Nvsp, 0, &[]),
    ("inband message of unknown type", Kind::Nvsp, 0, &["4d010000"]),
    ("short association", Kind::Nvsp, 0, &["80000000"]),
    ("short send table", Kind::Nvsp, 0, &["86000000"]),
    ("send table of wrong size", Kind::Nvsp, 0, &["860000000f0000000c0000000000000000000000"]),
    ("send table too far off", Kind::Nvsp, 0, &["8600000010000000ffff00000000000000000000"]),
    ("completion of nothing", Kind::Completion, 0xdead_beef, &["6c00000001000000"]),
    ("completion of transaction 0", Kind::Completion, 0, &["6c00000001000000"]),
    ("short RNDIS message", Kind::Rndis, 0, &["01000000"]),
    ("RNDIS message with wrong length", Kind::Rndis, 0, &["0100000000010000"]),
    ("RNDIS message of unknown type", Kind::Rndis, 0, &["770000000800000000000000"]),
    ("RNDIS packet that is too short", Kind::Rndis, 0, &["010000000c00000000000000"]),
    (
        "RNDIS packet with data that is too far off",
        Kind::Rndis,
        0,
        &["0100000034000000ffff00000800000000000000000000000000000000000000000000000000000000000000000000000000000000"],
    ),
    (
        "RNDIS packet with too much data",
        Kind::Rndis,
        0,
        &["010000003400000024000000ff00000000000000000000000000000000000000000000000000000000000000000000000000000000"],
    ),
    (
        "RNDIS packet with information in the header",
        Kind::Rndis,
        0,
        &["01000000340000002400000008000000000000000000000000000000080000000c000000000000000000000000000000000000000000"],
    ),
    (
        "RNDIS packet with too much information",
        Kind::Rndis,
        0,
        &["01000000340000002400000008000000000000000000000000000000240000000c010000000000000000000000000000000000000000"],
    ),
    ("RNDIS answer to nothing", Kind::RndisControl, 0, &["0500008010000000efbeadde00000000"]),
    ("short RNDIS answer", Kind::RndisControl, 0, &["0500008008000000"]),
    ("short RNDIS indication", Kind::RndisControl, 0, &["0700000008000000"]),
    (
        "RNDIS indication of a speed that is not there",
        Kind::RndisControl,
        0,
        &["0700000014000000130001400000000000000000"],
    ),
    ("RNDIS indication that is unknown", Kind::RndisControl, 0, &["0700000014000000990001400000000000000000"]),
];

pub fn run(context: &mut Context<'_>) -> Result<()> {
    let guest = context.boot(&Boot {
        cpus: 2,
        ..Boot::new(vec![Nic::new(0)])
    })?;
    let nic = guest.nics[0].clone();
    let mut texts = String::new();

    context.check("what there is to read without VF", || {
        show(&guest, &mut texts)
    });
    context.text("without-vf", &texts)?;

    let mut log = Log {
        guest: &guest,
        text: String::new(),
        names: Vec::new(),
        written: 0,
    };
    context.check("loading, opening and closing", || {
        log.shell("unload", "rmmod hv_netvsc")?;
        log.shell("small ring", "modprobe hv_netvsc ring_size=8")?;
        log.shell("unload again", "rmmod hv_netvsc")?;
        log.shell("all messages", "modprobe hv_netvsc debug=65535")?;
        log.shell("open with all messages", "ip link set eth0 up")?;
        log.shell("unload with all messages", "rmmod hv_netvsc")?;
        log.shell("load", "modprobe hv_netvsc")?;
        log.shell("open", "ip link set eth0 up")?;
        log.shell("close", "ip link set eth0 down")
    });
    context.check("a host that refuses or offers nonsense", || {
        refusals(&mut log, &nic)
    });
    context.text("log", &log.text)?;
    context.check("a host that sends nonsense", || {
        // Ours limits the rate of most lines, theirs that of some: here both may say all.
        guest.sh(&format!(
            "ip link set eth0 up; ip address replace {}/24 dev eth0; ping -q -c 2 -W 5 {}; \
             echo 0 >/proc/sys/net/core/message_cost",
            nic.guest_v4(),
            nic.peer_v4()
        ))?;
        for &(name, kind, transaction, messages) in SENT {
            let messages = match messages {
                [] => vec![String::new()],
                _ => messages.iter().map(|message| message.to_string()).collect(),
            };
            log.begin(name)?;
            guest.host.send_hex(&nic, kind, transaction, messages, 1)?;
            // Nothing tells that the guest has read it.
            thread::sleep(READ);
        }
        log.end()?;
        for status in [0, 2, 5] {
            log.step(&format!("completion with status {status}"), || {
                guest.host.set(&nic, Setting::PacketStatus, Some(status))?;
                guest.sh(&format!("ping -q -c 1 -W 1 {}; true", nic.peer_v4()))?;
                guest.host.set(&nic, Setting::PacketStatus, None)
            })?;
        }
        Ok(())
    });

    context.text("log", &log.text)?;
    texts.clear();
    if context.check("a VF joins", || {
        log.step("VF joins", || {
            guest.host.add_vf(&nic)?;
            bonded(&guest, &nic)
        })
    }) {
        context.check("what there is to read with a VF", || {
            show(&guest, &mut texts)
        });
        context.text("with-vf", &texts)?;
        context.check("a VF's story", || story(&mut log, &nic));
    }
    let text = log.text;
    context.text("log", &text)?;
    // They are what was wanted; ours and theirs are compared.
    account_for(&guest, &[""])?;
    context.finish(guest)
}

/// Writes all that is shown.
fn show(guest: &Guest, text: &mut String) -> Result<()> {
    for (name, command, masks) in SHOWN {
        let exit = guest.exit(command, COMMAND * 2)?;
        let mut output = format!("{}{}exit code {}", exit.stdout, exit.stderr, exit.code);
        for (pattern, replacement) in *masks {
            let regex = Regex::new(&format!("(?m){pattern}"))?;
            output = regex.replace_all(&output, *replacement).into_owned();
        }
        section(text, name, output.lines());
    }
    Ok(())
}

/// The kernel's log, step by step.
struct Log<'a> {
    guest: &'a Guest,
    text: String,
    /// The steps.
    names: Vec<String>,
    /// How many of them are in the text.
    written: usize,
}

impl Log<'_> {
    /// Does something, and writes the lines that it has led to with their levels.
    fn step(&mut self, name: &str, act: impl FnOnce() -> Result<()>) -> Result<()> {
        self.begin(name)?;
        act()?;
        self.end()
    }

    /// Begins a step. It ends with the next one, if the guest acts at once on what is done.
    fn begin(&mut self, name: &str) -> Result<()> {
        self.names.push(name.to_owned());
        let mark = self.names.len();
        self.guest.sh(&format!("echo '{MARK}{mark}' >/dev/kmsg"))?;
        Ok(())
    }

    /// Ends the last step when nothing more comes, and writes all that are not written yet.
    fn end(&mut self) -> Result<()> {
        let first = self.written + 1;
        let command = format!(
            "old=; while new=$(dmesg | wc -l) && [ \"$new\" != \"$old\" ]; do old=$new; sleep 0.5; done; \
             dmesg -x -t | sed -n '/{MARK}{first}$/,$p' | grep -E '{MARK}|{LINES}'"
        );
        // It depends on udev when the VF gets its name.
        let names = ["eth1".to_owned(), self.guest.nics[0].vf_name()];
        let text = names.iter().fold(self.guest.sh(&command)?, |text, name| {
            text.replace(name, "<VF>")
        });
        let mut lines = text.lines().peekable();
        for name in &self.names[self.written..] {
            // The mark.
            lines.next();
            let mut own = Vec::new();
            while let Some(line) = lines.next_if(|line| !line.contains(MARK)) {
                own.push(line);
            }
            // Some lines come once a packet.
            own.dedup();
            section(&mut self.text, name, own);
        }
        self.written = self.names.len();
        Ok(())
    }

    fn shell(&mut self, name: &str, command: &str) -> Result<()> {
        let guest = self.guest;
        self.step(name, || guest.exit(command, COMMAND * 2).map(drop))
    }
}

fn refusals(log: &mut Log<'_>, nic: &Nic) -> Result<()> {
    let host = &log.guest.host;
    let guest = log.guest;
    let driver = "/sys/bus/vmbus/drivers/hv_netvsc";
    let unbind = format!("echo {} >{driver}/unbind", nic.instance());
    let bind = format!("echo {} >{driver}/bind", nic.instance());
    guest.sh(&unbind)?;
    for fault in [
        Fault::ReceiveBufferRefused,
        Fault::SendBufferRefused,
        Fault::SubchannelsRefused,
    ] {
        log.step(&format!("{fault:?}"), || {
            host.fault(nic, fault, 1)?;
            guest.exit(&bind, COMMAND).map(drop)
        })?;
        guest.exit(&unbind, COMMAND)?;
    }
    for (setting, value) in [
        (Setting::ReceiveSectionSize, 10),
        (Setting::ReceiveSectionCount, 0),
        (Setting::ReceiveSectionCount, 1_000_000),
        (Setting::ReceiveSectionOffset, 8),
        (Setting::ReceiveGroups, 2),
        (Setting::SendSectionSize, 10),
    ] {
        host.set(nic, setting, Some(value))?;
        log.shell(&format!("{setting:?} {value}"), &bind)?;
        host.set(nic, setting, None)?;
        guest.exit(&unbind, COMMAND)?;
    }
    for (name, command) in [
        ("MTU", "ip link set eth0 mtu 1400"),
        ("channels", "ethtool -L eth0 combined 1"),
        ("buffers", "ethtool -G eth0 rx 1000"),
    ] {
        for times in [1, 2] {
            guest.exit(&bind, COMMAND)?;
            guest.sh("ip link set eth0 up")?;
            log.step(&format!("{name} refused {times} times"), || {
                host.fault(nic, Fault::ReceiveBufferRefused, times)?;
                guest.exit(command, COMMAND).map(drop)
            })?;
            log.shell(&format!("{name} refused {times} times: unbind"), &unbind)?;
        }
    }
    guest.sh(&bind).map(drop)
}

/// A VF that comes and goes, late or in another namespace.
fn story(log: &mut Log<'_>, nic: &Nic) -> Result<()> {
    let guest = log.guest;
    let host = &guest.host;
    let vf = nic.vf_name();
    log.shell("VF down", &format!("ip link set {vf} down"))?;
    log.shell("VF up", &format!("ip link set {vf} up"))?;
    log.step("VF up before its association", || {
        guest.sh(&format!("ip link set {vf} down"))?;
        host.set_association(nic, false)?;
        let up = guest.start(&format!("ip link set {vf} up"), COMMAND)?;
        guest.wait_until(
            "dmesg -t | grep -q \"Waiting for the VF association\"",
            BONDING,
        )?;
        host.set_association(nic, true)?;
        up.wait()?;
        bonded(guest, nic)
    })?;
    log.shell(
        "both to another namespace",
        "ip netns add other && ip link set eth0 netns other",
    )?;
    log.shell("and back", "ip -n other link set eth0 netns 1")?;
    log.shell("open again", "ip link set eth0 up")?;
    log.step("VF leaves", || host.remove_vf(nic))?;
    log.shell("large MTU", "ip link set eth0 mtu 65000")?;
    log.step("VF whose MTU is small", || {
        host.add_vf(nic)?;
        bonded(guest, nic)
    })?;
    log.shell("unload with a VF", "rmmod hv_netvsc")
}
