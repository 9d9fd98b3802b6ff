// SPDX-License-Identifier: GPL-2.0
//! Virtual PCI buses whose host answers wrongly or not at all, says what nobody can understand, and
//! takes functions and buses away at the worst moments.

mod requests;

use std::time::{Duration, Instant};

use hyperv_wire::vpci::{
    bus_relations_size, write_bus_relations, Function, MessageType, ProtocolVersion, SlotNumber,
};
use lab_control::{Answer, PciAction, PciRequest};

use super::faults::{account, account_optional, held, released};
use super::guest::{Boot, Guest, COMMAND};
use super::{ensure, eventually, hex, Context, Drivers, Result};

/// Buses, each with a function and room for another.
const BUSES: usize = 6;
/// What a bus may take to be probed or removed by a host that answers.
const SOON: Duration = Duration::from_secs(20);
/// After this the driver gives up when it waits for an answer, and something for a slow machine.
const TIMEOUT: Duration = Duration::from_secs(30 + 10);
/// What a driver may take to notice that its bus is gone.
const GONE: Duration = Duration::from_secs(5);
/// What timeout(1) ends with.
const TIMED_OUT: &str = "124";

/// What is asked when a bus is probed. The requirements, which another thread asks for, come last.
const PROBE: [PciRequest; 5] = [
    PciRequest::Version,
    PciRequest::Relations,
    PciRequest::D0Entry,
    PciRequest::Assigned,
    PciRequest::Requirements,
];
/// Odd answers that mean the same as usual ones.
const HARMLESS: [Answer; 4] = [Answer::Long, Answer::Slow, Answer::Twice, Answer::Stray];
/// What is refused: how often, whether the bus works nevertheless, and the driver's word on it.
const REFUSED: [(PciRequest, u32, bool, &str); 4] = [
    (
        PciRequest::Version,
        1,
        false,
        "failed version request: 0x[0-9a-f]+",
    ),
    // The function has no BARs then.
    (
        PciRequest::Requirements,
        1,
        true,
        "query resource requirements failed: (c0000184|ffffffff)",
    ),
    (
        PciRequest::D0Entry,
        2,
        false,
        "failed D0 Entry with status c0000184",
    ),
    (
        PciRequest::Assigned,
        1,
        false,
        "resource allocated returned 0xc0000184",
    ),
];

