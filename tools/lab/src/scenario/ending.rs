// SPDX-License-Identifier: GPL-2.0
//! What is checked at the end of every boot, and what is kept of a failed one.

use std::fs;
use std::time::Duration;

use regex::Regex;

use super::guest::Guest;
use super::{ensure, eventually, Context, Drivers, Result};

/// What the kernel prints when something is badly wrong. A stuck transmit queue is among the errors.
const ALARMS: &str = "WARNING:|BUG:|BUG |Oops|Call Trace|soft lockup|hard LOCKUP|blocked for more than|rcu.*stall|\
general protection|Unable to handle|UBSAN|KASAN|refcount_t|list_(add|del) corruption|unregister_netdevice: waiting|\
scheduling while atomic|Bad page|double free|kernel panic";

/// Errors (not warnings) of anything that takes part.
const PARTS: &str = "NETDEV WATCHDOG|hv_|hyperv|Hyper-V|mana|eth[0-9]|enP|vmbus|pci";

/// TAINT_OOT_MODULE and TAINT_UNSIGNED_MODULE.
const OWN_MODULES: u64 = (1 << 12) | (1 << 13);

/// The checks that end every boot.
pub fn check(context: &mut Context<'_>, guest: &Guest) {
    context.check(
        "no device is left in the host when the drivers are gone",
        || {
            unload(guest)?;
            no_resources(guest)
        },
    );
    context.check("the kernel's log has no warning, bug or lockup", || {
        let alarms = guest.dmesg(ALARMS)?;
        ensure(alarms.is_empty(), || alarms.join("\n"))
    });
    context.check("no driver has logged an error", || {
        let errors = errors(guest)?;
        ensure(errors.is_empty(), || errors.join("\n"))
    });
    let drivers = guest.drivers();
    context.check("the kernel is tainted by own modules at most", || {
        let taint: u64 = guest.sh("cat /proc/sys/kernel/tainted")?.trim().parse()?;
        // Which is in the guest's image, and is loaded for its function.
        let tests = !guest.dmesg("^pci_test: ")?.is_empty();
        let allowed = match drivers {
            Drivers::C if !tests => 0,
            _ => OWN_MODULES,
        };
        ensure(taint & !allowed == 0, || format!("taint is {taint:#x}"))
    });
    context.check("the host saw no protocol error", || {
        let errors = guest.host.counters()?;
        let mut errors: Vec<_> = errors
            .iter()
            .filter(|(name, &value)| name.ends_with("protocol_errors") && value > 0)
            .map(|(name, value)| format!("{name} = {value}"))
            .collect();
        if errors.is_empty() {
            return Ok(());
        }
        // What the host still has in memory; its file has all.
        let log = guest.host.log_since(0)?.into_iter();
        errors.extend(log.filter(|line| line.contains("PROTOCOL_ERROR")));
        Err(errors.join("\n").into())
    });
}

/// The errors that drivers have logged and that the scenario has not accounted for.
fn errors(guest: &Guest) -> Result<Vec<String>> {
    let command = format!("dmesg -t -l emerg,alert,crit,err | grep -E '{PARTS}' || true");
    let errors = guest.sh(&command)?;
    let new = errors.lines().skip(guest.accounted());
    Ok(new.map(str::to_owned).collect())
}

/// Accounts for the errors logged since the last time, which must all match one of the patterns.
pub fn account_for(guest: &Guest, patterns: &[&str]) -> Result<Vec<String>> {
    let lines = errors(guest)?;
    guest.account(lines.len());
    let known = Regex::new(&patterns.join("|"))?;
    let others: Vec<_> = lines
        .iter()
        .filter(|line| !known.is_match(line))
        .cloned()
        .collect();
    ensure(others.is_empty(), || {
        format!("not expected: {}", others.join("\n"))
    })?;
    Ok(lines)
}

/// The same, where each of the patterns must match at least one; those of `others` need not.
pub fn account_for_each(guest: &Guest, patterns: &[&str], others: &[&str]) -> Result<()> {
    let lines = account_for(guest, &[patterns, others].concat())?;
    for pattern in patterns {
        let regex = Regex::new(pattern)?;
        ensure(lines.iter().any(|line| regex.is_match(line)), || {
            format!("no line with '{pattern}' in\n{}", lines.join("\n"))
        })?;
    }
    Ok(())
}

/// Takes all drivers of devices of the host away.
pub fn unload(guest: &Guest) -> Result<()> {
    unload_pci(guest)?;
    guest.sh("! [ -d /sys/module/hv_netvsc ] || rmmod hv_netvsc")?;
    Ok(())
}

/// Takes the virtual PCI driver away; the stock one is built in, so its devices are unbound.
pub fn unload_pci(guest: &Guest) -> Result<()> {
    match guest.drivers() {
        Drivers::Rust => guest.sh("! [ -d /sys/module/hv_pci ] || rmmod hv_pci")?,
        Drivers::C => guest.sh(
            "cd /sys/bus/vmbus/drivers/hv_pci && for d in *-*-*; do [ -e $d ] && echo $d >unbind; done; true",
        )?,
    };
    Ok(())
}

/// Checks that the guest holds nothing of the host's devices any more.
pub fn no_resources(guest: &Guest) -> Result<()> {
    let mut last = String::new();
    let gone = eventually(Duration::from_secs(10), "nothing is left", || {
        let counters = guest.host.counters()?;
        let left: Vec<_> = counters
            .iter()
            .filter(|(name, &value)| {
                value > 0
                    && (name.as_str() == "vmbus.gpadls"
                        || name.as_str() == "vmbus.channels.open"
                        || name.ends_with("interrupts.live"))
            })
            .map(|(name, value)| format!("{name} = {value}"))
            .collect();
        last = left.join("\n");
        Ok(left.is_empty())
    });
    gone.map_err(|_| last.into())
}

/// Keeps what helps to understand a failure.
pub fn save(guest: &Guest) {
    let save = |name: &str, command: &str| {
        let text = match guest.exit(command, Duration::from_secs(30)) {
            Ok(exit) => exit.stdout + &exit.stderr,
            Err(error) => format!("{error}\n"),
        };
        // The other files may still be written.
        let _ = fs::write(guest.folder.join(name), text);
    };
    save("dmesg.txt", "dmesg");
    save(
        "state.txt",
        "ip -d address; lspci -D; lsmod; for i in /sys/class/net/e*; do ethtool -S ${i##*/}; done; cat /proc/interrupts",
    );
    if let Ok(counters) = guest.host.counters() {
        let lines: Vec<_> = counters
            .iter()
            .map(|(name, value)| format!("{name} = {value}"))
            .collect();
        let _ = fs::write(guest.folder.join("counters.txt"), lines.join("\n"));
    }
}
