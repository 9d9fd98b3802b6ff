// SPDX-License-Identifier: GPL-2.0

//! NVSP: the protocol between the network virtual service client (the guest's driver) and the
//! network virtual service provider (the host), versions 1 to 6.1.
//!
//! A message is a 32-bit type and a body. The driver pads every message it sends to
//! [`MESSAGE_SIZE`], and the host pads to [`message_size`]; a receiver accepts any length that
//! holds the body. Requests of the driver are answered by a VMBus completion that carries the
//! answering message, with one exception: the completion of [`SwitchDataPath`] is empty.
//!
//! The bodies are plain layouts of little-endian integers without alignment. [`encode`] makes a
//! message of a body, [`decode`] takes one out of a message, and [`GuestMessage`] and
//! [`HostMessage`] parse whatever one side may send, unknown messages included.

use core::fmt;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Length of a message with the largest body of all versions, the padded length of what a driver
/// sends.
pub const MESSAGE_SIZE: usize = 40;

/// Length that hosts older than version 6.1 pad their messages to.
pub const MESSAGE_SIZE_BEFORE_V61: usize = 28;

/// Length of the message type that starts each message.
pub const HEADER_SIZE: usize = 4;

/// Identifier of the receive buffer, which is also the transfer page set of received packets.
pub const RECEIVE_BUFFER_ID: u16 = 0xcafe;

/// Identifier of the send buffer.
pub const SEND_BUFFER_ID: u16 = 0;

/// "No send section": the whole RNDIS message is in the pages of the VMBus packet.
pub const INVALID_SECTION: u32 = u32::MAX;

/// Entries in the send indirection table.
pub const SEND_TABLE_SIZE: usize = 16;

/// Largest message of this protocol, the send indirection table.
pub const MAX_MESSAGE_SIZE: usize = MESSAGE_SIZE + SEND_TABLE_SIZE * 4;

/// Most ranges in a transfer pages packet: the fragments of one coalesced packet.
pub const MAX_TRANSFER_RANGES: usize = 562;

/// Most channels of one device, the primary one included.
pub const MAX_CHANNELS: usize = 64;

/// Smallest section that a receive or send buffer may be divided in.
pub const MIN_SECTION_SIZE: u32 = 68;

/// Largest receive buffer from version 4 on.
pub const MAX_RECEIVE_BUFFER: u32 = 31 << 20;

/// Largest receive buffer up to version 2.
pub const MAX_RECEIVE_BUFFER_LEGACY: u32 = 15 << 20;

/// Largest send buffer.
pub const MAX_SEND_BUFFER: u32 = 15 << 20;

/// Offset of the send indirection table as hosts up to version 6 place it, whatever they say.
const OLD_SEND_TABLE_OFFSET: usize = MESSAGE_SIZE;

/// What is wrong with a message of the peer, or with a caller's buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The message ends before its body does.
    Short {
        /// What was to be read.
        what: &'static str,
        /// Bytes it takes.
        need: usize,
        /// Bytes there are.
        have: usize,
    },
    /// Another message than the expected one.
    UnexpectedType {
        /// The expected type.
        expected: MessageType,
        /// The type found.
        found: MessageType,
    },
    /// A send indirection table of another size than [`SEND_TABLE_SIZE`].
    SendTableCount(u32),
    /// A send indirection table that is not inside its message.
    SendTableOffset(u32),
    /// The caller's buffer is too small for the message to build.
    BufferTooSmall,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Short { what, need, have } => {
                write!(f, "{what} too short: {have} bytes of {need}")
            }
            Self::UnexpectedType { expected, found } => {
                write!(f, "message type {found} instead of {expected}")
            }
            Self::SendTableCount(count) => write!(f, "wrong send table size {count}"),
            Self::SendTableOffset(offset) => write!(f, "send table offset {offset} too big"),
            Self::BufferTooSmall => f.write_str("buffer too small for the message"),
        }
    }
}

/// A version of the protocol. Comparison follows age.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(pub u32);

impl Version {
    /// Version 1.
    pub const V1: Self = Self(2);
    /// Version 2.
    pub const V2: Self = Self(0x3_0002);
    /// Version 4.
    pub const V4: Self = Self(0x4_0000);
    /// Version 5: subchannels, RSS, SR-IOV.
    pub const V5: Self = Self(0x5_0000);
    /// Version 6.
    pub const V6: Self = Self(0x6_0000);
    /// Version 6.1: receive segment coalescing.
    pub const V61: Self = Self(0x6_0001);

