// SPDX-License-Identifier: GPL-2.0
//! Scenario 5: four NICs with VFs, offered in another order; two of the
//! buses ask for the same PCI domain.

use super::guest::{Boot, Guest, Nic};
use super::traffic::Link;
use super::vf::{nic_name, paths, BONDING};
use super::{ensure, Context, Result};

pub fn run(context: &mut Context<'_>) -> Result<()> {
    let lab = context.lab();
    let mut nics: Vec<_> = (0..4).map(Nic::with_vf).collect();
    // The same bytes 4 and 5, everything else different. The next domain is free, whichever of the two comes first.
    nics[3].bus = format!("0badcafe-{:04x}-4a5b-8c9d-9ae34b849c3e", nics[2].domain());
    let boot = Boot {
        nics: vec![
            nics[2].clone(),
            nics[0].clone(),
            nics[3].clone(),
            nics[1].clone(),
        ],
        ..Boot::new(Vec::new())
    };
    let guest = context.boot(&boot)?;
    let mut names = Vec::new();
    context.check("four VFs have joined their NICs", || {
        let condition = "[ $(dmesg -t | grep -c \"Data path switched to VF\") -ge 4 ]";
        guest.wait_until(condition, BONDING * 2)?;
        // A VF can join before udev gives it its name.
        guest.sh("udevadm settle --timeout=30").map(drop)
    });
    let all = guest.json("ip -j -d link show")?;
    for nic in &nics {
        let name = nic_name(&all, nic);
        context.check(
            &format!("NIC with serial number {} has its own VF", nic.serial),
            || paired(&guest, nic, &all),
        );
        names.push(name);
    }
    context.check(
        "the colliding bus has got another domain, and says so",
        || collision(&guest, &nics),
    );
    // The guest's /init counts interfaces, and these come in another order.
    for name in names.iter().flatten() {
        guest.sh(&format!("ip address flush dev {name}"))?;
    }
    for (nic, name) in nics.iter().zip(names) {
        let Some(name) = name else { continue };
        guest.sh(&format!(
            "ip address add {}/24 dev {name}; ip address add {}/64 dev {name} nodad",
            nic.guest_v4(),
            nic.guest_v6()
        ))?;
        let link = Link {
            interface: name,
            ..Link::new(&guest, lab, nic)
        };
        context.check(
            &format!(
                "NIC with serial number {}: traffic by its own VF",
                nic.serial
            ),
            || {
                link.pings()?;
                let before = paths(&guest, nic)?;
                link.ping(&nic.peer_v4(), "-c 20 -i 0.05")?;
                let after = paths(&guest, nic)?;
                ensure(
                    after.vf_tx >= before.vf_tx + 20 && after.vf_rx >= before.vf_rx + 20,
                    || format!("{before:?} then {after:?}"),
                )
            },
        );
    }
    context.finish(guest)
}

/// The VF under this NIC has its address and its serial number's slot.
fn paired(guest: &Guest, nic: &Nic, all: &serde_json::Value) -> Result<()> {
    let name = nic_name(all, nic).ok_or_else(|| format!("no interface with {}", nic.mac()))?;
    let vf = all
        .as_array()
        .into_iter()
        .flatten()
        .find(|link| link["master"] == name.as_str())
        .ok_or_else(|| format!("{name} has no slave: {all}"))?;
    ensure(vf["address"] == nic.mac().as_str(), || format!("{vf}"))?;
    let vf = vf["ifname"].as_str().unwrap_or_default();
    let suffix = format!("s{}", nic.serial);
    ensure(vf.starts_with("enP") && vf.ends_with(&suffix), || {
        format!("{name}'s slave is {vf}")
    })?;
    let device = guest.sh(&format!("readlink -f /sys/class/net/{vf}/device"))?;
    ensure(device.contains(&nic.bus), || format!("{vf} is on {device}"))
}

fn collision(guest: &Guest, nics: &[Nic]) -> Result<()> {
    let text = guest.sh("ls /sys/bus/pci/devices")?;
    let mut domains: Vec<_> = text
        .lines()
        .filter_map(|line| u16::from_str_radix(line.split(':').next()?, 16).ok())
        .filter(|domain| *domain != 0)
        .collect();
    domains.sort_unstable();
    domains.dedup();
    ensure(domains.len() == 4, || {
        format!("the domains are {domains:x?}")
    })?;
    for nic in &nics[..3] {
        ensure(domains.contains(&nic.domain()), || {
            format!("no domain {:04x} among {domains:x?}", nic.domain())
        })?;
    }
    let lines = guest.dmesg("PCI dom# ")?;
    ensure(
        lines.len() == 1
            && lines[0].contains(&format!(
                "PCI dom# {:#x} has collision, using ",
                nics[2].domain()
            )),
        || format!("lines about it: {lines:?}"),
    )
}