pub fn run(context: &mut Context<'_>) -> Result<()> {
    let rust = context.drivers == Drivers::Rust;
    let buses = (0..BUSES).map(|bus| {
        let function = "bar0=64K,msi=4,msix=2";
        format!(
            "bus={},{function},slot=0+{function},slot=1,add=later",
            guid(bus)
        )
    });
    let guest = context.boot(&Boot {
        cpus: 2,
        pci: buses.collect(),
        // It does not take functions without BARs.
        append: "lab.without=pci_test".to_owned(),
        ..Boot::new(Vec::new())
    })?;
    let lab = Lab { guest: &guest };
    let all: Vec<_> = (0..BUSES).collect();
    context.check("six buses are there", || {
        all.iter().try_for_each(|&bus| lab.present(bus, 0))
    });
    unbind(context, &lab, &all);
    let before = held(&guest)?;

    context.check(
        "answers that are long, slow, given twice, or follow one to nothing, are taken",
        || {
            for (bus, how) in HARMLESS.into_iter().enumerate() {
                for request in PROBE.into_iter().chain([PciRequest::D0Exit]) {
                    lab.answer(bus, request, how, 1)?;
                }
            }
            let some = &all[..HARMLESS.len()];
            lab.bind(some, "bind", SOON, |_| true)?;
            some.iter().try_for_each(|&bus| lab.present(bus, 0))?;
            lab.bind(some, "unbind", SOON, |_| true)?;
            account(&guest, &["Invalid transaction ID"])?;
            released(&guest, &before)
        },
    );
    context.check("what is refused is said once, and nothing is left", || {
        for (bus, (request, times, ..)) in REFUSED.into_iter().enumerate() {
            lab.answer(bus, request, Answer::Refused, times)?;
        }
        lab.bind(&all[..REFUSED.len()], "bind", SOON, |bus| REFUSED[bus].2)?;
        let mut lines = REFUSED.map(|(.., line)| line).to_vec();
        lines.push("Retrying D0 Entry");
        account(&guest, &lines)?;
        lab.once(&lines)?;
        // A function without BARs is there nevertheless.
        lab.present(1, 0)?;
        lab.bind(&[1], "unbind", SOON, |_| true)?;
        released(&guest, &before)
    });
    if rust {
        context.check("answers that are too short are refused at once", || {
            let requests = [
                PciRequest::Version,
                PciRequest::D0Entry,
                PciRequest::Assigned,
            ];
            for (bus, request) in requests.into_iter().enumerate() {
                lab.answer(bus, request, Answer::Short, 1)?;
            }
            lab.answer(3, PciRequest::Requirements, Answer::Short, 1)?;
            lab.bind(&all[..4], "bind", SOON, |bus| bus == 3)?;
            lab.bind(&[3], "unbind", SOON, |_| true)?;
            account(
                &guest,
                &[
                    "version request: completion too small",
                    "D0 entry: completion too small",
                    "assigned resources: completion too small",
                    "query resource requirements failed: .* too small",
                ],
            )?;
            released(&guest, &before)
        });
    }
    let free = context.check(
        "a bus that is rescinded at each step is let go at once",
        || {
            rescinded(&lab, &all)?;
            let lines = [
                "failed to request version: -19",
                "couldn't record a child device",
            ];
            account(&guest, &lines)?;
            released(&guest, &before)
        },
    );
    if !free {
        return Err("there are buses whose driver does not let them go".into());
    }
    context.check("offered again, all work", || {
        for &bus in &all[..PROBE.len()] {
            lab.pci(bus, PciAction::Offer)?;
        }
        all[..PROBE.len()]
            .iter()
            .try_for_each(|&bus| lab.present(bus, 0))?;
        lab.bind(&all[PROBE.len()..], "bind", SOON, |_| true)
    });
    late(context, &lab, &all, rust);
    nonsense(context, &lab);
    storms(context, &lab);
    requests::run(context, &lab, &before, rust)?;
    context.finish(guest)
}

/// Takes each bus away while its driver waits for the answer to another question.
fn rescinded(lab: &Lab<'_>, all: &[usize]) -> Result<()> {
    let guest = lab.guest;
    let happened = lab.faults()?;
    let warned = lab.count("The device is gone")?;
    let mut waiting = Vec::new();
    let all_wait = |count: usize| {
        eventually(SOON, "all wait for an answer", || {
            Ok(lab.faults()? == happened + count as u64)
        })
    };
    for (bus, request) in PROBE.into_iter().enumerate() {
        if request == PciRequest::Requirements {
            // The stock driver frees a work item when it begins. Another bus's, which gets the
            // memory, would wait for this one.
            all_wait(bus)?;
        }
        lab.answer(bus, request, Answer::Mute, 1)?;
        waiting.push(guest.start(&sysfs(bus, "bind"), TIMEOUT)?);
    }
    all_wait(PROBE.len())?;
    // Somebody wants to unbind one that waits for D0.
    waiting.push(guest.start(&sysfs(2, "unbind"), TIMEOUT)?);
    for &bus in &all[..PROBE.len()] {
        let start = Instant::now();
        lab.pci(bus, PciAction::Rescind)?;
        let took = start.elapsed();
        ensure(took < GONE, || format!("bus {bus}: {took:?}"))?;
    }
    for (bus, running) in waiting.into_iter().enumerate() {
        let exit = running.wait()?;
        let failed = exit.code != 0 || bus >= PROBE.len();
        ensure(failed && !exit.timed_out, || format!("bus {bus}: {exit:?}"))?;
    }
    let warned = lab.count("The device is gone")? - warned;
    // The stock driver says it of the first bus only.
    let wanted = match guest.drivers() {
        Drivers::C => 1,
        Drivers::Rust => PROBE.len(),
    };
    ensure(warned == wanted, || {
        format!("it is said {warned} times that a device is gone")
    })
}

