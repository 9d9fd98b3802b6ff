// SPDX-License-Identifier: GPL-2.0

//! NDIS objects carried by RNDIS: object identifiers, offload capabilities and parameters, RSS.
//!
//! Objects grew with the NDIS version; each carries its size, and a receiver takes what is there.
//! [`Offload::read`] and [`OffloadParameters::read`] fill the missing rest with zeros, which
//! means "not capable" and "no change".

use core::fmt;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, IntoBytes};

use crate::nvsp::Version;

/// What is wrong with an object of the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The data ends before the object does.
    Short {
        /// What was to be read.
        what: &'static str,
        /// Bytes it takes.
        need: usize,
        /// Bytes there are.
        have: usize,
    },
    /// Another type of object than the expected one.
    ObjectType(u8),
    /// A revision that does not exist.
    ObjectRevision(u8),
    /// The object's size is impossible or more than there is.
    ObjectSize {
        /// The size in the object.
        size: u16,
        /// Bytes there are.
        have: usize,
    },
    /// The named table is not inside the object, or has an impossible size.
    Table {
        /// Which table.
        what: &'static str,
        /// Its offset as stated.
        offset: u32,
        /// Its size as stated.
        size: u16,
    },
    /// The caller's buffer is too small for the object to build.
    BufferTooSmall,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Short { what, need, have } => {
                write!(f, "{what} too short: {have} bytes of {need}")
            }
            Self::ObjectType(found) => write!(f, "invalid NDIS objtype {found:#x}"),
            Self::ObjectRevision(found) => write!(f, "invalid NDIS objrev {found:x}"),
            Self::ObjectSize { size, have } => {
                write!(f, "invalid NDIS objsize {size}, data size {have}")
            }
            Self::Table { what, offset, size } => {
                write!(f, "{what} at {offset}, size {size}, not in the object")
            }
            Self::BufferTooSmall => f.write_str("buffer too small for the object"),
        }
    }
}

open_numbers! {
    /// Object identifier.
    Oid(u32) {
        /// List of supported identifiers.
        GEN_SUPPORTED_LIST = 0x0001_0101,
        /// State of the hardware.
        GEN_HARDWARE_STATUS = 0x0001_0102,
        /// Supported media.
        GEN_MEDIA_SUPPORTED = 0x0001_0103,
        /// Media in use.
        GEN_MEDIA_IN_USE = 0x0001_0104,
        /// Largest payload of a frame.
        GEN_MAXIMUM_FRAME_SIZE = 0x0001_0106,
        /// Speed in units of 100 bit/s.
        GEN_LINK_SPEED = 0x0001_0107,
        /// Vendor number.
        GEN_VENDOR_ID = 0x0001_010c,
        /// Vendor text.
        GEN_VENDOR_DESCRIPTION = 0x0001_010d,
        /// Which packets to receive, see [`PacketFilter`].
        GEN_CURRENT_PACKET_FILTER = 0x0001_010e,
        /// Largest frame.
        GEN_MAXIMUM_TOTAL_SIZE = 0x0001_0111,
        /// Zero if a cable is plugged in.
        GEN_MEDIA_CONNECT_STATUS = 0x0001_0114,
        /// Physical medium.
        GEN_PHYSICAL_MEDIUM = 0x0001_0202,
        /// See [`RssCapabilities`].
        GEN_RECEIVE_SCALE_CAPABILITIES = 0x0001_0203,
        /// See [`RssParameters`].
        GEN_RECEIVE_SCALE_PARAMETERS = 0x0001_0204,
        /// A parameter by name, see [`crate::rndis::ConfigParameter`].
        GEN_RNDIS_CONFIG_PARAMETER = 0x0001_021b,
        /// Frames sent.
        GEN_XMIT_OK = 0x0002_0101,
        /// Frames received.
        GEN_RCV_OK = 0x0002_0102,
        /// Name of the adapter, in UTF-16.
        GEN_FRIENDLY_NAME = 0x0002_0216,
        /// The MAC address given at manufacture.
        PERMANENT_ADDRESS = 0x0101_0101,
        /// The MAC address in use.
        CURRENT_ADDRESS = 0x0101_0102,
        /// Multicast addresses to receive.
        MULTICAST_LIST = 0x0101_0103,
        /// Most multicast addresses.
        MAXIMUM_LIST_SIZE = 0x0101_0104,
        /// See [`Offload`].
        TCP_OFFLOAD_CURRENT_CONFIG = 0xfc01_020b,
        /// See [`OffloadParameters`].
        TCP_OFFLOAD_PARAMETERS = 0xfc01_020c,
        /// See [`Offload`].
        TCP_OFFLOAD_HARDWARE_CAPABILITIES = 0xfc01_020d,
    }
}

