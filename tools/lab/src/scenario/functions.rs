// SPDX-License-Identifier: GPL-2.0
//! What hv_pci has to do for any function: configuration space, BARs, interrupts and configuration blocks.
//!
//! The functions are the lab's own (`tools/pcitest`), driven by a module of the guest's image
//! (`tools/image/modules/pci_test.c`), whose commands these are.

use std::collections::BTreeMap;
use std::time::Duration;

use lab_control::PciAction;
use regex::Regex;

use super::ending::{account_for, unload_pci};
use super::faults::PROBE_FAILED;
use super::guest::{Boot, Guest, Nic};
use super::suspend::contacts;
use super::{ensure, eventually, hex, Context, Drivers, Result};

/// MMIO space above 4 GiB: room for one BAR of 16 GiB and a little more.
const HIGH_MMIO_MIB: u32 = 24 << 10;
/// What a bus may take to appear or to fail.
const APPEAR: Duration = Duration::from_secs(30);
/// What a long command may take.
const LONG: Duration = Duration::from_secs(120);

/// The buses: one for most checks, one that needs more high and one that needs more low MMIO space than there is.
const BUSES: [&str; 3] = [
    "msix=2048,bar1=4K,bar2=16G:64:pref,bar4=1M:64+msi=32,bar1=64K:pref,bar2=8M,bar3=16K:64,bar5=4K",
    "offer=later,bar2=16G:64:pref",
    "offer=later,bar1=512M",
];

/// BARs of the functions of the first bus, in the order of their numbers: size and flags.
const BARS: [&[(u32, u64, &str)]; 2] = [
    &[
        (0, 64 << 10, ""),
        (1, 4 << 10, ""),
        (2, 16 << 30, " 64bit pref"),
        (4, 1 << 20, " 64bit"),
    ],
    &[
        (0, 64 << 10, ""),
        (1, 64 << 10, " pref"),
        (2, 8 << 20, ""),
        (3, 16 << 10, " 64bit"),
        (5, 4 << 10, ""),
    ],
];

/// The capability of MSI; its data follows a 64-bit address.
const MSI: u8 = 5;

/// How often things are done.
struct Measure {
    /// Changes of affinity.
    moves: u32,
    /// Times that all vectors are requested and freed.
    cycles: u32,
    /// Vectors of MSI-X that are asked for at once.
    vectors: u32,
    /// Times that a processor goes offline.
    offline: u32,
}

const SHORT: Measure = Measure {
    moves: 10_000,
    cycles: 5,
    vectors: 448,
    offline: 2,
};

const FULL: Measure = Measure {
    moves: 100_000,
    cycles: 1000,
    vectors: 2048,
    offline: 30,
};

pub fn run(context: &mut Context<'_>) -> Result<()> {
    scenario(context, &SHORT)
}

pub fn run_long(context: &mut Context<'_>) -> Result<()> {
    scenario(context, &FULL)
}

/// A function.
#[derive(Clone, Copy)]
pub struct Function<'a> {
    /// The guest that has it.
    pub guest: &'a Guest,
    /// Its domain there.
    pub domain: u16,
    /// Its device number.
    pub number: u32,
}

