// SPDX-License-Identifier: GPL-2.0

//! What comes from the host: packets, completions, answers, indications.
//!
//! The host puts packets into sections of the receive buffer and sends the places. Each such
//! message is completed once, when its packets have been copied; only then the host may use the
//! sections again.
//!
//! Nothing the host sends is trusted: headers are copied once, and only the copy is looked at.

use hyperv_wire::{
    nvsp,
    nvsp::HostMessage,
    rndis::{
        self,
        MessageType,
        PacketId,
        PacketInfo,
        Ppis,
        RxChecksum, //
    }, //
};
use kernel::{
    prelude::*,
    sync::{
        atomic::Relaxed,
        rcu,
        Arc, //
    }, //
};
use net::{
    net_ratelimit,
    netdev_err,
    netvsc::{
        trace_nvsp_recv,
        trace_rndis_recv, //
    },
    Destination,
    Device,
    Features,
    MessageLevel,
    Poll,
    PollContext,
    Polled,
    RxInfo,
    SkBuff, //
};
use vmbus::{
    Packet,
    PacketKind,
    SharedBytes, //
};

use crate::{
    buffers::RecvBuffer,
    connection::{
        Queue,
        Shared,
        Transaction, //
    },
    device::Netvsc,
    link,
    rndis::{
        traced,
        MESSAGE_MAX, //
    },
    tx,
    vf,
    xdp,
    xdp::Outcome, //
};

/// Most bytes of per-packet information of a received packet.
const PPI_MAX: usize = 256;

/// Completions that may be owed to the host.
const OWED_MAX: usize = 512;

/// As many are collected before they are sent.
const OWED_BATCH: usize = 64;

/// Packets to send back that are collected.
const SENT_BACK_MAX: usize = 64;

/// What the poll of a channel shares with others.
pub(crate) struct RxShared {
    /// The connection.
    pub(crate) connection: Arc<Shared>,
    /// Number of the channel and of its queue.
    pub(crate) index: u16,
}

impl RxShared {
    /// The queue.
    pub(crate) fn queue(&self) -> Option<&Queue> {
        self.connection
            .queues
            .get(usize::from(self.index))
            .map(|queue| &**queue)
    }

    fn ring(&self) -> Result<vmbus::Ring<'_>> {
        self.queue()
            .and_then(|queue| queue.channel())
            .ok_or(ENODEV)?
            .ring()
    }
}

/// Where a packet comes from.
struct Source<'a> {
    shared: &'a RxShared,
    context: &'a PollContext<'a, Netvsc>,
    buffer: &'a RecvBuffer,
    guard: &'a rcu::Guard,
}

/// A fragment of a packet, in the receive buffer.
#[derive(Clone, Copy)]
struct Fragment {
    offset: u32,
    len: u32,
}

/// The state of the poll of a channel.
pub(crate) struct RxPoll {
    /// Completions that are owed to the host: transaction id and status.
    owed: KVec<(u64, nvsp::Status)>,
    /// Fragments of a packet that the host has coalesced from several.
    fragments: KVVec<Fragment>,
    /// What is known of that packet.
    info: PacketInfo,
    /// Room for the per-packet information of a packet.
    ppis: [u8; PPI_MAX],
    /// Room for a control message.
    message: KVVec<u8>,
    /// Packets that an XDP program sends back.
    sent_back: KVec<SkBuff>,
    /// What the host has completed of the transmit queue since the poll began.
    sent: tx::Sent,
}

impl RxPoll {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            owed: KVec::with_capacity(OWED_MAX, GFP_KERNEL)?,
            fragments: KVVec::with_capacity(nvsp::MAX_TRANSFER_RANGES, GFP_KERNEL)?,
            info: PacketInfo::default(),
            ppis: [0; PPI_MAX],
            message: KVVec::from_elem(0, MESSAGE_MAX, GFP_KERNEL)?,
            sent_back: KVec::with_capacity(SENT_BACK_MAX, GFP_KERNEL)?,
            sent: tx::Sent::default(),
        })
    }

    /// Sends the completions that are owed. Fails if the ring is full.
    fn pay(&mut self, shared: &RxShared, dev: &Device<Netvsc>, ring: &vmbus::Ring<'_>) -> Result {
        let mut sent = 0;
        let result = self.owed.iter().try_for_each(|(id, status)| {
            let mut message = [0; 8];
            message[..4].copy_from_slice(
                &nvsp::MessageType::SEND_RNDIS_PACKET_COMPLETE
                    .0
                    .to_le_bytes(),
            );
            message[4..].copy_from_slice(&status.0.to_le_bytes());
            ring.send_completion(*id, &message)?;
            sent += 1;
            Ok(())
        });
        // What is left moves to the front.
        let left = self.owed.len() - sent;
        self.owed.copy_within(sent.., 0);
        self.owed.truncate(left);
        if let Some(queue) = shared.queue() {
            queue.owed.store(left as u32, Relaxed);
        }
        result.inspect_err(|_| dev.data().statistics.events.rx_comp_busy.add(1))
    }
}

