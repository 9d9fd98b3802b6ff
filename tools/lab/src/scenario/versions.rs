// SPDX-License-Identifier: GPL-2.0
//! Scenario 8: a host that takes only older protocol versions.

use super::guest::{Boot, Guest, Nic};
use super::odd_hosts::{send_table_found, teardown};
use super::traffic::{Iperf, Link};
use super::vf::bonded;
use super::{ensure, Context, Result};

/// VMBus, NVSP and virtual PCI versions, newest first; each boot takes one of each.
const VERSIONS: [(&str, &str, &str); 6] = [
    ("6.0", "6.1", "1.4"),
    ("5.3", "6.0", "1.3"),
    ("5.2", "5.0", "1.2"),
    ("5.1", "4.0", "1.1"),
    ("5.0", "2.0", "1.4"),
    ("4.0", "1.0", "1.1"),
];

pub fn run(context: &mut Context<'_>) -> Result<()> {
    let lab = context.lab();
    for (vmbus, nvsp, vpci) in VERSIONS {
        context.note(&format!("VMBus {vmbus}, NVSP {nvsp}, virtual PCI {vpci}"));
        // A host gives no VF to a driver that it cannot tell of it.
        let vf = !nvsp.starts_with(['1', '2']);
        let nic = if vf { Nic::with_vf(0) } else { Nic::new(0) };
        let mut guest = context.boot(&Boot {
            vmbus_version: Some(vmbus),
            nvsp_version: Some(nvsp),
            vpci_version: Some(vpci),
            ..Boot::new(vec![nic.clone()])
        })?;
        guest.peer_server(lab, &nic, &["iperf3", "-s"])?;
        let link = Link::new(&guest, lab, &nic);
        context.check(&format!("VMBus {vmbus} is in use"), || {
            let lines = guest.dmesg("Vmbus version:")?;
            ensure(
                lines
                    .iter()
                    .any(|line| line.contains(&format!("Vmbus version:{vmbus}"))),
                || format!("{lines:?}"),
            )
        });
        context.check(&format!("NVSP {nvsp} is in use"), || {
            let version = guest.host.nvsp_version(&nic)?;
            ensure(version == nvsp, || format!("the host says {version}"))
        });
        if vf {
            context.check(&format!("virtual PCI {vpci} is in use"), || {
                let minor = vpci.split('.').nth(1).unwrap_or_default();
                let wanted = format!("PCI VMBus probing: Using version 0x1000{minor}");
                guest.wait_until(
                    &format!("dmesg -t | grep -q \"{wanted}\""),
                    std::time::Duration::from_secs(30),
                )
            });
            context.check("the VF joins", || bonded(&guest, &nic));
        }
        context.check("traffic passes", || {
            link.pings()?;
            for reverse in [false, true] {
                link.iperf(Iperf {
                    udp: false,
                    v6: false,
                    reverse,
                    seconds: 1,
                })?;
            }
            link.frames_out(1000, 1514)?;
            link.frames_in(1000, 1514)
        });
        context.check(
            &format!("NVSP {nvsp}: the host is told what it must know"),
            || announced(&guest, nvsp),
        );
        if matches!(nvsp, "5.0" | "6.0") {
            context.check(
                "a send table is found where old hosts put it, whatever they say",
                || send_table_found(&link),
            );
        }
        context.check("teardown order from VMBus 4.0 on", || {
            teardown(&guest, &nic, false)
        });
        context.finish(guest)?;
    }
    Ok(())
}

/// NDIS version, largest frame and capabilities, by the version of NVSP.
fn announced(guest: &Guest, nvsp: &str) -> Result<()> {
    let lines = guest.host.log_since(0)?;
    let (ndis, config) = match nvsp {
        "1.0" => ("6.1", None),
        // The tag of a VLAN; with VFs and teaming; with coalesced packets.
        "2.0" | "4.0" => ("6.1", Some(0x8)),
        "5.0" | "6.0" => ("6.30", Some(0x2c)),
        _ => ("6.30", Some(0xac)),
    };
    let field = |name: &str| {
        let line = lines.iter().find(|line| line.contains(name))?;
        line.split_once(name).map(|(_, fields)| fields.trim())
    };
    let version = field(" NVSP_SEND_NDIS_VERSION ");
    let told = field(" NVSP_SEND_NDIS_CONFIG ");
    let wanted = config.map(|bits| format!("max_frame=1514 capabilities={bits:#x}"));
    ensure(
        version == Some(&format!("version={ndis}")) && told == wanted.as_deref(),
        || format!("NDIS version {version:?}, configuration {told:?}, expected {ndis}, {wanted:?}"),
    )
}