impl Function<'_> {
    fn address(&self) -> String {
        format!("{:04x}:00:{:02x}.0", self.domain, self.number)
    }

    fn file(&self, name: &str) -> String {
        format!("/sys/kernel/debug/pci_test/{}/{name}", self.address())
    }

    /// Gives a command to its driver. Gives the result.
    pub fn command(&self, command: &str) -> Result<String> {
        self.command_within(command, LONG)
    }

    fn command_within(&self, command: &str, timeout: Duration) -> Result<String> {
        let (to, result) = (self.file("do"), self.file("result"));
        self.guest
            .sh_within(&format!("echo {command} >{to} && cat {result}"), timeout)
    }

    /// Gives a command, whose result must be this.
    pub fn expect(&self, command: &str, expected: &str) -> Result<()> {
        let result = self.command(command)?;
        ensure(result.trim_end() == expected, || {
            format!("{command}: {}", result.trim_end())
        })
    }

    /// Compares what was sent with what was received. Gives how often that was.
    pub fn check(&self) -> Result<u64> {
        let result = self.command("check")?;
        let values = values(&result);
        let value = |name: &str| values.get(name).copied().unwrap_or(u64::MAX);
        let sent = value("sent");
        let good = sent == value("received")
            && value("wrong") == 0
            && value("lost") == 0
            && value("idle") == 1;
        ensure(good, || result.trim_end().to_owned())?;
        Ok(sent)
    }

    /// Its configuration space, as the guest sees it, but for the data of MSI, which the host chooses.
    fn configuration(&self) -> Result<Vec<u8>> {
        let file = format!("/sys/bus/pci/devices/{}/config", self.address());
        let text = self.guest.sh(&format!("od -An -v -tx1 {file}"))?;
        let bytes = text.split_whitespace();
        let mut bytes = bytes
            .map(|byte| Ok(u8::from_str_radix(byte, 16)?))
            .collect::<Result<Vec<_>>>()?;
        let mut capability = usize::from(bytes[0x34]);
        while capability != 0 {
            if bytes[capability] == MSI {
                bytes[capability + 12..capability + 14].fill(0);
            }
            capability = bytes[capability + 1].into();
        }
        Ok(bytes)
    }

    /// Received interrupts by vector and CPU.
    fn counts(&self) -> Result<Vec<Vec<u64>>> {
        let text = self.guest.sh(&format!("cat {}", self.file("counts")))?;
        let line = |line: &str| {
            let columns = line.split(' ').skip(3);
            columns.map(|word| Ok(word.parse()?)).collect()
        };
        text.lines().map(line).collect()
    }
}

/// The numbers of `NAME=NUMBER ...`.
fn values(text: &str) -> BTreeMap<&str, u64> {
    let pairs = text
        .split_whitespace()
        .filter_map(|word| word.split_once('='));
    pairs
        .filter_map(|(name, value)| Some((name, value.parse().ok()?)))
        .collect()
}

fn scenario(context: &mut Context<'_>, measure: &Measure) -> Result<()> {
    let guest = context.boot(&Boot {
        cpus: 2,
        pci: BUSES.map(str::to_owned).to_vec(),
        high_mmio: Some(HIGH_MMIO_MIB),
        ..Boot::new(vec![Nic::new(0)])
    })?;
    let functions = [0, 1].map(|number| Function {
        guest: &guest,
        domain: 0x7a00,
        number,
    });
    context.check("both functions have their driver", || {
        for function in &functions {
            guest.wait_until(&format!("[ -e {} ]", function.file("do")), APPEAR)?;
        }
        Ok(())
    });
    look(context, &functions);
    interrupts(context, &functions, measure);
    let refused = || guest.host.counter("retarget.refused");
    let before = refused()?;
    let lost = suspended(context, &functions);
    // Those of a processor that goes while the bus is left, and more of the stock driver's, see there.
    let known = refused()? - before;
    blocks(context, &functions[0]);
    exhaustion(context, &functions);
    context.check("windows are given back exactly, twice", || windows(&guest));
    context.check("the host has refused no retarget", || {
        let moved = guest.host.counter("pci0.interrupts.retargeted")?;
        let refused = refused()? - known;
        ensure(moved > 0 && refused == 0, || {
            format!("{moved} interrupts moved, {refused} hypercalls refused")
        })
    });
    context.check("nothing is left of a bus without driver", || {
        unload_pci(&guest)?;
        let left = [
            ("interrupts.live", 0),
            ("interrupts.reclaimed", lost),
            ("mapped_bars", 0),
        ];
        for (name, wanted) in left {
            let value = guest.host.counter(&format!("pci0.{name}"))?;
            ensure(value == wanted, || format!("{name} = {value}"))?;
        }
        Ok(())
    });
    context.finish(guest)
}

