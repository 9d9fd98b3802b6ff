// SPDX-License-Identifier: GPL-2.0

//! Transmitting by the synthetic path.
//!
//! A packet is an RNDIS message: headers and per-packet information, then the frame. Small ones are
//! copied into a section of the send buffer; while the stack says that more will come, several are
//! put into the same section and sent at once. Others are described to the host as ranges of guest
//! memory. A packet that does not fit behind those in a section can still have its headers there,
//! and the frame as ranges.
//!
//! What the host has not completed lies in the queue's table, whose slot is the transaction id.

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
    new_spinlock,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        rcu,
        SpinLock, //
    }, //
};
use net::{
    net_ratelimit,
    netdev_err,
    netvsc::{
        trace_nvsp_send_pkt,
        SentPacket, //
    },
    Checksum,
    Device,
    PollContext,
    SkBuff,
    TxLocked,
    TxQueue,
    Xmit,
    L4, //
};
use vmbus::{
    GpaRanges,
    Reply,
    PAGE_BUFFERS_MAX, //
};
use zerocopy::little_endian::U32;

use crate::{
    buffers::SendBuffer,
    connection::{
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

/// A message in flight.
struct InFlight {
    /// The packet, or the last one of several that were copied into one section.
    skb: SkBuff,
    /// The section, or [`nvsp::INVALID_SECTION`].
    section: u32,
    /// Number of packets.
    packets: u32,
    /// Bytes of their frames.
    bytes: u32,
    /// Bytes that the queue was told of.
    limited: u32,
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

/// What is in flight.
struct Table {
    entries: KVVec<Option<InFlight>>,
    free: KVVec<u32>,
}

impl Table {
    fn new() -> Result<Self> {
        let mut entries = KVVec::with_capacity(SLOTS as usize, GFP_KERNEL)?;
        let mut free = KVVec::with_capacity(SLOTS as usize, GFP_KERNEL)?;
        for slot in (0..SLOTS).rev() {
            entries.push(None, GFP_KERNEL)?;
            free.push(slot, GFP_KERNEL)?;
        }
        Ok(Self { entries, free })
    }

    fn insert(&mut self, entry: InFlight) -> Result<u32, InFlight> {
        let Some(slot) = self.free.pop() else {
            return Err(entry);
        };
        match self.entries.get_mut(slot as usize) {
            Some(place) => {
                *place = Some(entry);
                Ok(slot)
            }
            None => Err(entry),
        }
    }

    fn remove(&mut self, slot: u32) -> Option<InFlight> {
        let entry = self.entries.get_mut(slot as usize)?.take()?;
        // The capacity is that of all slots, each of which is here or in use.
        let _ = self.free.push_within_capacity(slot);
        Some(entry)
    }
}

/// Packets in a section that has not been sent yet.
struct Batch {
    message: InFlight,
    /// Bytes in the section.
    len: u32,
    /// Number of packets that were put there one by one.
    count: u32,
}

/// The transmitting side of a queue.
///
/// Lock order: the queue's transmit lock (which protects `batch`), then `table`.
#[pin_data]
pub(crate) struct TxState {
    /// What is being collected.
    batch: TxLocked<Option<Batch>>,
    #[pin]
    table: SpinLock<Table>,
    in_flight: Atomic<u32>,
}

impl TxState {
    pub(crate) fn new(dev: &Device<Netvsc>, index: u16) -> impl PinInit<Self, Error> + '_ {
        try_pin_init!(Self {
            batch: TxLocked::new(dev, index, None)?,
            table <- new_spinlock!(Table::new()?, "hv_netvsc::tx"),
            in_flight: Atomic::new(0),
        }? Error)
    }

    /// Number of messages in flight.
    pub(crate) fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }

    /// Frees what the host has not completed; the channel is closed.
    pub(crate) fn abandon(&self) {
        for slot in 0..SLOTS {
            // The packet is freed without the lock.
            let entry = self.table.lock().remove(slot);
            if entry.is_some() {
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
    state: &'a TxState,
    index: u16,
    guard: &'a rcu::Guard,
}

impl Sender<'_> {
    /// The queue's counters.
    fn stats(&self) -> Option<&QueueStats> {
        self.dev
            .data()
            .statistics
            .queues
            .get(usize::from(self.index))
    }

    /// Stops the queue, as there is not much room in the ring.
    fn stop(&self, queue: &mut TxQueue<'_>) {
        queue.stop();
        self.dev.data().statistics.events.stop_queue.add(1);
        if let Some(stats) = self.stats() {
            stats.stop.add(1);
        }
    }

    /// Sends a message whose data is in a section, in ranges, or both.
    ///
    /// The caller gets the message back if it was not sent.
    fn send(
        &self,
        queue: &mut TxQueue<'_>,
        mut message: InFlight,
        section_len: u32,
        ranges: Option<&mut GpaRanges>,
    ) -> Result<(), (Failure, InFlight)> {
        let events = &self.dev.data().statistics.events;
        let channel = self.shared.channel(self.index);
        let ring = match channel.and_then(|channel| channel.ring_under(self.guard)) {
            Ok(ring) => ring,
            Err(e) => return Err((Failure::Other(e), message)),
        };
        let space = ring.write_space_percent();
        let body = nvsp::encode(&nvsp::SendRndisPacket {
            channel_type: U32::new(ChannelType::DATA.0),
            section_index: U32::new(message.section),
            section_size: U32::new(if message.section == nvsp::INVALID_SECTION {
                0
            } else {
                section_len
            }),
        });

        trace_nvsp_send_pkt(self.dev, || {
            let channel = self.shared.channel(self.index);
            SentPacket {
                channel: channel.map_or(0, |channel| channel.subchannel_index()),
                kind: ChannelType::DATA.0,
                section: message.section,
                len: section_len,
            }
        });

        // Only the poll of a channel of its own can tell the queue what is out. The queue has to
        // know first, since the completion can come at once.
        let own = self.shared.queues.get(usize::from(self.index));
        let bytes = message.bytes;
        let limited = own.is_some_and(|own| own.channel().is_some());
        message.limited = if limited { bytes } else { 0 };
        if limited {
            queue.sent(bytes);
        }
        // It has to be in the table first, too.
        let inserted = self.state.table.lock().insert(message);
        let sent = match inserted {
            Ok(slot) => {
                self.state.in_flight.fetch_add(1, Relaxed);
                let id = Transaction::Data {
                    queue: self.index,
                    slot,
                }
                .id();
                let sent = match ranges {
                    Some(ranges) => ring.send_ranges(ranges, &body, id),
                    None => ring.send_inband(&body, id, Reply::Wanted),
                };
                match sent {
                    Ok(()) => Ok(()),
                    // If it is not in the table any more it was sent, and completed already.
                    Err(e) => match self.state.table.lock().remove(slot) {
                        Some(message) => {
                            self.state.in_flight.fetch_sub(1, Relaxed);
                            Err((e, message))
                        }
                        None => Ok(()),
                    },
                }
            }
            Err(message) => Err((EAGAIN, message)),
        };
        if limited && sent.is_err() {
            queue.not_sent(bytes);
        }

        match &sent {
            Ok(()) if space < LOW_WATER => self.stop(queue),
            Ok(()) => {}
            Err((e, _)) if *e == EAGAIN => self.stop(queue),
            Err((e, message)) => {
                if net_ratelimit() {
                    netdev_err!(
                        self.dev,
                        "Unable to send packet len {}, ret {}\n",
                        message.bytes,
                        e.to_errno()
                    );
                }
            }
        }
        // If nothing is in flight no completion will wake the queue.
        let mut full = true;
        if queue.is_stopped()
            && self.state.in_flight() == 0
            && !self.shared.tx_disabled.load(Relaxed)
        {
            queue.wake();
            events.wake_queue.add(1);
            if let Some(stats) = self.stats() {
                stats.wake.add(1);
            }
            full = false;
        }
        sent.map_err(|(e, message)| {
            let failure = if e == EAGAIN && full {
                Failure::Full
            } else if e == EAGAIN {
                Failure::Other(ENOSPC)
            } else {
                Failure::Other(e)
            };
            (failure, message)
        })
    }

    /// Sends a batch as it is.
    fn flush(&self, queue: &mut TxQueue<'_>, buffer: &SendBuffer, batch: Option<Batch>) {
        let Some(batch) = batch else {
            return;
        };
        if let Err((_, message)) = self.send(queue, batch.message, batch.len, None) {
            buffer.put(message.section);
            self.drop_message(message);
        }
    }

    /// Counts and frees what cannot be sent.
    fn drop_message(&self, message: InFlight) {
        let dropped = &self.dev.data().statistics.tx_dropped;
        dropped.add(message.packets.into());
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
    let events = &ctx.statistics.events;
    let index = queue.index();
    let (Some(own), Some(buffer)) = (
        shared.queues.get(usize::from(index)),
        shared.send.borrow(guard),
    ) else {
        ctx.statistics.tx_dropped.add(1);
        return Xmit::Done;
    };
    let sender = Sender {
        dev,
        shared,
        state: &own.tx,
        index,
        guard,
    };

    // The batch is taken out, and what is left of it is put back.
    let mut batch = own.tx.batch.get(queue).and_then(|batch| batch.take());
    let mut headers = Headers::new();
    let result = prepare(dev, &mut skb, events, &mut headers)
        .and_then(|()| transmit_prepared(&sender, queue, buffer, &mut batch, skb, &mut headers));
    // A batch that nothing was added to would wait for a packet that may never come. One that has
    // to wait for room in the ring is sent with the packet that the stack will give us again.
    if !matches!(result, Ok(Xmit::Busy(_))) && (!queue.more() || result.is_err()) {
        sender.flush(queue, buffer, batch.take());
    }
    if let Some(place) = own.tx.batch.get(queue) {
        *place = batch;
    }
    result.unwrap_or_else(|_| {
        ctx.statistics.tx_dropped.add(1);
        Xmit::Done
    })
}

/// Sends what is left of a batch.
pub(crate) fn flush(
    dev: &Device<Netvsc>,
    shared: &Shared,
    queue: &mut TxQueue<'_>,
    guard: &rcu::Guard,
) {
    let index = queue.index();
    if let (Some(own), Some(buffer)) = (
        shared.queues.get(usize::from(index)),
        shared.send.borrow(guard),
    ) {
        let batch = own.tx.batch.get(queue).and_then(|batch| batch.take());
        let sender = Sender {
            dev,
            shared,
            state: &own.tx,
            index,
            guard,
        };
        sender.flush(queue, buffer, batch);
    }
}

/// Headers of a packet, ready but for the padding.
struct Headers {
    bytes: [u8; HEADERS_MAX],
    len: u32,
    frame_len: u32,
}

/// Makes the packet fit, and builds its headers.
fn prepare(
    dev: &Device<Netvsc>,
    skb: &mut SkBuff,
    events: &crate::stats::Events,
    headers: &mut Headers,
) -> Result {
    if skb.pages() + HEADER_PAGES > PAGE_BUFFERS_MAX {
        events.tx_scattered.add(1);
        skb.linearize()
            .inspect_err(|_| events.tx_no_memory.add(1))?;
        if skb.pages() + HEADER_PAGES > PAGE_BUFFERS_MAX {
            events.tx_too_big.add(1);
            return Err(E2BIG);
        }
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
        &self.bytes[..self.len as usize]
    }
}

/// Where the data of a packet goes.
enum Place {
    /// Behind what is in the batch's section.
    Append,
    /// The headers there, the frame as ranges.
    AppendHeaders,
    /// Into a section of its own.
    Section(u32),
    /// As ranges.
    Ranges,
}

fn transmit_prepared(
    sender: &Sender<'_>,
    queue: &mut TxQueue<'_>,
    buffer: &SendBuffer,
    batch: &mut Option<Batch>,
    mut skb: SkBuff,
    headers: &mut Headers,
) -> Result<Xmit> {
    let events = &sender.dev.data().statistics.events;
    let rndis = &sender.shared.rndis;
    let alignment = rndis.alignment.load(Relaxed);
    let len = headers.len + headers.frame_len;

    let place = match batch {
        Some(batch) if batch.count < rndis.max_packets.load(Relaxed) => {
            if batch.len + len + alignment < buffer.section_size {
                Some(Place::Append)
            } else if batch.len + headers.len < buffer.section_size {
                Some(Place::AppendHeaders)
            } else {
                None
            }
        }
        _ => None,
    };
    let place = match place {
        Some(place) => place,
        None if len + alignment < buffer.section_size => match buffer.take() {
            Some(section) => Place::Section(section),
            None => {
                events.tx_send_full.add(1);
                Place::Ranges
            }
        },
        None => Place::Ranges,
    };

    // What does not go on with the batch ends it.
    if matches!(place, Place::Section(_) | Place::Ranges) {
        sender.flush(queue, buffer, batch.take());
    }
    let old = batch.take();
    let (section, offset) = match (&place, &old) {
        (Place::Append | Place::AppendHeaders, Some(old)) => (old.message.section, old.len),
        (Place::Section(section), _) => (*section, 0),
        _ => (nvsp::INVALID_SECTION, 0),
    };

    // Put the data where it goes.
    let more = queue.more() && !matches!(place, Place::AppendHeaders | Place::Ranges);
    let padding = if more {
        len.next_multiple_of(alignment) - len
    } else {
        0
    };
    // Where it is: it is large to move.
    let mut ranges = GpaRanges::new();
    let copied = match place {
        Place::Append | Place::Section(_) => {
            headers.add_padding(padding);
            copy(buffer, section, offset, headers, Some(&skb), padding)
        }
        Place::AppendHeaders => copy(buffer, section, offset, headers, None, 0).and_then(|_| {
            skb.for_each_piece(|pfn, offset, len| ranges.push(pfn, offset, len))?;
            Ok(offset + headers.len)
        }),
        Place::Ranges => {
            skb.write_head(headers.bytes())
                .inspect_err(|_| events.tx_no_memory.add(1))
                .and_then(|(pfn, offset, len)| ranges.push(pfn, offset, len))
                .and_then(|()| {
                    skb.for_each_piece(|pfn, offset, len| ranges.push(pfn, offset, len))
                })?;
            Ok(0)
        }
    };
    let filled = match copied {
        Ok(filled) => filled,
        Err(e) => {
            if old.is_none() && section != nvsp::INVALID_SECTION {
                buffer.put(section);
            }
            *batch = old;
            return Err(e);
        }
    };

    let (packets, bytes, count) = old.as_ref().map_or((0, 0, 0), |old| {
        (old.message.packets, old.message.bytes, old.count)
    });
    let message = InFlight {
        section,
        packets: packets + 1,
        bytes: bytes + headers.frame_len,
        limited: 0,
        skb,
    };
    if more {
        if let Some(old) = old {
            old.message.skb.consume();
        }
        *batch = Some(Batch {
            message,
            len: filled,
            count: count + 1,
        });
        return Ok(Xmit::Done);
    }
    let ranges = (!ranges.is_empty()).then_some(&mut ranges);
    match sender.send(queue, message, filled, ranges) {
        Ok(()) => {
            if let Some(old) = old {
                old.message.skb.consume();
            }
            Ok(Xmit::Done)
        }
        Err((failure, message)) => {
            if old.is_none() && section != nvsp::INVALID_SECTION {
                buffer.put(section);
            }
            // The packets before this one are still in the section.
            *batch = old;
            match failure {
                Failure::Full => {
                    events.tx_busy.add(1);
                    Ok(Xmit::Busy(message.skb))
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

/// Copies headers, and the frame if it is given, into a section from `offset` on. Returns where
/// they end.
fn copy(
    buffer: &SendBuffer,
    section: u32,
    offset: u32,
    headers: &Headers,
    frame: Option<&SkBuff>,
    padding: u32,
) -> Result<u32> {
    buffer
        .bytes(section, offset, headers.len)?
        .copy_from(headers.bytes())?;
    let mut end = offset + headers.len;
    if let Some(frame) = frame {
        frame.copy_to_shared(&buffer.bytes(section, end, headers.frame_len)?)?;
        end += headers.frame_len;
        const ZEROES: [u8; 128] = [0; 128];
        let zeroes = ZEROES.get(..padding as usize).ok_or(EINVAL)?;
        buffer.bytes(section, end, padding)?.copy_from(zeroes)?;
        end += padding;
    }
    Ok(end)
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
    let message = state.table.lock().remove(slot).ok_or(ENOENT)?;

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
