// SPDX-License-Identifier: GPL-2.0
//! What is measured.

use std::time::Duration;

use lab_agent::{count, flood};

use super::super::guest::{report, Guest};
use super::super::traffic::Link;
use super::super::{ensure, Drivers, Result};
use super::count::Symbols;
use super::Bench;

/// A measurement, which may give several figures.
pub struct Measure {
    /// Its name; those of its figures begin with it.
    pub name: &'static str,
    /// What it is.
    pub title: &'static str,
    /// Measures.
    pub run: fn(&mut Bench<'_>, &Guest, Drivers) -> Result<Vec<(String, f64)>>,
}

/// All of them, in the order in which they are run.
const MEASURES: [Measure; 3] = [
    Measure {
        name: "instructions.tx",
        title: "guest instructions per packet sent, one at a time (pktgen)",
        run: transmit,
    },
    Measure {
        name: "instructions.tx-burst",
        title: "guest instructions per packet sent, 32 at a time (UDP GSO)",
        run: transmit_bursts,
    },
    Measure {
        name: "instructions.rx",
        title: "guest instructions per packet received",
        run: receive,
    },
];

/// Nobody's hardware address: such packets end where the receiver's stack first looks at them.
const NOBODY: &str = "02:00:00:00:00:99";
/// Nobody's IP address.
const NOWHERE: &str = "10.0.0.9";
/// Packets that are sent in a row: they fit into the ring, for a sender that waits would be counted, too.
const RUN: u64 = 960;
/// Packets that the driver gets at a time, if not one.
const BURST: u64 = 32;
/// What one measurement may take.
const LIMIT: Duration = Duration::from_secs(120);
/// The functions that a profile shows.
const FUNCTIONS: usize = 60;

/// Those whose names begin with one of the words; all when there is none.
pub fn choose(words: &[String]) -> Result<Vec<&'static Measure>> {
    let chosen: Vec<_> = MEASURES
        .iter()
        .filter(|measure| {
            words.is_empty()
                || words
                    .iter()
                    .any(|word| measure.name.starts_with(word.as_str()))
        })
        .collect();
    ensure(!chosen.is_empty(), || {
        format!(
            "no measure begins with '{}', see hvlab bench --list",
            words.join("' or '")
        )
    })?;
    Ok(chosen)
}

/// Prints the measures.
pub fn list() {
    for measure in &MEASURES {
        println!("{:24} {}", measure.name, measure.title);
    }
}

/// How often [`RUN`] packets are sent.
fn runs(bench: &Bench<'_>) -> u64 {
    if bench.options.quick {
        1
    } else {
        20
    }
}

/// What a count says about `packets` packets.
fn instructions(
    bench: &Bench<'_>,
    guest: &Guest,
    drivers: Drivers,
    name: &str,
    packets: u64,
) -> Result<Vec<(String, f64)>> {
    let Some(counter) = &bench.counter else {
        return Ok(Vec::new());
    };
    let count = counter.take()?;
    let symbols = if bench.options.profile {
        Symbols::of_all(guest)?
    } else {
        Symbols::of_modules(guest)?
    };
    let profile = symbols.profile(&count);
    let per_packet = |value: u64| value as f64 / packets as f64;
    if bench.options.profile {
        bench.note(&format!(
            "[{drivers}] {name}: instructions per packet by function"
        ));
        for (function, instructions) in profile.functions.iter().take(FUNCTIONS) {
            println!("    {:9.1}  {function}", per_packet(*instructions));
        }
    }
    Ok(vec![
        (
            name.to_owned(),
            per_packet(count.total - profile.module("pktgen")),
        ),
        (
            format!("{name}.driver"),
            per_packet(profile.module("hv_netvsc")),
        ),
        (format!("{name}.exits"), per_packet(count.entries)),
    ])
}

/// pktgen gives the driver one packet at a time.
fn transmit(bench: &mut Bench<'_>, guest: &Guest, drivers: Drivers) -> Result<Vec<(String, f64)>> {
    guest.sh(&format!(
        "modprobe pktgen && cd /proc/net/pktgen && echo rem_device_all >kpktgend_0 && echo add_device eth0 >kpktgend_0 && \
         for w in 'count {RUN}' 'pkt_size 60' 'dst_mac {NOBODY}' 'dst {NOWHERE}' 'udp_dst_min 9' 'udp_dst_max 9' \
         'delay 0'; do echo $w >eth0 || exit; done"
    ))?;
    let runs = runs(bench);
    let command = format!("lab-agent count --times {runs} --write /proc/net/pktgen/pgctrl=start");
    let text = guest.sh_within(&command, LIMIT)?;
    let _: count::Report = report(&command, &text)?;
    let result = guest.sh("cat /proc/net/pktgen/eth0")?;
    ensure(result.contains("Result: OK"), || result.clone())?;
    instructions(bench, guest, drivers, "instructions.tx", runs * RUN)
}

/// The stack segments large UDP sends, and gives the driver all segments of one at once.
fn transmit_bursts(
    bench: &mut Bench<'_>,
    guest: &Guest,
    drivers: Drivers,
) -> Result<Vec<(String, f64)>> {
    guest.sh(&format!(
        "ip neighbour replace {NOWHERE} lladdr {NOBODY} dev eth0"
    ))?;
    let runs = runs(bench);
    let command =
        format!("lab-agent count --times {runs} --packets {RUN} --burst {BURST} --to {NOWHERE}:9");
    let text = guest.sh_within(&command, LIMIT)?;
    let _: count::Report = report(&command, &text)?;
    instructions(bench, guest, drivers, "instructions.tx-burst", runs * RUN)
}

fn receive(bench: &mut Bench<'_>, guest: &Guest, drivers: Drivers) -> Result<Vec<(String, f64)>> {
    let packets = runs(bench) * RUN;
    let nic = guest.nics[0].clone();
    let link = Link::new(guest, bench.lab, &nic);
    guest.sh("ip link set eth0 promisc on")?;
    let flood = guest.peer_tool(
        link.lab,
        &nic,
        &format!(
            "flood --interface peer --destination {NOBODY} --to {} --from {} --count {packets} --wait-on 5000",
            nic.guest_v4(),
            nic.peer_v4()
        ),
    )?;
    let command = format!(
        "lab-agent count --kick {}:5000 --until /sys/class/net/eth0/statistics/rx_packets --by {packets}",
        nic.peer_v4()
    );
    let text = guest.sh_within(&command, LIMIT)?;
    let counted: count::Report = report(&command, &text)?;
    let flood: flood::Report = flood.report(Duration::from_secs(10))?;
    guest.sh("ip link set eth0 promisc off")?;
    ensure(counted.grown >= packets, || {
        format!("{} of {} packets arrived", counted.grown, flood.sent)
    })?;
    instructions(bench, guest, drivers, "instructions.rx", counted.grown)
}