impl Poll for RxPoll {
    type Driver = Netvsc;
    type Shared = RxShared;

    fn poll(
        &mut self,
        shared: &RxShared,
        context: &PollContext<'_, Netvsc>,
        budget: i32,
    ) -> Polled {
        let mut work = 0;
        let Ok(ring) = shared.ring() else {
            return Polled { work, again: false };
        };
        let guard = rcu::read_lock();
        let Some(mut reader) = ring.reader() else {
            return Polled { work, again: true };
        };
        while work < budget {
            if self.owed.len() >= OWED_BATCH
                && self.pay(shared, context.device(), &ring).is_err()
                && self.owed.len() >= OWED_MAX
            {
                // The host must read its ring before it gets more of ours.
                break;
            }
            let Some(packet) = reader.next() else {
                break;
            };
            work += self.process(shared, context, &ring, &packet, &guard);
        }
        drop(reader);
        let sent = core::mem::take(&mut self.sent);
        if sent.bytes != 0 {
            context.completed(sent.packets, sent.bytes);
        }
        if !self.sent_back.is_empty() {
            xdp::send_back(context.device(), shared.index, &mut self.sent_back, &guard);
        }
        let again = self.pay(shared, context.device(), &ring).is_err() && !ring.is_rescinded();
        Polled {
            // A message can have more packets than the budget.
            work: work.min(budget),
            again,
        }
    }

    fn unmask(shared: &RxShared) -> bool {
        shared.ring().is_ok_and(|ring| ring.end_read() != 0)
    }

    fn mask(shared: &RxShared) {
        if let Ok(ring) = shared.ring() {
            ring.begin_read();
        }
    }
}

impl RxPoll {
    /// Handles a packet of the ring, and returns how many network packets were in it.
    fn process(
        &mut self,
        shared: &RxShared,
        context: &PollContext<'_, Netvsc>,
        ring: &vmbus::Ring<'_>,
        packet: &Packet<'_>,
        guard: &rcu::Guard,
    ) -> i32 {
        let dev = context.device();
        trace_nvsp_recv(dev, shared.index, || {
            nvsp::message_type(packet.payload()).map_or(0, |kind| kind.0)
        });
        match packet.kind() {
            PacketKind::Completion => {
                completed(shared, context, ring, packet, &mut self.sent, guard);
                0
            }
            PacketKind::TransferPages => self.receive(shared, context, packet, guard),
            PacketKind::Inband => {
                told(shared, dev, packet);
                0
            }
            kind => {
                if net_ratelimit() {
                    netdev_err!(
                        dev,
                        "unhandled packet type {:?}, tid {:x}\n",
                        kind,
                        packet.transaction_id()
                    );
                }
                0
            }
        }
    }

