// SPDX-License-Identifier: GPL-2.0

//! An open channel: two rings, a signal in each direction.

use std::{
    os::fd::AsRawFd,
    sync::{
        atomic::{AtomicBool, AtomicU32, Ordering},
        Arc, Mutex,
    },
    time::{Duration, Instant},
};

use hyperv_wire::{
    ring::{Corrupt, Incoming, Outgoing, Reader, WriteError, Writer},
    vmbus::{
        self, GpaDirectHeader, GpaRanges, PacketType, RangeError, TooShort, TransferPagesHeader,
        Version, PACKET_FLAG_COMPLETION_REQUESTED, USER_DEFINED_LEN,
    },
};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::EventFd,
};
use zerocopy::IntoBytes;

use crate::{
    gpadl::{Gpadl, GpadlTable},
    host::Requests,
    lock,
    memory::{GpaRange, GuestRing},
    Counter, Guid, Platform, TransferRange,
};

/// The channel is closed and stays so; a new open makes a new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("channel is closed")]
pub struct Closed;

/// Why nothing can be received any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecvError {
    /// The channel is closed.
    #[error("channel is closed")]
    Closed,
    /// The guest put something into the ring that is no packet.
    #[error("ring is corrupt: {0}")]
    Ring(Corrupt),
    /// The guest sent a packet whose header is shorter than its type demands.
    #[error("packet header is too short: {0}")]
    Header(TooShort),
    /// The guest sent a packet whose ranges make no sense.
    #[error("packet with bad ranges: {0}")]
    Ranges(RangeError),
    /// The guest sent a packet with pages that it hides from the host.
    #[error("packet with pages that the guest hides from the host")]
    Hidden,
}

/// Why a packet was not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The channel is closed.
    #[error("channel is closed")]
    Closed,
    /// No room now. The guest has been asked to signal when there is.
    #[error("ring is full")]
    Full,
    /// The packet can never be sent on this channel.
    #[error("packet is larger than the ring")]
    TooLarge,
    /// The guest broke the ring.
    #[error("ring is corrupt: {0}")]
    Ring(Corrupt),
}

/// Why [`Channel::wait`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// The guest has signalled.
    Signalled,
    /// It has not.
    TimedOut,
}

/// What came with a packet besides its payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PacketKind {
    /// Nothing.
    InBand,
    /// An answer to the host's packet with that transaction id.
    Completion,
    /// Guest memory.
    GpaDirect(Vec<GpaRange>),
    /// Parts of a transfer page set.
    TransferPages {
        /// The set.
        pageset_id: u16,
        /// The parts.
        ranges: Vec<TransferRange>,
    },
    /// Another type.
    Other(PacketType),
}

/// A packet from the guest, copied out of the ring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// What came with it.
    pub kind: PacketKind,
    /// Repeated in the completion.
    pub transaction_id: u64,
    /// Whether the guest waits for one.
    pub completion_requested: bool,
    /// Payload, with the padding to a multiple of 8 bytes.
    pub payload: Vec<u8>,
}

#[derive(Debug)]
struct Inbound {
    reader: Reader<GuestRing>,
    masked: bool,
}

#[derive(Debug)]
struct Outbound {
    writer: Writer<GuestRing>,
    waiting: bool,
}

/// What the control plane knows of a channel that is being opened.
pub(crate) struct OpenParameters {
    pub(crate) name: String,
    pub(crate) instance: Guid,
    pub(crate) relid: u32,
    pub(crate) subchannel_index: u16,
    pub(crate) version: Version,
    pub(crate) target_vp: u32,
    pub(crate) sint: u8,
    pub(crate) open_data: [u8; USER_DEFINED_LEN],
    pub(crate) ring_gpadl: u32,
    pub(crate) ring_pages: Vec<u64>,
    pub(crate) downstream_page: u32,
}

/// Why a channel could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    #[error("the ring GPADL cannot be split at page {0}")]
    Split(u32),
    #[error("a ring is not in guest memory or has no data pages")]
    Pages,
    #[error("ring: {0}")]
    Ring(Corrupt),
    #[error("eventfd: {0}")]
    Event(#[from] std::io::Error),
}

