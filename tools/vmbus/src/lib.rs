// SPDX-License-Identifier: GPL-2.0

//! Host side of the VMBus.
//!
//! [`VmbusHost`] is the control plane: it negotiates the version with the guest, offers the channels
//! of the [`Device`]s it is given, keeps account of GPADLs and channel ids, and hands every channel
//! that the guest opens to its device as a [`Channel`]. It knows nothing of KVM: the [`Platform`]
//! delivers messages and event flags to virtual processors, and calls [`VmbusHost::post_message`]
//! and [`VmbusHost::signal_event`] for the guest's hypercalls.
//!
//! Threads: hypercalls only queue work. One control thread handles messages and calls the devices;
//! a device has a worker for each open channel, which polls [`Channel::event`].
//!
//! The guest is not trusted: whatever it sends ends in an answer, in a log line and in the counter
//! `vmbus.protocol_errors`, never in a panic.

#![forbid(unsafe_code)]

mod channel;
mod counters;
mod describe;
mod gpadl;
mod host;
mod log;
mod memory;

use std::sync::{Mutex, MutexGuard, PoisonError};

use vm_memory::GuestMemoryMmap;

pub use channel::{Channel, Closed, Packet, PacketKind, RecvError, SendError, Wake};
pub use counters::{Counter, Counters};
pub use gpadl::{Gpadl, GpadlError};
pub use host::{AddDeviceError, Config, Usage, VmbusHost};
pub use hyperv_wire::{hypercall::status as hv_status, vmbus::Version, Guid};
pub use log::{Direction, LogPage, MessageLog};
pub use memory::{AccessError, GpaRange};

/// Result of a hypercall, one of [`hv_status`].
pub type HvStatus = u16;

/// What the VMBus and its devices need from the virtual machine.
pub trait Platform: Send + Sync {
    /// Memory of the guest.
    fn memory(&self) -> &GuestMemoryMmap;

    /// Whether the host may access a page. It may access all, unless the guest is isolated.
    fn is_shared(&self, _pfn: u64) -> bool {
        true
    }

    /// Number of virtual processors.
    fn vp_count(&self) -> u32;

    /// Delivers a SynIC message. Does not block: a message that finds its slot taken waits for the
    /// guest's end-of-message; the order of messages to one slot is kept.
    fn post_message(&self, vp: u32, sint: u8, message_type: u32, payload: &[u8]);

    /// Sets an event flag of a virtual processor and interrupts it.
    fn signal_event(&self, vp: u32, sint: u8, flag: u16);

    /// Delivers a message-signalled interrupt.
    fn signal_msi(&self, address: u64, data: u32);
}

/// What a device shows of itself in its primary channel's offer.
#[derive(Clone, Debug)]
pub struct Offer {
    /// Device class.
    pub class: Guid,
    /// Device instance; no two devices of a guest have the same.
    pub instance: Guid,
    /// [`hyperv_wire::vmbus::offer_flag`] bits.
    pub flags: u16,
    /// MMIO space the device needs.
    pub mmio_megabytes: u16,
    /// Meaning depends on the class.
    pub user_defined: [u8; 120],
}

impl Offer {
    /// An offer with everything optional zero.
    pub fn new(class: Guid, instance: Guid) -> Self {
        Self {
            class,
            instance,
            flags: 0,
            mmio_megabytes: 0,
            user_defined: [0; 120],
        }
    }
}

/// A device refuses to open a channel.
#[derive(Clone, Debug, thiserror::Error)]
#[error("open refused: {0}")]
pub struct OpenRefused(pub String);

/// A device on the VMBus.
///
/// All methods are called on the VMBus control thread, which no other message passes meanwhile: they
/// are to be brief.
pub trait Device: Send + Sync {
    /// Name for log lines and counters, `net0` for example.
    fn name(&self) -> String;

    /// What to offer.
    fn offer(&self) -> Offer;

    /// The guest has opened a channel: the primary one, or a subchannel if
    /// [`Channel::subchannel_index`] is not zero.
    fn open(&self, channel: std::sync::Arc<Channel>) -> Result<(), OpenRefused>;

    /// A channel that was opened is closed, by the guest, by rescind, by unload or by reset. The
    /// channel already refuses everything and its event is signalled; on return no worker uses it.
    fn close(&self, subchannel_index: u16);
}

/// A part of a transfer page set, in bytes from the beginning of the set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransferRange {
    /// Bytes.
    pub byte_count: u32,
    /// Offset.
    pub byte_offset: u32,
}

/// Locks a mutex. What it guards here is consistent at every point where a holder could panic.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
