// SPDX-License-Identifier: GPL-2.0

//! Wire format of the Hyper-V virtual PCI bus protocol, versions 1.1 to 1.4.
//!
//! The guest is the client (VSC), the host the server (VSP). Requests of the guest are in-band
//! VMBus packets that start with a [`MessageType`]; those with a reply are answered by a completion
//! packet whose payload starts with a [`Status`]. The host may send [`Event`]s at any time.
//!
//! All fields are little endian and all structures are unaligned, so a packet may be parsed
//! wherever it lies. VMBus pads payloads to eight bytes: a packet may be longer than the structure
//! it carries.
//!
//! - From guest to host: parsed by [`Request::parse`], built by `new` of each structure,
//!   [`InterruptRequest::write`] and [`WriteBlock::write`].
//! - Completions: parsed by `parse` of each reply, built by [`write_status`] and `new` of each
//!   reply.
//! - From host to guest: parsed by [`Event::parse`], built by [`write_bus_relations`],
//!   [`ChildMessage::new`] and [`InvalidateBlock::new`].

use core::fmt;

use zerocopy::{
    little_endian::{
        U16,
        U32,
        U64, //
    },
    FromBytes,
    Immutable,
    IntoBytes, //
};
use zerocopy_derive::{
    FromBytes,
    Immutable,
    IntoBytes,
    KnownLayout,
    Unaligned, //
};

/// Number of base address registers of a function.
pub const BARS: usize = 6;

/// Largest configuration block that can be read or written.
pub const BLOCK_SIZE_MAX: usize = 128;

/// Longest processor list of an interrupt descriptor of protocol 1.2 and later.
pub const PROCESSORS_MAX: usize = 32;

/// Most functions a bus can have: a slot number has five device and three function bits.
pub const FUNCTIONS_MAX: usize = 256;

/// The MMIO window through which the guest reaches configuration space.
pub mod config_window {
    /// Length of the window.
    pub const LENGTH: u64 = 0x2000;
    /// A 32-bit write here, of a [`SlotNumber`](super::SlotNumber), selects the function.
    pub const SLOT: u64 = 0;
    /// The configuration space of the selected function starts here.
    pub const CONFIG_SPACE: u64 = 0x1000;
    /// Size of a function's configuration space.
    pub const CONFIG_SPACE_SIZE: u64 = LENGTH - CONFIG_SPACE;
}

/// Why a packet was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The packet ends before the structure does.
    Truncated {
        /// The structure.
        what: &'static str,
        /// Bytes it needs.
        needed: usize,
        /// Bytes there are.
        actual: usize,
    },
    /// A field has a value the protocol does not allow.
    Invalid {
        /// The field.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// The caller's buffer is too small for the message.
    NoSpace {
        /// The message.
        what: &'static str,
        /// Bytes it needs.
        needed: usize,
        /// Bytes there are.
        actual: usize,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Error::Truncated {
                what,
                needed,
                actual,
            } => write!(f, "{what} too small: {actual} bytes, {needed} needed"),
            Error::Invalid { what, value } => write!(f, "invalid {what}: {value:#x}"),
            Error::NoSpace {
                what,
                needed,
                actual,
            } => write!(f, "no space for {what}: {actual} bytes, {needed} needed"),
        }
    }
}

impl core::error::Error for Error {}

/// Result of a parser or builder.
pub type Result<T> = core::result::Result<T, Error>;

/// Copies the structure `T` out of the start of `bytes`.
fn parse<T: FromBytes>(what: &'static str, bytes: &[u8]) -> Result<T> {
    match T::read_from_prefix(bytes) {
        Ok((message, _)) => Ok(message),
        Err(_) => Err(Error::Truncated {
            what,
            needed: size_of::<T>(),
            actual: bytes.len(),
        }),
    }
}

/// Copies `message` to the start of `out` and gives its length.
fn put<T: IntoBytes + Immutable>(what: &'static str, message: &T, out: &mut [u8]) -> Result<usize> {
    let needed = size_of::<T>();
    let actual = out.len();
    match message.write_to_prefix(out) {
        Ok(()) => Ok(needed),
        Err(_) => Err(Error::NoSpace {
            what,
            needed,
            actual,
        }),
    }
}

open_numbers! {
    /// Version of the protocol: major number in the high half, minor in the low.
    ProtocolVersion(u32) {
        /// Windows 10.
        V1_1 = 0x1_0001,
        /// Processor lists instead of a mask, so more than 64 processors.
        V1_2 = 0x1_0002,
        /// NUMA affinity in the bus relations.
        V1_3 = 0x1_0003,
        /// 32-bit interrupt vectors.
        V1_4 = 0x1_0004,
    }
}

impl ProtocolVersion {
    /// All known versions, newest first, the order in which a guest tries them.
    pub const ALL: [Self; 4] = [Self::V1_4, Self::V1_3, Self::V1_2, Self::V1_1];

    /// The message that lists the functions of the bus in this version.
    pub fn bus_relations(self) -> MessageType {
        if self >= Self::V1_3 {
            MessageType::BUS_RELATIONS2
        } else {
            MessageType::BUS_RELATIONS
        }
    }

    /// The message that reports assigned resources in this version.
    pub fn resources_assigned(self) -> MessageType {
        if self >= Self::V1_2 {
            MessageType::RESOURCES_ASSIGNED2
        } else {
            MessageType::RESOURCES_ASSIGNED
        }
    }

    /// The message that asks for an interrupt in this version.
    pub fn create_interrupt(self) -> MessageType {
        if self >= Self::V1_4 {
            MessageType::CREATE_INTERRUPT3
        } else if self >= Self::V1_2 {
            MessageType::CREATE_INTERRUPT2
        } else {
            MessageType::CREATE_INTERRUPT
        }
    }
}

open_numbers! {
    /// First word of each in-band message.
    MessageType(u32) {
        /// Host → guest: the functions of the bus, until version 1.2.
        BUS_RELATIONS = 0x4249_0000,
        /// Guest → host: asks for the bus relations; they come as an event, not as a completion.
        QUERY_BUS_RELATIONS = 0x4249_0001,
        /// Guest → host: changes the power state of a function.
        POWER_STATE_CHANGE = 0x4249_0004,
        /// Guest → host: asks for the BAR masks of a function.
        QUERY_RESOURCE_REQUIREMENTS = 0x4249_0005,
        /// Guest → host: asks for the boot-time resources of a function.
        QUERY_RESOURCE_RESOURCES = 0x4249_0006,
        /// Guest → host: the bus is ready, with its configuration window at the given address.
        BUS_D0_ENTRY = 0x4249_0007,
        /// Guest → host: the bus is no longer used.
        BUS_D0_EXIT = 0x4249_0008,
        /// Guest → host: reads a configuration block.
        READ_BLOCK = 0x4249_0009,
        /// Guest → host: writes a configuration block.
        WRITE_BLOCK = 0x4249_000a,
        /// Host → guest: asks the guest to give a function up.
        EJECT = 0x4249_000b,
        /// Host → guest: asks whether a function could be stopped.
        QUERY_STOP = 0x4249_000c,
        /// Host → guest: takes a stop back.
        REENABLE = 0x4249_000d,
        /// Guest → host: a function cannot be stopped.
        QUERY_STOP_FAILED = 0x4249_000e,
        /// Guest → host: the ejected function is no longer used.
        EJECTION_COMPLETE = 0x4249_000f,
        /// Guest → host: resources are assigned, version 1.1.
        RESOURCES_ASSIGNED = 0x4249_0010,
        /// Guest → host: resources are released.
        RESOURCES_RELEASED = 0x4249_0011,
        /// Host → guest: configuration blocks have changed.
        INVALIDATE_BLOCK = 0x4249_0012,
        /// Guest → host: proposes a protocol version.
        QUERY_PROTOCOL_VERSION = 0x4249_0013,
        /// Guest → host: asks for an interrupt, version 1.1.
        CREATE_INTERRUPT = 0x4249_0014,
        /// Guest → host: gives an interrupt back, all versions.
        DELETE_INTERRUPT = 0x4249_0015,
        /// Guest → host: resources are assigned, version 1.2 and later.
        RESOURCES_ASSIGNED2 = 0x4249_0016,
        /// Guest → host: asks for an interrupt, versions 1.2 and 1.3.
        CREATE_INTERRUPT2 = 0x4249_0017,
        /// Guest → host: reserved form of the deletion.
        DELETE_INTERRUPT2 = 0x4249_0018,
        /// Host → guest: the functions of the bus, version 1.3 and later.
        BUS_RELATIONS2 = 0x4249_0019,
        /// Guest → host: reserved form of the assignment.
        RESOURCES_ASSIGNED3 = 0x4249_001a,
        /// Guest → host: asks for an interrupt, version 1.4.
        CREATE_INTERRUPT3 = 0x4249_001b,
    }
}