/// What the functions show, and their BARs.
fn look(context: &mut Context<'_>, functions: &[Function<'_>]) {
    context.check("configuration space is the host's, byte by byte", || {
        for function in functions {
            let file = format!("/sys/bus/pci/devices/{}/config", function.address());
            let guest = function
                .guest
                .sh(&format!("od -An -v -tx1 {file} | tr -d ' \\n'"))?;
            let host = function.guest.host.pci_config(0, function.number)?;
            let differ = |at: &usize| guest.get(2 * at..2 * at + 2) != host.get(2 * at..2 * at + 2);
            let differences: Vec<_> = (0..4096).filter(differ).collect();
            ensure(host.len() == 8192 && differences.is_empty(), || {
                format!("{}: bytes {differences:x?} differ", function.address())
            })?;
        }
        Ok(())
    });
    context.check("lspci shows what is there", || {
        for (function, bars) in functions.iter().zip(BARS) {
            let text = function
                .guest
                .sh(&format!("lspci -D -vv -s {}", function.address()))?;
            let serial = 1000 + function.number;
            let mut patterns = vec![
                "Microsoft Corporation Device fe57 \\(rev 01\\)".to_owned(),
                format!("Physical Slot: {serial}"),
                "Express \\(v2\\) Endpoint".to_owned(),
                match function.number {
                    0 => "MSI-X: Enable- Count=2048 Masked-",
                    _ => "MSI: Enable- Count=1/32 Maskable- 64bit\\+",
                }
                .to_owned(),
            ];
            for (number, size, flags) in bars {
                let wide = if flags.contains("64") { 64 } else { 32 };
                let non = if flags.contains("pref") { "" } else { "non-" };
                patterns.push(format!(
                    "Region {number}: Memory at [0-9a-f]+ \\({wide}-bit, {non}prefetchable\\) \\[size={}\\]",
                    suffixed(*size)
                ));
            }
            for pattern in patterns {
                ensure(Regex::new(&pattern)?.is_match(&text), || {
                    format!("no '{pattern}' in\n{text}")
                })?;
            }
            ensure(!text.contains("Expansion ROM"), || text.clone())?;
        }
        Ok(())
    });
    context.check(
        "a ROM is hidden: its BAR is zero, whatever is written",
        || {
            for function in functions {
                let address = function.address();
                let text = function.guest.sh(&format!(
                    "setpci -s {address} ROM_ADDRESS=ffffffff; setpci -s {address} ROM_ADDRESS"
                ))?;
                let host = function.guest.host.pci_config(0, function.number)?;
                let host = &host[2 * 0x30..2 * 0x34];
                ensure(text.trim() == "00000000" && host == "00000000", || {
                    format!("{address}: {text}, at the host {host}")
                })?;
            }
            Ok(())
        },
    );
    context.check("each kind of BAR holds what is written at its ends", || {
        let line = Regex::new("(?m)^BAR ([0-9]): 0x[0-9a-f]+\\+0x([0-9a-f]+)(.*) good$")?;
        for (function, bars) in functions.iter().zip(BARS) {
            let text = function.command("bars")?;
            let mut found = Vec::new();
            for groups in line.captures_iter(&text) {
                let size = u64::from_str_radix(&groups[2], 16)?;
                found.push((groups[1].parse()?, size, groups[3].to_owned()));
            }
            let expected = bars
                .iter()
                .map(|(n, size, flags)| (*n, *size, (*flags).to_owned()));
            ensure(found.iter().cloned().eq(expected), || text.clone())?;
        }
        Ok(())
    });
}

fn suffixed(size: u64) -> String {
    match size.trailing_zeros() {
        30.. => format!("{}G", size >> 30),
        20.. => format!("{}M", size >> 20),
        _ => format!("{}K", size >> 10),
    }
}

