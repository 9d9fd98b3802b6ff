// SPDX-License-Identifier: GPL-2.0
//! Scenario 7: the modules come and go, with and without VF, idle and busy.

use std::time::Duration;

use super::ending::{no_resources, unload, unload_pci};
use super::guest::{Boot, Guest, Nic};
use super::traffic::Link;
use super::vf::bonded;
use super::{Context, Drivers, Result};

/// Rounds of the PCI driver with a VF, and whether under load.
const PCI_WITH_VF: [(bool, usize); 2] = [(false, 20), (true, 20)];
/// And without a VF.
const PCI_WITHOUT_VF: usize = 10;

pub fn run(context: &mut Context<'_>) -> Result<()> {
    let lab = context.lab();
    let guest = context.boot(&Boot::new(vec![Nic::new(0)]))?;
    let nic = guest.nics[0].clone();
    let link = Link::new(&guest, lab, &nic);

    let parts = [
        (false, false, 40),
        (false, true, 10),
        (true, false, 40),
        (true, true, 10),
    ];
    for (vf, load, rounds) in parts {
        if vf && !load {
            context.check("a VF is added while the guest runs", || {
                guest.host.add_vf(&nic)?;
                bonded(&guest, &nic)
            });
        }
        let name = format!(
            "hv_netvsc unloaded and loaded {rounds} times {} VF, {}",
            if vf { "with" } else { "without" },
            if load { "under load" } else { "idle" }
        );
        context.note(&name);
        context.check(&name, || {
            for round in 1..=rounds {
                netvsc(&link, vf, load, round == rounds)
                    .map_err(|error| format!("round {round}: {error}"))?;
            }
            link.pings()
        });
    }
    let module = match guest.drivers() {
        Drivers::Rust => "hv_pci unloaded and loaded",
        // It is built in: its device is unbound and bound, which is the most it can do.
        Drivers::C => "hv_pci unbound and bound",
    };
    for (load, rounds) in PCI_WITH_VF {
        let name = format!(
            "{module} {rounds} times with VF, {}",
            if load { "under load" } else { "idle" }
        );
        context.note(&name);
        context.check(&name, || {
            for round in 1..=rounds {
                // Now and then let the VF come up fully, otherwise go while it comes.
                let wait = round % 5 == 0 || round == rounds;
                pci(&link, load, wait).map_err(|error| format!("round {round}: {error}"))?;
            }
            link.pings()
        });
    }
    let name = format!("{module} {PCI_WITHOUT_VF} times without VF, then with one");
    context.check(&name, || {
        guest.host.remove_vf(&nic)?;
        for round in 1..=PCI_WITHOUT_VF {
            unload_pci(&guest)
                .and_then(|()| load_pci(&guest, &nic))
                .map_err(|error| format!("round {round}: {error}"))?;
        }
        guest.host.add_vf(&nic)?;
        bonded(&guest, &nic)
    });
    context.check("with both gone the host is back at zero", || {
        unload(&guest)?;
        no_resources(&guest)
    });
    context.finish(guest)
}

/// Unloads hv_netvsc and loads it again.
pub fn netvsc(link: &Link<'_>, vf: bool, load: bool, wait: bool) -> Result<()> {
    let (guest, nic) = (link.guest, link.nic);
    let busy = if load { busy(nic) } else { String::new() };
    guest.sh(&format!("{busy} rmmod hv_netvsc"))?;
    guest.sh(&format!(
        "modprobe hv_netvsc && ip link set eth0 up && ip address add {}/24 dev eth0 && \
         ip address add {}/64 dev eth0 nodad",
        nic.guest_v4(),
        nic.guest_v6()
    ))?;
    if vf && (load || wait) {
        bonded(guest, nic)?;
    } else if load {
        link.ping(&nic.peer_v4(), "")?;
    }
    Ok(())
}

/// The same with the virtual PCI driver.
pub fn pci(link: &Link<'_>, load: bool, wait: bool) -> Result<()> {
    let (guest, nic) = (link.guest, link.nic);
    if load {
        guest.sh(&format!("{} true", busy(nic)))?;
    }
    unload_pci(guest)?;
    load_pci(guest, nic)?;
    if wait {
        bonded(guest, nic)?;
    }
    Ok(())
}

fn load_pci(guest: &Guest, nic: &Nic) -> Result<()> {
    match guest.drivers() {
        Drivers::Rust => guest.sh_within("modprobe hv_pci", Duration::from_secs(60))?,
        Drivers::C => guest.sh_within(
            &format!("[ ! -e /sys/bus/vmbus/devices/{0} ] || echo {0} >/sys/bus/vmbus/drivers/hv_pci/bind", nic.bus),
            Duration::from_secs(60),
        )?,
    };
    Ok(())
}

/// Shell words that start a flood which outlives the following command.
fn busy(nic: &Nic) -> String {
    format!(
        "(lab-agent udp-send --rate 2000 --size 1400 --duration 2 --to {0}:9 & ping -q -f -s 1000 -w 2 {0} & wait) >/dev/null 2>&1 & sleep 0.3;",
        nic.peer_v4()
    )
}
