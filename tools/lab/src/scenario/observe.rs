// SPDX-License-Identifier: GPL-2.0
//! Scenario 11: what can be seen of hv_netvsc from outside.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use lab_agent::netdev::Object;
use lab_control::Setting;
use regex::Regex;

use super::ending::account_for;
use super::guest::{Boot, Guest, Nic};
use super::traffic::Link;
use super::vf::bonded;
use super::{ensure, eventually, Context, Drivers, Result};

/// Where the tracepoints are.
const EVENTS: &str = "/sys/kernel/tracing/events/netvsc";
/// Where the kernel's own module is, also when ours are installed.
const STOCK: &str = "/lib/modules/$(uname -r)/kernel/drivers/net/hyperv/hv_netvsc.ko";

pub fn run(context: &mut Context<'_>) -> Result<()> {
    let lab = context.lab();
    let rust = context.drivers == Drivers::Rust;
    let mut guest = context.boot(&Boot {
        cpus: 2,
        ..Boot::new(vec![Nic::new(0)])
    })?;
    let nic = guest.nics[0].clone();
    guest.peer_server(lab, &nic, &["iperf3", "-s"])?;
    let link = Link::new(&guest, lab, &nic);

    context.check(
        "each queue has its NAPI instance, whatever is reconfigured",
        || {
            let result = napis(&guest);
            // Addresses of IPv6 go when the interface goes down.
            guest.sh(&format!(
                "ethtool -L eth0 combined 2; ip link set eth0 mtu 1500 up; \
                 ip address replace {}/64 dev eth0 nodad",
                nic.guest_v6()
            ))?;
            result
        },
    );
    if rust {
        context.check("the queues' byte limits follow the load", || {
            byte_limits(&link)
        });
        context.check(
            "the counters of queues and base add up to the device's",
            || {
                let moved = queue_stats(&link, 2)?;
                ensure(moved.iter().all(|&packets| packets > 100), || {
                    format!("packets sent by the queues: {moved:?}")
                })
            },
        );
        context.check("also with one queue, and two again", || {
            guest.sh("ethtool -L eth0 combined 1")?;
            let one = queue_stats(&link, 1);
            guest.sh("ethtool -L eth0 combined 2")?;
            one.and_then(|_| queue_stats(&link, 2)).map(drop)
        });
    } else {
        context.note(
            "the stock hv_netvsc has neither counters of queues in netdev-genl nor byte limits",
        );
    }
    context.check("tracepoints record what is sent and received", || {
        traced(&link)
    });
    context.check(
        "the parameters are in /sys/module, with their values",
        || {
            let text = guest.sh(PARAMETERS)?;
            let expected = "444 debug -1\n444 ring_size 128\n";
            ensure(text == expected, || text)
        },
    );
    if rust {
        context.check(
            "debugfs tells of versions, buffers, channels and the VF",
            || status(&link),
        );
        context.check("the VF's packets are in the device's counters", || {
            vf_stats(&link)
        });
        context.check(
            "tracepoints, parameters and modinfo are those of the kernel's own module",
            || like_stock(&guest),
        );
    }
    if rust {
        recovery(context, &guest)?;
    } else {
        context.note("the stock hv_netvsc has no watchdog: it waits for completions for ever");
    }
    context.finish(guest)
}

/// What the file `status` in debugfs says.
fn status_text(guest: &Guest) -> Result<String> {
    guest.sh("cat /sys/kernel/debug/hv_netvsc/$(basename $(readlink -f /sys/class/net/eth0/device))/status")
}

/// Looks for lines in the file `status`.
fn shows(guest: &Guest, patterns: &[&str]) -> Result<()> {
    let text = status_text(guest)?;
    let mut missing = Vec::new();
    for pattern in patterns {
        if !Regex::new(&format!("(?m)^{pattern}$"))?.is_match(&text) {
            missing.push(pattern);
        }
    }
    ensure(missing.is_empty(), || {
        format!("missing: {missing:#?}\nin {text}")
    })
}

