// SPDX-License-Identifier: GPL-2.0

//! The way to the guest: receive buffer, channels, batches.
//!
//! The receive buffer is divided into sections of equal size, each for one RNDIS message. A
//! VMBus packet tells the guest of the sections of a batch, which are its own until it completes
//! the packet. A frame that finds no free section, or a full ring, waits for a short time before
//! it is dropped, which slows the uplink down instead of losing frames.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use hyperv_wire::ndis::PacketFilter;
use hyperv_wire::nvsp::{self, ChannelType, Version};
use hyperv_wire::rndis::{
    PacketBuilder, PacketId, PpiType, RxChecksum, Vlan, PACKET_HEADER_SIZE, PPI_SIZE,
};
use vmbus_host::{Counter, Counters, SendError, TransferRange};
use zerocopy::little_endian::{U16, U32};

use crate::config::Raw;
use crate::frame::{self, Mac, Network, Transport as TransportProtocol};
use crate::port::RxFrame;
use crate::rss::Distribution;
use crate::transport::{SharedMemory, Transport};

/// Most ranges of one packet, unless a coalesced packet has more.
const MAX_BATCH: usize = 64;

/// Most RNDIS control messages that wait for room.
const MAX_WAITING_CONTROL: usize = 256;

/// Room for the headers in front of a frame, with all per-packet information.
pub(crate) const FRAME_OVERHEAD: usize = PACKET_HEADER_SIZE + 4 * PPI_SIZE;

/// The default size of a section, which fits frames of up to 1514 bytes.
const MIN_SECTION: usize = 1728;

/// Size of the sections for frames of up to `max_frame` bytes.
pub(crate) fn section_size(max_frame: usize) -> usize {
    let size = max_frame + frame::VLAN_TAG + FRAME_OVERHEAD;
    MIN_SECTION.max(size.next_multiple_of(64))
}

/// The receive buffer.
struct Buffer {
    memory: Arc<dyn SharedMemory>,
    section_size: usize,
    count: u32,
    free: Vec<u32>,
}

impl Buffer {
    /// Sections that the guest has, or is about to get.
    fn held(&self) -> u64 {
        u64::from(self.count).saturating_sub(self.free.len() as u64)
    }
}

/// Ranges that go into one VMBus packet.
#[derive(Default)]
struct Batch {
    ranges: Vec<TransferRange>,
    sections: Vec<u32>,
}

struct RxChannel {
    transport: Arc<dyn Transport>,
    batch: Batch,
    /// Sections that the guest has, by transaction.
    outstanding: HashMap<u64, Vec<u32>>,
}

/// Offloads that the guest has turned on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RxOffloads {
    pub(crate) tcp_v4: bool,
    pub(crate) tcp_v6: bool,
    pub(crate) udp_v4: bool,
    pub(crate) udp_v6: bool,
    pub(crate) rsc_v4: bool,
    pub(crate) rsc_v6: bool,
}

impl Default for RxOffloads {
    fn default() -> Self {
        Self {
            tcp_v4: true,
            tcp_v6: true,
            udp_v4: true,
            udp_v6: true,
            rsc_v4: false,
            rsc_v6: false,
        }
    }
}

/// There is no room now.
pub(crate) struct NoRoom;

/// State of the way to the guest.
pub(crate) struct Receive {
    version: Version,
    buffer: Option<Buffer>,
    channels: Vec<Option<RxChannel>>,
    control: VecDeque<Vec<u8>>,
    next_transaction: u64,
    /// RNDIS is initialised and not halted.
    running: bool,
    filter: PacketFilter,
    macs: [Mac; 2],
    pub(crate) offloads: RxOffloads,
    pub(crate) rss: Option<Distribution>,
    next_packet_id: u16,
    /// Threads that wait for room.
    pub(crate) waiting: usize,
    scratch: Vec<u8>,
    counters: RxCounters,
}

struct RxCounters {
    refused: Counter,
    too_big: Counter,
    coalesced: Counter,
    unknown_completions: Counter,
    /// Sections that the guest has.
    held: Counter,
}