    /// Handles a message with places in the receive buffer.
    fn receive(
        &mut self,
        shared: &RxShared,
        context: &PollContext<'_, Netvsc>,
        packet: &Packet<'_>,
        guard: &rcu::Guard,
    ) -> i32 {
        let dev = context.device();
        let log = || dev.data().logs(MessageLevel::RX_ERR) && net_ratelimit();
        match nvsp::message_type(packet.payload()) {
            Ok(nvsp::MessageType::SEND_RNDIS_PACKET) => {}
            Ok(other) => {
                if log() {
                    netdev_err!(dev, "Unknown nvsp packet type received {}\n", other.0);
                }
                return 0;
            }
            Err(_) => {
                if log() {
                    netdev_err!(
                        dev,
                        "invalid nvsp header, length too small: {}\n",
                        packet.payload().len()
                    );
                }
                return 0;
            }
        }
        let pages = match packet.transfer_pages() {
            Ok(pages) if pages.pageset_id() == nvsp::RECEIVE_BUFFER_ID => pages,
            Ok(pages) => {
                if log() {
                    netdev_err!(
                        dev,
                        "Invalid xfer page set id - expecting {:x} got {:x}\n",
                        nvsp::RECEIVE_BUFFER_ID,
                        pages.pageset_id()
                    );
                }
                return 0;
            }
            Err(_) => {
                if log() {
                    netdev_err!(dev, "Range count is not valid\n");
                }
                return 0;
            }
        };

        let count = pages.len();
        let mut status = nvsp::Status::SUCCESS;
        for (i, (offset, len)) in pages.ranges().enumerate() {
            let handled = shared
                .connection
                .recv
                .borrow(guard)
                .ok_or(ENODEV)
                .and_then(|buffer| {
                    let bytes = buffer.message(offset, len).inspect_err(|_| {
                        if log() {
                            netdev_err!(dev, "Packet offset:{} + len:{} too big\n", offset, len);
                        }
                    })?;
                    trace_rndis_recv(dev, shared.index, || {
                        let mut head = [0; 12];
                        let len = bytes.len().min(head.len());
                        // What is not there is 0.
                        let _ = part(&bytes, 0, &mut head[..len]);
                        traced(&head)
                    });
                    let last = i + 1 == count;
                    let source = Source {
                        shared,
                        context,
                        buffer,
                        guard,
                    };
                    self.message(&source, &bytes, offset, last)
                });
            if handled.is_err() {
                // An incomplete packet is given up.
                self.fragments.clear();
                status = nvsp::Status::FAILURE;
            }
        }
        // The poll stops before there are too many.
        let pushed = self
            .owed
            .push_within_capacity((packet.transaction_id(), status));
        if pushed.is_err() && net_ratelimit() {
            netdev_err!(
                dev,
                "Recv_comp full buf q:{}, tid:{:x}\n",
                shared.index,
                packet.transaction_id()
            );
        }
        if let Some(queue) = shared.queue() {
            queue.owed.store(self.owed.len() as u32, Relaxed);
        }
        i32::try_from(count).unwrap_or(i32::MAX)
    }

    /// Handles an RNDIS message in the receive buffer.
    fn message(
        &mut self,
        source: &Source<'_>,
        bytes: &SharedBytes<'_>,
        offset: u32,
        last: bool,
    ) -> Result {
        let dev = source.context.device();
        // Most messages are packets, whose header is read once.
        let mut head = [0; rndis::PACKET_HEADER_SIZE];
        if part(bytes, 0, &mut head).is_err() {
            part(bytes, 0, &mut head[..rndis::HEADER_SIZE]).inspect_err(|_| {
                if net_ratelimit() {
                    netdev_err!(dev, "Invalid rndis_msg (buflen: {})\n", bytes.len());
                }
            })?;
        }
        let (kind, len) = rndis::header(&head, bytes.len())
            .map_err(|error| invalid_packet(dev, error, bytes.len()))?;
        if kind == MessageType::PACKET {
            return self.packet(source, bytes, &head, offset, last);
        }

        // Whatever else there is, is small. An indication can be longer than it says.
        let copy = if kind == MessageType::INDICATE_STATUS {
            bytes.len()
        } else {
            len
        };
        let capacity = self.message.len();
        let message = self
            .message
            .get_mut(..copy)
            .ok_or(EMSGSIZE)
            .inspect_err(|_| {
                if net_ratelimit() {
                    netdev_err!(
                        dev,
                        "rndis response buffer overflow detected (size {} max {})\n",
                        copy,
                        capacity
                    );
                }
            })?;
        part(bytes, 0, message)?;
        match kind {
            MessageType::INITIALIZE_COMPLETE
            | MessageType::QUERY_COMPLETE
            | MessageType::SET_COMPLETE => {
                let answer = rndis::Message::parse(message).map_err(|_| EINVAL)?;
                let bytes = message.get(..answer.len()).ok_or(EINVAL)?;
                if answer.request_id().is_err() {
                    if net_ratelimit() {
                        netdev_err!(dev, "rndis msg_len too small: {}\n", len);
                    }
                    return Ok(());
                }
                let rndis = &source.shared.connection.rndis;
                if rndis.answer(&answer, bytes).is_err() && net_ratelimit() {
                    netdev_err!(
                        dev,
                        "no rndis request found for this response (id {:#x} res type {:#x})\n",
                        answer.request_id().unwrap_or(0),
                        kind.0
                    );
                }
                Ok(())
            }
            MessageType::INDICATE_STATUS => {
                match rndis::Message::indication(message) {
                    Ok(indication) => link::indicated(dev, &indication),
                    Err(_) => {
                        if net_ratelimit() {
                            netdev_err!(
                                dev,
                                "invalid rndis_indicate_status packet, len: {}\n",
                                len
                            );
                        }
                    }
                }
                Ok(())
            }
            _ => {
                if net_ratelimit() {
                    netdev_err!(
                        dev,
                        "unhandled rndis message (type {} len {})\n",
                        kind.0,
                        len
                    );
                }
                Err(EINVAL)
            }
        }
    }

