// SPDX-License-Identifier: GPL-2.0

//! The virtual PCI bus of the lab host.
//!
//! A [`Bus`] speaks protocol 1.1 to 1.4 with the guest, shows it configuration space through the
//! configuration window, maps BARs where the guest wants them and delivers MSI and MSI-X. Device
//! models implement [`PciFunction`].

#![forbid(unsafe_code)]

mod bus;
mod config;
mod device;
mod faults;
mod function;
mod interrupts;
mod msi;
#[cfg(test)]
mod tests;

pub use bus::{
    Bus,
    BusCounters,
    BusOptions,
    Outgoing,
    RetargetRouter, //
};
pub use device::VpciDevice;
pub use faults::{
    FaultAction,
    Faults, //
};
pub use function::{
    Bar,
    Description,
    MsixLayout,
    PciFunction, //
};
pub use interrupts::{
    InterruptCounters,
    SignalMsi, //
};
pub use msi::InterruptSender;
