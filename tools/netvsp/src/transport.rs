// SPDX-License-Identifier: GPL-2.0

//! What the device needs of a VMBus channel, so that the tests can be the guest.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vmbus_host::{
    AccessError, Channel, GpaRange, Gpadl, GpadlError, Packet, RecvError, SendError, TransferRange,
};

/// Memory that the guest lends for as long as a buffer is in use.
pub trait SharedMemory: Send + Sync {
    /// Length in bytes.
    fn len(&self) -> u64;

    /// Copies from the memory.
    fn read_at(&self, offset: u64, to: &mut [u8]) -> Result<(), GpadlError>;

    /// Copies to the memory.
    fn write_at(&self, offset: u64, from: &[u8]) -> Result<(), GpadlError>;
}

impl SharedMemory for Gpadl {
    fn len(&self) -> u64 {
        Gpadl::len(self)
    }

    fn read_at(&self, offset: u64, to: &mut [u8]) -> Result<(), GpadlError> {
        Gpadl::read_at(self, offset, to)
    }

    fn write_at(&self, offset: u64, from: &[u8]) -> Result<(), GpadlError> {
        Gpadl::write_at(self, offset, from)
    }
}

/// An open channel. See [`Channel`], whose methods these are.
pub trait Transport: Send + Sync {
    /// Name for log lines.
    fn name(&self) -> &str;

    /// Zero for the primary channel.
    fn subchannel_index(&self) -> u16;

    /// Readable when the guest has signalled and when the channel was closed.
    fn event_fd(&self) -> RawFd;

    /// Makes [`Self::event_fd`] unreadable again.
    fn clear_event(&self);

    /// The next packet of the guest.
    fn recv(&self) -> Result<Option<Packet>, RecvError>;

    /// Sends a packet without pages.
    fn send_inband(&self, transaction_id: u64, payload: &[u8]) -> Result<(), SendError>;

    /// Answers a packet of the guest.
    fn send_completion(&self, transaction_id: u64, payload: &[u8]) -> Result<(), SendError>;

    /// Sends a packet that tells of parts of the receive buffer, and wants a completion.
    fn send_transfer_pages(
        &self,
        transaction_id: u64,
        pageset_id: u16,
        ranges: &[TransferRange],
        payload: &[u8],
    ) -> Result<(), SendError>;

    /// A buffer that the guest has lent.
    fn shared_memory(&self, gpadl: u32) -> Option<Arc<dyn SharedMemory>>;

    /// Reads a range of pages that came with a packet.
    fn read_pages(&self, range: &GpaRange, to: &mut [u8]) -> Result<(), AccessError>;

    /// Offers subchannels 1 to `count`.
    fn offer_subchannels(&self, count: u16);
}

impl Transport for Channel {
    fn name(&self) -> &str {
        Channel::name(self)
    }

    fn subchannel_index(&self) -> u16 {
        Channel::subchannel_index(self)
    }

    fn event_fd(&self) -> RawFd {
        self.event().as_raw_fd()
    }

    fn clear_event(&self) {
        // Fails if the event is not set, which is what is wanted.
        let _ = self.event().read();
    }

    fn recv(&self) -> Result<Option<Packet>, RecvError> {
        Channel::recv(self)
    }

    fn send_inband(&self, transaction_id: u64, payload: &[u8]) -> Result<(), SendError> {
        Channel::send_inband(self, transaction_id, false, payload)
    }

    fn send_completion(&self, transaction_id: u64, payload: &[u8]) -> Result<(), SendError> {
        Channel::send_completion(self, transaction_id, payload)
    }

    fn send_transfer_pages(
        &self,
        transaction_id: u64,
        pageset_id: u16,
        ranges: &[TransferRange],
        payload: &[u8],
    ) -> Result<(), SendError> {
        Channel::send_transfer_pages(self, transaction_id, pageset_id, ranges, payload)
    }

    fn shared_memory(&self, gpadl: u32) -> Option<Arc<dyn SharedMemory>> {
        let gpadl = self.gpadl(gpadl)?;
        Some(gpadl)
    }

    fn read_pages(&self, range: &GpaRange, to: &mut [u8]) -> Result<(), AccessError> {
        range.read_at(self.memory(), 0, to)
    }

    fn offer_subchannels(&self, count: u16) {
        Channel::offer_subchannels(self, count);
    }
}
