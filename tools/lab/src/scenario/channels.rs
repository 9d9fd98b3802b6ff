// SPDX-License-Identifier: GPL-2.0
//! Scenario 9: two processors, so two channels, two queues and their interrupts.

use std::time::Duration;

use super::ending::unload_pci;
use super::guest::{Boot, Guest, Nic};
use super::reload;
use super::traffic::Link;
use super::vf::bonded;
use super::{ensure, eventually, Context, Result};

/// How often each module is loaded again.
const RELOADS: usize = 5;
/// How often the VF's link goes down.
const FLAPS: usize = 2;
/// Packets that a queue has in any case when it takes part in a test.
const BUSY: u64 = 20;
/// An RSS key that no driver has by itself.
const KEY: [u8; 40] = {
    let mut key = [0; 40];
    let mut i = 0;
    while i < key.len() {
        key[i] = 0x11 + 3 * i as u8;
        i += 1;
    }
    key
};

pub fn run(context: &mut Context<'_>) -> Result<()> {
    let lab = context.lab();
    let mut guest = context.boot(&Boot {
        cpus: 2,
        ..Boot::new(vec![Nic::new(0)])
    })?;
    let nic = guest.nics[0].clone();
    guest.peer_server(lab, &nic, &["iperf3", "-s"])?;
    let link = Link::new(&guest, lab, &nic);

    context.check("there are two channels, on two processors", || {
        channels(&guest, &nic, 2)?;
        processors(&guest, &nic)
    });
    context.check(
        "both queues and both processors' interrupts carry traffic, both ways",
        || {
            let before = vmbus_interrupts(&guest)?;
            let grown = many_flows(&link, &["", "-R"])?;
            ensure(grown.iter().flatten().all(|&count| count > BUSY), || {
                format!("queues' packets received and sent: {grown:?}")
            })?;
            let after = vmbus_interrupts(&guest)?;
            let both = before.iter().zip(&after).all(|(b, a)| a > b) && after.len() == 2;
            ensure(both, || format!("interrupts: {before:?} then {after:?}"))
        },
    );

    let streams = link.streams()?;
    context.check("one channel and two again, under traffic", || {
        for count in [1, 2] {
            guest.sh(&format!("ethtool -L eth0 combined {count}"))?;
            channels(&guest, &nic, count)?;
            carries(&link, "")?;
        }
        processors(&guest, &nic)
    });
    context.check("other buffer sizes, under traffic", || buffers(&link));
    context.check("another MTU, under traffic", || {
        for mtu in [1400, 1500] {
            guest.sh(&format!("ip link set eth0 mtu {mtu}"))?;
            channels(&guest, &nic, 2)?;
            carries(&link, &format!("-s {} -M do", mtu - 28))?;
        }
        Ok(())
    });
    let outcome = streams.collect()?;
    context.check("TCP lived through it, no datagram was damaged", || {
        outcome.alive()
    });
    context.check("received packets follow the indirection table", || {
        spreading(&link)
    });

    context.check("a VF joins", || {
        guest.host.add_vf(&nic)?;
        bonded(&guest, &nic)
    });
    context.check("the VF's interrupts go where they are sent", || {
        vf_interrupts(&link)
    });
    let streams = link.streams()?;
    context.check("the VF's link goes down and comes back", || {
        for _ in 0..FLAPS {
            for up in [false, true] {
                guest.host.vf_link(&nic, up)?;
                let carrier = format!(
                    "grep -q {} /sys/class/net/{}/carrier",
                    u8::from(up),
                    nic.vf_name()
                );
                guest.wait_until(&carrier, Duration::from_secs(10))?;
                link.ping(&nic.peer_v4(), "")?;
            }
        }
        bonded(&guest, &nic)
    });
    let outcome = streams.collect()?;
    context.check("TCP lived through that, too", || outcome.alive());
    context.check(
        &format!("each module unloaded and loaded {RELOADS} times under load"),
        || {
            for round in 1..=RELOADS {
                // hv_pci is back and the VF comes up while hv_netvsc goes the next time.
                reload::netvsc(&link, true, true, true)
                    .and_then(|()| channels(&guest, &nic, 2))
                    .and_then(|()| reload::pci(&link, false, round == RELOADS))
                    .map_err(|error| format!("round {round}: {error}"))?;
            }
            link.pings()
        },
    );
    context.check("a VF's interrupts are gone with its driver", || {
        unload_pci(&guest)?;
        let left = guest.exit("grep mana_ /proc/interrupts", Duration::from_secs(20))?;
        ensure(left.code != 0, || left.stdout)
    });
    context.finish(guest)
}

