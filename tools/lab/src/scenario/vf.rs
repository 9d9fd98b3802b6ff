// SPDX-License-Identifier: GPL-2.0
//! Scenario 2: a MANA VF, bonded as on Azure.

use std::time::Duration;

use regex::Regex;
use serde_json::Value;

use super::guest::{Boot, Guest, Nic};
use super::one_nic::{identity, iperf};
use super::traffic::Link;
use super::{ensure, Context, Result};

/// What a VF may take from its offer to the switched data path.
pub const BONDING: Duration = Duration::from_secs(60);

pub fn run(context: &mut Context<'_>) -> Result<()> {
    let lab = context.lab();
    let mut guest = context.boot(&Boot::new(vec![Nic::with_vf(0)]))?;
    let nic = guest.nics[0].clone();
    guest.peer_server(lab, &nic, &["iperf3", "-s"])?;

    identity(context, &guest, &nic);
    if !context.check("the VF joins and the data path switches", || {
        bonded(&guest, &nic)
    }) {
        return context.finish(guest);
    }
    context.check(
        "the kernel's log tells the story of azure-logs in order",
        || story(&guest, &nic),
    );
    context.check(
        "the VF is eth0's slave, has its address, and no IP address",
        || slave(&guest, &nic),
    );
    context.check(
        "lspci, the slot and the bus device show domain and serial number",
        || pci(&guest, &nic),
    );
    context.check("ethtool names the drivers", || {
        let name = nic.vf_name();
        let text = guest.sh(&format!("ethtool -i {name}"))?;
        let bus = format!("bus-info: {:04x}:00:00.0", nic.domain());
        ensure(text.contains("driver: mana") && text.contains(&bus), || {
            text
        })
    });
    let link = Link::new(&guest, lab, &nic);
    context.check("ping over IPv4 and IPv6", || link.pings());
    context.check("unicast goes by the VF, and guest and host agree", || {
        unicast(&link)
    });
    context.check(
        "broadcast and incoming SYN come by the synthetic path",
        || exceptions(&link),
    );
    iperf(context, &link, 2);
    context.check(
        "10,000 frames of 60 to 1514 bytes arrive whole at the peer",
        || link.frames_out(10_000, 1514),
    );
    context.check(
        "10,000 frames of 60 to 1514 bytes arrive whole in the guest",
        || link.frames_in(10_000, 1514),
    );
    context.check("ethtool -S, -l and -L work on the VF and on eth0", || {
        let name = nic.vf_name();
        guest.sh(&format!(
            "ethtool -S {name} && ethtool -l {name} && ethtool -l eth0 && for i in 1 $(nproc); do \
             ethtool -L {name} combined $i && ethtool -L eth0 combined $i || exit 1; done"
        ))?;
        bonded(&guest, &nic)?;
        link.pings()
    });
    context.check(
        "VF down: the synthetic path takes over; VF up: back",
        || {
            let name = nic.vf_name();
            guest.sh(&format!("ip link set {name} down"))?;
            guest.wait_until(
                "dmesg -t | grep \"Data path switched\" | tail -n 1 | grep -q from",
                BONDING,
            )?;
            link.pings()?;
            guest.sh(&format!("ip link set {name} up"))?;
            bonded(&guest, &nic)?;
            link.pings()
        },
    );
    context.check("a new MTU reaches the VF", || {
        for mtu in [1400, 1500] {
            guest.sh(&format!("ip link set eth0 mtu {mtu}"))?;
            let text = guest.sh(&format!("cat /sys/class/net/{}/mtu", nic.vf_name()))?;
            ensure(text.trim() == mtu.to_string(), || {
                format!("the VF's MTU is {text}")
            })?;
            bonded(&guest, &nic)?;
            link.pings()?;
        }
        Ok(())
    });
    context.finish(guest)
}

