// SPDX-License-Identifier: GPL-2.0
//! What the driver of a function asks for, interrupts and configuration blocks, and a host that answers wrongly;
//! functions and buses that go while a driver probes.
//!
//! The driver is `tools/image/modules/pci_test.c`. Each bus has another wrong answer, at the same time.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use lab_agent::client::Running;
use lab_control::{Answer, PciAction, PciRequest};

use super::super::ending::{account_for, account_for_each};
use super::super::faults::released;
use super::super::{ensure, eventually, Context, Result};
use super::{device, sysfs, Lab, BUSES, GONE, SOON, TIMEOUT};

/// Answers that mean the same as usual ones, one that refuses, and one that is too short: for each bus.
const ANSWERS: [Answer; BUSES] = [
    Answer::Long,
    Answer::Slow,
    Answer::Twice,
    Answer::Stray,
    Answer::Refused,
    Answer::Short,
];
/// How many of them are harmless.
const HARMLESS: usize = 4;
/// The same for the message that gives an interrupt back. The first two leave the interrupt in the host.
const UNASKED: [Answer; BUSES] = [
    Answer::Mute,
    Answer::Refused,
    Answer::Short,
    Answer::Long,
    Answer::Twice,
    Answer::Stray,
];
/// What an answer to another transaction gives, and on buses where none comes late.
const ODD: &str = "Invalid transaction ID";
const ODD_HERE: &str = "7a0[2-5]-.* Invalid transaction ID";
/// The same for an answer that comes late.
const LATE: &str = "7a0[01]-.* Invalid transaction ID [0-9a-f]{9}";
/// Blocks are given up at any time.
const UNANSWERED: &str = "failed to (read|write) a configuration block: -110";
/// The file of the driver, which is not loaded before.
const DRIVER: &str = "/root/pci_test.ko";
/// A function of which only configuration blocks are used.
const OTHER: usize = 1;
/// So many buses have it.
const OTHERS: usize = 4;

/// Runs the checks. Before that all buses work, and afterwards none is bound; `before` is what the guest holds of the
/// host then.
pub fn run(
    context: &mut Context<'_>,
    lab: &Lab<'_>,
    before: &BTreeMap<String, u64>,
    rust: bool,
) -> Result<()> {
    let all: Vec<_> = (0..BUSES).collect();
    if rust {
        let some = &all[..OTHERS];
        for &bus in some {
            let function = OTHER as u32;
            lab.pci(bus, PciAction::Add { function })?;
        }
        // The bus's windows of MMIO space are made for the functions that are there when it is probed.
        lab.bind(some, "unbind", SOON, |_| true)?;
        lab.bind(some, "bind", SOON, |_| true)?;
    }
    // Where buses come back no driver is wanted.
    lab.guest.sh(&format!(
        "echo 0 >/sys/bus/pci/drivers_autoprobe && insmod {DRIVER}"
    ))?;
    all.iter().try_for_each(|&bus| lab.driver(bus, 0))?;
    let blocks = match rust {
        true => Some(Unanswered::start(lab)?),
        false => None,
    };
    interrupts(context, lab, rust);
    given_back(context, lab);
    configuration_blocks(context, lab, rust);
    held(context, lab);
    if let Some(blocks) = blocks {
        context.check(
            "blocks that are answered too late or not at all are given up in time",
            || blocks.end(lab),
        );
    }
    context.check(
        "buses whose host was wrong about interrupts leave none",
        || {
            lab.bind(&all, "unbind", SOON, |_| true)?;
            released(lab.guest, before)
        },
    );
    Ok(())
}

