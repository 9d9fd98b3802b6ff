// SPDX-License-Identifier: GPL-2.0

//! The rings of an open channel: sending, receiving, signalling.

use hyperv_bindings as bindings;
use kernel::{
    error::to_result,
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Release, //
        },
        rcu, //
    },
};

use crate::{
    channel::Shared,
    packet::Packet, //
};

/// Most page buffers in one packet.
pub const PAGE_BUFFERS_MAX: usize = bindings::MAX_PAGE_BUFFER_COUNT as usize;

/// Bytes behind each packet in a ring.
const PACKET_TRAILER: u32 = 8;

/// Whether the host shall complete a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// Send a completion with the packet's transaction id.
    Wanted,
    /// No completion.
    None,
}

/// The rings of a channel that is open, and stays so for the life of this object.
///
/// An RCU read lock is held: do not sleep while you have it.
///
/// # Invariants
///
/// The channel is valid and open.
pub struct Ring<'a> {
    shared: &'a Shared,
    _guard: Option<rcu::Guard>,
}

impl<'a> Ring<'a> {
    /// The channel must have been seen open under `guard`, or for `None` under one that lives for
    /// `'a`.
    #[inline]
    pub(crate) fn new(shared: &'a Shared, guard: Option<rcu::Guard>) -> Self {
        // INVARIANT: Closing waits until the guard is dropped.
        Self {
            shared,
            _guard: guard,
        }
    }

    #[inline]
    pub(crate) fn raw(&self) -> *mut bindings::vmbus_channel {
        self.shared.raw.as_ptr()
    }

    /// Whether the host took the channel back. Nothing can be sent then.
    #[inline]
    pub fn is_rescinded(&self) -> bool {
        // SAFETY: By the type invariants the channel is valid.
        unsafe { (&raw const (*self.raw()).rescind).read_volatile() }
    }

    /// CPU to which the host sends the channel's interrupts.
    pub fn target_cpu(&self) -> u32 {
        // SAFETY: By the type invariants the channel is valid.
        unsafe { (&raw const (*self.raw()).target_cpu).read_volatile() }
    }

    /// Sends an in-band packet. If a reply is wanted, the host will complete it with the same `id`.
    ///
    /// Fails with `EAGAIN` if the ring is full and with `ENODEV` if the channel is rescinded.
    #[inline]
    pub fn send_inband(&self, payload: &[u8], id: u64, reply: Reply) -> Result {
        self.send(
            payload,
            id,
            bindings::vmbus_packet_type_VM_PKT_DATA_INBAND,
            match reply {
                Reply::Wanted => bindings::VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED,
                Reply::None => 0,
            },
        )
    }

    /// Completes the host's packet with the given transaction id.
    ///
    /// Fails as [`Self::send_inband`] does.
    #[inline]
    pub fn send_completion(&self, transaction_id: u64, payload: &[u8]) -> Result {
        let kind = bindings::vmbus_packet_type_VM_PKT_COMP;
        self.send(payload, transaction_id, kind, 0)
    }

    #[inline]
    fn send(
        &self,
        payload: &[u8],
        id: u64,
        kind: bindings::vmbus_packet_type,
        flags: u32,
    ) -> Result {
        let len = packet_len(payload)?;
        // SAFETY: By the type invariants the channel is open. The function copies the payload and
        // does not write to it.
        sent(unsafe {
            bindings::vmbus_sendpacket(
                self.raw(),
                payload.as_ptr().cast_mut().cast(),
                len,
                id,
                kind,
                flags,
            )
        })
    }

    /// Free part of the ring to the host, in percent.
    #[inline]
    pub fn write_space_percent(&self) -> u32 {
        // SAFETY: By the type invariants the channel is open, so it has rings.
        unsafe { bindings::hv_get_avail_to_write_percent(&raw const (*self.raw()).outbound) }
    }

