// SPDX-License-Identifier: GPL-2.0

//! A guest for tests: memory, a fake platform, and what a guest's VMBus driver does.

// Each test program uses its own part of this.
#![allow(dead_code)]

use std::{
    collections::VecDeque,
    sync::{
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
        Arc, Condvar, Mutex,
    },
    thread,
    time::{Duration, Instant},
};

use hyperv_wire::{
    ring::{ControlWord, Outgoing, Reader, RingMemory, Writer},
    vmbus::{
        ChannelId, GpadlBody, GpadlCreated, GpadlHeader, GpadlTeardown, GpadlTorndown,
        InitiateContact, MessageBuffer, MessageHeader, MessageType, OfferChannel, OpenChannel,
        OpenResult, PacketType, Version, VersionResponse, GPADL_BODY_PFNS, GPADL_HEADER_PFNS,
    },
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmbus_host::{
    Channel, Config, Counters, Device, Guid, HvStatus, MessageLog, Offer, OpenRefused, PacketKind,
    Platform, Usage, VmbusHost,
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// How long anything may take before a test fails.
pub const WAIT: Duration = Duration::from_secs(20);

/// How long nothing has to happen.
const QUIET: Duration = Duration::from_millis(20);

pub const NET: Guid = Guid::new(
    0x6045bde9,
    0x60a3,
    0x6045,
    [0xbd, 0xe9, 0x60, 0xa3, 0, 0, 0, 1],
);
pub const PCI: Guid = Guid::new(
    0xbad89801,
    0x3c09,
    0x4072,
    [0x91, 0x82, 0x76, 0x20, 0, 0, 0, 2],
);

const MEMORY: u64 = 4 << 20;
const INTERRUPT_PAGE: u64 = 0x1000;

/// A message of the host: processor, SINT, bytes.
type Posted = (u32, u8, Vec<u8>);

#[derive(Default)]
struct Delivered {
    messages: VecDeque<Posted>,
    events: Vec<(u32, u8, u16)>,
}

struct FakePlatform {
    memory: GuestMemoryMmap,
    delivered: Mutex<Delivered>,
    changed: Condvar,
    /// The page that the guest hides, 0 for none.
    hidden: AtomicU64,
}

impl Platform for FakePlatform {
    fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    fn is_shared(&self, pfn: u64) -> bool {
        pfn == 0 || pfn != self.hidden.load(Ordering::Relaxed)
    }

    fn vp_count(&self) -> u32 {
        2
    }

    fn post_message(&self, vp: u32, sint: u8, message_type: u32, payload: &[u8]) {
        assert_eq!(message_type, 1);
        let mut delivered = self.delivered.lock().unwrap();
        delivered.messages.push_back((vp, sint, payload.to_vec()));
        self.changed.notify_all();
    }

    fn signal_event(&self, vp: u32, sint: u8, flag: u16) {
        let mut delivered = self.delivered.lock().unwrap();
        delivered.events.push((vp, sint, flag));
        self.changed.notify_all();
    }

    fn signal_msi(&self, _address: u64, _data: u32) {}
}

pub struct Guest {
    platform: Arc<FakePlatform>,
    pub memory: GuestMemoryMmap,
    pub host: Arc<VmbusHost>,
    pub log: Arc<MessageLog>,
    pub counters: Arc<Counters>,
    message_connection: AtomicU32,
    next_page: AtomicU32,
}

/// A structure of the beginning of a message body.
pub fn read<T: FromBytes + KnownLayout + Immutable + Unaligned>(body: &[u8]) -> T {
    T::read_from_prefix(body).unwrap().0
}

pub fn channel_id(relid: u32) -> ChannelId {
    ChannelId {
        relid: relid.into(),
    }
}

pub fn open_message(offer: &OfferChannel, gpadl: u32, downstream: u32, vp: u32) -> OpenChannel {
    OpenChannel {
        relid: offer.relid,
        open_id: (0x1000 + offer.relid.get()).into(),
        ring_gpadl: gpadl.into(),
        target_vp: vp.into(),
        downstream_page_offset: downstream.into(),
        user_data: [0x77; 120],
    }
}

/// A guest that is connected.
pub fn connected(version: Version) -> Guest {
    let guest = Guest::new(Config::default());
    guest.connect(version);
    guest
}

impl Guest {
    pub fn new(config: Config) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
        let platform = Arc::new(FakePlatform {
            memory: memory.clone(),
            delivered: Mutex::default(),
            changed: Condvar::new(),
            hidden: AtomicU64::new(0),
        });
        let log = MessageLog::new(1000);
        let counters = Counters::new();
        let host = VmbusHost::new(platform.clone(), config, log.clone(), counters.clone());
        Self {
            platform,
            memory,
            host,
            log,
            counters,
            message_connection: AtomicU32::new(1),
            next_page: AtomicU32::new(512),
        }
    }

    /// Hides a page from the host, and shares the one before.
    pub fn hide(&self, pfn: u64) {
        self.platform.hidden.store(pfn, Ordering::Relaxed);
    }

    pub fn contact(&self, version: Version, connection: u32) -> HvStatus {
        self.contact_at(version, connection, 0, 2)
    }

    pub fn contact_at(&self, version: Version, connection: u32, vp: u32, sint: u8) -> HvStatus {
        let target = if version >= Version::V5_0 {
            u64::from(sint)
        } else {
            INTERRUPT_PAGE
        };
        let contact = InitiateContact {
            version: version.0.into(),
            target_vp: vp.into(),
            interrupt_page_or_target: target.into(),
            monitor_page_to_guest: 0x2000.into(),
            monitor_page_to_host: 0x3000.into(),
        };
        let message = MessageBuffer::new(MessageType::INITIATE_CONTACT, &contact).unwrap();
        self.host.post_message(connection, 1, message.as_bytes())
    }

    pub fn connect(&self, version: Version) {
        self.contact(version, if version >= Version::V5_0 { 4 } else { 1 });
        let response: VersionResponse = self.expect(MessageType::VERSION_RESPONSE);
        assert_eq!(response.version_supported, 1);
        self.message_connection
            .store(response.message_connection_id.get(), Ordering::Relaxed);
    }

    pub fn post(&self, message: &[u8]) -> HvStatus {
        let connection = self.message_connection.load(Ordering::Relaxed);
        self.host.post_message(connection, 1, message)
    }

    pub fn send<T: IntoBytes + Immutable>(&self, message_type: MessageType, body: &T) {
        self.send_with(message_type, body, &[]);
    }

    pub fn send_with<T: IntoBytes + Immutable>(
        &self,
        message_type: MessageType,
        body: &T,
        rest: &[u8],
    ) {
        let mut message = MessageBuffer::new(message_type, body).unwrap();
        message.push(rest).unwrap();
        assert_eq!(self.post(message.as_bytes()), 0);
    }

    fn next_posted(&self) -> Posted {
        let deadline = Instant::now() + WAIT;
        let mut delivered = self.platform.delivered.lock().unwrap();
        loop {
            if let Some(message) = delivered.messages.pop_front() {
                return message;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "no message from the host");
            delivered = self
                .platform
                .changed
                .wait_timeout(delivered, left)
                .unwrap()
                .0;
        }
    }

    /// The host's next message: type and body.
    pub fn next(&self) -> (MessageType, Vec<u8>) {
        let (_, _, message) = self.next_posted();
        let header: MessageHeader = read(&message);
        (
            MessageType(header.message_type.get()),
            message[8..].to_vec(),
        )
    }

    pub fn expect_at<T>(&self, message_type: MessageType, vp: u32, sint: u8) -> T
    where
        T: FromBytes + KnownLayout + Immutable + Unaligned,
    {
        let (to_vp, to_sint, message) = self.next_posted();
        assert_eq!((to_vp, to_sint), (vp, sint));
        let header: MessageHeader = read(&message);
        assert_eq!(MessageType(header.message_type.get()), message_type);
        assert_eq!(message.len(), 8 + size_of::<T>());
        read(&message[8..])
    }

    pub fn expect<T>(&self, message_type: MessageType) -> T
    where
        T: FromBytes + KnownLayout + Immutable + Unaligned,
    {
        self.expect_at(message_type, 0, 2)
    }

    pub fn expect_empty(&self, message_type: MessageType) {
        self.expect::<()>(message_type);
    }

    pub fn expect_nothing(&self) {
        thread::sleep(QUIET);
        let delivered = self.platform.delivered.lock().unwrap();
        assert_eq!(delivered.messages, []);
    }

    pub fn discard(&self) {
        *self.platform.delivered.lock().unwrap() = Delivered::default();
    }

    /// Interrupts since the last call.
    pub fn events(&self) -> Vec<(u32, u8, u16)> {
        std::mem::take(&mut self.platform.delivered.lock().unwrap().events)
    }

    /// The state after everything sent so far has been handled.
    pub fn usage(&self) -> Usage {
        self.host.usage()
    }

    pub fn wait_usage(&self, condition: impl Fn(&Usage) -> bool) -> bool {
        self.host.wait_usage(WAIT, condition)
    }

    pub fn assert_protocol_errors(&self, expected: u64) {
        let counter = self.counters.counter("vmbus.protocol_errors");
        self.host.wait_usage(WAIT, |_| counter.get() >= expected);
        assert_eq!(counter.get(), expected, "{:#?}", self.log.since(0).lines);
    }

    pub fn add(&self, device: Arc<Echo>) -> Arc<Echo> {
        self.host.add_device(device.clone()).unwrap();
        device
    }

    pub fn request_offers(&self) -> Vec<OfferChannel> {
        self.send(MessageType::REQUEST_OFFERS, &());
        let mut offers = Vec::new();
        loop {
            match self.next() {
                (MessageType::OFFER_CHANNEL, body) => offers.push(read(&body)),
                (MessageType::ALL_OFFERS_DELIVERED, _) => return offers,
                (other, _) => panic!("message {other} among offers"),
            }
        }
    }

    /// Sends the messages of a GPADL of one range.
    pub fn gpadl(&self, relid: u32, id: u32, pfns: &[u64], bytes: u32) {
        let header = GpadlHeader {
            relid: relid.into(),
            gpadl: id.into(),
            range_buffer_len: (8 + 8 * pfns.len() as u16).into(),
            range_count: 1.into(),
        };
        let (first, mut rest) = pfns.split_at(pfns.len().min(GPADL_HEADER_PFNS));
        let mut range = bytes.to_le_bytes().to_vec();
        range.extend_from_slice(&[0; 4]);
        range.extend(first.iter().flat_map(|pfn| pfn.to_le_bytes()));
        self.send_with(MessageType::GPADL_HEADER, &header, &range);
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(GPADL_BODY_PFNS));
            self.gpadl_body(id, now);
            rest = later;
        }
    }

    /// Sends a header of a GPADL with that many pages, and no page number.
    pub fn gpadl_begin(&self, relid: u32, id: u32, pages: u16) {
        let header = GpadlHeader {
            relid: relid.into(),
            gpadl: id.into(),
            range_buffer_len: (8 + 8 * pages).into(),
            range_count: 1.into(),
        };
        self.send(MessageType::GPADL_HEADER, &header);
    }

    pub fn gpadl_body(&self, id: u32, pfns: &[u64]) {
        let body = GpadlBody {
            message_number: 0.into(),
            gpadl: id.into(),
        };
        let pfns: Vec<u8> = pfns.iter().flat_map(|pfn| pfn.to_le_bytes()).collect();
        self.send_with(MessageType::GPADL_BODY, &body, &pfns);
    }

    pub fn establish(&self, relid: u32, id: u32, pfns: &[u64], bytes: u32) {
        self.gpadl(relid, id, pfns, bytes);
        let created: GpadlCreated = self.expect(MessageType::GPADL_CREATED);
        assert_eq!((created.relid.get(), created.gpadl.get()), (relid, id));
        assert_eq!(created.status.get(), 0);
    }

    /// Opens a channel with rings of two data pages each.
    pub fn open(&self, offer: &OfferChannel, vp: u32) -> GuestRings {
        let first = u64::from(self.next_page.fetch_add(6, Ordering::Relaxed));
        let id = first as u32;
        // Not in order, as a guest's pages may be.
        let pfns: Vec<u64> = [0, 2, 1, 5, 4, 3].map(|n| first + n).to_vec();
        for &pfn in &pfns {
            let zeros = [0_u8; 4096];
            self.memory
                .write_slice(&zeros, GuestAddress(pfn * 4096))
                .unwrap();
        }
        let relid = offer.relid.get();
        self.establish(relid, id, &pfns, 6 * 4096);
        self.send(MessageType::OPEN_CHANNEL, &open_message(offer, id, 3, vp));
        let result: OpenResult = self.expect(MessageType::OPEN_CHANNEL_RESULT);
        assert_eq!(result.status.get(), 0);
        assert_eq!(result.open_id.get(), 0x1000 + relid);
        if first > 900 {
            self.next_page.store(512, Ordering::Relaxed);
        }
        GuestRings::new(self, relid, id, offer.connection_id.get(), &pfns)
    }

    pub fn tear_down(&self, rings: &GuestRings) {
        self.send(
            MessageType::GPADL_TEARDOWN,
            &GpadlTeardown {
                relid: rings.relid.into(),
                gpadl: rings.gpadl.into(),
            },
        );
        let torndown: GpadlTorndown = self.expect(MessageType::GPADL_TORNDOWN);
        assert_eq!(torndown.gpadl.get(), rings.gpadl);
    }

    pub fn close(&self, rings: GuestRings) {
        self.send(MessageType::CLOSE_CHANNEL, &channel_id(rings.relid));
        self.tear_down(&rings);
    }

    /// The host's end of an open channel.
    pub fn memory_of(&self, device: &Echo, subchannel: u16) -> Arc<Channel> {
        let channels = device.channels.lock().unwrap();
        let channel = channels
            .iter()
            .find(|(channel, _)| channel.subchannel_index() == subchannel);
        channel.unwrap().0.clone()
    }

    fn mark_address(relid: u32) -> GuestAddress {
        GuestAddress(INTERRUPT_PAGE + 2048 + u64::from(relid / 8))
    }

    /// Marks a channel in the interrupt page.
    pub fn mark(&self, relid: u32) {
        let place = Self::mark_address(relid);
        let old: u8 = self.memory.read_obj(place).unwrap();
        self.memory
            .write_obj(old | (1 << (relid % 8)), place)
            .unwrap();
    }

    /// Number of bytes with marks.
    pub fn marks(&self) -> usize {
        let mut page = [0; 2048];
        self.memory
            .read_slice(&mut page, Self::mark_address(0))
            .unwrap();
        page.iter().filter(|&&byte| byte != 0).count()
    }
}