    /// All versions, newest first, the order in which a driver proposes them.
    pub const ALL: [Self; 6] = [Self::V61, Self::V6, Self::V5, Self::V4, Self::V2, Self::V1];

    /// The usual name, such as `6.1`, if the version is known.
    pub const fn name(self) -> Option<&'static str> {
        Some(match self {
            Self::V1 => "1",
            Self::V2 => "2",
            Self::V4 => "4",
            Self::V5 => "5",
            Self::V6 => "6",
            Self::V61 => "6.1",
            _ => return None,
        })
    }

    /// The NDIS version, major and minor, that a driver tells the host with this version.
    pub fn ndis_version(self) -> (u32, u32) {
        if self <= Self::V4 {
            (6, 1)
        } else {
            (6, 30)
        }
    }
}

open_numbers! {
    /// Type of a message.
    MessageType(u32) {
        /// Proposes versions.
        INIT = 1,
        /// Answers [`Self::INIT`].
        INIT_COMPLETE = 2,
        /// Tells the NDIS version.
        SEND_NDIS_VERSION = 100,
        /// Hands over the receive buffer.
        SEND_RECEIVE_BUFFER = 101,
        /// Answers [`Self::SEND_RECEIVE_BUFFER`].
        SEND_RECEIVE_BUFFER_COMPLETE = 102,
        /// Takes the receive buffer back.
        REVOKE_RECEIVE_BUFFER = 103,
        /// Hands over the send buffer.
        SEND_SEND_BUFFER = 104,
        /// Answers [`Self::SEND_SEND_BUFFER`].
        SEND_SEND_BUFFER_COMPLETE = 105,
        /// Takes the send buffer back.
        REVOKE_SEND_BUFFER = 106,
        /// Carries RNDIS messages.
        SEND_RNDIS_PACKET = 107,
        /// Answers [`Self::SEND_RNDIS_PACKET`].
        SEND_RNDIS_PACKET_COMPLETE = 108,
        /// Tells the MTU and what the driver is capable of (version 2).
        SEND_NDIS_CONFIG = 125,
        /// Announces or withdraws the VF that belongs to the device (version 4).
        SEND_VF_ASSOCIATION = 128,
        /// Moves traffic between the synthetic path and the VF (version 4).
        SWITCH_DATA_PATH = 129,
        /// Requests subchannels, and answers that request (version 5).
        SUBCHANNEL = 133,
        /// Hands over the send indirection table (version 5).
        SEND_INDIRECTION_TABLE = 134,
    }

    /// Outcome of a request.
    Status(u32) {
        /// No outcome yet.
        NONE = 0,
        /// Done.
        SUCCESS = 1,
        /// Not done.
        FAILURE = 2,
        /// The proposed versions are too new.
        VERSION_TOO_NEW = 3,
        /// The proposed versions are too old.
        VERSION_TOO_OLD = 4,
        /// The RNDIS message makes no sense.
        INVALID_RNDIS_PACKET = 5,
        /// Try again.
        BUSY = 6,
        /// None of the proposed versions is supported.
        VERSION_UNSUPPORTED = 7,
    }
}

/// A message body whose layout has a fixed length.
pub trait Body: FromBytes + IntoBytes + KnownLayout + Immutable + Unaligned {
    /// The type of the message that has this body.
    const TYPE: MessageType;
    /// What to call the message in errors.
    const NAME: &'static str;
}