    /// Bytes in the ring from the host that are not read yet.
    #[inline]
    pub fn bytes_to_read(&self) -> u32 {
        // SAFETY: By the type invariants the channel is open, so it has rings.
        unsafe { bindings::hv_get_bytes_to_read(&raw const (*self.raw()).inbound) }
    }

    /// Masks the host's interrupts.
    #[inline]
    pub fn begin_read(&self) {
        // SAFETY: By the type invariants the channel is open, so it has rings.
        unsafe { bindings::hv_begin_read(&raw mut (*self.raw()).inbound) };
    }

    /// Unmasks the host's interrupts. If the result is not 0, there is something to read about
    /// which there will be no interrupt.
    #[inline]
    pub fn end_read(&self) -> u32 {
        // SAFETY: By the type invariants the channel is open, so it has rings.
        unsafe { bindings::hv_end_read(&raw mut (*self.raw()).inbound) }
    }

    /// The right to read the ring from the host, or `None` if somebody else has it.
    #[inline]
    pub fn reader(&self) -> Option<Reader<'_>> {
        if self.shared.reading.xchg(true, Acquire) {
            return None;
        }
        // INVARIANT: Nobody else has seen `reading` become true.
        Some(Reader {
            ring: self,
            current: None,
            consumed: false,
        })
    }
}

/// The result of a C function, without a call if it is a success.
#[inline]
pub(crate) fn sent(result: c_int) -> Result {
    if result == 0 {
        return Ok(());
    }
    to_result(result)
}

/// Length of a payload, with everything around it small enough for the length field of a packet.
#[inline]
pub(crate) fn packet_len(payload: &[u8]) -> Result<u32> {
    const MAX: usize = u16::MAX as usize * 8 - 1024;
    if payload.len() > MAX {
        return Err(EINVAL);
    }
    Ok(payload.len() as u32)
}

/// The one reader of a ring.
///
/// What was read is given back to the host when this is dropped.
///
/// # Invariants
///
/// There is no other reader of the same ring. `current` is the packet in the bus driver's private
/// buffer, which has not been advanced over yet.
pub struct Reader<'a> {
    ring: &'a Ring<'a>,
    current: Option<core::ptr::NonNull<bindings::vmpacket_descriptor>>,
    consumed: bool,
}

impl Reader<'_> {
    /// The next packet.
    ///
    /// It is a private copy, made once: the host cannot change it any more.
    #[allow(clippy::should_implement_trait)]
    #[inline]
    pub fn next(&mut self) -> Option<Packet<'_>> {
        self.advance();
        // SAFETY: The channel is open, and by the type invariants we are the only reader.
        let descriptor = unsafe { bindings::hv_pkt_iter_first(self.ring.raw()) };
        self.current = core::ptr::NonNull::new(descriptor);
        // SAFETY: The bus driver has made lengths and offset consistent with the copy in its
        // buffer, which stays until the next call, for which `self` has to be borrowed again.
        self.current.map(|d| unsafe { Packet::from_raw(d) })
    }

    /// Moves the private read index over the current packet.
    #[inline]
    fn advance(&mut self) {
        let Some(descriptor) = self.current.take() else {
            return;
        };
        self.consumed = true;
        // SAFETY: The descriptor is the one in the bus driver's buffer.
        let len = u32::from(unsafe { (*descriptor.as_ptr()).len8 }) * 8;
        // SAFETY: The channel is open, so it has rings; by the type invariants nobody else uses
        // the private read index.
        unsafe {
            let inbound = &raw mut (*self.ring.raw()).inbound;
            let size = (*inbound).ring_datasize;
            let mut index = (*inbound).priv_read_index + len + PACKET_TRAILER;
            if index >= size {
                index -= size;
            }
            (*inbound).priv_read_index = index;
        }
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        self.advance();
        if self.consumed {
            // SAFETY: The channel is open, and by the type invariants we are the only reader.
            unsafe { bindings::hv_pkt_iter_close(self.ring.raw()) };
        }
        self.ring.shared.reading.store(false, Release);
    }
}
