// SPDX-License-Identifier: GPL-2.0

//! VMBus: the control messages between guest and host, and the packets in a channel's rings.
//!
//! Control messages travel as SynIC messages (at most [`MAX_MESSAGE_LEN`] bytes of payload): a
//! [`MessageHeader`] and one of the message bodies below. Packets travel in rings, see
//! [`crate::ring`].

use core::fmt;

use zerocopy::{
    little_endian::{
        U16,
        U32,
        U64, //
    },
    FromBytes,
    Immutable,
    IntoBytes,
    KnownLayout,
    Unaligned, //
};

use crate::Guid;

/// Size of a Hyper-V page, whatever the guest's page size.
pub const PAGE_SIZE: u32 = 4096;

/// Payload bytes of one SynIC message.
pub const MAX_MESSAGE_LEN: usize = 240;

/// SynIC message type of VMBus control messages.
pub const SYNIC_MESSAGE_TYPE: u32 = 1;

/// The synthetic interrupt source that Linux and older hosts use for VMBus.
pub const DEFAULT_SINT: u8 = 2;

/// Number of event flags of one synthetic interrupt source, and so the limit of channel relids.
pub const EVENT_FLAG_COUNT: u32 = 2048;

/// Connection id for control messages of protocols before 5.0.
pub const MESSAGE_CONNECTION_ID: u32 = 1;

/// Connection id of [`InitiateContact`] from protocol 5.0 on.
pub const MESSAGE_CONNECTION_ID_V5: u32 = 4;

/// Connection id shared by all channels whose interrupt is not dedicated: the guest marks the
/// channel in the interrupt page first.
pub const EVENT_CONNECTION_ID: u32 = 2;

/// Bytes that a device defines in an offer, and that a guest passes on open.
pub const USER_DEFINED_LEN: usize = 120;

/// Class GUIDs of the device types this project knows.
pub mod class {
    use crate::Guid;

    /// Synthetic network device.
    pub const NETWORK: Guid = Guid::new(
        0xf8615163,
        0xdf3e,
        0x46c5,
        [0x91, 0x3f, 0xf2, 0xd2, 0xf9, 0x65, 0xed, 0x0e],
    );

    /// Virtual PCI bus.
    pub const PCI: Guid = Guid::new(
        0x44c4f61d,
        0x4444,
        0x4400,
        [0x9d, 0x52, 0x80, 0x2e, 0x27, 0xed, 0xe1, 0x9f],
    );
}

/// A protocol version: major number in the upper half, minor number in the lower half.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(pub u32);

impl Version {
    /// Windows 8, Server 2012.
    pub const V2_4: Self = Self::new(2, 4);
    /// Windows 8.1, Server 2012 R2.
    pub const V3_0: Self = Self::new(3, 0);
    /// Windows 10.
    pub const V4_0: Self = Self::new(4, 0);
    /// Windows 10 RS3: modify channel.
    pub const V4_1: Self = Self::new(4, 1);
    /// Message connection id 4; the guest names the message SINT.
    pub const V5_0: Self = Self::new(5, 0);
    /// Windows 10 RS4.
    pub const V5_1: Self = Self::new(5, 1);
    /// Server 2019.
    pub const V5_2: Self = Self::new(5, 2);
    /// Server 2022: modify channel is answered.
    pub const V5_3: Self = Self::new(5, 3);
    /// Feature flags.
    pub const V6_0: Self = Self::new(6, 0);

    /// Every version of this crate, newest first: the order in which a guest offers them.
    pub const ALL: [Self; 9] = [
        Self::V6_0,
        Self::V5_3,
        Self::V5_2,
        Self::V5_1,
        Self::V5_0,
        Self::V4_1,
        Self::V4_0,
        Self::V3_0,
        Self::V2_4,
    ];

    /// Makes a version of its two numbers.
    pub const fn new(major: u16, minor: u16) -> Self {
        Self(((major as u32) << 16) | minor as u32)
    }

    /// Major number.
    pub const fn major(self) -> u16 {
        (self.0 >> 16) as u16
    }

    /// Minor number.
    pub const fn minor(self) -> u16 {
        self.0 as u16
    }

    /// Whether the version is one of [`Self::ALL`].
    pub fn is_known(self) -> bool {
        Self::ALL.contains(&self)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major(), self.minor())
    }
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