impl Receive {
    pub(crate) fn new(nic: &str, mac: Mac, num_channels: usize, counters: &Counters) -> Self {
        let counter = |what| counters.counter(&format!("{nic}.synthetic.{what}"));
        Self {
            version: Version::V1,
            buffer: None,
            channels: (0..num_channels).map(|_| None).collect(),
            control: VecDeque::new(),
            next_transaction: 1,
            running: false,
            filter: PacketFilter::default(),
            macs: [mac; 2],
            offloads: RxOffloads::default(),
            rss: None,
            next_packet_id: 0,
            waiting: 0,
            scratch: Vec::new(),
            counters: RxCounters {
                refused: counter("rx_refused_by_guest"),
                too_big: counter("rx_too_big"),
                coalesced: counter("rx_coalesced"),
                unknown_completions: counter("unknown_completions"),
                held: counter("rx_sections_held"),
            },
        }
    }

    /// Forgets the guest's driver. Its address stays, as it does on a real port.
    pub(crate) fn reset(&mut self) {
        self.version = Version::V1;
        self.buffer = None;
        for channel in &mut self.channels {
            *channel = None;
        }
        self.control.clear();
        self.count_held();
        self.stop();
        self.offloads = RxOffloads::default();
        self.rss = None;
    }

    pub(crate) fn set_version(&mut self, version: Version) {
        self.version = version;
    }

    pub(crate) fn set_mac(&mut self, mac: Mac) {
        self.macs[1] = mac;
    }

    /// Takes the receive buffer and returns the size and number of its sections; `None` if it is
    /// too small for one.
    pub(crate) fn set_buffer(
        &mut self,
        memory: Arc<dyn SharedMemory>,
        section_size: usize,
    ) -> Option<(u32, u32)> {
        let size = u32::try_from(section_size).ok()?;
        let count = u32::try_from(memory.len() / u64::from(size)).ok()?;
        if count == 0 {
            return None;
        }
        self.buffer = Some(Buffer {
            memory,
            section_size,
            count,
            // Taken from the end: the lowest first.
            free: (0..count).rev().collect(),
        });
        Some((size, count))
    }

    /// Gives the receive buffer back.
    pub(crate) fn revoke_buffer(&mut self) {
        self.buffer = None;
        self.count_held();
        for channel in self.channels.iter_mut().flatten() {
            channel.batch = Batch::default();
            channel.outstanding.clear();
        }
    }

    pub(crate) fn has_buffer(&self) -> bool {
        self.buffer.is_some()
    }

    pub(crate) fn open(&mut self, transport: Arc<dyn Transport>) -> bool {
        let index = usize::from(transport.subchannel_index());
        let Some(slot) = self.channels.get_mut(index) else {
            return false;
        };
        *slot = Some(RxChannel {
            transport,
            batch: Batch::default(),
            outstanding: HashMap::new(),
        });
        true
    }

    pub(crate) fn close(&mut self, index: usize) {
        let Some(channel) = self.channels.get_mut(index).and_then(Option::take) else {
            return;
        };
        // The guest does not look at them any more.
        if let Some(buffer) = &mut self.buffer {
            buffer.free.extend(channel.batch.sections);
            buffer
                .free
                .extend(channel.outstanding.into_values().flatten());
        }
    }

    /// Number of open channels.
    pub(crate) fn num_open(&self) -> usize {
        self.channels.iter().flatten().count()
    }

    /// Starts RNDIS.
    pub(crate) fn start(&mut self) {
        self.running = true;
    }

    pub(crate) fn is_running(&self) -> bool {
        self.running
    }

    /// Stops RNDIS: no more frames.
    pub(crate) fn stop(&mut self) {
        self.running = false;
        self.set_filter(PacketFilter::default());
    }

    /// Sets the packet filter. Without any bit there are no more frames, those included that
    /// were not yet sent.
    pub(crate) fn set_filter(&mut self, filter: PacketFilter) {
        self.filter = filter;
        if filter != PacketFilter::default() {
            return;
        }
        for channel in self.channels.iter_mut().flatten() {
            let batch = std::mem::take(&mut channel.batch);
            if let Some(buffer) = &mut self.buffer {
                buffer.free.extend(batch.sections);
            }
        }
    }

    pub(crate) fn filter(&self) -> PacketFilter {
        self.filter
    }

