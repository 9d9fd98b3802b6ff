// SPDX-License-Identifier: GPL-2.0

//! What a NIC is like, and faults that it can be told to have.

use std::time::Duration;

use hyperv_wire::{ndis, nvsp, rndis};
use vmbus_host::Guid;

use crate::frame::Mac;

/// A NIC.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name for log lines and counters, such as `net0`.
    pub name: String,
    /// Permanent MAC address.
    pub mac: Mac,
    /// Instance of the VMBus device; see [`instance_from_mac`].
    pub instance: Guid,
    /// Newest version of NVSP to accept.
    pub max_version: nvsp::Version,
    /// Most channels, the primary one included.
    pub max_channels: u16,
    /// Link speed in Mbit/s.
    pub link_speed: u32,
    /// Name of the adapter.
    pub friendly_name: String,
    /// Offer checksum offload.
    pub checksum: bool,
    /// Offer large send offload. Guests use it only with checksum offload.
    pub large_send: bool,
    /// Offer receive segment coalescing, from version 6.1 on.
    pub rsc: bool,
}

impl Config {
    /// A NIC as on Azure.
    pub fn new(name: &str, mac: Mac) -> Self {
        Self {
            name: name.to_owned(),
            mac,
            instance: instance_from_mac(&mac),
            max_version: nvsp::Version::V61,
            max_channels: 64,
            link_speed: 50_000,
            // What a host says if nobody has chosen a name; drivers ignore it.
            friendly_name: "Network Adapter".to_owned(),
            checksum: true,
            large_send: true,
            rsc: true,
        }
    }
}

/// The instance that a NIC has on Azure: its MAC address, repeated.
pub fn instance_from_mac(mac: &Mac) -> Guid {
    let [a, b, c, d, e, f] = *mac;
    Guid::new(
        u32::from_be_bytes([a, b, c, d]),
        u16::from_be_bytes([e, f]),
        u16::from_be_bytes([a, b]),
        [c, d, e, f, a, b, c, d],
    )
}

/// A request of the guest that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultPoint {
    /// The answer to an NVSP message.
    Nvsp(nvsp::MessageType),
    /// The answer to an RNDIS message.
    Rndis(rndis::MessageType),
    /// The answer to a query or set of an object.
    Object(ndis::Oid),
    /// The opening of a subchannel.
    SubchannelOpen,
}

/// What goes wrong with an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultAction {
    /// It is never sent.
    Mute,
    /// It is sent later.
    Delay(Duration),
    /// It is cut after so many bytes.
    Truncate(usize),
    /// It is sent twice.
    Duplicate,
    /// The request is refused: that for a buffer or subchannels, and the opening of one.
    Refuse,
}

/// A fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Where.
    pub point: FaultPoint,
    /// What.
    pub action: FaultAction,
    /// How many times.
    pub times: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instance_is_that_of_azure() {
        let instance = instance_from_mac(&[0x60, 0x45, 0xbd, 0xe9, 0x60, 0xa3]);
        assert_eq!(instance.to_string(), "6045bde9-60a3-6045-bde9-60a36045bde9");
    }
}