fn interrupts(context: &mut Context<'_>, functions: &[Function<'_>], measure: &Measure) {
    let [msix, msi] = functions else { return };
    let guest = msix.guest;
    context.check("MSI with 1 to 32 vectors, each on its own", || {
        for count in [1, 2, 4, 8, 16, 32] {
            msi.expect(
                &format!("vectors msi {count} {count}"),
                &format!("allocated={count} requested={count} error=0"),
            )?;
            msi.command(&format!("fire 0 {count} 3"))?;
            let sent = msi.check()?;
            ensure(sent == 3 * count, || {
                format!("{count} vectors: {sent} sent")
            })?;
            if count == 32 {
                pinned(msi, 0, count)?;
                pinned(msi, 1, count)?;
            }
            msi.command("free")?;
        }
        Ok(())
    });
    context.check("64 vectors of MSI-X, all on either processor", || {
        msix.expect("vectors msix 64 64", "allocated=64 requested=64 error=0")?;
        for cpu in [0, 1] {
            pinned(msix, cpu, 64)?;
        }
        Ok(())
    });
    context.check(
        &format!(
            "{} moves under load, no interrupt lost or doubled",
            measure.moves
        ),
        || {
            let retargeted = || guest.host.counter("pci0.interrupts.retargeted");
            let (before, sent) = (retargeted()?, msix.check()?);
            msix.command("rate 0 64 25")?;
            let moves = 1000;
            for seed in 0..measure.moves / moves {
                msix.expect(
                    &format!("affinity {moves} {seed}"),
                    &format!("moved={moves} refused=0"),
                )?;
            }
            msix.command("rate 0 0 0")?;
            let (moved, sent) = (retargeted()? - before, msix.check()? - sent);
            ensure(moved >= u64::from(measure.moves) / 2 && sent > 500, || {
                format!("the host has seen {moved} moves and sent {sent}")
            })
        },
    );
    context.check("a processor goes and comes while vectors fire", || {
        let sent = msix.check()?;
        msix.command("rate 0 64 20")?;
        for _ in 0..measure.offline {
            guest.sh(
                "cd /sys/devices/system/cpu/cpu1; echo 0 >online; sleep 0.3; echo 1 >online; sleep 0.3",
            )?;
            msix.command("affinity 200 1")?;
        }
        msix.command("rate 0 0 0")?;
        let sent = msix.check()? - sent;
        ensure(sent > 500, || format!("only {sent} were sent"))?;
        msix.command("free").map(drop)
    });
    context.check(
        &format!("64 vectors requested and freed {} times", measure.cycles),
        || {
            let before = guest.host.counters()?;
            msix.command_within(
                &format!("cycle msix 64 {}", measure.cycles),
                LONG + Duration::from_secs(3) * measure.cycles,
            )?;
            balance(guest, &before, 64 * u64::from(measure.cycles))
        },
    );
    let mut requested = 0;
    context.check(
        &format!(
            "{} vectors of MSI-X are asked for, those there are fire",
            measure.vectors
        ),
        || {
            let before = guest.host.counters()?;
            let result = msix.command(&format!("vectors msix 1 {} most", measure.vectors))?;
            let values = values(&result);
            requested = values.get("requested").copied().unwrap_or(0);
            // An x86 processor has a good 200 vectors for devices.
            let good = values.get("allocated") == Some(&measure.vectors.into())
                && (350..448).contains(&requested);
            ensure(good, || result.clone())?;
            msix.command(&format!("fire 0 {requested} 2"))?;
            let sent = msix.check()?;
            ensure(sent == 2 * requested, || format!("{sent} were sent"))?;
            msix.command("free")?;
            balance(guest, &before, requested)
        },
    );
    context.measure("vectors", requested);
}

/// Sends all vectors to a processor and lets each fire three times there.
pub fn pinned(function: &Function<'_>, cpu: usize, vectors: u64) -> Result<()> {
    // An interrupt moves when it comes the next time.
    function.command(&format!("pin {cpu}"))?;
    function.command(&format!("fire 0 {vectors} 1"))?;
    let (sent, before) = (function.check()?, function.counts()?);
    function.command(&format!("fire 0 {vectors} 3"))?;
    let (sent, after) = (function.check()? - sent, function.counts()?);
    let grown = |(before, after): (&Vec<u64>, &Vec<u64>)| {
        let grown = before
            .iter()
            .zip(after)
            .map(|(before, after)| after - before);
        let expected = (0..before.len()).map(|number| if number == cpu { 3 } else { 0 });
        grown.eq(expected)
    };
    let good = after.len() as u64 == vectors
        && sent == 3 * vectors
        && before.iter().zip(&after).all(grown);
    ensure(good, || {
        format!("{vectors} vectors on CPU {cpu}: {sent} sent, {before:?} then {after:?}")
    })
}

/// Checks that the guest has given back what it has made since, which was at least so much.
fn balance(guest: &Guest, before: &BTreeMap<String, u64>, least: u64) -> Result<()> {
    let mut last = String::new();
    eventually(Duration::from_secs(10), "all is given back", || {
        let now = guest.host.counters()?;
        let grown = |name: &str| {
            let name = format!("pci0.interrupts.{name}");
            let value =
                |counters: &BTreeMap<String, u64>| counters.get(&name).copied().unwrap_or(0);
            value(&now) - value(before)
        };
        let (live, created, deleted) = (grown("live"), grown("created"), grown("deleted"));
        last = format!("live {live}, created {created}, deleted {deleted}");
        Ok(live == 0 && created == deleted && created >= least && grown("reclaimed") == 0)
    })
    .map_err(|_| last.into())
}

