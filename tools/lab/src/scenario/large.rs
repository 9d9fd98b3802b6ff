// SPDX-License-Identifier: GPL-2.0
//! 64 buses, some of which ask for the same PCI domain or that of firmware's bus, and 66 processors on two NUMA nodes. Configuration space is
//! accessed by hypercalls.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use lab_control::PciAction;
use regex::Regex;

use super::functions::{pinned, Function};
use super::guest::{Boot, Guest};
use super::{ensure, eventually, Context, Drivers, Result};

/// Buses.
const BUSES: usize = 64;
/// Segment of the PCI bus that firmware describes.
const FIRMWARE: u16 = 0x7d00;
/// Processors; a mask has 64 bits.
const CPUS: u32 = 66;
/// The bus whose function has as many vectors as MSI-X knows.
const MANY: usize = 43;
/// Processors for them, with those beyond the 64th; each has nearly 200 vectors.
const RUNNING: u32 = 10;
/// What it may take until all buses are there.
const ALL: Duration = Duration::from_secs(120);

/// What a bus asks for, besides that.
struct Bus {
    domain: u16,
    /// First part of the GUID, which makes it unique.
    number: usize,
    /// Newest protocol version.
    version: &'static str,
    /// NUMA node of the function, and where the guest has to have it.
    node: Option<(u16, u16)>,
}

impl Bus {
    fn instance(&self) -> String {
        let Self { number, domain, .. } = self;
        format!("{number:08x}-{domain:04x}-4466-9ae3-4b849c3ee03b")
    }

    fn spec(&self) -> String {
        let node = self
            .node
            .map_or(String::new(), |(node, _)| format!(",node={node}"));
        let vectors = if self.number == MANY { 2048 } else { 2 };
        format!(
            "bus={},version={},kind=test,msix={vectors}{node}",
            self.instance(),
            self.version
        )
    }
}

/// The buses. Some want a number that others want, or one that is not to be had.
fn buses(drivers: Drivers) -> Vec<Bus> {
    let domain = |number: usize| match number {
        // Not to be had.
        10 | 11 => 0,
        // The same, and those that they get instead.
        20..=23 => 0x7c00,
        24 => 0x7c01,
        25 => 0x7c02,
        // The last there is, twice: the stock driver has none for the second.
        30 => 0xffff,
        31 if drivers == Drivers::Rust => 0xffff,
        // That of a bus which is there already: the stock driver fails.
        32 if drivers == Drivers::Rust => FIRMWARE,
        _ => 0x7b00 + number as u16,
    };
    (0..BUSES)
        .map(|number| Bus {
            domain: domain(number),
            number,
            version: ["1.1", "1.2", "1.3", "1.4"][number % 4],
            node: match number {
                // Versions before 1.3 do not tell.
                4 | 5 => Some((1, 0)),
                2 | 3 => Some((1, 1)),
                6 => Some((0, 0)),
                // A node that the guest does not have.
                7 => Some((77, 0)),
                _ => None,
            },
        })
        .collect()
}

pub fn run(context: &mut Context<'_>) -> Result<()> {
    let drivers = context.drivers;
    let buses = buses(drivers);
    let guest = context.boot(&Boot {
        pci: buses.iter().map(Bus::spec).collect(),
        cpus: CPUS,
        memory: 2048,
        nodes: 2,
        mmio_hypercalls: true,
        pci_segment: Some(FIRMWARE),
        // Where the host is emulated, to start all would take minutes.
        append: "maxcpus=2".to_owned(),
        ..Boot::new(Vec::new())
    })?;
    context.check("64 buses, each with a domain of its own", || {
        guest.wait_until(
            &format!("[ $(ls /sys/bus/pci/devices | wc -l) -eq {BUSES} ]"),
            ALL,
        )?;
        let domains = domains(&guest)?;
        let different: BTreeSet<_> = domains.values().collect();
        ensure(domains.len() == BUSES && different.len() == BUSES, || {
            format!("{domains:x?}")
        })
    });
    context.check("firmware's bus is there, too", || {
        guest
            .sh(&format!("ls -d /sys/devices/pci{FIRMWARE:04x}:00"))
            .map(drop)
    });
    context.check("who got another domain than it wanted says which", || {
        said(&guest, &buses)
    });
    context.check("a bus that goes and comes has the same domain", || {
        let before = domains(&guest)?;
        for bus in [20, 63, 0] {
            guest.host.pci(bus, PciAction::Remove)?;
        }
        for bus in [0, 20, 63] {
            guest.host.pci(bus, PciAction::Offer)?;
        }
        guest.wait_until(
            &format!("[ $(ls /sys/bus/pci/devices | wc -l) -eq {BUSES} ]"),
            ALL,
        )?;
        let after = domains(&guest)?;
        ensure(before == after, || format!("{before:x?} then {after:x?}"))
    });
    context.check(
        "configuration space is read and written by hypercalls",
        || by_hypercall(&guest),
    );
    context.check("interrupts reach processors beyond the 64th", || {
        for cpu in [63, 65] {
            guest.sh(&format!("echo 1 >/sys/devices/system/cpu/cpu{cpu}/online"))?;
        }
        for bus in &buses[..4] {
            let function = Function {
                guest: &guest,
                domain: bus.domain,
                number: 0,
            };
            function.expect("vectors msix 2 2", "allocated=2 requested=2 error=0")?;
            // With protocol 1.1 the stock driver names another processor.
            let cpu = match (bus.version, drivers) {
                ("1.1", Drivers::C) => 63,
                _ => 65,
            };
            pinned(&function, cpu, 2)
                .map_err(|error| format!("protocol {}, CPU {cpu}: {error}", bus.version))?;
        }
        Ok(())
    });
    context.check("functions are near the memory that the host says", || {
        let text = guest.sh("cd /sys/bus/vmbus/devices; for d in */pci*; do \
             echo ${d%%/*} $(cat $d/*:00.0/numa_node); done")?;
        let nodes: BTreeMap<_, _> = text.lines().filter_map(|l| l.split_once(' ')).collect();
        for bus in &buses {
            let wanted = bus.node.map_or(0, |(_, node)| node).to_string();
            let node = nodes.get(bus.instance().as_str());
            ensure(node == Some(&wanted.as_str()), || {
                format!("{} is on node {node:?}, not {wanted}", bus.instance())
            })?;
        }
        Ok(())
    });
    context.check("2048 vectors of MSI-X, and each fires", || {
        let online = format!(
            "for n in $(seq 2 {}); do echo 1 >/sys/devices/system/cpu/cpu$n/online; done",
            RUNNING - 1
        );
        guest.sh_within(&online, ALL)?;
        let function = Function {
            guest: &guest,
            domain: buses[MANY].domain,
            number: 0,
        };
        let count = |name: &str| guest.host.counter(&format!("pci{MANY}.interrupts.{name}"));
        let before = count("created")?;
        function.expect(
            "vectors msix 2048 2048",
            "allocated=2048 requested=2048 error=0",
        )?;
        function.command("fire 0 2048 2")?;
        let sent = function.check()?;
        ensure(sent == 2 * 2048, || format!("{sent} were sent"))?;
        function.command("free")?;
        let created = count("created")? - before;
        ensure(created >= 2048, || format!("the host has made {created}"))?;
        eventually(ALL, "all are given back", || Ok(count("live")? == 0))
    });
    context.finish(guest)
}