bit_sets! {
    /// Bits of [`Oid::GEN_CURRENT_PACKET_FILTER`].
    PacketFilter(u32) {
        /// Packets to the device's MAC address.
        DIRECTED = 1 << 0,
        /// Packets to addresses of the multicast list.
        MULTICAST = 1 << 1,
        /// Packets to all multicast addresses.
        ALL_MULTICAST = 1 << 2,
        /// Packets to the broadcast address.
        BROADCAST = 1 << 3,
        /// All packets.
        PROMISCUOUS = 1 << 5,
    }
}

/// Answer to [`Oid::GEN_MEDIA_CONNECT_STATUS`]: a cable is plugged in.
pub const MEDIA_CONNECTED: u32 = 0;

/// Answer to [`Oid::GEN_MEDIA_CONNECT_STATUS`]: no cable is plugged in.
pub const MEDIA_DISCONNECTED: u32 = 1;

/// Link speeds are in units of so many bit/s.
pub const LINK_SPEED_UNIT: u32 = 100;

layouts! {
    /// What each object begins with.
    ObjectHeader {
        /// See [`ObjectHeader::DEFAULT`] and following.
        object_type: u8,
        /// Revision of the layout.
        revision: u8,
        /// Length of the object with this header.
        size: U16,
    }

    /// Checksum capabilities; bits of [`ChecksumOffload::TCP`] and following.
    ChecksumOffload {
        /// Encapsulations for IPv4 transmit.
        ipv4_tx_encapsulation: U32,
        /// Capabilities for IPv4 transmit.
        ipv4_tx: U32,
        /// Encapsulations for IPv4 receive.
        ipv4_rx_encapsulation: U32,
        /// Capabilities for IPv4 receive.
        ipv4_rx: U32,
        /// Encapsulations for IPv6 transmit.
        ipv6_tx_encapsulation: U32,
        /// Capabilities for IPv6 transmit.
        ipv6_tx: U32,
        /// Encapsulations for IPv6 receive.
        ipv6_rx_encapsulation: U32,
        /// Capabilities for IPv6 receive.
        ipv6_rx: U32,
    }

    /// Capabilities of the first version of large send offload.
    LargeSendV1Offload {
        /// Encapsulations.
        encapsulation: U32,
        /// Largest packet.
        max_size: U32,
        /// Fewest segments.
        min_segments: U32,
        /// Options.
        options: U32,
    }

    /// Capabilities of the first version of IPsec offload.
    IpsecV1Offload {
        /// Encapsulations.
        encapsulation: U32,
        /// Combined AH and ESP.
        ah_esp: U32,
        /// Combined transport and tunnel.
        transport_tunnel: U32,
        /// IPv4 options.
        ipv4_options: U32,
        /// Flags.
        flags: U32,
        /// AH.
        ipv4_ah: U32,
        /// ESP.
        ipv4_esp: U32,
    }

    /// Capabilities of the second version of large send offload.
    LargeSendV2Offload {
        /// Encapsulations for IPv4.
        ipv4_encapsulation: U32,
        /// Largest IPv4 packet.
        ipv4_max_size: U32,
        /// Fewest IPv4 segments.
        ipv4_min_segments: U32,
        /// Encapsulations for IPv6.
        ipv6_encapsulation: U32,
        /// Largest IPv6 packet.
        ipv6_max_size: U32,
        /// Fewest IPv6 segments.
        ipv6_min_segments: U32,
        /// [`LargeSendV2Offload::IPV6_EXTENSION_HEADERS`] and following.
        ipv6_options: U32,
    }

    /// Capabilities of the second version of IPsec offload.
    IpsecV2Offload {
        /// Encapsulations.
        encapsulation: U32,
        /// Ten flags of one byte, and one of padding.
        flags: [u8; 12],
        /// UDP encapsulated ESP.
        udp_esp: U32,
        /// Authentication.
        authentication: U32,
        /// Encryption.
        encryption: U32,
        /// Capacity.
        sa_caps: U32,
    }

    /// Whether received segments can be coalesced, and padding.
    RscOffload {
        /// IPv4.
        ipv4: u8,
        /// IPv6.
        ipv6: u8,
        /// Padding.
        padding: U16,
    }

    /// Capabilities for encapsulated packets.
    EncapsulationOffload {
        /// Flags.
        flags: U32,
        /// Longest header.
        max_header_size: U32,
    }

    /// Offload capabilities: [`Oid::TCP_OFFLOAD_HARDWARE_CAPABILITIES`].
    Offload {
        /// Type [`ObjectHeader::OFFLOAD`].
        header: ObjectHeader,
        /// Checksums.
        checksum: ChecksumOffload,
        /// Large send, first version.
        large_send_v1: LargeSendV1Offload,
        /// IPsec, first version.
        ipsec_v1: IpsecV1Offload,
        /// Large send, second version.
        large_send_v2: LargeSendV2Offload,
        /// Flags.
        flags: U32,
        /// IPsec, second version (NDIS 6.1).
        ipsec_v2: IpsecV2Offload,
        /// Receive segment coalescing (NDIS 6.30).
        rsc: RscOffload,
        /// Encapsulation (NDIS 6.30).
        encapsulation: EncapsulationOffload,
    }

    /// Offload parameters: [`Oid::TCP_OFFLOAD_PARAMETERS`]. Zero means "no change" everywhere;
    /// the other values are those of [`OffloadParameters::CHECKSUM_DISABLED`] and following.
    OffloadParameters {
        /// Type [`ObjectHeader::DEFAULT`].
        header: ObjectHeader,
        /// IPv4 header checksum.
        ipv4_checksum: u8,
        /// TCP checksum in IPv4.
        tcp_ipv4_checksum: u8,
        /// UDP checksum in IPv4.
        udp_ipv4_checksum: u8,
        /// TCP checksum in IPv6.
        tcp_ipv6_checksum: u8,
        /// UDP checksum in IPv6.
        udp_ipv6_checksum: u8,
        /// Large send, first version.
        large_send_v1: u8,
        /// IPsec, first version.
        ipsec_v1: u8,
        /// Large send, second version, IPv4.
        large_send_v2_ipv4: u8,
        /// Large send, second version, IPv6.
        large_send_v2_ipv6: u8,
        /// TCP chimney, IPv4.
        tcp_connection_ipv4: u8,
        /// TCP chimney, IPv6.
        tcp_connection_ipv6: u8,
        /// Padding.
        padding: u8,
        /// Flags.
        flags: U32,
        /// IPsec, second version.
        ipsec_v2: u8,
        /// IPsec, second version, IPv4.
        ipsec_v2_ipv4: u8,
        /// Receive segment coalescing, IPv4.
        rsc_ipv4: u8,
        /// Receive segment coalescing, IPv6.
        rsc_ipv6: u8,
        /// Encapsulated packets.
        encapsulated_packets: u8,
        /// Kinds of encapsulation.
        encapsulation_types: u8,
        /// Padding.
        padding2: [u8; 2],
    }

    /// RSS capabilities: [`Oid::GEN_RECEIVE_SCALE_CAPABILITIES`].
    RssCapabilities {
        /// Type [`ObjectHeader::RSS_CAPABILITIES`].
        header: ObjectHeader,
        /// [`RssCapabilities::HASH_TOEPLITZ`] and following.
        flags: U32,
        /// Number of interrupts.
        num_interrupts: U32,
        /// Number of receive queues.
        num_queues: U32,
        /// Most entries of an indirection table.
        num_table_entries: U16,
    }

    /// RSS parameters: [`Oid::GEN_RECEIVE_SCALE_PARAMETERS`]. Table and key lie at the given
    /// offsets from the beginning of this object.
    RssParameters {
        /// Type [`ObjectHeader::RSS_PARAMETERS`].
        header: ObjectHeader,
        /// [`RssParameters::DISABLE`] and following.
        flags: U16,
        /// Not used.
        base_cpu: U16,
        /// Hash function and types, see [`HashTypes`].
        hash_info: U32,
        /// Size of the indirection table in bytes.
        table_size: U16,
        /// Padding.
        padding: U16,
        /// Offset of the indirection table.
        table_offset: U32,
        /// Size of the key.
        key_size: U16,
        /// Padding.
        padding2: U16,
        /// Offset of the key.
        key_offset: U32,
        /// Offset of the processor masks.
        masks_offset: U32,
        /// Number of processor masks.
        num_masks: U32,
        /// Size of a processor mask.
        mask_size: U32,
    }
}