/// Waits until the VF carries the traffic.
pub fn bonded(guest: &Guest, nic: &Nic) -> Result<()> {
    let name = nic.vf_name();
    // The last line about this NIC decides, earlier ones may repeat. A slow udev may be
    // behind with the name.
    let condition = format!(
        "{{ dmesg -t | grep \"{} .*Data path switched\" | tail -n 1 | grep -q \"to VF: \" && [ -e /sys/class/net/{name} ]; }}",
        nic.instance()
    );
    guest.wait_until(&condition, BONDING).or_else(|error| {
        let lines = guest.dmesg("hv_|mana|vmbus|eth[0-9]|enP")?;
        Err(format!("{error}\n{}", lines.join("\n")).into())
    })
}

/// The lines of the log that belong together, in their order.
fn story(guest: &Guest, nic: &Nic) -> Result<()> {
    let lines = guest.dmesg("hv_|mana|pci|eth[0-9]|enP")?;
    let (instance, bus) = (nic.instance(), &nic.bus);
    let (domain, name, serial) = (nic.domain(), nic.vf_name(), nic.serial);
    let netvsc = [
        "^hv_vmbus: registering driver hv_netvsc$".to_owned(),
        format!("^hv_netvsc {instance} eth0: VF slot {serial} added$"),
        format!("^hv_netvsc {instance} eth0: VF registering: eth[0-9]+$"),
        format!("^mana {domain:04x}:00:00.0 eth[0-9]+: joined to eth0$"),
        format!("^hv_netvsc {instance} eth0: Data path switched to VF: "),
    ];
    let pci = [
        "^hv_vmbus: registering driver hv_pci$".to_owned(),
        format!("^hv_pci {bus}: PCI VMBus probing: Using version 0x1000[1-4]$"),
        format!("^hv_pci {bus}: PCI host bridge to bus {domain:04x}:00$"),
        format!("^pci_bus {domain:04x}:00: root bus resource \\[mem 0x[0-9a-f]+-0x[0-9a-f]+ window\\]$"),
        format!("^pci {domain:04x}:00:00.0: \\[1414:00ba\\] type 00 class 0x020000 "),
        format!("^pci {domain:04x}:00:00.0: BAR 0 \\[mem 0x[0-9a-f]+-0x[0-9a-f]+ 64bit( pref)?\\]: assigned$"),
        format!("^mana {domain:04x}:00:00.0: enabling device \\(0000 -> 0002\\)|^mana {domain:04x}:00:00.0: Microsoft Azure Network Adapter"),
        format!("^hv_netvsc {instance} eth0: VF registering: eth[0-9]+$"),
        format!("^mana {domain:04x}:00:00.0 {name}: renamed from eth[0-9]+( \\(while UP\\))?$"),
    ];
    in_order(&lines, &netvsc)?;
    in_order(&lines, &pci)?;
    let last = lines
        .iter()
        .rfind(|line| line.contains("Data path switched"))
        .map_or("", String::as_str);
    let expected =
        format!("^hv_netvsc {instance} eth0: Data path switched to VF: ({name}|eth[0-9]+)$");
    ensure(Regex::new(&expected)?.is_match(last), || {
        format!("the last switch was '{last}'")
    })
}

/// Finds each pattern after the one before it.
fn in_order(lines: &[String], patterns: &[String]) -> Result<()> {
    let mut rest = lines.iter();
    for pattern in patterns {
        let regex = Regex::new(pattern)?;
        ensure(rest.any(|line| regex.is_match(line)), || {
            format!(
                "no line, or none in its place: {pattern}\n{}",
                lines.join("\n")
            )
        })?;
    }
    Ok(())
}

/// Has modprobe and udev load hv_netvsc before drivers of VFs, as an installation has it. Gives the file to remove.
///
/// Else the VF may come first, and is eth0 until udev renames it.
pub fn load_order(guest: &Guest) -> Result<&'static str> {
    let file = "/etc/modprobe.d/hyperv-rust.conf";
    let text = include_str!("../../../../scripts/modprobe.conf");
    guest.sh(&format!(
        "mkdir -p /etc/modprobe.d && cat >{file} <<'END'\n{text}END\n"
    ))?;
    Ok(file)
}