open_numbers! {
    /// Type of a control message.
    MessageType(u32) {
        /// Host offers a channel: [`OfferChannel`].
        OFFER_CHANNEL = 1,
        /// Host takes an offer back: [`ChannelId`].
        RESCIND_CHANNEL_OFFER = 2,
        /// Guest asks for all offers; no body.
        REQUEST_OFFERS = 3,
        /// Host has sent all offers of boot time; no body.
        ALL_OFFERS_DELIVERED = 4,
        /// Guest opens a channel: [`OpenChannel`].
        OPEN_CHANNEL = 5,
        /// Host answers an open: [`OpenResult`].
        OPEN_CHANNEL_RESULT = 6,
        /// Guest closes a channel: [`ChannelId`].
        CLOSE_CHANNEL = 7,
        /// Guest begins to describe memory: [`GpadlHeader`] and ranges.
        GPADL_HEADER = 8,
        /// Guest continues to describe memory: [`GpadlBody`] and page numbers.
        GPADL_BODY = 9,
        /// Host has taken the description: [`GpadlCreated`].
        GPADL_CREATED = 10,
        /// Guest takes the memory back: [`GpadlTeardown`].
        GPADL_TEARDOWN = 11,
        /// Host does not use the memory any more: [`GpadlTorndown`].
        GPADL_TORNDOWN = 12,
        /// Guest has forgotten a rescinded channel: [`ChannelId`].
        RELID_RELEASED = 13,
        /// Guest proposes a version: [`InitiateContact`].
        INITIATE_CONTACT = 14,
        /// Host answers: [`VersionResponse`].
        VERSION_RESPONSE = 15,
        /// Guest ends the connection; no body.
        UNLOAD = 16,
        /// Host has ended the connection; no body.
        UNLOAD_RESPONSE = 17,
        /// Guest opens a channel that exists without an offer.
        OPEN_RESERVED_CHANNEL = 18,
        /// Guest closes a reserved channel.
        CLOSE_RESERVED_CHANNEL = 19,
        /// Host answers the close of a reserved channel.
        CLOSE_RESERVED_RESPONSE = 20,
        /// Guest connects to a Hyper-V socket: [`TlConnectRequest`].
        TL_CONNECT_REQUEST = 21,
        /// Guest moves a channel's interrupt: [`ModifyChannel`].
        MODIFY_CHANNEL = 22,
        /// Host answers a socket connection: [`TlConnectResult`].
        TL_CONNECT_RESULT = 23,
        /// Host answers, from protocol 5.3 on: [`ModifyChannelResponse`].
        MODIFY_CHANNEL_RESPONSE = 24,
        /// Guest changes the monitor pages (6.0, by feature flag).
        MODIFY_CONNECTION = 25,
        /// Host answers.
        MODIFY_CONNECTION_RESPONSE = 26,
        /// Guest stops the host's control messages (6.0, by feature flag).
        PAUSE = 27,
        /// Host answers.
        PAUSE_RESPONSE = 28,
        /// Guest lets the host's control messages flow again.
        RESUME = 29,
    }
}

/// Status values that the host puts into its answers.
pub mod status {
    /// Done.
    pub const SUCCESS: u32 = 0;
    /// The request could not be carried out.
    pub const UNSUCCESSFUL: u32 = 0xc000_0001;
    /// The request makes no sense.
    pub const INVALID_PARAMETER: u32 = 0xc000_000d;
    /// Nobody listens at that endpoint.
    pub const CONNECTION_REFUSED: u32 = 0xc000_0236;
}

/// Flags of an offer.
pub mod offer_flag {
    /// The device's interface shall be enumerated to guest user space.
    pub const ENUMERATE_DEVICE_INTERFACE: u16 = 0x0001;
    /// Ring buffers are in encrypted memory.
    pub const CONFIDENTIAL_RING_BUFFER: u16 = 0x0002;
    /// External memory is encrypted.
    pub const CONFIDENTIAL_EXTERNAL_MEMORY: u16 = 0x0004;
    /// The channel is a pipe.
    pub const NAMED_PIPE_MODE: u16 = 0x0010;
    /// A Hyper-V socket.
    pub const TLNPI_PROVIDER: u16 = 0x2000;
}

