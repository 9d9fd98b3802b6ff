// SPDX-License-Identifier: GPL-2.0
//! The scenarios: what a guest must do in the lab, whichever drivers it runs.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub mod bench;
mod channels;
mod compare;
pub mod demo;
mod ending;
mod faults;
mod flaps;
mod four_nics;
mod frames;
mod functions;
mod guest;
mod host;
mod isolated;
mod kexec;
mod large;
pub mod level1;
mod messages;
mod namespaces;
mod no_driver;
mod nvme;
mod observe;
mod odd_hosts;
mod one_nic;
#[cfg(test)]
mod parity;
mod pci_faults;
mod pci_messages;
mod reconfigure;
mod recorder;
mod reload;
mod selftests;
mod servicing;
mod suspend;
mod tap;
mod texts;
mod traffic;
mod versions;
mod vf;
mod xdp;

use clap::{Args, ValueEnum};

use crate::run::Files;
use guest::{Boot, Guest, Lab};
use tap::Tap;

/// An error whose text says what went wrong.
type Error = Box<dyn std::error::Error>;
type Result<T> = std::result::Result<T, Error>;

/// The driver set under test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drivers {
    /// The stock drivers of the kernel.
    C,
    /// The ones of this repository.
    Rust,
}

impl Drivers {
    /// As written on the command line.
    pub fn word(self) -> &'static str {
        match self {
            Self::C => "c",
            Self::Rust => "rust",
        }
    }
}

impl fmt::Display for Drivers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// Which driver sets to test.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DriverChoice {
    /// The stock drivers of the kernel
    C,
    /// The ones of this repository
    Rust,
    /// First the stock ones, then ours, and compare
    Both,
}

impl DriverChoice {
    /// As written on the command line.
    fn word(self) -> &'static str {
        match self {
            Self::C => "c",
            Self::Rust => "rust",
            Self::Both => "both",
        }
    }

    /// The sets, in the order in which they are tested.
    fn sets(self) -> &'static [Drivers] {
        match self {
            Self::C => &[Drivers::C],
            Self::Rust => &[Drivers::Rust],
            Self::Both => &[Drivers::C, Drivers::Rust],
        }
    }
}

/// Options of `hvlab test`.
#[derive(Debug, Clone, Args)]
pub struct TestOptions {
    /// What guests are made of.
    #[command(flatten)]
    pub files: Files,
    /// Driver set(s) to test
    #[arg(long, value_enum, default_value = "both")]
    pub drivers: DriverChoice,
    /// List the scenarios
    #[arg(long)]
    pub list: bool,
    /// Where logs of failed boots are kept
    #[arg(long, default_value = "lab-output")]
    pub output: PathBuf,
    /// Keep the logs of boots that passed, too
    #[arg(long)]
    pub keep: bool,
    /// Archive with the kernel's selftests, for the scenarios of that name
    #[arg(long, env = "HVLAB_SELFTESTS", value_name = "FILE")]
    pub selftests: Option<PathBuf>,
    /// Only this part of them, as `queues` or `gro-sw`; may be given several times
    #[arg(long = "selftest", value_name = "PART", value_parser = selftests::parts())]
    pub selftest: Vec<String>,
    /// Write the logs of failed boots to this file, too
    #[arg(long, hide = true)]
    pub artifacts: Option<PathBuf>,
    /// Scenarios by number or name; all when none is given
    pub scenarios: Vec<String>,
}

impl TestOptions {
    /// Says what is missing before anything is started.
    fn check_files(&self) -> Result<()> {
        let own_drivers = self.drivers.sets().contains(&Drivers::Rust);
        Ok(self.files.check(own_drivers)?)
    }
}

/// Bytes in hexadecimal digits.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The usual fq_codel drops frames that have waited for some time, as they do where a queue limits
/// the bytes on their way (BQL) and the host is slow. The checks count frames.
const QDISC: &str = "sysctl.net.core.default_qdisc=pfifo_fast";

