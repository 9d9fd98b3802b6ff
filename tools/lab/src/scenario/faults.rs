// SPDX-License-Identifier: GPL-2.0
//! Scenario 10: a host that does not answer, or refuses what it should not.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use lab_control::Fault;

use super::ending;
use super::guest::{Boot, Guest, Nic};
use super::traffic::Link;
use super::vf::bonded;
use super::{ensure, eventually, Context, Drivers, Result};

/// What the drivers have to give up after, and something for a slow machine.
const NETVSC_LIMIT: Duration = Duration::from_secs(10 + 5);
const PCI_LIMIT: Duration = Duration::from_secs(30 + 10);

/// What the kernel adds to a driver's own line when a probe fails.
pub const PROBE_FAILED: &str =
    "probe failed for device|probe with driver|unable to add netvsc device";

/// A fault of the synthetic NIC that must make its probe fail, and the driver's word on it.
struct Failing {
    fault: Fault,
    line: &'static str,
    /// There is no answer, for which the stock driver waits for ever.
    silent: bool,
}

const NETVSC: [Failing; 5] = [
    Failing {
        fault: Fault::ReceiveBufferRefused,
        line: "Unable to complete receive buffer initialization|unable to connect to NetVSP - -22",
        silent: false,
    },
    Failing {
        fault: Fault::SendBufferRefused,
        line: "Unable to complete send buffer initialization|unable to connect to NetVSP - -22",
        silent: false,
    },
    Failing {
        fault: Fault::NvspInitUnanswered,
        line: "unable to connect to NetVSP - -110",
        silent: true,
    },
    Failing {
        fault: Fault::RndisInitUnanswered,
        line: "no answer to RNDIS INITIALIZE",
        silent: true,
    },
    Failing {
        fault: Fault::RndisSetUnanswered,
        line: "no answer to RNDIS SET",
        silent: true,
    },
];

/// Faults of the virtual PCI bus, one for each NIC's, that leave the driver without an answer.
const PCI_SILENT: [(Fault, &str); 3] = [
    (
        Fault::PciVersionUnanswered,
        "failed to request version: -110",
    ),
    (
        Fault::PciRelationsUnsent,
        "failed to send bus relations: -110",
    ),
    (Fault::PciD0Unanswered, "failed to answer D0 Entry: -110"),
];