/// Feature flags of protocol 6.0.
pub mod feature_flag {
    /// The guest chooses the event flag and connection id on open.
    pub const GUEST_SPECIFIED_SIGNAL_PARAMETERS: u32 = 0x01;
    /// Interrupts may be redirected on open.
    pub const CHANNEL_INTERRUPT_REDIRECTION: u32 = 0x02;
    /// The monitor pages may be changed.
    pub const MODIFY_CONNECTION: u32 = 0x04;
    /// The guest identifies itself by a GUID.
    pub const CLIENT_ID: u32 = 0x08;
    /// Encrypted rings and external memory.
    pub const CONFIDENTIAL_CHANNELS: u32 = 0x10;
    /// Control messages may be paused.
    pub const PAUSE_RESUME: u32 = 0x20;
}

layouts! {
    /// The beginning of every control message.
    MessageHeader {
        /// A [`MessageType`].
        message_type: U32,
        /// Zero.
        padding: U32,
    }
}

impl MessageHeader {
    /// The header of a message of the given type.
    pub const fn new(message_type: MessageType) -> Self {
        Self {
            message_type: U32::new(message_type.0),
            padding: U32::ZERO,
        }
    }
}

/// A message shorter than its type demands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooShort {
    /// Bytes needed.
    pub needed: usize,
    /// Bytes present.
    pub present: usize,
}

impl fmt::Display for TooShort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes where {} are needed", self.present, self.needed)
    }
}

/// Copies a structure from the front of `bytes` and gives what follows it.
pub fn parse<T>(bytes: &[u8]) -> Result<(T, &[u8]), TooShort>
where
    T: FromBytes + KnownLayout + Immutable + Unaligned,
{
    T::read_from_prefix(bytes).map_err(|_| TooShort {
        needed: size_of::<T>(),
        present: bytes.len(),
    })
}

/// A control message ready to be posted, in a buffer of its own.
#[derive(Clone, Copy)]
pub struct MessageBuffer {
    bytes: [u8; MAX_MESSAGE_LEN],
    len: usize,
}

impl MessageBuffer {
    /// A message without body.
    pub fn empty(message_type: MessageType) -> Self {
        let header = MessageHeader::new(message_type);
        let mut bytes = [0; MAX_MESSAGE_LEN];
        let len = size_of::<MessageHeader>();
        bytes[..len].copy_from_slice(header.as_bytes());
        Self { bytes, len }
    }

    /// A message with a body. `None` if it is longer than a message can be.
    pub fn new<T: IntoBytes + Immutable>(message_type: MessageType, body: &T) -> Option<Self> {
        let mut message = Self::empty(message_type);
        message.push(body.as_bytes())?;
        Some(message)
    }

    /// Appends bytes. `None`, and no change, if they do not fit.
    pub fn push(&mut self, more: &[u8]) -> Option<()> {
        let end = self.len.checked_add(more.len())?;
        self.bytes.get_mut(self.len..end)?.copy_from_slice(more);
        self.len = end;
        Some(())
    }

