// SPDX-License-Identifier: GPL-2.0

//! RNDIS as used between the network virtual service client and provider: control messages,
//! packets and per-packet information.
//!
//! A message is a [`Header`] and a body. All offsets in bodies count from the beginning of the
//! body; everything this module returns or takes as a range counts from the beginning of the
//! message instead.
//!
//! A receiver of packets in shared memory copies the fixed part and the per-packet information
//! once ([`packet_layout`] tells where it is) and reads the frame from the place that was
//! checked. For control messages, and on the host, [`Message::parse`] and
//! [`Message::packet`] take the whole message from a copy.

use core::fmt;
use core::ops::Range;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::ndis::Oid;

/// Length of a message's [`Header`].
pub const HEADER_SIZE: usize = size_of::<Header>();

/// Length of a packet message up to its per-packet information.
pub const PACKET_HEADER_SIZE: usize = HEADER_SIZE + size_of::<PacketHeader>();

/// Length of a per-packet information element with one 32-bit value.
pub const PPI_SIZE: usize = PPI_HEADER_SIZE + 4;

/// Longest per-packet information that [`PacketBuilder`] makes: hash, VLAN, large send or
/// checksum.
pub const MAX_PPI_SIZE: usize = 4 * PPI_SIZE;

const PPI_HEADER_SIZE: usize = size_of::<PpiHeader>();

/// What [`Error::OutOfBounds`] calls the frame of a packet.
pub const FRAME: &str = "frame";

/// What [`Error::OutOfBounds`] calls all per-packet information of a packet.
pub const PPIS: &str = "per-packet information";

/// Major version of the protocol.
pub const MAJOR_VERSION: u32 = 1;

/// Minor version of the protocol.
pub const MINOR_VERSION: u32 = 0;

/// What is wrong with a message of the peer, or with a caller's buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The data ends before the named part does.
    Short {
        /// What was to be read.
        what: &'static str,
        /// Bytes it takes.
        need: usize,
        /// Bytes there are.
        have: usize,
    },
    /// The message says that it is longer than the data, or shorter than its header.
    MessageLength {
        /// Length in the header.
        stated: u32,
        /// Bytes there are.
        have: usize,
    },
    /// Another message than the expected one.
    UnexpectedType(MessageType),
    /// The named part is not inside the message.
    OutOfBounds {
        /// What was to be read.
        what: &'static str,
        /// Its offset as stated.
        offset: u32,
        /// Its length as stated.
        length: u32,
    },
    /// A per-packet information element with an impossible size.
    PpiSize(u32),
    /// A per-packet information element whose data does not lie in it.
    PpiOffset(u32),
    /// The caller's buffer is too small for the message to build.
    BufferTooSmall,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Short { what, need, have } => {
                write!(f, "{what} too short: {have} bytes of {need}")
            }
            Self::MessageLength { stated, have } => {
                write!(f, "message length {stated} in {have} bytes")
            }
            Self::UnexpectedType(found) => write!(f, "unexpected message type {found}"),
            Self::OutOfBounds {
                what,
                offset,
                length,
            } => write!(f, "{what} at {offset}, length {length}, not in the message"),
            Self::PpiSize(size) => write!(f, "invalid per-packet information size {size}"),
            Self::PpiOffset(offset) => write!(f, "invalid per-packet information offset {offset}"),
            Self::BufferTooSmall => f.write_str("buffer too small for the message"),
        }
    }
}

open_numbers! {
    /// Type of a message.
    MessageType(u32) {
        /// A frame.
        PACKET = 1,
        /// Starts the device.
        INITIALIZE = 2,
        /// Stops the device; has no answer.
        HALT = 3,
        /// Reads an object.
        QUERY = 4,
        /// Writes an object.
        SET = 5,
        /// Resets the device.
        RESET = 6,
        /// Tells of an event.
        INDICATE_STATUS = 7,
        /// Asks for a sign of life.
        KEEPALIVE = 8,
        /// Answers [`Self::INITIALIZE`].
        INITIALIZE_COMPLETE = 0x8000_0002,
        /// Answers [`Self::QUERY`].
        QUERY_COMPLETE = 0x8000_0004,
        /// Answers [`Self::SET`].
        SET_COMPLETE = 0x8000_0005,
        /// Answers [`Self::RESET`].
        RESET_COMPLETE = 0x8000_0006,
        /// Answers [`Self::KEEPALIVE`].
        KEEPALIVE_COMPLETE = 0x8000_0008,
    }

    /// Outcome of a request, or event of an [`IndicateStatus`].
    Status(u32) {
        /// Done.
        SUCCESS = 0,
        /// The cable was plugged in.
        MEDIA_CONNECT = 0x4001_000b,
        /// The cable was pulled.
        MEDIA_DISCONNECT = 0x4001_000c,
        /// The link speed, which follows in units of 100 bit/s, has changed.
        LINK_SPEED_CHANGE = 0x4001_0013,
        /// The device hangs on another network now.
        NETWORK_CHANGE = 0x4001_0018,
        /// The caller's buffer is too small.
        BUFFER_OVERFLOW = 0x8000_0005,
        /// Not done.
        FAILURE = 0xc000_0001,
        /// Not supported.
        NOT_SUPPORTED = 0xc000_00bb,
        /// The version is not supported.
        BAD_VERSION = 0xc001_0004,
        /// The length of the information makes no sense.
        INVALID_LENGTH = 0xc001_0014,
        /// The content of the information makes no sense.
        INVALID_DATA = 0xc001_0015,
        /// The object is not known.
        INVALID_OID = 0xc001_0017,
    }
}

