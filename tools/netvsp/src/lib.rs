// SPDX-License-Identifier: GPL-2.0

//! The lab's synthetic network device and its virtual switch port.
//!
//! [`Nic`] is the device on the VMBus that the guest's hv_netvsc driver talks to: NVSP and RNDIS
//! of all versions that the driver knows. [`SwitchPort`] connects it, and the VF that belongs to
//! it, with a tap; see [`port`] for which frame goes which way.

mod config;
mod device;
pub mod frame;
mod poll;
pub mod port;
mod receive;
mod rndis;
pub mod rss;
pub mod tap;
mod transport;
mod worker;

#[cfg(test)]
mod tests;

pub use config::{instance_from_mac, Config, Fault, FaultAction, FaultPoint, Raw, Settings};
pub use device::{Nic, Status};
pub use frame::{Mac, TxOffload};
pub use hyperv_wire::nvsp::Version;
pub use port::{Delivery, RxFrame, SwitchPort, VfSink};
pub use tap::{TapError, Uplink};