    /// The message.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

layouts! {
    /// Body of [`MessageType::OFFER_CHANNEL`].
    OfferChannel {
        /// Device class.
        class: Guid,
        /// Device instance.
        instance: Guid,
        /// Zero.
        reserved: [U32; 4],
        /// [`offer_flag`] bits.
        flags: U16,
        /// MMIO space the device needs, in megabytes.
        mmio_megabytes: U16,
        /// Meaning depends on the class.
        user_defined: [u8; USER_DEFINED_LEN],
        /// Zero for the primary channel.
        subchannel_index: U16,
        /// MMIO space the device can use, in megabytes.
        mmio_megabytes_optional: U16,
        /// Names the channel in all other messages; also its event flag number.
        relid: U32,
        /// Bit in the monitor page, if allocated.
        monitor_id: u8,
        /// Bit 0: the monitor bit is allocated.
        monitor_allocated: u8,
        /// Bit 0: the channel has a connection id of its own.
        is_dedicated: U16,
        /// Connection id for signalling the host.
        connection_id: U32,
    }

    /// Body of the messages that only name a channel.
    ChannelId {
        /// The channel.
        relid: U32,
    }

    /// Body of [`MessageType::OPEN_CHANNEL`].
    OpenChannel {
        /// The channel.
        relid: U32,
        /// Repeated in the result.
        open_id: U32,
        /// GPADL that holds both rings.
        ring_gpadl: U32,
        /// Virtual processor to interrupt.
        target_vp: U32,
        /// Page of the GPADL where the host-to-guest ring begins.
        downstream_page_offset: U32,
        /// For the device.
        user_data: [u8; USER_DEFINED_LEN],
    }

    /// Body of [`MessageType::OPEN_CHANNEL_RESULT`].
    OpenResult {
        /// The channel.
        relid: U32,
        /// From the request.
        open_id: U32,
        /// [`status`].
        status: U32,
    }

    /// Fixed part of [`MessageType::GPADL_HEADER`]; the beginning of the range buffer follows.
    GpadlHeader {
        /// The channel.
        relid: U32,
        /// Chosen by the guest.
        gpadl: U32,
        /// Bytes of the whole range buffer, in this message and the bodies.
        range_buffer_len: U16,
        /// Number of ranges.
        range_count: U16,
    }

    /// Fixed part of [`MessageType::GPADL_BODY`]; more of the range buffer follows.
    GpadlBody {
        /// Number of the body message; Linux leaves it zero.
        message_number: U32,
        /// From the header.
        gpadl: U32,
    }
}

/// Page numbers that fit into a [`GpadlHeader`] message with one range.
pub const GPADL_HEADER_PFNS: usize = (MAX_MESSAGE_LEN
    - size_of::<MessageHeader>()
    - size_of::<GpadlHeader>()
    - size_of::<GpaRangeHeader>())
    / 8;

/// Page numbers that fit into a [`GpadlBody`] message.
pub const GPADL_BODY_PFNS: usize =
    (MAX_MESSAGE_LEN - size_of::<MessageHeader>() - size_of::<GpadlBody>()) / 8;

layouts! {
    /// Body of [`MessageType::GPADL_CREATED`].
    GpadlCreated {
        /// The channel.
        relid: U32,
        /// The GPADL.
        gpadl: U32,
        /// [`status`].
        status: U32,
    }

    /// Body of [`MessageType::GPADL_TEARDOWN`].
    GpadlTeardown {
        /// The channel.
        relid: U32,
        /// The GPADL.
        gpadl: U32,
    }

    /// Body of [`MessageType::GPADL_TORNDOWN`].
    GpadlTorndown {
        /// The GPADL.
        gpadl: U32,
    }

    /// Body of [`MessageType::INITIATE_CONTACT`].
    InitiateContact {
        /// The [`Version`] that the guest proposes.
        version: U32,
        /// Virtual processor that shall get the host's messages.
        target_vp: U32,
        /// Before 5.0 the address of the interrupt page. From 5.0 on byte 0 is the message SINT,
        /// byte 1 the trust level, bytes 4-7 are [`feature_flag`] bits (6.0).
        interrupt_page_or_target: U64,
        /// Address of the host-to-guest monitor page.
        monitor_page_to_guest: U64,
        /// Address of the guest-to-host monitor page.
        monitor_page_to_host: U64,
    }
}

impl InitiateContact {
    /// The message SINT, from protocol 5.0 on.
    pub fn message_sint(&self) -> u8 {
        self.interrupt_page_or_target.get() as u8
    }

    /// The trust level, from protocol 5.0 on.
    pub fn message_vtl(&self) -> u8 {
        (self.interrupt_page_or_target.get() >> 8) as u8
    }