impl ObjectHeader {
    /// Type of objects without a type of their own.
    pub const DEFAULT: u8 = 0x80;
    /// Type of [`RssCapabilities`].
    pub const RSS_CAPABILITIES: u8 = 0x88;
    /// Type of [`RssParameters`].
    pub const RSS_PARAMETERS: u8 = 0x89;
    /// Type of [`Offload`].
    pub const OFFLOAD: u8 = 0xa7;

    /// Makes a header.
    pub fn new(object_type: u8, revision: u8, size: usize) -> Self {
        Self {
            object_type,
            revision,
            // Objects are far smaller than 64 KiB.
            size: U16::new(size as u16),
        }
    }

    /// Reads and checks the header of an object of the given type and least size. Returns the
    /// header and the object's bytes.
    fn read<'a>(
        bytes: &'a [u8],
        what: &'static str,
        object_type: u8,
        least: usize,
    ) -> Result<(Self, &'a [u8]), Error> {
        let (header, _) = Self::read_from_prefix(bytes).map_err(|_| Error::Short {
            what,
            need: size_of::<Self>(),
            have: bytes.len(),
        })?;
        if header.object_type != object_type {
            return Err(Error::ObjectType(header.object_type));
        }
        if header.revision == 0 {
            return Err(Error::ObjectRevision(0));
        }
        let size = header.size.get();
        let bad_size = Error::ObjectSize {
            size,
            have: bytes.len(),
        };
        let object = bytes.get(..usize::from(size)).ok_or(bad_size)?;
        if object.len() < least {
            return Err(bad_size);
        }
        Ok((header, object))
    }
}

