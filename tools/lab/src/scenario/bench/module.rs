// SPDX-License-Identifier: GPL-2.0
//! The module itself: loading, size, memory.

use lab_agent::module;

use super::super::guest::{report, Guest};
use super::super::{Drivers, Result};
use super::measure::less;
use super::report::Value;
use super::{path, Bench};

/// Shell words that set `m` to the memory that is available, in KiB, when everything has settled.
const MEMORY: &str = "sync; echo 3 >/proc/sys/vm/drop_caches; sleep 0.5; m=$(sed -n 's/^MemAvailable: *\\([0-9]*\\).*/\\1/p' /proc/meminfo)";

/// The time from insmod to the carrier, and what memory is gone then.
pub fn load(_: &Bench<'_>, guest: &Guest, drivers: Drivers) -> Result<Vec<Value>> {
    let script = format!(
        "file={}; rmmod hv_netvsc || exit; udevadm settle; {MEMORY}; before=$m; start=${{EPOCHREALTIME/./}}; \
         insmod $file || exit; until [ -e /sys/class/net/eth0 ]; do :; done; ip link set eth0 up || exit; \
         until read -r up </sys/class/net/eth0/carrier && [ $up = 1 ]; do :; done; \
         end=${{EPOCHREALTIME/./}}; udevadm settle; {MEMORY}; echo $((end - start)) $((before - m)); \
         ip address add {}/24 dev eth0",
        path(drivers),
        guest.nics[0].guest_v4()
    );
    let text = guest.sh(&format!("bash -c '{}'", script.replace('\'', "'\\''")))?;
    let numbers: Vec<f64> = text
        .split_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect();
    let [microseconds, memory] = numbers[..] else {
        return Err(format!("loading the module printed '{text}'").into());
    };
    Ok(vec![
        less("load.time", "ms", microseconds / 1e3),
        less("load.memory", "KiB", memory),
    ])
}

/// The size of what stays in memory.
pub fn size(_: &Bench<'_>, guest: &Guest, drivers: Drivers) -> Result<Vec<Value>> {
    let command = format!("lab-agent module-size {}", path(drivers));
    let size: module::Report = report(&command, &guest.sh(&command)?)?;
    let kib = |bytes: u64| bytes as f64 / 1024.0;
    Ok(vec![
        less("size.code", "KiB", kib(size.text)),
        less("size.data", "KiB", kib(size.constants + size.data)),
    ])
}

/// What one channel more takes.
pub fn channel(_: &Bench<'_>, guest: &Guest, _: Drivers) -> Result<Vec<Value>> {
    let memory = |channels: u32| -> Result<f64> {
        let text = guest.sh(&format!(
            "ethtool -L eth0 combined {channels}; {MEMORY}; echo $m"
        ))?;
        Ok(text.trim().parse()?)
    };
    let one = memory(1)?;
    let two = memory(2)?;
    Ok(vec![less("channel.memory", "KiB", one - two)])
}