/// A scenario.
struct Scenario {
    name: &'static str,
    title: &'static str,
    run: fn(&mut Context<'_>) -> Result<()>,
}

/// In the order of their numbers, which start at 1.
const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "one-nic",
        title: "one NIC, no VF: addresses, traffic, VLAN, MTU, frames of all sizes",
        run: one_nic::run,
    },
    Scenario {
        name: "vf",
        title: "a MANA VF: bonding as on Azure, traffic on the right path",
        run: vf::run,
    },
    Scenario {
        name: "flaps",
        title: "VF link down and up 50 times under TCP and UDP streams",
        run: flaps::run,
    },
    Scenario {
        name: "servicing",
        title: "host servicing 20 times under load",
        run: servicing::run,
    },
    Scenario {
        name: "four-nics",
        title: "four NICs paired by serial number, colliding bus GUIDs",
        run: four_nics::run,
    },
    Scenario {
        name: "large",
        title: "64 virtual PCI buses and 66 processors",
        run: large::run,
    },
    Scenario {
        name: "no-driver",
        title: "no driver for the VF: the synthetic path carries on",
        run: no_driver::run,
    },
    Scenario {
        name: "reload",
        title: "each module loaded and unloaded 50 times",
        run: reload::run,
    },
    Scenario {
        name: "versions",
        title: "each NVSP, virtual PCI and VMBus version",
        run: versions::run,
    },
    Scenario {
        name: "channels",
        title: "two processors: subchannels, queues and their interrupts",
        run: channels::run,
    },
    Scenario {
        name: "faults",
        title: "a host that does not answer, or refuses what it should not",
        run: faults::run,
    },
    Scenario {
        name: "observe",
        title: "what can be seen: tracepoints, statistics of queues, debugfs, parameters",
        run: observe::run,
    },
    Scenario {
        name: "suspend",
        title: "hibernation: the connection ends and is made again, on another host, too",
        run: suspend::run,
    },
    Scenario {
        name: "xdp",
        title: "XDP programs: each verdict, redirection, the VF, MTU and LRO",
        run: xdp::run,
    },
    Scenario {
        name: "frames",
        title: "frames with all that goes with them, and a host slow to take them",
        run: frames::run,
    },
    Scenario {
        name: "odd-hosts",
        title: "a host with other values, and messages that nobody asked for",
        run: odd_hosts::run,
    },
    Scenario {
        name: messages::NAME,
        title: "all that hv_netvsc says to the host, message by message",
        run: messages::run,
    },
    Scenario {
        name: pci_messages::NAME,
        title: "all that hv_pci says to the host, message by message",
        run: pci_messages::run,
    },
    Scenario {
        name: "pci-faults",
        title: "virtual PCI: wrong answers, nonsense, and functions that go at bad moments",
        run: pci_faults::run,
    },
    Scenario {
        name: "namespaces",
        title: "the VF follows its NIC into network namespaces, and what user space hears of it",
        run: namespaces::run,
    },
    Scenario {
        name: "reconfigure",
        title: "changes under traffic, and a host that refuses them",
        run: reconfigure::run,
    },
    Scenario {
        name: texts::NAME,
        title: "what there is to read: ethtool, ip, sysfs, modinfo and the kernel's log",
        run: texts::run,
    },
    Scenario {
        name: "kexec",
        title: "one kernel starts another, with and without VF",
        run: kexec::run,
    },
    Scenario {
        name: "selftests",
        title: "the kernel's own tests of network drivers, a selection",
        run: selftests::run,
    },
    Scenario {
        name: "selftests-all",
        title: "the same, every case (only when named)",
        run: selftests::run_all,
    },
    Scenario {
        name: "nvme",
        title: "an NVMe disk on a bus of its own: data, interrupts, resets, coming and going",
        run: nvme::run,
    },
    Scenario {
        name: "isolated",
        title: "a guest whose memory is isolated from the host",
        run: isolated::run,
    },
    Scenario {
        name: "functions",
        title: "functions on virtual PCI buses: BARs, each kind of interrupt, configuration blocks",
        run: functions::run,
    },
    Scenario {
        name: "functions-long",
        title: "the same, as often as it takes to be sure (only when named)",
        run: functions::run_long,
    },
];

/// Run only when they are named.
const ON_DEMAND: &[&str] = &["selftests-all", "functions-long"];

/// The scenarios whose texts are compared between the driver sets, with the differences that stay.
const COMPARED: &[(&str, &[compare::Kept])] = &[
    (messages::NAME, messages::KEPT),
    (pci_messages::NAME, pci_messages::KEPT),
    (texts::NAME, texts::KEPT),
];

