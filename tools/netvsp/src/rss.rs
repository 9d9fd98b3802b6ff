// SPDX-License-Identifier: GPL-2.0

//! Receive side scaling: the Toeplitz hash and the distribution of flows to channels.

use hyperv_wire::ndis::{HashTypes, Rss, RssParameters, HASH_KEY_SIZE};

/// What goes into the hash: at most two IPv6 addresses and two ports.
#[derive(Clone, Copy, Debug)]
pub struct Input {
    bytes: [u8; 36],
    length: usize,
}

impl Input {
    /// Addresses, source first, and ports, source first, or nothing.
    pub(crate) fn new(addresses: &[u8], ports: &[u8]) -> Self {
        let mut bytes = [0; 36];
        let length = addresses.len() + ports.len();
        bytes[..addresses.len()].copy_from_slice(addresses);
        bytes[addresses.len()..length].copy_from_slice(ports);
        Self { bytes, length }
    }
}

/// Kinds of packets that are hashed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Types {
    /// IPv4, by addresses.
    pub ipv4: bool,
    /// TCP over IPv4, by addresses and ports.
    pub tcp_ipv4: bool,
    /// IPv6, by addresses.
    pub ipv6: bool,
    /// TCP over IPv6, by addresses and ports.
    pub tcp_ipv6: bool,
}

impl From<HashTypes> for Types {
    fn from(types: HashTypes) -> Self {
        Self {
            ipv4: types.contains(HashTypes::IPV4),
            tcp_ipv4: types.contains(HashTypes::TCP_IPV4),
            ipv6: types.contains(HashTypes::IPV6),
            tcp_ipv6: types.contains(HashTypes::TCP_IPV6),
        }
    }
}

/// The Toeplitz hash: the sum (exclusive or) of the 32 bits of key that begin at each bit of the
/// input that is set.
pub fn toeplitz(key: &[u8; HASH_KEY_SIZE], input: &Input) -> u32 {
    let mut window = u32::from_be_bytes([key[0], key[1], key[2], key[3]]);
    let mut hash = 0;
    for (i, &byte) in input.bytes[..input.length].iter().enumerate() {
        let next = key.get(i + 4).copied().unwrap_or(0);
        for bit in (0..8).rev() {
            if (byte >> bit) & 1 != 0 {
                hash ^= window;
            }
            window = (window << 1) | u32::from((next >> bit) & 1);
        }
    }
    hash
}

/// The distribution that the guest has asked for.
#[derive(Clone, Debug)]
pub struct Distribution {
    types: Types,
    key: [u8; HASH_KEY_SIZE],
    table: Vec<u32>,
}

/// Parameters that make no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadParameters {
    /// Another hash function than Toeplitz.
    #[error("unknown hash function")]
    Function,
    /// The key has another length than 40 bytes.
    #[error("hash key of {0} bytes")]
    Key(usize),
    /// A table without entries, or whose size is no power of two.
    #[error("indirection table of {0} entries")]
    Table(usize),
    /// A table with a channel that there is not.
    #[error("channel {0} in the indirection table")]
    Channel(u32),
}

impl Distribution {
    /// What results from `old` and new parameters of the guest; `None` if RSS is off then.
    pub fn update(
        old: Option<&Self>,
        parameters: &Rss<'_>,
        num_channels: u32,
    ) -> Result<Option<Self>, BadParameters> {
        if parameters.is_disabled() {
            return Ok(None);
        }
        let keeps = |flag| (parameters.flags & flag != 0).then_some(old).flatten();
        let types = match keeps(RssParameters::HASH_INFO_UNCHANGED) {
            Some(old) => old.types,
            None if !parameters.hash_types.contains(HashTypes::TOEPLITZ) => {
                return Err(BadParameters::Function)
            }
            None => parameters.hash_types.into(),
        };
        let key = match keeps(RssParameters::KEY_UNCHANGED) {
            Some(old) => old.key,
            None => parameters
                .key
                .try_into()
                .map_err(|_| BadParameters::Key(parameters.key.len()))?,
        };
        let table = match keeps(RssParameters::TABLE_UNCHANGED) {
            Some(old) => old.table.clone(),
            None => parameters.entries().collect(),
        };
        if !table.len().is_power_of_two() {
            return Err(BadParameters::Table(table.len()));
        }
        if let Some(&channel) = table.iter().find(|&&channel| channel >= num_channels) {
            return Err(BadParameters::Channel(channel));
        }
        Ok(Some(Self { types, key, table }))
    }

    /// Key and table, for the message log.
    pub(crate) fn describe(&self) -> String {
        let key = self.key.map(|byte| format!("{byte:02x}")).join(":");
        let used: std::collections::BTreeSet<_> = self.table.iter().collect();
        format!("entries={} channels={used:?} key={key}", self.table.len())
    }