/// An open channel.
///
/// Receiving and sending may be done by different threads.
pub struct Channel {
    name: String,
    instance: Guid,
    relid: u32,
    subchannel_index: u16,
    version: Version,
    sint: u8,
    open_data: [u8; USER_DEFINED_LEN],
    ring_gpadl: u32,
    target_vp: AtomicU32,
    event: EventFd,
    epoll: Epoll,
    closed: AtomicBool,
    inbound: Mutex<Option<Inbound>>,
    outbound: Mutex<Option<Outbound>>,
    platform: Arc<dyn Platform>,
    gpadls: Arc<GpadlTable>,
    requests: Requests,
    interrupts: Counter,
}

impl Channel {
    pub(crate) fn new(
        parameters: OpenParameters,
        platform: Arc<dyn Platform>,
        gpadls: Arc<GpadlTable>,
        requests: Requests,
        interrupts: Counter,
    ) -> Result<Self, OpenError> {
        let OpenParameters {
            ring_pages,
            downstream_page,
            ..
        } = &parameters;
        let split = *downstream_page as usize;
        if split >= ring_pages.len() {
            return Err(OpenError::Split(*downstream_page));
        }
        let (upstream, downstream) = ring_pages.split_at(split);
        let memory = platform.memory();
        let upstream = GuestRing::new(memory, upstream).ok_or(OpenError::Pages)?;
        let downstream = GuestRing::new(memory, downstream).ok_or(OpenError::Pages)?;
        let reader = Reader::new(upstream).map_err(OpenError::Ring)?;
        let writer = Writer::new(downstream).map_err(OpenError::Ring)?;
        writer.announce_pending_send_size();

        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let epoll = Epoll::new()?;
        epoll.ctl(
            ControlOperation::Add,
            event.as_raw_fd(),
            EpollEvent::new(EventSet::IN, 0),
        )?;
        // A worker shall look into the ring when it starts.
        event.write(1)?;

        Ok(Self {
            name: parameters.name,
            instance: parameters.instance,
            relid: parameters.relid,
            subchannel_index: parameters.subchannel_index,
            version: parameters.version,
            sint: parameters.sint,
            open_data: parameters.open_data,
            ring_gpadl: parameters.ring_gpadl,
            target_vp: AtomicU32::new(parameters.target_vp),
            event,
            epoll,
            closed: AtomicBool::new(false),
            inbound: Mutex::new(Some(Inbound {
                reader,
                masked: false,
            })),
            outbound: Mutex::new(Some(Outbound {
                writer,
                waiting: false,
            })),
            platform,
            gpadls,
            requests,
            interrupts,
        })
    }

    /// Name for log lines: the device's name, with the subchannel's number if it is one.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Number of the channel on the bus.
    pub fn relid(&self) -> u32 {
        self.relid
    }

    /// Zero for the primary channel.
    pub fn subchannel_index(&self) -> u16 {
        self.subchannel_index
    }

    /// Virtual processor that is interrupted; the guest may change it at any time.
    pub fn target_vp(&self) -> u32 {
        self.target_vp.load(Ordering::Relaxed)
    }

    pub(crate) fn set_target_vp(&self, vp: u32) {
        self.target_vp.store(vp, Ordering::Relaxed);
    }

    /// Negotiated version of the bus.
    pub fn vmbus_version(&self) -> Version {
        self.version
    }

    /// What the guest's driver passed on open.
    pub fn open_data(&self) -> &[u8; USER_DEFINED_LEN] {
        &self.open_data
    }

    pub(crate) fn ring_gpadl(&self) -> u32 {
        self.ring_gpadl
    }

    /// Memory of the guest.
    pub fn memory(&self) -> &GuestMemoryMmap {
        self.platform.memory()
    }

    /// A memory lent by the guest on any channel of this device.
    pub fn gpadl(&self, id: u32) -> Option<Arc<Gpadl>> {
        self.gpadls
            .get(id)
            .filter(|gpadl| gpadl.instance() == self.instance)
    }

