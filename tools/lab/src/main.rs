// SPDX-License-Identifier: GPL-2.0
//! `hvlab`: a Hyper-V-compatible lab host for the drivers of this repository.

use clap::Parser;

#[derive(Parser)]
#[command(version, about)]
struct Cli {}

fn main() {
    Cli::parse();
}
