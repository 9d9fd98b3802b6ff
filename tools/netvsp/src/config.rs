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

/// What the host does otherwise than usually; `None` is as usual. What is negotiated takes effect
/// when the guest's driver connects the next time, the rest at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Size of the receive buffer's sections.
    pub receive_section_size: Option<u32>,
    /// Number of the receive buffer's sections that the guest is told of.
    pub receive_section_count: Option<u32>,
    /// Where the receive buffer's sections begin, as the guest is told.
    pub receive_section_offset: Option<u32>,
    /// Number of groups of sections in the receive buffer, as the guest is told.
    pub receive_groups: Option<u32>,
    /// Size of the send buffer's sections.
    pub send_section_size: Option<u32>,
    /// Most subchannels to grant.
    pub subchannels: Option<u32>,
    /// Checksums in IPv4 that the host offers to compute ([`ndis::ChecksumOffload`]).
    pub checksum_v4: Option<u32>,
    /// The same in IPv6.
    pub checksum_v6: Option<u32>,
    /// Largest packet for large send offload in IPv4; zero: not offered.
    pub large_send_v4: Option<u32>,
    /// The same in IPv6.
    pub large_send_v6: Option<u32>,
    /// Options of large send offload in IPv6 ([`ndis::LargeSendV2Offload`]).
    pub large_send_v6_options: Option<u32>,
    /// Receive segment coalescing: bit 0 for IPv4, bit 1 for IPv6.
    pub rsc: Option<u32>,
    /// Alignment of packets in one NVSP message, as a power of two.
    pub packet_alignment: Option<u32>,
    /// Most packets in one NVSP message.
    pub packets_per_message: Option<u32>,
    /// Entries of the RSS indirection table.
    pub rss_entries: Option<u32>,
    /// Status of the completions of RNDIS packets.
    pub packet_status: Option<u32>,
    /// Anything but zero: packets stay in the guest's rings.
    pub hold_packets: Option<u32>,
    /// Anything but zero: packets with frames are taken and completed when this ends.
    pub hold_completions: Option<u32>,
    /// Anything but zero: each frame from the guest is a line of the message log.
    pub log_frames: Option<u32>,
}

impl Settings {
    /// Whether a setting that is either on or off is on.
    pub(crate) fn is_on(setting: Option<u32>) -> bool {
        setting.is_some_and(|value| value != 0)
    }
}

/// Something that the host sends to the guest's driver as it is, right or wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Raw {
    /// An NVSP message.
    Nvsp(Vec<u8>),
    /// A completion of this transaction.
    Completion(u64, Vec<u8>),
    /// A packet with RNDIS messages, one a section of the receive buffer.
    Rndis {
        /// As control messages.
        control: bool,
        /// The messages.
        messages: Vec<Vec<u8>>,
    },
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
    /// The request is refused: that for a buffer or subchannels, the opening of one, and an RNDIS
    /// SET.
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