impl MessageType {
    /// Type of the in-band message in `bytes`.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        Ok(Self(parse::<U32>("message type", bytes)?.get()))
    }
}

open_numbers! {
    /// First word of each completion: an NTSTATUS, negative when the request failed.
    Status(i32) {
        /// Done.
        SUCCESS = 0,
        /// General failure.
        UNSUCCESSFUL = 0xc000_0001_u32 as i32,
        /// A field of the request is wrong.
        INVALID_PARAMETER = 0xc000_000d_u32 as i32,
        /// No function in that slot.
        NO_SUCH_DEVICE = 0xc000_000e_u32 as i32,
        /// The request is too short.
        INFO_LENGTH_MISMATCH = 0xc000_0004_u32 as i32,
        /// Protocol version not supported; the guest tries an older one.
        REVISION_MISMATCH = 0xc000_0059_u32 as i32,
        /// Nothing left to give.
        INSUFFICIENT_RESOURCES = 0xc000_009a_u32 as i32,
        /// The request is not known.
        NOT_SUPPORTED = 0xc000_00bb_u32 as i32,
        /// The request does not fit the state of the bus or of the function.
        INVALID_DEVICE_STATE = 0xc000_0184_u32 as i32,
    }
}

impl Status {
    /// Whether the request failed.
    pub fn is_failure(self) -> bool {
        self.0 < 0
    }

    /// Status of the completion in `bytes`.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        Ok(Self(parse::<U32>("completion", bytes)?.get() as i32))
    }
}

/// Builds a completion that carries a status only.
pub fn write_status(status: Status, out: &mut [u8]) -> Result<usize> {
    put("completion", &U32::new(status.0 as u32), out)
}

/// Number of a function on the bus: five bits of device, three of function.
///
/// This is the order of Windows; Linux's `devfn` has the function in the low bits.
#[derive(
    Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Default,
)]
#[repr(C)]
pub struct SlotNumber(U32);

impl SlotNumber {
    /// Slot of the given device (0 to 31) and function (0 to 7); higher bits are cut off.
    pub fn new(device: u8, function: u8) -> Self {
        Self(U32::new(
            u32::from(device & 0x1f) | (u32::from(function & 7) << 5),
        ))
    }

    /// Slot of a Linux `devfn`.
    pub fn from_devfn(devfn: u8) -> Self {
        Self::new(devfn >> 3, devfn & 7)
    }

    /// Slot with the given value on the wire.
    pub fn from_raw(raw: u32) -> Self {
        Self(U32::new(raw))
    }

    /// Value on the wire.
    pub fn raw(self) -> u32 {
        self.0.get()
    }

    /// Device number.
    pub fn device(self) -> u8 {
        (self.raw() & 0x1f) as u8
    }

    /// Function number.
    pub fn function(self) -> u8 {
        ((self.raw() >> 5) & 7) as u8
    }

    /// Linux's `devfn`.
    pub fn devfn(self) -> u8 {
        (self.device() << 3) | self.function()
    }
}

impl fmt::Debug for SlotNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}.{}", self.device(), self.function())
    }
}

/// A message that is nothing but its type.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Message {
    message_type: U32,
}

impl Message {
    /// Message of the given type.
    pub fn new(message_type: MessageType) -> Self {
        Self {
            message_type: U32::new(message_type.0),
        }
    }
}

/// A message about one function and nothing else.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ChildMessage {
    message_type: U32,
    /// The function.
    pub slot: SlotNumber,
}

impl ChildMessage {
    /// Message of the given type about the given function.
    pub fn new(message_type: MessageType, slot: SlotNumber) -> Self {
        Self {
            message_type: U32::new(message_type.0),
            slot,
        }
    }
}

/// Proposes a protocol version. Completion: [`Status`], maybe followed by the host's choice.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct VersionRequest {
    message_type: U32,
    version: U32,
}

impl VersionRequest {
    /// Proposal of `version`.
    pub fn new(version: ProtocolVersion) -> Self {
        Self {
            message_type: U32::new(MessageType::QUERY_PROTOCOL_VERSION.0),
            version: U32::new(version.0),
        }
    }
}

/// Reports the bus as ready. Completion: [`Status`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct D0Entry {
    message_type: U32,
    reserved: U32,
    mmio_base: U64,
}

impl D0Entry {
    /// D0 entry with the configuration window at the guest-physical address `mmio_base`.
    pub fn new(mmio_base: u64) -> Self {
        Self {
            message_type: U32::new(MessageType::BUS_D0_ENTRY.0),
            reserved: U32::ZERO,
            mmio_base: U64::new(mmio_base),
        }
    }
}

/// Reports assigned resources, version 1.1. Completion: [`Status`].
///
/// The ranges may be left zero: the host takes the addresses from the BARs.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ResourcesAssigned {
    message_type: U32,
    slot: SlotNumber,
    memory_ranges: [[u8; 20]; BARS],
    msi_descriptors: U32,
    reserved: [U32; 4],
}

impl ResourcesAssigned {
    /// Report for `slot` with all ranges left to the BARs.
    pub fn new(slot: SlotNumber) -> Self {
        Self {
            message_type: U32::new(MessageType::RESOURCES_ASSIGNED.0),
            slot,
            memory_ranges: [[0; 20]; BARS],
            msi_descriptors: U32::ZERO,
            reserved: [U32::ZERO; 4],
        }
    }
}

/// Reports assigned resources, version 1.2 and later. Completion: [`Status`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ResourcesAssigned2 {
    message_type: U32,
    slot: SlotNumber,
    memory_ranges: [[u8; 20]; BARS],
    msi_descriptors: U32,
    reserved: [u8; 70],
}

impl ResourcesAssigned2 {
    /// Report for `slot` with all ranges left to the BARs.
    pub fn new(slot: SlotNumber) -> Self {
        Self {
            message_type: U32::new(MessageType::RESOURCES_ASSIGNED2.0),
            slot,
            memory_ranges: [[0; 20]; BARS],
            msi_descriptors: U32::ZERO,
            reserved: [0; 70],
        }
    }
}