/// What is compared between the driver sets: whether ours, and `scenario.name`, to the value.
type Measurements = BTreeMap<(bool, String), u64>;

/// What a scenario works with.
struct Context<'a> {
    tap: &'a mut Tap,
    lab: &'a Lab,
    drivers: Drivers,
    number: usize,
    scenario: &'static Scenario,
    options: &'a TestOptions,
    measurements: &'a mut Measurements,
    boots: usize,
    failures_before_boot: usize,
    /// The logs of the last boot, until it has ended in good order.
    folder: Option<PathBuf>,
}

impl<'a> Context<'a> {
    /// Where programs are; outlives the borrow of the context.
    fn lab(&self) -> &'a Lab {
        self.lab
    }

    /// Shows how far the scenario is.
    fn note(&mut self, text: &str) {
        let text = format!("[{}] {}: {text}", self.drivers, self.scenario.name);
        self.tap.note(&text);
    }

    /// Runs a check and reports it.
    fn check(&mut self, name: &str, check: impl FnOnce() -> Result<()>) -> bool {
        let start = Instant::now();
        let result = check().map_err(|error| error.to_string());
        let seconds = start.elapsed().as_secs_f32();
        let name = format!(
            "[{}] {}.{} {name} ({seconds:.1} s)",
            self.drivers, self.number, self.scenario.name
        );
        self.tap.check(&name, result)
    }

    /// Boots a guest.
    fn boot(&mut self, boot: &Boot) -> Result<Guest> {
        self.boots += 1;
        self.failures_before_boot = self.tap.failures();
        let folder = self.options.output.join(format!(
            "{}-{}-{}",
            self.drivers, self.scenario.name, self.boots
        ));
        let _ = fs::remove_dir_all(&folder);
        let start = Instant::now();
        let boot = Boot {
            append: format!("{QDISC} {}", boot.append),
            ..boot.clone()
        };
        let guest = match Guest::boot(self.lab, self.drivers, &boot, &folder) {
            Ok(guest) => guest,
            Err(error) => {
                self.keep(&folder);
                return Err(error);
            }
        };
        self.folder = Some(folder);
        self.note(&format!("booted in {:.0} s", start.elapsed().as_secs_f32()));
        Ok(guest)
    }

    /// Ends a guest: the checks that belong to every boot, then power-off.
    fn finish(&mut self, guest: Guest) -> Result<()> {
        let folder = guest.folder.clone();
        self.folder = None;
        ending::check(self, &guest);
        let failed = self.tap.failures() > self.failures_before_boot;
        let keep = failed || self.options.keep;
        if keep {
            ending::save(&guest);
        }
        self.check("the host ends in good order", || guest.stop());
        if keep {
            self.keep(&folder);
        } else {
            let _ = fs::remove_dir_all(folder);
        }
        Ok(())
    }

    /// Writes a text that is compared between the driver sets.
    fn text(&mut self, name: &str, text: &str) -> Result<()> {
        let folder = self.text_folder();
        fs::create_dir_all(&folder)?;
        fs::write(folder.join(name), text)?;
        self.export(&folder);
        Ok(())
    }

    fn text_folder(&self) -> PathBuf {
        let folder = compare::folder(self.drivers, self.scenario.name);
        self.options.output.join(folder)
    }

    /// Tells where the logs of a boot are, and brings them out of an emulated machine.
    fn keep(&mut self, folder: &Path) {
        self.tap.note(&format!("logs are in {}", folder.display()));
        self.export(folder);
    }

    /// Brings files out of an emulated machine, if this is one.
    fn export(&mut self, folder: &Path) {
        if let Some(way) = &self.options.artifacts {
            let exported = File::options()
                .append(true)
                .open(way)
                .map_err(Error::from)
                .and_then(|mut way| level1::export(&mut way, folder));
            if let Err(error) = exported {
                self.tap.note(&format!("{}: {error}", way.display()));
            }
        }
    }

    /// Notes a value that is compared between the driver sets.
    fn measure(&mut self, name: &str, value: u64) {
        let name = format!("{}.{name}", self.scenario.name);
        // The runner outside of an emulated machine reads this line.
        self.tap
            .note(&format!("[{}] measured {name} = {value}", self.drivers));
        self.measurements
            .insert((self.drivers == Drivers::Rust, name), value);
    }
}