    /// [`feature_flag`] bits, from protocol 6.0 on.
    pub fn feature_flags(&self) -> u32 {
        (self.interrupt_page_or_target.get() >> 32) as u32
    }
}

layouts! {
    /// Body of [`MessageType::VERSION_RESPONSE`].
    VersionResponse {
        /// One if the proposed version is accepted.
        version_supported: u8,
        /// Zero if the connection was made.
        connection_state: u8,
        /// Zero.
        padding: U16,
        /// Connection id for all further messages, from protocol 5.0 on.
        message_connection_id: U32,
    }

    /// Body of [`MessageType::TL_CONNECT_REQUEST`].
    TlConnectRequest {
        /// Endpoint in the guest.
        endpoint: Guid,
        /// Service of the host.
        service: Guid,
    }

    /// Body of [`MessageType::TL_CONNECT_RESULT`].
    TlConnectResult {
        /// Endpoint in the guest.
        endpoint: Guid,
        /// Service of the host.
        service: Guid,
        /// [`status`].
        status: U32,
    }

    /// Body of [`MessageType::MODIFY_CHANNEL`].
    ModifyChannel {
        /// The channel.
        relid: U32,
        /// Virtual processor to interrupt from now on.
        target_vp: U32,
    }

    /// Body of [`MessageType::MODIFY_CHANNEL_RESPONSE`].
    ModifyChannelResponse {
        /// The channel.
        relid: U32,
        /// [`status`].
        status: U32,
    }
}

open_numbers! {
    /// Type of a ring packet.
    PacketType(u16) {
        /// Payload directly behind the descriptor.
        DATA_INBAND = 0x6,
        /// Payload and ranges of a transfer page set (host to guest).
        DATA_USING_XFER_PAGES = 0x7,
        /// Payload and ranges of a GPADL.
        DATA_USING_GPADL = 0x8,
        /// Payload and ranges of guest memory (guest to host).
        DATA_USING_GPA_DIRECT = 0x9,
        /// The sender does not want the answer any more.
        CANCEL_REQUEST = 0xa,
        /// Answer to the packet with the same transaction id.
        COMPLETION = 0xb,
    }
}

/// Packet flag: the sender waits for a completion.
pub const PACKET_FLAG_COMPLETION_REQUESTED: u16 = 1;

layouts! {
    /// The beginning of every ring packet.
    PacketDescriptor {
        /// A [`PacketType`].
        packet_type: U16,
        /// Offset of the payload from the descriptor, in units of 8 bytes.
        offset8: U16,
        /// Length of the packet from the descriptor, in units of 8 bytes.
        len8: U16,
        /// [`PACKET_FLAG_COMPLETION_REQUESTED`].
        flags: U16,
        /// Chosen by the sender, repeated in the completion.
        transaction_id: U64,
    }

    /// Behind the descriptor of a [`PacketType::DATA_USING_XFER_PAGES`] packet; followed by
    /// `range_count` [`TransferRange`]s.
    TransferPagesHeader {
        /// The page set, a number that both ends know.
        pageset_id: U16,
        /// Whether the sender owns the set.
        sender_owns_set: u8,
        /// Zero.
        reserved: u8,
        /// Number of ranges.
        range_count: U32,
    }

    /// Part of a transfer page set.
    TransferRange {
        /// Bytes.
        byte_count: U32,
        /// Offset from the beginning of the set.
        byte_offset: U32,
    }

    /// Behind the descriptor of a [`PacketType::DATA_USING_GPA_DIRECT`] packet; followed by
    /// `range_count` times [`GpaRangeHeader`] and page numbers.
    GpaDirectHeader {
        /// Zero.
        reserved: U32,
        /// Number of ranges.
        range_count: U32,
    }

    /// A virtually contiguous range of guest memory; the page numbers follow.
    GpaRangeHeader {
        /// Bytes.
        byte_count: U32,
        /// Offset of the first byte in the first page.
        byte_offset: U32,
    }
}

impl GpaRangeHeader {
    /// Number of page numbers that follow. `None` if the offset is not within the first page.
    pub fn page_count(&self) -> Option<usize> {
        let offset = self.byte_offset.get();
        if offset >= PAGE_SIZE {
            return None;
        }
        let end = u64::from(offset) + u64::from(self.byte_count.get());
        usize::try_from(end.div_ceil(u64::from(PAGE_SIZE))).ok()
    }
}

/// What is wrong with a list of ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeError {
    /// The buffer ends before the last range does.
    Truncated,
    /// A range begins behind its first page.
    OffsetOutsidePage,
    /// A range has no bytes.
    Empty,
}

impl fmt::Display for RangeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Truncated => "range list is truncated",
            Self::OffsetOutsidePage => "range offset is not within the first page",
            Self::Empty => "range has no bytes",
        })
    }
}

/// One range of a range buffer: header and page numbers.
#[derive(Clone, Copy, Debug)]
pub struct GpaRange<'a> {
    /// Length and offset.
    pub header: GpaRangeHeader,
    /// One page number for each page that the range touches.
    pub pfns: &'a [U64],
}

/// Iterator over the ranges of a GPADL or GPA direct packet.
#[derive(Clone)]
pub struct GpaRanges<'a> {
    rest: &'a [u8],
    left: u32,
}