/// Asks for a power state. Completion: [`Status`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct PowerStateChange {
    message_type: U32,
    slot: SlotNumber,
    state: U32,
    reserved: U32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Descriptor1 {
    vector: u8,
    delivery_mode: u8,
    vector_count: U16,
    reserved: U32,
    cpu_mask: U64,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ProcessorList {
    count: U16,
    processors: [U16; PROCESSORS_MAX],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Descriptor2 {
    vector: u8,
    delivery_mode: u8,
    vector_count: U16,
    list: ProcessorList,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Descriptor3 {
    vector: U32,
    delivery_mode: u8,
    reserved: u8,
    vector_count: U16,
    list: ProcessorList,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct CreateInterrupt<D> {
    child: ChildMessage,
    descriptor: D,
}

/// Largest interrupt request of all versions.
pub const CREATE_INTERRUPT_MAX: usize = size_of::<CreateInterrupt<Descriptor3>>();

/// Processors an interrupt may go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Processors {
    /// One bit for each of the first 64 processors, version 1.1.
    Mask(u64),
    /// List of virtual processor indexes, later versions.
    List {
        /// Indexes; only the first `count` are valid.
        indexes: [u16; PROCESSORS_MAX],
        /// Number of valid indexes, at most [`PROCESSORS_MAX`].
        count: u16,
    },
}

impl Processors {
    /// The set that consists of one processor, in the form which `version` uses.
    ///
    /// `None` if that version cannot name the processor.
    pub fn one(version: ProtocolVersion, index: u32) -> Option<Self> {
        if version < ProtocolVersion::V1_2 {
            return Some(Self::Mask(1_u64.checked_shl(index)?));
        }
        let mut indexes = [0; PROCESSORS_MAX];
        indexes[0] = u16::try_from(index).ok()?;
        Some(Self::List { indexes, count: 1 })
    }

    /// Lowest numbered processor of a mask, or the first of a list.
    pub fn first(&self) -> Option<u32> {
        match self {
            Self::Mask(0) => None,
            Self::Mask(mask) => Some(mask.trailing_zeros()),
            Self::List { count: 0, .. } => None,
            Self::List { indexes, .. } => Some(u32::from(indexes[0])),
        }
    }

    fn from_list(list: &ProcessorList) -> Result<Self> {
        let count = list.count.get();
        if usize::from(count) > PROCESSORS_MAX {
            return Err(Error::Invalid {
                what: "processor count",
                value: count.into(),
            });
        }
        Ok(Self::List {
            indexes: list.processors.map(U16::get),
            count,
        })
    }

    /// The list, or an error for a mask.
    fn to_list(self) -> Result<ProcessorList> {
        match self {
            Self::List { indexes, count } if usize::from(count) <= PROCESSORS_MAX => {
                Ok(ProcessorList {
                    count: U16::new(count),
                    processors: indexes.map(U16::new),
                })
            }
            Self::List { count, .. } => Err(Error::Invalid {
                what: "processor count",
                value: count.into(),
            }),
            Self::Mask(mask) => Err(Error::Invalid {
                what: "processor mask in version 1.2 or later",
                value: mask,
            }),
        }
    }
}

/// Asks for an interrupt. Completion: [`CreateInterruptReply`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterruptRequest {
    /// First vector in the interrupt descriptor table.
    pub vector: u32,
    /// Delivery mode of the local APIC, 0 is fixed.
    pub delivery_mode: u8,
    /// Number of vectors: 1 for MSI-X, a power of two up to 32 for MSI.
    pub vector_count: u16,
    /// Where to deliver.
    pub processors: Processors,
}

impl InterruptRequest {
    /// Builds the request in the form of `version` and gives its length, at most
    /// [`CREATE_INTERRUPT_MAX`].
    pub fn write(
        &self,
        version: ProtocolVersion,
        slot: SlotNumber,
        out: &mut [u8],
    ) -> Result<usize> {
        const WHAT: &str = "create interrupt";
        let message_type = version.create_interrupt();
        let child = ChildMessage::new(message_type, slot);
        let short_vector = u8::try_from(self.vector).map_err(|_| Error::Invalid {
            what: "vector before version 1.4",
            value: self.vector.into(),
        });
        let vector_count = U16::new(self.vector_count);
        match message_type {
            MessageType::CREATE_INTERRUPT => {
                let cpu_mask = match self.processors {
                    Processors::Mask(mask) => U64::new(mask),
                    Processors::List { count, .. } => {
                        return Err(Error::Invalid {
                            what: "processor list in version 1.1",
                            value: count.into(),
                        })
                    }
                };
                let descriptor = Descriptor1 {
                    vector: short_vector?,
                    delivery_mode: self.delivery_mode,
                    vector_count,
                    reserved: U32::ZERO,
                    cpu_mask,
                };
                put(WHAT, &CreateInterrupt { child, descriptor }, out)
            }
            MessageType::CREATE_INTERRUPT2 => {
                let descriptor = Descriptor2 {
                    vector: short_vector?,
                    delivery_mode: self.delivery_mode,
                    vector_count,
                    list: self.processors.to_list()?,
                };
                put(WHAT, &CreateInterrupt { child, descriptor }, out)
            }
            _ => {
                let descriptor = Descriptor3 {
                    vector: U32::new(self.vector),
                    delivery_mode: self.delivery_mode,
                    reserved: 0,
                    vector_count,
                    list: self.processors.to_list()?,
                };
                put(WHAT, &CreateInterrupt { child, descriptor }, out)
            }
        }
    }
}

/// An interrupt as the device has to raise it: what to write where.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    Default,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct TranslatedInterrupt {
    reserved: U16,
    vector_count: U16,
    data: U32,
    address: U64,
}

impl TranslatedInterrupt {
    /// Interrupt of `vector_count` vectors raised by writing `data` (and up) to `address`.
    pub fn new(vector_count: u16, address: u64, data: u32) -> Self {
        Self {
            reserved: U16::ZERO,
            vector_count: U16::new(vector_count),
            data: U32::new(data),
            address: U64::new(address),
        }
    }

    /// Number of vectors.
    pub fn vector_count(&self) -> u16 {
        self.vector_count.get()
    }

    /// Data of the first vector.
    pub fn data(&self) -> u32 {
        self.data.get()
    }

    /// Address, the same for all vectors.
    pub fn address(&self) -> u64 {
        self.address.get()
    }
}

/// Completion of an [`InterruptRequest`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct CreateInterruptReply {
    status: U32,
    reserved: U32,
    interrupt: TranslatedInterrupt,
}

impl CreateInterruptReply {
    /// Success with the given interrupt.
    pub fn new(interrupt: TranslatedInterrupt) -> Self {
        Self {
            status: U32::ZERO,
            reserved: U32::ZERO,
            interrupt,
        }
    }

    /// The interrupt, or the status of the failure.
    ///
    /// A failure may be shorter than the structure.
    pub fn parse(bytes: &[u8]) -> Result<core::result::Result<TranslatedInterrupt, Status>> {
        let status = Status::parse(bytes)?;
        if status.is_failure() {
            return Ok(Err(status));
        }
        Ok(Ok(
            parse::<Self>("create interrupt completion", bytes)?.interrupt
        ))
    }
}

/// Gives an interrupt back. No completion.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DeleteInterrupt {
    child: ChildMessage,
    interrupt: TranslatedInterrupt,
}

impl DeleteInterrupt {
    /// Deletion of `interrupt` of the function in `slot`.
    pub fn new(slot: SlotNumber, interrupt: TranslatedInterrupt) -> Self {
        Self {
            child: ChildMessage::new(MessageType::DELETE_INTERRUPT, slot),
            interrupt,
        }
    }
}

/// Completion of `QUERY_RESOURCE_REQUIREMENTS`: what the BARs read as after all ones were written.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ResourceRequirementsReply {
    status: U32,
    bars: [U32; BARS],
}

impl ResourceRequirementsReply {
    /// Success with the given BAR masks.
    pub fn new(bars: [u32; BARS]) -> Self {
        Self {
            status: U32::ZERO,
            bars: bars.map(U32::new),
        }
    }

    /// The BAR masks, or the status of the failure.
    pub fn parse(bytes: &[u8]) -> Result<core::result::Result<[u32; BARS], Status>> {
        let status = Status::parse(bytes)?;
        if status.is_failure() {
            return Ok(Err(status));
        }
        let reply = parse::<Self>("resource requirements completion", bytes)?;
        Ok(Ok(reply.bars.map(U32::get)))
    }
}

/// A memory BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Which register, the lower one of a 64-bit BAR.
    pub index: usize,
    /// Whether the next register is the upper half.
    pub is_64bit: bool,
    /// Bytes of MMIO space, a power of two.
    pub size: u64,
}

/// Why a BAR cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadBar {
    /// It is in I/O space.
    Io,
    /// The bits that can be changed are not those of a size, or the upper half is missing.
    Malformed,
}

/// The BARs of a function, by what they read as after all ones were written to them.
pub fn bars(masks: &[u32; BARS]) -> impl Iterator<Item = core::result::Result<Bar, BadBar>> + '_ {
    const SPACE_IO: u32 = 1;
    const TYPE_64: u32 = 4;
    const ADDRESS_MASK: u64 = !0xf;

    let mut next = 0;
    core::iter::from_fn(move || {
        while masks.get(next) == Some(&0) {
            next += 1;
        }
        let index = next;
        let low = *masks.get(index)?;
        next += 1;
        if low & SPACE_IO != 0 {
            return Some(Err(BadBar::Io));
        }
        let is_64bit = low & TYPE_64 != 0;
        let high = if is_64bit {
            let Some(&high) = masks.get(next) else {
                return Some(Err(BadBar::Malformed));
            };
            next += 1;
            high
        } else {
            u32::MAX
        };
        let mask = ((u64::from(high) << 32) | u64::from(low)) & ADDRESS_MASK;
        // The lowest bit that can be changed is the size, and all above can be changed, too.
        let size = mask & mask.wrapping_neg();
        let limit = if is_64bit { u64::MAX } else { 1 << 31 };
        if size == 0 || size > limit || mask != size.wrapping_neg() {
            return Some(Err(BadBar::Malformed));
        }
        Some(Ok(Bar {
            index,
            is_64bit,
            size,
        }))
    })
}

/// Reads a configuration block. Completion: [`Status`] followed by the bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ReadBlock {
    message_type: U32,
    block: U32,
    slot: SlotNumber,
    length: U32,
}

impl ReadBlock {
    /// Request for `length` bytes of a block.
    pub fn new(slot: SlotNumber, block: u32, length: u32) -> Self {
        Self {
            message_type: U32::new(MessageType::READ_BLOCK.0),
            block: U32::new(block),
            slot,
            length: U32::new(length),
        }
    }

    /// Builds the completion that carries `data`.
    pub fn write_reply(data: &[u8], out: &mut [u8]) -> Result<usize> {
        put_with_tail("read block completion", &U32::ZERO, data, out)
    }

