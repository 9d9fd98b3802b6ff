// SPDX-License-Identifier: GPL-2.0

//! What controller and driver say to each other: registers, commands, data structures.
//!
//! Names are those of the NVM Express base specification 1.4.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Memory page size, the only one the controller knows.
pub const PAGE: u64 = 4096;
/// log2 of the block size.
pub const BLOCK_SHIFT: u32 = 9;
/// The only namespace.
pub const NAMESPACE: u32 = 1;

/// Offsets of registers in BAR 0.
pub mod register {
    /// Capabilities, 64 bits.
    pub const CAP: usize = 0x00;
    /// Version, 32 bits.
    pub const VS: usize = 0x08;
    /// Configuration, 32 bits.
    pub const CC: usize = 0x14;
    /// Status, 32 bits.
    pub const CSTS: usize = 0x1c;
    /// Sizes of the admin queues, 32 bits.
    pub const AQA: usize = 0x24;
    /// Address of the admin submission queue, 64 bits.
    pub const ASQ: usize = 0x28;
    /// Address of the admin completion queue, 64 bits.
    pub const ACQ: usize = 0x30;
    /// End of the registers.
    pub const END: usize = 0x38;
    /// Doorbells: for each queue one of the submission and one of the completion queue.
    pub const DOORBELLS: u64 = 0x1000;
}

/// Version 1.4.
pub const VERSION: u32 = 0x1_0400;

/// Capabilities: queues of at most `entries`, physically contiguous; `timeout` seconds to get ready.
pub fn capabilities(entries: u32, timeout: u64) -> u64 {
    const CONTIGUOUS: u64 = 1 << 16;
    const NVM_COMMANDS: u64 = 1 << 37;
    u64::from(entries - 1) | CONTIGUOUS | ((timeout * 2) << 24) | NVM_COMMANDS
}

/// The configuration register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Configuration(pub u32);

impl Configuration {
    /// Enabled, with entries of the only sizes there are.
    #[cfg(test)]
    pub const ENABLE: Self = Self(1 | (6 << 16) | (4 << 20));

    /// Whether the controller shall run.
    pub fn enabled(self) -> bool {
        self.0 & 1 != 0
    }

    /// Whether the driver announces that it goes.
    pub fn shutdown(self) -> bool {
        self.0 & (3 << 14) != 0
    }

    /// Whether it asks for what there is: NVM commands, pages of 4 KiB, round robin, entries of 64 and
    /// 16 bytes.
    pub fn valid(self) -> bool {
        self.0 & 0x00ff_3ff0 == 0x0046_0000
    }
}

/// Bits of the status register.
pub mod status_register {
    /// The controller takes commands.
    pub const READY: u32 = 1;
    /// The controller has failed and must be reset.
    pub const FATAL: u32 = 2;
    /// All is written: power may go.
    pub const SHUTDOWN_COMPLETE: u32 = 2 << 2;
}

/// Operation codes of admin commands.
pub mod admin {
    pub const DELETE_SQ: u8 = 0x00;
    pub const CREATE_SQ: u8 = 0x01;
    pub const GET_LOG_PAGE: u8 = 0x02;
    pub const DELETE_CQ: u8 = 0x04;
    pub const CREATE_CQ: u8 = 0x05;
    pub const IDENTIFY: u8 = 0x06;
    pub const ABORT: u8 = 0x08;
    pub const SET_FEATURES: u8 = 0x09;
    pub const GET_FEATURES: u8 = 0x0a;
    pub const ASYNC_EVENT_REQUEST: u8 = 0x0c;

    /// The command's name for the log.
    pub fn name(opcode: u8) -> &'static str {
        match opcode {
            DELETE_SQ => "DELETE_SQ",
            CREATE_SQ => "CREATE_SQ",
            GET_LOG_PAGE => "GET_LOG_PAGE",
            DELETE_CQ => "DELETE_CQ",
            CREATE_CQ => "CREATE_CQ",
            IDENTIFY => "IDENTIFY",
            ABORT => "ABORT",
            SET_FEATURES => "SET_FEATURES",
            GET_FEATURES => "GET_FEATURES",
            ASYNC_EVENT_REQUEST => "ASYNC_EVENT_REQUEST",
            _ => "admin command",
        }
    }
}

