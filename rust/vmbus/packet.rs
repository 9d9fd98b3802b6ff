// SPDX-License-Identifier: GPL-2.0

//! A packet from the host, copied out of the ring.

use core::{
    marker::PhantomData,
    ptr::NonNull, //
};

use hyperv_bindings as bindings;
use kernel::prelude::*;

/// What a packet is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PacketKind {
    /// All data is in the packet.
    Inband,
    /// The data is in a buffer shared before, see [`Packet::transfer_pages`].
    TransferPages,
    /// The data is in guest memory described by the packet.
    GpaDirect,
    /// Answer to a packet of ours.
    Completion,
    /// Something else, by number.
    Other(u16),
}

/// A packet from the host.
///
/// # Invariants
///
/// `descriptor` points to a packet in private memory, valid for `'a` and not changed meanwhile,
/// whose `offset8` and `len8` lie within the memory; `offset8` is at least the size of the
/// descriptor and not more than `len8`.
pub struct Packet<'a> {
    descriptor: NonNull<bindings::vmpacket_descriptor>,
    _copy: PhantomData<&'a [u8]>,
}

impl<'a> Packet<'a> {
    /// # Safety
    ///
    /// The type invariants must hold for `descriptor`.
    pub(crate) unsafe fn from_raw(descriptor: NonNull<bindings::vmpacket_descriptor>) -> Self {
        // INVARIANT: By the safety requirements.
        Self {
            descriptor,
            _copy: PhantomData,
        }
    }

    fn descriptor(&self) -> bindings::vmpacket_descriptor {
        // SAFETY: By the type invariants the pointer is valid.
        unsafe { self.descriptor.read_unaligned() }
    }

    /// What the packet is.
    #[inline]
    pub fn kind(&self) -> PacketKind {
        let kind = self.descriptor().type_;
        match u32::from(kind) {
            bindings::vmbus_packet_type_VM_PKT_DATA_INBAND => PacketKind::Inband,
            bindings::vmbus_packet_type_VM_PKT_DATA_USING_XFER_PAGES => PacketKind::TransferPages,
            bindings::vmbus_packet_type_VM_PKT_DATA_USING_GPA_DIRECT => PacketKind::GpaDirect,
            bindings::vmbus_packet_type_VM_PKT_COMP => PacketKind::Completion,
            _ => PacketKind::Other(kind),
        }
    }

    /// The id by which the sender knows the transaction.
    #[inline]
    pub fn transaction_id(&self) -> u64 {
        self.descriptor().trans_id
    }

    /// The whole packet, headers included.
    #[inline]
    pub fn bytes(&self) -> &'a [u8] {
        let len = usize::from(self.descriptor().len8) * 8;
        // SAFETY: By the type invariants `len` bytes are valid for `'a` and do not change.
        unsafe { core::slice::from_raw_parts(self.descriptor.as_ptr().cast(), len) }
    }

    /// The data behind the headers. Its length is a multiple of eight.
    #[inline]
    pub fn payload(&self) -> &'a [u8] {
        let start = usize::from(self.descriptor().offset8) * 8;
        self.bytes().get(start..).unwrap_or(&[])
    }

    /// The description of the shared memory that a packet of [`PacketKind::TransferPages`] uses.
    #[inline]
    pub fn transfer_pages(&self) -> Result<TransferPages<'a>> {
        const HEADER: usize = 24;
        if self.kind() != PacketKind::TransferPages {
            return Err(EINVAL);
        }
        let bytes = self.bytes();
        let header = bytes.get(16..HEADER).ok_or(EMSGSIZE)?;
        let count = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
        // The ranges come before the payload; the host must not let them overlap.
        let start = usize::from(self.descriptor().offset8) * 8;
        let end = usize::try_from(count)?
            .checked_mul(8)
            .and_then(|len| len.checked_add(HEADER))
            .ok_or(EMSGSIZE)?;
        if end > start {
            return Err(EMSGSIZE);
        }
        Ok(TransferPages {
            pageset_id: u16::from_le_bytes([header[0], header[1]]),
            ranges: bytes.get(HEADER..end).ok_or(EMSGSIZE)?,
        })
    }
}

/// The parts of a shared buffer that a packet is about.
#[derive(Clone, Copy)]
pub struct TransferPages<'a> {
    pageset_id: u16,
    ranges: &'a [u8],
}

impl TransferPages<'_> {
    /// Which buffer, by the number agreed on for it.
    #[inline]
    pub fn pageset_id(&self) -> u16 {
        self.pageset_id
    }

    /// Number of ranges.
    pub fn len(&self) -> usize {
        self.ranges.len() / 8
    }

    /// Whether there are no ranges.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Offset and length of each range, as the host gives them: they may lie outside of the buffer.
    pub fn ranges(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.ranges.chunks_exact(8).map(|r| {
            (
                u32::from_le_bytes([r[4], r[5], r[6], r[7]]),
                u32::from_le_bytes([r[0], r[1], r[2], r[3]]),
            )
        })
    }
}