    /// Offers the subchannels `1..=count` of the device.
    pub fn offer_subchannels(&self, count: u16) {
        self.requests.offer_subchannels(self.instance, count);
    }

    /// Rescinds the device of this channel. Its channels are closed soon, by the control thread.
    pub fn remove_device(&self) {
        self.requests.remove_device(self.instance);
    }

    /// Becomes readable when the guest signals, and when the channel is closed. Not blocking.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Whether the channel is closed.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Called for the guest's signal.
    pub(crate) fn signal_from_guest(&self) {
        // Fails only if the count is at its limit, and then the event is readable anyway.
        let _ = self.event.write(1);
    }

    /// Ends the use of the rings; returns when no other thread is in them.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        *lock(&self.inbound) = None;
        *lock(&self.outbound) = None;
        self.signal_from_guest();
    }

    /// Waits for the guest's signal and takes it.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<Wake, Closed> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            if self.is_closed() {
                return Err(Closed);
            }
            if self.event.read().is_ok() {
                return if self.is_closed() {
                    Err(Closed)
                } else {
                    Ok(Wake::Signalled)
                };
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Ok(Wake::TimedOut);
            }
            self.poll(left);
        }
    }

    /// Sleeps until the event is readable, for at most `timeout`.
    fn poll(&self, timeout: Option<Duration>) {
        // Rounded up, so that the last part of a millisecond is not spent spinning.
        let timeout = timeout.map_or(-1, |timeout| {
            i32::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
        });
        // An interrupted sleep is a short one.
        let _ = self.epoll.wait(timeout, &mut [EpollEvent::default()]);
    }

    fn interrupt_guest(&self) {
        self.interrupts.inc();
        // relids are below 2048.
        self.platform
            .signal_event(self.target_vp(), self.sint, self.relid as u16);
    }

    /// Takes the next packet out of the ring.
    ///
    /// While there are packets the guest does not signal. `None` means that the ring is empty and
    /// that the guest will signal the next packet. After an error other than [`RecvError::Closed`]
    /// the device should ignore the channel.
    pub fn recv(&self) -> Result<Option<Packet>, RecvError> {
        let mut inbound = lock(&self.inbound);
        let inbound = inbound.as_mut().ok_or(RecvError::Closed)?;
        let incoming = loop {
            if let Some(incoming) = inbound.reader.peek().map_err(RecvError::Ring)? {
                break incoming;
            }
            if !inbound.masked {
                return Ok(None);
            }
            inbound.masked = false;
            if inbound.reader.unmask().map_err(RecvError::Ring)? == 0 {
                return Ok(None);
            }
        };
        if !inbound.masked {
            inbound.reader.mask();
            inbound.masked = true;
        }
        let packet = copy_packet(&inbound.reader, &incoming).and_then(|packet| {
            let hidden = |range: &GpaRange| !range.is_shared(&*self.platform);
            match &packet.kind {
                PacketKind::GpaDirect(ranges) if ranges.iter().any(hidden) => {
                    Err(RecvError::Hidden)
                }
                _ => Ok(packet),
            }
        });
        inbound.reader.advance(incoming);
        if inbound.reader.publish() {
            self.interrupt_guest();
        }
        packet.map(Some)
    }

    fn send(&self, packet: &Outgoing<'_>) -> Result<(), SendError> {
        let mut outbound = lock(&self.outbound);
        let outbound = outbound.as_mut().ok_or(SendError::Closed)?;
        let signal = loop {
            match outbound.writer.write(packet) {
                Ok(signal) => break signal,
                Err(WriteError::TooLarge) => return Err(SendError::TooLarge),
                Err(WriteError::Corrupt(corrupt)) => return Err(SendError::Ring(corrupt)),
                Err(WriteError::Full { needed }) => {
                    outbound.waiting = true;
                    if !outbound
                        .writer
                        .wait_for_space(needed)
                        .map_err(SendError::Ring)?
                    {
                        return Err(SendError::Full);
                    }
                }
            }
        };
        if outbound.waiting {
            outbound.waiting = false;
            outbound.writer.stop_waiting();
        }
        if signal {
            self.interrupt_guest();
        }
        Ok(())
    }

    /// Sends a packet of payload only.
    pub fn send_inband(
        &self,
        transaction_id: u64,
        completion_requested: bool,
        payload: &[u8],
    ) -> Result<(), SendError> {
        self.send(&Outgoing {
            packet_type: PacketType::DATA_INBAND,
            flags: if completion_requested {
                PACKET_FLAG_COMPLETION_REQUESTED
            } else {
                0
            },
            transaction_id,
            header: &[],
            payload,
        })
    }

    /// Answers the guest's packet with that transaction id.
    pub fn send_completion(&self, transaction_id: u64, payload: &[u8]) -> Result<(), SendError> {
        self.send(&Outgoing {
            packet_type: PacketType::COMPLETION,
            flags: 0,
            transaction_id,
            header: &[],
            payload,
        })
    }

    /// Sends a packet that refers to parts of a transfer page set; the guest completes it when it
    /// has done with them.
    pub fn send_transfer_pages(
        &self,
        transaction_id: u64,
        pageset_id: u16,
        ranges: &[TransferRange],
        payload: &[u8],
    ) -> Result<(), SendError> {
        let header = TransferPagesHeader {
            pageset_id: pageset_id.into(),
            sender_owns_set: 0,
            reserved: 0,
            range_count: (ranges.len() as u32).into(),
        };
        let mut bytes = Vec::with_capacity(8 * (ranges.len() + 1));
        bytes.extend_from_slice(header.as_bytes());
        for range in ranges {
            let range = vmbus::TransferRange {
                byte_count: range.byte_count.into(),
                byte_offset: range.byte_offset.into(),
            };
            bytes.extend_from_slice(range.as_bytes());
        }
        self.send(&Outgoing {
            packet_type: PacketType::DATA_USING_XFER_PAGES,
            flags: PACKET_FLAG_COMPLETION_REQUESTED,
            transaction_id,
            header: &bytes,
            payload,
        })
    }
}