    /// Whether the guest wants a frame.
    pub(crate) fn wants(&self, data: &[u8]) -> bool {
        let Some(destination) = frame::destination(data) else {
            return false;
        };
        let any = |bits: &[PacketFilter]| bits.iter().any(|&bit| self.filter.contains(bit));
        let wanted = if frame::is_broadcast(&destination) {
            any(&[PacketFilter::BROADCAST])
        } else if frame::is_group(&destination) {
            any(&[PacketFilter::MULTICAST, PacketFilter::ALL_MULTICAST])
        } else {
            any(&[PacketFilter::DIRECTED]) && self.macs.contains(&destination)
        };
        self.running && self.buffer.is_some() && (wanted || any(&[PacketFilter::PROMISCUOUS]))
    }

    /// How a large packet can be given to the guest.
    pub(crate) fn may_coalesce(&self, data: &[u8]) -> bool {
        match frame::headers(data).map(|headers| headers.network) {
            Some(Network::V4) => self.offloads.rsc_v4,
            Some(Network::V6) => self.offloads.rsc_v6,
            None => false,
        }
    }

    /// Puts a frame into the batch of its channel. With `coalesced` it may take several
    /// sections, as one packet coalesced of several. `Ok(false)`: it cannot be delivered ever.
    pub(crate) fn push(&mut self, frame: RxFrame<'_>, coalesced: bool) -> Result<bool, NoRoom> {
        let tci = frame::vlan_tci(frame.data);
        let (macs, rest) = match (frame.data.split_at_checked(12), tci) {
            (Some((macs, rest)), Some(_)) => (macs, &rest[frame::VLAN_TAG..]),
            (Some((macs, rest)), None) => (macs, rest),
            (None, _) => return Ok(false),
        };
        let class = self.rss.as_ref().and_then(|rss| rss.classify(frame.data));
        let wanted = class.map_or(0, |(_, channel)| channel as usize);
        let index = match self.channels.get(wanted) {
            Some(Some(_)) => wanted,
            _ => 0,
        };
        let Some(Some(channel)) = self.channels.get_mut(index) else {
            return Ok(false);
        };
        let Some(buffer) = &mut self.buffer else {
            return Ok(false);
        };

        let length = macs.len() + rest.len();
        let capacity = buffer.section_size - FRAME_OVERHEAD;
        let pieces = length.div_ceil(capacity);
        if pieces
            > if coalesced {
                nvsp::MAX_TRANSFER_RANGES
            } else {
                1
            }
        {
            self.counters.too_big.inc();
            return Ok(false);
        }
        let full =
            !channel.batch.ranges.is_empty() && channel.batch.ranges.len() + pieces > MAX_BATCH;
        if full {
            flush(channel, buffer, self.version, &mut self.next_transaction)?;
        }
        if buffer.free.len() < pieces {
            return Err(NoRoom);
        }

        if pieces > 1 {
            self.counters.coalesced.inc();
            self.next_packet_id = self.next_packet_id.wrapping_add(1);
        }
        let checksum = checksum_info(&self.offloads, frame);
        let mut at = 0;
        for piece in 0..pieces {
            let end = length.min(at + capacity);
            let mut header = [0; FRAME_OVERHEAD];
            // All that follows has room in it.
            let Ok(mut builder) = PacketBuilder::new(&mut header) else {
                return Ok(false);
            };
            if piece == 0 {
                let ppis = [
                    checksum.map(|flags| (PpiType::CHECKSUM, flags)),
                    tci.map(|tci| (PpiType::IEEE8021Q, Vlan::from_tci(tci).0)),
                    class.map(|(hash, _)| (PpiType::HASH_VALUE, hash)),
                ];
                for (ppi_type, value) in ppis.into_iter().flatten() {
                    if builder.ppi(ppi_type, value).is_err() {
                        return Ok(false);
                    }
                }
            }
            if pieces > 1 {
                let mut flags = PacketId::SUBALLOCATION;
                flags |= if piece == 0 { PacketId::FIRST } else { 0 };
                flags |= if piece + 1 == pieces {
                    PacketId::LAST
                } else {
                    0
                };
                let id = PacketId {
                    version: PacketId::VERSION,
                    flags,
                    packet_id: U16::new(self.next_packet_id),
                };
                if builder.packet_id(id).is_err() {
                    return Ok(false);
                }
            }
            let Ok(header_length) = builder.finish((end - at) as u32, 0) else {
                return Ok(false);
            };
            self.scratch.clear();
            self.scratch.extend_from_slice(&header[..header_length]);
            // The addresses and what follows the tag, as one sequence of bytes.
            if at < macs.len() {
                self.scratch
                    .extend_from_slice(&macs[at..end.min(macs.len())]);
            }
            if end > macs.len() {
                let from = at.max(macs.len()) - macs.len();
                self.scratch
                    .extend_from_slice(&rest[from..end - macs.len()]);
            }
            // Checked above.
            let Some(section) = buffer.free.pop() else {
                return Err(NoRoom);
            };
            let offset = u64::from(section) * buffer.section_size as u64;
            if buffer.memory.write_at(offset, &self.scratch).is_err() {
                buffer.free.push(section);
                return Ok(false);
            }
            channel.batch.sections.push(section);
            channel.batch.ranges.push(TransferRange {
                byte_count: self.scratch.len() as u32,
                byte_offset: offset as u32,
            });
            at = end;
        }
        Ok(true)
    }