    /// Hash of a frame and the channel it belongs to; `None` if the frame is not of a kind that
    /// is hashed.
    pub fn classify(&self, frame: &[u8]) -> Option<(u32, u32)> {
        let input = crate::frame::hash_input(frame, self.types)?;
        let hash = toeplitz(&self.key, &input);
        // The length is a power of two, so at least one.
        let channel = self.table[hash as usize & (self.table.len() - 1)];
        Some((hash, channel))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: [u8; HASH_KEY_SIZE] = [
        0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f,
        0xb0, 0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30,
        0xf2, 0x0c, 0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
    ];

    /// The verification suite that comes with the definition of the hash.
    #[test]
    fn known_hashes() {
        // Source and destination address, source and destination port, hash of addresses, hash
        // with ports.
        let cases = [
            (
                [66, 9, 149, 187],
                [161, 142, 100, 80],
                2794,
                1766,
                0x323e_8fc2,
                0x51cc_c178,
            ),
            (
                [199, 92, 111, 2],
                [65, 69, 140, 83],
                14230,
                4739,
                0xd718_262a,
                0xc626_b0ea,
            ),
            (
                [24, 19, 198, 95],
                [12, 22, 207, 184],
                12898,
                38024,
                0xd2d0_a5de,
                0x5c2b_394a,
            ),
        ];
        for (source, destination, from, to, by_addresses, by_ports) in cases {
            let addresses = [source, destination].concat();
            let ports = [u16::to_be_bytes(from), u16::to_be_bytes(to)].concat();
            assert_eq!(toeplitz(&KEY, &Input::new(&addresses, &[])), by_addresses);
            assert_eq!(toeplitz(&KEY, &Input::new(&addresses, &ports)), by_ports);
        }
        let destination = [
            0x3f, 0xfe, 0x25, 0x01, 0x02, 0x00, 0x00, 0x03, 0, 0, 0, 0, 0, 0, 0, 1,
        ];
        let source = [
            0x3f, 0xfe, 0x25, 0x01, 0x02, 0x00, 0x1f, 0xff, 0, 0, 0, 0, 0, 0, 0, 7,
        ];
        let addresses = [source, destination].concat();
        let ports = [u16::to_be_bytes(2794), u16::to_be_bytes(1766)].concat();
        assert_eq!(toeplitz(&KEY, &Input::new(&addresses, &[])), 0x2cc1_8cd5);
        assert_eq!(toeplitz(&KEY, &Input::new(&addresses, &ports)), 0x4020_7d3d);
    }

    fn update(
        old: Option<&Distribution>,
        flags: u16,
        table: &[u16],
        channels: u32,
    ) -> Result<Option<Distribution>, BadParameters> {
        let mut buffer = [0; 2048];
        let types = HashTypes::TOEPLITZ.with(HashTypes::TCP_IPV4);
        let length = RssParameters::encode(flags, types, table, &KEY, &mut buffer).unwrap();
        Distribution::update(
            old,
            &RssParameters::read(&buffer[..length]).unwrap(),
            channels,
        )
    }

    #[test]
    fn parameters_are_checked() {
        assert!(update(None, RssParameters::DISABLE, &[9], 1)
            .unwrap()
            .is_none());
        let good = update(None, 0, &[0, 1, 0, 1], 2).unwrap().unwrap();
        assert_eq!(
            update(None, 0, &[0, 1, 2, 1], 2).err(),
            Some(BadParameters::Channel(2))
        );
        assert_eq!(update(None, 0, &[], 2).err(), Some(BadParameters::Table(0)));
        assert_eq!(
            update(None, 0, &[0, 0, 0], 2).err(),
            Some(BadParameters::Table(3))
        );
        let kept = update(Some(&good), RssParameters::TABLE_UNCHANGED, &[0], 2);
        assert_eq!(kept.unwrap().unwrap().table, [0, 1, 0, 1]);
        // Nothing to keep: the new table counts.
        let fresh = update(None, RssParameters::TABLE_UNCHANGED, &[0], 2);
        assert_eq!(fresh.unwrap().unwrap().table, [0]);
    }

    #[test]
    fn frames_are_classified() {
        use crate::frame::{tests::tcp_frame, Network};
        let distribution = update(None, 0, &[0, 1, 2, 3], 4).unwrap().unwrap();
        let frame = tcp_frame(Network::V4, 0x10, &[0; 10]);
        let (hash, channel) = distribution.classify(&frame).unwrap();
        assert_eq!(channel, hash & 3);
        let mut tagged = frame;
        tagged.splice(12..12, crate::frame::vlan_tag(7));
        assert_eq!(distribution.classify(&tagged), Some((hash, channel)));
        // Not among the types.
        let frame = tcp_frame(Network::V6, 0x10, &[0; 10]);
        assert_eq!(distribution.classify(&frame), None);
    }
}