layouts! {
    /// What each message begins with.
    Header {
        /// A [`MessageType`].
        message_type: U32,
        /// Length of the message with this header.
        message_length: U32,
    }

    /// Body of [`MessageType::INITIALIZE`].
    Initialize {
        /// Repeated in the answer.
        request_id: U32,
        /// Major version.
        major_version: U32,
        /// Minor version.
        minor_version: U32,
        /// Longest message that the driver takes.
        max_transfer_size: U32,
    }

    /// Body of [`MessageType::INITIALIZE_COMPLETE`].
    InitializeComplete {
        /// That of the request.
        request_id: U32,
        /// A [`Status`].
        status: U32,
        /// Major version.
        major_version: U32,
        /// Minor version.
        minor_version: U32,
        /// One: the device is connectionless.
        device_flags: U32,
        /// Zero: Ethernet.
        medium: U32,
        /// Most packets in one NVSP message.
        max_packets_per_message: U32,
        /// Longest message that the device takes.
        max_transfer_size: U32,
        /// Alignment of packets in one NVSP message, as a power of two.
        packet_alignment_factor: U32,
        /// Zero.
        af_list_offset: U32,
        /// Zero.
        af_list_size: U32,
    }

    /// Body of [`MessageType::HALT`].
    Halt {
        /// Not answered.
        request_id: U32,
    }

    /// Beginning of the body of [`MessageType::QUERY`] and [`MessageType::SET`].
    Request {
        /// Repeated in the answer.
        request_id: U32,
        /// An [`Oid`].
        oid: U32,
        /// Length of the information.
        info_length: U32,
        /// Offset of the information.
        info_offset: U32,
        /// Zero.
        device_vc_handle: U32,
    }

    /// Beginning of the body of [`MessageType::QUERY_COMPLETE`].
    QueryComplete {
        /// That of the request.
        request_id: U32,
        /// A [`Status`].
        status: U32,
        /// Length of the information.
        info_length: U32,
        /// Offset of the information.
        info_offset: U32,
    }

    /// Body of [`MessageType::SET_COMPLETE`].
    SetComplete {
        /// That of the request.
        request_id: U32,
        /// A [`Status`].
        status: U32,
    }

    /// Body of [`MessageType::RESET_COMPLETE`].
    ResetComplete {
        /// A [`Status`].
        status: U32,
        /// One if the packet filter and addresses must be set again.
        addressing_reset: U32,
    }

    /// Beginning of the body of [`MessageType::INDICATE_STATUS`].
    IndicateStatus {
        /// A [`Status`].
        status: U32,
        /// Length of what belongs to it.
        buffer_length: U32,
        /// Offset of what belongs to it.
        buffer_offset: U32,
    }

    /// Body of [`MessageType::KEEPALIVE`].
    Keepalive {
        /// Repeated in the answer.
        request_id: U32,
    }

    /// Body of [`MessageType::KEEPALIVE_COMPLETE`].
    KeepaliveComplete {
        /// That of the request.
        request_id: U32,
        /// A [`Status`].
        status: U32,
    }

    /// Beginning of the body of [`MessageType::PACKET`].
    PacketHeader {
        /// Offset of the frame.
        data_offset: U32,
        /// Length of the frame.
        data_length: U32,
        /// Zero.
        oob_data_offset: U32,
        /// Zero.
        oob_data_length: U32,
        /// Zero.
        num_oob_data_elements: U32,
        /// Offset of the per-packet information, or zero if there is none.
        per_packet_info_offset: U32,
        /// Length of the per-packet information.
        per_packet_info_length: U32,
        /// Zero.
        vc_handle: U32,
        /// Zero.
        reserved: U32,
    }

    /// What each element of per-packet information begins with.
    PpiHeader {
        /// Length of the element with this header.
        size: U32,
        /// A [`PpiType`], with the "internal" flag in the highest bit.
        type_and_internal: U32,
        /// Offset of the data from the beginning of the element.
        offset: U32,
    }

    /// Data of [`PpiType::PACKET_ID`].
    PacketId {
        /// [`PacketId::VERSION`].
        version: u8,
        /// Bits [`PacketId::SUBALLOCATION`] and following.
        flags: u8,
        /// Number of the packet.
        packet_id: U16,
    }

    /// Beginning of the information of [`Oid::GEN_RNDIS_CONFIG_PARAMETER`]. Offsets count from
    /// its own beginning; name and value are UTF-16.
    ConfigParameter {
        /// Offset of the name.
        name_offset: U32,
        /// Length of the name in bytes.
        name_length: U32,
        /// [`ConfigParameter::TYPE_STRING`] or an integer.
        value_type: U32,
        /// Offset of the value.
        value_offset: U32,
        /// Length of the value in bytes.
        value_length: U32,
    }
}

impl PacketId {
    /// Version of the layout.
    pub const VERSION: u8 = 1;
    /// The packet is one fragment of a coalesced packet.
    pub const SUBALLOCATION: u8 = 1 << 0;
    /// First fragment.
    pub const FIRST: u8 = 1 << 1;
    /// Last fragment.
    pub const LAST: u8 = 1 << 2;
}

impl ConfigParameter {
    /// The value is a string.
    pub const TYPE_STRING: u32 = 2;
    /// Name of the parameter with the MAC address.
    pub const NETWORK_ADDRESS: &'static str = "NetworkAddress";
    /// Length of the information that sets the MAC address.
    pub const MAC_INFO_SIZE: usize =
        size_of::<Self>() + 2 * Self::NETWORK_ADDRESS.len() + 2 * MAC_DIGITS;

    /// Writes the information that sets the MAC address, and returns its length.
    pub fn encode_mac(mac: &[u8; 6], buffer: &mut [u8]) -> Result<usize, Error> {
        const NAME_LENGTH: usize = 2 * ConfigParameter::NETWORK_ADDRESS.len();
        const DIGITS: &[u8; 16] = b"0123456789abcdef";

        let info = buffer
            .get_mut(..Self::MAC_INFO_SIZE)
            .ok_or(Error::BufferTooSmall)?;
        let (head, rest) = info.split_at_mut(size_of::<Self>());
        let (name, value) = rest.split_at_mut(NAME_LENGTH);
        let name_offset = size_of::<Self>();
        head.copy_from_slice(
            Self {
                name_offset: U32::new(name_offset as u32),
                name_length: U32::new(NAME_LENGTH as u32),
                value_type: U32::new(Self::TYPE_STRING),
                value_offset: U32::new((name_offset + NAME_LENGTH) as u32),
                value_length: U32::new(2 * MAC_DIGITS as u32),
            }
            .as_bytes(),
        );
        for (to, byte) in name.chunks_exact_mut(2).zip(Self::NETWORK_ADDRESS.bytes()) {
            to.copy_from_slice(&[byte, 0]);
        }
        for (to, byte) in value.chunks_exact_mut(4).zip(mac) {
            let (high, low) = (usize::from(byte >> 4), usize::from(byte & 15));
            to.copy_from_slice(&[DIGITS[high], 0, DIGITS[low], 0]);
        }
        Ok(Self::MAC_INFO_SIZE)
    }