/// The file `status` while the VF is in use, and after its link went down.
fn status(link: &Link<'_>) -> Result<()> {
    let (guest, nic) = (link.guest, link.nic);
    shows(
        guest,
        &[
            "interface: eth0",
            "vmbus version: [56]\\.[0-9]",
            "nvsp version: 0x60001",
            "ndis version: 6\\.30",
            "data path: VF",
            &format!("vf serial: {}", nic.serial),
            &format!("vf: {}, up, carrier", nic.vf_name()),
            "switches: 1",
            "switches failed: 0",
            "switches last: to the VF, VF up, [0-9.]+ s ago, took [0-9]+ us, result 0",
            "switches to VF: 1",
            "switches to synthetic: 0",
            "reconnects: [1-9][0-9]*",
            "reconnects failed: 0",
            "reconnects last: made anew, mtu, [0-9.]+ s ago, took [0-9]+ us, result 0",
            "transmit timeouts: 0",
            "receive buffer: [0-9]+ sections of 1728 bytes",
            "send buffer: 170 sections of 6144 bytes, [0-9]+ in use",
            "packets per message: 8",
            "transmit checksums: tcp4 udp4 tcp6 udp6",
            "link: up",
            "queues: 2",
            "0 [0-9]+ [01] (99|100) [0-9]+ [0-9]+ [0-9]+ 0",
            "1 [0-9]+ [01] (99|100) [0-9]+ [0-9]+ [0-9]+ 0",
        ],
    )?;
    guest.host.vf_link(nic, false)?;
    guest.host.vf_link(nic, true)?;
    guest.sh(&format!("ip link set {} down", nic.vf_name()))?;
    shows(
        guest,
        &[
            "data path: synthetic",
            "switches last: to the synthetic path, VF going down, .*",
            "switches to synthetic: 1",
        ],
    )?;
    guest.sh(&format!("ip link set {} up", nic.vf_name()))?;
    bonded(guest, nic)?;
    shows(guest, &["data path: VF", "switches to VF: 2"])
}

/// A host that does not complete what it takes, then one that does not take anything.
fn recovery(context: &mut Context<'_>, guest: &Guest) -> Result<()> {
    let lab = context.lab();
    let nic = guest.nics[0].clone();
    let link = Link::new(guest, lab, &nic);
    context.check("the synthetic path is in use again", || {
        guest.host.remove_vf(&nic)?;
        guest.sh(&format!(
            "ip link set eth0 up; ip address replace {}/24 dev eth0; \
             ip address replace {}/64 dev eth0 nodad",
            nic.guest_v4(),
            nic.guest_v6()
        ))?;
        link.pings()
    });
    for (setting, name) in [
        (Setting::HoldCompletions, "the host completes nothing"),
        (Setting::HoldPackets, "the host does not read its rings"),
    ] {
        context.check(&format!("{name}: the connection is made anew"), || {
            let recovered = || -> Result<u64> {
                let text = status_text(guest)?;
                let line = text
                    .lines()
                    .find_map(|line| line.strip_prefix("transmit recoveries: "));
                Ok(line.ok_or("no number of recoveries")?.parse()?)
            };
            let before = recovered()?;
            let attempts = guest.sh(&format!("{ATTEMPTS}; true"))?;
            guest.host.set(&nic, setting, Some(1))?;
            // It waits for room in its socket while nothing is completed.
            let traffic = guest.start(
                &format!(
                    "lab-agent udp-send --rate 2000 --size 1400 --duration 4 --to {}:9",
                    nic.peer_v4()
                ),
                Duration::from_secs(180),
            );
            let noticed = guest.wait_until(
                &format!("[ $({ATTEMPTS}) -gt {} ]", attempts.trim()),
                Duration::from_secs(50),
            );
            guest.host.set(&nic, setting, None)?;
            let traffic = traffic?;
            noticed?;
            eventually(Duration::from_secs(60), "it is connected again", || {
                Ok(recovered()? > before)
            })?;
            // What was sent is lost, and its sender goes on.
            let sender = traffic.wait()?;
            ensure(!sender.timed_out, || format!("{sender:?}"))?;
            link.pings()?;
            let logged = account_for(guest, &KNOWN)?;
            ensure(
                logged.iter().any(|line| line.contains("NETDEV WATCHDOG")),
                || format!("logged: {logged:?}"),
            )
        });
    }
    Ok(())
}

/// What is logged when a queue is stuck, and when the host does not answer yet.
const KNOWN: [&str; 4] = [
    "eth0: NETDEV WATCHDOG: ",
    "eth0: connection could not be made anew: -[0-9]+$",
    "eth0: unable to connect to NetVSP - -110$",
    "eth0: no answer to RNDIS",
];

