// SPDX-License-Identifier: GPL-2.0

//! Hyper-V wire formats, shared by the drivers and the lab host.
//!
//! Structures are byte images: every multi-byte field is an explicitly little-endian, unaligned
//! integer, so that any byte slice of sufficient length can be viewed as one. Values that the peer
//! chooses are plain integers with named constants, never Rust enums: an unknown value is a value,
//! not undefined behaviour and not an early error.
//!
//! The crate has no I/O, no allocation and no unsafe code. It is built by cargo and by kbuild.

// kbuild gives this attribute itself, on the command line.
#![cfg_attr(not(MODULE), no_std)]
#![forbid(unsafe_code)]
#![warn(missing_docs)]

#[cfg(test)]
extern crate std;

#[macro_use]
mod macros;

pub mod guid;
pub mod hypercall;
pub mod ndis;
pub mod nvsp;
pub mod ring;
pub mod rndis;
pub mod spi;
pub mod vmbus;
pub mod vpci;

pub use guid::Guid;