/// The numbers of a function are the host's, and memory decoding goes off and on.
fn by_hypercall(guest: &Guest) -> Result<()> {
    let accesses = || guest.host.counter("hypercalls.mmio");
    let before = accesses()?;
    let device = "/sys/bus/pci/devices/7b00:00:00.0";
    let text = guest.sh(&format!(
        "od -An -v -tx1 {device}/config | tr -d ' \\n'; echo; c=$(setpci -s 7b00:00:00.0 COMMAND); \
         setpci -s 7b00:00:00.0 COMMAND=0; setpci -s 7b00:00:00.0 COMMAND; \
         setpci -s 7b00:00:00.0 COMMAND=$c; [ $(setpci -s 7b00:00:00.0 COMMAND) = $c ]"
    ))?;
    let (config, command) = text
        .trim()
        .split_once('\n')
        .ok_or("no configuration space")?;
    let host = guest.host.pci_config(0, 0)?;
    ensure(config == host && command == "0000", || {
        format!("COMMAND {command} without decoding; guest:\n{config}\nhost:\n{host}")
    })?;
    let grown = accesses()? - before;
    // What is known from the host's description is not read.
    ensure(grown > 1000, || format!("{grown} accesses by hypercall"))
}

/// Compares what the kernel's log says of domains with what there is.
fn said(guest: &Guest, buses: &[Bus]) -> Result<()> {
    let pattern = Regex::new(
        "^hv_pci ([0-9a-f-]{36}): PCI dom# 0x([0-9a-f]+) has collision, using 0x([0-9a-f]+)$",
    )?;
    let mut lines = BTreeMap::new();
    for line in guest.dmesg("PCI dom# ")? {
        let found = pattern.captures(&line).ok_or_else(|| line.clone())?;
        let number = |group: usize| u16::from_str_radix(&found[group], 16);
        lines.insert(found[1].to_owned(), (number(2)?, number(3)?));
    }
    let domains = domains(guest)?;
    let others: BTreeMap<_, _> = buses
        .iter()
        .filter_map(|bus| {
            let domain = *domains.get(&bus.instance())?;
            (domain != bus.domain).then_some((bus.instance(), (bus.domain, domain)))
        })
        .collect();
    // Of each number that several want, all but one; those who wanted what these got; and who wanted
    // the number of firmware's bus.
    let least = 2 + 3 + 2 + usize::from(guest.drivers() == Drivers::Rust);
    ensure(lines == others && others.len() >= least, || {
        format!("said: {lines:x?}, found: {others:x?}")
    })
}

/// The domain of each bus by instance.
fn domains(guest: &Guest) -> Result<BTreeMap<String, u16>> {
    let text =
        guest.sh("cd /sys/bus/vmbus/devices; for d in */pci*; do echo ${d%%/*} ${d##*/}; done")?;
    text.lines()
        .map(|line| {
            let (instance, domain) = line.split_once(" pci").ok_or(line)?;
            let domain = u16::from_str_radix(domain.split(':').next().unwrap_or_default(), 16)?;
            Ok((instance.to_owned(), domain))
        })
        .collect()
}