pub fn run(context: &mut Context<'_>) -> Result<()> {
    let lab = context.lab();
    let rust = context.drivers == Drivers::Rust;
    let guest = context.boot(&Boot {
        cpus: 2,
        ..Boot::new((0..3).map(Nic::new).collect())
    })?;
    let nics = guest.nics.clone();
    let nic = &nics[0];
    let link = Link::new(&guest, lab, nic);

    subchannels(context, &link);
    refused_pci(context, &guest, &nics);

    // Nothing is bound any more but the synthetic devices of the others.
    let mut before = BTreeMap::new();
    context.check("the synthetic NIC and the buses are unbound", || {
        netvsc(&guest, nic, "unbind")?;
        before = held(&guest)?;
        Ok(())
    });
    // The buses wait while the NIC does. What the stock driver does without an answer is wait
    // until the host takes the device back.
    let happened = faults(&guest)?;
    let mut silent = Vec::new();
    for (nic, (fault, _)) in nics.iter().zip(PCI_SILENT) {
        guest.host.fault(nic, fault, 1)?;
        silent.push(guest.start(&sysfs("hv_pci", &nic.bus, "bind"), PCI_LIMIT)?);
    }
    context.check("three buses wait for an answer", || {
        eventually(Duration::from_secs(15), "all have met their faults", || {
            Ok(faults(&guest)? == happened + 3)
        })
    });
    let start = Instant::now();
    if !rust {
        context.note(
            "the stock hv_netvsc waits for ever, with the RTNL held, for the answers to NVSP \
             INIT, RNDIS INITIALIZE and RNDIS SET: not tried with it",
        );
        context.check(
            "without an answer each bus waits until the host takes it back",
            || {
                for (nic, running) in nics.iter().zip(silent.drain(..)) {
                    guest.host.rescind_vf(nic)?;
                    let exit = running.wait()?;
                    ensure(exit.code != 0 && !exit.timed_out, || {
                        format!("bind: {}{}", exit.stdout, exit.stderr)
                    })?;
                }
                account(&guest, &["failed to request version: -19"])?;
                released(&guest, &before)
            },
        );
    }
    let mut errors = Vec::new();
    for failing in NETVSC.iter().filter(|failing| rust || !failing.silent) {
        let name = format!("{:?}: the probe fails in time", failing.fault);
        context.check(&name, || {
            guest.host.fault(nic, failing.fault, 1)?;
            let start = Instant::now();
            let command = sysfs("hv_netvsc", &nic.instance(), "bind");
            let exit = guest.exit(&command, NETVSC_LIMIT * 2)?;
            let took = start.elapsed();
            ensure(exit.code != 0 && took < NETVSC_LIMIT, || {
                format!("bind: exit code {} after {took:?}", exit.code)
            })?;
            errors.push(failing.line);
            if !silent.is_empty() {
                // What the buses have to say meanwhile is looked at with theirs.
                return Ok(());
            }
            account(&guest, &errors)?;
            errors.clear();
            released(&guest, &before)
        });
    }
    if rust {
        context.check(
            "without an answer the probe of a bus fails in time, and nothing is left",
            || {
                for running in silent.drain(..) {
                    let exit = running.wait()?;
                    let left = PCI_LIMIT.saturating_sub(start.elapsed());
                    ensure(exit.code != 0 && !exit.timed_out && !left.is_zero(), || {
                        format!("bind: {exit:?}")
                    })?;
                }
                errors.extend(PCI_SILENT.map(|(_, line)| line));
                account(&guest, &errors)?;
                released(&guest, &before)
            },
        );
    }
    context.check("without faults all is there again", || {
        netvsc(&guest, nic, "bind")?;
        for nic in &nics {
            match rust {
                true => drop(guest.sh(&sysfs("hv_pci", &nic.bus, "bind"))?),
                false => guest.host.offer_vf(nic)?,
            }
        }
        for nic in &nics {
            bonded(&guest, nic)?;
        }
        link.pings()
    });
    context.finish(guest)
}

/// One queue when the host gives no subchannel, two afterwards.
fn subchannels(context: &mut Context<'_>, link: &Link<'_>) {
    let (guest, nic) = (link.guest, link.nic);
    let mut faults = vec![(Fault::SubchannelsRefused, "sub channel request failed")];
    match guest.drivers() {
        Drivers::Rust => faults.push((Fault::SubchannelOpenRefused, "sub channel open failed")),
        Drivers::C => context.note(
            "the stock hv_netvsc counts a subchannel that it could not open as open: not tried with it",
        ),
    }
    for (fault, line) in faults {
        context.check(&format!("{fault:?}: one queue carries all"), || {
            netvsc(guest, nic, "unbind")?;
            guest.host.fault(nic, fault, 1)?;
            netvsc(guest, nic, "bind")?;
            guest.wait_until(
                &format!("dmesg -t | grep -q \"{line}\""),
                Duration::from_secs(15),
            )?;
            link.pings()?;
            let open = guest.host.nic(nic)?.channels;
            ensure(open == 1, || format!("{open} channels are open"))?;
            // One of the lines is a notice, not an error.
            account_optional(guest, &[line])
        });
    }
    context.check("the next time there are two queues", || {
        netvsc(guest, nic, "unbind")?;
        netvsc(guest, nic, "bind")?;
        eventually(Duration::from_secs(15), "two channels are open", || {
            Ok(guest.host.nic(nic)?.channels == 2)
        })?;
        link.pings()
    });
}