/// The encapsulation that is plain Ethernet.
pub const ENCAPSULATION_8023: u32 = 2;

impl ChecksumOffload {
    /// IPv4 options, or IPv6 extension headers.
    pub const IP_OPTIONS: u32 = 0x001;
    /// TCP options.
    pub const TCP_OPTIONS: u32 = 0x004;
    /// TCP.
    pub const TCP: u32 = 0x010;
    /// UDP.
    pub const UDP: u32 = 0x040;
    /// IPv4 header.
    pub const IP_HEADER: u32 = 0x100;
}

impl LargeSendV2Offload {
    /// IPv6 extension headers are allowed.
    pub const IPV6_EXTENSION_HEADERS: u32 = 0x001;
    /// TCP options are allowed.
    pub const IPV6_TCP_OPTIONS: u32 = 0x004;
}

impl Offload {
    /// Size with NDIS 6.0.
    pub const SIZE_6_0: usize = 112;
    /// Size with NDIS 6.1.
    pub const SIZE_6_1: usize = 144;

    /// Revision and size that belong to a version of NVSP.
    pub fn revision(version: Version) -> (u8, usize) {
        if version >= Version::V5 {
            (3, size_of::<Self>())
        } else if version >= Version::V4 {
            (2, Self::SIZE_6_1)
        } else {
            (1, Self::SIZE_6_0)
        }
    }

    /// The empty object with which a driver asks for the capabilities. Its first bytes, as many
    /// as its header says, are the information of the query.
    pub fn request(version: Version) -> Self {
        let (revision, size) = Self::revision(version);
        Self {
            header: ObjectHeader::new(ObjectHeader::OFFLOAD, revision, size),
            ..Self::default()
        }
    }

    /// Reads capabilities of any revision.
    pub fn read(bytes: &[u8]) -> Result<Self, Error> {
        let (_, object) = ObjectHeader::read(
            bytes,
            "offload capabilities",
            ObjectHeader::OFFLOAD,
            Self::SIZE_6_0,
        )?;
        Ok(read_padded(object))
    }
}

impl OffloadParameters {
    /// Size up to version 4 of NVSP.
    pub const SIZE_V4: usize = 22;

    /// Checksum: neither way.
    pub const CHECKSUM_DISABLED: u8 = 1;
    /// Checksum: transmit only.
    pub const CHECKSUM_TX: u8 = 2;
    /// Checksum: receive only.
    pub const CHECKSUM_RX: u8 = 3;
    /// Checksum: both ways.
    pub const CHECKSUM_TX_RX: u8 = 4;
    /// Large send: off.
    pub const LARGE_SEND_DISABLED: u8 = 1;
    /// Large send: on.
    pub const LARGE_SEND_ENABLED: u8 = 2;
    /// Receive segment coalescing: off.
    pub const RSC_DISABLED: u8 = 1;
    /// Receive segment coalescing: on.
    pub const RSC_ENABLED: u8 = 2;