    /// Queues an RNDIS control message for the guest. Returns false if too many wait already.
    pub(crate) fn push_control(&mut self, message: Vec<u8>) -> bool {
        if self.control.len() >= MAX_WAITING_CONTROL {
            return false;
        }
        self.control.push_back(message);
        true
    }

    /// Sends what waits, as far as there is room.
    pub(crate) fn pump(&mut self) {
        let Some(buffer) = &mut self.buffer else {
            return;
        };
        if let Some(Some(primary)) = self.channels.first_mut() {
            while let Some(message) = self.control.front() {
                if message.len() > buffer.section_size {
                    self.control.pop_front();
                    continue;
                }
                let Some(section) = buffer.free.pop() else {
                    break;
                };
                let offset = u64::from(section) * buffer.section_size as u64;
                let written = buffer.memory.write_at(offset, message);
                let range = TransferRange {
                    byte_count: message.len() as u32,
                    byte_offset: offset as u32,
                };
                let transaction = self.next_transaction;
                let payload = rndis_packet(self.version, ChannelType::CONTROL);
                let sent = written.is_ok().then(|| {
                    primary.transport.send_transfer_pages(
                        transaction,
                        nvsp::RECEIVE_BUFFER_ID,
                        &[range],
                        &payload,
                    )
                });
                match sent {
                    Some(Ok(())) => {
                        self.next_transaction += 1;
                        primary.outstanding.insert(transaction, vec![section]);
                    }
                    Some(Err(SendError::Full)) => {
                        buffer.free.push(section);
                        break;
                    }
                    Some(Err(_)) | None => buffer.free.push(section),
                }
                self.control.pop_front();
            }
        }
        for channel in self.channels.iter_mut().flatten() {
            // No room: the guest signals when there is, and then this is called again.
            let _ = flush(channel, buffer, self.version, &mut self.next_transaction);
        }
        self.count_held();
    }

    /// The guest completes a packet of ours. Returns false if there is no such packet.
    pub(crate) fn complete(&mut self, index: usize, transaction: u64, status: u32) -> bool {
        let sections = self
            .channels
            .get_mut(index)
            .and_then(Option::as_mut)
            .and_then(|channel| channel.outstanding.remove(&transaction));
        let Some(sections) = sections else {
            self.counters.unknown_completions.inc();
            return false;
        };
        if status != nvsp::Status::SUCCESS.0 {
            self.counters.refused.inc();
        }
        if let Some(buffer) = &mut self.buffer {
            buffer.free.extend(sections);
        }
        self.count_held();
        true
    }

    fn count_held(&self) {
        let held = self.buffer.as_ref().map_or(0, Buffer::held);
        self.counters.held.set(held);
    }