/// How `ip` shows the two interfaces.
pub fn slave(guest: &Guest, nic: &Nic) -> Result<()> {
    let name = nic.vf_name();
    let all = guest.json("ip -j -d address show")?;
    let empty = Vec::new();
    let find = |wanted: &str| {
        all.as_array()
            .unwrap_or(&empty)
            .iter()
            .find(|link| link["ifname"] == wanted)
            .cloned()
            .ok_or_else(|| format!("no interface {wanted}: {all}"))
    };
    let master =
        nic_name(&all, nic).ok_or_else(|| format!("no netvsc with {}: {all}", nic.mac()))?;
    let (vf, own) = (find(&name)?, find(&master)?);
    let flags: Vec<_> = vf["flags"]
        .as_array()
        .unwrap_or(&empty)
        .iter()
        .filter_map(Value::as_str)
        .collect();
    let addresses = |link: &Value| link["addr_info"].as_array().map_or(0, Vec::len);
    let good = flags.contains(&"SLAVE")
        && flags.contains(&"UP")
        && vf["master"] == master.as_str()
        && vf["address"] == own["address"]
        && vf["mtu"] == own["mtu"]
        && addresses(&vf) == 0
        && addresses(&own) > 0;
    ensure(good, || format!("VF: {vf:#}\nmaster: {own:#}"))
}

/// The synthetic interface of a NIC, whatever its name.
pub fn nic_name(all: &Value, nic: &Nic) -> Option<String> {
    all.as_array()?
        .iter()
        .find(|link| link["address"] == nic.mac().as_str() && link["parentbus"] == "vmbus")?
        .get("ifname")?
        .as_str()
        .map(str::to_owned)
}

/// What the PCI tools show.
fn pci(guest: &Guest, nic: &Nic) -> Result<()> {
    let (domain, serial) = (nic.domain(), nic.serial);
    let text = guest.sh("lspci -D -n -d 1414:00ba:0200")?;
    ensure(
        text.starts_with(&format!("{domain:04x}:00:00.0 0200: 1414:00ba")),
        || format!("lspci: '{text}'"),
    )?;
    let text = guest.sh(&format!("cat /sys/bus/pci/slots/{serial}/address"))?;
    ensure(text.trim() == format!("{domain:04x}:00:00"), || {
        format!("the slot's address is '{text}'")
    })?;
    let text = guest.sh("cat /proc/bus/pci/devices")?;
    ensure(text.trim_end().ends_with("mana"), || text.clone())?;
    let text = guest.sh(&format!(
        "readlink -f /sys/class/net/{}/device",
        nic.vf_name()
    ))?;
    ensure(text.contains(&nic.bus), || {
        format!("the VF's device is {text}")
    })
}

/// Packets per path as the host counts them, seen from the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Paths {
    /// Sent by the guest through the VF.
    pub vf_tx: u64,
    /// Received by the guest through the VF.
    pub vf_rx: u64,
    /// Sent by the guest through netvsc.
    pub synthetic_tx: u64,
    /// Received by the guest through netvsc.
    pub synthetic_rx: u64,
}

/// The host's counters of a NIC.
pub fn paths(guest: &Guest, nic: &Nic) -> Result<Paths> {
    let number = guest.host.number(nic)?;
    let counters = guest.host.counters()?;
    let value = |path: &str| {
        let name = format!("net{number}.{path}");
        counters
            .get(&name)
            .copied()
            .ok_or_else(|| format!("the host has no counter {name}: {counters:#?}"))
    };
    Ok(Paths {
        vf_tx: value("vf.tx_packets")?,
        vf_rx: value("vf.rx_packets")?,
        synthetic_tx: value("synthetic.tx_packets")?,
        synthetic_rx: value("synthetic.rx_packets")?,
    })
}

