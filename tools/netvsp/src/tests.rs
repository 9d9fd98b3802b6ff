// SPDX-License-Identifier: GPL-2.0

//! The device driven as the guest's driver does, over channels in memory.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hyperv_wire::ndis::{
    HashTypes, Offload, OffloadParameters, Oid, PacketFilter, RssCapabilities, RssParameters,
};
use hyperv_wire::nvsp::{self, Capabilities, HostMessage, MessageType, Version};
use hyperv_wire::rndis::{
    self, ConfigParameter, LargeSend, PacketBuilder, PacketId, PacketInfo, PpiType, RxChecksum,
    TxChecksum, Vlan,
};
use vmbus_host::{
    AccessError, Counters, GpaRange, GpadlError, MessageLog, Packet, PacketKind, RecvError,
    SendError, TransferRange,
};
use vmm_sys_util::eventfd::EventFd;
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, IntoBytes};

use crate::config::{Config, Fault, FaultAction, FaultPoint, Raw};
use crate::device::{lock, Nic};
use crate::frame::{self, tests::tcp_frame, Mac, Network, VnetHeader};
use crate::port::{Delivery, RxFrame, SwitchPort, VfSink};
use crate::tap::Uplink;
use crate::transport::{SharedMemory, Transport};

const MAC: Mac = [0x02, 0, 0, 0, 0, 1];
const PEER: Mac = [0x02, 0, 0, 0, 0, 2];
const RECEIVE_GPADL: u32 = 0xe1e10;
const SEND_GPADL: u32 = 0xe1e11;
const ACK: u8 = 0x10;
const SYN: u8 = 0x02;
const LIMIT: Duration = Duration::from_secs(10);

struct Memory(Mutex<Vec<u8>>);

impl Memory {
    fn new(size: usize) -> Arc<Self> {
        Arc::new(Self(Mutex::new(vec![0; size])))
    }

    fn range(&self, offset: u64, length: usize) -> Result<std::ops::Range<usize>, GpadlError> {
        let start = offset as usize;
        if start + length > lock(&self.0).len() {
            return Err(AccessError::OutOfRange.into());
        }
        Ok(start..start + length)
    }
}

impl SharedMemory for Memory {
    fn len(&self) -> u64 {
        lock(&self.0).len() as u64
    }

    fn read_at(&self, offset: u64, to: &mut [u8]) -> Result<(), GpadlError> {
        let range = self.range(offset, to.len())?;
        to.copy_from_slice(&lock(&self.0)[range]);
        Ok(())
    }

    fn write_at(&self, offset: u64, from: &[u8]) -> Result<(), GpadlError> {
        let range = self.range(offset, from.len())?;
        lock(&self.0)[range].copy_from_slice(from);
        Ok(())
    }
}

/// What the host sends.
#[derive(Debug)]
enum Sent {
    InBand(Vec<u8>),
    Completion(u64, Vec<u8>),
    Pages(u64, Vec<TransferRange>, Vec<u8>),
}

#[derive(Default)]
struct Rings {
    to_host: VecDeque<Packet>,
    to_guest: VecDeque<Sent>,
    /// Packets that fit into the guest's ring.
    room: usize,
    closed: bool,
}

/// A channel with a ring that is a queue.
struct FakeChannel {
    index: u16,
    rings: Mutex<Rings>,
    event: EventFd,
    buffers: Arc<Mutex<HashMap<u32, Arc<Memory>>>>,
    pages: Arc<Memory>,
    offered: Mutex<Option<u16>>,
}

impl FakeChannel {
    fn send(&self, sent: Sent) -> Result<(), SendError> {
        let mut rings = lock(&self.rings);
        if rings.closed {
            return Err(SendError::Closed);
        }
        if rings.to_guest.len() >= rings.room {
            return Err(SendError::Full);
        }
        rings.to_guest.push_back(sent);
        Ok(())
    }

    fn signal(&self) {
        self.event.write(1).unwrap();
    }

    fn put(&self, kind: PacketKind, transaction_id: u64, wanted: bool, payload: &[u8]) {
        lock(&self.rings).to_host.push_back(Packet {
            kind,
            transaction_id,
            completion_requested: wanted,
            payload: payload.to_vec(),
        });
        self.signal();
    }
}

impl Transport for FakeChannel {
    fn name(&self) -> &str {
        "test"
    }

    fn subchannel_index(&self) -> u16 {
        self.index
    }

    fn event_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    fn clear_event(&self) {
        let _ = self.event.read();
    }

    fn recv(&self) -> Result<Option<Packet>, RecvError> {
        let mut rings = lock(&self.rings);
        if rings.closed {
            return Err(RecvError::Closed);
        }
        Ok(rings.to_host.pop_front())
    }

    fn send_inband(&self, _: u64, payload: &[u8]) -> Result<(), SendError> {
        self.send(Sent::InBand(payload.to_vec()))
    }

    fn send_completion(&self, transaction_id: u64, payload: &[u8]) -> Result<(), SendError> {
        self.send(Sent::Completion(transaction_id, payload.to_vec()))
    }

    fn send_transfer_pages(
        &self,
        transaction_id: u64,
        pageset_id: u16,
        ranges: &[TransferRange],
        payload: &[u8],
    ) -> Result<(), SendError> {
        assert_eq!(pageset_id, nvsp::RECEIVE_BUFFER_ID);
        assert!(ranges.len() <= nvsp::MAX_TRANSFER_RANGES);
        self.send(Sent::Pages(
            transaction_id,
            ranges.to_vec(),
            payload.to_vec(),
        ))
    }

    fn shared_memory(&self, gpadl: u32) -> Option<Arc<dyn SharedMemory>> {
        let buffer = lock(&self.buffers).get(&gpadl)?.clone();
        Some(buffer)
    }

    fn read_pages(&self, range: &GpaRange, to: &mut [u8]) -> Result<(), AccessError> {
        let at = range.pfns[0] * 4096 + u64::from(range.byte_offset);
        self.pages
            .read_at(at, to)
            .map_err(|_| AccessError::NoMemory)
    }

    fn offer_subchannels(&self, count: u16) {
        *lock(&self.offered) = Some(count);
    }
}

/// A frame that the guest has received.
#[derive(Debug)]
struct Received {
    channel: u16,
    frame: Vec<u8>,
    info: PacketInfo,
    fragments: usize,
}

/// The guest, its NIC and the other end of the uplink.
struct Guest {
    nic: Arc<Nic>,
    port: Arc<SwitchPort>,
    counters: Arc<Counters>,
    log: Arc<MessageLog>,
    peer: Uplink,
    channels: Vec<Arc<FakeChannel>>,
    buffers: Arc<Mutex<HashMap<u32, Arc<Memory>>>>,
    pages: Arc<Memory>,
    version: Version,
    next_id: u64,
    inband: VecDeque<Vec<u8>>,
    completions: HashMap<u64, Vec<u8>>,
    frames: VecDeque<Received>,
    answers: VecDeque<Vec<u8>>,
    section_size: u32,
    /// Completions of the host's packets are held back.
    hold: bool,
    held: Vec<(u16, u64)>,
}

/// A pair of connected sequenced packet sockets.
#[allow(unsafe_code)]
fn socket_pair() -> (OwnedFd, OwnedFd) {
    use std::os::fd::FromRawFd;
    let mut fds = [0; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK;
    // SAFETY: the array has room for the two descriptors.
    let result = unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) };
    assert_eq!(result, 0);
    // SAFETY: the descriptors are new and belong to nobody else.
    fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).into()
}

