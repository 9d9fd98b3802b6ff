// SPDX-License-Identifier: GPL-2.0

//! Transmitting by the synthetic path.
//!
//! A packet is an RNDIS message: headers and per-packet information, then the frame. Small ones are
//! copied into a section of the send buffer; while the stack says that more will come, several are
//! put into the same section and sent at once. Others are described to the host as ranges of guest
//! memory. A packet that does not fit behind those in a section can still have its headers there,
//! and the frame as ranges.
//!
//! What the host has not completed lies in the queue's slots, whose numbers are in the transaction
//! ids.

use hyperv_wire::{
    nvsp,
    nvsp::ChannelType,
    rndis::{
        self,
        LargeSend,
        PacketBuilder,
        PpiType,
        TxChecksum,
        Vlan, //
    }, //
};
use kernel::{
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Relaxed,
            Release, //
        },
        rcu, //
    }, //
};
use net::{
    net_ratelimit,
    netdev_err,
    netvsc::{
        trace_nvsp_send_pkt,
        SentPacket, //
    },
    AtomicSkBuff,
    Checksum,
    Device,
    PollContext,
    SkBuff,
    TxControl,
    TxLocked,
    TxQueue,
    Xmit,
    L4, //
};
use vmbus::{
    AtomicBounce,
    GpaRanges,
    Reply,
    HV_PAGE_SIZE,
    PAGE_BUFFERS_MAX, //
};
use zerocopy::little_endian::U32;

use crate::{
    buffers::SendBuffer,
    connection::{
        Queue,
        Shared,
        Transaction, //
    },
    device::Netvsc,
    stats::QueueStats, //
};

/// Room for the headers of a packet.
const HEADERS_MAX: usize = rndis::PACKET_HEADER_SIZE + rndis::MAX_PPI_SIZE;

/// Headroom that the stack shall leave, so that the headers can be put before the frame.
pub(crate) const HEADROOM: u16 = 116;

/// Pages that the headers may lie in.
const HEADER_PAGES: usize = 2;

/// A ring with less free space than this much percent stops the queue.
const LOW_WATER: u32 = 10;
/// One with more than this much wakes it.
const HIGH_WATER: u32 = 20;

/// Packets in flight in a queue. The ring has no room for more small ones.
const SLOTS: u32 = 4096;

/// What is sent at once.
#[derive(Clone, Copy)]
struct Message {
    /// The section, or [`nvsp::INVALID_SECTION`].
    section: u32,
    /// Bytes in the section.
    section_len: u32,
    /// Number of packets.
    packets: u32,
    /// Bytes of their frames.
    bytes: u32,
}

impl Message {
    /// Nothing, in no section.
    const EMPTY: Self = Self {
        section: nvsp::INVALID_SECTION,
        section_len: 0,
        packets: 0,
        bytes: 0,
    };
}

/// What has been sent of a queue that limits the bytes on their way.
#[derive(Default)]
pub(crate) struct Sent {
    /// Number of packets.
    pub(crate) packets: u32,
    /// Bytes that the queue was told of.
    pub(crate) bytes: u32,
}

impl Sent {
    /// Adds what else has been sent.
    pub(crate) fn add(&mut self, more: Self) {
        self.packets = self.packets.wrapping_add(more.packets);
        self.bytes = self.bytes.wrapping_add(more.bytes);
    }
}

/// A place for a message in flight.
///
/// Whoever takes the packet out, which only one can do, reads the numbers and sets `packets` to 0:
/// then the place is free. Only the sender, of whom there is one, uses a free place, and puts the
/// packet there last.
struct Slot {
    /// The packet, or the last one of several that were copied into one section.
    skb: AtomicSkBuff,
    section: Atomic<u32>,
    packets: Atomic<u32>,
    bytes: Atomic<u32>,
    /// Bytes that the queue was told of.
    limited: Atomic<u32>,
}