/// One ring as the guest sees it.
struct GuestRing {
    memory: GuestMemoryMmap,
    pfns: Vec<u64>,
}

impl RingMemory for GuestRing {
    fn data_len(&self) -> u32 {
        (self.pfns.len() as u32 - 1) * 4096
    }

    fn load(&self, word: ControlWord) -> u32 {
        let place = GuestAddress(self.pfns[0] * 4096 + u64::from(word.offset()));
        self.memory.load(place, Ordering::Acquire).unwrap()
    }

    fn store(&self, word: ControlWord, value: u32) {
        let place = GuestAddress(self.pfns[0] * 4096 + u64::from(word.offset()));
        self.memory.store(value, place, Ordering::Release).unwrap();
    }

    fn fence(&self) {
        std::sync::atomic::fence(Ordering::SeqCst);
    }

    fn read(&self, offset: u32, to: &mut [u8]) {
        for (n, byte) in to.iter_mut().enumerate() {
            *byte = self.memory.read_obj(self.place(offset + n as u32)).unwrap();
        }
    }

    fn write(&self, offset: u32, from: &[u8]) {
        for (n, &byte) in from.iter().enumerate() {
            self.memory
                .write_obj(byte, self.place(offset + n as u32))
                .unwrap();
        }
    }
}

impl GuestRing {
    fn place(&self, offset: u32) -> GuestAddress {
        let pfn = self.pfns[1 + offset as usize / 4096];
        GuestAddress(pfn * 4096 + u64::from(offset % 4096))
    }
}

