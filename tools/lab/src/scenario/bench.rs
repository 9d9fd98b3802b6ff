// SPDX-License-Identifier: GPL-2.0
//! The benchmark: both driver sets by turns in one guest, figure by figure.

mod bus;
mod count;
mod measure;
mod module;
mod packets;
mod report;
mod streams;
mod vf;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;

use crate::run::Files;

use super::guest::{tail, Boot, Guest, Lab, Nic};
use super::vf::bonded;
use super::{ensure, level1, DriverChoice, Drivers, Result};
use count::{Counter, Symbol, Symbols};
use measure::{Measure, Setting};
use report::Results;

/// Where level 1 has the results, what the plugin writes, and logs.
const RESULTS: &str = "/lab/out/results";
const COUNTS: &str = "/lab/in/counts";
const OUTPUT: &str = "/tmp/output";
/// Where the peer answers requests.
const RR_PORT: u16 = 7010;

/// Options of `hvlab bench`.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// What the guest is made of.
    #[command(flatten)]
    pub files: Files,
    /// How often each driver set is measured
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
    /// Driver set(s) to measure
    #[arg(long, value_enum, default_value = "both")]
    pub drivers: DriverChoice,
    /// One short round, to see that all works: its figures say nothing
    #[arg(long)]
    pub quick: bool,
    /// Where instructions are counted, print the functions that take the most
    #[arg(long)]
    pub profile: bool,
    /// Only measures whose names begin so, such as 'instructions'; repeatable
    #[arg(long, value_name = "TEXT")]
    pub only: Vec<String>,
    /// List the measures
    #[arg(long)]
    pub list: bool,
    /// Where report, results and plot go
    #[arg(long, default_value = "build/bench")]
    pub output: PathBuf,
    /// Only write the results, to this file
    #[arg(long, hide = true)]
    pub results: Option<PathBuf>,
    /// Counts of instructions come from this file
    #[arg(long, hide = true)]
    pub counts: Option<PathBuf>,
}

impl Options {
    /// How often, after all.
    fn rounds(&self) -> u32 {
        if self.quick {
            1
        } else {
            self.rounds
        }
    }
}

/// Measures where KVM is usable.
pub fn run(options: &Options) -> Result<()> {
    if options.list {
        measure::list();
        return Ok(());
    }
    options.files.check(true)?;
    measure::choose(&options.only)?;
    fs::create_dir_all(&options.output)?;
    let lab = Lab::new(&options.files)?;
    let mut bench = Bench {
        lab: &lab,
        options,
        kernel: Vec::new(),
        counter: options.counts.as_deref().map(Counter::open).transpose()?,
        results: Results::default(),
        failed: Vec::new(),
        start: Instant::now(),
    };
    bench.all()?;
    let Bench {
        results, failed, ..
    } = bench;
    match &options.results {
        Some(path) => {
            let file = File::options().append(true).create(true).open(path)?;
            serde_json::to_writer(file, &results)?;
        }
        None => report::finish(&results, &options.output)?,
    }
    ensure(failed.is_empty(), || {
        format!("not measured:\n{}", failed.join("\n"))
    })
}

/// Measures in an emulated machine.
pub fn run_in_level1(options: &Options) -> Result<i32> {
    options.files.check(true)?;
    measure::choose(&options.only)?;
    fs::create_dir_all(&options.output)?;
    let mut args = vec![
        "bench".to_owned(),
        format!("--rounds={}", options.rounds),
        format!("--drivers={}", options.drivers.word()),
        format!("--output={OUTPUT}"),
        format!("--results={RESULTS}"),
        format!("--counts={COUNTS}"),
    ];
    args.extend(options.quick.then(|| "--quick".to_owned()));
    args.extend(options.profile.then(|| "--profile".to_owned()));
    args.extend(options.only.iter().map(|name| format!("--only={name}")));
    let mut launch = level1::launch(&options.files, args, true);
    let results = options.output.join(".results");
    File::create(&results)?;
    launch.outputs = vec![(results.clone(), RESULTS.to_owned())];
    let plugin = std::env::current_exe()?.with_file_name("libinsncount.so");
    if !plugin.exists() {
        return Err(format!("{} is missing, build it with: make tools", plugin.display()).into());
    }
    launch.plugin = Some((plugin, COUNTS.to_owned()));
    let code = launch.run(std::io::stdout())?;
    let text = fs::read(&results)?;
    fs::remove_file(&results)?;
    if !text.is_empty() {
        report::finish(&serde_json::from_slice(&text)?, &options.output)?;
    }
    Ok(code)
}

/// A run of the benchmark.
struct Bench<'a> {
    lab: &'a Lab,
    options: &'a Options,
    counter: Option<Counter>,
    /// Functions of the guest's kernel, where instructions are counted.
    kernel: Vec<Symbol>,
    results: Results,
    /// Measures that could not be taken, and why.
    failed: Vec<String>,
    start: Instant,
}

