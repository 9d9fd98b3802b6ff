// SPDX-License-Identifier: GPL-2.0
//! `hvlab`: a Hyper-V-compatible lab host for the drivers of this repository.

mod cpio;
mod host;
mod level1;
mod run;
mod scenario;
mod shell;
mod signals;
mod terminal;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};

/// A Hyper-V-compatible host on KVM, to try network drivers of Azure guests without Azure.
///
/// Where the machine has no KVM that will do, everything runs in a machine emulated by QEMU instead, with the same
/// commands.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Boot one guest and wait for its end
    Run(run::Args),
    /// Run the scenarios
    Test(scenario::TestOptions),
    /// A login shell on the guest's console, with the control client beside it
    Lab(shell::Options),
    /// Show bonding and host servicing, with explanations
    Demo(scenario::demo::DemoOptions),
    /// Measure the stock drivers and ours by turns
    Bench(scenario::bench::Options),
    /// Control a running lab
    Ctl(lab_control::cli::Ctl),
    /// Say whether this machine's KVM will do
    Check,
}

/// Whether KVM will do; if not, says why on standard error.
fn usable_kvm() -> bool {
    match vmm::open_kvm() {
        Ok(_) => true,
        Err(error) => {
            eprintln!("hvlab: no usable KVM here ({error}): running in a machine emulated by QEMU");
            false
        }
    }
}

fn main() {
    if level1::init::is_init() {
        level1::init::run();
    }
    if let Err(error) = signals::watch() {
        eprintln!("hvlab: {error}");
        std::process::exit(1);
    }
    let cli = Cli::try_parse().unwrap_or_else(|error| {
        if error.kind() == ErrorKind::MissingRequiredArgument {
            eprintln!("hvlab: make lab, make demo, make test and scripts/lab.sh give kernel, image and modules");
        }
        error.exit()
    });
    let result = match cli.command {
        Command::Run(args) if usable_kvm() => run::run(&args),
        Command::Run(args) => run::run_in_level1(&args),
        Command::Test(options) => {
            // A list needs neither.
            let passed = if options.list || usable_kvm() {
                scenario::run(&options)
            } else {
                scenario::level1::run(&options)
            };
            passed
                .map(|passed| i32::from(!passed))
                .map_err(|error| error.to_string())
        }
        Command::Lab(options) => options.guest().and_then(|args| {
            args.check()?;
            if options.side_by_side()? {
                Ok(0)
            } else if usable_kvm() {
                run::run(&args)
            } else {
                run::run_in_level1(&args)
            }
        }),
        Command::Demo(options) => {
            let code = if usable_kvm() {
                scenario::demo::run(&options).map(|()| 0)
            } else {
                scenario::demo::run_in_level1(&options)
            };
            code.map_err(|error| error.to_string())
        }
        Command::Bench(options) => {
            let code = if options.list || usable_kvm() {
                scenario::bench::run(&options).map(|()| 0)
            } else {
                scenario::bench::run_in_level1(&options)
            };
            code.map_err(|error| error.to_string())
        }
        Command::Ctl(ctl) => ctl.run().map(|()| 0).map_err(|error| error.to_string()),
        Command::Check => match vmm::open_kvm() {
            Ok(_) => {
                println!("KVM has all that is needed: guests run directly on it.");
                Ok(0)
            }
            Err(error) => {
                println!("{error}: guests run in a machine emulated by QEMU.");
                Ok(1)
            }
        },
    };
    let code = result.unwrap_or_else(|error| {
        eprintln!("hvlab: {error}");
        1
    });
    std::process::exit(code);
}