/// A packet of the host: type, transaction id, bytes between descriptor and payload, payload. And
/// whether the host must be signalled.
pub type FromHost = (PacketType, u64, Vec<u8>, Vec<u8>, bool);

/// The guest's ends of an open channel.
pub struct GuestRings {
    relid: u32,
    gpadl: u32,
    connection: u32,
    writer: Writer<GuestRing>,
    reader: Reader<GuestRing>,
    platform: Arc<FakePlatform>,
    /// Page numbers of the guest-to-host ring.
    pub upstream: Vec<u64>,
    /// Page numbers of the host-to-guest ring.
    pub downstream: Vec<u64>,
}

impl GuestRings {
    fn new(guest: &Guest, relid: u32, gpadl: u32, connection: u32, pfns: &[u64]) -> Self {
        let ring = |pfns: &[u64]| GuestRing {
            memory: guest.memory.clone(),
            pfns: pfns.to_vec(),
        };
        let writer = Writer::new(ring(&pfns[..3])).unwrap();
        writer.announce_pending_send_size();
        Self {
            relid,
            gpadl,
            connection,
            writer,
            reader: Reader::new(ring(&pfns[3..])).unwrap(),
            platform: guest.platform.clone(),
            upstream: pfns[..3].to_vec(),
            downstream: pfns[3..].to_vec(),
        }
    }