impl Slot {
    const fn new() -> Self {
        Self {
            skb: AtomicSkBuff::new(),
            section: Atomic::new(0),
            packets: Atomic::new(0),
            bytes: Atomic::new(0),
            limited: Atomic::new(0),
        }
    }

    fn is_free(&self) -> bool {
        self.packets.load(Acquire) == 0
    }

    /// Fills a free place.
    fn fill(&self, skb: SkBuff, message: &Message, limited: u32) {
        self.section.store(message.section, Relaxed);
        self.packets.store(message.packets, Relaxed);
        self.bytes.store(message.bytes, Relaxed);
        self.limited.store(limited, Relaxed);
        self.skb.swap(Some(skb));
    }

    /// Takes out what is there, and calls `then` before the place is free.
    #[inline(always)]
    fn take(&self, then: impl FnOnce()) -> Option<Completed> {
        let skb = self.skb.take()?;
        then();
        let completed = Completed {
            skb,
            section: self.section.load(Relaxed),
            packets: self.packets.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
            limited: self.limited.load(Relaxed),
        };
        self.packets.store(0, Release);
        Some(completed)
    }
}

/// What was in flight.
struct Completed {
    skb: SkBuff,
    section: u32,
    packets: u32,
    bytes: u32,
    limited: u32,
}

/// Packets in a section that has not been sent yet.
struct Batch {
    /// The last of them; `None` if there is no batch.
    skb: Option<SkBuff>,
    message: Message,
}

impl Batch {
    /// Frees the packet that stood for all: another one does now.
    fn consume(&mut self) {
        if let Some(skb) = self.skb.take() {
            skb.consume();
        }
    }
}

/// What only the sender uses.
struct Sending {
    /// What is being collected.
    batch: Batch,
    /// Where to look for a free slot first.
    next: u32,
}

/// The transmitting side of a queue.
#[pin_data]
pub(crate) struct TxState {
    sending: TxLocked<Sending>,
    slots: KVVec<Slot>,
    in_flight: Atomic<u32>,
    /// What the host reads instead of the memory of the packets in the slots, in an isolated
    /// virtual machine. Empty in others.
    bounces: KVVec<AtomicBounce>,
}

impl TxState {
    pub(crate) fn new(dev: &Device<Netvsc>, index: u16) -> impl PinInit<Self, Error> + '_ {
        let sending = Sending {
            batch: Batch {
                skb: None,
                message: Message::EMPTY,
            },
            next: 0,
        };
        try_pin_init!(Self {
            sending: TxLocked::new(dev, index, sending)?,
            slots: {
                let mut slots = KVVec::with_capacity(SLOTS as usize, GFP_KERNEL)?;
                for _ in 0..SLOTS {
                    slots.push(Slot::new(), GFP_KERNEL)?;
                }
                slots
            },
            in_flight: Atomic::new(0),
            bounces: {
                let count = if vmbus::is_isolated() { SLOTS } else { 0 };
                let mut bounces = KVVec::with_capacity(count as usize, GFP_KERNEL)?;
                for _ in 0..count {
                    bounces.push(AtomicBounce::new(), GFP_KERNEL)?;
                }
                bounces
            },
        }? Error)
    }

    /// Number of messages in flight.
    pub(crate) fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }

    /// A free slot. The host completes in about the order of sending, so it is the next one.
    fn free_slot(&self, next: &mut u32) -> Option<(u32, &Slot)> {
        for _ in 0..SLOTS {
            let index = *next % SLOTS;
            *next = index + 1;
            let slot = self.slots.get(index as usize)?;
            if slot.is_free() {
                return Some((index, slot));
            }
        }
        None
    }

    /// Takes out what is in a slot.
    #[inline(always)]
    fn take(&self, index: u32) -> Option<Completed> {
        self.slots.get(index as usize)?.take(|| {
            if !self.bounces.is_empty() {
                self.free_copies(index);
            }
        })
    }

    /// Frees what the host has read instead of the memory of a packet.
    #[cold]
    fn free_copies(&self, index: u32) {
        if let Some(bounce) = self.bounces.get(index as usize) {
            bounce.swap(None);
        }
    }

    /// The same for what the host will not complete.
    #[cold]
    fn take_back(&self, index: u32) -> Option<Completed> {
        self.take(index)
    }

    /// Frees what the host has not completed; the channel is closed.
    pub(crate) fn abandon(&self) {
        for index in 0..SLOTS {
            if self.take_back(index).is_some() {
                self.in_flight.fetch_sub(1, Relaxed);
            }
        }
    }
}

