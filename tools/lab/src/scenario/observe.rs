// SPDX-License-Identifier: GPL-2.0
//! Scenario 11: what can be seen of hv_netvsc from outside.

use std::time::Duration;

use regex::Regex;

use super::guest::{Boot, Guest, Nic};
use super::traffic::Link;
use super::vf::bonded;
use super::{ensure, Context, Drivers, Result};

/// Where the tracepoints are.
const EVENTS: &str = "/sys/kernel/tracing/events/netvsc";
/// Where the kernel's own module is, also when ours are installed.
const STOCK: &str = "/lib/modules/$(uname -r)/kernel/drivers/net/hyperv/hv_netvsc.ko";

pub fn run(context: &mut Context<'_>) -> Result<()> {
    let lab = context.lab();
    let rust = context.drivers == Drivers::Rust;
    let guest = context.boot(&Boot {
        cpus: 2,
        ..Boot::new(vec![Nic::new(0)])
    })?;
    let nic = guest.nics[0].clone();
    let link = Link::new(&guest, lab, &nic);

    context.check("tracepoints record what is sent and received", || {
        traced(&link)
    });
    context.check(
        "the parameters are in /sys/module, with their values",
        || {
            let text = guest.sh(PARAMETERS)?;
            let expected = "444 debug -1\n444 ring_size 128\n";
            ensure(text == expected, || text)
        },
    );
    if rust {
        context.check(
            "tracepoints, parameters and modinfo are those of the kernel's own module",
            || like_stock(&guest),
        );
    }
    context.finish(guest)
}

/// Shows the parameters: mode, name, value.
const PARAMETERS: &str = "cd /sys/module/hv_netvsc/parameters && for p in *; do echo \
     $(stat -c %a $p) $p $(cat $p); done";

/// Has everything recorded during some traffic and changes, and looks for each kind of message.
fn traced(link: &Link<'_>) -> Result<()> {
    let guest = link.guest;
    let events = guest.sh(&format!("ls {EVENTS}"))?;
    ensure(
        events == "enable\nfilter\nnvsp_recv\nnvsp_send\nnvsp_send_pkt\nrndis_recv\nrndis_send\n",
        || events.clone(),
    )?;
    guest.sh(&format!("echo 1 >{EVENTS}/enable"))?;
    link.ping(&link.nic.peer_v4(), "")?;
    guest.sh("ip link set eth0 mtu 1400 && ip link set eth0 mtu 1500")?;
    guest.host.add_vf(link.nic)?;
    bonded(guest, link.nic)?;
    guest.sh(&format!("echo 0 >{EVENTS}/enable"))?;
    let text = guest.sh("cat /sys/kernel/tracing/trace; echo >/sys/kernel/tracing/trace")?;
    let expected = [
        r"rndis_send: dev=eth0 q=0 req=0x[0-9a-f]+ type=SET msg_len=[0-9]+",
        r"rndis_send: dev=eth0 q=0 req=0x[0-9a-f]+ type=HALT msg_len=12",
        r"rndis_send: dev=eth0 q=0 req=0x[0-9a-f]+ type=INIT msg_len=24",
        r"rndis_send: dev=eth0 q=0 req=0x[0-9a-f]+ type=QUERY msg_len=[0-9]+",
        r"rndis_recv: dev=eth0 q=0 req=0x[0-9a-f]+ type=SET_C msg_len=16",
        r"rndis_recv: dev=eth0 q=0 req=0x[0-9a-f]+ type=INIT_C msg_len=52",
        r"nvsp_send: dev=eth0 type=INIT$",
        r"nvsp_send: dev=eth0 type=SEND_NDIS_CONFIG",
        r"nvsp_send: dev=eth0 type=SEND_NDIS_VER",
        r"nvsp_send: dev=eth0 type=SEND_RECV_BUF",
        r"nvsp_send: dev=eth0 type=SEND_SEND_BUF",
        r"nvsp_send: dev=eth0 type=REVOKE_RECV_BUF",
        r"nvsp_send: dev=eth0 type=REVOKE_SEND_BUF",
        r"nvsp_send: dev=eth0 type=SUBCHANNEL",
        r"nvsp_send: dev=eth0 type=SWITCH_DATA_PATH",
        r"nvsp_send_pkt: dev=eth0 qid=0 type=CONTROL section=4294967295 size=0",
        r"nvsp_send_pkt: dev=eth0 qid=[01] type=DATA section=[0-9]+ size=[0-9]+",
        r"nvsp_recv: dev=eth0 qid=0 type=INIT_COMPLETE",
        r"nvsp_recv: dev=eth0 qid=0 type=SEND_RECV_BUF_COMPLETE",
        r"nvsp_recv: dev=eth0 qid=0 type=SEND_RNDIS_PKT$",
        r"nvsp_recv: dev=eth0 qid=0 type=SEND_RNDIS_PKT_COMPLETE",
    ];
    let mut missing = Vec::new();
    for pattern in expected {
        if !Regex::new(&format!("(?m){pattern}"))?.is_match(&text) {
            missing.push(pattern);
        }
    }
    ensure(missing.is_empty(), || {
        format!("missing: {missing:#?}\nin {text}")
    })
}

/// Compares ours with the stock module, which is loaded in its place for a while.
fn like_stock(guest: &Guest) -> Result<()> {
    // The number of an event is given when it is registered.
    let formats = format!("cd {EVENTS} && for e in *_*; do sed '/^ID:/d' $e/format; done");
    // Without what tells where a module comes from and what it was built with.
    let modinfo = |module: &str| {
        format!(
            "modinfo {module} | grep -vE '^(filename|author|intree|depends|signat|sig_|signer|srcversion|[[:space:]])'"
        )
    };
    let ours = [
        guest.sh(&formats)?,
        guest.sh(PARAMETERS)?,
        guest.sh(&modinfo("hv_netvsc"))?,
    ];
    guest.sh_within(
        &format!("rmmod hv_netvsc && insmod {STOCK} && udevadm settle --timeout=30"),
        Duration::from_secs(60),
    )?;
    let stock = [
        guest.sh(&formats)?,
        guest.sh(PARAMETERS)?,
        guest.sh(&modinfo(STOCK))?,
    ];
    guest.sh_within(
        "rmmod hv_netvsc && modprobe hv_netvsc && udevadm settle --timeout=30",
        Duration::from_secs(60),
    )?;
    for (ours, stock) in ours.iter().zip(&stock) {
        ensure(ours == stock, || format!("ours: {ours}\nstock: {stock}"))?;
    }
    Ok(())
}
