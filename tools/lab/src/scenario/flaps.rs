// SPDX-License-Identifier: GPL-2.0
//! Scenario 3: the VF's link goes down and comes back, again and again.

use std::time::Duration;

use super::guest::{Boot, Guest, Nic};
use super::tap::Tap;
use super::traffic::Link;
use super::vf::{bonded, paths};
use super::{ensure, eventually, Context, Measurements, Result};

/// By the host's link event.
const LINK_ROUNDS: u32 = 50;
/// By the guest's administrator, which switches the data path as well.
const ADMIN_ROUNDS: u32 = 10;
/// How long a path may need to take over the traffic.
const TAKEOVER: Duration = Duration::from_secs(10);

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
    let mut failure: Result<()> = Ok(());
    for round in 1..=LINK_ROUNDS {
        failure =
            link_round(&guest, &nic).map_err(|error| format!("round {round}: {error}").into());
        if failure.is_err() {
            break;
        }
        if round % 10 == 0 {
            context.note(&format!("link down and up: {round} of {LINK_ROUNDS}"));
        }
    }
    context.check(
        &format!("traffic follows each of {LINK_ROUNDS} link events"),
        || failure,
    );
    let before = switches(&guest)?;
    let mut failure: Result<()> = Ok(());
    for round in 1..=ADMIN_ROUNDS {
        failure =
            admin_round(&guest, &nic).map_err(|error| format!("round {round}: {error}").into());
        if failure.is_err() {
            break;
        }
    }
    context.check(
        &format!("the data path follows each of {ADMIN_ROUNDS} changes by the administrator"),
        || {
            failure?;
            let after = switches(&guest)?;
            let expected = 2 * ADMIN_ROUNDS as usize;
            ensure(after >= before + expected, || {
                format!("{} switches logged, expected {expected}", after - before)
            })
        },
    );
    let outcome = streams.collect()?;
    context.check("TCP never broke, no datagram was damaged", || {
        outcome.alive()
    });
    context.check("nothing was delivered twice", || {
        ensure(outcome.duplicated() == 0, || format!("{outcome:#?}"))
    });
    context.measure("lost", outcome.lost());
    context.measure("reordered", outcome.reordered());
    context.measure("longest_gap_ms", outcome.longest_gap_ms());
    context.finish(guest)
}

/// Down: the VF's counters stand still and the synthetic ones move; up: the reverse.
fn link_round(guest: &Guest, nic: &Nic) -> Result<()> {
    for up in [false, true] {
        guest.host.vf_link(nic, up)?;
        let mut last = paths(guest, nic)?;
        let what = if up {
            "traffic by the VF"
        } else {
            "traffic by the synthetic path"
        };
        eventually(TAKEOVER, what, || {
            let now = paths(guest, nic)?;
            let vf = now.vf_tx - last.vf_tx;
            let synthetic = now.synthetic_tx - last.synthetic_tx;
            last = now;
            let (right, wrong) = if up { (vf, synthetic) } else { (synthetic, vf) };
            Ok(right > 2 && wrong <= right / 4)
        })?;
    }
    Ok(())
}

fn admin_round(guest: &Guest, nic: &Nic) -> Result<()> {
    let name = nic.vf_name();
    guest.sh(&format!("ip link set {name} down"))?;
    eventually(TAKEOVER, "the host switches to synthetic", || {
        Ok(!guest.host.data_path_is_vf(nic)?)
    })?;
    guest.sh(&format!("ip link set {name} up"))?;
    eventually(TAKEOVER, "the host switches to the VF", || {
        guest.host.data_path_is_vf(nic)
    })
}

/// How many switches the guest has logged.
fn switches(guest: &Guest) -> Result<usize> {
    Ok(guest.dmesg("Data path switched (to|from) VF")?.len())
}

/// Loss and reordering of ours against the stock driver's.
pub fn compare(tap: &mut Tap, measurements: &Measurements) {
    for name in ["lost", "reordered"] {
        let value = |rust: bool| measurements.get(&(rust, format!("flaps.{name}"))).copied();
        let (Some(c), Some(rust)) = (value(false), value(true)) else {
            continue;
        };
        // Each of the rounds may catch a datagram or two more or less in flight.
        let limit = c + c / 4 + u64::from(LINK_ROUNDS);
        tap.check(
            &format!(
                "flaps: {name} datagrams are no more than with the stock driver ({rust} and {c})"
            ),
            if rust <= limit {
                Ok(())
            } else {
                Err(format!("{rust} with our driver, {c} with the stock one"))
            },
        );
    }
}