/// Why a packet was not sent.
enum Failure {
    /// There is no room in the ring.
    Full,
    /// There never will be.
    Other(Error),
}

/// Everything that sending needs.
struct Sender<'a> {
    dev: &'a Device<Netvsc>,
    shared: &'a Shared,
    own: &'a Queue,
    buffer: &'a SendBuffer,
    control: &'a TxControl,
    guard: &'a rcu::Guard,
}

impl Sender<'_> {
    /// The queue's counters.
    fn stats(&self) -> Option<&QueueStats> {
        self.dev
            .data()
            .statistics
            .queues
            .get(usize::from(self.control.index()))
    }

    /// Stops the queue, as there is not much room in the ring. Returns whether it stays stopped.
    #[cold]
    fn stop(&self) -> bool {
        let events = &self.dev.data().statistics.events;
        self.control.stop();
        events.stop_queue.add(1);
        if let Some(stats) = self.stats() {
            stats.stop.add(1);
        }
        // If nothing is in flight no completion will wake the queue.
        if self.own.tx.in_flight() != 0 || self.shared.tx_disabled.load(Relaxed) {
            return true;
        }
        self.control.wake();
        events.wake_queue.add(1);
        if let Some(stats) = self.stats() {
            stats.wake.add(1);
        }
        false
    }

    /// Sends a message whose data is in a section, in ranges, or both.
    ///
    /// The caller gets the packet back if it was not sent.
    #[inline(always)]
    fn send(
        &self,
        next: &mut u32,
        skb: SkBuff,
        message: &Message,
        mut ranges: Option<&mut GpaRanges>,
    ) -> Result<(), (Failure, SkBuff)> {
        let index = self.control.index();
        let own_channel = self.own.channel();
        let ring = own_channel
            .map_or_else(|| self.shared.primary(), Ok)
            .and_then(|channel| channel.ring_under(self.guard));
        let ring = match ring {
            Ok(ring) => ring,
            Err(e) => return Err((self.failed(e, message), skb)),
        };
        let space = ring.write_space_percent();
        let body = nvsp::encode(&nvsp::SendRndisPacket {
            channel_type: U32::new(ChannelType::DATA.0),
            section_index: U32::new(message.section),
            section_size: U32::new(message.section_len),
        });

        trace_nvsp_send_pkt(self.dev, || {
            let channel = self.shared.channel(index);
            SentPacket {
                channel: channel.map_or(0, |channel| channel.subchannel_index()),
                kind: ChannelType::DATA.0,
                section: message.section,
                len: message.section_len,
            }
        });

        let state = &self.own.tx;
        let Some((number, slot)) = state.free_slot(next) else {
            return Err((self.failed(EAGAIN, message), skb));
        };
        if let (Some(ranges), false) = (&mut ranges, state.bounces.is_empty()) {
            if self.bounce(number, ranges).is_err() {
                return Err((self.failed(EAGAIN, message), skb));
            }
        }
        // Only the poll of a channel of its own can tell the queue what is out. The queue, and the
        // slot, have to know first, since the completion can come at once.
        let limited = if own_channel.is_some() {
            self.control.sent(message.bytes);
            message.bytes
        } else {
            0
        };
        slot.fill(skb, message, limited);
        state.in_flight.fetch_add(1, Relaxed);
        let id = Transaction::Data {
            queue: index,
            slot: number,
        }
        .id();
        let sent = match ranges {
            Some(ranges) => ring.send_ranges(ranges, &body, id),
            None => ring.send_inband(&body, id, Reply::Wanted),
        };
        if let Err(e) = sent {
            // If it is not there any more it was sent, and completed already.
            if let Some(completed) = state.take_back(number) {
                state.in_flight.fetch_sub(1, Relaxed);
                if completed.limited != 0 {
                    self.control.not_sent(completed.limited);
                }
                return Err((self.failed(e, message), completed.skb));
            }
        }
        if space < LOW_WATER {
            self.stop();
        }
        Ok(())
    }

    /// Has the host read copies, for a slot that is free.
    #[cold]
    fn bounce(&self, slot: u32, ranges: &mut GpaRanges) -> Result {
        let bounces = &self.own.tx.bounces;
        let place = bounces.get(slot as usize).ok_or(EINVAL)?;
        place.swap(Some(ranges.bounce(&self.shared.hv)?));
        Ok(())
    }

    /// A message could not be sent.
    #[cold]
    fn failed(&self, e: Error, message: &Message) -> Failure {
        if e == EAGAIN {
            return if self.stop() {
                Failure::Full
            } else {
                Failure::Other(ENOSPC)
            };
        }
        if net_ratelimit() {
            netdev_err!(
                self.dev,
                "Unable to send packet len {}, ret {}\n",
                message.bytes,
                e.to_errno()
            );
        }
        Failure::Other(e)
    }

    /// Sends a batch as it is.
    #[inline(never)]
    fn flush(&self, sending: &mut Sending) {
        let Some(skb) = sending.batch.skb.take() else {
            return;
        };
        let message = sending.batch.message;
        if let Err((_, skb)) = self.send(&mut sending.next, skb, &message, None) {
            self.buffer.put(message.section);
            self.dev
                .data()
                .statistics
                .tx_dropped
                .add(message.packets.into());
            drop(skb);
        }
    }
}

