// SPDX-License-Identifier: GPL-2.0
//! Connections: throughput and latency.

use std::time::Duration;

use lab_agent::rr;
use serde_json::Value as Json;

use super::super::guest::{report, Guest, COMMAND};
use super::super::{Drivers, Result};
use super::measure::{less, more};
use super::report::Value;
use super::{Bench, RR_PORT};

/// Throughput out of the guest and into it.
pub fn tcp(bench: &Bench<'_>, guest: &Guest, name: &str, streams: u32) -> Result<Vec<Value>> {
    let seconds = if bench.options.quick { 1 } else { 4 };
    let peer = guest.nics[0].peer_v4();
    ["out", "in"]
        .iter()
        .map(|&way| {
            let reverse = if way == "in" { "-R" } else { "" };
            let command = format!("iperf3 -J -i 0 -t {seconds} -P {streams} {reverse} -c {peer}");
            let exit = guest.exit(&command, COMMAND)?;
            let result: Json = serde_json::from_str(&exit.stdout)
                .map_err(|_| format!("{command}: {}{}", exit.stdout, exit.stderr))?;
            let rate = result["end"]["sum_received"]["bits_per_second"]
                .as_f64()
                .filter(|&rate| rate > 0.0)
                .ok_or_else(|| format!("{command}: {}", result["error"]))?;
            Ok(more(format!("{name}.{way}"), "Mbit/s", rate / 1e6))
        })
        .collect()
}

/// Time of a request and its response.
pub fn latency(bench: &Bench<'_>, guest: &Guest, _: Drivers) -> Result<Vec<Value>> {
    let count = if bench.options.quick { 300 } else { 3000 };
    let command = format!(
        "lab-agent rr --count {count} --to {}:{RR_PORT}",
        guest.nics[0].peer_v4()
    );
    let text = guest.sh_within(&command, Duration::from_secs(60))?;
    let report: rr::Report = report(&command, &text)?;
    Ok(vec![
        less("latency.median", "us", report.median_ns as f64 / 1e3),
        less("latency.p99", "us", report.p99_ns as f64 / 1e3),
        more("latency.rate", "requests/s", report.per_second),
    ])
}