    /// Handles a packet, or a fragment of one, with the header `head`.
    #[inline]
    fn packet(
        &mut self,
        source: &Source<'_>,
        bytes: &SharedBytes<'_>,
        head: &[u8; rndis::PACKET_HEADER_SIZE],
        offset: u32,
        last: bool,
    ) -> Result {
        let dev = source.context.device();
        let have = bytes.len();
        if have < head.len() {
            if net_ratelimit() {
                netdev_err!(dev, "invalid rndis pkt, data_buflen too small: {}\n", have);
            }
            return Err(EINVAL);
        }
        let layout =
            rndis::packet_layout(head, have).map_err(|error| invalid_packet(dev, error, have))?;
        let ppis = self.ppis.get_mut(..layout.ppis.len()).ok_or(EMSGSIZE)?;
        part(bytes, layout.ppis.start, ppis)?;
        let info = PacketInfo::collect(Ppis::new(ppis))
            .map_err(|error| invalid_packet(dev, error, have))?;

        let (start, len) = (layout.frame.start, layout.frame.len());
        let flags = info.packet_id.map_or(0, |id| id.flags);
        if flags & PacketId::SUBALLOCATION == 0 {
            self.fragments.clear();
            let frame = bytes.part(start, len)?;
            return self.deliver(source, &info, len as u32, core::iter::once(Ok(frame)));
        }
        if flags & PacketId::FIRST != 0 {
            self.fragments.clear();
        } else if self.fragments.is_empty() {
            // The beginning is missing.
            return Err(EINVAL);
        }
        let complete = flags & PacketId::LAST != 0;
        if !complete && last {
            // The end is missing.
            return Err(EINVAL);
        }
        if self.fragments.is_empty() {
            // What is said about the first fragment is true for all.
            self.info = info;
        }
        let fragment = Fragment {
            offset: offset + start as u32,
            len: len as u32,
        };
        // The capacity is the most fragments that a packet can have.
        if self.fragments.push_within_capacity(fragment).is_err() {
            return Err(EMSGSIZE);
        }
        if !complete {
            return Ok(());
        }
        let (info, mut fragments) = (self.info, core::mem::take(&mut self.fragments));
        let len = fragments.iter().map(|fragment| fragment.len).sum();
        let pieces = fragments
            .iter()
            .map(|fragment| source.buffer.message(fragment.offset, fragment.len));
        let result = self.deliver(source, &info, len, pieces);
        fragments.clear();
        self.fragments = fragments;
        result
    }