    /// The MAC address, if that is what the information sets.
    pub fn parse_mac(info: &[u8]) -> Result<Option<[u8; 6]>, Error> {
        let (head, _) = read::<Self>(info, "config parameter")?;
        let part = |what, offset: U32, length: U32| -> Result<&[u8], Error> {
            range(0, offset, length, info.len())
                .and_then(|range| info.get(range))
                .ok_or(Error::OutOfBounds {
                    what,
                    offset: offset.get(),
                    length: length.get(),
                })
        };
        let name = part("parameter name", head.name_offset, head.name_length)?;
        let value = part("parameter value", head.value_offset, head.value_length)?;
        if head.value_type.get() != Self::TYPE_STRING
            || !ascii_units(name).eq(Self::NETWORK_ADDRESS.bytes().map(Some))
            || value.len() != 2 * MAC_DIGITS
        {
            return Ok(None);
        }
        let mut mac = [0; 6];
        for (i, unit) in ascii_units(value).enumerate() {
            let digit = unit.and_then(|byte| char::from(byte).to_digit(16));
            let Some(digit) = digit else { return Ok(None) };
            if let Some(byte) = mac.get_mut(i / 2) {
                *byte = (*byte << 4) | digit as u8;
            }
        }
        Ok(Some(mac))
    }
}

/// Hexadecimal digits of a MAC address.
const MAC_DIGITS: usize = 12;

/// The units of UTF-16 text, each as ASCII if it is.
fn ascii_units(text: &[u8]) -> impl Iterator<Item = Option<u8>> + '_ {
    text.chunks_exact(2).map(|unit| match unit {
        &[byte, 0] if byte.is_ascii() => Some(byte),
        _ => None,
    })
}

/// Reads a layout from the beginning of `bytes`.
#[inline]
fn read<'a, T: FromBytes>(bytes: &'a [u8], what: &'static str) -> Result<(T, &'a [u8]), Error> {
    T::read_from_prefix(bytes).map_err(|_| Error::Short {
        what,
        need: size_of::<T>(),
        have: bytes.len(),
    })
}

/// The range `offset + base .. + length` if it ends within `limit`.
#[inline]
fn range(base: usize, offset: U32, length: U32, limit: usize) -> Option<Range<usize>> {
    let start = usize::try_from(offset.get()).ok()?.checked_add(base)?;
    let end = start.checked_add(usize::try_from(length.get()).ok()?)?;
    (end <= limit).then_some(start..end)
}

/// Reads a message's header and checks the length in it against the `available` bytes.
#[inline]
pub fn header(message: &[u8], available: usize) -> Result<(MessageType, usize), Error> {
    let (header, _) = read::<Header>(message, "RNDIS header")?;
    let stated = header.message_length.get();
    let length = stated as usize;
    if length < HEADER_SIZE || length > available {
        return Err(Error::MessageLength {
            stated,
            have: available,
        });
    }
    Ok((MessageType(header.message_type.get()), length))
}

/// A message, checked as far as its header goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message<'a> {
    /// Type of the message.
    pub message_type: MessageType,
    /// The whole message, header included, without what follows it.
    bytes: &'a [u8],
}

/// A request for an object: [`MessageType::QUERY`] or [`MessageType::SET`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ObjectRequest<'a> {
    /// To be repeated in the answer.
    pub request_id: u32,
    /// The object.
    pub oid: Oid,
    /// The information.
    pub info: &'a [u8],
}

/// The answer to [`MessageType::QUERY`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueryAnswer<'a> {
    /// That of the request.
    pub request_id: u32,
    /// Outcome.
    pub status: Status,
    /// The information; empty if the request failed.
    pub info: &'a [u8],
}

/// An event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Indication<'a> {
    /// The event.
    pub status: Status,
    /// What belongs to it.
    pub buffer: &'a [u8],
}

impl<'a> Message<'a> {
    /// Parses the header of the message that `bytes` begins with.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Error> {
        let (message_type, length) = header(bytes, bytes.len())?;
        let bytes = bytes.get(..length).unwrap_or_default();
        Ok(Self {
            message_type,
            bytes,
        })
    }

    /// Length of the message.
    #[expect(clippy::len_without_is_empty, reason = "a message is never empty")]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// What follows the header.
    pub fn body(&self) -> &'a [u8] {
        self.bytes.get(HEADER_SIZE..).unwrap_or_default()
    }

    /// The number by which requests and answers are matched. All messages but packets, events
    /// and resets begin with it.
    pub fn request_id(&self) -> Result<u32, Error> {
        let (id, _) = read::<U32>(self.body(), "request id")?;
        Ok(id.get())
    }

    /// The body as the given layout.
    pub fn body_as<T: FromBytes>(&self, what: &'static str) -> Result<T, Error> {
        Ok(read::<T>(self.body(), what)?.0)
    }

    /// The information at `offset` of the body, which must not overlap the first `fixed` bytes.
    fn info(
        &self,
        what: &'static str,
        fixed: usize,
        offset: U32,
        length: U32,
    ) -> Result<&'a [u8], Error> {
        let body = self.body();
        if length.get() == 0 {
            return Ok(&[]);
        }
        range(0, offset, length, body.len())
            .filter(|range| range.start >= fixed)
            .and_then(|range| body.get(range))
            .ok_or(Error::OutOfBounds {
                what,
                offset: offset.get(),
                length: length.get(),
            })
    }

    /// The body of [`MessageType::QUERY`] or [`MessageType::SET`].
    pub fn object_request(&self) -> Result<ObjectRequest<'a>, Error> {
        if !matches!(self.message_type, MessageType::QUERY | MessageType::SET) {
            return Err(Error::UnexpectedType(self.message_type));
        }
        let head: Request = self.body_as("object request")?;
        Ok(ObjectRequest {
            request_id: head.request_id.get(),
            oid: Oid(head.oid.get()),
            info: self.info(
                "request information",
                size_of::<Request>(),
                head.info_offset,
                head.info_length,
            )?,
        })
    }

    /// The body of [`MessageType::QUERY_COMPLETE`].
    pub fn query_complete(&self) -> Result<QueryAnswer<'a>, Error> {
        self.expect(MessageType::QUERY_COMPLETE)?;
        let head: QueryComplete = self.body_as("query answer")?;
        Ok(QueryAnswer {
            request_id: head.request_id.get(),
            status: Status(head.status.get()),
            info: self.info(
                "answered information",
                size_of::<QueryComplete>(),
                head.info_offset,
                head.info_length,
            )?,
        })
    }

    /// The body of [`MessageType::INDICATE_STATUS`].
    ///
    /// Old hosts do not count the buffer in the length of the message; `bytes` is all that was
    /// received, from which the buffer is taken then.
    pub fn indication(bytes: &'a [u8]) -> Result<Indication<'a>, Error> {
        let message = Self::parse(bytes)?;
        message.expect(MessageType::INDICATE_STATUS)?;
        let head: IndicateStatus = message.body_as("status indication")?;
        let whole = Self { bytes, ..message };
        Ok(Indication {
            status: Status(head.status.get()),
            buffer: whole.info(
                "status buffer",
                size_of::<IndicateStatus>(),
                head.buffer_offset,
                head.buffer_length,
            )?,
        })
    }

    /// The body of [`MessageType::PACKET`].
    pub fn packet(&self) -> Result<Packet<'a>, Error> {
        self.expect(MessageType::PACKET)?;
        let layout = packet_layout(self.bytes, self.bytes.len())?;
        Ok(Packet {
            frame: self.bytes.get(layout.frame).unwrap_or_default(),
            ppis: Ppis::new(self.bytes.get(layout.ppis).unwrap_or_default()),
        })
    }

    /// Checks the type.
    fn expect(&self, message_type: MessageType) -> Result<(), Error> {
        if self.message_type != message_type {
            return Err(Error::UnexpectedType(self.message_type));
        }
        Ok(())
    }
}