    /// Writes a packet; whether the host must be signalled is the result.
    pub fn write(&mut self, packet: &Outgoing<'_>) -> bool {
        self.writer.write(packet).unwrap()
    }

    pub fn signal(&self, guest: &Guest) {
        assert_eq!(guest.host.signal_event(self.connection, 0), 0);
    }

    fn inband(&mut self, transaction_id: u64, payload: &[u8]) -> bool {
        self.write(&Outgoing {
            packet_type: PacketType::DATA_INBAND,
            flags: 1,
            transaction_id,
            header: &[],
            payload,
        })
    }

    /// Sends a packet and signals the host if it has to be.
    pub fn send(&mut self, guest: &Guest, transaction_id: u64, payload: &[u8]) {
        if self.inband(transaction_id, payload) {
            self.signal(guest);
        }
    }

    /// As `send`, by way of the interrupt page.
    pub fn send_marked(&mut self, guest: &Guest, transaction_id: u64, payload: &[u8]) {
        if self.inband(transaction_id, payload) {
            guest.mark(self.relid);
            self.signal(guest);
        }
    }

    /// The next packet if there is one.
    pub fn try_recv(&mut self) -> Option<FromHost> {
        let packet = self.reader.peek().unwrap()?;
        let mut header = vec![0; packet.header_len()];
        let mut payload = vec![0; packet.payload_len()];
        self.reader.read_header(&packet, &mut header);
        self.reader.read_payload(&packet, &mut payload);
        self.reader.advance(packet);
        let signal = self.reader.publish();
        Some((
            packet.packet_type(),
            packet.transaction_id(),
            header,
            payload,
            signal,
        ))
    }