    /// The bytes of a completion, padding included, or the status of the failure.
    pub fn parse_reply(bytes: &[u8]) -> Result<core::result::Result<&[u8], Status>> {
        let status = Status::parse(bytes)?;
        if status != Status::SUCCESS {
            return Ok(Err(status));
        }
        Ok(Ok(&bytes[4..]))
    }
}

/// Writes a configuration block. Completion: [`Status`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct WriteBlock {
    message_type: U32,
    block: U32,
    slot: SlotNumber,
    length: U32,
}

impl WriteBlock {
    /// Largest request, with the four bytes of padding which some hosts want behind the data.
    pub const MAX: usize = size_of::<Self>() + BLOCK_SIZE_MAX + 4;

    /// Builds a request that writes `data`, padded by four bytes, and gives its length.
    pub fn write(slot: SlotNumber, block: u32, data: &[u8], out: &mut [u8]) -> Result<usize> {
        const WHAT: &str = "write block";
        let length = block_length(data.len() as u64)?;
        let header = Self {
            message_type: U32::new(MessageType::WRITE_BLOCK.0),
            block: U32::new(block),
            slot,
            length: U32::new(length),
        };
        let end = put_with_tail(WHAT, &header, data, out)?;
        let actual = out.len();
        match out.get_mut(end..end + 4) {
            Some(padding) => padding.fill(0),
            None => {
                return Err(Error::NoSpace {
                    what: WHAT,
                    needed: end + 4,
                    actual,
                })
            }
        }
        Ok(end + 4)
    }
}

/// Length of a configuration block, if allowed.
fn block_length(length: u64) -> Result<u32> {
    match u32::try_from(length) {
        Ok(n) if n != 0 && n as usize <= BLOCK_SIZE_MAX => Ok(n),
        _ => Err(Error::Invalid {
            what: "block length",
            value: length,
        }),
    }
}

/// Builds a message of a fixed head and some bytes.
fn put_with_tail<T: IntoBytes + Immutable>(
    what: &'static str,
    head: &T,
    tail: &[u8],
    out: &mut [u8],
) -> Result<usize> {
    let start = size_of::<T>();
    let needed = start + tail.len();
    let actual = out.len();
    let Some(room) = out.get_mut(start..needed) else {
        return Err(Error::NoSpace {
            what,
            needed,
            actual,
        });
    };
    room.copy_from_slice(tail);
    put(what, head, out)?;
    Ok(needed)
}

/// Tells that an ejected function is no longer used. No completion.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct EjectionComplete {
    child: ChildMessage,
    status: U32,
}

impl EjectionComplete {
    /// Completed ejection of the function in `slot`.
    pub fn new(slot: SlotNumber) -> Self {
        Self {
            child: ChildMessage::new(MessageType::EJECTION_COMPLETE, slot),
            status: U32::ZERO,
        }
    }
}

/// A message of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// Proposes a protocol version.
    QueryProtocolVersion(ProtocolVersion),
    /// Asks for the bus relations.
    QueryBusRelations,
    /// Asks for the BAR masks of a function.
    QueryResourceRequirements(SlotNumber),
    /// The bus is ready.
    D0Entry {
        /// Guest-physical address of the configuration window.
        mmio_base: u64,
    },
    /// The bus is no longer used.
    D0Exit,
    /// Resources are assigned to a function.
    ResourcesAssigned(SlotNumber),
    /// Resources are taken from a function.
    ResourcesReleased(SlotNumber),
    /// Asks for an interrupt.
    CreateInterrupt(SlotNumber, InterruptRequest),
    /// Gives an interrupt back.
    DeleteInterrupt(SlotNumber, TranslatedInterrupt),
    /// Reads a configuration block.
    ReadBlock {
        /// The function.
        slot: SlotNumber,
        /// Number of the block.
        block: u32,
        /// Bytes wanted, 1 to [`BLOCK_SIZE_MAX`].
        length: u32,
    },
    /// Writes a configuration block.
    WriteBlock {
        /// The function.
        slot: SlotNumber,
        /// Number of the block.
        block: u32,
        /// The data, 1 to [`BLOCK_SIZE_MAX`] bytes.
        data: &'a [u8],
    },
    /// An ejected function is no longer used.
    EjectionComplete {
        /// The function.
        slot: SlotNumber,
        /// Zero when the ejection worked.
        status: Status,
    },
    /// Asks for a power state.
    PowerStateChange {
        /// The function.
        slot: SlotNumber,
        /// The state in Windows' numbering: 1 is D0, 4 is D3.
        state: u32,
    },
    /// Something else.
    Unknown(MessageType),
}

impl<'a> Request<'a> {
    /// Parses an in-band packet of the guest.
    pub fn parse(bytes: &'a [u8]) -> Result<Self> {
        let message_type = MessageType::parse(bytes)?;
        Ok(match message_type {
            MessageType::QUERY_PROTOCOL_VERSION => {
                let m: VersionRequest = parse("version request", bytes)?;
                Self::QueryProtocolVersion(ProtocolVersion(m.version.get()))
            }
            MessageType::QUERY_BUS_RELATIONS => Self::QueryBusRelations,
            MessageType::QUERY_RESOURCE_REQUIREMENTS => {
                let m: ChildMessage = parse("query resource requirements", bytes)?;
                Self::QueryResourceRequirements(m.slot)
            }
            MessageType::BUS_D0_ENTRY => {
                let m: D0Entry = parse("D0 entry", bytes)?;
                Self::D0Entry {
                    mmio_base: m.mmio_base.get(),
                }
            }
            MessageType::BUS_D0_EXIT => Self::D0Exit,
            MessageType::RESOURCES_ASSIGNED => {
                let m: ResourcesAssigned = parse("resources assigned", bytes)?;
                Self::ResourcesAssigned(m.slot)
            }
            MessageType::RESOURCES_ASSIGNED2 => {
                let m: ResourcesAssigned2 = parse("resources assigned 2", bytes)?;
                Self::ResourcesAssigned(m.slot)
            }
            MessageType::RESOURCES_RELEASED => {
                let m: ChildMessage = parse("resources released", bytes)?;
                Self::ResourcesReleased(m.slot)
            }
            MessageType::CREATE_INTERRUPT => {
                let m: CreateInterrupt<Descriptor1> = parse("create interrupt", bytes)?;
                let d = m.descriptor;
                let request = InterruptRequest {
                    vector: d.vector.into(),
                    delivery_mode: d.delivery_mode,
                    vector_count: d.vector_count.get(),
                    processors: Processors::Mask(d.cpu_mask.get()),
                };
                Self::CreateInterrupt(m.child.slot, request)
            }
            MessageType::CREATE_INTERRUPT2 => {
                let m: CreateInterrupt<Descriptor2> = parse("create interrupt 2", bytes)?;
                let d = m.descriptor;
                let request = InterruptRequest {
                    vector: d.vector.into(),
                    delivery_mode: d.delivery_mode,
                    vector_count: d.vector_count.get(),
                    processors: Processors::from_list(&d.list)?,
                };
                Self::CreateInterrupt(m.child.slot, request)
            }
            MessageType::CREATE_INTERRUPT3 => {
                let m: CreateInterrupt<Descriptor3> = parse("create interrupt 3", bytes)?;
                let d = m.descriptor;
                let request = InterruptRequest {
                    vector: d.vector.get(),
                    delivery_mode: d.delivery_mode,
                    vector_count: d.vector_count.get(),
                    processors: Processors::from_list(&d.list)?,
                };
                Self::CreateInterrupt(m.child.slot, request)
            }
            MessageType::DELETE_INTERRUPT => {
                let m: DeleteInterrupt = parse("delete interrupt", bytes)?;
                Self::DeleteInterrupt(m.child.slot, m.interrupt)
            }
            MessageType::READ_BLOCK => {
                let m: ReadBlock = parse("read block", bytes)?;
                Self::ReadBlock {
                    slot: m.slot,
                    block: m.block.get(),
                    length: block_length(m.length.get().into())?,
                }
            }
            MessageType::WRITE_BLOCK => {
                const WHAT: &str = "write block";
                let m: WriteBlock = parse(WHAT, bytes)?;
                let start = size_of::<WriteBlock>();
                let needed = start + block_length(m.length.get().into())? as usize;
                let Some(data) = bytes.get(start..needed) else {
                    return Err(Error::Truncated {
                        what: WHAT,
                        needed,
                        actual: bytes.len(),
                    });
                };
                Self::WriteBlock {
                    slot: m.slot,
                    block: m.block.get(),
                    data,
                }
            }
            MessageType::EJECTION_COMPLETE => {
                let m: EjectionComplete = parse("ejection complete", bytes)?;
                Self::EjectionComplete {
                    slot: m.child.slot,
                    status: Status(m.status.get() as i32),
                }
            }
            MessageType::POWER_STATE_CHANGE => {
                let m: PowerStateChange = parse("power state change", bytes)?;
                Self::PowerStateChange {
                    slot: m.slot,
                    state: m.state.get(),
                }
            }
            other => Self::Unknown(other),
        })
    }
}