impl Guest {
    fn new(configure: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config::new("net0", MAC);
        config.max_channels = 8;
        configure(&mut config);
        let counters = Counters::new();
        let log = MessageLog::new(10_000);
        let (ours, theirs) = socket_pair();
        let port = SwitchPort::new("net0", MAC, Uplink::from_fd(ours), &counters).unwrap();
        let nic = Nic::new(config, port.clone(), log.clone(), &counters).unwrap();
        Self {
            nic,
            port,
            counters,
            log,
            peer: Uplink::from_fd(theirs),
            channels: Vec::new(),
            buffers: Arc::default(),
            pages: Memory::new(1 << 20),
            version: Version::V1,
            next_id: 1,
            inband: VecDeque::new(),
            completions: HashMap::new(),
            frames: VecDeque::new(),
            answers: VecDeque::new(),
            section_size: 0,
            hold: false,
            held: Vec::new(),
        }
    }

    fn open(&mut self, index: u16) {
        let channel = Arc::new(FakeChannel {
            index,
            rings: Mutex::new(Rings {
                room: 1000,
                ..Rings::default()
            }),
            event: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            buffers: self.buffers.clone(),
            pages: self.pages.clone(),
            offered: Mutex::new(None),
        });
        self.nic.open_transport(channel.clone()).unwrap();
        self.channels.push(channel);
    }

    fn close(&mut self) {
        for channel in std::mem::take(&mut self.channels).into_iter().rev() {
            lock(&channel.rings).closed = true;
            channel.signal();
            self.nic.close_transport(channel.index);
        }
    }

    /// Takes what the host has sent on all channels.
    fn poll(&mut self) {
        for channel in self.channels.clone() {
            loop {
                let sent = lock(&channel.rings).to_guest.pop_front();
                let Some(sent) = sent else { break };
                channel.signal();
                match sent {
                    Sent::InBand(message) => self.inband.push_back(message),
                    Sent::Completion(id, payload) => {
                        assert!(self.completions.insert(id, payload).is_none());
                    }
                    Sent::Pages(id, ranges, payload) => {
                        self.pages_arrived(&channel, id, &ranges, &payload);
                    }
                }
            }
        }
    }

    fn pages_arrived(
        &mut self,
        channel: &FakeChannel,
        id: u64,
        ranges: &[TransferRange],
        payload: &[u8],
    ) {
        let message: nvsp::SendRndisPacket = nvsp::decode(payload).unwrap();
        assert_eq!(payload.len(), nvsp::message_size(self.version));
        let buffer = lock(&self.buffers)[&RECEIVE_GPADL].clone();
        let mut coalesced: Option<Received> = None;
        for (i, range) in ranges.iter().enumerate() {
            assert!(range.byte_count <= self.section_size);
            let mut bytes = vec![0; range.byte_count as usize];
            buffer
                .read_at(range.byte_offset.into(), &mut bytes)
                .unwrap();
            if message.channel_type.get() == nvsp::ChannelType::CONTROL.0 {
                self.answers.push_back(bytes);
                continue;
            }
            let packet = rndis::Message::parse(&bytes).unwrap().packet().unwrap();
            let info = PacketInfo::collect(packet.ppis).unwrap();
            match info.packet_id {
                None => self.frames.push_back(Received {
                    channel: channel.index,
                    frame: packet.frame.to_vec(),
                    info,
                    fragments: 1,
                }),
                Some(id) => {
                    assert_ne!(id.flags & PacketId::SUBALLOCATION, 0);
                    if id.flags & PacketId::FIRST != 0 {
                        assert!(coalesced.is_none());
                        coalesced = Some(Received {
                            channel: channel.index,
                            frame: Vec::new(),
                            info,
                            fragments: 0,
                        });
                    }
                    let whole = coalesced.as_mut().unwrap();
                    whole.frame.extend_from_slice(packet.frame);
                    whole.fragments += 1;
                    if id.flags & PacketId::LAST != 0 {
                        self.frames.extend(coalesced.take());
                    } else {
                        assert!(
                            i + 1 < ranges.len(),
                            "a coalesced packet ends in its packet"
                        );
                    }
                }
            }
        }
        assert!(coalesced.is_none());
        if self.hold {
            self.held.push((channel.index, id));
        } else {
            self.complete(channel.index, id);
        }
    }

    fn complete(&self, index: u16, id: u64) {
        let message = nvsp::encode(&nvsp::SendRndisPacketComplete {
            status: U32::new(nvsp::Status::SUCCESS.0),
        });
        let channel = &self.channels[usize::from(index)];
        channel.put(PacketKind::Completion, id, false, &message[..8]);
    }