impl<'a> GpaRanges<'a> {
    /// Iterates over `count` ranges in `buffer`. Bytes behind the last range are ignored.
    pub fn new(buffer: &'a [u8], count: u32) -> Self {
        Self {
            rest: buffer,
            left: count,
        }
    }

    /// The next range; moves on only if it is sound.
    fn take(&mut self) -> Result<GpaRange<'a>, RangeError> {
        let (header, rest) =
            parse::<GpaRangeHeader>(self.rest).map_err(|_| RangeError::Truncated)?;
        if header.byte_count.get() == 0 {
            return Err(RangeError::Empty);
        }
        let pages = header.page_count().ok_or(RangeError::OffsetOutsidePage)?;
        let (pfns, rest) =
            <[U64]>::ref_from_prefix_with_elems(rest, pages).map_err(|_| RangeError::Truncated)?;
        self.rest = rest;
        Ok(GpaRange { header, pfns })
    }
}

impl<'a> Iterator for GpaRanges<'a> {
    type Item = Result<GpaRange<'a>, RangeError>;

    /// After an error there is nothing more: what follows has no defined meaning.
    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let range = self.take();
        if range.is_err() {
            self.left = 0;
        }
        Some(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        string::ToString,
        vec::Vec, //
    };

    #[test]
    fn sizes_are_those_of_the_wire() {
        // With the header: what the C structures have.
        for (name, size, expected) in [
            ("offer", size_of::<OfferChannel>(), 196),
            ("channel id", size_of::<ChannelId>(), 12),
            ("open", size_of::<OpenChannel>(), 148),
            ("open result", size_of::<OpenResult>(), 20),
            ("gpadl header", size_of::<GpadlHeader>(), 20),
            ("gpadl body", size_of::<GpadlBody>(), 16),
            ("gpadl created", size_of::<GpadlCreated>(), 20),
            ("gpadl teardown", size_of::<GpadlTeardown>(), 16),
            ("gpadl torndown", size_of::<GpadlTorndown>(), 12),
            ("contact", size_of::<InitiateContact>(), 40),
            ("version", size_of::<VersionResponse>(), 16),
            ("connect", size_of::<TlConnectRequest>(), 40),
            ("connect result", size_of::<TlConnectResult>(), 44),
            ("modify", size_of::<ModifyChannel>(), 16),
            ("modify response", size_of::<ModifyChannelResponse>(), 16),
        ] {
            assert_eq!(size_of::<MessageHeader>() + size, expected, "{name}");
        }
        assert_eq!(size_of::<PacketDescriptor>(), 16);
        assert_eq!(size_of::<TransferPagesHeader>(), 8);
        assert_eq!(size_of::<TransferRange>(), 8);
        assert_eq!(size_of::<GpaDirectHeader>(), 8);
        assert_eq!(GPADL_HEADER_PFNS, 26);
        assert_eq!(GPADL_BODY_PFNS, 28);
    }

    #[test]
    fn offer_fields_are_in_place() {
        let offer = OfferChannel {
            class: class::NETWORK,
            flags: 0x1234.into(),
            subchannel_index: 0x5678.into(),
            relid: 0x9abc_def0.into(),
            monitor_allocated: 1,
            is_dedicated: 1.into(),
            connection_id: 0x2001.into(),
            ..OfferChannel::default()
        };
        let bytes = offer.as_bytes();
        assert_eq!(bytes[0], 0x63);
        assert_eq!(bytes[48..50], [0x34, 0x12]);
        assert_eq!(bytes[172..174], [0x78, 0x56]);
        assert_eq!(bytes[176..180], [0xf0, 0xde, 0xbc, 0x9a]);
        assert_eq!(bytes[180..], [0, 1, 1, 0, 1, 0x20, 0, 0]);
    }

    #[test]
    fn versions_are_ordered_and_named() {
        assert!(Version::ALL.windows(2).all(|pair| pair[0] > pair[1]));
        assert_eq!(Version::V5_3.to_string(), "5.3");
        assert_eq!(Version::V5_3.0, 0x0005_0003);
        assert_eq!((Version::V2_4.major(), Version::V2_4.minor()), (2, 4));
        assert!(!Version::new(6, 1).is_known());
        assert!(!Version::new(1, 1).is_known());
    }