/// The functions' vectors, which their drivers keep when the machine is suspended and resumed. Gives how many
/// interrupts are left in the host.
fn suspended(context: &mut Context<'_>, functions: &[Function<'_>]) -> u64 {
    let [msix, msi] = functions else { return 0 };
    let guest = msix.guest;
    let mut made = BTreeMap::new();
    context.check(
        "suspended and resumed, functions are what they were",
        || {
            made = guest.host.counters()?;
            msix.expect("vectors msix 64 64", "allocated=64 requested=64 error=0")?;
            msi.expect("vectors msi 32 32", "allocated=32 requested=32 error=0")?;
            pinned(msix, 0, 64)?;
            // These move when the processor goes.
            pinned(msi, 1, 32)?;
            let all = |function: &Function<'_>| function.configuration();
            let before = functions.iter().map(all).collect::<Result<Vec<_>>>()?;
            let connections = contacts(guest)?;
            // Without a place for the image the devices are frozen and thawed, and that is all.
            guest.sh("! echo disk >/sys/power/state")?;
            let connections = contacts(guest)? - connections;
            ensure(connections == 1, || {
                format!("{connections} new contacts with the host")
            })?;
            let after = functions.iter().map(all).collect::<Result<Vec<_>>>()?;
            ensure(before == after, || format!("{before:x?}\n{after:x?}"))?;
            functions.iter().try_for_each(|function| {
                function.command("clear")?;
                let text = function.command("bars")?;
                ensure(!text.contains("bad"), || text.clone())
            })
        },
    );
    context.check("each vector comes where it came before, once", || {
        let tried = match guest.drivers() {
            // See below.
            Drivers::C => 1,
            Drivers::Rust => functions.len(),
        };
        functions[..tried].iter().try_for_each(|function| {
            let command = format!(
                "while read -r _ irq _; do cat /proc/irq/$irq/effective_affinity_list; done <{}",
                function.file("counts")
            );
            let text = guest.sh(&command)?;
            let cpus = text.lines().map(|cpu| Ok(cpu.parse()?));
            let cpus = cpus.collect::<Result<Vec<usize>>>()?;
            let mut expected = function.counts()?;
            for (counts, &cpu) in expected.iter_mut().zip(&cpus) {
                counts[cpu] += 3;
            }
            function.command(&format!("fire 0 {} 3", cpus.len()))?;
            let after = (function.check()?, function.counts()?);
            ensure(after == (3 * cpus.len() as u64, expected), || {
                format!("{}: to {cpus:?}: {after:?}", function.address())
            })
        })
    });
    let free = || {
        functions
            .iter()
            .try_for_each(|function| function.command("free").map(drop))
    };
    match guest.drivers() {
        Drivers::C => {
            context.note(
                "after a resume the stock hv_pci names interrupts by messages from before it: they \
                 do not move, it gives none back, and several MSIs at once, which need to be moved, do \
                 not come: not tried",
            );
            let lost = 64 + 1;
            context.check("vectors are freed after a resume", || {
                free()?;
                let live = guest.host.counter("pci0.interrupts.live")?;
                ensure(live == lost, || format!("live {live}"))
            });
            lost
        }
        Drivers::Rust => {
            context.check("after a resume vectors move, and none is left", || {
                let refused = || guest.host.counter("retarget.refused");
                let before = refused()?;
                for cpu in [1, 0] {
                    pinned(msix, cpu, 64)?;
                    pinned(msi, cpu, 32)?;
                }
                free()?;
                let refused = refused()? - before;
                ensure(refused == 0, || format!("{refused} moves refused"))?;
                balance(guest, &made, 2 * (64 + 1))
            });
            0
        }
    }
}

