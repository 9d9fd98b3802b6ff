// SPDX-License-Identifier: GPL-2.0
//! Scenario 1: one NIC, no VF.

use std::time::Duration;

use super::ending::account_for;
use super::guest::{Boot, Guest, Nic, COMMAND};
use super::traffic::{Iperf, Link};
use super::vf::bonded;
use super::{ensure, eventually, Context, Drivers, Result};

/// What our hv_pci says when it is loaded beside the built-in one.
const REFUSAL: [&str; 1] = ["initcall_blacklist=init_hv_pci_drv on the kernel"];

pub fn run(context: &mut Context<'_>) -> Result<()> {
    let lab = context.lab();
    // No VF, so hv_pci is not needed: the boot to see ours meet the built-in one.
    let mut guest = context.boot(&Boot {
        builtin_pci: true,
        ..Boot::new(vec![Nic::new(0)])
    })?;
    let nic = guest.nics[0].clone();
    guest.peer_server(lab, &nic, &["iperf3", "-s"])?;

    identity(context, &guest, &nic);
    let link = Link::new(&guest, lab, &nic);
    context.check("ping over IPv4 and IPv6", || link.pings());
    context.check("multicast: all nodes of the link answer", || {
        guest
            .sh("ping -q -c 2 -W 5 ff02::1%eth0")
            .and_then(|text| ensure(!text.contains(" 0 received"), || text.clone()))
    });
    iperf(context, &link, 2);
    context.check("VLAN sub-interface", || vlan(&link));
    context.check(
        "10,000 frames of 60 to 1514 bytes arrive whole at the peer",
        || link.frames_out(10_000, 1514),
    );
    context.check(
        "10,000 frames of 60 to 1514 bytes arrive whole in the guest",
        || link.frames_in(10_000, 1514),
    );
    context.check("MTU 9000: pings and frames of up to 9014 bytes", || {
        mtu(&link)
    });
    context.check("ifdown and ifup", || {
        guest.sh("ip link set eth0 down; ip link set eth0 up; ip -6 address add fd00:0::2/64 dev eth0 nodad 2>/dev/null; true")?;
        link.pings()
    });
    context.check("link down and up at the host", || carrier(&link));
    context.check(
        "the host has counted the traffic on the synthetic path only",
        || {
            let counters = guest.host.counters()?;
            let value = |name: &str| counters.get(name).copied().unwrap_or(0);
            let good = value("net0.synthetic.tx_packets") > 10_000
                && value("net0.synthetic.rx_packets") > 10_000
                && value("net0.vf.tx_packets") == 0
                && value("net0.vf.rx_packets") == 0;
            ensure(good, || format!("{counters:#?}"))
        },
    );
    if guest.drivers() == Drivers::Rust {
        context.check(
            "hv_pci refuses to load beside the built-in one, and says what to do",
            || refused(&guest),
        );
        context.check("hv_netvsc uses a VF of the built-in hv_pci", || {
            guest.host.add_vf(&nic)?;
            bonded(&guest, &nic)?;
            link.pings()?;
            guest.host.remove_vf(&nic)?;
            // udev has tried our hv_pci for the new bus.
            guest.sh("udevadm settle --timeout=30")?;
            account_for(&guest, &REFUSAL).map(drop)
        });
    }
    context.finish(guest)
}

/// Loads hv_pci where the kernel's own one has the name.
fn refused(guest: &Guest) -> Result<()> {
    let exit = guest.exit("modprobe hv_pci", COMMAND)?;
    ensure(exit.stderr.contains("Device or resource busy"), || {
        format!("modprobe: exit code {}, {}", exit.code, exit.stderr)
    })?;
    let lines = guest.dmesg("^hv_pci: .*initcall_blacklist=init_hv_pci_drv")?;
    ensure(!lines.is_empty(), || "no line that says what to do".into())?;
    account_for(guest, &REFUSAL)?;
    let text = guest.sh("ls /sys/module; readlink /sys/bus/vmbus/drivers/hv_pci/module")?;
    ensure(
        !text.contains("hv_pci\n") && text.ends_with("/pci_hyperv\n"),
        || text,
    )
}

