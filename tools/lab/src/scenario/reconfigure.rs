// SPDX-License-Identifier: GPL-2.0
//! All that can be changed is changed under traffic, then the host refuses it.

use std::time::{Duration, Instant};

use lab_agent::counters;
use lab_control::Fault;

use super::ending::account_for;
use super::guest::{report, Boot, Guest, Nic};
use super::traffic::Link;
use super::{ensure, Context, Drivers, Result};

/// Changes that are made under traffic; one round is [`CHANGES`].
const ROUNDS: usize = 4;
/// Commands that change something, and undo it.
const CHANGES: [&str; 14] = [
    "ethtool -L eth0 combined 1",
    "ethtool -L eth0 combined 2",
    "ethtool -G eth0 rx 2000 tx 500",
    "ethtool -G eth0 rx 9000 tx 2000",
    "ip link set eth0 mtu 1400",
    "ip link set eth0 mtu 1500",
    "ethtool -K eth0 tso off tx off lro off",
    "ethtool -K eth0 tx on tso on lro on",
    "ethtool -N eth0 rx-flow-hash udp4 sd",
    "ethtool -N eth0 rx-flow-hash udp4 sdfn",
    "ethtool -s eth0 speed 20000 duplex full",
    "ethtool -s eth0 speed 50000 duplex full",
    EQUAL,
    DEFAULT,
];
/// Those of the receive hash.
const EQUAL: &str = "ethtool -X eth0 equal 1";
const DEFAULT: &str = "ethtool -X eth0 default";
/// A key, and a table that no driver makes by itself.
const KEY: &str = "d1:d2:d3:d4:d5:d6:d7:d8:d9:da:db:dc:dd:de:df:e0:e1:e2:e3:e4:e5:e6:e7:e8:e9:ea:eb:ec:ed:ee:ef:f0:f1:f2:f3:f4:f5:f6:f7:f8";
/// What a change may take when the host does not answer: several waits of 10 s.
const SLOW: Duration = Duration::from_secs(60);
/// Looks at the counters, at least; how many fit into a second depends on the machine.
const SAMPLES: u64 = 20 * (ROUNDS * CHANGES.len()) as u64;

pub fn run(context: &mut Context<'_>) -> Result<()> {
    let lab = context.lab();
    let ours = context.drivers == Drivers::Rust;
    let guest = context.boot(&Boot {
        cpus: if ours { 4 } else { 2 },
        ..Boot::new(vec![Nic::new(0)])
    })?;
    let nic = guest.nics[0].clone();
    let link = Link::new(&guest, lab, &nic);
    guest.wait_until(
        "ethtool -l eth0 | tail -n 6 | grep -q 'Combined:.*[24]'",
        Duration::from_secs(15),
    )?;
    guest.sh("ethtool -L eth0 combined 2")?;
    carries(&link)?;

    let watch = guest.start(
        "lab-agent counters --interface eth0",
        Duration::from_secs(900),
    )?;
    let streams = link.streams()?;
    context.check(
        &format!("{} changes under traffic", ROUNDS * CHANGES.len()),
        || {
            for round in 0..ROUNDS {
                for change in CHANGES {
                    guest
                        .sh(change)
                        .map_err(|error| format!("round {}: {error}", round + 1))?;
                }
            }
            carries(&link)
        },
    );
    context.check(
        "another address, and the old one, between down and up",
        || {
            for mac in ["60:45:bd:00:00:01".to_owned(), nic.mac()] {
                let change = format!("ip link set eth0 address {mac}");
                let busy = guest.exit(&change, SLOW)?;
                ensure(busy.stderr.contains("busy"), || {
                    format!("of an interface that is up: {busy:?}")
                })?;
                guest.sh(&format!(
                    "ip link set eth0 down && {change} && ip link set eth0 up"
                ))?;
                carries(&link)?;
            }
            Ok(())
        },
    );
    let outcome = streams.collect()?;
    context.check("TCP lived through it, no datagram was damaged", || {
        outcome.alive()
    });
    let watched = watch.stop()?;
    let watched: counters::Report = report("counters", &(watched.stdout + &watched.stderr))?;
    context.note(&format!("counters: {watched:?}"));
    if ours {
        context.check("no counter has ever fallen or been zero", || {
            ensure(watched.falls == 0 && watched.missing == 0, || {
                format!("{watched:?}")
            })?;
            ensure(watched.samples >= SAMPLES, || {
                format!("only {} looks", watched.samples)
            })
        });
        kept(context, &link);
        subchannels(context, &link);
    } else {
        context.note(
            "the stock hv_netvsc begins its counters anew with a connection, forgets the user's receive \
             hash, and has one channel or waits for ever when one of several cannot be opened: not \
             asked of it",
        );
    }
    refused(context, &link);
    context.finish(guest)
}