/// Waits until guest and host have that many channels.
fn channels(guest: &Guest, nic: &Nic, count: u32) -> Result<()> {
    // Subchannels come after the interface. The last of these lines tells the current number.
    guest.wait_until(
        &format!("ethtool -l eth0 | grep Combined: | tail -n 1 | grep -qw {count}"),
        Duration::from_secs(15),
    )?;
    let text = guest.sh("ethtool -l eth0")?;
    let most = text.lines().find(|line| line.starts_with("Combined:"));
    ensure(
        most.is_some_and(|line| line.ends_with("\t2")) || count == 1,
        || text.clone(),
    )?;
    let host = guest.host.nic(nic)?.channels;
    ensure(host == count, || {
        format!("the host has {host} channels open, not {count}")
    })
}

/// Whether each processor serves a channel.
fn processors(guest: &Guest, nic: &Nic) -> Result<()> {
    let text = guest.sh(&format!(
        "cat /sys/bus/vmbus/devices/{}/channels/*/cpu | sort",
        nic.instance()
    ))?;
    ensure(text == "0\n1\n", || format!("channels are on {text}"))
}

/// Interrupts of the bus on each processor.
fn vmbus_interrupts(guest: &Guest) -> Result<Vec<u64>> {
    let line = guest.sh("grep HYP: /proc/interrupts")?;
    Ok(line
        .split_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect())
}

/// Packets that each queue has received and sent.
fn queues(guest: &Guest) -> Result<Vec<[u64; 2]>> {
    let all = guest.statistics("eth0")?;
    let count = |queue: u32, way: &str| all.get(&format!("{way}_queue_{queue}_packets")).copied();
    Ok((0..)
        .map_while(|queue| Some([count(queue, "rx")?, count(queue, "tx")?]))
        .collect())
}

/// Many TCP streams in some directions; by how much the queues' packets have grown.
fn many_flows(link: &Link<'_>, directions: &[&str]) -> Result<Vec<[u64; 2]>> {
    let before = queues(link.guest)?;
    for reverse in directions {
        link.guest.sh(&format!(
            "iperf3 -P 8 -t 1 -i 0 {reverse} -c {}",
            link.nic.peer_v4()
        ))?;
    }
    let after = queues(link.guest)?;
    Ok(before
        .iter()
        .zip(after)
        .map(|(before, after)| [after[0] - before[0], after[1] - before[1]])
        .collect())
}

/// Waits until packets pass after a new connection, then none may be lost.
fn carries(link: &Link<'_>, options: &str) -> Result<()> {
    // The stock driver turns the carrier off and on, and the kernel takes up to a second to
    // give a device with a new carrier its queues.
    let peer = link.nic.peer_v4();
    link.guest.wait_until(
        &format!("ping -q -c 1 -W 1 {peer}"),
        Duration::from_secs(10),
    )?;
    link.ping(&peer, options)
}

/// Smaller buffers and the old ones.
fn buffers(link: &Link<'_>) -> Result<()> {
    let guest = link.guest;
    let sizes = || -> Result<Vec<u64>> {
        let text = guest.sh("ethtool -g eth0")?;
        let current = text.split("Current hardware settings:").nth(1);
        let values = |name: &str| {
            current?
                .lines()
                .find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
        };
        match (values("RX:"), values("TX:")) {
            (Some(rx), Some(tx)) => Ok(vec![rx, tx]),
            _ => Err(text.into()),
        }
    };
    let old = sizes()?;
    for wanted in [vec![old[0] / 2, old[1] / 2], old] {
        guest.sh(&format!(
            "ethtool -G eth0 rx {} tx {}",
            wanted[0], wanted[1]
        ))?;
        let now = sizes()?;
        ensure(now == wanted, || format!("wanted {wanted:?}, got {now:?}"))?;
        channels(guest, link.nic, 2)?;
        carries(link, "")?;
    }
    Ok(())
}