/// Who drives the interface.
pub fn identity(context: &mut Context<'_>, guest: &Guest, nic: &Nic) {
    context.check("hv_netvsc is registered on the bus and drives eth0", || {
        let lines = guest.dmesg("hv_vmbus: registering driver hv_netvsc")?;
        ensure(!lines.is_empty(), || "no line about the driver".into())?;
        let text = guest.sh("ethtool -i eth0")?;
        ensure(text.contains("driver: hv_netvsc"), || text)
    });
    context.check("the module is the one under test", || {
        let taint = guest.sh("cat /sys/module/hv_netvsc/taint")?;
        let own = taint.contains('O');
        ensure(own == (guest.drivers() == Drivers::Rust), || {
            format!("the module's taint is '{}'", taint.trim())
        })
    });
    context.check("address, device and carrier of eth0 are the host's", || {
        let text = guest.sh(
            "cd /sys/class/net/eth0; cat address carrier; basename $(readlink -f device); cat device/class_id",
        )?;
        let expected = format!(
            "{}\n1\n{}\n{{f8615163-df3e-46c5-913f-f2d2f965ed0e}}\n",
            nic.mac(),
            nic.instance()
        );
        ensure(text == expected, || format!("is {text}\nexpected {expected}"))
    });
    context.check("ethtool -k, -l, -g and -S answer", || {
        guest
            .sh("ethtool -k eth0 && ethtool -l eth0 && ethtool -g eth0 && ethtool -S eth0")
            .map(drop)
    });
}

/// iperf3 over TCP and UDP, both families, both ways.
pub fn iperf(context: &mut Context<'_>, link: &Link<'_>, seconds: u32) {
    for udp in [false, true] {
        for v6 in [false, true] {
            for reverse in [false, true] {
                let what = Iperf {
                    udp,
                    v6,
                    reverse,
                    seconds,
                };
                let name = format!(
                    "iperf3 {} over {} {} the guest",
                    if udp { "UDP" } else { "TCP" },
                    if v6 { "IPv6" } else { "IPv4" },
                    if reverse { "to" } else { "from" },
                );
                let mut rate = 0;
                context.check(&name, || {
                    rate = link.iperf(what)?;
                    Ok(())
                });
                context.note(&format!("{} kbit/s", rate / 1000));
            }
        }
    }
}

fn vlan(link: &Link<'_>) -> Result<()> {
    let guest = link.guest;
    let device = link.peer_interface();
    guest.peer(
        link.lab,
        link.nic,
        &format!(
            "ip link add link {device} name vlan100 type vlan id 100 && ip link set vlan100 up && \
             ip address add 10.100.0.1/24 dev vlan100 && ip address add fd64::1/64 dev vlan100 nodad"
        ),
    )?;
    guest.sh(
        "ip link add link eth0 name eth0.100 type vlan id 100 && ip link set eth0.100 up && \
         ip address add 10.100.0.2/24 dev eth0.100 && ip address add fd64::2/64 dev eth0.100 nodad",
    )?;
    link.ping("10.100.0.1", "")?;
    link.ping("10.100.0.1", "-s 1472 -M do")?;
    link.ping("fd64::1", "")?;
    let text = guest.sh("iperf3 -t 1 -i 0 -c 10.100.0.1")?;
    ensure(text.contains("receiver"), || text)?;
    guest.sh("ip link del eth0.100")?;
    guest.peer(link.lab, link.nic, "ip link del vlan100")?;
    Ok(())
}

pub fn mtu(link: &Link<'_>) -> Result<()> {
    let guest = link.guest;
    let address = link.nic.peer_v4();
    let set = |mtu: u32| -> Result<()> {
        guest.peer(
            link.lab,
            link.nic,
            &format!("ip link set {} mtu {mtu}", link.peer_interface()),
        )?;
        guest.sh(&format!("ip link set eth0 mtu {mtu}"))?;
        let now = guest.sh("cat /sys/class/net/eth0/mtu")?;
        ensure(now.trim() == mtu.to_string(), || {
            format!("the MTU is {now}")
        })
    };
    set(9000)?;
    link.ping(&address, "-s 8972 -M do")?;
    link.frames_out(1000, 9014)?;
    link.frames_in(1000, 9014)?;
    set(1280)?;
    link.ping(&address, "-s 1252 -M do")?;
    let exit = guest.exit(
        &format!("ping -q -c 1 -W 2 -s 1400 -M do {address}"),
        Duration::from_secs(20),
    )?;
    ensure(exit.code != 0, || {
        "a packet larger than the MTU went out whole".into()
    })?;
    set(1500)?;
    link.pings()
}

fn carrier(link: &Link<'_>) -> Result<()> {
    let (guest, nic) = (link.guest, link.nic);
    for up in [false, true] {
        guest.host.nic_link(nic, up)?;
        eventually(Duration::from_secs(15), "the carrier follows", || {
            let carrier = guest.sh("cat /sys/class/net/eth0/carrier")?;
            Ok(carrier.trim() == if up { "1" } else { "0" })
        })?;
    }
    link.pings()
}