/// No answers, and answers that come when nobody waits any more.
fn late(context: &mut Context<'_>, lab: &Lab<'_>, all: &[usize], rust: bool) {
    let guest = lab.guest;
    let some = &all[..PROBE.len()];
    context.check(
        "a bus whose D0 exit is not answered is left after 10 s",
        || {
            lab.answer(0, PciRequest::D0Exit, Answer::Mute, 1)?;
            lab.answer(1, PciRequest::D0Exit, Answer::Refused, 1)?;
            lab.bind(some, "unbind", SOON, |_| true)?;
            account_optional(guest, &["D0 exit failed: -110"])
        },
    );
    if rust {
        context.check("without an answer each probe fails in time", || {
            for (bus, request) in PROBE.into_iter().enumerate() {
                lab.answer(bus, request, Answer::Mute, 1)?;
            }
            // This one has its function; another's BARs come too late.
            let last = BUSES - 1;
            let odd = lab.count("Invalid transaction ID")?;
            lab.answer(last, PciRequest::Requirements, Answer::VeryLate, 1)?;
            lab.pci(last, PciAction::Add { function: 1 })?;
            lab.bind(some, "bind", TIMEOUT, |_| false)?;
            let lines = [
                "failed to request version: -110",
                "failed to send bus relations: -110",
                "failed to answer D0 Entry: -110",
                "failed to take assigned resources: -110",
                "failed to tell resource requirements: -110",
                "couldn't record a child device",
            ];
            account(guest, &lines)?;
            lab.present(last, 0)?;
            eventually(SOON, "the late answer comes", || {
                Ok(lab.count("Invalid transaction ID")? > odd)
            })?;
            account(guest, &["Invalid transaction ID"])?;
            lab.pci(last, PciAction::Pull { function: 1 })?;
            lab.pci(last, PciAction::Add { function: 1 })?;
            lab.present(last, 1)?;
            lab.pci(last, PciAction::Eject { function: 1 })
        });
    } else {
        context.note(
            "the stock hv_pci waits for ever for answers that do not come or are too short: not \
             tried with it",
        );
    }
    context.check("bound again, all work", || {
        lab.bind(some, "bind", SOON, |_| true)?;
        all.iter().try_for_each(|&bus| lab.present(bus, 0))
    });
}

/// Messages that make no sense.
fn nonsense(context: &mut Context<'_>, lab: &Lab<'_>) {
    let bus = 5;
    let message = |message_type: MessageType, rest: &[u32]| {
        let words = [message_type.0].into_iter().chain(rest.iter().copied());
        let bytes: Vec<_> = words.flat_map(u32::to_le_bytes).collect();
        hex(&bytes)
    };
    let slot = SlotNumber::new(9, 0).raw();
    context.check("messages that make no sense change nothing", || {
        let messages = vec![
            String::new(),
            message(MessageType(0), &[]),
            message(MessageType(0x4249_1234), &[1, 2, 3]),
            // Lists that end too soon.
            message(MessageType::BUS_RELATIONS, &[3]),
            message(MessageType::BUS_RELATIONS2, &[3]),
            message(MessageType::BUS_RELATIONS2, &[u32::MAX, 1, 2, 3]),
            // Of a function that is not there.
            message(MessageType::EJECT, &[slot]),
            message(MessageType::INVALIDATE_BLOCK, &[0]),
            message(MessageType::INVALIDATE_BLOCK, &[slot, 1, 0]),
        ];
        lab.send(bus, messages, None, 5)?;
        for completion in [0, 1, 64, 65, 1 << 32, (1 << 32) + 1, u64::MAX] {
            lab.send(
                bus,
                vec!["00000000".into(), String::new()],
                Some(completion),
                2,
            )?;
        }
        lab.works(bus)?;
        let lines = ["relations.* too small", "invalidate message too small"];
        account(
            lab.guest,
            &[&lines[..], &["Invalid transaction ID"]].concat(),
        )
        .or_else(|_| account_optional(lab.guest, &["message type too small"]))?;
        let unknown = lab.count("Unimplemented protocol message")?;
        ensure(unknown == 10, || {
            format!("{unknown} messages are said to be unknown")
        })
    });
}

