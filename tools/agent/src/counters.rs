// SPDX-License-Identifier: GPL-2.0
//! Watches an interface's counters: they only ever grow.

use std::fs;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use serde::{Deserialize, Serialize};

/// Options.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// The interface
    #[arg(long)]
    pub interface: String,
    /// Time between two looks in milliseconds
    #[arg(long, default_value_t = 2)]
    pub interval: u64,
    /// Seconds; a SIGINT ends it earlier
    #[arg(long, default_value_t = 3600)]
    pub duration: u64,
}

/// What was seen.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Report {
    /// How often it was looked.
    pub samples: u64,
    /// How often the interface had no counters.
    pub missing: u64,
    /// How often some counter was smaller than before, zero included.
    pub falls: u64,
    /// The first time, the values before and after.
    pub first_fall: Option<(Vec<u64>, Vec<u64>)>,
    /// How long it was watched.
    pub milliseconds: u64,
}

/// The interface's counters in what `/proc/net/dev` says.
fn read(text: &str, interface: &str) -> Option<Vec<u64>> {
    let counters = text.lines().find_map(|line| {
        let (name, counters) = line.split_once(':')?;
        (name.trim() == interface).then_some(counters)
    })?;
    Some(
        counters
            .split_whitespace()
            .filter_map(|word| word.parse().ok())
            .collect(),
    )
}

/// Takes a sample into account.
fn note(report: &mut Report, last: &mut Vec<u64>, now: Option<Vec<u64>>) {
    report.samples += 1;
    let Some(now) = now else {
        report.missing += 1;
        return;
    };
    if last.iter().zip(&now).any(|(last, now)| now < last) {
        report.falls += 1;
        if report.first_fall.is_none() {
            report.first_fall = Some((last.clone(), now.clone()));
        }
    }
    *last = now;
}

/// Watches until the time is over or `stop` is set.
pub fn watch(options: &Options, stop: &AtomicBool) -> io::Result<Report> {
    let start = Instant::now();
    let mut report = Report::default();
    let mut last = Vec::new();
    while start.elapsed() < Duration::from_secs(options.duration) && !stop.load(Ordering::Relaxed) {
        let text = fs::read_to_string("/proc/net/dev")?;
        note(&mut report, &mut last, read(&text, &options.interface));
        thread::sleep(Duration::from_millis(options.interval));
    }
    report.milliseconds = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_is_found() {
        let text =
            "Inter-| Receive\n face |bytes packets\n    lo: 1 2\n  eth0:30 4 0\n eth01: 5 6\n";
        assert_eq!(read(text, "eth0"), Some(vec![30, 4, 0]));
        assert_eq!(read(text, "eth1"), None);
    }

    #[test]
    fn falls_are_counted() {
        let mut report = Report::default();
        let mut last = Vec::new();
        for now in [
            Some(vec![1, 5]),
            Some(vec![2, 5]),
            None,
            Some(vec![0, 6]),
            Some(vec![0, 6]),
        ] {
            note(&mut report, &mut last, now);
        }
        assert_eq!((report.samples, report.missing, report.falls), (5, 1, 1));
        assert_eq!(report.first_fall, Some((vec![2, 5], vec![0, 6])));
    }
}