    #[test]
    fn contact_target_is_split() {
        let contact = InitiateContact {
            interrupt_page_or_target: 0x8765_4321_0000_0502.into(),
            ..InitiateContact::default()
        };
        assert_eq!(contact.message_sint(), 2);
        assert_eq!(contact.message_vtl(), 5);
        assert_eq!(contact.feature_flags(), 0x8765_4321);
    }

    #[test]
    fn short_messages_are_errors_and_long_ones_leave_a_rest() {
        let bytes = [7; 24];
        for present in 0..12 {
            assert_eq!(
                parse::<OpenResult>(&bytes[..present]),
                Err(TooShort {
                    needed: 12,
                    present
                })
            );
        }
        for present in 12..bytes.len() {
            let (_, rest) = parse::<OpenResult>(&bytes[..present]).unwrap();
            assert_eq!(rest.len(), present - 12);
        }
    }

    #[test]
    fn message_buffers_end_at_their_limit() {
        let mut message = MessageBuffer::empty(MessageType::UNLOAD);
        assert_eq!(message.as_bytes(), [16, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(message.push(&[1; 233]), None);
        assert_eq!(message.as_bytes().len(), 8);
        assert_eq!(message.push(&[1; 232]), Some(()));
        assert_eq!(message.push(&[]), Some(()));
        assert_eq!(message.push(&[1]), None);
        assert_eq!(message.as_bytes().len(), MAX_MESSAGE_LEN);
        assert!(MessageBuffer::new(MessageType::OFFER_CHANNEL, &[0u8; 232]).is_some());
        assert!(MessageBuffer::new(MessageType::OFFER_CHANNEL, &[0u8; 233]).is_none());
    }

    fn range_header(byte_count: u32, byte_offset: u32) -> GpaRangeHeader {
        GpaRangeHeader {
            byte_count: byte_count.into(),
            byte_offset: byte_offset.into(),
        }
    }

    #[test]
    fn page_counts() {
        for (count, offset, pages) in [
            (0, 0, Some(0)),
            (1, 0, Some(1)),
            (1, 4095, Some(1)),
            (2, 4095, Some(2)),
            (4096, 0, Some(1)),
            (4096, 1, Some(2)),
            (4097, 0, Some(2)),
            (1, 4096, None),
            (u32::MAX, 4095, Some(0x10_0001)),
            (u32::MAX, u32::MAX, None),
        ] {
            let header = range_header(count, offset);
            assert_eq!(header.page_count(), pages, "{count} bytes at {offset}");
        }
    }

    #[test]
    fn range_lists() {
        // Two ranges of two pages and one page.
        let mut buffer = Vec::new();
        buffer.extend_from_slice(range_header(8192, 0).as_bytes());
        buffer.extend_from_slice([U64::new(5), U64::new(9)].as_bytes());
        buffer.extend_from_slice(range_header(100, 16).as_bytes());
        buffer.extend_from_slice([U64::new(7)].as_bytes());

        let pfns = |count| -> Vec<Result<Vec<u64>, RangeError>> {
            GpaRanges::new(&buffer, count)
                .map(|range| range.map(|range| range.pfns.iter().map(|pfn| pfn.get()).collect()))
                .collect()
        };
        assert_eq!(pfns(0), []);
        assert_eq!(pfns(1), [Ok([5, 9].into())]);
        assert_eq!(pfns(2), [Ok([5, 9].into()), Ok([7].into())]);
        // More than there are, by any number, is one error.
        for count in [3, u32::MAX] {
            assert_eq!(
                pfns(count),
                [
                    Ok([5, 9].into()),
                    Ok([7].into()),
                    Err(RangeError::Truncated)
                ]
            );
        }

        // Each shorter buffer is truncated in the second or the first range.
        for length in 0..buffer.len() {
            let last = GpaRanges::new(&buffer[..length], 2).last().unwrap();
            assert_eq!(last.map(|_| ()), Err(RangeError::Truncated), "{length}");
        }

        for (header, error) in [
            (range_header(0, 0), RangeError::Empty),
            (range_header(1, 4096), RangeError::OffsetOutsidePage),
            (range_header(u32::MAX, 4095), RangeError::Truncated),
        ] {
            let mut ranges = GpaRanges::new(header.as_bytes(), 9);
            assert_eq!(
                ranges.next().map(|range| range.map(|_| ())),
                Some(Err(error))
            );
            assert!(ranges.next().is_none());
        }
    }
}