/// Many bus relations, and functions that go while others look.
fn storms(context: &mut Context<'_>, lab: &Lab<'_>) {
    let guest = lab.guest;
    let bus = 4;
    let function = |device: u8, serial: u32| Function {
        vendor: 0x1414,
        device: 0xfe57,
        slot: SlotNumber::new(device, 0),
        serial,
        ..Function::default()
    };
    let there = function(0, 1000 + 100 * bus as u32);
    let list = |functions: &[Function]| {
        let version = ProtocolVersion::V1_4;
        let mut bytes = vec![0; bus_relations_size(version, functions.len())];
        // The buffer has the size.
        let _ = write_bus_relations(version, functions, &mut bytes);
        hex(&bytes)
    };
    let known = [
        "query resource requirements failed: (c000000e|ffffffff)",
        "new function in slot",
        "resource allocated returned 0xc000000e",
        "two functions in slot",
        // The kernel's word on functions that are on a list only, or were pulled.
        "unknown header type 7f, ignoring device",
        "buffer not found in pci_save_pcie_state",
    ];
    context.check("1,000 bus relations, doubled and of unknown slots", || {
        let messages = vec![
            list(&[there, there]),
            list(&[there, function(9, 9)]),
            list(&[function(9, 10), there, function(9, 11)]),
            list(&[there]),
        ];
        lab.send(bus, messages, None, 250)?;
        lab.works(bus)?;
        account_optional(guest, &known)
    });
    context.check("1,000 bus relations, each other one empty", || {
        lab.send(bus, vec![list(&[]), list(&[there])], None, 500)?;
        lab.works(bus)
    });
    context.check("functions are ejected while others are looked for", || {
        let stop = "/tmp/enough";
        let rescan =
            format!("rm -f {stop}; until [ -e {stop} ]; do echo 1 >/sys/bus/pci/rescan; done");
        let running = guest.start(&rescan, TIMEOUT)?;
        let outcome = (0..8).try_for_each(|_| {
            lab.pci(bus, PciAction::Add { function: 1 })?;
            lab.present(bus, 1)?;
            let start = Instant::now();
            lab.pci(bus, PciAction::Eject { function: 1 })?;
            let took = start.elapsed();
            ensure(took < GONE, || format!("an eject takes {took:?}"))
        });
        guest.sh(&format!("touch {stop}"))?;
        running.wait()?;
        outcome?;
        lab.works(bus)
    });
    context.check("a function that was pulled reads as all ones at once", || {
        lab.pci(bus, PciAction::Add { function: 1 })?;
        lab.present(bus, 1)?;
        let config = format!("/sys/bus/pci/devices/{}/config", device(bus, 1));
        guest.sh(&format!(
            "rm -f /tmp/go /tmp/status; \
             (exec 3<{config}; touch /tmp/open; until [ -e /tmp/go ]; do sleep 0.1; done; \
             timeout 2 head -c 64 <&3 >/tmp/read; echo $? >/tmp/status) </dev/null >/dev/null 2>&1 & \
             until [ -e /tmp/open ]; do sleep 0.1; done"
        ))?;
        lab.pci(bus, PciAction::Pull { function: 1 })?;
        guest.sh("touch /tmp/go")?;
        guest.wait_until("[ -s /tmp/status ]", SOON)?;
        let status = guest.sh("cat /tmp/status")?;
        ensure(status.trim() != TIMED_OUT, || "it takes long".into())?;
        let read = guest.sh("od -An -v -tx1 /tmp/read")?;
        // Or nothing, where the kernel does not know it any more.
        ensure(read.split_whitespace().all(|byte| byte == "ff"), || read.clone())?;
        account_optional(guest, &known)?;
        lab.works(bus)
    });
}

fn unbind(context: &mut Context<'_>, lab: &Lab<'_>, buses: &[usize]) {
    context.check("all are unbound", || {
        lab.bind(buses, "unbind", SOON, |_| true)
    });
}