/// Counts the lines that tell of a first attempt to make the connection anew.
const ATTEMPTS: &str = "dmesg -t | grep -c 'transmit queue . is stuck.*attempt 1$'";

/// Asks the kernel's family `netdev` about eth0.
fn netdev(guest: &Guest, what: &str) -> Result<Vec<Object>> {
    Ok(serde_json::from_str(
        &guest.sh(&format!("lab-agent netdev {what} eth0"))?,
    )?)
}

/// A number of an object.
fn number(object: &Object, name: &str) -> Result<u64> {
    let number = object.get(name).copied();
    number.ok_or_else(|| format!("no {name} in {object:?}").into())
}

/// Every queue must be served by a NAPI instance of its own that the device has. With our driver it
/// keeps its id.
fn napis(guest: &Guest) -> Result<()> {
    let rust = guest.drivers() == Drivers::Rust;
    let mut first = BTreeMap::new();
    for (change, channels) in [
        ("true", 2),
        ("ethtool -L eth0 combined 1", 1),
        ("ethtool -L eth0 combined 2", 2),
        ("ip link set eth0 mtu 1400", 2),
        ("ethtool -G eth0 rx 2000", 2),
        ("ip link set eth0 down && ip link set eth0 up", 2),
        ("ip link set eth0 mtu 1500", 2),
    ] {
        guest.sh(change)?;
        let queues = netdev(guest, "queues")?;
        let napis = netdev(guest, "napis")?;
        let text = || format!("after {change}: queues {queues:?}, NAPI instances {napis:?}");
        let ids: BTreeSet<_> = napis.iter().filter_map(|napi| napi.get("id")).collect();
        for kind in [RX, TX] {
            let mut count = 0;
            let mut served = BTreeSet::new();
            for queue in &queues {
                if number(queue, "type")? == kind {
                    count += 1;
                    let napi = queue.get("napi-id");
                    served.extend(napi);
                    let before = first.entry(queue.get("id").copied());
                    ensure(
                        *before.or_insert(napi.copied()) == napi.copied() || !rust,
                        text,
                    )?;
                }
            }
            // With one channel the stock driver keeps the other queue, which nothing serves.
            let fits = count == channels || !rust && count > channels;
            ensure(
                fits && served.len() == channels && served.is_subset(&ids),
                text,
            )?;
        }
    }
    Ok(())
}

/// Numbers of the kinds of queues.
const RX: u64 = 0;
const TX: u64 = 1;

/// The names of the counters in netdev-genl and in /sys/class/net/eth0/statistics.
const BASIC: [(&str, &str); 4] = [
    ("rx-packets", "rx_packets"),
    ("rx-bytes", "rx_bytes"),
    ("tx-packets", "tx_packets"),
    ("tx-bytes", "tx_bytes"),
];

/// The counters of the interface, in the order of [`BASIC`].
fn link_stats(guest: &Guest) -> Result<Vec<u64>> {
    let files: Vec<_> = BASIC.iter().map(|(_, file)| *file).collect();
    let text = guest.sh(&format!(
        "cd /sys/class/net/eth0/statistics && cat {}",
        files.join(" ")
    ))?;
    Ok(text
        .lines()
        .map(str::parse)
        .collect::<std::result::Result<_, _>>()?)
}

/// Makes traffic, then compares the counters of the device with those of the interface, and both
/// with the queues'. Returns the packets that the queues have sent meanwhile.
fn queue_stats(link: &Link<'_>, count: usize) -> Result<Vec<u64>> {
    let guest = link.guest;
    let sent = |guest: &Guest| -> Result<Vec<u64>> {
        let queues = netdev(guest, "queue-stats")?;
        ensure(queues.len() == 2 * count, || format!("{queues:?}"))?;
        let sending = queues.iter().filter(|q| q.get("queue-type") == Some(&TX));
        sending.map(|queue| number(queue, "tx-packets")).collect()
    };
    // The interface's counters are read first here and last below, so that they miss no packet.
    let first = link_stats(guest)?;
    let start = sent(guest)?;
    for way in ["", "-R"] {
        guest.sh(&format!(
            "iperf3 -t 2 -i 0 -P 8 {way} -c {}",
            link.nic.peer_v4()
        ))?;
    }
    let end = sent(guest)?;
    let moved: Vec<_> = start.iter().zip(&end).map(|(s, e)| e - s).collect();
    compare_stats(guest)?;
    // Nothing else has sent as much: the interface counts what the queues do.
    let last = link_stats(guest)?;
    let all: u64 = moved.iter().sum();
    ensure(last[2] - first[2] >= all && all > 200, || {
        format!("the queues have sent {moved:?}, the interface {first:?} to {last:?}")
    })?;
    ensure(first.iter().zip(&last).all(|(f, l)| f <= l), || {
        format!("counters fell: {first:?}, {last:?}")
    })?;
    Ok(moved)
}