    /// Sets the header for a version of NVSP and returns how many bytes of the object to send.
    pub fn finish(&mut self, version: Version) -> usize {
        let size = if version <= Version::V4 {
            Self::SIZE_V4
        } else {
            size_of::<Self>()
        };
        self.header = ObjectHeader::new(ObjectHeader::DEFAULT, 3, size);
        size
    }

    /// Reads parameters of any revision.
    pub fn read(bytes: &[u8]) -> Result<Self, Error> {
        // The last field of the first revision is `flags`.
        const LEAST: usize = 20;
        let (_, object) =
            ObjectHeader::read(bytes, "offload parameters", ObjectHeader::DEFAULT, LEAST)?;
        Ok(read_padded(object))
    }
}

/// Reads what there is of a layout; the rest is zero.
fn read_padded<T: FromBytes + IntoBytes + Default>(bytes: &[u8]) -> T {
    let mut value = T::default();
    for (to, from) in value.as_mut_bytes().iter_mut().zip(bytes) {
        *to = *from;
    }
    value
}

impl RssCapabilities {
    /// Revision of the layout.
    pub const REVISION: u8 = 2;
    /// The Toeplitz hash is supported.
    pub const HASH_TOEPLITZ: u32 = 1;
    /// TCP over IPv4 is hashed.
    pub const HASH_TCP_IPV4: u32 = 0x100;
    /// TCP over IPv6 is hashed.
    pub const HASH_TCP_IPV6: u32 = 0x200;

    /// The empty object with which a driver asks for the capabilities.
    pub fn request() -> Self {
        Self {
            header: ObjectHeader::new(
                ObjectHeader::RSS_CAPABILITIES,
                Self::REVISION,
                size_of::<Self>(),
            ),
            ..Self::default()
        }
    }

    /// Reads the capabilities. An older revision has no table size.
    pub fn read(bytes: &[u8]) -> Result<Self, Error> {
        const LEAST: usize = 16;
        let (_, object) = ObjectHeader::read(
            bytes,
            "RSS capabilities",
            ObjectHeader::RSS_CAPABILITIES,
            LEAST,
        )?;
        Ok(read_padded(object))
    }
}

bit_sets! {
    /// Hash function and types of [`RssParameters::hash_info`].
    HashTypes(u32) {
        /// The Toeplitz function.
        TOEPLITZ = 0x0001,
        /// Addresses of IPv4 packets.
        IPV4 = 0x0100,
        /// Addresses and ports of TCP over IPv4.
        TCP_IPV4 = 0x0200,
        /// Addresses of IPv6 packets.
        IPV6 = 0x0400,
        /// Addresses and ports of TCP over IPv6.
        TCP_IPV6 = 0x1000,
    }
}

/// Size of the key.
pub const HASH_KEY_SIZE: usize = 40;

/// Most entries of an indirection table.
pub const MAX_TABLE_ENTRIES: usize = 256;

/// Parsed [`RssParameters`].
#[derive(Clone, Debug)]
pub struct Rss<'a> {
    /// [`RssParameters::DISABLE`] and following.
    pub flags: u16,
    /// Hash function and types.
    pub hash_types: HashTypes,
    /// The indirection table, 32-bit entries. Iterate with [`Rss::entries`].
    table: &'a [u8],
    /// The key.
    pub key: &'a [u8],
}

impl Rss<'_> {
    /// The entries of the indirection table: a channel's index for each value of the hash modulo
    /// the number of entries. They are not checked.
    pub fn entries(&self) -> impl ExactSizeIterator<Item = u32> + '_ {
        self.table.chunks_exact(4).map(|entry| match *entry {
            [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
            // `chunks_exact` gives no other length.
            _ => 0,
        })
    }

    /// Whether RSS shall be off.
    pub fn is_disabled(&self) -> bool {
        self.flags & RssParameters::DISABLE != 0
    }
}

impl RssParameters {
    /// Revision of the layout.
    pub const REVISION: u8 = 2;
    /// The base CPU stays.
    pub const BASE_CPU_UNCHANGED: u16 = 0x0001;
    /// The hash function and types stay.
    pub const HASH_INFO_UNCHANGED: u16 = 0x0002;
    /// The indirection table stays.
    pub const TABLE_UNCHANGED: u16 = 0x0004;
    /// The key stays.
    pub const KEY_UNCHANGED: u16 = 0x0008;
    /// RSS is turned off.
    pub const DISABLE: u16 = 0x0010;