/// Copies a packet out of the ring and checks what its type has besides payload.
fn copy_packet(reader: &Reader<GuestRing>, incoming: &Incoming) -> Result<Packet, RecvError> {
    let mut payload = vec![0; incoming.payload_len()];
    reader.read_payload(incoming, &mut payload);

    let mut header = Vec::new();
    if matches!(
        incoming.packet_type(),
        PacketType::DATA_USING_GPA_DIRECT | PacketType::DATA_USING_XFER_PAGES
    ) {
        header.resize(incoming.header_len(), 0);
        reader.read_header(incoming, &mut header);
    }

    let kind = match incoming.packet_type() {
        PacketType::DATA_INBAND => PacketKind::InBand,
        PacketType::COMPLETION => PacketKind::Completion,
        PacketType::DATA_USING_GPA_DIRECT => {
            let (fixed, rest) =
                vmbus::parse::<GpaDirectHeader>(&header).map_err(RecvError::Header)?;
            let ranges = GpaRanges::new(rest, fixed.range_count.get())
                .map(|range| range.map(GpaRange::from))
                .collect::<Result<_, _>>()
                .map_err(RecvError::Ranges)?;
            PacketKind::GpaDirect(ranges)
        }
        PacketType::DATA_USING_XFER_PAGES => {
            let (fixed, mut rest) =
                vmbus::parse::<TransferPagesHeader>(&header).map_err(RecvError::Header)?;
            let mut ranges = Vec::new();
            for _ in 0..fixed.range_count.get() {
                let (range, more) =
                    vmbus::parse::<vmbus::TransferRange>(rest).map_err(RecvError::Header)?;
                rest = more;
                ranges.push(TransferRange {
                    byte_count: range.byte_count.get(),
                    byte_offset: range.byte_offset.get(),
                });
            }
            PacketKind::TransferPages {
                pageset_id: fixed.pageset_id.get(),
                ranges,
            }
        }
        other => PacketKind::Other(other),
    };
    Ok(Packet {
        kind,
        transaction_id: incoming.transaction_id(),
        completion_requested: incoming.flags() & PACKET_FLAG_COMPLETION_REQUESTED != 0,
        payload,
    })
}
