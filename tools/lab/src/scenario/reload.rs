// SPDX-License-Identifier: GPL-2.0
//! Scenario 7: the modules come and go, with and without VF, idle and busy.

use std::time::Duration;

use lab_control::Fault;

use super::ending::{account_for, no_resources, unload, unload_pci};
use super::guest::{Boot, Guest, Nic};
use super::traffic::Link;
use super::vf::bonded;
use super::{ensure, Context, Drivers, Result};

/// Rounds of the PCI driver with a VF, and whether under load.
const PCI_WITH_VF: [(bool, usize); 2] = [(false, 20), (true, 20)];
/// And without a VF.
const PCI_WITHOUT_VF: usize = 10;

/// What a switch of drivers may take, with the way back.
const SWITCH: Duration = Duration::from_secs(240);

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
    if guest.drivers() == Drivers::Rust {
        switched(context, &link);
    }
    context.check("with both gone the host is back at zero", || {
        unload(&guest)?;
        no_resources(&guest)
    });
    context.finish(guest)
}

/// `scripts/switch-drivers.sh`, with which a machine goes from one driver set to the other and back.
fn switched(context: &mut Context<'_>, link: &Link<'_>) {
    let (guest, nic) = (link.guest, link.nic);
    let check = format!("ping -q -c 1 -W 1 {}", nic.peer_v4());
    let switch = |to: &str, timeout: u32, code: i32| -> Result<()> {
        let command = format!(
            "/root/switch-drivers.sh {to} --timeout {timeout} --stock-pci /lab/hv_pci_stock.ko --check '{check}'"
        );
        let exit = guest.exit(&command, SWITCH)?;
        ensure(exit.code == code, || {
            format!(
                "{command}: exit code {}\n{}{}",
                exit.code, exit.stdout, exit.stderr
            )
        })
    };
    let are = |netvsc: &str, pci: &str| -> Result<()> {
        let text = guest.sh("/root/switch-drivers.sh status")?;
        ensure(
            text == format!("hv_netvsc: {netvsc}\nhv_pci: {pci}\n"),
            || text,
        )
    };
    context.check("switched to the kernel's own drivers and back", || {
        let script = include_str!("../../../../scripts/switch-drivers.sh");
        guest.sh(&format!(
            "cat >/root/switch-drivers.sh <<'END_OF_SCRIPT'\n{script}END_OF_SCRIPT\n\
             chmod 755 /root/switch-drivers.sh"
        ))?;
        are("rust", "rust")?;
        for (to, round) in [("c", 1), ("rust", 2)] {
            switch(to, 60, 0)?;
            are(to, to)?;
            bonded(guest, nic)
                .and_then(|()| link.pings())
                .map_err(|error| format!("{to}, switch {round}: {error}"))?;
        }
        Ok(())
    });
    context.check("put back when the network does not return", || {
        switch("c", 60, 0)?;
        guest.host.fault(nic, Fault::NvspInitUnanswered, 1)?;
        switch("rust", 15, 2)?;
        account_for(
            guest,
            &[
                "hv_netvsc .*unable to (connect to NetVSP|add netvsc)",
                "hv_(netvsc|vmbus).*probe.* failed",
            ],
        )?;
        are("c", "c")?;
        bonded(guest, nic)?;
        link.pings()?;
        switch("rust", 60, 0)
    });
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
