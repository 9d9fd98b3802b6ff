// SPDX-License-Identifier: GPL-2.0
//! The benchmark: both driver sets by turns in one guest, figure by figure.

mod count;
mod measure;
mod report;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;

use crate::run::Files;

use super::guest::{Boot, Guest, Lab, Nic};
use super::{level1, Drivers, Result};
use count::Counter;
use report::Results;

/// Where level 1 has the results, what the plugin writes, and logs.
const RESULTS: &str = "/lab/out/results";
const COUNTS: &str = "/lab/in/counts";
const OUTPUT: &str = "/tmp/output";

/// Options of `hvlab bench`.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// What the guest is made of.
    #[command(flatten)]
    pub files: Files,
    /// How often each driver set is measured
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
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
        counter: options.counts.as_deref().map(Counter::open).transpose()?,
        results: Results::default(),
        start: Instant::now(),
    };
    bench.all()?;
    let results = bench.results;
    match &options.results {
        Some(path) => {
            let file = File::options().append(true).create(true).open(path)?;
            serde_json::to_writer(file, &results)?;
            Ok(())
        }
        None => report::finish(&results, &options.output),
    }
}

/// Measures in an emulated machine.
pub fn run_in_level1(options: &Options) -> Result<i32> {
    options.files.check(true)?;
    measure::choose(&options.only)?;
    fs::create_dir_all(&options.output)?;
    let mut args = vec![
        "bench".to_owned(),
        format!("--rounds={}", options.rounds),
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
    if code == 0 {
        report::finish(&serde_json::from_slice(&text)?, &options.output)?;
    }
    Ok(code)
}

/// A run of the benchmark.
struct Bench<'a> {
    lab: &'a Lab,
    options: &'a Options,
    counter: Option<Counter>,
    results: Results,
    start: Instant,
}

impl Bench<'_> {
    /// Tells how far it is.
    fn note(&self, text: &str) {
        println!("{:5} s  {text}", self.start.elapsed().as_secs());
    }

    fn all(&mut self) -> Result<()> {
        let folder = self.options.output.join("guest");
        let result = self.rounds(&folder);
        if let Err(error) = result {
            return Err(format!(
                "{error}\n{}",
                super::guest::tail(&folder.join("console.log"), 15)
            )
            .into());
        }
        // What it says is of use after a failure only.
        let _ = fs::remove_dir_all(&folder);
        Ok(())
    }

    fn rounds(&mut self, folder: &Path) -> Result<()> {
        let measures = measure::choose(&self.options.only)?;
        let guest = Guest::boot(
            self.lab,
            Drivers::Rust,
            &Boot::new(vec![Nic::new(0)]),
            folder,
        )?;
        self.note("the guest runs");
        for round in 0..self.options.rounds() {
            let mut sets = [Drivers::C, Drivers::Rust];
            // Neither is always the second.
            if round % 2 == 1 {
                sets.reverse();
            }
            for drivers in sets {
                swap(&guest, drivers)?;
                for measure in &measures {
                    let values = (measure.run)(self, &guest, drivers)
                        .map_err(|error| format!("{} [{drivers}]: {error}", measure.name))?;
                    for (name, value) in values {
                        self.note(&format!("[{drivers}] {name} = {value:.3}"));
                        self.results.add(drivers, name, value);
                    }
                }
            }
        }
        guest.stop()
    }
}

/// Replaces the synthetic driver by that of the other set.
fn swap(guest: &Guest, drivers: Drivers) -> Result<()> {
    let folder = match drivers {
        Drivers::C => "kernel",
        Drivers::Rust => "updates",
    };
    let nic = &guest.nics[0];
    guest.sh(&format!(
        "rmmod hv_netvsc && insmod $(find /lib/modules/$(uname -r)/{folder} -name hv_netvsc.ko) && \
         udevadm settle && ip link set eth0 up && ip address add {}/24 dev eth0",
        nic.guest_v4()
    ))?;
    Ok(())
}