/// One function in the bus relations, until version 1.2.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct FunctionDescription1 {
    vendor: U16,
    device: U16,
    revision: u8,
    programming_interface: u8,
    subclass: u8,
    base_class: u8,
    subsystem: U32,
    slot: SlotNumber,
    serial: U32,
}

/// One function in the bus relations, version 1.3 and later.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct FunctionDescription2 {
    v1: FunctionDescription1,
    flags: U32,
    numa_node: U16,
    reserved: U16,
}

/// `numa_node` is valid.
const FLAG_NUMA_AFFINITY: u32 = 1;

/// A function of the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Function {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Programming interface.
    pub programming_interface: u8,
    /// Subclass.
    pub subclass: u8,
    /// Base class.
    pub base_class: u8,
    /// Subsystem vendor id in the low half, subsystem id in the high.
    pub subsystem: u32,
    /// Where the function is.
    pub slot: SlotNumber,
    /// Serial number; for a network VF the one that NVSP announces.
    pub serial: u32,
    /// NUMA node, if the host gave one. Not carried before version 1.3.
    pub numa_node: Option<u16>,
}

impl Function {
    fn to_v1(self) -> FunctionDescription1 {
        FunctionDescription1 {
            vendor: U16::new(self.vendor),
            device: U16::new(self.device),
            revision: self.revision,
            programming_interface: self.programming_interface,
            subclass: self.subclass,
            base_class: self.base_class,
            subsystem: U32::new(self.subsystem),
            slot: self.slot,
            serial: U32::new(self.serial),
        }
    }

    fn to_v2(self) -> FunctionDescription2 {
        FunctionDescription2 {
            v1: self.to_v1(),
            flags: U32::new(match self.numa_node {
                Some(_) => FLAG_NUMA_AFFINITY,
                None => 0,
            }),
            numa_node: U16::new(self.numa_node.unwrap_or(0)),
            reserved: U16::ZERO,
        }
    }

    fn from_v1(d: &FunctionDescription1) -> Self {
        Self {
            vendor: d.vendor.get(),
            device: d.device.get(),
            revision: d.revision,
            programming_interface: d.programming_interface,
            subclass: d.subclass,
            base_class: d.base_class,
            subsystem: d.subsystem.get(),
            slot: d.slot,
            serial: d.serial.get(),
            numa_node: None,
        }
    }

    fn from_v2(d: &FunctionDescription2) -> Self {
        Self {
            numa_node: (d.flags.get() & FLAG_NUMA_AFFINITY != 0).then_some(d.numa_node.get()),
            ..Self::from_v1(&d.v1)
        }
    }
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct BusRelationsHeader {
    message_type: U32,
    count: U32,
}

/// Size of the bus relations of `count` functions in the form of `version`.
pub fn bus_relations_size(version: ProtocolVersion, count: usize) -> usize {
    let each = if version.bus_relations() == MessageType::BUS_RELATIONS2 {
        size_of::<FunctionDescription2>()
    } else {
        size_of::<FunctionDescription1>()
    };
    size_of::<BusRelationsHeader>() + count.saturating_mul(each)
}

/// Builds the bus relations in the form of `version` and gives the length.
pub fn write_bus_relations(
    version: ProtocolVersion,
    functions: &[Function],
    out: &mut [u8],
) -> Result<usize> {
    const WHAT: &str = "bus relations";
    if functions.len() > FUNCTIONS_MAX {
        return Err(Error::Invalid {
            what: "function count",
            value: functions.len() as u64,
        });
    }
    let message_type = version.bus_relations();
    let needed = bus_relations_size(version, functions.len());
    let actual = out.len();
    let Some(out) = out.get_mut(..needed) else {
        return Err(Error::NoSpace {
            what: WHAT,
            needed,
            actual,
        });
    };
    let header = BusRelationsHeader {
        message_type: U32::new(message_type.0),
        count: U32::new(functions.len() as u32),
    };
    let mut at = put(WHAT, &header, out)?;
    for function in functions {
        at += if message_type == MessageType::BUS_RELATIONS2 {
            put(WHAT, &function.to_v2(), &mut out[at..])?
        } else {
            put(WHAT, &function.to_v1(), &mut out[at..])?
        };
    }
    Ok(at)
}

/// The functions of a bus, in a packet that was checked for its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BusRelations<'a> {
    message_type: MessageType,
    count: u32,
    descriptions: &'a [u8],
}

impl<'a> BusRelations<'a> {
    fn parse(message_type: MessageType, bytes: &'a [u8]) -> Result<Self> {
        let (what, each) = if message_type == MessageType::BUS_RELATIONS2 {
            ("bus relations v2", size_of::<FunctionDescription2>())
        } else {
            ("bus relations", size_of::<FunctionDescription1>())
        };
        let header: BusRelationsHeader = parse(what, bytes)?;
        let count = header.count.get();
        if count as usize > FUNCTIONS_MAX {
            return Err(Error::Invalid {
                what: "function count",
                value: count.into(),
            });
        }
        let start = size_of::<BusRelationsHeader>();
        let needed = start + count as usize * each;
        match bytes.get(start..needed) {
            Some(descriptions) => Ok(Self {
                message_type,
                count,
                descriptions,
            }),
            None => Err(Error::Truncated {
                what,
                needed,
                actual: bytes.len(),
            }),
        }
    }

    /// Number of functions, at most [`FUNCTIONS_MAX`].
    pub fn len(&self) -> usize {
        self.count as usize
    }

    /// Whether the bus is empty.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The functions.
    pub fn iter(&self) -> impl Iterator<Item = Function> + 'a {
        let v2 = self.message_type == MessageType::BUS_RELATIONS2;
        let each = if v2 {
            size_of::<FunctionDescription2>()
        } else {
            size_of::<FunctionDescription1>()
        };
        self.descriptions.chunks_exact(each).filter_map(move |d| {
            if v2 {
                let d = FunctionDescription2::read_from_bytes(d).ok()?;
                Some(Function::from_v2(&d))
            } else {
                let d = FunctionDescription1::read_from_bytes(d).ok()?;
                Some(Function::from_v1(&d))
            }
        })
    }
}

/// Configuration blocks of a function have changed.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct InvalidateBlock {
    child: ChildMessage,
    block_mask: U64,
}

impl InvalidateBlock {
    /// One bit for each of the first 64 blocks.
    pub fn new(slot: SlotNumber, block_mask: u64) -> Self {
        Self {
            child: ChildMessage::new(MessageType::INVALIDATE_BLOCK, slot),
            block_mask: U64::new(block_mask),
        }
    }
}

/// A message of the host which is not a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// The functions that are on the bus now; those not listed are gone.
    BusRelations(BusRelations<'a>),
    /// The host wants the function back.
    Eject(SlotNumber),
    /// Configuration blocks have changed.
    InvalidateBlock {
        /// The function.
        slot: SlotNumber,
        /// One bit for each of the first 64 blocks.
        block_mask: u64,
    },
    /// Something else.
    Unknown(MessageType),
}