/// A bus whose D0 entry is refused once, one where it is refused twice, and one whose
/// resources are refused. At the end no bus is bound.
fn refused_pci(context: &mut Context<'_>, guest: &Guest, nics: &[Nic]) {
    context.check(
        "buses: D0 entry refused once, twice, resources refused",
        || {
            let faults = [
                (Fault::PciD0Refused, 1),
                (Fault::PciD0Refused, 2),
                (Fault::PciResourcesRefused, 1),
            ];
            for (nic, (fault, times)) in nics.iter().zip(faults) {
                guest.host.fault(nic, fault, times)?;
                guest.host.add_vf(nic)?;
            }
            // The first try again succeeds.
            bonded(guest, &nics[0])?;
            guest.wait_until(
                "[ $(dmesg -t | grep -c \"hv_pci .*probe with driver\") -ge 2 ]",
                PCI_LIMIT,
            )?;
            account(
                guest,
                &[
                    "Retrying D0 Entry",
                    "failed D0 Entry with status",
                    "resource allocated returned",
                ],
            )
        },
    );
    context.check(
        "a bus that was refused holds nothing, and works when bound again",
        || {
            let live = |nic: usize| -> Result<u64> {
                let counters = guest.host.counters()?;
                let name = format!("vpci{nic}.interrupts.live");
                Ok(counters.get(&name).copied().unwrap_or(0))
            };
            ensure(live(1)? == 0 && live(2)? == 0, || {
                "there are interrupts of an unbound bus".into()
            })?;
            for nic in &nics[1..] {
                guest.sh(&sysfs("hv_pci", &nic.bus, "bind"))?;
                bonded(guest, nic)?;
            }
            for nic in nics {
                guest.sh(&sysfs("hv_pci", &nic.bus, "unbind"))?;
            }
            Ok(())
        },
    );
}

/// The shell command that binds or unbinds a device.
fn sysfs(driver: &str, device: &str, what: &str) -> String {
    format!("echo {device} >/sys/bus/vmbus/drivers/{driver}/{what}")
}

/// Binds or unbinds the synthetic device; bound, the interface is up and has its addresses.
pub fn netvsc(guest: &Guest, nic: &Nic, what: &str) -> Result<()> {
    guest.sh(&sysfs("hv_netvsc", &nic.instance(), what))?;
    if what == "bind" {
        guest.sh(&format!(
            "ip link set {name} up && ip address add {}/24 dev {name} && ip address add {}/64 dev {name} nodad",
            nic.guest_v4(),
            nic.guest_v6(),
            name = nic.name()
        ))?;
    }
    Ok(())
}

/// What the guest holds of the host.
pub fn held(guest: &Guest) -> Result<BTreeMap<String, u64>> {
    let mut counters = guest.host.counters()?;
    counters.retain(|name, _| {
        name == "vmbus.gpadls" || name == "vmbus.channels.open" || name.ends_with("interrupts.live")
    });
    Ok(counters)
}

/// Requests on virtual PCI buses that have met a fault.
fn faults(guest: &Guest) -> Result<u64> {
    let counters = guest.host.counters()?;
    let buses = counters
        .iter()
        .filter(|(name, _)| name.starts_with("vpci") && name.ends_with(".faults"));
    Ok(buses.map(|(_, count)| count).sum())
}

/// Waits until the guest holds no more than before.
pub fn released(guest: &Guest, before: &BTreeMap<String, u64>) -> Result<()> {
    let mut last = BTreeMap::new();
    eventually(Duration::from_secs(5), "nothing is left", || {
        last = held(guest)?;
        Ok(last == *before)
    })
    .map_err(|error| format!("{error}\nbefore: {before:?}\nnow: {last:?}").into())
}

/// The errors logged since the last time must be these, each at least once. The kernel's own words on
/// a failed probe are always known.
pub fn account(guest: &Guest, patterns: &[&str]) -> Result<()> {
    ending::account_for_each(guest, patterns, &[PROBE_FAILED])
}

/// The same where there need not be any.
pub fn account_optional(guest: &Guest, patterns: &[&str]) -> Result<()> {
    ending::account_for(guest, &[patterns, &[PROBE_FAILED]].concat()).map(drop)
}