/// Configuration blocks, by the kernel's table of functions for them.
fn blocks(context: &mut Context<'_>, function: &Function<'_>) {
    let guest = function.guest;
    let pattern = hex(&(0..128).collect::<Vec<u8>>());
    context.check("configuration blocks are read and written", || {
        let untouched = |bytes: usize| format!("error=0 bytes={bytes} data={}", "07".repeat(bytes));
        for bytes in [128, 5, 1] {
            function.expect(&format!("read 7 {bytes}"), &untouched(bytes))?;
        }
        for bytes in [128, 1, 127] {
            let digits = &pattern[..2 * bytes];
            function.expect(&format!("write 7 {digits}"), "error=0")?;
            let expected = format!("error=0 bytes={bytes} data={digits}");
            function.expect(&format!("read 7 {bytes}"), &expected)?;
        }
        // -EINVAL, without asking the host.
        for command in ["read 7 0", "read 7 129"] {
            function.expect(command, "error=-22 bytes=0 data=")?;
        }
        function.expect(&format!("write 7 {pattern}00"), "error=-22")
    });
    context.check("blocks that are not there are an error (EIO)", || {
        function.expect("read 17 128", "error=-5 bytes=0 data=")?;
        function.expect("write 17 00", "error=-5")?;
        let lines = account_for(
            guest,
            &["Read Config Block failed", "Write Config Block failed"],
        )?;
        ensure(lines.len() == 2, || lines.join("\n"))
    });
    context.check("the driver hears which blocks have changed", || {
        function.expect("invalidated", "registered=0 times=0 mask=0x0")?;
        let masks = [1, 1 << 63, 0xf0];
        for mask in masks {
            let function = function.number;
            guest
                .host
                .pci(0, PciAction::Invalidate { function, mask })?;
        }
        let mut last = String::new();
        let mut times = 0;
        let mut heard = 0;
        eventually(APPEAR, "three invalidations", || {
            last = function.command("invalidated")?;
            let hex = last.rsplit("mask=0x").next().unwrap_or("").trim();
            times += values(&last).get("times").copied().unwrap_or(0);
            heard |= u64::from_str_radix(hex, 16)?;
            Ok(times == 3 && heard == masks.iter().fold(0, |all, mask| all | mask))
        })
        .map_err(|error| format!("{error}: {times} times, mask {heard:#x}, {last}").into())
    });
}

/// Two buses for which there is not enough MMIO space, while another one works.
fn exhaustion(context: &mut Context<'_>, functions: &[Function<'_>]) {
    let function = &functions[0];
    let guest = function.guest;
    let needs = [(1, "0x400000000 of high"), (2, "0x20010000 of low")];
    for (bus, need) in needs {
        context.check(
            &format!("a bus that needs {need} MMIO space says so, another one works"),
            || {
                function.command("vectors msix 4 4")?;
                let line = format!(
                    "hv_pci [-0-9a-f]+: Need {need} MMIO space. Consider reconfiguring the VM."
                );
                guest.host.pci(bus, PciAction::Offer)?;
                guest.wait_until(&format!("dmesg -t | grep -Eq '^{line}'"), APPEAR)?;
                let failed = format!("dmesg -t | grep -q 'probe failed for device .*-7a0{bus}-'");
                guest.wait_until(&failed, APPEAR)?;
                function.command("fire 0 4 5")?;
                let sent = function.check()?;
                ensure(sent == 20, || format!("{sent} were sent"))?;
                function.command("free")?;
                guest.host.pci(bus, PciAction::Remove)?;
                let lines = account_for(guest, &[&line, PROBE_FAILED])?;
                ensure(lines.iter().any(|line| line.contains("Need ")), || {
                    lines.join("\n")
                })
            },
        );
    }
}

/// Takes the first bus away and gives it back, and compares what the kernel says of MMIO space.
fn windows(guest: &Guest) -> Result<()> {
    // The kernel's own code and data move with what is loaded. Names of others are of no interest: where there is room for
    // a low window, but not for a high one, the stock driver leaves the low one there, with a name that is freed.
    let map = || guest.sh("grep -v Kernel /proc/iomem | sed '/7a00/!s/ : .*//'");
    let with = map()?;
    ensure(with.contains("7a00:00:00.0"), || with.clone())?;
    let mut without = None;
    for _ in 0..2 {
        guest.host.pci(0, PciAction::Remove)?;
        let now = map()?;
        ensure(!now.contains("7a00"), || now.clone())?;
        let first = without.get_or_insert_with(|| now.clone());
        ensure(*first == now, || format!("first\n{first}\nthen\n{now}"))?;
        let left = guest.host.counter("pci0.mapped_bars")?;
        ensure(left == 0, || format!("{left} BARs are mapped"))?;
        guest.host.pci(0, PciAction::Offer)?;
        for number in [0, 1] {
            let function = Function {
                guest,
                domain: 0x7a00,
                number,
            };
            guest.wait_until(&format!("[ -e {} ]", function.file("do")), APPEAR)?;
            let text = function.command("bars")?;
            ensure(!text.contains("bad"), || text.clone())?;
        }
        let now = map()?;
        ensure(with == now, || format!("first\n{with}\nthen\n{now}"))?;
    }
    Ok(())
}