/// Iterates over the RNDIS messages that follow each other in one NVSP message. The first error
/// ends the iteration.
#[derive(Clone, Debug)]
pub struct Messages<'a> {
    rest: &'a [u8],
}

impl<'a> Messages<'a> {
    /// Iterates over the messages in `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }
}

impl<'a> Iterator for Messages<'a> {
    type Item = Result<Message<'a>, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let message = Message::parse(self.rest);
        // A message is at least a header long, so this always advances.
        self.rest = match &message {
            Ok(message) => self.rest.get(message.len()..).unwrap_or_default(),
            Err(_) => &[],
        };
        Some(message)
    }
}

/// A frame with its per-packet information.
#[derive(Clone, Debug)]
pub struct Packet<'a> {
    /// The frame.
    pub frame: &'a [u8],
    /// The per-packet information.
    pub ppis: Ppis<'a>,
}

/// Where the parts of a packet message are, from the beginning of the message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PacketLayout {
    /// The frame.
    pub frame: Range<usize>,
    /// The per-packet information; empty if there is none.
    pub ppis: Range<usize>,
}

/// Checks the fixed part of a packet message, of which `message` holds at least the first
/// [`PACKET_HEADER_SIZE`] bytes. `available` is how many bytes of the message were received;
/// both ranges of the result lie within them.
#[inline]
pub fn packet_layout(message: &[u8], available: usize) -> Result<PacketLayout, Error> {
    let (message_type, _) = header(message, available)?;
    if message_type != MessageType::PACKET {
        return Err(Error::UnexpectedType(message_type));
    }
    let body = message.get(HEADER_SIZE..).unwrap_or_default();
    let (head, _) = read::<PacketHeader>(body, "packet")?;
    let checked = |what, offset: U32, length: U32| {
        range(HEADER_SIZE, offset, length, available)
            .filter(|range| range.start >= PACKET_HEADER_SIZE)
            .ok_or(Error::OutOfBounds {
                what,
                offset: offset.get(),
                length: length.get(),
            })
    };
    let ppis = if head.per_packet_info_offset.get() == 0 || head.per_packet_info_length.get() == 0 {
        PACKET_HEADER_SIZE..PACKET_HEADER_SIZE
    } else {
        checked(
            PPIS,
            head.per_packet_info_offset,
            head.per_packet_info_length,
        )?
    };
    Ok(PacketLayout {
        frame: checked(FRAME, head.data_offset, head.data_length)?,
        ppis,
    })
}

/// Type of a per-packet information element; any value is possible.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PpiType {
    /// The number.
    pub number: u32,
    /// Whether the number is one of those between the two sides only.
    pub internal: bool,
}

impl PpiType {
    /// [`TxChecksum`] or [`RxChecksum`].
    pub const CHECKSUM: Self = Self::ndis(0);
    /// [`LargeSend`].
    pub const LARGE_SEND: Self = Self::ndis(2);
    /// [`Vlan`].
    pub const IEEE8021Q: Self = Self::ndis(6);
    /// The packet's hash, 32 bits.
    pub const HASH_VALUE: Self = Self::ndis(8);
    /// [`PacketId`].
    pub const PACKET_ID: Self = Self {
        number: 1,
        internal: true,
    };

    const INTERNAL: u32 = 1 << 31;

    const fn ndis(number: u32) -> Self {
        Self {
            number,
            internal: false,
        }
    }

    #[inline]
    fn from_wire(word: u32) -> Self {
        Self {
            number: word & !Self::INTERNAL,
            internal: word & Self::INTERNAL != 0,
        }
    }

    #[inline]
    fn to_wire(self) -> u32 {
        self.number | if self.internal { Self::INTERNAL } else { 0 }
    }
}

/// A per-packet information element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ppi<'a> {
    /// What the data is.
    pub ppi_type: PpiType,
    /// The data.
    pub data: &'a [u8],
}

impl Ppi<'_> {
    /// The data as one 32-bit value.
    #[inline]
    pub fn value(&self) -> Result<u32, Error> {
        let (value, _) = read::<U32>(self.data, "per-packet information")?;
        Ok(value.get())
    }

    /// The data as a [`PacketId`].
    #[inline]
    pub fn packet_id(&self) -> Result<PacketId, Error> {
        Ok(read::<PacketId>(self.data, "packet id")?.0)
    }
}

/// Iterates over per-packet information. The first error ends the iteration.
#[derive(Clone, Debug)]
pub struct Ppis<'a> {
    rest: &'a [u8],
}

