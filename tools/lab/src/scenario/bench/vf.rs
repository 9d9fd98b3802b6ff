// SPDX-License-Identifier: GPL-2.0
//! What the way by the VF costs, and the change from one way to the other.

use std::thread;
use std::time::Duration;

use lab_agent::udp;

use super::super::guest::{report, Guest, Nic};
use super::super::{eventually, Drivers, Result};
use super::measure::less;
use super::packets::{instructions as counted, pktgen, pktgen_run};
use super::report::Value;
use super::Bench;

/// Packets in a row, fewer than the VF's queue takes.
const RUN: u64 = 240;
/// Datagrams in a second while the data path is switched.
const RATE: u32 = 500;
/// Before and after a switch.
const AROUND: Duration = Duration::from_millis(700);

fn runs(bench: &Bench<'_>) -> u64 {
    if bench.options.quick {
        2
    } else {
        40
    }
}

/// Instructions for each packet through eth0, and on the VF directly.
pub fn instructions(bench: &Bench<'_>, guest: &Guest, drivers: Drivers) -> Result<Vec<Value>> {
    if bench.counter.is_none() {
        return Ok(Vec::new());
    }
    let runs = runs(bench);
    let on = |interface: &str, name: &str| -> Result<f64> {
        pktgen(guest, interface, 1, RUN)?;
        pktgen_run(guest, runs)?;
        let values = counted(bench, guest, drivers, name, runs * RUN)?;
        Ok(values[0].value)
    };
    let through = on("eth0", "vf.instructions.eth0")?;
    let direct = on(&guest.nics[0].vf_name(), "vf.instructions.direct")?;
    Ok(vec![
        less("vf.instructions.eth0", "instructions", through),
        less("vf.instructions.direct", "instructions", direct),
        less("vf.instructions.added", "instructions", through - direct),
    ])
}

/// The same in time.
pub fn time(bench: &Bench<'_>, guest: &Guest, _: Drivers) -> Result<Vec<Value>> {
    let packets = runs(bench) * 1000;
    let on = |interface: &str| -> Result<f64> {
        pktgen(guest, interface, 1, packets)?;
        let counted = pktgen_run(guest, 1)?;
        if let Some(counter) = &bench.counter {
            counter.take()?;
        }
        Ok(counted.nanoseconds as f64 / packets as f64)
    };
    let through = on("eth0")?;
    let direct = on(&guest.nics[0].vf_name())?;
    Ok(vec![
        less("vf.time.eth0", "ns", through),
        less("vf.time.direct", "ns", direct),
        less("vf.time.added", "ns", through - direct),
    ])
}

/// The VF is set down, then up.
pub fn switch(bench: &Bench<'_>, guest: &Guest, _: Drivers) -> Result<Vec<Value>> {
    let nic = &guest.nics[0];
    let mut values = switched(bench, guest, nic, false)?;
    values.extend(switched(bench, guest, nic, true)?);
    Ok(values)
}

/// One switch, under datagrams both ways.
fn switched(bench: &Bench<'_>, guest: &Guest, nic: &Nic, to_vf: bool) -> Result<Vec<Value>> {
    let long = Duration::from_secs(60);
    let (here, there) = (nic.guest_v4(), nic.peer_v4());
    let out_receiver =
        guest.peer_tool(bench.lab, nic, &format!("udp-receive --bind {there}:7002"))?;
    let in_receiver = guest.start(&format!("lab-agent udp-receive --bind {here}:7003"), long)?;
    let out_sender = guest.start(
        &format!("lab-agent udp-send --rate {RATE} --size 64 --to {there}:7002"),
        long,
    )?;
    guest.wait_until("grep -q :1B5B /proc/net/udp", Duration::from_secs(10))?;
    let in_sender = guest.peer_tool(
        bench.lab,
        nic,
        &format!("udp-send --rate {RATE} --size 64 --to {here}:7003"),
    )?;
    thread::sleep(AROUND);
    // The driver switches for its administrator; for a link event the host does without being asked.
    let state = if to_vf { "up" } else { "down" };
    guest.sh(&format!("ip link set {} {state}", nic.vf_name()))?;
    eventually(Duration::from_secs(10), "the data path is switched", || {
        Ok(guest.host.data_path_is_vf(nic)? == to_vf)
    })?;
    thread::sleep(AROUND);
    out_sender.stop()?;
    let out: udp::ReceiveReport = out_receiver.report(Duration::from_secs(30))?;
    let _: udp::SendReport = in_sender.stop()?;
    let exit = in_receiver.wait()?;
    let back: udp::ReceiveReport = report("udp-receive", &(exit.stdout + &exit.stderr))?;
    let name = if to_vf {
        "switch.to-vf"
    } else {
        "switch.from-vf"
    };
    Ok(vec![
        less(format!("{name}.gap.out"), "ms", out.longest_gap_ms as f64),
        less(format!("{name}.gap.in"), "ms", back.longest_gap_ms as f64),
        less(format!("{name}.lost.out"), "packets", out.lost as f64),
        less(format!("{name}.lost.in"), "packets", back.lost as f64),
    ])
}