/// Compares the device's counters with the interface's. Now and then a packet comes in between.
fn compare_stats(guest: &Guest) -> Result<()> {
    let mut last = String::new();
    eventually(Duration::from_secs(20), "the counters are equal", || {
        let before = link_stats(guest)?;
        let device = netdev(guest, "stats")?;
        let after = link_stats(guest)?;
        let device = device.first().ok_or("the device has no counters")?;
        let values = BASIC
            .iter()
            .map(|(name, _)| number(device, name))
            .collect::<Result<Vec<_>>>()?;
        last = format!("{before:?}, {values:?}, {after:?}");
        let ordered = |a: &[u64], b: &[u64]| a.iter().zip(b).all(|(a, b)| a <= b);
        ensure(
            ordered(&before, &values) && ordered(&values, &after),
            || format!("out of order: {last}"),
        )?;
        Ok(before == values)
    })
    .map_err(|error| format!("{error}: {last}").into())
}

/// What goes by the VF is counted by the device and by no queue.
fn vf_stats(link: &Link<'_>) -> Result<()> {
    let guest = link.guest;
    let by_vf = |guest: &Guest| -> Result<u64> {
        let statistics = guest.statistics("eth0")?;
        Ok(statistics.get("vf_tx_packets").copied().unwrap_or(0))
    };
    let before = (
        by_vf(guest)?,
        number(&netdev(guest, "stats")?[0], "tx-packets")?,
    );
    link.ping(&link.nic.peer_v4(), "")?;
    let after = (
        by_vf(guest)?,
        number(&netdev(guest, "stats")?[0], "tx-packets")?,
    );
    ensure(
        after.0 >= before.0 + 5 && after.1 - before.1 >= after.0 - before.0,
        || format!("packets by the VF, and of the device: {before:?}, {after:?}"),
    )?;
    compare_stats(guest)
}

/// The limits of the bytes on their way follow the load; a new connection begins again.
fn byte_limits(link: &Link<'_>) -> Result<()> {
    let guest = link.guest;
    let read = |name: &str| -> Result<Vec<u64>> {
        let text = guest.sh(&format!(
            "cd /sys/class/net/eth0/queues && cat tx-[01]/byte_queue_limits/{name}"
        ))?;
        Ok(text
            .lines()
            .map(str::parse)
            .collect::<std::result::Result<_, _>>()?)
    };
    let idle = || {
        eventually(Duration::from_secs(5), "nothing is on its way", || {
            Ok(read("inflight")?.iter().all(|&bytes| bytes == 0))
        })
    };
    // The limits of a new connection are small.
    for mtu in [1400, 1500] {
        guest.sh(&format!("ip link set eth0 mtu {mtu}"))?;
        link.pings()?;
        let first = read("limit")?;
        guest.sh(&format!("iperf3 -t 3 -i 0 -P 8 -c {}", link.nic.peer_v4()))?;
        let last = read("limit")?;
        ensure(
            first.len() == 2 && first.iter().zip(&last).all(|(first, last)| first < last),
            || format!("limits before and after a load: {first:?}, {last:?}"),
        )?;
        idle()?;
    }
    guest.sh("ip link set eth0 mtu 1400 && ip link set eth0 mtu 1500")?;
    idle()?;
    link.pings()?;
    idle()
}

/// Shows the parameters: mode, name, value.
const PARAMETERS: &str = "cd /sys/module/hv_netvsc/parameters && for p in *; do echo \
     $(stat -c %a $p) $p $(cat $p); done";