/// Puts the per-packet information and the headers together.
///
/// The frame that they are for is what the packet is afterwards.
fn build_headers<'a>(
    dev: &Device<Netvsc>,
    skb: &mut SkBuff,
    buffer: &'a mut [u8; HEADERS_MAX],
) -> Result<PacketBuilder<'a>> {
    let ctx = dev.data();
    let bad = |_| EINVAL;
    let mut builder = PacketBuilder::new(buffer).map_err(bad)?;

    let hash = skb.raw_hash();
    if hash != 0 && dev.num_tx_queues() > 1 {
        builder.ppi(PpiType::HASH_VALUE, hash).map_err(bad)?;
    }

    // A raw socket can send a frame with its tag; the host wants it beside the frame.
    skb.take_vlan_tag()
        .inspect_err(|_| ctx.statistics.events.vlan_error.add(1))?;
    if let Some(tci) = skb.vlan_tci() {
        builder
            .ppi(PpiType::IEEE8021Q, Vlan::from_tci(tci).0)
            .map_err(bad)?;
    }

    match skb.checksum() {
        Checksum::Done => {}
        Checksum::Segment { size } => {
            let is_ipv6 = skb.prepare_large_send()?;
            let info =
                LargeSend::new(size.into(), skb.transport_offset(), is_ipv6).ok_or(EINVAL)?;
            builder.ppi(PpiType::LARGE_SEND, info.0).map_err(bad)?;
        }
        Checksum::Partial(protocol) => {
            let offered = protocol
                .filter(|protocol| ctx.tx_checksums.load(Relaxed) & checksum_bit(*protocol) != 0)
                .and_then(|protocol| {
                    let ip = if protocol.is_ipv6() {
                        TxChecksum::IPV6
                    } else {
                        TxChecksum::IPV4
                    };
                    let transport = if protocol.is_tcp() {
                        TxChecksum::TCP
                    } else {
                        TxChecksum::UDP
                    };
                    TxChecksum::new(ip | transport, skb.transport_offset())
                });
            match offered {
                Some(info) => {
                    builder.ppi(PpiType::CHECKSUM, info.0).map_err(bad)?;
                }
                None => skb.compute_checksum()?,
            }
        }
    }
    Ok(builder)
}

