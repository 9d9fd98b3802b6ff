// SPDX-License-Identifier: GPL-2.0

//! A Microsoft Azure Network Adapter (MANA) virtual function.
//!
//! [`ManaVf`] is a function for the virtual PCI bus that the `mana` driver of Linux takes for real: it
//! sets up the hardware channel, creates its queues and sends and receives through them. Packets go to
//! and come from a port of the virtual switch.

#![forbid(unsafe_code)]

mod adapter;
mod queue;
mod statistics;
#[cfg(test)]
mod tests;
mod vf;
mod wire;

pub use vf::{
    ManaVf,
    Uplink,
    VfOptions, //
};