/// Waits until packets pass after a new connection, then none may be lost.
fn carries(link: &Link<'_>) -> Result<()> {
    let ping = format!("ping -q -c 1 -W 1 {}", link.nic.peer_v4());
    link.guest.wait_until(&ping, Duration::from_secs(15))?;
    link.ping(&link.nic.peer_v4(), "")
}

/// The user's receive hash, through every change.
fn kept(context: &mut Context<'_>, link: &Link<'_>) {
    let guest = link.guest;
    context.check("the user's receive hash outlives every change", || {
        guest.sh(&format!("ethtool -X eth0 hkey {KEY} weight 3 1"))?;
        let wanted = guest.sh("ethtool -x eth0")?;
        for change in CHANGES
            .into_iter()
            .filter(|change| ![EQUAL, DEFAULT].contains(change))
        {
            let exit = guest.exit(change, Duration::from_secs(40))?;
            // The kernel itself refuses fewer channels than such a table names.
            let refused = change == "ethtool -L eth0 combined 1";
            ensure((exit.code != 0) == refused, || {
                format!("{change}: {}{}", exit.stdout, exit.stderr)
            })?;
            let now = guest.sh("ethtool -x eth0")?;
            ensure(now == wanted, || format!("after {change}:\n{now}"))?;
        }
        guest.sh("ip link set eth0 down && ip link set eth0 up")?;
        let now = guest.sh("ethtool -x eth0")?;
        ensure(now == wanted, || format!("after down and up:\n{now}"))?;

        // With one channel for a while: then all packets come by it.
        guest.host.fault(link.nic, Fault::SubchannelsRefused, 1)?;
        guest.sh("ip link set eth0 mtu 1400")?;
        account_for(guest, &["sub channel request failed"])?;
        carries(link)?;
        let fewer = guest.sh("ethtool -x eth0")?;
        ensure(fewer != wanted && fewer.contains("with 1 RX"), || {
            format!("with one channel:\n{fewer}")
        })?;
        guest.sh("ip link set eth0 mtu 1500")?;
        let now = guest.sh("ethtool -x eth0")?;
        ensure(now == wanted, || format!("with two channels again:\n{now}"))?;
        guest.sh("ethtool -X eth0 default")?;
        carries(link)
    });
}

/// A subchannel that cannot be opened, among others that can.
fn subchannels(context: &mut Context<'_>, link: &Link<'_>) {
    let guest = link.guest;
    context.check("one subchannel cannot be opened, the others work", || {
        guest
            .host
            .fault(link.nic, Fault::SubchannelOpenRefused, 1)?;
        guest.sh("ethtool -L eth0 combined 4")?;
        ensure(guest.dmesg("sub channel open failed")?.len() == 1, || {
            "the log says nothing of it".into()
        })?;
        let open = guest.host.nic(link.nic)?.channels;
        ensure(open == 3, || format!("{open} channels are open"))?;
        carries(link)?;
        let table = guest.sh("ethtool -x eth0")?;
        let used = |channel: &str| {
            let entries = table.lines().filter_map(|line| {
                let (place, entries) = line.split_once(':')?;
                place.trim().parse::<u32>().ok().map(|_| entries)
            });
            entries
                .flat_map(str::split_whitespace)
                .any(|entry| entry == channel)
        };
        let all = !used("1") && ["0", "2", "3"].into_iter().all(used);
        ensure(all, || table.clone())
    });
    context.check("the next change opens all, and takes no longer", || {
        let start = Instant::now();
        guest.sh("ip link set eth0 mtu 1400")?;
        let took = start.elapsed();
        ensure(took < Duration::from_secs(10), || format!("{took:?}"))?;
        let open = guest.host.nic(link.nic)?.channels;
        ensure(open == 4, || format!("{open} channels are open"))?;
        guest.sh("ip link set eth0 mtu 1500 && ethtool -L eth0 combined 2")?;
        carries(link)
    });
}