/// The bit for a protocol in the mask of checksums that the host computes.
pub(crate) const fn checksum_bit(protocol: L4) -> u32 {
    match protocol {
        L4::Tcp4 => 1 << 0,
        L4::Udp4 => 1 << 1,
        L4::Tcp6 => 1 << 2,
        L4::Udp6 => 1 << 3,
    }
}

/// Transmits a packet by the synthetic path.
pub(crate) fn transmit(
    dev: &Device<Netvsc>,
    shared: &Shared,
    queue: &mut TxQueue<'_>,
    mut skb: SkBuff,
    guard: &rcu::Guard,
) -> Xmit {
    let ctx = dev.data();
    let result = with_sender(dev, shared, queue, guard, |sender, sending| {
        let mut headers = Headers::new();
        let result = prepare(dev, &mut skb, &ctx.statistics.events, &mut headers)
            .and_then(|()| sender.transmit(sending, skb, &mut headers));
        // A batch that nothing was added to would wait for a packet that may never come.
        if sending.batch.skb.is_some() && (result.is_err() || !sender.control.more()) {
            // One that has to wait for room in the ring is sent with the packet that the stack
            // will give us again.
            if !matches!(result, Ok(Xmit::Busy(_))) {
                sender.flush(sending);
            }
        }
        result
    });
    match result {
        Some(Ok(verdict)) => verdict,
        _ => {
            ctx.statistics.tx_dropped.add(1);
            Xmit::Done
        }
    }
}

/// Sends what is left of a batch.
pub(crate) fn flush(
    dev: &Device<Netvsc>,
    shared: &Shared,
    queue: &mut TxQueue<'_>,
    guard: &rcu::Guard,
) {
    with_sender(dev, shared, queue, guard, |sender, sending| {
        sender.flush(sending);
    });
}

/// Calls `f` with what sending by a queue needs, if all of that is there.
#[inline]
fn with_sender<R>(
    dev: &Device<Netvsc>,
    shared: &Shared,
    queue: &mut TxQueue<'_>,
    guard: &rcu::Guard,
    f: impl FnOnce(&Sender<'_>, &mut Sending) -> R,
) -> Option<R> {
    let own = shared.queues.get(usize::from(queue.index()))?;
    let buffer = shared.send.borrow(guard)?;
    let (sending, control) = own.tx.sending.get(queue)?;
    let sender = Sender {
        dev,
        shared,
        own,
        buffer,
        control,
        guard,
    };
    Some(f(&sender, sending))
}

/// Headers of a packet, ready but for the padding.
struct Headers {
    bytes: [u8; HEADERS_MAX],
    len: u32,
    frame_len: u32,
}

/// Whether the packet with its headers can be described to the host as it is.
#[inline(always)]
fn fits(skb: &SkBuff) -> bool {
    /// Bytes in one piece that can be described wherever they begin.
    const ALWAYS: u32 = ((PAGE_BUFFERS_MAX - HEADER_PAGES - 1) * HV_PAGE_SIZE) as u32;
    (skb.is_linear() && skb.len() <= ALWAYS) || skb.pages() + HEADER_PAGES <= PAGE_BUFFERS_MAX
}

/// Puts a packet of too many pieces into one.
#[cold]
fn linearize(skb: &mut SkBuff, events: &crate::stats::Events) -> Result {
    events.tx_scattered.add(1);
    skb.linearize()
        .inspect_err(|_| events.tx_no_memory.add(1))?;
    if !fits(skb) {
        events.tx_too_big.add(1);
        return Err(E2BIG);
    }
    Ok(())
}

/// Makes the packet fit, and builds its headers.
#[inline]
fn prepare(
    dev: &Device<Netvsc>,
    skb: &mut SkBuff,
    events: &crate::stats::Events,
    headers: &mut Headers,
) -> Result {
    if !fits(skb) {
        linearize(skb, events)?;
    }
    let builder = build_headers(dev, skb, &mut headers.bytes)?;
    headers.frame_len = skb.len();
    headers.len = builder.finish(headers.frame_len, 0).map_err(|_| EINVAL)? as u32;
    skb.tx_timestamp();
    Ok(())
}

impl Headers {
    fn new() -> Self {
        Self {
            bytes: [0; HEADERS_MAX],
            len: 0,
            frame_len: 0,
        }
    }

    /// Counts padding behind the frame into the message.
    fn add_padding(&mut self, padding: u32) {
        // The length follows the 32-bit type.
        let len = self.len + self.frame_len + padding;
        self.bytes[4..8].copy_from_slice(&len.to_le_bytes());
    }

    fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len as usize).unwrap_or(&[])
    }
}

