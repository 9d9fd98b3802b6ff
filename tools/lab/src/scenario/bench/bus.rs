// SPDX-License-Identifier: GPL-2.0
//! Bringing up a function on a virtual PCI bus.

use lab_control::PciAction;

use super::super::guest::Guest;
use super::super::{Drivers, Result};
use super::measure::less;
use super::report::Value;
use super::Bench;

/// The bus.
pub const SPEC: &str = "offer=later,kind=test,msix=64";
/// Its domain.
const ADDRESS: &str = "7a00:00:00.0";
/// The kernel's hv_pci as a module; it is built in, and kept from registering.
const STOCK: &str = "/lab/hv_pci_stock.ko";

/// How often each is done in a row.
fn times(bench: &Bench<'_>) -> u32 {
    match bench.options.quick {
        true => 1,
        false => 10,
    }
}

fn file(drivers: Drivers) -> &'static str {
    match drivers {
        Drivers::C => STOCK,
        Drivers::Rust => "$(find /lib/modules/$(uname -r)/updates -name hv_pci.ko)",
    }
}

fn unload(guest: &Guest) -> Result<()> {
    guest
        .sh("for m in hv_pci hv_pci_stock; do [ ! -e /sys/module/$m/initstate ] || rmmod $m; done")
        .map(drop)
}

/// Runs something with a bus, whose driver is of a set; then ours is there again.
pub fn with(guest: &Guest, drivers: Drivers, act: impl FnOnce()) -> Result<()> {
    unload(guest)?;
    guest.sh(&format!("insmod {}", file(drivers)))?;
    guest.host.pci(0, PciAction::Offer)?;
    guest.sh("modprobe pci_test && udevadm settle")?;
    act();
    guest.host.pci(0, PciAction::Remove)?;
    unload(guest)?;
    guest
        .sh(&format!("insmod {}", file(Drivers::Rust)))
        .map(drop)
}

/// Runs a script so many times, which sets `start` and `end`. Gives the mean of the time between, in milliseconds.
fn mean(guest: &Guest, times: u32, script: &str) -> Result<f64> {
    let script = format!(
        "now() {{ echo ${{EPOCHREALTIME/./}}; }}; sum=0; for i in $(seq {times}); do {script}; \
         sum=$((sum + end - start)); done; echo $sum"
    );
    let text = guest.sh(&format!("bash -c '{script}'"))?;
    let microseconds: f64 = text.trim().parse()?;
    Ok(microseconds / f64::from(times) / 1e3)
}

/// From the loading of the module until the function is there. Its driver is bound by then.
pub fn probe(bench: &Bench<'_>, guest: &Guest, drivers: Drivers) -> Result<Vec<Value>> {
    let module = match drivers {
        Drivers::C => "hv_pci_stock",
        Drivers::Rust => "hv_pci",
    };
    let script = format!(
        "rmmod {module} || exit; file={}; start=$(now); insmod $file || exit; \
         until [ -e /sys/kernel/debug/pci_test/{ADDRESS} ]; do :; done; end=$(now)",
        file(drivers)
    );
    let time = mean(guest, times(bench), &script)?;
    Ok(vec![less("bus.probe", "ms", time)])
}

/// 64 vectors of MSI-X are allocated and requested.
pub fn vectors(bench: &Bench<'_>, guest: &Guest, _: Drivers) -> Result<Vec<Value>> {
    let times = times(bench);
    let created = || guest.host.counter("pci0.interrupts.created");
    let before = created()?;
    let script = format!(
        "cd /sys/kernel/debug/pci_test/{ADDRESS} || exit; start=$(now); echo vectors msix 64 64 >do || exit; \
         end=$(now); echo free >do || exit"
    );
    let time = mean(guest, times, &script)?;
    let created = (created()? - before) as f64 / f64::from(times);
    Ok(vec![
        less("bus.vectors.time", "ms", time),
        less("bus.vectors.created", "interrupts", created),
    ])
}
