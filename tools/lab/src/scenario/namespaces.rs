// SPDX-License-Identifier: GPL-2.0
//! Network namespaces, and what user space sees of a VF that comes.

use std::time::Duration;

use super::ending::account_for;
use super::guest::{Boot, Guest, Nic};
use super::vf::{bonded, load_order};
use super::{ensure, Context, Drivers, Result};

/// What a device may take to follow another one.
const MOVING: Duration = Duration::from_secs(20);
/// How often the VF comes while user space looks on.
const ARRIVALS: usize = 10;
/// The name that the kernel gives the VF.
const KERNEL_NAME: &str = "eth1";

pub fn run(context: &mut Context<'_>) -> Result<()> {
    let ours = context.drivers == Drivers::Rust;
    let guest = context.boot(&Boot::new(vec![Nic::new(0)]))?;
    let nic = guest.nics[0].clone();
    let name = nic.vf_name();

    context.check("a VF follows eth0 that goes to another namespace", || {
        guest.host.add_vf(&nic)?;
        bonded(&guest, &nic)?;
        enter(&guest, &nic, "later", &[])?;
        together(&guest, &nic, "later", &[&name])?;
        logged(&guest, "Moved VF to namespace with: eth0", 1)
    });
    context.check("without the namespace both are back", || {
        leave(&guest, &nic, "later")
    });
    context.check("it gets another name where its own is taken", || {
        enter(&guest, &nic, "taken", &[&name])?;
        together(&guest, &nic, "taken", &[KERNEL_NAME])?;
        logged(&guest, "Moved VF to namespace with: eth0", 2)?;
        leave(&guest, &nic, "taken")?;
        guest.host.remove_vf(&nic)
    });
    if ours {
        context.check(
            "a VF is registered, and follows eth0 that is elsewhere",
            || {
                enter(&guest, &nic, "before", &[])?;
                guest.host.add_vf(&nic)?;
                // udev may have been there before.
                together(&guest, &nic, "before", &[KERNEL_NAME, &name])?;
                logged(&guest, "VF moved to namespace with: eth0", 1)?;
                leave(&guest, &nic, "before")?;
                guest.host.remove_vf(&nic)
            },
        );
        context.check("there, too, it gets another name if need be", || {
            enter(&guest, &nic, "both", &[KERNEL_NAME, &name])?;
            guest.host.add_vf(&nic)?;
            together(&guest, &nic, "both", &["eth2"])?;
            logged(&guest, "VF moved to namespace with: eth0", 2)?;
            leave(&guest, &nic, "both")?;
            guest.host.remove_vf(&nic)
        });
        context.check("a VF that goes before it has followed is let go", || {
            enter(&guest, &nic, "short", &[])?;
            for _ in 0..5 {
                guest.host.add_vf(&nic)?;
                guest.host.remove_vf(&nic)?;
            }
            // The virtual PCI driver may have been about to begin.
            account_for(
                &guest,
                &["(probe failed|to request version).* \\(?-19\\)?$"],
            )?;
            guest.host.add_vf(&nic)?;
            together(&guest, &nic, "short", &[KERNEL_NAME, &name])?;
            leave(&guest, &nic, "short")?;
            guest.host.remove_vf(&nic)
        });
    } else {
        context.note(
            "the stock hv_netvsc moves a VF while it is being registered, and waits for ever for the \
             VF's lock, which it holds: not tried with it",
        );
    }
    context.check(
        &format!("{ARRIVALS} times a VF is a slave before user space hears of it"),
        || arrivals(&guest, &nic),
    );
    context.check(
        "a VF whose driver was first becomes a slave, and keeps its name",
        || driver_first(&guest, &nic),
    );
    context.check(
        "with the soft dependencies of 'make install' hv_netvsc is first",
        || softdep(&guest, &nic),
    );
    context.finish(guest)
}