    /// Copies a complete packet of `len` bytes out of the receive buffer and gives it to the stack,
    /// unless a program decides otherwise.
    #[inline]
    fn deliver<'a>(
        &mut self,
        source: &Source<'_>,
        info: &PacketInfo,
        len: u32,
        mut pieces: impl Iterator<Item = Result<SharedBytes<'a>>>,
    ) -> Result {
        let (context, index) = (source.context, source.shared.index);
        let dev = context.device();
        if !dev.is_registered() {
            return Err(ENODEV);
        }
        let statistics = &dev.data().statistics;
        let stats = statistics.queues.get(usize::from(index)).ok_or(EINVAL)?;
        let no_memory = |e: &Error| {
            if *e == ENOMEM {
                statistics.events.rx_no_memory.add(1);
                stats.rx_no_memory.add(1);
            }
        };
        let outcome = match dev.data().program.borrow(source.guard) {
            None => {
                let mut skb = context
                    .alloc_skb(len)
                    .ok_or(ENOMEM)
                    .inspect_err(no_memory)?;
                for piece in pieces {
                    skb.append(&piece?)?;
                }
                Outcome::Pass(skb)
            }
            Some(program) => xdp::run(context, program, stats, len, source.guard, |frame| {
                pieces.try_for_each(|piece| frame.append(&piece?))
            })
            .inspect_err(no_memory)?,
        };
        let (mut skb, send_back) = match outcome {
            Outcome::Pass(skb) => (skb, false),
            Outcome::Transmit(skb) => (skb, true),
            Outcome::Gone => return Ok(()),
        };

        let checksum = info.checksum.map(RxChecksum);
        let has = |flags| checksum.is_some_and(|checksum| checksum.has(flags));
        let features = dev.features();
        let info = RxInfo {
            checksum_ok: features.contains(Features::RXCSUM)
                && (has(RxChecksum::TCP_SUCCEEDED) || has(RxChecksum::UDP_SUCCEEDED)),
            compute_ip_checksum: has(RxChecksum::IP_VALUE_INVALID | RxChecksum::IP_SUCCEEDED),
            hash: info.hash.filter(|_| features.contains(Features::RXHASH)),
            vlan_tci: info.vlan.map(|vlan| vlan.tci()),
            queue: index,
        };
        let destination = skb.received(dev, &info)?;
        stats.rx_packets.add(1);
        stats.rx_bytes.add(len.into());
        if destination != Destination::Unicast {
            stats.rx_multicast.add(1);
        }
        if !send_back {
            context.receive(skb);
            return Ok(());
        }
        stats.xdp_tx.add(1);
        if self.sent_back.len() == SENT_BACK_MAX {
            xdp::send_back(dev, index, &mut self.sent_back, source.guard);
        }
        // There is room now.
        let _ = self.sent_back.push_within_capacity(skb);
        Ok(())
    }
}

/// Says what is wrong with a packet of `have` bytes.
#[cold]
fn invalid_packet(dev: &Device<Netvsc>, error: rndis::Error, have: usize) -> Error {
    if !net_ratelimit() {
        return EINVAL;
    }
    let body = have.saturating_sub(rndis::HEADER_SIZE);
    match error {
        rndis::Error::MessageLength { stated, .. } => netdev_err!(
            dev,
            "Invalid rndis_msg (buflen: {}, msg_len: {})\n",
            have,
            stated
        ),
        rndis::Error::OutOfBounds {
            what: rndis::FRAME,
            offset,
            ..
        } if offset as usize >= body => {
            netdev_err!(dev, "invalid rndis packet offset: {}\n", offset);
        }
        rndis::Error::OutOfBounds {
            what: rndis::FRAME,
            offset,
            length,
        } => netdev_err!(
            dev,
            "rndis message buffer overflow detected (got {}, min {})...dropping this message!\n",
            body - offset as usize,
            length
        ),
        rndis::Error::OutOfBounds {
            what: rndis::PPIS,
            offset,
            ..
        } if (offset as usize) < rndis::PACKET_HEADER_SIZE - rndis::HEADER_SIZE
            || offset as usize > body =>
        {
            netdev_err!(dev, "Invalid per_pkt_info_offset: {}\n", offset);
        }
        rndis::Error::OutOfBounds {
            what: rndis::PPIS,
            length,
            ..
        } => {
            netdev_err!(dev, "Invalid per_pkt_info_len: {}\n", length);
        }
        rndis::Error::PpiSize(size) => netdev_err!(dev, "Invalid ppi size: {}\n", size),
        rndis::Error::PpiOffset(offset) => {
            netdev_err!(dev, "Invalid ppi_offset: {}\n", offset);
        }
        other => netdev_err!(dev, "{}\n", net::Shown(other)),
    }
    EINVAL
}

/// Copies a part of a message that may change at any time.
#[inline]
fn part(bytes: &SharedBytes<'_>, start: usize, to: &mut [u8]) -> Result {
    bytes.part(start, to.len())?.copy_to(to)
}