impl<'a> Ppis<'a> {
    /// Iterates over the elements in `bytes`.
    #[inline]
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// Takes the element that `rest` begins with.
    #[inline]
    fn take(&mut self) -> Result<Ppi<'a>, Error> {
        let (head, _) = read::<PpiHeader>(self.rest, "per-packet information")?;
        let (size, offset) = (head.size.get(), head.offset.get());
        let bad_size = Error::PpiSize(size);
        if (size as usize) < PPI_HEADER_SIZE {
            return Err(bad_size);
        }
        let (element, rest) = self.rest.split_at_checked(size as usize).ok_or(bad_size)?;
        let data = element
            .get(offset as usize..)
            .filter(|_| offset as usize >= PPI_HEADER_SIZE)
            .ok_or(Error::PpiOffset(offset))?;
        self.rest = rest;
        Ok(Ppi {
            ppi_type: PpiType::from_wire(head.type_and_internal.get()),
            data,
        })
    }
}

impl<'a> Iterator for Ppis<'a> {
    type Item = Result<Ppi<'a>, Error>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        // An element is at least a header long, so this always advances.
        let ppi = self.take();
        if ppi.is_err() {
            self.rest = &[];
        }
        Some(ppi)
    }
}

/// The per-packet information that a receiver knows, each at its first occurrence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PacketInfo {
    /// [`TxChecksum`] or [`RxChecksum`], depending on the direction.
    pub checksum: Option<u32>,
    /// [`LargeSend`].
    pub large_send: Option<LargeSend>,
    /// VLAN tag.
    pub vlan: Option<Vlan>,
    /// Hash value.
    pub hash: Option<u32>,
    /// Packet identifier.
    pub packet_id: Option<PacketId>,
}

impl PacketInfo {
    /// Collects the elements, skipping unknown ones.
    #[inline]
    pub fn collect(ppis: Ppis<'_>) -> Result<Self, Error> {
        let mut info = Self::default();
        for ppi in ppis {
            let ppi = ppi?;
            match ppi.ppi_type {
                PpiType::CHECKSUM => info.checksum = info.checksum.or(Some(ppi.value()?)),
                PpiType::LARGE_SEND => {
                    info.large_send = info.large_send.or(Some(LargeSend(ppi.value()?)));
                }
                PpiType::IEEE8021Q => info.vlan = info.vlan.or(Some(Vlan(ppi.value()?))),
                PpiType::HASH_VALUE => info.hash = info.hash.or(Some(ppi.value()?)),
                PpiType::PACKET_ID => info.packet_id = info.packet_id.or(Some(ppi.packet_id()?)),
                _ => {}
            }
        }
        Ok(info)
    }
}

/// Checksums that the host shall compute for a sent packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TxChecksum(pub u32);

impl TxChecksum {
    /// The packet is IPv4.
    pub const IPV4: u32 = 1 << 0;
    /// The packet is IPv6.
    pub const IPV6: u32 = 1 << 1;
    /// Compute the TCP checksum.
    pub const TCP: u32 = 1 << 2;
    /// Compute the UDP checksum.
    pub const UDP: u32 = 1 << 3;
    /// Compute the IPv4 header's checksum.
    pub const IP_HEADER: u32 = 1 << 4;

    const HEADER_OFFSET_MAX: u32 = 0x3ff;

    /// Flags, and the offset of the TCP or UDP header from the beginning of the frame. `None` if
    /// the offset is too large.
    pub fn new(flags: u32, header_offset: u32) -> Option<Self> {
        (header_offset <= Self::HEADER_OFFSET_MAX).then_some(Self(flags | (header_offset << 16)))
    }

    /// Whether all the given flags are set.
    pub fn has(self, flags: u32) -> bool {
        self.0 & flags == flags
    }

    /// Offset of the TCP or UDP header from the beginning of the frame.
    pub fn header_offset(self) -> u32 {
        (self.0 >> 16) & Self::HEADER_OFFSET_MAX
    }
}

/// What the host found about a received packet's checksums.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RxChecksum(pub u32);

impl RxChecksum {
    /// The TCP checksum is wrong.
    pub const TCP_FAILED: u32 = 1 << 0;
    /// The UDP checksum is wrong.
    pub const UDP_FAILED: u32 = 1 << 1;
    /// The IPv4 header's checksum is wrong.
    pub const IP_FAILED: u32 = 1 << 2;
    /// The TCP checksum is right.
    pub const TCP_SUCCEEDED: u32 = 1 << 3;
    /// The UDP checksum is right.
    pub const UDP_SUCCEEDED: u32 = 1 << 4;
    /// The IPv4 header's checksum is right.
    pub const IP_SUCCEEDED: u32 = 1 << 5;
    /// The packet was sent by this host.
    pub const LOOPBACK: u32 = 1 << 6;
    /// The TCP checksum in the packet is not that of the coalesced packet.
    pub const TCP_VALUE_INVALID: u32 = 1 << 7;
    /// The IPv4 header's checksum in the packet is not that of the coalesced packet.
    pub const IP_VALUE_INVALID: u32 = 1 << 8;

    /// Whether all the given flags are set.
    pub fn has(self, flags: u32) -> bool {
        self.0 & flags == flags
    }
}

/// Large send offload, version 2.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LargeSend(pub u32);

impl LargeSend {
    const MSS_MAX: u32 = 0xf_ffff;
    const HEADER_OFFSET_MAX: u32 = 0x3ff;
    const VERSION_2: u32 = 1 << 30;
    const IPV6: u32 = 1 << 31;

    /// Segment payload size, and the offset of the TCP header from the beginning of the frame.
    /// `None` if a number is too large.
    pub fn new(mss: u32, tcp_header_offset: u32, ipv6: bool) -> Option<Self> {
        (mss <= Self::MSS_MAX && tcp_header_offset <= Self::HEADER_OFFSET_MAX).then_some(Self(
            mss | (tcp_header_offset << 20) | Self::VERSION_2 | if ipv6 { Self::IPV6 } else { 0 },
        ))
    }

    /// Segment payload size.
    pub fn mss(self) -> u32 {
        self.0 & Self::MSS_MAX
    }

    /// Offset of the TCP header from the beginning of the frame.
    pub fn tcp_header_offset(self) -> u32 {
        (self.0 >> 20) & Self::HEADER_OFFSET_MAX
    }

    /// Whether this is version 2 of large send offload.
    pub fn is_v2(self) -> bool {
        self.0 & Self::VERSION_2 != 0
    }

    /// Whether the packet is IPv6.
    pub fn is_ipv6(self) -> bool {
        self.0 & Self::IPV6 != 0
    }
}

/// VLAN tag. Its fields are in another order than on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Vlan(pub u32);