/// Pings that all go by the VF.
pub fn unicast(link: &Link<'_>) -> Result<()> {
    const PINGS: u64 = 50;
    let counters = || -> Result<[u64; 4]> {
        let all = link.guest.statistics("eth0")?;
        let value = |name: &str| {
            all.get(name)
                .copied()
                .ok_or_else(|| format!("no counter {name}"))
        };
        Ok([
            value("vf_tx_packets")?,
            value("vf_tx_bytes")?,
            value("vf_rx_packets")?,
            value("vf_rx_bytes")?,
        ])
    };
    let statistics = || -> Result<([u64; 4], Paths)> {
        // A packet of IPv6's own may be under way while guest and host are read one after the other.
        for _ in 0..50 {
            let before = paths(link.guest, link.nic)?;
            let counters = counters()?;
            if paths(link.guest, link.nic)? == before {
                return Ok((counters, before));
            }
        }
        Err("packets come and go without a pause".into())
    };
    let (before, host_before) = statistics()?;
    let address = link.nic.peer_v4();
    let text = link
        .guest
        .sh(&format!("ping -q -c {PINGS} -i 0.02 -W 5 {address}"))?;
    ensure(text.contains(" 0% packet loss"), || text.clone())?;
    let (after, host_after) = statistics()?;
    let grown: Vec<_> = before
        .iter()
        .zip(after)
        .map(|(before, after)| after - before)
        .collect();
    let vf = (
        host_after.vf_tx - host_before.vf_tx,
        host_after.vf_rx - host_before.vf_rx,
    );
    let synthetic = (
        host_after.synthetic_tx - host_before.synthetic_tx,
        host_after.synthetic_rx - host_before.synthetic_rx,
    );
    // Received bytes are counted behind the Ethernet header. Neighbour discovery may add a few packets on either path.
    let near = |value: u64| (PINGS..PINGS + 10).contains(&value);
    let good = near(grown[0])
        && near(grown[2])
        && grown[1] >= PINGS * 98
        && grown[3] >= PINGS * 84
        && grown[0] == vf.0
        && near(vf.1)
        && synthetic.0 < 10
        && synthetic.1 < 10;
    ensure(good, || {
        format!(
            "guest: vf_tx_packets, vf_tx_bytes, vf_rx_packets, vf_rx_bytes grew by {grown:?}\n\
             host: VF sent and received {vf:?}, synthetic {synthetic:?}"
        )
    })
}

fn exceptions(link: &Link<'_>) -> Result<()> {
    let (guest, nic) = (link.guest, link.nic);
    let before = paths(guest, nic)?;
    // An ARP request for an address that nobody has is broadcast.
    guest.peer(
        link.lab,
        nic,
        &format!(
            "ping -q -c 3 -i 0.3 -W 1 10.0.{}.77 >/dev/null; true",
            nic.index
        ),
    )?;
    let middle = paths(guest, nic)?;
    ensure(middle.synthetic_rx > before.synthetic_rx, || {
        format!("broadcast did not come by the synthetic path: {before:?} then {middle:?}")
    })?;
    let listener = guest.start(
        "lab-agent tcp-receive --idle 20 --bind 0.0.0.0:7010",
        Duration::from_secs(60),
    )?;
    guest.wait_until("grep -q :1B62 /proc/net/tcp", Duration::from_secs(10))?;
    let before = paths(guest, nic)?;
    let sender = guest.peer_tool(
        link.lab,
        nic,
        &format!(
            "tcp-send --rate 100000 --duration 1 --to {}:7010",
            nic.guest_v4()
        ),
    )?;
    let report: lab_agent::tcp::Report = sender.report(Duration::from_secs(30))?;
    listener.wait()?;
    let after = paths(guest, nic)?;
    let good = report.error.is_none()
        && after.synthetic_rx > before.synthetic_rx
        && after.vf_rx > before.vf_rx + 10;
    ensure(good, || format!("{report:?}\n{before:?} then {after:?}"))
}
