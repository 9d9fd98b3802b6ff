// SPDX-License-Identifier: GPL-2.0
//! Small packets: instructions, packets in a second, processor time.

use std::time::Duration;

use lab_agent::{count, flood};

use super::super::guest::{report, Guest};
use super::super::{ensure, Drivers, Result};
use super::measure::{less, more};
use super::report::Value;
use super::Bench;

/// Nobody's hardware address: such packets end where the receiver's stack first looks at them.
const NOBODY: &str = "02:00:00:00:00:99";
/// Nobody's IP address.
const NOWHERE: &str = "10.0.0.9";
/// Packets sent in a row: they fit into the ring, for a sender that waits would be counted, too.
pub const RUN: u64 = 960;
/// Packets that the driver gets at a time, if not one.
const BURST: u64 = 32;
/// What one measurement may take.
const LIMIT: Duration = Duration::from_secs(120);
/// The functions that a profile shows.
const FUNCTIONS: usize = 60;
/// What is no work for packets: the generator, and random numbers for whoever may need some, now and then.
const GENERATOR: &str = "pktgen";
const RANDOM: [&str; 4] = [
    "blake2s_compress_generic",
    "blake2s_update",
    "chacha_permute",
    "chacha_block_generic",
];

/// How often [`RUN`] packets are sent.
fn runs(bench: &Bench<'_>) -> u64 {
    if bench.options.quick {
        1
    } else {
        20
    }
}

/// Runs `lab-agent count` in the guest.
pub fn counted(guest: &Guest, arguments: &str) -> Result<count::Report> {
    let command = format!("lab-agent count {arguments}");
    let text = guest.sh_within(&command, LIMIT)?;
    report(&command, &text)
}

/// What was counted last, for each of so many packets.
pub fn instructions(
    bench: &Bench<'_>,
    guest: &Guest,
    drivers: Drivers,
    name: &str,
    packets: u64,
) -> Result<Vec<Value>> {
    let Some(counter) = &bench.counter else {
        return Ok(Vec::new());
    };
    let count = counter.take()?;
    let profile = bench.symbols(guest, bench.options.profile)?.profile(&count);
    let per_packet = |value: u64| value as f64 / packets as f64;
    if bench.options.profile {
        bench.note(&format!(
            "[{drivers}] {name}: instructions for each packet by function"
        ));
        for (function, instructions) in profile.functions.iter().take(FUNCTIONS) {
            println!("    {:9.1}  {function}", per_packet(*instructions));
        }
    }
    let random: u64 = RANDOM.iter().map(|name| profile.function(name)).sum();
    let work = count.total - profile.module(GENERATOR) - random;
    Ok(vec![
        less(name, "instructions", per_packet(work)),
        less(
            format!("{name}.module"),
            "instructions",
            per_packet(profile.module("hv_netvsc")),
        ),
        less(format!("{name}.exits"), "exits", per_packet(count.entries)),
    ])
}

/// Lets the counter forget what was between marks that only took the time.
fn discard(bench: &Bench<'_>) -> Result<()> {
    bench
        .counter
        .as_ref()
        .map_or(Ok(()), |counter| counter.take().map(drop))
}

/// Prepares pktgen: `count` packets on each of the first `queues` queues of an interface.
pub fn pktgen(guest: &Guest, interface: &str, queues: u32, count: u64) -> Result<()> {
    let mut script = "modprobe pktgen && cd /proc/net/pktgen && for t in kpktgend_*; do echo rem_device_all >$t; done".to_owned();
    for queue in 0..queues {
        let device = format!("{interface}@{queue}");
        script += &format!(
            " && echo add_device {device} >kpktgend_{queue} && for w in 'count {count}' 'pkt_size 60' \
             'dst_mac {NOBODY}' 'dst {NOWHERE}' 'udp_src_min {port}' 'udp_src_max {port}' 'udp_dst_min 9' \
             'udp_dst_max 9' 'queue_map_min {queue}' 'queue_map_max {queue}' 'delay 0'; \
             do echo $w >{device} || exit; done",
            port = 9 + queue
        );
    }
    guest.sh(&script).map(drop)
}

/// Runs pktgen and checks that it has sent all.
pub fn pktgen_run(guest: &Guest, times: u64) -> Result<count::Report> {
    let arguments = format!("--times {times} --pause-ms 30 --write /proc/net/pktgen/pgctrl=start");
    let counted = counted(guest, &arguments)?;
    let result = guest.sh("cd /proc/net/pktgen && cat *@*")?;
    let good = result.contains("Result: OK") && !result.contains("Result: Idle");
    ensure(good, || result.clone())?;
    Ok(counted)
}