impl Vlan {
    /// From the tag control information of IEEE 802.1Q.
    pub fn from_tci(tci: u16) -> Self {
        let tci = u32::from(tci);
        Self((tci >> 13) | (((tci >> 12) & 1) << 3) | ((tci & 0xfff) << 4))
    }

    /// The tag control information of IEEE 802.1Q.
    pub fn tci(self) -> u16 {
        let (priority, cfi, id) = (self.0 & 7, (self.0 >> 3) & 1, (self.0 >> 4) & 0xfff);
        // The three parts fill exactly 16 bits.
        ((priority << 13) | (cfi << 12) | id) as u16
    }
}

/// Builds the part of a packet message that precedes the frame.
#[derive(Debug)]
pub struct PacketBuilder<'a> {
    buffer: &'a mut [u8],
    length: usize,
}

impl<'a> PacketBuilder<'a> {
    /// Builds into `buffer`. [`PACKET_HEADER_SIZE`] + [`MAX_PPI_SIZE`] bytes are always enough
    /// for a driver.
    pub fn new(buffer: &'a mut [u8]) -> Result<Self, Error> {
        if buffer.len() < PACKET_HEADER_SIZE {
            return Err(Error::BufferTooSmall);
        }
        Ok(Self {
            buffer,
            length: PACKET_HEADER_SIZE,
        })
    }

    /// Appends an element with a 32-bit value.
    #[inline]
    pub fn ppi(&mut self, ppi_type: PpiType, value: u32) -> Result<&mut Self, Error> {
        let end = self.length + PPI_SIZE;
        let element = self
            .buffer
            .get_mut(self.length..end)
            .ok_or(Error::BufferTooSmall)?;
        let (head, data) = element.split_at_mut(PPI_HEADER_SIZE);
        head.copy_from_slice(
            PpiHeader {
                size: U32::new(PPI_SIZE as u32),
                type_and_internal: U32::new(ppi_type.to_wire()),
                offset: U32::new(PPI_HEADER_SIZE as u32),
            }
            .as_bytes(),
        );
        data.copy_from_slice(&value.to_le_bytes());
        self.length = end;
        Ok(self)
    }

    /// Appends a packet identifier.
    pub fn packet_id(&mut self, id: PacketId) -> Result<&mut Self, Error> {
        let [low, high] = id.packet_id.get().to_le_bytes();
        let value = u32::from_le_bytes([id.version, id.flags, low, high]);
        self.ppi(PpiType::PACKET_ID, value)
    }

    /// Length of what was built so far: the place of the frame.
    #[inline]
    pub fn header_length(&self) -> usize {
        self.length
    }

    /// Completes the headers for a frame of `frame_length` bytes that follows at once, and
    /// `padding` bytes behind it. Returns the length of what precedes the frame.
    #[inline]
    pub fn finish(self, frame_length: u32, padding: u32) -> Result<usize, Error> {
        let message_length = u32::try_from(self.length)
            .ok()
            .and_then(|length| length.checked_add(frame_length)?.checked_add(padding))
            .ok_or(Error::BufferTooSmall)?;
        let ppi_length = (self.length - PACKET_HEADER_SIZE) as u32;
        let fixed = size_of::<PacketHeader>() as u32;
        let head = [
            MessageType::PACKET.0,
            message_length,
            fixed + ppi_length,
            frame_length,
            0,
            0,
            0,
            if ppi_length == 0 { 0 } else { fixed },
            ppi_length,
            0,
            0,
        ];
        let to = self
            .buffer
            .first_chunk_mut::<PACKET_HEADER_SIZE>()
            .ok_or(Error::BufferTooSmall)?;
        for (to, word) in to.chunks_exact_mut(4).zip(head) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        Ok(self.length)
    }
}

/// Writes a message of a fixed body and what follows it, and returns its length.
pub fn encode<B: IntoBytes + Immutable>(
    message_type: MessageType,
    body: &B,
    info: &[u8],
    buffer: &mut [u8],
) -> Result<usize, Error> {
    let body = body.as_bytes();
    let length = HEADER_SIZE + body.len() + info.len();
    let message_length = u32::try_from(length).map_err(|_| Error::BufferTooSmall)?;
    let message = buffer.get_mut(..length).ok_or(Error::BufferTooSmall)?;
    let (head, rest) = message.split_at_mut(HEADER_SIZE);
    let (to_body, to_info) = rest.split_at_mut(body.len());
    head.copy_from_slice(
        Header {
            message_type: U32::new(message_type.0),
            message_length: U32::new(message_length),
        }
        .as_bytes(),
    );
    to_body.copy_from_slice(body);
    to_info.copy_from_slice(info);
    Ok(length)
}

/// Writes [`MessageType::QUERY`] or [`MessageType::SET`] and returns its length.
pub fn encode_request(
    message_type: MessageType,
    request_id: u32,
    oid: Oid,
    info: &[u8],
    buffer: &mut [u8],
) -> Result<usize, Error> {
    let body = Request {
        request_id: U32::new(request_id),
        oid: U32::new(oid.0),
        info_length: U32::new(u32::try_from(info.len()).map_err(|_| Error::BufferTooSmall)?),
        info_offset: U32::new(size_of::<Request>() as u32),
        device_vc_handle: U32::ZERO,
    };
    encode(message_type, &body, info, buffer)
}

/// Writes [`MessageType::QUERY_COMPLETE`] and returns its length.
pub fn encode_query_complete(
    request_id: u32,
    status: Status,
    info: &[u8],
    buffer: &mut [u8],
) -> Result<usize, Error> {
    let body = QueryComplete {
        request_id: U32::new(request_id),
        status: U32::new(status.0),
        info_length: U32::new(u32::try_from(info.len()).map_err(|_| Error::BufferTooSmall)?),
        info_offset: U32::new(size_of::<QueryComplete>() as u32),
    };
    encode(MessageType::QUERY_COMPLETE, &body, info, buffer)
}