    /// Writes the parameters with `entries` as indirection table, and returns their length.
    pub fn encode(
        flags: u16,
        hash_types: HashTypes,
        entries: &[u16],
        key: &[u8; HASH_KEY_SIZE],
        buffer: &mut [u8],
    ) -> Result<usize, Error> {
        if entries.len() > MAX_TABLE_ENTRIES {
            return Err(Error::BufferTooSmall);
        }
        let fixed = size_of::<Self>();
        let table_size = entries.len() * 4;
        let length = fixed + table_size + HASH_KEY_SIZE;
        let object = buffer.get_mut(..length).ok_or(Error::BufferTooSmall)?;
        let (head, rest) = object.split_at_mut(fixed);
        let (to_table, to_key) = rest.split_at_mut(table_size);
        head.copy_from_slice(
            Self {
                header: ObjectHeader::new(ObjectHeader::RSS_PARAMETERS, Self::REVISION, fixed),
                flags: U16::new(flags),
                hash_info: U32::new(hash_types.0),
                table_size: U16::new(table_size as u16),
                table_offset: U32::new(fixed as u32),
                key_size: U16::new(HASH_KEY_SIZE as u16),
                key_offset: U32::new((fixed + table_size) as u32),
                ..Self::default()
            }
            .as_bytes(),
        );
        for (to, &entry) in to_table.chunks_exact_mut(4).zip(entries) {
            to.copy_from_slice(&u32::from(entry).to_le_bytes());
        }
        to_key.copy_from_slice(key);
        Ok(length)
    }