    /// Sends something to the guest as it is. `Ok(false)`: there is no room now.
    pub(crate) fn send_raw(&mut self, raw: &Raw) -> Result<bool, String> {
        let Some(Some(primary)) = self.channels.first_mut() else {
            return Err("the guest has no channel open".to_owned());
        };
        let sent = match raw {
            Raw::Nvsp(message) => primary.transport.send_inband(0, message),
            Raw::Completion(transaction, message) => {
                primary.transport.send_completion(*transaction, message)
            }
            Raw::Rndis { control, messages } => {
                let Some(buffer) = &mut self.buffer else {
                    return Err("there is no receive buffer".to_owned());
                };
                if messages.iter().any(|m| m.len() > buffer.section_size) {
                    return Err(format!("a section has {} bytes", buffer.section_size));
                }
                if messages.len() > buffer.free.len() {
                    return Ok(false);
                }
                let sections = buffer.free.split_off(buffer.free.len() - messages.len());
                let mut ranges = Vec::with_capacity(messages.len());
                for (&section, message) in sections.iter().zip(messages) {
                    let offset = u64::from(section) * buffer.section_size as u64;
                    if let Err(error) = buffer.memory.write_at(offset, message) {
                        buffer.free.extend(sections);
                        return Err(error.to_string());
                    }
                    ranges.push(TransferRange {
                        byte_count: message.len() as u32,
                        byte_offset: offset as u32,
                    });
                }
                let channel_type = if *control {
                    ChannelType::CONTROL
                } else {
                    ChannelType::DATA
                };
                let sent = primary.transport.send_transfer_pages(
                    self.next_transaction,
                    nvsp::RECEIVE_BUFFER_ID,
                    &ranges,
                    &rndis_packet(self.version, channel_type),
                );
                if sent.is_ok() {
                    primary.outstanding.insert(self.next_transaction, sections);
                    self.next_transaction += 1;
                } else {
                    buffer.free.extend(sections);
                }
                sent
            }
        };
        self.count_held();
        match sent {
            Ok(()) => Ok(true),
            Err(SendError::Full) => Ok(false),
            Err(error) => Err(format!("{error:?}")),
        }
    }
}

/// The NVSP message that goes with transfer pages.
fn rndis_packet(version: Version, channel_type: ChannelType) -> Vec<u8> {
    let message = nvsp::encode(&nvsp::SendRndisPacket {
        channel_type: U32::new(channel_type.0),
        section_index: U32::new(nvsp::INVALID_SECTION),
        section_size: U32::ZERO,
    });
    message[..nvsp::message_size(version)].to_vec()
}

/// Sends the batch of a channel.
fn flush(
    channel: &mut RxChannel,
    buffer: &mut Buffer,
    version: Version,
    next_transaction: &mut u64,
) -> Result<(), NoRoom> {
    if channel.batch.ranges.is_empty() {
        return Ok(());
    }
    let transaction = *next_transaction;
    let payload = rndis_packet(version, ChannelType::DATA);
    // The guest may complete at once, but completions need the lock that is held here.
    let sent = channel.transport.send_transfer_pages(
        transaction,
        nvsp::RECEIVE_BUFFER_ID,
        &channel.batch.ranges,
        &payload,
    );
    if sent == Err(SendError::Full) {
        return Err(NoRoom);
    }
    let batch = std::mem::take(&mut channel.batch);
    if sent.is_ok() {
        *next_transaction += 1;
        channel.outstanding.insert(transaction, batch.sections);
    } else {
        buffer.free.extend(batch.sections);
    }
    Ok(())
}

/// What to tell the guest about the checksums of a frame.
fn checksum_info(offloads: &RxOffloads, frame: RxFrame<'_>) -> Option<u32> {
    let v4 = frame::headers(frame.data)?.network == Network::V4;
    let state = frame::verify_checksums(frame.data, frame.checksum_valid);
    let mut flags = match state.ipv4 {
        Some(true) => RxChecksum::IP_SUCCEEDED,
        Some(false) => RxChecksum::IP_FAILED,
        None => 0,
    };
    flags |= match state.transport {
        Some((TransportProtocol::Tcp, right))
            if (offloads.tcp_v4 && v4) || (offloads.tcp_v6 && !v4) =>
        {
            if right {
                RxChecksum::TCP_SUCCEEDED
            } else {
                RxChecksum::TCP_FAILED
            }
        }
        Some((TransportProtocol::Udp, right))
            if (offloads.udp_v4 && v4) || (offloads.udp_v6 && !v4) =>
        {
            if right {
                RxChecksum::UDP_SUCCEEDED
            } else {
                RxChecksum::UDP_FAILED
            }
        }
        _ => 0,
    };
    (flags != 0).then_some(flags)
}
