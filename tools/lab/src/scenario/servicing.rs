// SPDX-License-Identifier: GPL-2.0
//! Scenario 4: the host takes the VF away and gives it back, under load.

use std::time::Duration;

use super::guest::{Boot, Guest, Nic};
use super::traffic::Link;
use super::vf::{bonded, slave};
use super::{ensure, eventually, Context, Result};

const ROUNDS: u32 = 20;
/// Seconds without the VF, in turn.
const DURATIONS: [u64; 8] = [1, 2, 1, 3, 1, 4, 1, 5];
/// What the guest's memory in use may grow by over all rounds; a leak of a
/// page a round and queue would be more.
const MEMORY_SLACK_KIB: i64 = 6 * 1024;

pub fn run(context: &mut Context<'_>) -> Result<()> {
    let lab = context.lab();
    let guest = context.boot(&Boot::new(vec![Nic::with_vf(0)]))?;
    let nic = guest.nics[0].clone();
    let link = Link::new(&guest, lab, &nic);
    if !context.check("the VF joins and the data path switches", || {
        bonded(&guest, &nic)
    }) {
        return context.finish(guest);
    }
    let streams = link.streams()?;
    let mut baseline = None;
    let mut memory = 0;
    for round in 0..ROUNDS {
        let seconds = DURATIONS[round as usize % DURATIONS.len()];
        let name = format!(
            "round {} of {ROUNDS}, {seconds} s without VF: same domain, name and path",
            round + 1
        );
        if !context.check(&name, || {
            service(&guest, &nic, Duration::from_secs(seconds))
        }) {
            break;
        }
        let now = resources(&guest)?;
        match &baseline {
            // The first round may leave caches behind that stay.
            None => {
                memory = memory_in_use(&guest)?;
                baseline = Some(now);
            }
            Some(first) if *first != now => {
                context.check(
                    "GPADLs, relids and interrupts are as after the first round",
                    || Err(format!("first: {first:?}\nround {}: {now:?}", round + 1).into()),
                );
                break;
            }
            Some(_) => {}
        }
    }
    let outcome = streams.collect()?;
    context.check("TCP never broke, no datagram was damaged", || {
        outcome.alive()
    });
    context.check(
        "no GPADL, relid, interrupt or channel more than after the first round",
        || {
            let now = resources(&guest)?;
            ensure(baseline.as_ref() == Some(&now), || {
                format!("{baseline:?}\n{now:?}")
            })
        },
    );
    context.check("the guest's memory has not grown", || {
        let grown = memory_in_use(&guest)? - memory;
        ensure(grown < MEMORY_SLACK_KIB, || {
            format!("{grown} KiB more than after the first round")
        })
    });
    context.measure("longest_gap_ms", outcome.longest_gap_ms());
    context.measure("lost", outcome.lost());
    context.finish(guest)
}

/// One servicing, from the VF's removal to its return.
pub fn service(guest: &Guest, nic: &Nic, duration: Duration) -> Result<()> {
    let servicing = guest.host.service(nic, duration)?;
    eventually(
        duration + Duration::from_secs(20),
        "the data path leaves the VF",
        || Ok(!guest.host.data_path_is_vf(nic)?),
    )?;
    eventually(
        duration + Duration::from_secs(60),
        "the data path is back at the VF",
        || guest.host.data_path_is_vf(nic),
    )?;
    servicing.wait()?;
    bonded(guest, nic)?;
    slave(guest, nic)
}

/// What the guest holds of the host's.
fn resources(guest: &Guest) -> Result<Vec<(String, u64)>> {
    let all = guest.host.counters()?;
    Ok(all
        .into_iter()
        .filter(|(name, _)| {
            matches!(
                name.as_str(),
                "vmbus.gpadls" | "vmbus.relids" | "vmbus.channels.open" | "vmbus.channels.offered"
            ) || name.ends_with("interrupts.live")
        })
        .collect())
}

/// Memory that the kernel itself uses: slabs, vmalloc, per-CPU and page tables.
fn memory_in_use(guest: &Guest) -> Result<i64> {
    let text = guest.sh("sync; echo 3 >/proc/sys/vm/drop_caches; cat /proc/meminfo")?;
    let value = |name: &str| -> Result<i64> {
        text.lines()
            .find_map(|line| {
                line.strip_prefix(name)?
                    .strip_prefix(':')?
                    .split_whitespace()
                    .next()
            })
            .ok_or_else(|| format!("no {name} in meminfo"))?
            .parse()
            .map_err(Into::into)
    };
    // All that is neither free nor in use by programs or files.
    Ok(value("MemTotal")?
        - value("MemFree")?
        - value("Cached")?
        - value("Buffers")?
        - value("AnonPages")?)
}