impl Bench<'_> {
    /// Tells how far it is.
    fn note(&self, text: &str) {
        println!("{:5} s  {text}", self.start.elapsed().as_secs());
    }

    /// The guest's code at present.
    fn symbols(&self, guest: &Guest, functions: bool) -> Result<Symbols> {
        Ok(Symbols::new(
            &self.kernel,
            count::modules(guest, functions)?,
        ))
    }

    fn all(&mut self) -> Result<()> {
        let measures = measure::choose(&self.options.only)?;
        for cpus in [1, 2] {
            let here = |measure: &&&Measure| (measure.setting == Setting::Queues) == (cpus == 2);
            let measures: Vec<_> = measures.iter().filter(here).copied().collect();
            if !measures.is_empty() {
                let folder = self.options.output.join(format!("guest-{cpus}"));
                self.guest(cpus, &measures, &folder).map_err(|error| {
                    let console = tail(&folder.join("console.log"), 15);
                    format!("{error}\n{console}")
                })?;
                // What it says is of use after a failure only.
                let _ = fs::remove_dir_all(&folder);
            }
        }
        Ok(())
    }

    /// All rounds in one guest.
    fn guest(&mut self, cpus: u32, measures: &[&'static Measure], folder: &Path) -> Result<()> {
        let boot = Boot {
            cpus,
            pci: vec![bus::SPEC.to_owned()],
            ..Boot::new(vec![Nic::new(0)])
        };
        let mut guest = Guest::boot(self.lab, Drivers::Rust, &boot, folder)?;
        self.note(&format!("a guest with {cpus} processor(s) runs"));
        let nic = guest.nics[0].clone();
        guest.peer_server(self.lab, &nic, &["iperf3", "-s"])?;
        let agent = self.lab.agent.display().to_string();
        let bind = format!("{}:{RR_PORT}", nic.peer_v4());
        guest.peer_server(self.lab, &nic, &[&agent, "rr-serve", "--bind", &bind])?;
        if self.counter.is_some() {
            self.kernel = count::kernel(&guest)?;
        }
        for round in 0..self.options.rounds() {
            let mut sets = self.options.drivers.sets().to_vec();
            // Neither is always the second.
            if round % 2 == 1 {
                sets.reverse();
            }
            for drivers in sets {
                self.note(&format!(
                    "round {} of {}, {drivers}",
                    round + 1,
                    self.options.rounds()
                ));
                swap(&guest, drivers)?;
                let of = |wanted: fn(Setting) -> bool| -> Vec<_> {
                    let here = measures.iter().filter(|measure| wanted(measure.setting));
                    here.copied().collect()
                };
                let (bus, vf) = (of(|s| s == Setting::Bus), of(|s| s == Setting::Vf));
                let synthetic = of(|s| s != Setting::Bus && s != Setting::Vf);
                self.take(&guest, drivers, &synthetic);
                if !bus.is_empty() {
                    bus::with(&guest, drivers, || self.take(&guest, drivers, &bus))?;
                }
                if !vf.is_empty() {
                    guest.host.add_vf(&nic)?;
                    bonded(&guest, &nic)?;
                    self.take(&guest, drivers, &vf);
                    guest.host.remove_vf(&nic)?;
                    let gone = format!("[ ! -e /sys/class/net/{} ]", nic.vf_name());
                    guest.wait_until(&gone, Duration::from_secs(20))?;
                }
            }
        }
        guest.stop()
    }

    fn take(&mut self, guest: &Guest, drivers: Drivers, measures: &[&Measure]) {
        for measure in measures {
            let values = (measure.run)(self, guest, drivers)
                .and_then(|values| measure::check(&values).map(|()| values));
            let values = match values {
                Ok(values) => values,
                Err(error) => {
                    // The others are still of use.
                    let text = format!("{} [{drivers}]: {error}", measure.name);
                    self.note(&format!("FAILED {text}"));
                    self.failed.push(text);
                    continue;
                }
            };
            if values.is_empty() {
                self.note(&format!("{}: not here, no QEMU counts", measure.name));
            }
            for value in values {
                self.note(&format!(
                    "[{drivers}] {} = {:.3} {}",
                    value.name, value.value, value.unit
                ));
                self.results.add(drivers, value);
            }
        }
    }
}

/// Where the guest has the module of a driver set, in shell words.
fn path(drivers: Drivers) -> String {
    let folder = match drivers {
        Drivers::C => "kernel",
        Drivers::Rust => "updates",
    };
    format!("$(find /lib/modules/$(uname -r)/{folder} -name hv_netvsc.ko)")
}

/// Replaces the synthetic driver by that of the other set.
fn swap(guest: &Guest, drivers: Drivers) -> Result<()> {
    let nic = &guest.nics[0];
    guest.sh(&format!(
        "rmmod hv_netvsc && insmod {} && udevadm settle && ip link set eth0 up && ip address add {}/24 dev eth0",
        path(drivers),
        nic.guest_v4()
    ))?;
    guest
        .sh(&format!("ping -q -c 2 -i 0.2 -W 5 {}", nic.peer_v4()))
        .map(drop)
}