/// Interrupts that the host does not make as it should.
fn interrupts(context: &mut Context<'_>, lab: &Lab<'_>, rust: bool) {
    let guest = lab.guest;
    let request = PciRequest::CreateInterrupt;
    // The stock driver has an interrupt made twice, and cannot tell the kernel that it was not made.
    let outcome = |count: u32, error: i32| match rust {
        true if error != 0 => format!("requested=0 error={error}"),
        _ => format!("allocated={count} requested={count} error=0"),
    };
    context.check(
        "interrupts that are refused or cut short are errors, other answers are taken",
        || {
            let said = lab.count(ODD_HERE)?;
            lab.wrong(request, ANSWERS, 4)?;
            let results = lab.drive(|_| Some("vectors msix 2 2 most"))?;
            lab.wrong(request, ANSWERS, 0)?;
            for (bus, result) in results {
                let wanted = outcome(2, if bus < HARMLESS { 0 } else { -71 });
                ensure(result.contains(&wanted), || format!("bus {bus}: {result}"))?;
            }
            explained(lab, &["Request for interrupt failed: ", ODD])?;
            let said = lab.count(ODD_HERE)? - said;
            // Twice and stray, for each interrupt.
            let wanted = if rust { 4 } else { 8 };
            ensure(said == wanted, || format!("'{ODD}' is said {said} times"))?;
            if rust {
                lab.once(&[
                    "Request for interrupt failed: 0xc0000184",
                    "Request for interrupt failed: .* too small",
                ])?;
            }
            lab.drive(|_| Some("free"))?;
            fire(lab)
        },
    );
    context.check("the same for several interrupts at once", || {
        lab.wrong(request, ANSWERS, 1)?;
        let results = lab.drive(|_| Some("vectors msi 4 4 most"))?;
        for (bus, result) in results {
            let wanted = outcome(4, if bus < HARMLESS { 0 } else { -71 });
            ensure(result.contains(&wanted), || format!("bus {bus}: {result}"))?;
        }
        // The stock driver moves what was not made.
        let moved = "hv_irq_retarget_interrupt\\(\\) failed: 0x5";
        let known = ["Request for interrupt failed: ", ODD, moved];
        explained(lab, if rust { &known[..2] } else { &known })?;
        lab.drive(|_| Some("free"))?;
        fire(lab)
    });
    if !rust {
        context.note(
            "the stock hv_pci waits for ever, with interrupts off, for an interrupt: not tried",
        );
        return;
    }
    context.check(
        "an interrupt is waited for 5 s, and given back if it comes then",
        || {
            lab.answer(0, request, Answer::Mute, 1)?;
            lab.answer(1, request, Answer::Late, 1)?;
            let deleted = guest.host.counter("pci1.interrupts.deleted")?;
            let start = Instant::now();
            let results = lab.drive(|bus| (bus < 2).then_some("vectors msix 2 2 most"))?;
            let took = start.elapsed();
            for (bus, result) in results {
                ensure(result.contains(&outcome(2, -110)), || {
                    format!("bus {bus}: {result}")
                })?;
            }
            ensure(took < SOON, || format!("it takes {took:?}"))?;
            lab.drive(|bus| (bus < 2).then_some("free"))?;
            explained(lab, &["Request for interrupt timed out"])?;
            eventually(SOON, "the interrupt is given back", || {
                let now = guest.host.counter("pci1.interrupts.deleted")?;
                Ok(now == deleted + 1 && guest.host.counter("pci1.interrupts.live")? == 0)
            })?;
            let said = lab.count("Request for interrupt timed out")?;
            ensure(said == 2, || format!("it is said {said} times"))?;
            fire(lab)
        },
    );
}

/// Answers to the message that gives an interrupt back, for which the guest asks none.
fn given_back(context: &mut Context<'_>, lab: &Lab<'_>) {
    context.check(
        "answers nobody asked for when an interrupt is given back change nothing",
        || {
            let live = |bus: usize| lab.guest.host.counter(&format!("pci{bus}.interrupts.live"));
            let before = (0..BUSES).map(live).collect::<Result<Vec<_>>>()?;
            lab.wrong(PciRequest::DeleteInterrupt, UNASKED, 2)?;
            lab.drive(|_| Some("vectors msix 2 2, free"))?;
            let mut left = Vec::new();
            eventually(SOON, "others are given back", || {
                let now = (0..BUSES).map(live).collect::<Result<Vec<_>>>()?;
                left = now
                    .iter()
                    .zip(&before)
                    .map(|(now, before)| now - before)
                    .collect();
                Ok(left == [2, 2, 0, 0, 0, 0])
            })
            .map_err(|error| format!("{error}: {left:?}"))?;
            explained(lab, &[ODD])?;
            fire(lab)
        },
    );
}