/// What the user can see of the settings.
fn settings(guest: &Guest) -> Result<String> {
    guest.sh(
        "ethtool -l eth0; ethtool -g eth0; ethtool -x eth0; ethtool -k eth0; \
         cat /sys/class/net/eth0/mtu /sys/class/net/eth0/address /sys/class/net/eth0/carrier",
    )
}

/// What the host refuses.
struct Refusal {
    what: &'static str,
    fault: Fault,
    times: u32,
    change: &'static str,
    /// With the interface down.
    closed: bool,
    /// What takes the wish back.
    undo: &'static str,
}

/// The host refuses what the user wants: all stays as it was, and works.
fn refused(context: &mut Context<'_>, link: &Link<'_>) {
    let case = |what, fault, change| Refusal {
        what,
        fault,
        times: 1,
        change,
        closed: false,
        undo: "true",
    };
    let buffers = "ethtool -G eth0 rx 3000 tx 700";
    let address = "ip link set eth0 address 60:45:bd:00:00:02";
    let mut cases = vec![
        case("receive buffer", Fault::ReceiveBufferRefused, buffers),
        case("send buffer", Fault::SendBufferRefused, buffers),
        case(
            "receive buffer",
            Fault::ReceiveBufferRefused,
            "ip link set eth0 mtu 1300",
        ),
        case(
            "receive buffer",
            Fault::ReceiveBufferRefused,
            "ethtool -L eth0 combined 1",
        ),
        Refusal {
            // The kernel remembers what was asked for.
            undo: "ethtool -K eth0 lro on",
            ..case("offload", Fault::RndisSetRefused, "ethtool -K eth0 lro off")
        },
        Refusal {
            closed: true,
            ..case("address", Fault::RndisSetRefused, address)
        },
    ];
    if context.drivers == Drivers::Rust {
        cases.extend([
            // It is switched off first, and set then.
            Refusal {
                times: 2,
                ..case(
                    "receive hash",
                    Fault::RndisSetRefused,
                    "ethtool -X eth0 weight 1 3",
                )
            },
            case(
                "answer to the filter",
                Fault::RndisSetUnanswered,
                "ethtool -L eth0 combined 1",
            ),
            case("answer to INIT", Fault::NvspInitUnanswered, buffers),
            Refusal {
                closed: true,
                ..case("answer to the address", Fault::RndisSetUnanswered, address)
            },
        ]);
    } else {
        context.note(
            "the stock hv_netvsc keeps a table for the receive hash that the host has refused, and \
             waits for ever for answers that do not come: not tried with it",
        );
    }
    for case in cases {
        let title = format!(
            "no {}: '{}' fails, all is as before",
            case.what, case.change
        );
        context.check(&title, || refuse(link, &case));
    }
}

fn refuse(link: &Link<'_>, case: &Refusal) -> Result<()> {
    let guest = link.guest;
    let before = settings(guest)?;
    if case.closed {
        guest.sh("ip link set eth0 down")?;
    }
    guest.host.fault(link.nic, case.fault, case.times)?;
    let exit = guest.exit(case.change, SLOW)?;
    guest.host.fault(link.nic, case.fault, 0)?;
    guest.sh(case.undo)?;
    if case.closed {
        guest.sh("ip link set eth0 up")?;
    }
    ensure(exit.code != 0 && !exit.timed_out, || {
        format!("code {}: {}{}", exit.code, exit.stdout, exit.stderr)
    })?;
    carries(link)?;
    let after = settings(guest)?;
    let changed: Vec<_> = before
        .lines()
        .zip(after.lines())
        .filter(|(before, after)| before != after)
        .collect();
    ensure(before == after, || format!("before and after: {changed:?}"))?;
    account_for(
        guest,
        &[
            "unable to (connect|close|add|open)",
            "no answer to",
            "Fail to set (RSS|offload)",
            "set_features\\(\\) failed",
            "[Bb]uffer",
            "version",
            "Ring buffer not empty",
        ],
    )
    .map(drop)
}