/// Operation codes of commands for a namespace.
pub mod io {
    pub const FLUSH: u8 = 0x00;
    pub const WRITE: u8 = 0x01;
    pub const READ: u8 = 0x02;
    pub const WRITE_ZEROES: u8 = 0x08;
    pub const DATASET_MANAGEMENT: u8 = 0x09;
}

/// What IDENTIFY can ask for.
pub mod cns {
    pub const NAMESPACE: u8 = 0x00;
    pub const CONTROLLER: u8 = 0x01;
    pub const ACTIVE_NAMESPACES: u8 = 0x02;
    pub const NAMESPACE_DESCRIPTORS: u8 = 0x03;
    pub const COMMAND_SET_NAMESPACE: u8 = 0x05;
    pub const COMMAND_SET_CONTROLLER: u8 = 0x06;
}

/// Log pages.
pub mod log {
    pub const ERRORS: u8 = 1;
    pub const HEALTH: u8 = 2;
    pub const FIRMWARE: u8 = 3;
}

/// Features.
pub mod feature {
    pub const ARBITRATION: u8 = 0x01;
    pub const POWER_MANAGEMENT: u8 = 0x02;
    pub const TEMPERATURE_THRESHOLD: u8 = 0x04;
    pub const ERROR_RECOVERY: u8 = 0x05;
    pub const VOLATILE_WRITE_CACHE: u8 = 0x06;
    pub const NUMBER_OF_QUEUES: u8 = 0x07;
    pub const WRITE_ATOMICITY: u8 = 0x0a;
    pub const ASYNC_EVENTS: u8 = 0x0b;
}

/// An asynchronous event: the driver has written a value to a doorbell that cannot be.
pub const EVENT_INVALID_DOORBELL: u32 = (1 << 8) | ((log::ERRORS as u32) << 16);

/// How a command has ended: status code type and status code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(pub u16);

impl Status {
    pub const SUCCESS: Self = Self(0x000);
    pub const INVALID_OPCODE: Self = Self(0x001);
    pub const INVALID_FIELD: Self = Self(0x002);
    pub const DATA_TRANSFER_ERROR: Self = Self(0x004);
    pub const INVALID_NAMESPACE: Self = Self(0x00b);
    pub const INVALID_PRP_OFFSET: Self = Self(0x013);
    pub const LBA_OUT_OF_RANGE: Self = Self(0x080);
    pub const INVALID_COMPLETION_QUEUE: Self = Self(0x100);
    pub const INVALID_QUEUE_IDENTIFIER: Self = Self(0x101);
    pub const INVALID_QUEUE_SIZE: Self = Self(0x102);
    pub const TOO_MANY_EVENT_REQUESTS: Self = Self(0x105);
    pub const INVALID_INTERRUPT_VECTOR: Self = Self(0x108);
    pub const INVALID_LOG_PAGE: Self = Self(0x109);
    pub const INVALID_QUEUE_DELETION: Self = Self(0x10c);
    pub const WRITE_FAULT: Self = Self(0x280);
    pub const UNRECOVERED_READ_ERROR: Self = Self(0x281);

    /// As it is in a completion, without the phase tag. What has failed would fail again.
    pub fn field(self) -> u16 {
        const DO_NOT_RETRY: u16 = 1 << 15;
        match self {
            Self::SUCCESS => 0,
            Self(code) => (code << 1) | DO_NOT_RETRY,
        }
    }
}

/// A command, an entry of a submission queue.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Command {
    /// Operation code.
    pub opcode: u8,
    /// Fused operation, and whether the data pointer is PRPs.
    pub flags: u8,
    /// Identifier, repeated in the completion.
    pub id: U16,
    /// Namespace.
    pub namespace: U32,
    pub reserved: [U32; 2],
    /// Metadata pointer.
    pub metadata: U64,
    /// The two PRP entries of the data pointer.
    pub prp: [U64; 2],
    /// Command words 10 to 15.
    pub words: [U32; 6],
}

impl Command {
    /// Command word 10 to 15.
    pub fn word(&self, number: usize) -> u32 {
        self.words[number - 10].get()
    }

    /// Low and high half of a command word.
    pub fn halves(&self, number: usize) -> (u16, u16) {
        let word = self.word(number);
        (word as u16, (word >> 16) as u16)
    }