/// Configuration blocks that the host does not give or take as it should.
fn configuration_blocks(context: &mut Context<'_>, lab: &Lab<'_>, rust: bool) {
    context.check(
        "blocks that are refused or cut short are errors, other answers are taken",
        || {
            let odd = lab.count(ODD_HERE)?;
            lab.wrong(PciRequest::ReadBlock, ANSWERS, 1)?;
            for (bus, result) in lab.drive(|_| Some("read 7 6"))? {
                let wanted = match ANSWERS[bus] {
                    Answer::Refused => "error=-5 bytes=0 data=",
                    // What pads the packet.
                    Answer::Short => "error=0 bytes=4 data=00000000",
                    _ => "error=0 bytes=6 data=070707070707",
                };
                ensure(result == wanted, || format!("bus {bus}: {result}"))?;
            }
            lab.wrong(PciRequest::WriteBlock, ANSWERS, 1)?;
            // The stock driver does not see an answer that is shorter than a status.
            let tried = if rust { BUSES } else { BUSES - 1 };
            lab.answer(
                BUSES - 1,
                PciRequest::WriteBlock,
                Answer::Short,
                u32::from(rust),
            )?;
            for (bus, result) in lab.drive(|bus| (bus < tried).then_some("write 7 01020304"))? {
                let error = if bus < HARMLESS { 0 } else { -5 };
                ensure(result == format!("error={error}"), || {
                    format!("bus {bus}: {result}")
                })?;
            }
            let failed = ["Read Config Block failed: ", "Write Config Block failed: "];
            explained(lab, &[failed[0], failed[1], ODD])?;
            for (line, wanted) in [
                (failed[0], 1),
                (failed[1], tried - HARMLESS),
                (ODD_HERE, odd + 4),
            ] {
                let said = lab.count(line)?;
                ensure(said == wanted, || format!("'{line}' is said {said} times"))?;
            }
            // What was refused was not done.
            for (bus, result) in lab.drive(|_| Some("read 7 4"))? {
                let written = bus < HARMLESS || (bus == BUSES - 1 && rust);
                let data = if written { "01020304" } else { "07070707" };
                ensure(result == format!("error=0 bytes=4 data={data}"), || {
                    format!("bus {bus}: {result}")
                })?;
            }
            Ok(())
        },
    );
}

/// The errors logged since the last time must be these, each at least once.
fn explained(lab: &Lab<'_>, patterns: &[&str]) -> Result<()> {
    account_for_each(lab.guest, patterns, &[UNANSWERED, LATE])
}

/// Has each function's driver request two vectors, which must come.
fn fire(lab: &Lab<'_>) -> Result<()> {
    for (bus, result) in lab.drive(|_| Some("vectors msix 2 2, fire 0 2 3, check, free"))? {
        let all = "vectors=2 sent=6 received=6 wrong=0 lost=0 idle=1";
        ensure(result.ends_with(all), || format!("bus {bus}: {result}"))?;
    }
    Ok(())
}

/// What waits for configuration blocks that come too late or not at all.
struct Unanswered<'a> {
    running: Vec<(usize, &'static str, Running<'a>)>,
}

impl<'a> Unanswered<'a> {
    /// The driver of the other function on each of these buses asks for a block.
    fn start(lab: &Lab<'a>) -> Result<Self> {
        let requests: [_; OTHERS] = [
            (PciRequest::ReadBlock, Answer::VeryLate, "read 7 4"),
            (PciRequest::WriteBlock, Answer::VeryLate, "write 7 01"),
            (PciRequest::ReadBlock, Answer::Mute, "read 7 4"),
            (PciRequest::WriteBlock, Answer::Mute, "write 7 01"),
        ];
        let mut running = Vec::new();
        for (bus, (request, how, command)) in requests.into_iter().enumerate() {
            lab.driver(bus, OTHER)?;
            lab.answer(bus, request, how, 1)?;
            let faults = lab.faults()?;
            let task = lab.guest.start(&told(bus, OTHER, command), TIMEOUT)?;
            running.push((bus, command, task));
            eventually(SOON, "the host is asked", || Ok(lab.faults()? > faults))?;
        }
        Ok(Self { running })
    }

    fn end(self, lab: &Lab<'_>) -> Result<()> {
        let mut asked = Vec::new();
        for (bus, command, task) in self.running {
            let exit = task.wait()?;
            let good = exit.stdout.starts_with("error=-110") && !exit.timed_out;
            ensure(good, || format!("bus {bus}: {exit:?}"))?;
            asked.push((bus, command));
        }
        eventually(SOON, "both late answers come", || {
            explained(lab, &[])?;
            Ok(lab.count(UNANSWERED)? == OTHERS && lab.count(LATE)? == 2)
        })?;
        for (bus, command) in asked {
            let result = lab.guest.sh(&told(bus, OTHER, command))?;
            ensure(result.starts_with("error=0"), || {
                format!("bus {bus}: {result}")
            })?;
        }
        Ok(())
    }
}

/// Drivers whose functions or buses go while they probe.
fn held(context: &mut Context<'_>, lab: &Lab<'_>) {
    let eject = PciAction::Eject { function: 0 };
    let cases = [
        (
            "a function is ejected while its driver probes",
            4,
            false,
            &eject,
        ),
        (
            "a function is ejected while its bus is probed",
            4,
            true,
            &eject,
        ),
        (
            "a bus is rescinded while a function's driver probes",
            5,
            false,
            &PciAction::Rescind,
        ),
        (
            "a bus is rescinded while it is probed",
            5,
            true,
            &PciAction::Rescind,
        ),
    ];
    for (title, bus, whole, action) in cases {
        context.check(title, || gone_in_probe(lab, bus, whole, action));
    }
}