pub fn instructions_tx(bench: &Bench<'_>, guest: &Guest, drivers: Drivers) -> Result<Vec<Value>> {
    let runs = runs(bench);
    pktgen(guest, "eth0", 1, RUN)?;
    pktgen_run(guest, runs)?;
    instructions(bench, guest, drivers, "instructions.tx", runs * RUN)
}

/// Sends by UDP segmentation: the stack cuts a large send, and gives the driver all of it at once.
fn bursts(guest: &Guest, packets: u64, times: u64) -> Result<count::Report> {
    guest.sh(&format!(
        "ip neighbour replace {NOWHERE} lladdr {NOBODY} dev eth0"
    ))?;
    counted(
        guest,
        &format!("--times {times} --packets {packets} --burst {BURST} --to {NOWHERE}:9"),
    )
}

pub fn instructions_burst(
    bench: &Bench<'_>,
    guest: &Guest,
    drivers: Drivers,
) -> Result<Vec<Value>> {
    let runs = runs(bench);
    bursts(guest, RUN, runs)?;
    instructions(bench, guest, drivers, "instructions.burst", runs * RUN)
}

/// Lets the peer send so many packets, and waits until no more come.
fn flood(
    bench: &Bench<'_>,
    guest: &Guest,
    packets: u64,
    flows: u32,
    pause_us: u32,
) -> Result<count::Report> {
    let nic = &guest.nics[0];
    guest.sh("ip link set eth0 promisc on")?;
    let flood = guest.peer_tool(
        bench.lab,
        nic,
        &format!(
            "flood --interface peer --destination {NOBODY} --to {} --from {} --count {packets} --flows {flows} \
             --pause-us {pause_us} --wait-on 5000",
            nic.guest_v4(),
            nic.peer_v4()
        ),
    )?;
    let counted = counted(
        guest,
        &format!(
            "--kick {}:5000 --until /sys/class/net/eth0/statistics/rx_packets --by {packets} --idle-ms 1000",
            nic.peer_v4()
        ),
    )?;
    let _: flood::Report = flood.report(Duration::from_secs(30))?;
    guest.sh("ip link set eth0 promisc off")?;
    ensure(counted.grown > 0, || "no packet arrived".to_owned())?;
    Ok(counted)
}

pub fn instructions_rx(bench: &Bench<'_>, guest: &Guest, drivers: Drivers) -> Result<Vec<Value>> {
    let packets = runs(bench) * RUN;
    let counted = flood(bench, guest, packets, 1, 1000)?;
    ensure(counted.grown >= packets, || {
        format!("only {} of {packets} packets arrived", counted.grown)
    })?;
    instructions(bench, guest, drivers, "instructions.rx", counted.grown)
}

/// Packets in a second, and processor time for each.
fn rate(name: &str, packets: u64, counted: &count::Report) -> Vec<Value> {
    let seconds = counted.nanoseconds as f64 / 1e9;
    vec![
        more(name, "packets/s", packets as f64 / seconds),
        less(
            format!("{name}.cpu"),
            "us",
            counted.busy_ticks as f64 * 10_000.0 / packets as f64,
        ),
    ]
}

/// Packets that take about two seconds.
fn many(bench: &Bench<'_>) -> u64 {
    if bench.options.quick {
        BURST * 100
    } else {
        BURST * 1200
    }
}

pub fn rate_tx(bench: &Bench<'_>, guest: &Guest, _: Drivers) -> Result<Vec<Value>> {
    let packets = many(bench);
    pktgen(guest, "eth0", 1, packets)?;
    let counted = pktgen_run(guest, 1)?;
    discard(bench)?;
    Ok(rate("rate.tx", packets, &counted))
}

pub fn rate_burst(bench: &Bench<'_>, guest: &Guest, _: Drivers) -> Result<Vec<Value>> {
    let packets = many(bench);
    let counted = bursts(guest, packets, 1)?;
    discard(bench)?;
    Ok(rate("rate.burst", packets, &counted))
}

pub fn rate_rx(bench: &Bench<'_>, guest: &Guest, _: Drivers) -> Result<Vec<Value>> {
    let counted = flood(bench, guest, many(bench), 1, 0)?;
    discard(bench)?;
    Ok(rate("rate.rx", counted.grown, &counted))
}

pub fn rate_tx_queues(bench: &Bench<'_>, guest: &Guest, _: Drivers) -> Result<Vec<Value>> {
    let packets = many(bench) / 2;
    pktgen(guest, "eth0", 2, packets)?;
    let counted = pktgen_run(guest, 1)?;
    discard(bench)?;
    Ok(rate("queues.tx", 2 * packets, &counted))
}

pub fn rate_rx_queues(bench: &Bench<'_>, guest: &Guest, _: Drivers) -> Result<Vec<Value>> {
    let counted = flood(bench, guest, many(bench), 16, 0)?;
    discard(bench)?;
    Ok(rate("queues.rx", counted.grown, &counted))
}