/// Prints the scenarios.
fn list() {
    for (i, scenario) in SCENARIOS.iter().enumerate() {
        println!("{} {:10} {}", i + 1, scenario.name, scenario.title);
    }
}

/// Runs the chosen scenarios; true when every check passed.
pub fn run(options: &TestOptions) -> Result<bool> {
    let chosen = choose(&options.scenarios)?;
    if options.list {
        list();
        return Ok(true);
    }
    options.check_files()?;
    let lab = Lab::new(&options.files)?;
    fs::create_dir_all(&options.output)?;
    forget_texts(options);
    let mut tap = Tap::new(Box::new(std::io::stdout()));
    let mut measurements = Measurements::new();
    for &drivers in options.drivers.sets() {
        for &index in &chosen {
            let scenario = &SCENARIOS[index];
            let start = Instant::now();
            let before = tap.failures();
            let mut context = Context {
                tap: &mut tap,
                lab: &lab,
                drivers,
                number: index + 1,
                scenario,
                options,
                measurements: &mut measurements,
                boots: 0,
                failures_before_boot: before,
                folder: None,
            };
            context.note(scenario.title);
            if let Err(error) = (scenario.run)(&mut context) {
                context.check("runs to its end", || Err(error));
                if let Some(folder) = context.folder.take() {
                    context.keep(&folder);
                }
            }
            let result = if tap.failures() == before {
                "passed"
            } else {
                "FAILED"
            };
            tap.note(&format!(
                "[{drivers}] {} {result} in {} s",
                scenario.name,
                start.elapsed().as_secs()
            ));
        }
    }
    compare(&mut tap, options, &measurements, &chosen);
    Ok(tap.finish())
}

/// Compares what the driver sets have measured and written. What only one of them has written now
/// is compared with what an earlier run of the other one has left, if that is still there.
fn compare(tap: &mut Tap, options: &TestOptions, measurements: &Measurements, chosen: &[usize]) {
    let both = options.drivers.sets().len() > 1;
    if both {
        flaps::compare(tap, measurements);
        selftests::compare(tap, measurements, &options.output);
    }
    for &(name, kept) in COMPARED {
        if !chosen.iter().any(|&index| SCENARIOS[index].name == name) {
            continue;
        }
        let there = |&drivers: &Drivers| {
            let folder = compare::folder(drivers, name);
            options.output.join(folder).exists()
        };
        if both || DriverChoice::Both.sets().iter().all(there) {
            compare::texts(tap, &options.output, name, kept);
        }
    }
}

/// Takes away what earlier runs have written to be compared.
fn forget_texts(options: &TestOptions) {
    for drivers in options.drivers.sets() {
        for &(name, _) in COMPARED {
            let _ = fs::remove_dir_all(options.output.join(compare::folder(*drivers, name)));
        }
    }
}

/// The indices of the scenarios that were asked for.
fn choose(words: &[String]) -> Result<Vec<usize>> {
    if words.is_empty() {
        return Ok((0..SCENARIOS.len())
            .filter(|&index| !ON_DEMAND.contains(&SCENARIOS[index].name))
            .collect());
    }
    words
        .iter()
        .map(|word| {
            let by_name = SCENARIOS.iter().position(|scenario| scenario.name == word);
            let by_number = word
                .parse()
                .ok()
                .and_then(|number: usize| number.checked_sub(1));
            by_name
                .or(by_number.filter(|&index| index < SCENARIOS.len()))
                .ok_or_else(|| format!("no scenario '{word}', see hvlab test --list").into())
        })
        .collect()
}

/// Fails with a text unless a condition holds.
fn ensure(condition: bool, text: impl FnOnce() -> String) -> Result<()> {
    if condition {
        Ok(())
    } else {
        Err(text().into())
    }
}

/// Repeats a question to the host until the answer is yes.
fn eventually(timeout: Duration, what: &str, mut ask: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + timeout;
    loop {
        if ask()? {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(format!("not within {} s: {what}", timeout.as_secs()).into());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}