/// Has everything recorded during some traffic and changes, and looks for each kind of message.
fn traced(link: &Link<'_>) -> Result<()> {
    let guest = link.guest;
    let events = guest.sh(&format!("ls {EVENTS}"))?;
    ensure(
        events == "enable\nfilter\nnvsp_recv\nnvsp_send\nnvsp_send_pkt\nrndis_recv\nrndis_send\n",
        || events.clone(),
    )?;
    guest.sh(&format!("echo 1 >{EVENTS}/enable"))?;
    link.ping(&link.nic.peer_v4(), "")?;
    guest.sh("ip link set eth0 mtu 1400 && ip link set eth0 mtu 1500")?;
    guest.host.add_vf(link.nic)?;
    bonded(guest, link.nic)?;
    guest.sh(&format!("echo 0 >{EVENTS}/enable"))?;
    let text = guest.sh("cat /sys/kernel/tracing/trace; echo >/sys/kernel/tracing/trace")?;
    let expected = [
        r"rndis_send: dev=eth0 q=0 req=0x[0-9a-f]+ type=SET msg_len=[0-9]+",
        r"rndis_send: dev=eth0 q=0 req=0x[0-9a-f]+ type=HALT msg_len=12",
        r"rndis_send: dev=eth0 q=0 req=0x[0-9a-f]+ type=INIT msg_len=24",
        r"rndis_send: dev=eth0 q=0 req=0x[0-9a-f]+ type=QUERY msg_len=[0-9]+",
        r"rndis_recv: dev=eth0 q=0 req=0x[0-9a-f]+ type=SET_C msg_len=16",
        r"rndis_recv: dev=eth0 q=0 req=0x[0-9a-f]+ type=INIT_C msg_len=52",
        r"nvsp_send: dev=eth0 type=INIT$",
        r"nvsp_send: dev=eth0 type=SEND_NDIS_CONFIG",
        r"nvsp_send: dev=eth0 type=SEND_NDIS_VER",
        r"nvsp_send: dev=eth0 type=SEND_RECV_BUF",
        r"nvsp_send: dev=eth0 type=SEND_SEND_BUF",
        r"nvsp_send: dev=eth0 type=REVOKE_RECV_BUF",
        r"nvsp_send: dev=eth0 type=REVOKE_SEND_BUF",
        r"nvsp_send: dev=eth0 type=SUBCHANNEL",
        r"nvsp_send: dev=eth0 type=SWITCH_DATA_PATH",
        r"nvsp_send_pkt: dev=eth0 qid=0 type=CONTROL section=4294967295 size=0",
        r"nvsp_send_pkt: dev=eth0 qid=[01] type=DATA section=[0-9]+ size=[0-9]+",
        r"nvsp_recv: dev=eth0 qid=0 type=INIT_COMPLETE",
        r"nvsp_recv: dev=eth0 qid=0 type=SEND_RECV_BUF_COMPLETE",
        r"nvsp_recv: dev=eth0 qid=0 type=SEND_RNDIS_PKT$",
        r"nvsp_recv: dev=eth0 qid=0 type=SEND_RNDIS_PKT_COMPLETE",
    ];
    let mut missing = Vec::new();
    for pattern in expected {
        if !Regex::new(&format!("(?m){pattern}"))?.is_match(&text) {
            missing.push(pattern);
        }
    }
    ensure(missing.is_empty(), || {
        format!("missing: {missing:#?}\nin {text}")
    })
}

/// Compares ours with the stock module, which is loaded in its place for a while.
fn like_stock(guest: &Guest) -> Result<()> {
    // The number of an event is given when it is registered.
    let formats = format!("cd {EVENTS} && for e in *_*; do sed '/^ID:/d' $e/format; done");
    // Without what tells where a module comes from and what it was built with.
    let modinfo = |module: &str| {
        format!(
            "modinfo {module} | grep -vE '^(filename|author|intree|depends|signat|sig_|signer|srcversion|[[:space:]])'"
        )
    };
    let ours = [
        guest.sh(&formats)?,
        guest.sh(PARAMETERS)?,
        guest.sh(&modinfo("hv_netvsc"))?,
    ];
    guest.sh_within(
        &format!("rmmod hv_netvsc && insmod {STOCK} && udevadm settle --timeout=30"),
        Duration::from_secs(60),
    )?;
    let stock = [
        guest.sh(&formats)?,
        guest.sh(PARAMETERS)?,
        guest.sh(&modinfo(STOCK))?,
    ];
    guest.sh_within(
        "rmmod hv_netvsc && modprobe hv_netvsc && udevadm settle --timeout=30",
        Duration::from_secs(60),
    )?;
    for (ours, stock) in ours.iter().zip(&stock) {
        ensure(ours == stock, || format!("ours: {ours}\nstock: {stock}"))?;
    }
    Ok(())
}