    /// Reads the parameters with table and key.
    pub fn read(bytes: &[u8]) -> Result<Rss<'_>, Error> {
        // Revision 1 ends before the processor masks.
        const LEAST: usize = 28;
        let (_, object) =
            ObjectHeader::read(bytes, "RSS parameters", ObjectHeader::RSS_PARAMETERS, LEAST)?;
        let head: Self = read_padded(object);
        // The object's size does not count table and key, which follow it.
        let part = |what, offset: U32, size: U16, most: usize| -> Result<&[u8], Error> {
            let (start, length) = (offset.get() as usize, usize::from(size.get()));
            if length == 0 {
                return Ok(&[]);
            }
            start
                .checked_add(length)
                .filter(|_| start >= LEAST && length <= most)
                .and_then(|end| bytes.get(start..end))
                .ok_or(Error::Table {
                    what,
                    offset: offset.get(),
                    size: size.get(),
                })
        };
        Ok(Rss {
            flags: head.flags.get(),
            hash_types: HashTypes(head.hash_info.get()),
            table: part(
                "indirection table",
                head.table_offset,
                head.table_size,
                MAX_TABLE_ENTRIES * 4,
            )?,
            key: part("hash key", head.key_offset, head.key_size, HASH_KEY_SIZE)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::mem::offset_of;

    #[test]
    fn layouts_are_those_of_the_protocol() {
        assert_eq!(size_of::<Offload>(), 156);
        assert_eq!(offset_of!(Offload, ipsec_v2), Offload::SIZE_6_0);
        assert_eq!(offset_of!(Offload, rsc), Offload::SIZE_6_1);
        assert_eq!(offset_of!(Offload, large_send_v2), 80);
        assert_eq!(size_of::<OffloadParameters>(), 28);
        assert_eq!(offset_of!(OffloadParameters, flags), 16);
        assert_eq!(offset_of!(OffloadParameters, rsc_ipv4), 22);
        assert_eq!(size_of::<RssCapabilities>(), 18);
        assert_eq!(size_of::<RssParameters>(), 40);
        assert_eq!(offset_of!(RssParameters, table_offset), 16);
        assert_eq!(offset_of!(RssParameters, key_offset), 24);
    }

    #[test]
    fn offload_sizes() {
        let mut offload = Offload::request(Version::V61);
        offload.rsc.ipv6 = 1;
        offload.ipsec_v2.encapsulation = U32::new(7);
        let full = offload.as_bytes();
        assert_eq!(Offload::read(full), Ok(offload));
        // Size in the object, bytes there are, outcome: has RSC, or the error.
        let cases = [
            (156, 156, Ok(true)),
            (144, 144, Ok(false)),
            (144, 156, Ok(false)),
            (112, 112, Ok(false)),
            (111, 156, Err(())),
            (112, 111, Err(())),
            (156, 155, Err(())),
            (0, 156, Err(())),
            (u16::MAX, 156, Err(())),
        ];
        for (size, have, outcome) in cases {
            let mut bytes = [0; 156];
            bytes.copy_from_slice(full);
            bytes[2..4].copy_from_slice(&size.to_le_bytes());
            let read = Offload::read(&bytes[..have]);
            assert_eq!(
                read.map(|o| o.rsc.ipv6 == 1).map_err(|_| ()),
                outcome,
                "size {size}, {have} bytes"
            );
        }
        let mut other = [0; 156];
        other.copy_from_slice(full);
        other[0] = 0x80;
        assert_eq!(Offload::read(&other), Err(Error::ObjectType(0x80)));
        other[0] = 0xa7;
        other[1] = 0;
        assert_eq!(Offload::read(&other), Err(Error::ObjectRevision(0)));
        assert!(Offload::read(&[0xa7, 1, 4]).is_err());
    }

    #[test]
    fn requests_fit_the_version() {
        for (version, revision, size) in [
            (Version::V1, 1, 112),
            (Version::V2, 1, 112),
            (Version::V4, 2, 144),
            (Version::V5, 3, 156),
            (Version::V61, 3, 156),
        ] {
            let header = Offload::request(version).header;
            assert_eq!((header.revision, header.size.get()), (revision, size));
        }
        let mut parameters = OffloadParameters::default();
        assert_eq!(parameters.finish(Version::V4), 22);
        assert_eq!(
            OffloadParameters::read(&parameters.as_bytes()[..22]),
            Ok(parameters)
        );
        assert!(OffloadParameters::read(&parameters.as_bytes()[..21]).is_err());
        assert_eq!(parameters.finish(Version::V5), 28);
        assert!(OffloadParameters::read(parameters.as_bytes()).is_ok());
    }

    #[test]
    fn rss_capabilities_round_trip() {
        let mut caps = RssCapabilities::request();
        caps.num_queues = U32::new(8);
        caps.num_table_entries = U16::new(128);
        assert_eq!(RssCapabilities::read(caps.as_bytes()), Ok(caps));
        assert!(RssCapabilities::read(&caps.as_bytes()[..17]).is_err());
        caps.header.size = U16::new(16);
        let old = RssCapabilities::read(caps.as_bytes()).unwrap();
        assert_eq!(old.num_table_entries.get(), 0);
    }

    #[test]
    fn rss_parameters_round_trip() {
        let key = core::array::from_fn(|i| i as u8);
        let mut buffer = [0; 40 + 16 + 40];
        let types = HashTypes::TOEPLITZ.with(HashTypes::IPV4);
        let length = RssParameters::encode(0, types, &[0, 1, 2, 3], &key, &mut buffer).unwrap();
        assert_eq!(length, buffer.len());
        let rss = RssParameters::read(&buffer).unwrap();
        assert!(rss.entries().eq([0, 1, 2, 3]));
        assert_eq!(rss.key, &key);
        assert_eq!(rss.hash_types, types);
        assert!(!rss.is_disabled());
        assert!(RssParameters::encode(0, types, &[0; 5], &key, &mut buffer).is_err());
        assert!(RssParameters::encode(0, types, &[0; 257], &key, &mut [0; 2048]).is_err());

        assert!(RssParameters::read(&buffer[..length - 1]).is_err());
        // Field, value, and whether it is right: table size and offset, key size and offset.
        let cases: [(usize, u32, bool); 10] = [
            (16, 40, true),
            (16, 80, true),
            (16, 81, false),
            (16, 27, false),
            (16, u32::MAX, false),
            (24, 56, true),
            (24, 57, false),
            (24, 27, false),
            (24, u32::MAX, false),
            (24, 0, false),
        ];
        for (field, value, right) in cases {
            let mut bytes = buffer;
            bytes[field..field + 4].copy_from_slice(&value.to_le_bytes());
            assert_eq!(
                RssParameters::read(&bytes).is_ok(),
                right,
                "{field}: {value}"
            );
        }
        // A key longer than a key.
        let mut bytes = buffer;
        bytes[20] = 41;
        bytes[24] = 40;
        assert!(RssParameters::read(&bytes).is_err());
    }
}