    /// Waits for a completion: transaction id and payload.
    pub fn recv(&mut self) -> (u64, Vec<u8>) {
        let deadline = Instant::now() + WAIT;
        loop {
            if let Some((packet_type, transaction_id, _, payload, _)) = self.try_recv() {
                assert_eq!(packet_type, PacketType::COMPLETION);
                return (transaction_id, payload);
            }
            assert!(Instant::now() < deadline, "no packet from the host");
            let delivered = self.platform.delivered.lock().unwrap();
            // Woken by the interrupt; polls as well, since one may have come before.
            drop(
                self.platform
                    .changed
                    .wait_timeout(delivered, Duration::from_millis(1)),
            );
        }
    }
}

/// A device that completes every packet with its own payload.
pub struct Echo {
    name: String,
    instance: Guid,
    refuse: AtomicBool,
    calls: Mutex<Vec<String>>,
    channels: Mutex<Vec<(Arc<Channel>, thread::JoinHandle<()>)>>,
}

impl Echo {
    pub fn new(name: &str, instance: Guid) -> Arc<Self> {
        Arc::new(Self {
            name: name.into(),
            instance,
            refuse: AtomicBool::new(false),
            calls: Mutex::default(),
            channels: Mutex::default(),
        })
    }

    pub fn refuse(&self, refuse: bool) {
        self.refuse.store(refuse, Ordering::Relaxed);
    }

    /// What was called since the last time.
    pub fn log(&self) -> Vec<String> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }
}

fn echo(channel: &Channel) {
    while channel.wait(None).is_ok() {
        loop {
            match channel.recv() {
                Ok(Some(packet)) => {
                    assert_eq!(packet.kind, PacketKind::InBand);
                    assert!(packet.completion_requested);
                    // Fails only if the channel was closed meanwhile.
                    if channel
                        .send_completion(packet.transaction_id, &packet.payload)
                        .is_err()
                    {
                        return;
                    }
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
}

impl Device for Echo {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn offer(&self) -> Offer {
        Offer::new(hyperv_wire::vmbus::class::NETWORK, self.instance)
    }

    fn open(&self, channel: Arc<Channel>) -> Result<(), OpenRefused> {
        if self.refuse.load(Ordering::Relaxed) {
            return Err(OpenRefused("told to".into()));
        }
        let index = channel.subchannel_index();
        self.calls.lock().unwrap().push(format!("open {index}"));
        let worker = thread::spawn({
            let channel = channel.clone();
            move || echo(&channel)
        });
        self.channels.lock().unwrap().push((channel, worker));
        Ok(())
    }

    fn close(&self, subchannel_index: u16) {
        let (channel, worker) = {
            let mut channels = self.channels.lock().unwrap();
            let at = channels
                .iter()
                .position(|(channel, _)| channel.subchannel_index() == subchannel_index)
                .unwrap();
            channels.remove(at)
        };
        assert!(channel.is_closed());
        worker.join().unwrap();
        self.calls
            .lock()
            .unwrap()
            .push(format!("close {subchannel_index}"));
    }
}