/// Writes [`MessageType::INDICATE_STATUS`] and returns its length.
pub fn encode_indication(
    status: Status,
    status_buffer: &[u8],
    buffer: &mut [u8],
) -> Result<usize, Error> {
    let length = u32::try_from(status_buffer.len()).map_err(|_| Error::BufferTooSmall)?;
    let body = IndicateStatus {
        status: U32::new(status.0),
        buffer_length: U32::new(length),
        buffer_offset: U32::new(if length == 0 {
            0
        } else {
            size_of::<IndicateStatus>() as u32
        }),
    };
    encode(MessageType::INDICATE_STATUS, &body, status_buffer, buffer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    #[test]
    fn sizes_are_those_of_the_protocol() {
        assert_eq!(HEADER_SIZE, 8);
        assert_eq!(PACKET_HEADER_SIZE, 44);
        assert_eq!(PPI_SIZE, 16);
        assert_eq!(size_of::<InitializeComplete>(), 44);
        assert_eq!(size_of::<Request>(), 20);
        assert_eq!(ConfigParameter::MAC_INFO_SIZE, 20 + 28 + 24);
    }

    fn bytes(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    #[test]
    fn message_length_is_checked() {
        // Stated length, bytes there are, whether it is right.
        let cases = [
            (0, 8, false),
            (7, 8, false),
            (8, 8, true),
            (9, 8, false),
            (9, 9, true),
            (8, 100, true),
            (u32::MAX, 100, false),
        ];
        for (stated, have, right) in cases {
            let mut message = bytes(&[8, stated]);
            message.resize(have, 0);
            let expected = if right {
                Ok(stated as usize)
            } else {
                Err(Error::MessageLength { stated, have })
            };
            assert_eq!(Message::parse(&message).map(|m| m.len()), expected);
        }
        assert!(matches!(
            Message::parse(&[0; 7]),
            Err(Error::Short {
                need: 8,
                have: 7,
                ..
            })
        ));
    }

    #[test]
    fn request_round_trip() {
        let mut buffer = [0; 64];
        let info = [1, 2, 3, 4];
        let oid = Oid::GEN_CURRENT_PACKET_FILTER;
        let length = encode_request(MessageType::SET, 7, oid, &info, &mut buffer).unwrap();
        assert_eq!(length, 32);
        let message = Message::parse(&buffer).unwrap();
        assert_eq!(message.len(), length);
        assert_eq!(message.request_id(), Ok(7));
        assert_eq!(
            message.object_request(),
            Ok(ObjectRequest {
                request_id: 7,
                oid,
                info: &info
            })
        );
        assert_eq!(
            message.query_complete(),
            Err(Error::UnexpectedType(MessageType::SET))
        );
        assert_eq!(
            encode_request(MessageType::SET, 7, oid, &info, &mut buffer[..31]),
            Err(Error::BufferTooSmall)
        );
    }

    #[test]
    fn information_must_be_inside_the_message() {
        // Offset and length of the information of a query answer with 8 bytes behind the fixed
        // part of 16 bytes, and whether they are right.
        let cases = [
            (16, 8, true),
            (16, 0, true),
            (0, 0, true),
            (20, 4, true),
            (24, 0, true),
            (16, 9, false),
            (15, 4, false),
            (0, 4, false),
            (24, 1, false),
            (25, 1, false),
            (u32::MAX, 1, false),
            (16, u32::MAX, false),
        ];
        for (offset, length, right) in cases {
            let message = bytes(&[
                0x8000_0004,
                32,
                1,
                0,
                length,
                offset,
                0xaaaa_aaaa,
                0xbbbb_bbbb,
            ]);
            let parsed = Message::parse(&message).unwrap().query_complete();
            assert_eq!(parsed.is_ok(), right, "offset {offset}, length {length}");
            if let Ok(answer) = parsed {
                assert_eq!(answer.info.len(), length as usize);
            }
        }
    }

    #[test]
    fn indications_of_old_hosts_are_read() {
        let mut buffer = [0; 64];
        let speed = 100_000u32.to_le_bytes();
        let length = encode_indication(Status::LINK_SPEED_CHANGE, &speed, &mut buffer).unwrap();
        assert_eq!(length, 24);
        let expected = Ok(Indication {
            status: Status::LINK_SPEED_CHANGE,
            buffer: &speed[..],
        });
        assert_eq!(Message::indication(&buffer[..length]), expected);
        // The length without the status buffer, but the buffer is there.
        buffer[4] = 20;
        assert_eq!(Message::indication(&buffer[..length]), expected);
        assert!(Message::indication(&buffer[..length - 1]).is_err());
    }

    /// A packet message with the given fields, `available` bytes long.
    fn packet(data: (u32, u32), ppi: (u32, u32), available: usize) -> Vec<u8> {
        let mut message = bytes(&[
            1,
            available as u32,
            data.0,
            data.1,
            0,
            0,
            0,
            ppi.0,
            ppi.1,
            0,
            0,
        ]);
        message.resize(available, 0);
        message
    }

    #[test]
    fn packet_parts_must_be_inside_the_message() {
        let none = (0, 0);
        let cases = [
            ((36, 60), none, 104, true),
            ((36, 60), (36, 0), 104, true),
            ((36, 60), none, 103, false),
            ((52, 60), (36, 16), 120, true),
            ((36, 60), (36, 76), 120, true),
            ((36, 60), (36, 77), 120, false),
            ((35, 60), none, 120, false),
            ((36, 60), (35, 16), 120, false),
            ((36, 60), (4, 16), 120, false),
            ((0, 60), none, 120, false),
            ((u32::MAX, 60), none, 120, false),
            ((36, u32::MAX), none, 120, false),
            ((36, 60), (u32::MAX, 16), 120, false),
            ((36, 60), (36, u32::MAX), 120, false),
            ((36, 0), none, 44, true),
        ];
        for (data, ppi, available, right) in cases {
            let message = packet(data, ppi, available);
            let parsed = Message::parse(&message).unwrap().packet();
            assert_eq!(
                parsed.is_ok(),
                right,
                "data {data:?}, ppi {ppi:?}, {available}"
            );
            // The same from the fixed part alone.
            let layout = packet_layout(&message[..PACKET_HEADER_SIZE], available);
            assert_eq!(layout.is_ok(), right);
        }
        let short = packet((36, 0), none, 44);
        assert!(packet_layout(&short[..43], 43).is_err());
    }

    #[test]
    fn per_packet_information_always_advances() {
        let good = bytes(&[16, 8, 12, 0x1234]);
        let ppis: Vec<_> = Ppis::new(&good).collect();
        assert_eq!(ppis.len(), 1);
        assert_eq!(ppis[0].unwrap().value(), Ok(0x1234));

        // Size and offset of the first of two elements, and the error.
        let cases = [
            (0, 12, Error::PpiSize(0)),
            (11, 12, Error::PpiSize(11)),
            (12, 13, Error::PpiOffset(13)),
            (16, 11, Error::PpiOffset(11)),
            (16, 17, Error::PpiOffset(17)),
            (33, 12, Error::PpiSize(33)),
            (u32::MAX, 12, Error::PpiSize(u32::MAX)),
            (16, u32::MAX, Error::PpiOffset(u32::MAX)),
        ];
        for (size, offset, error) in cases {
            let data = bytes(&[size, 8, offset, 0, 16, 8, 12, 0]);
            let mut ppis = Ppis::new(&data);
            assert_eq!(ppis.next(), Some(Err(error)));
            assert_eq!(ppis.next(), None);
        }
        // A rest that is no element.
        let mut ppis = Ppis::new(&good[..11]);
        assert!(matches!(ppis.next(), Some(Err(Error::Short { .. }))));
        assert_eq!(ppis.next(), None);
    }

    #[test]
    fn built_packets_parse() {
        let mut buffer = [0; PACKET_HEADER_SIZE + MAX_PPI_SIZE + 64];
        let mut builder = PacketBuilder::new(&mut buffer).unwrap();
        let large_send = LargeSend::new(1448, 34, true).unwrap();
        builder
            .ppi(PpiType::HASH_VALUE, 0xdead_beef)
            .and_then(|b| b.ppi(PpiType::IEEE8021Q, Vlan::from_tci(0xa123).0))
            .and_then(|b| b.ppi(PpiType::LARGE_SEND, large_send.0))
            .unwrap();
        let length = builder.finish(60, 4).unwrap();
        assert_eq!(length, PACKET_HEADER_SIZE + 3 * PPI_SIZE);
        buffer[length] = 0x42;
        let message = Message::parse(&buffer).unwrap();
        assert_eq!(message.len(), length + 64);
        let packet = message.packet().unwrap();
        assert_eq!(packet.frame.len(), 60);
        assert_eq!(packet.frame[0], 0x42);
        let info = PacketInfo::collect(packet.ppis).unwrap();
        assert_eq!(info.hash, Some(0xdead_beef));
        assert_eq!(info.vlan.map(Vlan::tci), Some(0xa123));
        assert_eq!(info.large_send, Some(large_send));
        assert_eq!(info.checksum, None);
        assert_eq!(info.packet_id, None);
    }

    #[test]
    fn builder_stops_at_the_end_of_the_buffer() {
        let mut buffer = [0; PACKET_HEADER_SIZE + PPI_SIZE - 1];
        assert!(PacketBuilder::new(&mut buffer[..PACKET_HEADER_SIZE - 1]).is_err());
        let mut builder = PacketBuilder::new(&mut buffer).unwrap();
        assert!(builder.ppi(PpiType::HASH_VALUE, 1).is_err());
        assert_eq!(builder.finish(u32::MAX, 0), Err(Error::BufferTooSmall));
    }

    #[test]
    fn packet_id_round_trip() {
        let id = PacketId {
            version: PacketId::VERSION,
            flags: PacketId::SUBALLOCATION | PacketId::LAST,
            packet_id: U16::new(0x1234),
        };
        let mut buffer = [0; PACKET_HEADER_SIZE + PPI_SIZE];
        let mut builder = PacketBuilder::new(&mut buffer).unwrap();
        builder.packet_id(id).unwrap();
        let length = builder.finish(0, 0).unwrap();
        let packet = Message::parse(&buffer[..length]).unwrap().packet().unwrap();
        assert_eq!(
            PacketInfo::collect(packet.ppis).unwrap().packet_id,
            Some(id)
        );
    }

    #[test]
    fn messages_follow_each_other() {
        let mut data = packet((36, 60), (0, 0), 104);
        data.extend(packet((36, 8), (0, 0), 52));
        let lengths: Vec<_> = Messages::new(&data).map(|m| m.unwrap().len()).collect();
        assert_eq!(lengths, [104, 52]);
        data.push(0);
        let outcomes: Vec<_> = Messages::new(&data).map(|m| m.is_ok()).collect();
        assert_eq!(outcomes, [true, true, false]);
    }

    #[test]
    fn bit_fields() {
        assert_eq!(Vlan::from_tci(1).0, 1 << 4);
        assert_eq!(Vlan::from_tci(0xe000).0, 7);
        assert_eq!(Vlan::from_tci(0x1000).0, 8);
        for tci in [0, 1, 0xfff, 0x1000, 0xe000, 0xffff] {
            assert_eq!(Vlan::from_tci(tci).tci(), tci);
        }
        let checksum = TxChecksum::new(TxChecksum::IPV4 | TxChecksum::TCP, 34).unwrap();
        assert_eq!(checksum.0, 5 | (34 << 16));
        assert_eq!(checksum.header_offset(), 34);
        assert!(checksum.has(TxChecksum::TCP) && !checksum.has(TxChecksum::UDP));
        assert_eq!(TxChecksum::new(0, 0x400), None);
        let large_send = LargeSend::new(0xf_ffff, 0x3ff, false).unwrap();
        assert_eq!(large_send.0, 0x7fff_ffff);
        assert_eq!(LargeSend::new(0x10_0000, 0, false), None);
        assert_eq!(LargeSend::new(0, 0x400, false), None);
    }

    #[test]
    fn mac_parameter() {
        let mac = [0x60, 0x45, 0xbd, 0xe9, 0x60, 0xa3];
        let mut buffer = [0; ConfigParameter::MAC_INFO_SIZE];
        let length = ConfigParameter::encode_mac(&mac, &mut buffer).unwrap();
        assert_eq!(length, buffer.len());
        assert_eq!(&buffer[48..56], b"6\x000\x004\x005\x00");
        assert_eq!(ConfigParameter::parse_mac(&buffer), Ok(Some(mac)));
        assert!(ConfigParameter::encode_mac(&mac, &mut [0; 71]).is_err());
        for short in 0..length {
            assert!(ConfigParameter::parse_mac(&buffer[..short]).is_err());
        }
        // Another name, a digit that is none.
        for (at, byte) in [(20, b'X'), (48, b'g'), (49, 1)] {
            let mut other = buffer;
            other[at] = byte;
            assert_eq!(ConfigParameter::parse_mac(&other), Ok(None));
        }
    }
}