/// Where the frame of a packet goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Frame {
    /// Into the section, behind the headers.
    Section,
    /// It is described as ranges.
    Ranges,
}

impl Sender<'_> {
    /// Finds a place in the batch's section, or in one of its own that becomes the batch's.
    ///
    /// A packet that has no place in a section has [`nvsp::INVALID_SECTION`].
    #[inline]
    fn find_place(&self, sending: &mut Sending, headers: &Headers) -> Frame {
        let rndis = &self.shared.rndis;
        let size = self.buffer.section_size;
        let len = headers.len + headers.frame_len + rndis.alignment.load(Relaxed);
        if sending.batch.skb.is_some() {
            let message = &sending.batch.message;
            if message.packets < rndis.max_packets.load(Relaxed) {
                if message.section_len + len < size {
                    return Frame::Section;
                }
                if message.section_len + headers.len < size {
                    return Frame::Ranges;
                }
            }
            // What does not go on with the batch ends it.
            self.flush(sending);
        }
        sending.batch.message = Message::EMPTY;
        if len < size {
            if let Some(section) = self.buffer.take() {
                sending.batch.message.section = section;
                return Frame::Section;
            }
            self.dev.data().statistics.events.tx_send_full.add(1);
        }
        Frame::Ranges
    }

    /// Transmits a packet whose headers are ready, or collects it.
    #[inline]
    fn transmit(
        &self,
        sending: &mut Sending,
        mut skb: SkBuff,
        headers: &mut Headers,
    ) -> Result<Xmit> {
        let events = &self.dev.data().statistics.events;
        let place = self.find_place(sending, headers);
        let Sending { batch, next } = sending;
        let section = batch.message.section;
        // Where it is: it is large to move.
        let mut ranges = GpaRanges::new();
        let more = place == Frame::Section && self.control.more();
        let put = match place {
            Frame::Section => {
                let padding = if more {
                    let len = headers.len + headers.frame_len;
                    let alignment = self.shared.rndis.alignment.load(Relaxed);
                    len.next_multiple_of(alignment) - len
                } else {
                    0
                };
                self.copy(&batch.message, headers, &skb, padding)
            }
            Frame::Ranges => self.describe(&batch.message, headers, &mut skb, &mut ranges),
        };
        let section_len = put.inspect_err(|_| self.give_up(batch))?;

        let message = Message {
            section,
            section_len,
            packets: batch.message.packets + 1,
            bytes: batch.message.bytes + headers.frame_len,
        };
        if more {
            batch.consume();
            batch.skb = Some(skb);
            batch.message = message;
            return Ok(Xmit::Done);
        }
        let ranges = (place == Frame::Ranges).then_some(&mut ranges);
        match self.send(next, skb, &message, ranges) {
            Ok(()) => {
                batch.consume();
                Ok(Xmit::Done)
            }
            Err((failure, skb)) => {
                self.give_up(batch);
                match failure {
                    Failure::Full => {
                        events.tx_busy.add(1);
                        Ok(Xmit::Busy(skb))
                    }
                    Failure::Other(e) => {
                        if e == ENOSPC {
                            events.tx_no_space.add(1);
                        }
                        Err(e)
                    }
                }
            }
        }
    }

    /// A packet does not come into a section. If it was the first one there, nobody uses the
    /// section any more; otherwise the packets before it are still there.
    #[cold]
    fn give_up(&self, batch: &Batch) {
        if batch.skb.is_none() && batch.message.section != nvsp::INVALID_SECTION {
            self.buffer.put(batch.message.section);
        }
    }

    /// Copies a packet into a section behind what is there. Returns where it ends.
    #[inline]
    fn copy(
        &self,
        before: &Message,
        headers: &mut Headers,
        skb: &SkBuff,
        padding: u32,
    ) -> Result<u32> {
        let len = headers.len + headers.frame_len + padding;
        let room = self.buffer.bytes(before.section, before.section_len, len)?;
        if padding != 0 {
            headers.add_padding(padding);
            const ZEROES: [u8; 128] = [0; 128];
            let zeroes = ZEROES.get(..padding as usize).ok_or(EINVAL)?;
            let end = (headers.len + headers.frame_len) as usize;
            room.part(end, zeroes.len())?.copy_from(zeroes)?;
        }
        room.copy_from(headers.bytes())?;
        skb.copy_to_shared(&room.part(headers.len as usize, headers.frame_len as usize)?)?;
        Ok(before.section_len + len)
    }

    /// Describes a frame as ranges. Its headers go into the section, if there is one, or before the
    /// frame. Returns where they end in the section.
    #[inline]
    fn describe(
        &self,
        before: &Message,
        headers: &Headers,
        skb: &mut SkBuff,
        ranges: &mut GpaRanges,
    ) -> Result<u32> {
        let mut section_len = 0;
        if before.section == nvsp::INVALID_SECTION {
            let events = &self.dev.data().statistics.events;
            let (pfn, offset, len) = skb
                .write_head(headers.bytes())
                .inspect_err(|_| events.tx_no_memory.add(1))?;
            ranges.push(pfn, offset, len)?;
        } else {
            section_len = before.section_len + headers.len;
            self.buffer
                .bytes(before.section, before.section_len, headers.len)?
                .copy_from(headers.bytes())?;
        }
        skb.for_each_piece(|pfn, offset, len| ranges.push(pfn, offset, len))?;
        Ok(section_len)
    }
}

