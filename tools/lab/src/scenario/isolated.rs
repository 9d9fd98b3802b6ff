// SPDX-License-Identifier: GPL-2.0
//! Scenario `isolated`: the guest's memory is isolated from the host, which may access what is shared with it only.

use std::time::Duration;

use hyperv_wire::nvsp;
use lab_control::Kind;
use zerocopy::little_endian::U32;

use super::ending::account_for;
use super::guest::{Boot, Guest, Nic};
use super::one_nic;
use super::traffic::Link;
use super::{ensure, Context, Result};

/// Frames of all sizes each way.
const FRAMES: u32 = 2_000;
const LARGEST: usize = 1514;
/// For what the guest says.
const DEADLINE: Duration = Duration::from_secs(10);

pub fn run(context: &mut Context<'_>) -> Result<()> {
    let lab = context.lab();
    // NVSP 6.1 is the first version for isolated guests.
    let old = Nic {
        nvsp: Some("6.0"),
        ..Nic::new(1)
    };
    let mut guest = context.boot(&Boot {
        isolated: true,
        ..Boot::new(vec![Nic::with_vf(0), old])
    })?;
    let nic = guest.nics[0].clone();
    guest.peer_server(lab, &nic, &["iperf3", "-s"])?;
    let link = Link::new(&guest, lab, &nic);
    context.check("the guest knows that it is isolated", || {
        guest
            .sh("dmesg | grep 'Isolation Config: Group A 0x0, Group B 0x9e1'")
            .map(drop)
    });
    context.check("an older NVSP version is refused", || refused(&guest));
    context.check("SR-IOV is not advertised, so no VF comes", || {
        without_sriov(&guest)
    });
    context.check("ping over IPv4 and IPv6", || link.pings());
    context.check(
        &format!("{FRAMES} frames of all sizes from the guest, every byte checked"),
        || link.frames_out(FRAMES, LARGEST),
    );
    context.check(
        &format!("{FRAMES} frames of all sizes to the guest, every byte checked"),
        || link.frames_in(FRAMES, LARGEST),
    );
    one_nic::iperf(context, &link, 2);
    context.check("a VF that the host announces is ignored", || {
        announced_vf(&guest, &nic)
    });
    // Frames of 9014 bytes have no place in the send buffer: the host reads copies of their pages.
    context.check("MTU 9000: pings and frames of up to 9014 bytes", || {
        one_nic::mtu(&link)
    });
    context.finish(guest)
}

/// The second NIC has no device.
fn refused(guest: &Guest) -> Result<()> {
    let version =
        r"Invalid NVSP version 0x60000 \(expected >= 0x60001\) from the host supporting isolation";
    let lines = account_for(
        guest,
        &[
            version,
            "unable to connect to NetVSP - -71",
            r"unable to add netvsc device \(ret -71\)",
            r"hv_vmbus: probe failed for device .* \(-71\)",
            "probe with driver hv_netvsc failed with error -71",
        ],
    )?;
    ensure(
        lines.iter().any(|line| line.contains("Invalid NVSP")),
        || "no line about the version".into(),
    )?;
    guest.sh("! [ -e /sys/class/net/eth1 ]").map(drop)
}

fn without_sriov(guest: &Guest) -> Result<()> {
    let line = "SR-IOV not advertised by guests on the host supporting isolation";
    // Both NICs.
    let said = guest.dmesg(line)?.len();
    ensure(said == 2, || format!("said {said} times"))?;
    let lines = guest.host.log_since(0)?;
    let capabilities: Vec<_> = lines
        .iter()
        .filter(|line| line.contains("NVSP_SEND_NDIS_CONFIG"))
        .filter_map(|line| line.rsplit_once("capabilities="))
        .map(|(_, capabilities)| capabilities)
        .collect();
    ensure(
        matches!(capabilities[..], ["0xa8", "0x28"] | ["0x28", "0xa8"]),
        || format!("{capabilities:?}"),
    )?;
    guest.sh("[ -z \"$(ls /sys/bus/pci/devices)\" ]").map(drop)
}

/// The host would not tell a driver that does not advertise SR-IOV: it is made to.
fn announced_vf(guest: &Guest, nic: &Nic) -> Result<()> {
    let message = nvsp::encode(&nvsp::VfAssociation {
        allocated: U32::new(1),
        serial: U32::new(1),
    });
    guest.host.send(nic, Kind::Nvsp, &[message.to_vec()], 1)?;
    let line = "Ignore VF_ASSOCIATION msg from the host supporting isolation";
    guest.wait_until(&format!("dmesg | grep -q '{line}'"), DEADLINE)?;
    account_for(guest, &[line]).map(drop)
}