    /// The PRP entries.
    pub fn prps(&self) -> [u64; 2] {
        self.prp.map(U64::get)
    }

    /// First block and number of blocks of a read or write.
    pub fn blocks(&self) -> (u64, u64) {
        let first = u64::from(self.word(10)) | (u64::from(self.word(11)) << 32);
        (first, u64::from(self.word(12) & 0xffff) + 1)
    }
}

/// A completion, an entry of a completion queue.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Completion {
    /// What depends on the command.
    pub result: U32,
    pub reserved: U32,
    /// Up to where the controller has taken commands.
    pub sq_head: U16,
    /// Submission queue.
    pub sq: U16,
    /// Identifier of the command.
    pub id: U16,
    /// Status and phase tag.
    pub status: U16,
}

/// A range of blocks in DATASET MANAGEMENT.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct BlockRange {
    pub attributes: U32,
    /// Number of blocks.
    pub count: U32,
    /// First block.
    pub first: U64,
}

/// The beginning of what IDENTIFY tells about the controller; zeros follow up to 4096 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IdentifyController {
    pub vendor: U16,
    pub subsystem_vendor: U16,
    pub serial: [u8; 20],
    pub model: [u8; 40],
    pub firmware: [u8; 8],
    pub recommended_burst: u8,
    pub ieee: [u8; 3],
    pub multi_path: u8,
    /// log2 of the longest transfer in pages.
    pub max_transfer: u8,
    pub controller: U16,
    pub version: U32,
    pub reserved84: [u8; 27],
    /// 1 is an I/O controller.
    pub kind: u8,
    pub reserved112: [u8; 144],
    pub optional_admin: U16,
    /// Most ABORTs at a time, less one.
    pub abort_limit: u8,
    /// Most ASYNC EVENT REQUESTs at a time, less one.
    pub event_limit: u8,
    pub firmware_updates: u8,
    pub log_attributes: u8,
    pub reserved262: [u8; 4],
    /// In kelvins.
    pub warning_temperature: U16,
    pub critical_temperature: U16,
    pub reserved270: [u8; 242],
    /// log2 of the least and most size of entries of submission queues.
    pub sq_entry: u8,
    pub cq_entry: u8,
    pub reserved514: [u8; 2],
    pub namespaces: U32,
    pub optional_commands: U16,
    pub reserved522: [u8; 3],
    pub write_cache: u8,
    pub reserved526: [u8; 242],
    pub name: [u8; 256],
}

/// The beginning of what IDENTIFY tells about the namespace; zeros follow up to 4096 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IdentifyNamespace {
    /// Size, capacity and blocks in use.
    pub blocks: [U64; 3],
    pub reserved24: [u8; 9],
    /// What reads of deallocated blocks give.
    pub deallocate: u8,
    pub reserved34: [u8; 86],
    pub eui64: [u8; 8],
    /// The only format: metadata, log2 of the block size, relative performance.
    pub metadata_size: U16,
    pub block_shift: u8,
    pub performance: u8,
}

/// An identifier of the namespace in the list of such.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Eui64Descriptor {
    /// 1 is an EUI-64.
    pub kind: u8,
    pub length: u8,
    pub reserved: [u8; 2],
    pub eui64: [u8; 8],
}

/// The beginning of the log page about health; zeros follow up to 512 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Health {
    pub warning: u8,
    /// In kelvins.
    pub temperature: U16,
    pub spare: u8,
    pub spare_threshold: u8,
    pub reserved: [u8; 27],
    /// Thousands of 512 bytes that were read and written, then commands that did so; 128 bits each.
    pub counts: [[U64; 2]; 4],
}

const _: () = {
    assert!(size_of::<Command>() == 64);
    assert!(size_of::<Completion>() == 16);
    assert!(size_of::<IdentifyController>() == 1024);
    assert!(std::mem::offset_of!(IdentifyController, optional_admin) == 256);
    assert!(std::mem::offset_of!(IdentifyController, sq_entry) == 512);
    assert!(std::mem::offset_of!(IdentifyController, name) == 768);
    assert!(std::mem::offset_of!(IdentifyNamespace, eui64) == 120);
    assert!(std::mem::offset_of!(Health, counts) == 32);
};