/// The instance GUID of a bus.
fn guid(bus: usize) -> String {
    format!("e9ac9b28-{:04x}-4466-9ae3-4b849c3ee03b", 0x7a00 + bus)
}

/// A function of a bus, as the guest names it.
fn device(bus: usize, slot: usize) -> String {
    format!("{:04x}:00:{slot:02x}.0", 0x7a00 + bus)
}

/// The shell command that binds or unbinds a bus.
fn sysfs(bus: usize, what: &str) -> String {
    format!("echo {} >/sys/bus/vmbus/drivers/hv_pci/{what}", guid(bus))
}

/// The guest and its buses.
struct Lab<'a> {
    guest: &'a Guest,
}

impl Lab<'_> {
    fn pci(&self, bus: usize, action: PciAction) -> Result<()> {
        self.guest.host.pci(bus, action)
    }

    /// Has a request answered in another way the next times.
    fn answer(&self, bus: usize, request: PciRequest, how: Answer, times: u32) -> Result<()> {
        let action = PciAction::Answer {
            request,
            how,
            times,
        };
        self.pci(bus, action)
    }

    fn send(
        &self,
        bus: usize,
        messages: Vec<String>,
        completion: Option<u64>,
        times: u32,
    ) -> Result<()> {
        let action = PciAction::Send {
            messages,
            completion,
            times,
        };
        self.pci(bus, action)
    }

    /// Waits until the guest has found a function.
    fn present(&self, bus: usize, slot: usize) -> Result<()> {
        let condition = format!(
            "grep -qi 0x1414 /sys/bus/pci/devices/{}/vendor",
            device(bus, slot)
        );
        self.guest.wait_until(&condition, SOON)
    }

    /// Binds or unbinds buses at the same time. Says of which this must succeed.
    fn bind(
        &self,
        buses: &[usize],
        what: &str,
        limit: Duration,
        succeeds: impl Fn(usize) -> bool,
    ) -> Result<()> {
        let commands = buses.iter().map(|&bus| {
            let command = sysfs(bus, what);
            format!("({{ {command}; }} 2>/dev/null; echo {bus} $?) & ")
        });
        let command = commands.collect::<String>() + "wait";
        let start = Instant::now();
        let output = self.guest.sh_within(&command, limit + COMMAND)?;
        let took = start.elapsed();
        for &bus in buses {
            let code = |line: &str| line.strip_prefix(&format!("{bus} "))?.parse::<u32>().ok();
            let code = output.lines().find_map(code);
            ensure(
                code.is_some_and(|code| (code == 0) == succeeds(bus)),
                || format!("{what} of bus {bus}: exit code {code:?}"),
            )?;
        }
        ensure(took < limit, || format!("{what} takes {took:?}"))
    }

    /// Requests that have met a fault.
    fn faults(&self) -> Result<u64> {
        let counters = self.guest.host.counters()?;
        let faults = counters
            .iter()
            .filter(|(name, _)| name.ends_with(".faults"));
        Ok(faults.map(|(_, count)| count).sum())
    }

    /// How many lines of the kernel's log match.
    fn count(&self, pattern: &str) -> Result<usize> {
        Ok(self.guest.dmesg(&format!("hv_pci .*{pattern}"))?.len())
    }

    /// Each of the lines is in the kernel's log once.
    fn once(&self, lines: &[&str]) -> Result<()> {
        lines.iter().try_for_each(|line| {
            let count = self.count(line)?;
            ensure(count == 1, || format!("'{line}' is said {count} times"))
        })
    }

    /// The function of a bus is there, alone, and the bus can be removed and comes back.
    fn works(&self, bus: usize) -> Result<()> {
        self.present(bus, 0)?;
        self.bind(&[bus], "unbind", SOON, |_| true)?;
        self.bind(&[bus], "bind", SOON, |_| true)?;
        self.present(bus, 0)?;
        let functions = self.guest.sh(&format!(
            "cd /sys/bus/pci/devices && ls -d {:04x}:*",
            0x7a00 + bus
        ))?;
        ensure(functions.trim() == device(bus, 0), || functions.clone())
    }
}