/// Makes a namespace with eth0 in it, and with other devices of given names.
fn enter(guest: &Guest, nic: &Nic, namespace: &str, others: &[&str]) -> Result<()> {
    guest.sh(&format!("ip netns add {namespace}"))?;
    for other in others {
        guest.sh(&format!("ip -n {namespace} link add {other} type dummy"))?;
    }
    guest.sh(&format!(
        "ip link set eth0 netns {namespace} && ip -n {namespace} link set eth0 up && \
         ip -n {namespace} address add {}/24 dev eth0",
        nic.guest_v4()
    ))?;
    Ok(())
}

/// Waits until the VF is the slave of eth0 in a namespace, under one of some names, and is the data
/// path.
fn together(guest: &Guest, nic: &Nic, namespace: &str, names: &[&str]) -> Result<()> {
    let names = names.join("|");
    let is_slave =
        format!("ip -n {namespace} link show master eth0 | grep -qE ' ({names}): .*SLAVE.*,UP'");
    guest.wait_until(&is_slave, MOVING).map_err(|error| {
        let links = guest.sh(&format!(
            "ip -n {namespace} link; ip link; dmesg | tail -n 20"
        ));
        format!("{error}\n{}", links.unwrap_or_default())
    })?;
    let switched = format!(
        "dmesg -t | grep 'eth0.*Data path switched' | tail -n 1 | grep -qE 'to VF: ({names})$'"
    );
    guest.wait_until(&switched, MOVING)?;
    let ping = format!(
        "ip netns exec {namespace} ping -q -c 3 -i 0.1 -W 5 {}",
        nic.peer_v4()
    );
    let text = guest.sh(&ping)?;
    ensure(text.contains(" 0% packet loss"), || text.clone())
}

/// Deletes the namespace, and waits until both devices are back and work.
fn leave(guest: &Guest, nic: &Nic, namespace: &str) -> Result<()> {
    guest.sh(&format!("ip netns del {namespace}"))?;
    guest.wait_until("ip link show eth0", MOVING)?;
    guest.sh(&format!(
        "ip link set eth0 up && ip address add {}/24 dev eth0",
        nic.guest_v4()
    ))?;
    let is_slave = "ip link show master eth0 | grep -q 'SLAVE.*,UP'";
    guest.wait_until(is_slave, MOVING).map_err(|error| {
        let links = guest.sh("ip link; dmesg | tail -n 20");
        format!("{error}\n{}", links.unwrap_or_default())
    })?;
    let ping = format!("ping -q -c 1 -W 1 {}", nic.peer_v4());
    guest.wait_until(&ping, MOVING)
}

/// Whether a line is in the log so many times.
fn logged(guest: &Guest, line: &str, count: usize) -> Result<()> {
    let lines = guest.dmesg(line)?;
    ensure(lines.len() == count, || {
        format!("{} times: {line}\n{}", lines.len(), lines.join("\n"))
    })
}

/// Whether VFs that come are marked as slaves when they become visible, which is when the uevent is
/// sent.
fn shown(guest: &Guest, act: impl FnOnce() -> Result<()>) -> Result<Vec<bool>> {
    let trace = "/sys/kernel/tracing";
    guest.sh(&format!(
        "echo 'p:shown netdev_register_kobject name=ndev->name:string flags=ndev->flags:x32' \
         >{trace}/kprobe_events && echo >{trace}/trace && echo 1 >{trace}/events/kprobes/shown/enable"
    ))?;
    let done = act();
    let lines = guest.sh(&format!(
        "grep shown: {trace}/trace; echo 0 >{trace}/events/kprobes/shown/enable; \
         echo >{trace}/kprobe_events"
    ))?;
    done?;
    // Not those of eth0 itself. IFF_SLAVE is 0x800.
    let vfs = lines.lines().filter(|line| !line.contains("\"eth0\""));
    vfs.map(|line| {
        let flags = line.split("flags=0x").nth(1);
        let flags = flags.and_then(|flags| u32::from_str_radix(flags.trim(), 16).ok());
        let flags = flags.ok_or_else(|| line.to_owned())?;
        Ok(flags & 0x800 != 0)
    })
    .collect()
}