/// The receive hash: a table with one queue, another key, and a table with both.
fn spreading(link: &Link<'_>) -> Result<()> {
    let guest = link.guest;
    let used = |queue: u32| -> Result<bool> {
        let text = guest.sh("ethtool -x eth0")?;
        let table = text.lines().filter_map(|line| {
            let (place, entries) = line.split_once(':')?;
            place.trim().parse::<u32>().ok().map(|_| entries)
        });
        Ok(table
            .flat_map(str::split_whitespace)
            .any(|entry| entry.parse() == Ok(queue)))
    };
    guest.sh("ethtool -X eth0 equal 1")?;
    ensure(used(0)? && !used(1)?, || {
        "the table is not as it was set".into()
    })?;
    let grown = many_flows(link, &["-R"])?;
    let one = grown[0][0] > BUSY && grown[1][0] < BUSY;
    ensure(one, || format!("table of queue 0 only: {grown:?}"))?;

    let key: Vec<_> = KEY.iter().map(|byte| format!("{byte:02x}")).collect();
    let key = key.join(":");
    guest.sh(&format!("ethtool -X eth0 hkey {key} equal 2"))?;
    ensure(used(0)? && used(1)?, || {
        "the table is not as it was set".into()
    })?;
    let text = guest.sh("ethtool -x eth0")?;
    ensure(text.contains(&key), || text)?;
    let grown = many_flows(link, &["-R"])?;
    let both = grown[0][0] > BUSY && grown[1][0] > BUSY;
    ensure(both, || format!("table of both queues: {grown:?}"))
}

/// An interrupt of the VF: number, and how often each processor had it.
struct Interrupt {
    number: u32,
    counts: [u64; 2],
}

/// Interrupts of the VF's queues.
fn queue_interrupts(guest: &Guest) -> Result<Vec<Interrupt>> {
    let text = guest.sh("grep mana_msi /proc/interrupts")?;
    let all = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        Some(Interrupt {
            number: words.next()?.trim_end_matches(':').parse().ok()?,
            counts: [words.next()?.parse().ok()?, words.next()?.parse().ok()?],
        })
    });
    Ok(all.collect())
}

/// Sends the interrupts of the VF's queues to one processor, then to the other.
fn vf_interrupts(link: &Link<'_>) -> Result<()> {
    let (guest, nic) = (link.guest, link.nic);
    let name = nic.vf_name();
    let text = guest.sh(&format!("ethtool -l {name} | grep Combined: | tail -n 1"))?;
    ensure(text.trim_end().ends_with("\t2"), || {
        format!("{name}: {text}")
    })?;
    let retargeted = || -> Result<u64> {
        let counters = guest.host.counters()?;
        let values = counters
            .iter()
            .filter(|(name, _)| name.ends_with("interrupts.retargeted"));
        Ok(values.map(|(_, value)| value).sum())
    };
    for processor in [0, 1] {
        let before = retargeted()?;
        let interrupts = queue_interrupts(guest)?;
        ensure(interrupts.len() == 2, || {
            format!("{} interrupts of queues", interrupts.len())
        })?;
        for interrupt in &interrupts {
            let affinity = format!("/proc/irq/{}/smp_affinity", interrupt.number);
            guest.sh(&format!("echo {} >{affinity}", 1 << processor))?;
        }
        // An interrupt moves when it comes the next time, once more where it was.
        let mut last = String::new();
        let moved = eventually(Duration::from_secs(30), "all have moved", || {
            let before = queue_interrupts(guest)?;
            many_flows(link, &[""])?;
            let after = queue_interrupts(guest)?;
            let grown: Vec<_> = before
                .iter()
                .zip(&after)
                .map(|(before, after)| [0, 1].map(|i| after.counts[i] - before.counts[i]))
                .collect();
            last = format!("sent to processor {processor}, came {grown:?} times");
            Ok(grown
                .iter()
                .all(|count| count[processor] > 0 && count[1 - processor] == 0))
        });
        moved.map_err(|error| format!("{error}: {last}"))?;
        let after = retargeted()?;
        ensure(after >= before + 2, || {
            format!("the host has seen {} retargeted", after - before)
        })?;
    }
    Ok(())
}