/// The host has completed a message. Runs in the poll of the channel it was sent by.
pub(crate) fn complete(
    shared: &Shared,
    context: &PollContext<'_, Netvsc>,
    ring: &vmbus::Ring<'_>,
    queue: u16,
    slot: u32,
    guard: &rcu::Guard,
) -> Result<Sent> {
    let dev = context.device();
    let statistics = &dev.data().statistics;
    let state = &shared.queues.get(usize::from(queue)).ok_or(ENOENT)?.tx;
    let message = state.take(slot).ok_or(ENOENT)?;

    if message.section != nvsp::INVALID_SECTION {
        if let Some(buffer) = shared.send.borrow(guard) {
            buffer.put(message.section);
        }
    }
    if let Some(stats) = statistics.queues.get(usize::from(queue)) {
        stats.tx_packets.add(message.packets.into());
        stats.tx_bytes.add(message.bytes.into());
    }
    let sent = Sent {
        packets: message.packets,
        bytes: message.limited,
    };
    context.consume(message.skb);
    let left = state.in_flight.fetch_sub(1, Relaxed) - 1;

    if dev.is_queue_stopped(queue)
        && !shared.tx_disabled.load(Relaxed)
        && (left == 0 || ring.write_space_percent() > HIGH_WATER)
    {
        dev.wake_queue(queue);
        statistics.events.wake_queue.add(1);
        if let Some(stats) = statistics.queues.get(usize::from(queue)) {
            stats.wake.add(1);
        }
    }
    Ok(sent)
}