/// Begins to note what user space hears of network devices.
fn watch(guest: &Guest) -> Result<()> {
    guest
        .sh(
            "ip monitor link >/run/links 2>&1 & echo $! >/run/watchers; \
             udevadm monitor --kernel --subsystem-match=net >/run/events 2>&1 & \
             echo $! >>/run/watchers; sleep 1",
        )
        .map(drop)
}

/// Whether the VF is marked before its first event, in all ways in which user space hears of it.
fn arrivals(guest: &Guest, nic: &Nic) -> Result<()> {
    watch(guest)?;
    let marked = shown(guest, || {
        for _ in 0..ARRIVALS {
            guest.host.add_vf(nic)?;
            bonded(guest, nic)?;
            guest.host.remove_vf(nic)?;
        }
        Ok(())
    })?;
    guest.sh("kill $(cat /run/watchers)")?;
    ensure(marked == [true; ARRIVALS], || {
        format!("marked when shown: {marked:?}")
    })?;

    let links = guest.sh("grep -E '^[0-9]+: (eth1|enP)' /run/links")?;
    let without = links.lines().find(|line| !line.contains("SLAVE"));
    ensure(without.is_none() && !links.is_empty(), || {
        format!("a message without SLAVE:\n{links}")
    })?;
    let events = guest.sh("cat /run/events")?;
    let named = format!("/net/{} (net)", nic.vf_name());
    let count = |source: &str, action: &str| {
        let lines = events.lines().filter(|line| line.starts_with(source));
        lines
            .filter(|line| line.contains(action) && line.ends_with(&named))
            .count()
    };
    // udev tells of its new name, once each time.
    ensure(count("KERNEL", " move ") == ARRIVALS, || events.clone())
}

/// Takes hv_netvsc and the VF's driver away.
fn no_drivers(guest: &Guest) -> Result<()> {
    for module in ["hv_netvsc", "mana"] {
        guest.sh_within(&format!("rmmod {module}"), Duration::from_secs(60))?;
    }
    Ok(())
}

/// The VF is there, with a name of its own, when hv_netvsc comes. Nobody could mark it before.
fn driver_first(guest: &Guest, nic: &Nic) -> Result<()> {
    let name = nic.vf_name();
    guest.host.add_vf(nic)?;
    bonded(guest, nic)?;
    no_drivers(guest)?;
    guest.sh("modprobe mana")?;
    guest.wait_until(&format!("[ -e /sys/class/net/{name} ]"), MOVING)?;
    let before = guest.sh(&format!("ip -o link show {name}"))?;
    ensure(!before.contains("SLAVE"), || before.clone())?;
    watch(guest)?;
    guest.sh("modprobe hv_netvsc; ip link set eth0 up")?;
    bonded(guest, nic)?;
    guest.sh("kill $(cat /run/watchers)")?;
    let after = guest.sh(&format!("ip -o link show {name}"))?;
    ensure(
        after.contains("SLAVE") && after.contains("master eth0"),
        || after.clone(),
    )?;
    // From the first message of its new master on it is marked.
    let links = guest.sh(&format!("grep -E '^[0-9]+: {name}' /run/links"))?;
    let unmarked = links
        .lines()
        .find(|line| line.contains("master") && !line.contains("SLAVE"));
    ensure(unmarked.is_none(), || links.clone())?;
    // udev looks at it again, which the stock driver does not ask for.
    let events = guest.sh("cat /run/events")?;
    let told = events
        .lines()
        .any(|line| line.contains(" change ") && line.ends_with(&format!("/net/{name} (net)")));
    let wanted = guest.drivers() == Drivers::Rust;
    ensure(told == wanted, || events.clone())
}

/// Loading the VF's driver loads hv_netvsc first.
fn softdep(guest: &Guest, nic: &Nic) -> Result<()> {
    no_drivers(guest)?;
    let file = load_order(guest)?;
    shown(guest, || {
        guest.sh("modprobe mana")?;
        guest.sh("ip link set eth0 up")?;
        bonded(guest, nic)
    })
    .and_then(|marked| {
        ensure(marked == [true], || {
            format!("marked when shown: {marked:?}")
        })
    })?;
    guest.sh(&format!("rm {file}")).map(drop)
}
