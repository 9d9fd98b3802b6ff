// SPDX-License-Identifier: GPL-2.0

//! An NVM Express (NVMe) disk controller.
//!
//! [`NvmeDisk`] is a function for the virtual PCI bus that the `nvme` driver of Linux takes for real.
//! It has one namespace, whose blocks are in a [`Store`]: that outlives the controller, as a disk does
//! that is taken out and put in again.

#![forbid(unsafe_code)]

mod admin;
mod controller;
mod disk;
mod options;
mod prp;
mod queue;
mod statistics;
mod store;
#[cfg(test)]
mod tests;
mod wire;

pub use disk::{
    DiskOptions,
    NvmeDisk, //
};
pub use options::Options;
pub use store::Store;