    fn wait<T>(&mut self, what: &str, mut take: impl FnMut(&mut Self) -> Option<T>) -> T {
        let end = Instant::now() + LIMIT;
        loop {
            self.poll();
            if let Some(value) = take(self) {
                return value;
            }
            assert!(Instant::now() < end, "no {what}");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Nothing of the kind comes for a while.
    fn none<T>(&mut self, mut take: impl FnMut(&mut Self) -> Option<T>) {
        for _ in 0..50 {
            self.poll();
            assert!(take(self).is_none());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn post<B: nvsp::Body>(&mut self, body: &B, wanted: bool) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.channels[0].put(PacketKind::InBand, id, wanted, &nvsp::encode(body));
        id
    }

    fn request<B: nvsp::Body>(&mut self, body: &B) -> Vec<u8> {
        let id = self.post(body, true);
        self.wait("completion", |guest| guest.completions.remove(&id))
    }

    fn init(&mut self, version: Version) -> bool {
        let answer = self.request(&nvsp::Init {
            min_version: U32::new(version.0),
            max_version: U32::new(version.0),
        });
        let answer: nvsp::InitComplete = nvsp::decode(&answer).unwrap();
        if answer.status.get() != nvsp::Status::SUCCESS.0 {
            return false;
        }
        assert_eq!(answer.version.get(), version.0);
        self.version = version;
        true
    }

    /// What the driver does at probe, up to RNDIS.
    fn connect(&mut self, max_frame: u32) {
        self.open(0);
        let version = Version::ALL.into_iter().find(|&version| self.init(version));
        let version = version.expect("no version");
        if version > Version::V1 {
            let mut capabilities = Capabilities::IEEE8021Q;
            if version >= Version::V5 {
                capabilities = capabilities
                    .with(Capabilities::SRIOV)
                    .with(Capabilities::TEAMING);
            }
            if version >= Version::V61 {
                capabilities = capabilities.with(Capabilities::RSC);
            }
            self.post(
                &nvsp::NdisConfig {
                    max_frame: U32::new(max_frame),
                    reserved: U32::ZERO,
                    capabilities: capabilities.0.into(),
                },
                false,
            );
        }
        let (major, minor) = version.ndis_version();
        self.post(
            &nvsp::SendNdisVersion {
                major: U32::new(major),
                minor: U32::new(minor),
            },
            false,
        );
        self.buffers(4 << 20, 1 << 20);
        self.rndis_initialize();
    }

    fn buffers(&mut self, receive: usize, send: usize) {
        lock(&self.buffers).extend([
            (RECEIVE_GPADL, Memory::new(receive)),
            (SEND_GPADL, Memory::new(send)),
        ]);
        let answer = self.request(&nvsp::SendReceiveBuffer {
            gpadl: U32::new(RECEIVE_GPADL),
            id: nvsp::RECEIVE_BUFFER_ID.into(),
        });
        let answer: nvsp::SendReceiveBufferComplete = nvsp::decode(&answer).unwrap();
        assert_eq!(answer.status.get(), nvsp::Status::SUCCESS.0);
        assert_eq!(answer.num_sections.get(), 1);
        let section = answer.section;
        assert_eq!(section.offset.get(), 0);
        let used = section.suballocation_size.get() * section.num_suballocations.get();
        assert!(used as usize <= receive && used == section.end_offset.get());
        self.section_size = section.suballocation_size.get();
        let answer = self.request(&nvsp::SendSendBuffer {
            gpadl: U32::new(SEND_GPADL),
            id: nvsp::SEND_BUFFER_ID.into(),
        });
        let answer: nvsp::SendSendBufferComplete = nvsp::decode(&answer).unwrap();
        assert_eq!(answer.status.get(), nvsp::Status::SUCCESS.0);
        assert_eq!(answer.section_size.get(), 6144);
    }

    /// Sends RNDIS messages by pages, and returns the status of the completion.
    fn send_pages(&mut self, channel: usize, message: &[u8], control: bool) -> u32 {
        // Crossing a page, as the driver's do.
        let at = 4096 - 20;
        self.pages.write_at(at, message).unwrap();
        let range = GpaRange {
            byte_count: message.len() as u32,
            byte_offset: at as u32,
            pfns: (0..(at + message.len() as u64).div_ceil(4096)).collect(),
        };
        self.send_packet(
            channel,
            PacketKind::GpaDirect(vec![range]),
            nvsp::INVALID_SECTION,
            0,
            control,
        )
    }

    fn send_packet(
        &mut self,
        channel: usize,
        kind: PacketKind,
        section_index: u32,
        section_size: u32,
        control: bool,
    ) -> u32 {
        let id = self.next_id;
        self.next_id += 1;
        let message = nvsp::encode(&nvsp::SendRndisPacket {
            channel_type: U32::new(control.into()),
            section_index: U32::new(section_index),
            section_size: U32::new(section_size),
        });
        self.channels[channel].put(kind, id, true, &message);
        let answer = self.wait("completion", |guest| guest.completions.remove(&id));
        let answer: nvsp::SendRndisPacketComplete = nvsp::decode(&answer).unwrap();
        answer.status.get()
    }

    fn control(&mut self, message: &[u8]) -> Vec<u8> {
        let status = self.send_pages(0, message, true);
        assert_eq!(status, nvsp::Status::SUCCESS.0);
        self.wait("answer", |guest| guest.answers.pop_front())
    }

    fn rndis_initialize(&mut self) {
        let mut buffer = [0; 64];
        let body = rndis::Initialize {
            request_id: U32::new(1),
            major_version: U32::new(1),
            minor_version: U32::ZERO,
            max_transfer_size: U32::new(0x4000),
        };
        let length =
            rndis::encode(rndis::MessageType::INITIALIZE, &body, &[], &mut buffer).unwrap();
        let answer = self.control(&buffer[..length]);
        let answer = rndis::Message::parse(&answer).unwrap();
        assert_eq!(answer.message_type, rndis::MessageType::INITIALIZE_COMPLETE);
        let body: rndis::InitializeComplete = answer.body_as("answer").unwrap();
        assert_eq!(body.status.get(), 0);
        assert_eq!(body.max_packets_per_message.get(), 8);
        assert_eq!(body.packet_alignment_factor.get(), 3);
    }

    fn halt(&mut self) {
        let mut buffer = [0; 64];
        let body = rndis::Halt {
            request_id: U32::new(1),
        };
        let length = rndis::encode(rndis::MessageType::HALT, &body, &[], &mut buffer).unwrap();
        assert_eq!(self.send_pages(0, &buffer[..length], true), 1);
    }

    fn query(&mut self, oid: Oid, info: &[u8]) -> (u32, Vec<u8>) {
        let mut buffer = [0; 512];
        let length =
            rndis::encode_request(rndis::MessageType::QUERY, 77, oid, info, &mut buffer).unwrap();
        let answer = self.control(&buffer[..length]);
        let answer = rndis::Message::parse(&answer)
            .unwrap()
            .query_complete()
            .unwrap();
        assert_eq!(answer.request_id, 77);
        (answer.status.0, answer.info.to_vec())
    }

    fn query_word(&mut self, oid: Oid) -> u32 {
        let (status, info) = self.query(oid, &[]);
        assert_eq!(status, 0);
        u32::from_le_bytes(info.try_into().unwrap())
    }

    fn set(&mut self, oid: Oid, info: &[u8]) -> u32 {
        let mut buffer = [0; 2048];
        let length =
            rndis::encode_request(rndis::MessageType::SET, 78, oid, info, &mut buffer).unwrap();
        let answer = self.control(&buffer[..length]);
        let answer = rndis::Message::parse(&answer).unwrap();
        assert_eq!(answer.message_type, rndis::MessageType::SET_COMPLETE);
        let body: rndis::SetComplete = answer.body_as("answer").unwrap();
        assert_eq!(body.request_id.get(), 78);
        body.status.get()
    }

    fn filter(&mut self, filter: PacketFilter) {
        let info = filter.0.to_le_bytes();
        assert_eq!(self.set(Oid::GEN_CURRENT_PACKET_FILTER, &info), 0);
    }

    fn up(&mut self) {
        self.filter(
            PacketFilter::DIRECTED
                .with(PacketFilter::BROADCAST)
                .with(PacketFilter::ALL_MULTICAST),
        );
    }

    fn subchannels(&mut self, count: u32) -> u32 {
        let answer = self.request(&nvsp::SubchannelRequest {
            operation: U32::new(1),
            num_subchannels: U32::new(count),
        });
        let answer: nvsp::SubchannelComplete = nvsp::decode(&answer).unwrap();
        if answer.status.get() != 1 {
            return 0;
        }
        let granted = answer.num_subchannels.get();
        self.wait("offer", |guest| *lock(&guest.channels[0].offered));
        for index in 1..=granted {
            self.open(index as u16);
        }
        granted
    }

    fn switch(&mut self, path: nvsp::DataPath) {
        let answer = self.request(&nvsp::SwitchDataPath {
            active: U32::new(path.0),
        });
        assert!(answer.is_empty());
    }

    fn peer_sends(&self, frame: &[u8]) {
        self.peer.send(VnetHeader::default(), &[frame]).unwrap();
    }

    fn frame(&mut self) -> Received {
        self.wait("frame", |guest| guest.frames.pop_front())
    }

    fn at_peer(&mut self) -> (VnetHeader, Vec<u8>) {
        self.wait("frame at the peer", |guest| guest.peer_frame())
    }

    fn peer_frame(&self) -> Option<(VnetHeader, Vec<u8>)> {
        let mut buffer = vec![0; 70_000];
        let (header, length) = self.peer.receive(&mut buffer).unwrap()?;
        Some((header, buffer[VnetHeader::SIZE..length].to_vec()))
    }

    fn count(&self, name: &str) -> u64 {
        self.counters
            .snapshot()
            .get(&format!("net0.{name}"))
            .copied()
            .unwrap_or(0)
    }

    fn association(&mut self) -> (u32, u32) {
        let version = self.version;
        let message = self.wait("inband message", |guest| guest.inband.pop_front());
        match HostMessage::parse(&message, version).unwrap() {
            HostMessage::VfAssociation(body) => (body.allocated.get(), body.serial.get()),
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.close();
        self.port.shut_down();
        if std::thread::panicking() {
            eprintln!("{}", self.log.since(0).lines.join("\n"));
        }
    }
}

/// A frame of TCP to the guest.
fn frame_to_guest(flags: u8, payload: &[u8]) -> Vec<u8> {
    tcp_frame(Network::V4, flags, payload)
}

/// A frame of the given length to an address, not IP.
fn plain_frame(to: Mac, length: usize, seed: u8) -> Vec<u8> {
    let mut frame = Vec::with_capacity(length);
    frame.extend(to);
    frame.extend(PEER);
    frame.extend([0x88, 0xb5]);
    frame.extend(
        (0..)
            .map(|i: usize| (i as u8).wrapping_mul(7) ^ seed)
            .take(length - 14),
    );
    frame
}

fn packet_message(frame: &[u8], ppis: &[(PpiType, u32)], padding: u32) -> Vec<u8> {
    let mut header = [0; 256];
    let mut builder = PacketBuilder::new(&mut header).unwrap();
    for &(ppi_type, value) in ppis {
        builder.ppi(ppi_type, value).unwrap();
    }
    let length = builder.finish(frame.len() as u32, padding).unwrap();
    let mut message = header[..length].to_vec();
    message.extend(frame);
    message.extend(vec![0; padding as usize]);
    message
}

#[test]
fn every_version_is_negotiated_and_passes_frames() {
    for version in Version::ALL {
        let mut guest = Guest::new(|config| config.max_version = version);
        guest.connect(1514);
        assert_eq!(guest.version, version);
        assert_eq!(guest.nic.status().version, Some(version));
        guest.up();
        let frame = plain_frame(MAC, 100, 1);
        guest.peer_sends(&frame);
        assert_eq!(guest.frame().frame, frame);
        assert_eq!(
            guest.send_pages(0, &packet_message(&frame, &[], 0), false),
            1
        );
        assert_eq!(guest.at_peer().1, frame);
        assert_eq!(guest.count("protocol_errors"), 0);
        guest.close();
        assert_eq!(guest.nic.status().version, None);
        assert_eq!(guest.nic.status().channels, 0);
    }
}

#[test]
fn a_range_of_versions_gives_the_newest() {
    let mut guest = Guest::new(|config| config.max_version = Version::V5);
    guest.open(0);
    let answer = guest.request(&nvsp::Init {
        min_version: U32::new(Version::V1.0),
        max_version: U32::new(Version::V61.0),
    });
    let answer: nvsp::InitComplete = nvsp::decode(&answer).unwrap();
    assert_eq!(answer.version.get(), Version::V5.0);
    for unsupported in [1, 3, 0x2_0000, 0x3_0001, 0x4_0001, u32::MAX] {
        let answer = guest.request(&nvsp::Init {
            min_version: U32::new(unsupported),
            max_version: U32::new(unsupported),
        });
        let answer: nvsp::InitComplete = nvsp::decode(&answer).unwrap();
        assert_ne!(answer.status.get(), 1, "{unsupported:#x}");
    }
}

#[test]
fn every_object_that_the_driver_asks_for() {
    let mut guest = Guest::new(|config| config.friendly_name = "Réseau".to_owned());
    guest.connect(9014);
    assert_eq!(guest.query_word(Oid::GEN_MAXIMUM_FRAME_SIZE), 9000);
    assert_eq!(guest.query_word(Oid::GEN_MEDIA_CONNECT_STATUS), 0);
    assert_eq!(guest.query_word(Oid::GEN_LINK_SPEED), 500_000_000);
    assert_eq!(guest.query(Oid::PERMANENT_ADDRESS, &[]).1, MAC);
    let (_, name) = guest.query(Oid::GEN_FRIENDLY_NAME, &[]);
    let units: Vec<u16> = name
        .chunks(2)
        .map(|unit| u16::from_le_bytes([unit[0], unit[1]]))
        .collect();
    assert_eq!(String::from_utf16(&units).unwrap(), "Réseau\0");

    for version in Version::ALL {
        let request = Offload::request(version);
        let size = usize::from(request.header.size.get());
        let asked = &request.as_bytes()[..size];
        let (status, info) = guest.query(Oid::TCP_OFFLOAD_HARDWARE_CAPABILITIES, asked);
        assert_eq!((status, info.len()), (0, size));
        let caps = Offload::read(&info).unwrap();
        assert_eq!(caps.checksum.ipv4_tx.get() & 0x55, 0x55);
        assert_eq!(caps.checksum.ipv6_tx.get() & 0x55, 0x55);
        assert_eq!(caps.large_send_v2.ipv6_options.get(), 5);
        assert_eq!(caps.rsc.ipv4 == 1, version >= Version::V5);
    }
    let (_, info) = guest.query(
        Oid::GEN_RECEIVE_SCALE_CAPABILITIES,
        RssCapabilities::request().as_bytes(),
    );
    let caps = RssCapabilities::read(&info).unwrap();
    assert_eq!(caps.num_queues.get(), 8);
    assert_eq!(caps.num_table_entries.get(), 128);
    let (status, info) = guest.query(Oid(0x1234), &[]);
    assert_eq!((status, info.len()), (rndis::Status::NOT_SUPPORTED.0, 0));
    assert_eq!(guest.set(Oid(0x1234), &[]), rndis::Status::NOT_SUPPORTED.0);
    assert_eq!(
        guest.set(Oid::GEN_CURRENT_PACKET_FILTER, &[1, 2]),
        rndis::Status::INVALID_LENGTH.0
    );
}

#[test]
fn frames_of_all_sizes_pass_unchanged() {
    let mut guest = Guest::new(|_| ());
    guest.connect(65535 + 14);
    guest.up();
    let mut lengths: Vec<usize> = (14..=200).chain((1500..1520).step_by(3)).collect();
    lengths.extend([4096, 6000, 6144, 9014, 30_001, 65_535]);
    for (i, length) in lengths.into_iter().enumerate() {
        let frame = plain_frame(MAC, length, i as u8);
        guest.peer_sends(&frame);
        assert_eq!(guest.frame().frame, frame, "to the guest, {length}");
        let message = packet_message(&frame, &[], 0);
        assert_eq!(guest.send_pages(0, &message, false), 1);
        assert_eq!(guest.at_peer().1, frame, "from the guest, {length}");
    }
    assert_eq!(guest.count("protocol_errors"), 0);
    assert_eq!(guest.count("synthetic.rx_dropped"), 0);
}

#[test]
fn send_sections_carry_several_packets() {
    let mut guest = Guest::new(|_| ());
    guest.connect(1514);
    let frames: Vec<_> = (0..4).map(|i| plain_frame(PEER, 60 + i, i as u8)).collect();
    let mut section = Vec::new();
    for frame in &frames[..3] {
        let length = 44 + frame.len();
        let padding = length.next_multiple_of(8) - length;
        section.extend(packet_message(frame, &[], padding as u32));
    }
    // The last one's header is in the section, its frame in pages.
    let last = packet_message(&frames[3], &[], 0);
    section.extend(&last[..44]);
    guest.pages.write_at(100, &last[44..]).unwrap();
    let buffer = lock(&guest.buffers)[&SEND_GPADL].clone();
    buffer.write_at(7 * 6144, &section).unwrap();
    let range = GpaRange {
        byte_count: (last.len() - 44) as u32,
        byte_offset: 100,
        pfns: vec![0],
    };
    let kind = PacketKind::GpaDirect(vec![range]);
    let status = guest.send_packet(0, kind, 7, section.len() as u32, false);
    assert_eq!(status, 1);
    for frame in &frames {
        assert_eq!(&guest.at_peer().1, frame);
    }

    // A section that there is not, and more than a section.
    let kind = PacketKind::InBand;
    assert_eq!(guest.send_packet(0, kind.clone(), 170, 100, false), 5);
    assert_eq!(guest.send_packet(0, kind.clone(), 0, 6145, false), 5);
    assert_eq!(guest.send_packet(0, kind.clone(), 0, 0, false), 5);
    // After revocation there is none at all.
    guest.post(
        &nvsp::RevokeSendBuffer {
            id: nvsp::SEND_BUFFER_ID.into(),
        },
        false,
    );
    assert_eq!(guest.send_packet(0, kind, 7, 52, false), 5);
    assert_eq!(guest.count("protocol_errors"), 4);
}

#[test]
fn transmit_offloads_reach_the_tap() {
    let mut guest = Guest::new(|_| ());
    guest.connect(1514);
    let payload: Vec<u8> = (0..20_000u32).map(|i| i as u8).collect();
    let whole = tcp_frame(Network::V4, ACK, &payload);
    let mut frame = whole.clone();
    frame[16..18].fill(0);
    frame[24..26].fill(0);
    frame[50..52].fill(0);
    let ppis = [
        (PpiType::HASH_VALUE, 0x1234_5678),
        (PpiType::IEEE8021Q, Vlan::from_tci(0x2064).0),
        (
            PpiType::LARGE_SEND,
            LargeSend::new(1448, 34, false).unwrap().0,
        ),
    ];
    assert_eq!(
        guest.send_pages(0, &packet_message(&frame, &ppis, 0), false),
        1
    );
    let (header, mut seen) = guest.at_peer();
    assert_eq!(header.gso_type, VnetHeader::GSO_TCPV4);
    assert_eq!(header.gso_size, 1448);
    assert_eq!(header.header_length, 58);
    assert_eq!(header.checksum_start, 38);
    assert_eq!(frame::vlan_tci(&seen), Some(0x2064));
    seen.drain(12..16);
    assert!(frame::complete_checksum(&mut seen, 34, 16));
    assert_eq!(seen, whole);

    let whole = tcp_frame(Network::V6, ACK, b"hello");
    let mut frame = whole.clone();
    frame[70..72].fill(0xaa);
    let checksum = TxChecksum::new(TxChecksum::IPV6 | TxChecksum::TCP, 54).unwrap();
    let message = packet_message(&frame, &[(PpiType::CHECKSUM, checksum.0)], 0);
    assert_eq!(guest.send_pages(0, &message, false), 1);
    let (header, mut seen) = guest.at_peer();
    assert_eq!(header.flags, VnetHeader::NEEDS_CHECKSUM);
    assert_eq!((header.checksum_start, header.checksum_offset), (54, 16));
    assert!(frame::complete_checksum(&mut seen, 54, 16));
    assert_eq!(seen, whole);

    // A frame that cannot be done is dropped; the packet was well formed.
    let message = packet_message(&plain_frame(PEER, 60, 0), &ppis, 0);
    assert_eq!(guest.send_pages(0, &message, false), 1);
    guest.none(|guest| guest.peer_frame());
    assert_eq!(guest.count("synthetic.tx_dropped"), 1);
}

#[test]
fn malformed_rndis_is_refused() {
    let mut guest = Guest::new(|_| ());
    guest.connect(1514);
    let good = packet_message(&plain_frame(PEER, 60, 0), &[(PpiType::HASH_VALUE, 1)], 0);
    // Field and value of the packet message.
    for (at, value) in [
        (4, 7),
        (4, 200),
        (8, u32::MAX),
        (12, 1000),
        (28, 3),
        (32, 17_000),
        (44, 0),
        (52, 100),
    ] {
        let mut message = good.clone();
        message[at..at + 4].copy_from_slice(&u32::to_le_bytes(value));
        assert_eq!(guest.send_pages(0, &message, false), 5, "{at}: {value}");
    }
    assert_eq!(guest.send_pages(0, &good, false), 1);
    assert_eq!(guest.at_peer().1.len(), 60);
    // Unknown control message; a control message on no primary channel is refused too.
    let mut unknown = [0; 8];
    unknown[0] = 9;
    unknown[4] = 8;
    assert_eq!(guest.send_pages(0, &unknown, true), 5);
}

#[test]
fn receive_offloads() {
    let mut guest = Guest::new(|_| ());
    guest.connect(1514);
    guest.up();
    let checksum = |received: &Received| RxChecksum(received.info.checksum.unwrap_or(0));
    let right = RxChecksum::TCP_SUCCEEDED | RxChecksum::IP_SUCCEEDED;

    // Complete, pending, and wrong.
    let frame = frame_to_guest(ACK, b"hello");
    guest.peer_sends(&frame);
    let received = guest.frame();
    assert_eq!(checksum(&received).0, right);
    let mut pending = frame.clone();
    pending[50..52].fill(0);
    let offload = crate::frame::TxOffload {
        checksum: true,
        ..Default::default()
    };
    let header = frame::prepare_transmit(&mut pending, &offload).unwrap();
    guest.peer.send(header, &[&pending]).unwrap();
    let received = guest.frame();
    assert_eq!(checksum(&received).0, right);
    assert_eq!(received.frame, frame);
    let mut wrong = frame.clone();
    wrong[55] ^= 1;
    guest.peer_sends(&wrong);
    let received = guest.frame();
    assert_eq!(
        checksum(&received).0,
        RxChecksum::TCP_FAILED | RxChecksum::IP_SUCCEEDED
    );

    // A VLAN tag becomes information.
    let mut tagged = frame.clone();
    tagged.splice(12..12, frame::vlan_tag(0xe064));
    guest.peer_sends(&tagged);
    let received = guest.frame();
    assert_eq!(received.frame, frame);
    assert_eq!(received.info.vlan.map(Vlan::tci), Some(0xe064));
    assert_eq!(checksum(&received).0, right);

    // Turned off.
    let mut parameters = OffloadParameters {
        tcp_ipv4_checksum: OffloadParameters::CHECKSUM_DISABLED,
        ..OffloadParameters::default()
    };
    let length = parameters.finish(Version::V61);
    let status = guest.set(
        Oid::TCP_OFFLOAD_PARAMETERS,
        &parameters.as_bytes()[..length],
    );
    assert_eq!(status, 0);
    guest.peer_sends(&frame);
    let received = guest.frame();
    assert_eq!(checksum(&received).0, RxChecksum::IP_SUCCEEDED);
}

fn large_frame(network: Network) -> (VnetHeader, Vec<u8>, Vec<u8>) {
    let payload: Vec<u8> = (0..50_000u32).map(|i| (i / 3) as u8).collect();
    let whole = tcp_frame(network, ACK, &payload);
    let mut frame = whole.clone();
    let offload = crate::frame::TxOffload {
        lso_mss: Some(1448),
        ..Default::default()
    };
    let header = frame::prepare_transmit(&mut frame, &offload).unwrap();
    assert!(header.is_gso());
    (header, frame, whole)
}

#[test]
fn large_frames_are_coalesced_or_segmented() {
    let mut guest = Guest::new(|_| ());
    guest.connect(1514);
    guest.up();
    for network in [Network::V4, Network::V6] {
        let (header, frame, whole) = large_frame(network);
        // Off until the driver turns it on.
        guest.peer.send(header, &[&frame]).unwrap();
        let mut bytes = 0;
        while bytes < 50_000 {
            let received = guest.frame();
            assert_eq!(received.fragments, 1);
            assert!(received.frame.len() <= 74 + 1448);
            let start = if network == Network::V4 { 54 } else { 74 };
            assert_eq!(
                received.frame[start..],
                whole[start + bytes..start + bytes + received.frame.len() - start]
            );
            bytes += received.frame.len() - start;
        }
        assert_eq!(bytes, 50_000);
    }
    let mut parameters = OffloadParameters {
        rsc_ipv4: OffloadParameters::RSC_ENABLED,
        rsc_ipv6: OffloadParameters::RSC_ENABLED,
        ..OffloadParameters::default()
    };
    let length = parameters.finish(Version::V61);
    let info = parameters.as_bytes()[..length].to_vec();
    assert_eq!(guest.set(Oid::TCP_OFFLOAD_PARAMETERS, &info), 0);
    for network in [Network::V4, Network::V6] {
        let (header, frame, whole) = large_frame(network);
        guest.peer.send(header, &[&frame]).unwrap();
        let received = guest.frame();
        assert_eq!(received.frame, whole);
        assert!(received.fragments > 30);
        let checksum = RxChecksum(received.info.checksum.unwrap());
        assert!(checksum.has(RxChecksum::TCP_SUCCEEDED));
    }
    assert_eq!(guest.count("synthetic.rx_coalesced"), 2);
}

#[test]
fn the_packet_filter_decides() {
    let mut guest = Guest::new(|_| ());
    guest.connect(1514);
    let broadcast = plain_frame([0xff; 6], 60, 1);
    let multicast = plain_frame([0x33, 0x33, 0, 0, 0, 1], 60, 2);
    let directed = plain_frame(MAC, 60, 3);
    let foreign = plain_frame([2, 9, 9, 9, 9, 9], 60, 4);
    let all = [&broadcast, &multicast, &directed, &foreign];
    let none = PacketFilter::default();
    for (filter, expected) in [
        (none, &[][..]),
        (PacketFilter::BROADCAST, &[&broadcast]),
        (PacketFilter::ALL_MULTICAST, &[&multicast]),
        (PacketFilter::DIRECTED, &[&directed]),
        (
            PacketFilter::DIRECTED.with(PacketFilter::BROADCAST),
            &[&broadcast, &directed],
        ),
        (PacketFilter::PROMISCUOUS, &all),
        (none, &[]),
    ] {
        guest.filter(filter);
        for frame in all {
            guest.peer_sends(frame);
        }
        for frame in expected {
            assert_eq!(&guest.frame().frame, *frame);
        }
        guest.none(|guest| guest.frames.pop_front());
    }
    // Another address, and the permanent one still.
    guest.up();
    let other: Mac = [0x0a, 1, 2, 3, 4, 5];
    let mut info = [0; ConfigParameter::MAC_INFO_SIZE];
    ConfigParameter::encode_mac(&other, &mut info).unwrap();
    assert_eq!(guest.set(Oid::GEN_RNDIS_CONFIG_PARAMETER, &info), 0);
    for mac in [other, MAC] {
        let frame = plain_frame(mac, 60, 5);
        guest.peer_sends(&frame);
        assert_eq!(guest.frame().frame, frame);
    }
    assert_eq!(guest.query(Oid::CURRENT_ADDRESS, &[]).1, other);
    // After a halt there is nothing.
    guest.halt();
    guest.peer_sends(&directed);
    guest.none(|guest| guest.frames.pop_front());
}

#[test]
fn subchannels_share_the_traffic() {
    let mut guest = Guest::new(|config| config.max_channels = 4);
    guest.connect(1514);
    // More than there are.
    assert_eq!(guest.subchannels(15), 3);
    let version = guest.version;
    let message = guest.wait("send table", |guest| guest.inband.pop_front());
    let table = HostMessage::parse(&message, version).unwrap();
    let expected = std::array::from_fn(|i| i as u32 % 4);
    assert_eq!(table, HostMessage::SendIndirectionTable(expected));
    assert_eq!(guest.nic.status().channels, 4);

    let key = std::array::from_fn(|i| (i * 37 + 11) as u8);
    let types = HashTypes::TOEPLITZ
        .with(HashTypes::IPV4)
        .with(HashTypes::TCP_IPV4);
    let entries: Vec<u16> = (0..128).map(|i| i % 4).collect();
    let mut buffer = [0; 2048];
    let length = RssParameters::encode(0, types, &entries, &key, &mut buffer).unwrap();
    let status = guest.set(Oid::GEN_RECEIVE_SCALE_PARAMETERS, &buffer[..length]);
    assert_eq!(status, 0);
    guest.up();
    let mut seen = [0; 4];
    for port in 0..64u16 {
        let mut frame = frame_to_guest(ACK, b"x");
        frame[34..36].copy_from_slice(&(1000 + port).to_be_bytes());
        guest.peer_sends(&frame);
        let received = guest.frame();
        assert_eq!(received.frame, frame);
        let hash = received.info.hash.unwrap();
        assert_eq!(u32::from(received.channel), hash % 4);
        seen[usize::from(received.channel)] += 1;
    }
    assert!(seen.iter().all(|&count| count > 4), "{seen:?}");
    // Frames leave by each channel; completions come back there.
    for channel in 0..4 {
        let frame = plain_frame(PEER, 60, channel as u8);
        let status = guest.send_pages(channel, &packet_message(&frame, &[], 0), false);
        assert_eq!(status, 1);
        assert_eq!(guest.at_peer().1, frame);
    }
    // A table with a channel that there is not.
    let length = RssParameters::encode(0, types, &[4; 128], &key, &mut buffer).unwrap();
    assert_ne!(
        guest.set(Oid::GEN_RECEIVE_SCALE_PARAMETERS, &buffer[..length]),
        0
    );
    // RSS off: all on the primary.
    let flags = RssParameters::DISABLE;
    let length = RssParameters::encode(flags, types, &entries, &key, &mut buffer).unwrap();
    assert_eq!(
        guest.set(Oid::GEN_RECEIVE_SCALE_PARAMETERS, &buffer[..length]),
        0
    );
    guest.peer_sends(&frame_to_guest(ACK, b"y"));
    let received = guest.frame();
    assert_eq!((received.channel, received.info.hash), (0, None));
}

#[test]
fn old_versions_have_no_subchannels() {
    let mut guest = Guest::new(|config| config.max_version = Version::V4);
    guest.connect(1514);
    assert_eq!(guest.subchannels(1), 0);
    let (status, _) = guest.query(
        Oid::GEN_RECEIVE_SCALE_CAPABILITIES,
        RssCapabilities::request().as_bytes(),
    );
    assert_ne!(status, 0);
}

#[test]
fn sections_are_held_until_completed() {
    let mut guest = Guest::new(|_| ());
    guest.open(0);
    assert!(guest.init(Version::V61));
    // Room for ten frames.
    guest.buffers(10 * 1728 + 100, 1 << 20);
    guest.rndis_initialize();
    guest.up();
    guest.hold = true;
    for i in 0..15 {
        guest.peer_sends(&plain_frame(MAC, 60, i));
    }
    for i in 0..10 {
        assert_eq!(guest.frame().frame, plain_frame(MAC, 60, i));
    }
    // The others wait in vain.
    guest.wait("drops", |guest| {
        (guest.count("synthetic.rx_dropped") == 5).then_some(())
    });
    guest.none(|guest| guest.frames.pop_front());
    assert_eq!(guest.count("synthetic.rx_no_room"), 5);
    assert_eq!(guest.count("synthetic.rx_sections_held"), 10);
    guest.hold = false;
    for (channel, id) in std::mem::take(&mut guest.held) {
        guest.complete(channel, id);
    }
    for i in 0..40 {
        guest.peer_sends(&plain_frame(MAC, 60, i));
        assert_eq!(guest.frame().frame, plain_frame(MAC, 60, i));
    }
    assert_eq!(guest.count("synthetic.rx_dropped"), 5);
    // A completion of nothing.
    guest.complete(0, 0xdead);
    guest.wait("error", |guest| {
        (guest.count("protocol_errors") == 1).then_some(())
    });
}

#[test]
fn a_full_ring_loses_nothing_in_time() {
    let mut guest = Guest::new(|_| ());
    guest.connect(1514);
    guest.up();
    lock(&guest.channels[0].rings).room = 2;
    for round in 0..30 {
        for i in 0..8 {
            guest.peer_sends(&plain_frame(MAC, 60, round * 8 + i));
        }
        for i in 0..8 {
            assert_eq!(guest.frame().frame, plain_frame(MAC, 60, round * 8 + i));
        }
    }
    // Many completions through a narrow ring.
    let message = packet_message(&plain_frame(PEER, 60, 0), &[], 0);
    for _ in 0..50 {
        assert_eq!(guest.send_pages(0, &message, false), 1);
        guest.at_peer();
    }
    assert_eq!(guest.count("synthetic.rx_dropped"), 0);
}

#[test]
fn buffers_are_checked() {
    let mut guest = Guest::new(|_| ());
    guest.open(0);
    assert!(guest.init(Version::V2));
    let mut status = |gpadl, size| {
        lock(&guest.buffers).insert(gpadl, Memory::new(size));
        let answer = guest.request(&nvsp::SendReceiveBuffer {
            gpadl: U32::new(RECEIVE_GPADL),
            id: nvsp::RECEIVE_BUFFER_ID.into(),
        });
        let answer: nvsp::SendReceiveBufferComplete = nvsp::decode(&answer).unwrap();
        answer.status.get()
    };
    assert_eq!(status(1, 4096), 2, "no such GPADL");
    assert_eq!(status(RECEIVE_GPADL, 1000), 2, "no section fits");
    assert_eq!(
        status(RECEIVE_GPADL, 16 << 20),
        2,
        "too large for version 2"
    );
    assert_eq!(status(RECEIVE_GPADL, 15 << 20), 1);
    assert_eq!(status(RECEIVE_GPADL, 15 << 20), 2, "there is one already");
}

#[test]
fn messages_out_of_order_are_refused() {
    let mut guest = Guest::new(|_| ());
    guest.open(0);
    assert!(guest.request(&nvsp::SwitchDataPath::default()).is_empty());
    assert_eq!(guest.count("protocol_errors"), 1);
    assert!(!guest.port.data_path_is_vf());
    // Short, empty, unknown.
    for (i, payload) in [&[1u8, 0, 0, 0, 1][..], &[], &[200, 0, 0, 0]]
        .iter()
        .enumerate()
    {
        let id = 1000 + i as u64;
        guest.channels[0].put(PacketKind::InBand, id, true, payload);
        let answer = guest.wait("completion", |guest| guest.completions.remove(&id));
        assert!(answer.is_empty());
    }
    assert_eq!(guest.count("protocol_errors"), 4);
    assert!(guest.init(Version::V61));
}

#[derive(Default)]
struct FakeVf {
    frames: Mutex<Vec<Vec<u8>>>,
    not_ready: std::sync::atomic::AtomicBool,
}

impl VfSink for FakeVf {
    fn deliver(&self, frame: RxFrame<'_>) -> Delivery {
        assert_eq!(frame.gso_size, None);
        if self.not_ready.load(std::sync::atomic::Ordering::Relaxed) {
            return Delivery::NotReady;
        }
        lock(&self.frames).push(frame.data.to_vec());
        Delivery::Delivered
    }
}

impl FakeVf {
    fn take(&self) -> Option<Vec<Vec<u8>>> {
        let frames = std::mem::take(&mut *lock(&self.frames));
        (!frames.is_empty()).then_some(frames)
    }
}

#[test]
fn frames_go_by_one_path_only() {
    let mut guest = Guest::new(|_| ());
    guest.connect(1514);
    guest.up();
    let vf = Arc::new(FakeVf::default());
    let unicast = frame_to_guest(ACK, b"data");
    let syn = frame_to_guest(SYN, b"");
    let broadcast = plain_frame([0xff; 6], 60, 1);
    let multicast = plain_frame([1, 0, 0x5e, 0, 0, 1], 60, 2);
    let frames = [&unicast, &syn, &broadcast, &multicast];
    let check = |guest: &mut Guest, by_vf: bool| {
        for frame in frames {
            guest.peer_sends(frame);
        }
        if by_vf {
            let seen = guest.wait("frame on the VF", |_| vf.take());
            assert_eq!(seen, [unicast.clone()]);
        } else {
            assert_eq!(guest.frame().frame, unicast);
        }
        for frame in &frames[1..] {
            assert_eq!(&guest.frame().frame, *frame);
        }
        guest.none(|guest| guest.frames.pop_front());
        assert!(vf.take().is_none());
    };

    check(&mut guest, false);
    guest.port.set_vf_sink(Some(vf.clone()));
    // The VF is there, but the guest has not switched.
    check(&mut guest, false);
    guest.switch(nvsp::DataPath::VF);
    assert!(guest.nic.status().data_path_is_vf);
    check(&mut guest, true);
    // The VF does not take it.
    vf.not_ready
        .store(true, std::sync::atomic::Ordering::Relaxed);
    check(&mut guest, false);
    vf.not_ready
        .store(false, std::sync::atomic::Ordering::Relaxed);
    check(&mut guest, true);
    // The VF is taken away before the guest switches back.
    guest.port.set_vf_sink(None);
    check(&mut guest, false);
    guest.port.set_vf_sink(Some(vf.clone()));
    check(&mut guest, true);
    guest.switch(nvsp::DataPath::SYNTHETIC);
    check(&mut guest, false);
    assert_eq!(guest.count("vf.rx_packets"), 3);
    assert_eq!(guest.count("synthetic.rx_packets"), 8 * 4 - 3);
    assert_eq!(guest.count("data_path_switches"), 2);

    // Both paths transmit at any time.
    for _ in 0..2 {
        let mut frame = plain_frame(PEER, 60, 9);
        guest.port.deliver_from_vf(&mut frame, &Default::default());
        assert_eq!(guest.at_peer().1, frame);
        let message = packet_message(&frame, &[], 0);
        assert_eq!(guest.send_pages(0, &message, false), 1);
        assert_eq!(guest.at_peer().1, frame);
        guest.switch(nvsp::DataPath::VF);
    }
    assert_eq!(guest.count("vf.tx_packets"), 2);
    // The driver goes away: the switch ends.
    guest.close();
    assert!(!guest.port.data_path_is_vf());
    guest.peer_sends(&unicast);
    std::thread::sleep(Duration::from_millis(20));
    assert!(vf.take().is_none());
}

#[test]
fn large_frames_are_segmented_for_the_vf() {
    let mut guest = Guest::new(|_| ());
    guest.connect(1514);
    guest.up();
    let vf = Arc::new(FakeVf::default());
    guest.port.set_vf_sink(Some(vf.clone()));
    guest.switch(nvsp::DataPath::VF);
    let (header, frame, _) = large_frame(Network::V4);
    guest.peer.send(header, &[&frame]).unwrap();
    let expected = 50_000usize.div_ceil(1448);
    guest.wait("segments", |_| {
        (lock(&vf.frames).len() == expected).then_some(())
    });
    for frame in vf.take().unwrap() {
        assert!(frame.len() <= 54 + 1448);
        let state = frame::verify_checksums(&frame, false);
        assert_eq!(state.transport, Some((frame::Transport::Tcp, true)));
    }
}

#[test]
fn the_vf_is_announced_when_the_driver_is_ready() {
    let mut guest = Guest::new(|_| ());
    guest.nic.set_vf_association(Some(3));
    guest.connect(1514);
    guest.none(|guest| guest.inband.pop_front());
    guest.up();
    assert_eq!(guest.association(), (1, 3));
    guest.nic.set_vf_association(None);
    assert_eq!(guest.association(), (0, 3));
    guest.nic.set_vf_association(Some(4));
    assert_eq!(guest.association(), (1, 4));
    guest.nic.set_vf_association(Some(5));
    assert_eq!(guest.association(), (0, 4));
    assert_eq!(guest.association(), (1, 5));
    guest.nic.set_vf_association(Some(5));
    guest.none(|guest| guest.inband.pop_front());
    assert_eq!(guest.nic.status().association, Some(5));
    // A driver that starts again is told again; without opening its interface a little later.
    guest.close();
    assert_eq!(guest.nic.status().association, None);
    guest.connect(1514);
    assert_eq!(guest.association(), (1, 5));
}

#[test]
fn a_driver_without_sriov_is_not_told_of_the_vf() {
    for version in Version::ALL {
        let mut guest = Guest::new(|config| config.max_version = version);
        guest.nic.set_vf_association(Some(3));
        guest.connect(1514);
        guest.up();
        if version >= Version::V4 {
            assert_eq!(guest.association(), (1, 3));
        } else {
            guest.none(|guest| guest.inband.pop_front());
        }
    }
    // Of version 5 on the driver says what it is capable of.
    let mut guest = Guest::new(|_| ());
    guest.nic.set_vf_association(Some(3));
    guest.open(0);
    assert!(guest.init(Version::V61));
    guest.buffers(1 << 20, 1 << 20);
    guest.rndis_initialize();
    guest.up();
    guest.none(|guest| guest.inband.pop_front());
}

#[test]
fn link_events_are_indicated() {
    let mut guest = Guest::new(|_| ());
    guest.nic.set_link(false);
    guest.connect(1514);
    guest.up();
    assert_eq!(guest.query_word(Oid::GEN_MEDIA_CONNECT_STATUS), 1);
    let indication = |guest: &mut Guest| {
        let bytes = guest.wait("indication", |guest| guest.answers.pop_front());
        let indication = rndis::Message::indication(&bytes).unwrap();
        (indication.status, indication.buffer.to_vec())
    };
    // Nothing passes without link.
    guest.peer_sends(&plain_frame(MAC, 60, 1));
    guest.none(|guest| guest.frames.pop_front());
    guest.nic.set_link(true);
    assert_eq!(
        indication(&mut guest),
        (rndis::Status::MEDIA_CONNECT, vec![])
    );
    guest.peer_sends(&plain_frame(MAC, 60, 2));
    assert_eq!(guest.frame().frame, plain_frame(MAC, 60, 2));
    guest.nic.set_link(false);
    assert_eq!(
        indication(&mut guest),
        (rndis::Status::MEDIA_DISCONNECT, vec![])
    );
    guest.nic.set_link_speed(1000);
    assert_eq!(
        indication(&mut guest),
        (
            rndis::Status::LINK_SPEED_CHANGE,
            10_000_000u32.to_le_bytes().to_vec()
        )
    );
    assert_eq!(guest.query_word(Oid::GEN_LINK_SPEED), 10_000_000);
    guest.nic.change_network();
    assert_eq!(
        indication(&mut guest),
        (rndis::Status::NETWORK_CHANGE, vec![])
    );
}

#[test]
fn faults() {
    let mut guest = Guest::new(|_| ());
    guest.connect(1514);
    let inject = |guest: &Guest, point, action| {
        guest.nic.inject(Fault {
            point,
            action,
            times: 1,
        });
    };
    let switch = FaultPoint::Nvsp(MessageType::SWITCH_DATA_PATH);
    inject(&guest, switch, FaultAction::Mute);
    let id = guest.post(&nvsp::SwitchDataPath::default(), true);
    guest.none(|guest| guest.completions.remove(&id));
    inject(
        &guest,
        switch,
        FaultAction::Delay(Duration::from_millis(100)),
    );
    let start = Instant::now();
    guest.switch(nvsp::DataPath::SYNTHETIC);
    assert!(start.elapsed() >= Duration::from_millis(100));
    // Once only.
    guest.switch(nvsp::DataPath::SYNTHETIC);
    let object = FaultPoint::Object(Oid::GEN_LINK_SPEED);
    inject(&guest, object, FaultAction::Truncate(20));
    let mut buffer = [0; 64];
    let length = rndis::encode_request(
        rndis::MessageType::QUERY,
        1,
        Oid::GEN_LINK_SPEED,
        &[],
        &mut buffer,
    )
    .unwrap();
    assert_eq!(guest.control(&buffer[..length]).len(), 20);
    inject(
        &guest,
        FaultPoint::Rndis(rndis::MessageType::QUERY),
        FaultAction::Duplicate,
    );
    let first = guest.control(&buffer[..length]);
    let second = guest.wait("answer", |guest| guest.answers.pop_front());
    assert_eq!(first, second);

    let subchannels = FaultPoint::Nvsp(MessageType::SUBCHANNEL);
    inject(&guest, subchannels, FaultAction::Refuse);
    assert_eq!(guest.subchannels(1), 0);
    assert_eq!(guest.subchannels(1), 1);
}

#[test]
fn settings_change_the_host() {
    let mut guest = Guest::new(|_| ());
    guest.nic.adjust(|settings| {
        settings.receive_section_size = Some(2001);
        settings.subchannels = Some(1);
    });
    guest.connect(1514);
    assert_eq!(guest.section_size, 2001);
    assert_eq!(guest.subchannels(3), 1);
    guest.up();

    // The messages that have connected it are counted, too.
    let before = guest.count("synthetic.tx_in_pages");
    let message = packet_message(&plain_frame(PEER, 100, 1), &[], 0);
    guest
        .nic
        .adjust(|settings| settings.packet_status = Some(7));
    assert_eq!(guest.send_pages(0, &message, false), 7);
    guest.nic.adjust(|settings| {
        settings.packet_status = None;
        settings.hold_completions = Some(1);
    });
    let id = guest.next_id;
    guest.pages.write_at(0, &message).unwrap();
    let range = GpaRange {
        byte_count: message.len() as u32,
        byte_offset: 0,
        pfns: vec![0],
    };
    let head = nvsp::encode(&nvsp::SendRndisPacket {
        channel_type: U32::ZERO,
        section_index: U32::new(nvsp::INVALID_SECTION),
        section_size: U32::ZERO,
    });
    guest.channels[0].put(PacketKind::GpaDirect(vec![range]), id, true, &head);
    guest.none(|guest| guest.completions.remove(&id));
    // It was taken nevertheless.
    assert_eq!(guest.count("synthetic.tx_in_pages"), before + 2);
    guest
        .nic
        .adjust(|settings| settings.hold_completions = None);
    guest.wait("completion", |guest| guest.completions.remove(&id));
}

#[test]
fn messages_are_sent_as_they_are() {
    let mut guest = Guest::new(|_| ());
    assert!(guest.nic.send_raw(&Raw::Nvsp(Vec::new())).is_err());
    guest.connect(1514);
    guest.up();
    let send = |guest: &Guest, raw| guest.nic.send_raw(&raw);
    send(&guest, Raw::Nvsp(vec![1, 2, 3])).unwrap();
    let message = guest.wait("message", |guest| guest.inband.pop_front());
    assert_eq!(message, [1, 2, 3]);
    send(&guest, Raw::Completion(0xdead, vec![4])).unwrap();
    let completion = guest.wait("completion", |guest| guest.completions.remove(&0xdead));
    assert_eq!(completion, [4]);
    let frame = plain_frame(MAC, 300, 9);
    let messages = vec![packet_message(&frame, &[(PpiType::HASH_VALUE, 5)], 0)];
    let rndis = |messages| Raw::Rndis {
        control: false,
        messages,
    };
    send(&guest, rndis(messages)).unwrap();
    let received = guest.frame();
    assert_eq!((received.frame, received.info.hash), (frame, Some(5)));
    assert!(send(&guest, rndis(vec![vec![0; 1729]])).is_err());
}

#[test]
fn keepalive_and_reset_are_answered() {
    let mut guest = Guest::new(|_| ());
    guest.connect(1514);
    let mut buffer = [0; 64];
    let body = rndis::Keepalive {
        request_id: U32::new(9),
    };
    let length = rndis::encode(rndis::MessageType::KEEPALIVE, &body, &[], &mut buffer).unwrap();
    let answer = guest.control(&buffer[..length]);
    let answer = rndis::Message::parse(&answer).unwrap();
    assert_eq!(answer.message_type, rndis::MessageType::KEEPALIVE_COMPLETE);
    assert_eq!(answer.request_id(), Ok(9));
    let length = rndis::encode(rndis::MessageType::RESET, &U32::ZERO, &[], &mut buffer).unwrap();
    let answer = guest.control(&buffer[..length]);
    let (header, _) = rndis::Header::read_from_prefix(&answer).unwrap();
    assert_eq!(
        header.message_type.get(),
        rndis::MessageType::RESET_COMPLETE.0
    );
}

#[test]
fn closing_under_load_is_clean() {
    let mut guest = Guest::new(|_| ());
    for _ in 0..5 {
        guest.connect(1514);
        guest.subchannels(3);
        guest.up();
        for i in 0..100 {
            if guest
                .peer
                .send(VnetHeader::default(), &[&plain_frame(MAC, 1000, i)])
                .is_err()
            {
                break;
            }
        }
        guest.close();
        guest.inband.clear();
        guest.frames.clear();
        assert_eq!(guest.nic.status().channels, 0);
    }
    assert_eq!(guest.count("protocol_errors"), 0);
}