fn gone_in_probe(lab: &Lab<'_>, bus: usize, whole: bool, action: &PciAction) -> Result<()> {
    let guest = lab.guest;
    let function = device(bus, 0);
    let hold = |on: u32| format!("echo {on} >/sys/module/pci_test/parameters/hold");
    let pci = "/sys/bus/pci";
    let probe = match whole {
        true => {
            lab.bind(&[bus], "unbind", SOON, |_| true)?;
            sysfs(bus, "bind")
        }
        false => {
            let driver = format!("{pci}/drivers/pci_test");
            guest.sh(&format!(
                "! [ -e {driver}/{function} ] || echo {function} >{driver}/unbind"
            ))?;
            format!("echo {function} >{driver}/bind")
        }
    };
    guest.sh(&format!(
        "{} && echo {} >{pci}/drivers_autoprobe",
        hold(1),
        u32::from(whole)
    ))?;
    let probing = guest.start(&probe, TIMEOUT)?;
    let probes = "[ $(cat /sys/module/pci_test/parameters/held) = 1 ]";
    guest.wait_until(probes, SOON)?;
    let ending = guest.start(&format!("sleep 1; {}", hold(0)), TIMEOUT)?;
    let start = Instant::now();
    lab.pci(bus, action.clone())?;
    let took = start.elapsed();
    ending.wait()?;
    let exit = probing.wait()?;
    guest.sh(&format!("echo 0 >{pci}/drivers_autoprobe"))?;
    ensure(!exit.timed_out, || format!("{exit:?}"))?;
    // The guest cannot leave before the driver has probed.
    let bounds = Duration::from_millis(500)..GONE;
    ensure(bounds.contains(&took), || format!("it takes {took:?}"))?;
    guest.sh(&format!("! [ -e {pci}/devices/{function} ]"))?;
    for name in ["interrupts.live", "mapped_bars"] {
        let left = guest.host.counter(&format!("pci{bus}.{name}"))?;
        ensure(left == 0, || format!("{name} = {left}"))?;
    }
    let odd = ["Request for interrupt failed", "the device has gone"];
    account_for(guest, &[&odd[..], &[UNANSWERED, LATE]].concat())?;
    lab.pci(
        bus,
        match action {
            PciAction::Eject { function } => PciAction::Add {
                function: *function,
            },
            _ => PciAction::Offer,
        },
    )?;
    lab.present(bus, 0)
}

/// The shell command that tells the driver of a function something, or more separated by commas. Prints the results.
fn told(bus: usize, slot: usize, commands: &str) -> String {
    let folder = format!("/sys/kernel/debug/pci_test/{}", device(bus, slot));
    let commands = commands.replace(", ", "' '");
    format!("for c in '{commands}'; do echo $c >{folder}/do; cat {folder}/result; done")
}

impl Lab<'_> {
    /// Gives a function the driver for tests.
    fn driver(&self, bus: usize, slot: usize) -> Result<()> {
        let function = device(bus, slot);
        let bind = format!("echo {function} >/sys/bus/pci/drivers/pci_test/bind");
        self.guest.sh(&bind).map(drop)
    }

    /// Orders another wrong answer on each bus.
    fn wrong(&self, request: PciRequest, how: [Answer; BUSES], times: u32) -> Result<()> {
        let mut buses = how.into_iter().enumerate();
        buses.try_for_each(|(bus, how)| {
            let once = how == Answer::Slow && times > 1;
            self.answer(bus, request, how, if once { 1 } else { times })
        })
    }

    /// Tells the drivers of first functions something at the same time. Gives their results, by the bus.
    fn drive<'a>(
        &self,
        command: impl Fn(usize) -> Option<&'a str>,
    ) -> Result<Vec<(usize, String)>> {
        let mut script = String::new();
        for bus in 0..BUSES {
            if let Some(command) = command(bus) {
                let told = told(bus, 0, command);
                script += &format!("{{ r=$({{ {told}; }} 2>&1); echo {bus} $r; }} & ");
            }
        }
        let output = self.guest.sh_within(&(script + "wait"), TIMEOUT)?;
        let result = |line: &str| {
            let (bus, result) = line.split_once(' ').unwrap_or((line, ""));
            Ok((bus.parse()?, result.to_owned()))
        };
        output.lines().map(result).collect()
    }
}