impl<'a> Event<'a> {
    /// Parses an in-band packet of the host.
    pub fn parse(bytes: &'a [u8]) -> Result<Self> {
        let message_type = MessageType::parse(bytes)?;
        Ok(match message_type {
            MessageType::BUS_RELATIONS | MessageType::BUS_RELATIONS2 => {
                Self::BusRelations(BusRelations::parse(message_type, bytes)?)
            }
            MessageType::EJECT => {
                let m: ChildMessage = parse("eject message", bytes)?;
                Self::Eject(m.slot)
            }
            MessageType::INVALIDATE_BLOCK => {
                let m: InvalidateBlock = parse("invalidate message", bytes)?;
                Self::InvalidateBlock {
                    slot: m.child.slot,
                    block_mask: m.block_mask.get(),
                }
            }
            other => Self::Unknown(other),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::{
        vec,
        vec::Vec, //
    };

    use super::*;

    const SLOT: u32 = 2 | (1 << 5);

    fn slot() -> SlotNumber {
        SlotNumber::new(2, 1)
    }

    #[test]
    fn sizes_on_the_wire() {
        assert_eq!(size_of::<VersionRequest>(), 8);
        assert_eq!(size_of::<D0Entry>(), 16);
        assert_eq!(size_of::<ChildMessage>(), 8);
        assert_eq!(size_of::<ResourcesAssigned>(), 148);
        assert_eq!(size_of::<ResourcesAssigned2>(), 202);
        assert_eq!(size_of::<CreateInterrupt<Descriptor1>>(), 24);
        assert_eq!(size_of::<CreateInterrupt<Descriptor2>>(), 78);
        assert_eq!(size_of::<CreateInterrupt<Descriptor3>>(), 82);
        assert_eq!(size_of::<CreateInterruptReply>(), 24);
        assert_eq!(size_of::<DeleteInterrupt>(), 24);
        assert_eq!(size_of::<ResourceRequirementsReply>(), 28);
        assert_eq!(size_of::<ReadBlock>(), 16);
        assert_eq!(size_of::<EjectionComplete>(), 12);
        assert_eq!(size_of::<InvalidateBlock>(), 16);
        assert_eq!(size_of::<FunctionDescription1>(), 20);
        assert_eq!(size_of::<FunctionDescription2>(), 28);
    }

    #[test]
    fn slot_numbers() {
        for (device, function, raw, devfn) in [
            (0, 0, 0, 0),
            (2, 0, 2, 0x10),
            (2, 1, SLOT, 0x11),
            (31, 7, 0xff, 0xff),
        ] {
            let slot = SlotNumber::new(device, function);
            assert_eq!(slot.raw(), raw);
            assert_eq!(slot.devfn(), devfn);
            assert_eq!(SlotNumber::from_devfn(devfn), slot);
            assert_eq!((slot.device(), slot.function()), (device, function));
        }
        assert_eq!(SlotNumber::new(32, 8).raw(), 0);
    }

    /// Every request, in all its forms, with what the parser must make of it.
    fn requests() -> [(&'static [u8], usize, Request<'static>); 13] {
        fn leak<T: IntoBytes + Immutable>(m: T) -> &'static [u8] {
            std::boxed::Box::leak(m.as_bytes().to_vec().into_boxed_slice())
        }
        let list = Processors::one(ProtocolVersion::V1_2, 300).unwrap();
        let mask = Processors::one(ProtocolVersion::V1_1, 63).unwrap();
        let interrupt = |vector, processors| InterruptRequest {
            vector,
            delivery_mode: 0,
            vector_count: 1,
            processors,
        };
        let create = |version, request: InterruptRequest| {
            let mut out = [0xaa; CREATE_INTERRUPT_MAX];
            let n = request.write(version, slot(), &mut out).unwrap();
            leak(out).get(..n).unwrap()
        };
        let translated = TranslatedInterrupt::new(1, 0xfee0_1000, 0x4021);
        let mut block = [0xaa; WriteBlock::MAX];
        let n = WriteBlock::write(slot(), 9, &[1, 2, 3], &mut block).unwrap();
        let block = &leak(block)[..n];
        [
            (
                leak(VersionRequest::new(ProtocolVersion::V1_4)),
                8,
                Request::QueryProtocolVersion(ProtocolVersion::V1_4),
            ),
            (
                leak(Message::new(MessageType::QUERY_BUS_RELATIONS)),
                4,
                Request::QueryBusRelations,
            ),
            (
                leak(ChildMessage::new(
                    MessageType::QUERY_RESOURCE_REQUIREMENTS,
                    slot(),
                )),
                8,
                Request::QueryResourceRequirements(slot()),
            ),
            (
                leak(D0Entry::new(0xf_e000_0000)),
                16,
                Request::D0Entry {
                    mmio_base: 0xf_e000_0000,
                },
            ),
            (
                leak(Message::new(MessageType::BUS_D0_EXIT)),
                4,
                Request::D0Exit,
            ),
            (
                leak(ResourcesAssigned::new(slot())),
                148,
                Request::ResourcesAssigned(slot()),
            ),
            (
                leak(ResourcesAssigned2::new(slot())),
                202,
                Request::ResourcesAssigned(slot()),
            ),
            (
                create(ProtocolVersion::V1_1, interrupt(0x31, mask)),
                24,
                Request::CreateInterrupt(slot(), interrupt(0x31, mask)),
            ),
            (
                create(ProtocolVersion::V1_3, interrupt(0xff, list)),
                78,
                Request::CreateInterrupt(slot(), interrupt(0xff, list)),
            ),
            (
                create(ProtocolVersion::V1_4, interrupt(0x1234, list)),
                82,
                Request::CreateInterrupt(slot(), interrupt(0x1234, list)),
            ),
            (
                leak(DeleteInterrupt::new(slot(), translated)),
                24,
                Request::DeleteInterrupt(slot(), translated),
            ),
            (
                // Four bytes of padding follow which the parser does not ask for.
                block,
                19,
                Request::WriteBlock {
                    slot: slot(),
                    block: 9,
                    data: &[1, 2, 3],
                },
            ),
            (
                leak(EjectionComplete::new(slot())),
                12,
                Request::EjectionComplete {
                    slot: slot(),
                    status: Status::SUCCESS,
                },
            ),
        ]
    }

    #[test]
    fn requests_at_every_length() {
        for (bytes, size, expected) in requests() {
            assert_eq!(Request::parse(bytes), Ok(expected), "{expected:?}");
            assert_eq!(
                Request::parse(&bytes[..size]),
                Ok(expected),
                "{expected:?} exact"
            );
            for short in 0..size {
                let result = Request::parse(&bytes[..short]);
                assert!(
                    matches!(result, Err(Error::Truncated { needed, actual, .. })
                        if actual == short && needed > short),
                    "{expected:?} at {short}: {result:?}"
                );
            }
        }
    }

    #[test]
    fn unknown_request() {
        let message = Message::new(MessageType(0x4249_001c));
        assert_eq!(
            Request::parse(message.as_bytes()),
            Ok(Request::Unknown(MessageType(0x4249_001c)))
        );
    }

    #[test]
    fn interrupt_request_limits() {
        let mut out = [0; CREATE_INTERRUPT_MAX];
        let list = |count| Processors::List {
            indexes: [7; PROCESSORS_MAX],
            count,
        };
        let request = |vector, processors| InterruptRequest {
            vector,
            delivery_mode: 0,
            vector_count: 1,
            processors,
        };
        for (version, vector, processors, good) in [
            (ProtocolVersion::V1_1, 0xff, Processors::Mask(!0), true),
            (ProtocolVersion::V1_1, 0x100, Processors::Mask(1), false),
            (ProtocolVersion::V1_1, 0x31, list(1), false),
            (ProtocolVersion::V1_2, 0xff, list(32), true),
            (ProtocolVersion::V1_2, 0x100, list(1), false),
            (ProtocolVersion::V1_2, 0x31, list(33), false),
            (ProtocolVersion::V1_3, 0x31, Processors::Mask(1), false),
            (ProtocolVersion::V1_4, u32::MAX, list(32), true),
            (ProtocolVersion::V1_4, 0x31, list(33), false),
        ] {
            let result = request(vector, processors).write(version, slot(), &mut out);
            assert_eq!(result.is_ok(), good, "{version:?} {vector:#x}: {result:?}");
        }
        // A list that claims more entries than there is room for.
        request(0x31, list(32))
            .write(ProtocolVersion::V1_4, slot(), &mut out)
            .unwrap();
        out[16] = 33;
        assert_eq!(
            Request::parse(&out),
            Err(Error::Invalid {
                what: "processor count",
                value: 33
            })
        );
        for short in 0..CREATE_INTERRUPT_MAX {
            let result =
                request(1, list(1)).write(ProtocolVersion::V1_4, slot(), &mut out[..short]);
            assert!(matches!(result, Err(Error::NoSpace { .. })));
        }
    }

    #[test]
    fn processors() {
        assert_eq!(Processors::one(ProtocolVersion::V1_1, 64), None);
        assert_eq!(Processors::one(ProtocolVersion::V1_2, 0x10000), None);
        for (set, first) in [
            (Processors::one(ProtocolVersion::V1_1, 63), Some(63)),
            (Processors::one(ProtocolVersion::V1_4, 0xffff), Some(0xffff)),
            (Some(Processors::Mask(0)), None),
            (Some(Processors::Mask(6)), Some(1)),
            (
                Some(Processors::List {
                    indexes: [3; PROCESSORS_MAX],
                    count: 0,
                }),
                None,
            ),
        ] {
            assert_eq!(set.unwrap().first(), first);
        }
    }

    #[test]
    fn block_lengths() {
        let mut out = [0; WriteBlock::MAX];
        for (length, good) in [(0, false), (1, true), (128, true), (129, false)] {
            let data = [5; 129];
            let written = WriteBlock::write(slot(), 0, &data[..length], &mut out);
            assert_eq!(written.is_ok(), good);
            if good {
                assert_eq!(written, Ok(16 + length + 4));
            }
            let read = ReadBlock::new(slot(), 1, length as u32);
            assert_eq!(Request::parse(read.as_bytes()).is_ok(), good);
        }
        // Room for the data but not for the padding.
        assert!(WriteBlock::write(slot(), 0, &[1], &mut out[..20]).is_err());
        assert!(WriteBlock::write(slot(), 0, &[1], &mut out[..21]).is_ok());

        let n = ReadBlock::write_reply(&[1, 2], &mut out).unwrap();
        assert_eq!(ReadBlock::parse_reply(&out[..n]), Ok(Ok(&[1, 2][..])));
        assert!(ReadBlock::write_reply(&[1, 2], &mut out[..5]).is_err());
        write_status(Status::NOT_SUPPORTED, &mut out).unwrap();
        assert_eq!(
            ReadBlock::parse_reply(&out[..4]),
            Ok(Err(Status::NOT_SUPPORTED))
        );
    }

    #[test]
    fn completions() {
        let translated = TranslatedInterrupt::new(4, 0xfee0_0000, 0x30);
        let reply = CreateInterruptReply::new(translated);
        assert_eq!(
            CreateInterruptReply::parse(reply.as_bytes()),
            Ok(Ok(translated))
        );
        for short in 0..24 {
            assert!(CreateInterruptReply::parse(&reply.as_bytes()[..short]).is_err());
        }
        let bars = [4, 0xffff_ffff, 0, 1, 2, 3];
        let reply = ResourceRequirementsReply::new(bars);
        assert_eq!(
            ResourceRequirementsReply::parse(reply.as_bytes()),
            Ok(Ok(bars))
        );
        for short in 0..28 {
            assert!(ResourceRequirementsReply::parse(&reply.as_bytes()[..short]).is_err());
        }
        let mut out = [0; 4];
        write_status(Status::REVISION_MISMATCH, &mut out).unwrap();
        assert_eq!(out, 0xc000_0059_u32.to_le_bytes());
        assert_eq!(Status::parse(&out), Ok(Status::REVISION_MISMATCH));
        // A failure needs no more than its status.
        let failure = Ok(Err(Status::REVISION_MISMATCH));
        assert_eq!(CreateInterruptReply::parse(&out), failure);
        assert!(Status::parse(&out[..3]).is_err());
        assert!(write_status(Status::SUCCESS, &mut out[..3]).is_err());
    }

    fn function(serial: u32, numa_node: Option<u16>) -> Function {
        Function {
            vendor: 0x1414,
            device: 0x00ba,
            revision: 1,
            base_class: 2,
            slot: slot(),
            serial,
            numa_node,
            ..Default::default()
        }
    }

    #[test]
    fn bus_relations() {
        let functions = [function(1, Some(3)), function(2, None)];
        for version in ProtocolVersion::ALL {
            for count in 0..=2 {
                let mut out = [0; 64];
                let size = bus_relations_size(version, count);
                let written = write_bus_relations(version, &functions[..count], &mut out);
                assert_eq!(written, Ok(size));
                let Ok(Event::BusRelations(relations)) = Event::parse(&out[..size]) else {
                    panic!("{version:?}: not parsed");
                };
                assert_eq!((relations.len(), relations.is_empty()), (count, count == 0));
                let mut parsed = relations.iter();
                for f in &functions[..count] {
                    let numa_node = f.numa_node.filter(|_| version >= ProtocolVersion::V1_3);
                    assert_eq!(parsed.next(), Some(Function { numa_node, ..*f }));
                }
                assert_eq!(parsed.next(), None);
                drop(parsed);
                for short in 0..size {
                    assert!(matches!(
                        Event::parse(&out[..short]),
                        Err(Error::Truncated { .. })
                    ));
                    assert!(
                        write_bus_relations(version, &functions[..count], &mut out[..short])
                            .is_err()
                    );
                }
            }
        }
    }

    #[test]
    fn bus_relations_count_is_checked() {
        let mut out = [0; 8 + 20];
        for (message_type, count, what) in [
            (MessageType::BUS_RELATIONS, 2, "bus relations"),
            (MessageType::BUS_RELATIONS2, 1, "bus relations v2"),
            (MessageType::BUS_RELATIONS, 256, "bus relations"),
        ] {
            out[..4].copy_from_slice(&message_type.0.to_le_bytes());
            out[4..8].copy_from_slice(&u32::to_le_bytes(count));
            assert!(matches!(
                Event::parse(&out),
                Err(Error::Truncated { what: w, .. }) if w == what
            ));
        }
        out[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(Event::parse(&out), Err(Error::Invalid { .. })));
        let many = [Function::default(); FUNCTIONS_MAX + 1];
        let mut out = [0; 8 + 20 * 257];
        assert!(write_bus_relations(ProtocolVersion::V1_1, &many, &mut out).is_err());
        assert!(write_bus_relations(ProtocolVersion::V1_1, &many[1..], &mut out).is_ok());
    }

    #[test]
    fn bars_from_masks() {
        let collect = |masks| bars(&masks).collect::<std::vec::Vec<_>>();
        let bar = |index, is_64bit, size| {
            Ok(Bar {
                index,
                is_64bit,
                size,
            })
        };
        assert_eq!(collect([0; BARS]), []);
        // Smallest and largest of both kinds.
        assert_eq!(
            collect([0xffff_fff0, 0x8000_0000, 0xffff_fff4, !0, 4, 0x8000_0000]),
            [
                bar(0, false, 16),
                bar(1, false, 1 << 31),
                bar(2, true, 16),
                bar(4, true, 1 << 63),
            ]
        );
        // Prefetchable, across the halves, with a gap before.
        assert_eq!(
            collect([0, 0, 0, 0xc, 0xffff_fffc, 0]),
            [bar(3, true, 1 << 34)]
        );
        // No upper half; no size; holes; not up to the top; I/O.
        assert_eq!(
            collect([0, 0, 0, 0, 0, 0xffff_f004]),
            [Err(BadBar::Malformed)]
        );
        assert_eq!(collect([8, 0, 0, 0, 0, 0]), [Err(BadBar::Malformed)]);
        assert_eq!(
            collect([0xff0f_f000, 0xfffff000, 0, 0, 0, 0]),
            [Err(BadBar::Malformed), bar(1, false, 0x1000)]
        );
        assert_eq!(
            collect([0xffff_f004, 0x7fff_ffff, 0, 0, 0, 0]),
            [Err(BadBar::Malformed)]
        );
        assert_eq!(
            collect([0xffff_ff01, 0xffff_0000, 0, 0, 0, 0]),
            [Err(BadBar::Io), bar(1, false, 0x1_0000)]
        );
    }

    #[test]
    fn events() {
        let eject = ChildMessage::new(MessageType::EJECT, slot());
        let invalidate = InvalidateBlock::new(slot(), 5);
        for (bytes, expected) in [
            (eject.as_bytes(), Event::Eject(slot())),
            (
                invalidate.as_bytes(),
                Event::InvalidateBlock {
                    slot: slot(),
                    block_mask: 5,
                },
            ),
        ] {
            assert_eq!(Event::parse(bytes), Ok(expected));
            for short in 0..bytes.len() {
                assert!(Event::parse(&bytes[..short]).is_err());
            }
        }
        assert_eq!(
            Event::parse(&7_u32.to_le_bytes()),
            Ok(Event::Unknown(MessageType(7)))
        );
    }

    /// Lets `parse` see a packet at each length up to `size`, its own, which must be too short, and followed by up
    /// to eight bytes of whatever, which must change nothing.
    fn at_every_length<T: PartialEq + fmt::Debug>(
        packet: &[u8],
        size: usize,
        parse: impl Fn(&[u8]) -> Result<T>,
        expected: T,
    ) {
        for short in 0..size {
            let result = parse(&packet[..short]);
            assert!(
                matches!(result, Err(Error::Truncated { needed, actual, .. })
                    if actual == short && (short + 1..=size).contains(&needed)),
                "{expected:?} at {short}: {result:?}"
            );
        }
        for more in 0..=8 {
            let mut packet = packet[..size].to_vec();
            packet.extend(std::iter::repeat_n(0xff, more));
            assert_eq!(parse(&packet).as_ref(), Ok(&expected), "{more} more");
        }
    }

    /// Those of which [`requests`] has none.
    fn other_requests() -> Vec<(Vec<u8>, Request<'static>)> {
        let released = ChildMessage::new(MessageType::RESOURCES_RELEASED, slot());
        let read = ReadBlock::new(slot(), 9, 128);
        let power = PowerStateChange {
            message_type: U32::new(MessageType::POWER_STATE_CHANGE.0),
            slot: slot(),
            state: U32::new(4),
            reserved: U32::ZERO,
        };
        vec![
            (
                released.as_bytes().to_vec(),
                Request::ResourcesReleased(slot()),
            ),
            (
                read.as_bytes().to_vec(),
                Request::ReadBlock {
                    slot: slot(),
                    block: 9,
                    length: 128,
                },
            ),
            (
                power.as_bytes().to_vec(),
                Request::PowerStateChange {
                    slot: slot(),
                    state: 4,
                },
            ),
        ]
    }

    #[test]
    fn requests_with_more_or_less() {
        for (bytes, size, expected) in requests() {
            at_every_length(bytes, size, |bytes| leaked(Request::parse, bytes), expected);
        }
        for (bytes, expected) in other_requests() {
            at_every_length(
                &bytes,
                bytes.len(),
                |bytes| leaked(Request::parse, bytes),
                expected,
            );
        }
    }

    /// Parses a copy that lives as long as its result.
    fn leaked<T>(parse: impl Fn(&'static [u8]) -> Result<T>, bytes: &[u8]) -> Result<T> {
        parse(std::boxed::Box::leak(bytes.to_vec().into_boxed_slice()))
    }

    #[test]
    fn unknown_types_of_both_directions() {
        let guest: std::collections::BTreeSet<_> = requests()
            .iter()
            .map(|(bytes, ..)| MessageType::parse(bytes).unwrap().0)
            .chain(
                other_requests()
                    .iter()
                    .map(|(bytes, _)| MessageType::parse(bytes).unwrap().0),
            )
            .collect();
        let host = [
            MessageType::BUS_RELATIONS.0,
            MessageType::BUS_RELATIONS2.0,
            MessageType::EJECT.0,
            MessageType::INVALIDATE_BLOCK.0,
        ];
        let around = (0x4249_0000..0x4249_0040).chain([0, 1, 0x4248_ffff, u32::MAX]);
        for raw in around {
            let kind = MessageType(raw);
            for length in 4..=12 {
                let mut bytes = vec![0xff; length];
                bytes[..4].copy_from_slice(&raw.to_le_bytes());
                let event = Event::parse(&bytes);
                assert_eq!(
                    event == Ok(Event::Unknown(kind)),
                    !host.contains(&raw),
                    "{kind:?}: {event:?}"
                );
                let request = Request::parse(&bytes);
                assert_eq!(
                    request == Ok(Request::Unknown(kind)),
                    !guest.contains(&raw),
                    "{kind:?}: {request:?}"
                );
            }
        }
    }

    #[test]
    fn events_with_more_or_less() {
        let eject = ChildMessage::new(MessageType::EJECT, slot());
        let bytes = eject.as_bytes();
        at_every_length(
            bytes,
            bytes.len(),
            |bytes| leaked(Event::parse, bytes),
            Event::Eject(slot()),
        );
        let invalidate = InvalidateBlock::new(slot(), u64::MAX);
        let bytes = invalidate.as_bytes();
        let event = Event::InvalidateBlock {
            slot: slot(),
            block_mask: u64::MAX,
        };
        at_every_length(
            bytes,
            bytes.len(),
            |bytes| leaked(Event::parse, bytes),
            event,
        );
        let functions = [
            function(1, Some(3)),
            function(2, None),
            function(3, Some(0)),
        ];
        for version in ProtocolVersion::ALL {
            for count in 0..=functions.len() {
                let size = bus_relations_size(version, count);
                let mut bytes = vec![0; size];
                write_bus_relations(version, &functions[..count], &mut bytes).unwrap();
                let list = |bytes: &[u8]| match Event::parse(bytes)? {
                    Event::BusRelations(relations) => Ok(relations.iter().collect::<Vec<_>>()),
                    other => panic!("{other:?}"),
                };
                let numa = version >= ProtocolVersion::V1_3;
                let expected = functions[..count].iter().map(|f| Function {
                    numa_node: f.numa_node.filter(|_| numa),
                    ..*f
                });
                at_every_length(&bytes, size, list, expected.collect());
            }
        }
    }

    #[test]
    fn counts_that_overflow() {
        // Those whose size in bytes overflows 32 bits to something small, too.
        for (message_type, each) in [
            (MessageType::BUS_RELATIONS, 20_u64),
            (MessageType::BUS_RELATIONS2, 28),
        ] {
            let wraps = ((1_u64 << 32) / each + 1) as u32;
            for count in [257, 0x8000_0000, 0xffff, wraps, u32::MAX - 1, u32::MAX] {
                let mut bytes = vec![0; 8 + 28 * 4];
                bytes[..4].copy_from_slice(&message_type.0.to_le_bytes());
                bytes[4..8].copy_from_slice(&count.to_le_bytes());
                assert_eq!(
                    Event::parse(&bytes),
                    Err(Error::Invalid {
                        what: "function count",
                        value: count.into()
                    })
                );
            }
        }
        // The processors of an interrupt, whose count is 16 bits long.
        for version in [ProtocolVersion::V1_2, ProtocolVersion::V1_4] {
            let request = InterruptRequest {
                vector: 0x31,
                delivery_mode: 0,
                vector_count: 1,
                processors: Processors::one(version, 0).unwrap(),
            };
            let mut bytes = [0; CREATE_INTERRUPT_MAX];
            let size = request.write(version, slot(), &mut bytes).unwrap();
            let at = size - 2 * PROCESSORS_MAX - 2;
            for count in [33_u16, 0x7fff, 0x8000, u16::MAX] {
                bytes[at..at + 2].copy_from_slice(&count.to_le_bytes());
                assert_eq!(
                    Request::parse(&bytes[..size]),
                    Err(Error::Invalid {
                        what: "processor count",
                        value: count.into()
                    })
                );
            }
        }
        // The length of a block.
        let mut bytes = [0; WriteBlock::MAX];
        WriteBlock::write(slot(), 1, &[7; BLOCK_SIZE_MAX], &mut bytes).unwrap();
        let read = ReadBlock::new(slot(), 1, 1);
        let mut read = read.as_bytes().to_vec();
        for length in [0_u32, 129, 0x1_0000, 0x8000_0000, u32::MAX - 15, u32::MAX] {
            bytes[12..16].copy_from_slice(&length.to_le_bytes());
            read[12..16].copy_from_slice(&length.to_le_bytes());
            for message in [&bytes[..], &read] {
                assert_eq!(
                    Request::parse(message),
                    Err(Error::Invalid {
                        what: "block length",
                        value: length.into()
                    })
                );
            }
        }
    }

    #[test]
    fn answers_with_more_or_less() {
        let translated = TranslatedInterrupt::new(1, 0xfee0_1000, 0x4021);
        let interrupt = CreateInterruptReply::new(translated);
        let bars = [4, 0xffff_ffff, 0, 1, 2, 3];
        let requirements = ResourceRequirementsReply::new(bars);
        // Of success, information and warnings with all that belongs to them.
        for status in [0, 1, 0x4000_0000, i32::MAX] {
            let with = |bytes: &[u8]| {
                let mut bytes = bytes.to_vec();
                bytes[..4].copy_from_slice(&status.to_le_bytes());
                bytes
            };
            let bytes = with(interrupt.as_bytes());
            at_every_length(&bytes, 24, CreateInterruptReply::parse, Ok(translated));
            let bytes = with(requirements.as_bytes());
            at_every_length(&bytes, 28, ResourceRequirementsReply::parse, Ok(bars));
            at_every_length(&bytes, 4, Status::parse, Status(status));
        }
        // Of failures, which need no more than their status.
        for status in [
            Status::UNSUCCESSFUL,
            Status::REVISION_MISMATCH,
            Status::INVALID_DEVICE_STATE,
            Status(i32::MIN),
            Status(-1),
        ] {
            let bytes = status.0.to_le_bytes();
            assert!(status.is_failure());
            at_every_length(&bytes, 4, Status::parse, status);
            at_every_length(&bytes, 4, CreateInterruptReply::parse, Err(status));
            at_every_length(&bytes, 4, ResourceRequirementsReply::parse, Err(status));
        }
        // Of blocks, to which the bytes after the status belong, however many.
        for status in [0, 1, i32::MAX, i32::MIN, -1] {
            let mut bytes = [7; 4 + BLOCK_SIZE_MAX + 8];
            bytes[..4].copy_from_slice(&status.to_le_bytes());
            for length in 0..bytes.len() {
                let result = ReadBlock::parse_reply(&bytes[..length]);
                match (length, status) {
                    (0..4, _) => assert!(matches!(result, Err(Error::Truncated { .. }))),
                    (_, 0) => assert_eq!(result, Ok(Ok(&bytes[4..length]))),
                    _ => assert_eq!(result, Ok(Err(Status(status)))),
                }
            }
        }
    }
}