/// Declares message bodies: layout and message type.
macro_rules! bodies {
    ($($(#[$attr:meta])* $name:ident = $ty:ident {
        $($(#[$fattr:meta])* $field:ident: $fty:ty,)*
    })*) => {
        layouts! {
            $($(#[$attr])* $name { $($(#[$fattr])* $field: $fty,)* })*
        }

        $(
            impl Body for $name {
                const TYPE: MessageType = MessageType::$ty;
                const NAME: &'static str = stringify!($name);
            }

            const _: () = assert!(HEADER_SIZE + size_of::<$name>() <= MESSAGE_SIZE);
        )*
    };
}

bodies! {
    /// The driver proposes the versions from `min_version` to `max_version`.
    Init = INIT {
        /// Oldest version proposed.
        min_version: U32,
        /// Newest version proposed.
        max_version: U32,
    }

    /// The host's answer to [`Init`].
    InitComplete = INIT_COMPLETE {
        /// The version accepted.
        version: U32,
        /// Longest chain of memory ranges of a packet.
        max_mdl_chain_length: U32,
        /// A [`Status`].
        status: U32,
    }

    /// The driver's NDIS version, on which the layout of NDIS objects depends.
    SendNdisVersion = SEND_NDIS_VERSION {
        /// Major version.
        major: U32,
        /// Minor version.
        minor: U32,
    }

    /// The driver's configuration, from version 2 on.
    NdisConfig = SEND_NDIS_CONFIG {
        /// Largest frame, with the Ethernet header.
        max_frame: U32,
        /// Zero.
        reserved: U32,
        /// What the driver is capable of, see [`Capabilities`].
        capabilities: U64,
    }

    /// The driver hands over the receive buffer.
    SendReceiveBuffer = SEND_RECEIVE_BUFFER {
        /// GPADL of the buffer.
        gpadl: U32,
        /// [`RECEIVE_BUFFER_ID`].
        id: U16,
    }

    /// The host's answer to [`SendReceiveBuffer`], with the one section there may be.
    SendReceiveBufferComplete = SEND_RECEIVE_BUFFER_COMPLETE {
        /// A [`Status`].
        status: U32,
        /// Number of sections; drivers accept no other number than one.
        num_sections: U32,
        /// The section.
        section: ReceiveSection,
    }

    /// The driver takes the receive buffer back.
    RevokeReceiveBuffer = REVOKE_RECEIVE_BUFFER {
        /// [`RECEIVE_BUFFER_ID`].
        id: U16,
    }

    /// The driver hands over the send buffer.
    SendSendBuffer = SEND_SEND_BUFFER {
        /// GPADL of the buffer.
        gpadl: U32,
        /// [`SEND_BUFFER_ID`].
        id: U16,
    }

    /// The host's answer to [`SendSendBuffer`].
    SendSendBufferComplete = SEND_SEND_BUFFER_COMPLETE {
        /// A [`Status`].
        status: U32,
        /// Size of the sections that the host divides the buffer in.
        section_size: U32,
    }

    /// The driver takes the send buffer back.
    RevokeSendBuffer = REVOKE_SEND_BUFFER {
        /// [`SEND_BUFFER_ID`].
        id: U16,
    }

    /// One or several RNDIS messages.
    SendRndisPacket = SEND_RNDIS_PACKET {
        /// A [`ChannelType`].
        channel_type: U32,
        /// Send section that holds the messages or their beginning, or [`INVALID_SECTION`].
        section_index: U32,
        /// Bytes in that section.
        section_size: U32,
    }

    /// The answer to [`SendRndisPacket`], from either side.
    SendRndisPacketComplete = SEND_RNDIS_PACKET_COMPLETE {
        /// A [`Status`].
        status: U32,
    }

    /// The host tells of the VF that belongs to the device.
    VfAssociation = SEND_VF_ASSOCIATION {
        /// One if there is a VF, zero if there is none any more.
        allocated: U32,
        /// Serial number of the VF, the number of its PCI slot.
        serial: U32,
    }

    /// The driver moves the traffic to another path. The completion has no body.
    SwitchDataPath = SWITCH_DATA_PATH {
        /// A [`DataPath`].
        active: U32,
    }

    /// The driver requests subchannels.
    SubchannelRequest = SUBCHANNEL {
        /// A [`SubchannelOperation`].
        operation: U32,
        /// Number of subchannels wanted.
        num_subchannels: U32,
    }

    /// The host's answer to [`SubchannelRequest`].
    SubchannelComplete = SUBCHANNEL {
        /// A [`Status`].
        status: U32,
        /// Number of subchannels granted.
        num_subchannels: U32,
    }

    /// Beginning of the message with the send indirection table. See [`parse_send_table`] and
    /// [`encode_send_table`].
    SendIndirectionTable = SEND_INDIRECTION_TABLE {
        /// Number of 32-bit entries, [`SEND_TABLE_SIZE`].
        count: U32,
        /// Where they are, from the beginning of the message.
        offset: U32,
    }
}

layouts! {
    /// A part of the receive buffer that is divided evenly.
    ReceiveSection {
        /// Offset of the section in the buffer.
        offset: U32,
        /// Size of a suballocation.
        suballocation_size: U32,
        /// Number of suballocations.
        num_suballocations: U32,
        /// Offset of the section's end.
        end_offset: U32,
    }
}

bit_sets! {
    /// Bits of [`NdisConfig::capabilities`].
    Capabilities(u64) {
        /// Virtual machine queues.
        VMQ = 1 << 0,
        /// TCP chimney.
        CHIMNEY = 1 << 1,
        /// SR-IOV.
        SRIOV = 1 << 2,
        /// VLAN tags in per-packet information.
        IEEE8021Q = 1 << 3,
        /// Correlation identifiers.
        CORRELATION_ID = 1 << 4,
        /// Teaming. The host sends link speed changes only to a driver that has this bit.
        TEAMING = 1 << 5,
        /// Virtual subnet identifiers.
        VIRTUAL_SUBNET_ID = 1 << 6,
        /// Receive segment coalescing.
        RSC = 1 << 7,
    }
}

open_numbers! {
    /// Which of the two RNDIS streams a [`SendRndisPacket`] belongs to.
    ChannelType(u32) {
        /// Frames.
        DATA = 0,
        /// Everything else.
        CONTROL = 1,
    }

    /// A data path.
    DataPath(u32) {
        /// Traffic goes by VMBus.
        SYNTHETIC = 0,
        /// Traffic goes by the VF.
        VF = 1,
    }

    /// What a [`SubchannelRequest`] wants.
    SubchannelOperation(u32) {
        /// Allocate subchannels.
        ALLOCATE = 1,
    }
}

/// Length that a host pads a message to with the given version.
pub fn message_size(version: Version) -> usize {
    if version >= Version::V61 {
        MESSAGE_SIZE
    } else {
        MESSAGE_SIZE_BEFORE_V61
    }
}

/// Makes the message with this body, padded with zeros to [`MESSAGE_SIZE`].
#[inline]
pub fn encode<B: Body>(body: &B) -> [u8; MESSAGE_SIZE] {
    let mut message = [0; MESSAGE_SIZE];
    let (header, rest) = message.split_at_mut(HEADER_SIZE);
    header.copy_from_slice(&B::TYPE.0.to_le_bytes());
    // `bodies!` checked that the body fits.
    for (to, from) in rest.iter_mut().zip(body.as_bytes()) {
        *to = *from;
    }
    message
}

/// Type of a message.
#[inline]
pub fn message_type(message: &[u8]) -> Result<MessageType, Error> {
    let (ty, _) = U32::read_from_prefix(message).map_err(|_| Error::Short {
        what: "message type",
        need: HEADER_SIZE,
        have: message.len(),
    })?;
    Ok(MessageType(ty.get()))
}

/// Takes the body out of a message that must have the body's type.
#[inline]
pub fn decode<B: Body>(message: &[u8]) -> Result<B, Error> {
    let found = message_type(message)?;
    if found != B::TYPE {
        return Err(Error::UnexpectedType {
            expected: B::TYPE,
            found,
        });
    }
    decode_body(message)
}

/// Takes the body out of a message of known type.
#[inline]
fn decode_body<B: Body>(message: &[u8]) -> Result<B, Error> {
    let body = message.get(HEADER_SIZE..).unwrap_or_default();
    match B::read_from_prefix(body) {
        Ok((body, _)) => Ok(body),
        Err(_) => Err(Error::Short {
            what: B::NAME,
            need: HEADER_SIZE + size_of::<B>(),
            have: message.len(),
        }),
    }
}

/// A message of the guest's driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestMessage {
    /// See [`Init`].
    Init(Init),
    /// See [`SendNdisVersion`].
    SendNdisVersion(SendNdisVersion),
    /// See [`NdisConfig`].
    NdisConfig(NdisConfig),
    /// See [`SendReceiveBuffer`].
    SendReceiveBuffer(SendReceiveBuffer),
    /// See [`RevokeReceiveBuffer`].
    RevokeReceiveBuffer(RevokeReceiveBuffer),
    /// See [`SendSendBuffer`].
    SendSendBuffer(SendSendBuffer),
    /// See [`RevokeSendBuffer`].
    RevokeSendBuffer(RevokeSendBuffer),
    /// See [`SendRndisPacket`].
    SendRndisPacket(SendRndisPacket),
    /// See [`SendRndisPacketComplete`]; the payload of a completion.
    SendRndisPacketComplete(SendRndisPacketComplete),
    /// See [`SwitchDataPath`].
    SwitchDataPath(SwitchDataPath),
    /// See [`SubchannelRequest`].
    SubchannelRequest(SubchannelRequest),
    /// A message that this crate has no layout for.
    Unknown(MessageType),
}

impl GuestMessage {
    /// Parses what a guest sent.
    pub fn parse(message: &[u8]) -> Result<Self, Error> {
        let ty = message_type(message)?;
        Ok(match ty {
            MessageType::INIT => Self::Init(decode_body(message)?),
            MessageType::SEND_NDIS_VERSION => Self::SendNdisVersion(decode_body(message)?),
            MessageType::SEND_NDIS_CONFIG => Self::NdisConfig(decode_body(message)?),
            MessageType::SEND_RECEIVE_BUFFER => Self::SendReceiveBuffer(decode_body(message)?),
            MessageType::REVOKE_RECEIVE_BUFFER => Self::RevokeReceiveBuffer(decode_body(message)?),
            MessageType::SEND_SEND_BUFFER => Self::SendSendBuffer(decode_body(message)?),
            MessageType::REVOKE_SEND_BUFFER => Self::RevokeSendBuffer(decode_body(message)?),
            MessageType::SEND_RNDIS_PACKET => Self::SendRndisPacket(decode_body(message)?),
            MessageType::SEND_RNDIS_PACKET_COMPLETE => {
                Self::SendRndisPacketComplete(decode_body(message)?)
            }
            MessageType::SWITCH_DATA_PATH => Self::SwitchDataPath(decode_body(message)?),
            MessageType::SUBCHANNEL => Self::SubchannelRequest(decode_body(message)?),
            other => Self::Unknown(other),
        })
    }
}

/// A message of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostMessage {
    /// See [`InitComplete`].
    InitComplete(InitComplete),
    /// See [`SendReceiveBufferComplete`].
    SendReceiveBufferComplete(SendReceiveBufferComplete),
    /// See [`SendSendBufferComplete`].
    SendSendBufferComplete(SendSendBufferComplete),
    /// See [`SendRndisPacket`]; sent with transfer pages.
    SendRndisPacket(SendRndisPacket),
    /// See [`SendRndisPacketComplete`].
    SendRndisPacketComplete(SendRndisPacketComplete),
    /// See [`VfAssociation`].
    VfAssociation(VfAssociation),
    /// See [`SubchannelComplete`].
    SubchannelComplete(SubchannelComplete),
    /// The entries of the send indirection table, see [`parse_send_table`].
    SendIndirectionTable([u32; SEND_TABLE_SIZE]),
    /// A message that this crate has no layout for.
    Unknown(MessageType),
}

impl HostMessage {
    /// Parses what a host sent after `version` was negotiated (or while it is).
    pub fn parse(message: &[u8], version: Version) -> Result<Self, Error> {
        let ty = message_type(message)?;
        Ok(match ty {
            MessageType::INIT_COMPLETE => Self::InitComplete(decode_body(message)?),
            MessageType::SEND_RECEIVE_BUFFER_COMPLETE => {
                Self::SendReceiveBufferComplete(decode_body(message)?)
            }
            MessageType::SEND_SEND_BUFFER_COMPLETE => {
                Self::SendSendBufferComplete(decode_body(message)?)
            }
            MessageType::SEND_RNDIS_PACKET => Self::SendRndisPacket(decode_body(message)?),
            MessageType::SEND_RNDIS_PACKET_COMPLETE => {
                Self::SendRndisPacketComplete(decode_body(message)?)
            }
            MessageType::SEND_VF_ASSOCIATION => Self::VfAssociation(decode_body(message)?),
            MessageType::SUBCHANNEL => Self::SubchannelComplete(decode_body(message)?),
            MessageType::SEND_INDIRECTION_TABLE => {
                Self::SendIndirectionTable(parse_send_table(message, version)?)
            }
            other => Self::Unknown(other),
        })
    }
}

/// Takes the entries out of a send indirection table message.
///
/// Hosts up to version 6 may state a wrong offset; their table follows the space of the largest
/// message. The entries are not checked: a receiver must bring them into the range of its
/// channels.
pub fn parse_send_table(message: &[u8], version: Version) -> Result<[u32; SEND_TABLE_SIZE], Error> {
    const TABLE_BYTES: usize = SEND_TABLE_SIZE * 4;

    let head: SendIndirectionTable = decode(message)?;
    let (count, stated) = (head.count.get(), head.offset.get());
    if count as usize != SEND_TABLE_SIZE {
        return Err(Error::SendTableCount(count));
    }
    let old_host = version <= Version::V6 && message.len() >= OLD_SEND_TABLE_OFFSET + TABLE_BYTES;
    let offset = if old_host {
        OLD_SEND_TABLE_OFFSET
    } else {
        stated as usize
    };
    let bytes = message.get(offset..).unwrap_or_default();
    let (entries, _) = <[U32; SEND_TABLE_SIZE]>::read_from_prefix(bytes)
        .map_err(|_| Error::SendTableOffset(stated))?;
    Ok(entries.map(U32::get))
}

/// Writes a send indirection table message and returns its length. The table follows the space
/// of the largest message, where it is found with every version.
pub fn encode_send_table(
    entries: &[u32; SEND_TABLE_SIZE],
    buffer: &mut [u8],
) -> Result<usize, Error> {
    let message = buffer
        .get_mut(..MAX_MESSAGE_SIZE)
        .ok_or(Error::BufferTooSmall)?;
    let (head, table) = message.split_at_mut(MESSAGE_SIZE);
    head.copy_from_slice(&encode(&SendIndirectionTable {
        count: U32::new(SEND_TABLE_SIZE as u32),
        offset: U32::new(MESSAGE_SIZE as u32),
    }));
    for (to, entry) in table.chunks_exact_mut(4).zip(entries) {
        to.copy_from_slice(&entry.to_le_bytes());
    }
    Ok(MAX_MESSAGE_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_ordered_by_age() {
        assert!(Version::ALL.windows(2).all(|pair| pair[0] > pair[1]));
        assert!(Version::ALL.iter().all(|version| version.name().is_some()));
        assert_eq!(Version(7).name(), None);
        assert_eq!(Version::V4.ndis_version(), (6, 1));
        assert_eq!(Version::V5.ndis_version(), (6, 30));
    }

    #[test]
    fn init_has_the_documented_bytes() {
        let message = encode(&Init {
            min_version: U32::new(0x6_0001),
            max_version: U32::new(0x6_0001),
        });
        assert_eq!(&message[..12], &[1, 0, 0, 0, 1, 0, 6, 0, 1, 0, 6, 0]);
        assert!(message[12..].iter().all(|&byte| byte == 0));
    }

    /// Every body parses at exactly its length, and one byte less is named as short.
    fn check_length<B: Body + PartialEq + fmt::Debug>(body: B) {
        let message = encode(&body);
        let need = HEADER_SIZE + size_of::<B>();
        assert_eq!(decode::<B>(&message[..need]), Ok(body));
        for have in HEADER_SIZE..need {
            assert_eq!(
                decode::<B>(&message[..have]),
                Err(Error::Short {
                    what: B::NAME,
                    need,
                    have
                })
            );
        }
        assert!(decode::<B>(&message[..HEADER_SIZE - 1]).is_err());
        assert!(decode::<B>(&[]).is_err());
    }

    #[test]
    fn every_length_is_checked() {
        check_length(Init::default());
        check_length(InitComplete::default());
        check_length(SendNdisVersion::default());
        check_length(NdisConfig::default());
        check_length(SendReceiveBuffer::default());
        check_length(SendReceiveBufferComplete::default());
        check_length(RevokeReceiveBuffer::default());
        check_length(SendSendBuffer::default());
        check_length(SendSendBufferComplete::default());
        check_length(RevokeSendBuffer::default());
        check_length(SendRndisPacket::default());
        check_length(SendRndisPacketComplete::default());
        check_length(VfAssociation::default());
        check_length(SwitchDataPath::default());
        check_length(SubchannelRequest::default());
        check_length(SubchannelComplete::default());
        check_length(SendIndirectionTable::default());
    }

    #[test]
    fn sizes_are_those_of_the_protocol() {
        assert_eq!(size_of::<InitComplete>(), 12);
        assert_eq!(size_of::<NdisConfig>(), 16);
        assert_eq!(size_of::<SendReceiveBuffer>(), 6);
        assert_eq!(size_of::<SendReceiveBufferComplete>(), 24);
        assert_eq!(
            HEADER_SIZE + size_of::<SendReceiveBufferComplete>(),
            MESSAGE_SIZE_BEFORE_V61
        );
        assert_eq!(size_of::<SendRndisPacket>(), 12);
    }

    #[test]
    fn another_type_is_refused() {
        let message = encode(&SwitchDataPath::default());
        assert_eq!(
            decode::<Init>(&message),
            Err(Error::UnexpectedType {
                expected: MessageType::INIT,
                found: MessageType::SWITCH_DATA_PATH
            })
        );
    }

    #[test]
    fn unknown_messages_are_values() {
        let message = 109u32.to_le_bytes();
        let unknown = MessageType(109);
        assert_eq!(
            GuestMessage::parse(&message),
            Ok(GuestMessage::Unknown(unknown))
        );
        assert_eq!(
            HostMessage::parse(&message, Version::V61),
            Ok(HostMessage::Unknown(unknown))
        );
        assert_eq!(unknown.name(), None);
        assert_eq!(std::format!("{unknown}"), "0x6d");
        assert_eq!(std::format!("{}", MessageType::INIT), "INIT");
    }

    #[test]
    fn the_subchannel_message_depends_on_the_direction() {
        let message = encode(&SubchannelRequest {
            operation: U32::new(1),
            num_subchannels: U32::new(3),
        });
        assert!(matches!(
            GuestMessage::parse(&message),
            Ok(GuestMessage::SubchannelRequest(_))
        ));
        assert!(matches!(
            HostMessage::parse(&message, Version::V5),
            Ok(HostMessage::SubchannelComplete(_))
        ));
    }

    /// A send table message with the entries at `at` and the offset field saying `stated`.
    fn send_table(at: usize, stated: u32, count: u32, length: usize) -> [u8; 128] {
        let mut message = [0xff; 128];
        message[..4].copy_from_slice(&134u32.to_le_bytes());
        message[4..8].copy_from_slice(&count.to_le_bytes());
        message[8..12].copy_from_slice(&stated.to_le_bytes());
        for i in 0..SEND_TABLE_SIZE {
            let at = at + 4 * i;
            if at + 4 <= length {
                message[at..at + 4].copy_from_slice(&(i as u32).to_le_bytes());
            }
        }
        message
    }

    #[test]
    fn send_table_offsets() {
        let good: [u32; SEND_TABLE_SIZE] = core::array::from_fn(|i| i as u32);
        // Where the table is, what the message says, its length, version, outcome.
        let cases = [
            (40, 40, 104, Version::V61, Ok(())),
            (12, 12, 76, Version::V61, Ok(())),
            (12, 12, 75, Version::V61, Err(Error::SendTableOffset(12))),
            (40, 41, 104, Version::V61, Err(Error::SendTableOffset(41))),
            (
                40,
                0xffff_fff0,
                104,
                Version::V61,
                Err(Error::SendTableOffset(0xffff_fff0)),
            ),
            // The old hosts' mistake, corrected up to version 6 when there is room for it.
            (40, 36, 104, Version::V6, Ok(())),
            (40, 0xffff_ffff, 104, Version::V5, Ok(())),
            (12, 12, 76, Version::V5, Ok(())),
            (12, 13, 76, Version::V5, Err(Error::SendTableOffset(13))),
        ];
        for (at, stated, length, version, outcome) in cases {
            let message = send_table(at, stated, 16, length);
            assert_eq!(
                parse_send_table(&message[..length], version),
                outcome.map(|()| good),
                "table at {at}, stated {stated}, length {length}, {version:?}"
            );
        }
        for count in [0, 15, 17, u32::MAX] {
            assert_eq!(
                parse_send_table(&send_table(40, 40, count, 104), Version::V61),
                Err(Error::SendTableCount(count))
            );
        }
    }

    #[test]
    fn send_table_round_trip() {
        let entries = [3; SEND_TABLE_SIZE];
        let mut buffer = [0; MAX_MESSAGE_SIZE];
        assert_eq!(
            encode_send_table(&entries, &mut buffer),
            Ok(MAX_MESSAGE_SIZE)
        );
        for version in Version::ALL {
            assert_eq!(
                HostMessage::parse(&buffer, version),
                Ok(HostMessage::SendIndirectionTable(entries))
            );
        }
        assert_eq!(
            encode_send_table(&entries, &mut buffer[..MAX_MESSAGE_SIZE - 1]),
            Err(Error::BufferTooSmall)
        );
    }
}