/// Says what is wrong with the completion of a packet.
#[cold]
fn bad_completion(dev: &Device<Netvsc>, payload: &[u8]) {
    if !net_ratelimit() {
        return;
    }
    match nvsp::decode::<nvsp::SendRndisPacketComplete>(payload) {
        Ok(answer) => netdev_err!(
            dev,
            "nvsp_rndis_pkt_complete error status: {:x}\n",
            answer.status.get()
        ),
        Err(_) if payload.is_empty() => netdev_err!(dev, "Unexpected VMBUS completion!!\n"),
        Err(_) => netdev_err!(
            dev,
            "nvsp_rndis_pkt_complete length too small: {}\n",
            payload.len()
        ),
    }
}

/// The host has completed a packet of ours.
fn completed(
    shared: &RxShared,
    context: &PollContext<'_, Netvsc>,
    ring: &vmbus::Ring<'_>,
    packet: &Packet<'_>,
    sent: &mut tx::Sent,
    guard: &rcu::Guard,
) {
    let dev = context.device();
    let connection = &*shared.connection;
    let id = packet.transaction_id();
    let payload = packet.payload();
    let check_status = || {
        if !nvsp::decode(payload).is_ok_and(|answer: nvsp::SendRndisPacketComplete| {
            answer.status.get() == nvsp::Status::SUCCESS.0
        }) {
            bad_completion(dev, payload);
        }
    };
    match Transaction::from_id(id) {
        Some(Transaction::Data { queue, slot }) => {
            check_status();
            match tx::complete(connection, context, ring, queue, slot, guard) {
                // The poll of a queue's own channel alone may say what it has sent.
                Ok(done) if queue == shared.index => sent.add(done),
                Ok(_) => {}
                Err(_) if net_ratelimit() => {
                    netdev_err!(dev, "Invalid transaction ID {:x}\n", id);
                }
                Err(_) => {}
            }
        }
        Some(Transaction::Rndis(_)) => {
            check_status();
            connection.rndis.page_read();
        }
        Some(Transaction::Nvsp(sequence)) => connection.control.complete(sequence, payload),
        _ => {
            if net_ratelimit() {
                netdev_err!(dev, "Invalid transaction ID {:x}\n", id);
            }
        }
    }
}

/// The host has said something of its own accord.
fn told(shared: &RxShared, dev: &Device<Netvsc>, packet: &Packet<'_>) {
    match HostMessage::parse(packet.payload(), shared.connection.version()) {
        Ok(HostMessage::SendIndirectionTable(table)) => {
            for (to, channel) in dev.data().tx_table.iter().zip(table) {
                to.store(channel, Relaxed);
            }
            shared.connection.has_send_table.store(true, Relaxed);
        }
        Ok(HostMessage::VfAssociation(_)) if shared.connection.is_isolated => {
            if net_ratelimit() {
                netdev_err!(
                    dev,
                    "Ignore VF_ASSOCIATION msg from the host supporting isolation\n"
                );
            }
        }
        Ok(HostMessage::VfAssociation(association)) => {
            vf::associated(
                dev,
                association.allocated.get() != 0,
                association.serial.get(),
            );
        }
        // Newer hosts may say more.
        Ok(_) => {}
        Err(error) => {
            if net_ratelimit() {
                invalid_message(dev, packet.payload(), error);
            }
        }
    }
}

/// Says what is wrong with a message that the host has sent of its own accord.
#[cold]
fn invalid_message(dev: &Device<Netvsc>, message: &[u8], error: nvsp::Error) {
    match error {
        nvsp::Error::SendTableCount(count) => {
            netdev_err!(dev, "Received wrong send-table size:{}\n", count);
        }
        nvsp::Error::SendTableOffset(offset) => {
            netdev_err!(dev, "Received send-table offset too big:{}\n", offset);
        }
        _ => {
            let what = match nvsp::message_type(message) {
                Err(_) => "inband nvsp_message",
                Ok(nvsp::MessageType::SEND_VF_ASSOCIATION) => "nvsp_v4_msg",
                Ok(nvsp::MessageType::SEND_INDIRECTION_TABLE) => "nvsp_v5_msg",
                // An answer that was not asked for: of no interest, whatever its length is.
                Ok(_) => return,
            };
            netdev_err!(dev, "{} length too small: {}\n", what, message.len());
        }
    }
}
