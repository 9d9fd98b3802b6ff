// SPDX-License-Identifier: GPL-2.0

//! The worker of an open channel: takes the guest's packets and answers them.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::os::fd::AsRawFd;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use hyperv_wire::nvsp::{self, Capabilities, DataPath, GuestMessage, MessageType, Version};
use hyperv_wire::rndis;
use hyperv_wire::vmbus::PAGE_SIZE;
use vmbus_host::{Direction, Packet, PacketKind, RecvError, SendError};
use vmm_sys_util::eventfd::EventFd;
use zerocopy::little_endian::U32;

use crate::config::{FaultAction, FaultPoint, Settings};
use crate::device::{lock, SendBuffer, Shared, Wanted};
use crate::frame::{self, TxOffload};
use crate::poll;
use crate::receive::section_size;
use crate::transport::Transport;

/// Size of the sections of the send buffer.
const SEND_SECTION: u32 = 6144;

/// Longest chain of memory ranges of a packet.
const MAX_MDL_CHAIN: u32 = 34;

/// Longest data of one packet: a send section, and pages with a packet of the largest size.
const MAX_DATA: u64 = 256 * 1024;

/// Packets taken from the ring before they are completed, and the worker looks at its other duties.
const BATCH: usize = 16;

/// How long a driver that has started RNDIS must be silent until it is told of the VF, unless it
/// opens its interface or asks for subchannels before. It then has registered its interface, and
/// the kernel's log tells of the VF under the interface's name.
const QUIET: Duration = Duration::from_secs(1);

/// How often it is looked whether packets still stay in the ring, or without completion.
const HOLD: Duration = Duration::from_millis(20);

/// An answer on its way to the guest.
pub(crate) enum Answer {
    /// A completion with this payload.
    Completion(u64, Vec<u8>),
    /// An RNDIS message.
    Control(Vec<u8>),
}

/// What has been negotiated on the primary channel.
pub(crate) struct Session {
    pub(crate) version: Version,
    /// Largest frame with Ethernet header.
    pub(crate) max_frame: u32,
    pub(crate) capabilities: Capabilities,
    /// When the guest may be told of the VF.
    vf_ready: Option<Instant>,
    /// What the guest knows.
    told: Wanted,
    granted: u16,
    table_due: bool,
}

/// The worker of a channel.
pub(crate) struct Worker {
    pub(crate) shared: Arc<Shared>,
    transport: Arc<dyn Transport>,
    stop: Arc<EventFd>,
    /// Completions that wait for room in the ring.
    waiting: VecDeque<(u64, Vec<u8>)>,
    deferred: Vec<(Instant, Answer)>,
    /// Completions that are held back by a setting.
    held: Vec<(u64, Vec<u8>)>,
    pub(crate) session: Option<Session>,
    data: Vec<u8>,
}

/// The channel is closed or broken.
struct Ended;

/// Waiting for room in the ring.
enum Blocked {
    Full,
    Ended,
}

impl Worker {
    pub(crate) fn new(
        shared: Arc<Shared>,
        transport: Arc<dyn Transport>,
        stop: Arc<EventFd>,
    ) -> Self {
        Self {
            shared,
            transport,
            stop,
            waiting: VecDeque::new(),
            deferred: Vec::new(),
            held: Vec::new(),
            session: None,
            data: Vec::new(),
        }
    }

    fn is_primary(&self) -> bool {
        self.transport.subchannel_index() == 0
    }

    /// Works until the channel is closed.
    pub(crate) fn run(mut self) {
        let stop = self.stop.as_raw_fd();
        // Only the primary's worker is woken for what the host wants.
        let kick = if self.is_primary() {
            self.shared.kick.as_raw_fd()
        } else {
            stop
        };
        let fds = [self.transport.event_fd(), kick, stop];
        loop {
            let more = match self.turn() {
                Ok(more) => more,
                Err(Ended) => return,
            };
            let timeout = if more {
                Some(Duration::ZERO)
            } else {
                self.next_deadline()
                    .map(|deadline| deadline.saturating_duration_since(Instant::now()))
            };
            let Ok(ready) = poll::wait(&fds, timeout) else {
                return;
            };
            if ready[2] {
                return;
            }
            if ready[0] {
                self.transport.clear_event();
            }
            if ready[1] {
                // Fails if another turn has cleared it.
                let _ = self.shared.kick.read();
            }
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let settings = self.shared.settings();
        let holds = Settings::is_on(settings.hold_packets) || !self.held.is_empty();
        let hold = holds.then(|| Instant::now() + HOLD);
        let vf = self
            .session
            .as_ref()
            .filter(|session| self.association_differs(session))
            .and_then(|session| session.vf_ready);
        let deferred = self.deferred.iter().map(|&(when, _)| when);
        deferred.chain(vf).chain(hold).min()
    }

    /// Does what there is to do. Returns whether there may be more.
    fn turn(&mut self) -> Result<bool, Ended> {
        let now = Instant::now();
        while let Some(at) = self.deferred.iter().position(|&(when, _)| when <= now) {
            let (_, answer) = self.deferred.swap_remove(at);
            self.send_answer(answer);
        }
        let mut more = false;
        if !Settings::is_on(self.shared.settings().hold_completions) {
            self.waiting.extend(self.held.drain(..));
        }
        match self.send_waiting() {
            Ok(()) => {
                more = self.take_packets()?;
                match self.send_waiting() {
                    Ok(()) => {}
                    Err(Blocked::Full) => more = false,
                    Err(Blocked::Ended) => return Err(Ended),
                }
            }
            // The guest's packets wait, or their completions would have no end.
            Err(Blocked::Full) => {}
            Err(Blocked::Ended) => return Err(Ended),
        }
        if self.is_primary() {
            self.tell_guest();
        }
        self.shared.pump();
        Ok(more)
    }

    fn send_waiting(&mut self) -> Result<(), Blocked> {
        while let Some((transaction, payload)) = self.waiting.front() {
            match self.transport.send_completion(*transaction, payload) {
                Ok(()) => {}
                Err(SendError::Full) => return Err(Blocked::Full),
                Err(SendError::TooLarge) => {}
                Err(SendError::Closed | SendError::Ring(_)) => return Err(Blocked::Ended),
            }
            self.waiting.pop_front();
        }
        Ok(())
    }

    fn take_packets(&mut self) -> Result<bool, Ended> {
        if Settings::is_on(self.shared.settings().hold_packets) {
            return Ok(false);
        }
        for _ in 0..BATCH {
            match self.transport.recv() {
                Ok(Some(packet)) => self.packet(packet),
                Ok(None) => return Ok(false),
                Err(RecvError::Closed) => return Err(Ended),
                Err(error) => {
                    self.error(error);
                    // A packet that makes no sense was skipped; a broken ring stays broken.
                    if matches!(error, RecvError::Ring(_)) {
                        return Err(Ended);
                    }
                }
            }
        }
        Ok(true)
    }

    fn packet(&mut self, packet: Packet) {
        match packet.kind {
            PacketKind::Completion => {
                let status = nvsp::decode::<nvsp::SendRndisPacketComplete>(&packet.payload)
                    .map_or(0, |complete| complete.status.get());
                self.record_data("NVSP_COMPLETION", "", &packet.payload);
                let index = usize::from(self.transport.subchannel_index());
                let known = self
                    .shared
                    .receive()
                    .complete(index, packet.transaction_id, status);
                if !known {
                    self.error(format_args!(
                        "completion of unknown transaction {:#x}",
                        packet.transaction_id
                    ));
                }
            }
            PacketKind::InBand | PacketKind::GpaDirect(_) => {
                match GuestMessage::parse(&packet.payload) {
                    Ok(GuestMessage::SendRndisPacket(message)) => {
                        self.rndis_packet(&packet, &message);
                    }
                    Ok(message) => self.message(&packet, message),
                    Err(error) => {
                        self.error(error);
                        self.complete_empty(&packet);
                    }
                }
            }
            PacketKind::TransferPages { .. } => self.error("transfer pages from the guest"),
            PacketKind::Other(kind) => self.error(format_args!("packet type {kind}")),
        }
    }

    fn error(&self, what: impl std::fmt::Display) {
        self.shared.protocol_error(self.transport.name(), what);
    }

    pub(crate) fn record(&self, direction: Direction, name: &str, fields: impl std::fmt::Display) {
        self.shared
            .record(direction, self.transport.name(), name, fields);
    }

    /// The same for a message whose bytes are at hand.
    pub(crate) fn record_message(
        &self,
        direction: Direction,
        name: &str,
        fields: impl std::fmt::Display,
        bytes: &[u8],
    ) {
        let log = &self.shared.log;
        log.record_message(direction, self.transport.name(), name, fields, bytes);
    }

    /// The same for what is logged only when all bytes are.
    fn record_data(&self, name: &str, fields: impl std::fmt::Display, bytes: &[u8]) {
        if self.shared.log.keeps_bytes() {
            self.record_message(Direction::GuestToHost, name, fields, bytes);
        }
    }

    /// Completes a packet that there is no answer for, if the guest waits for it.
    fn complete_empty(&mut self, packet: &Packet) {
        if packet.completion_requested {
            self.waiting.push_back((packet.transaction_id, Vec::new()));
        }
    }

    fn version(&self) -> Version {
        let tx = self.shared.tx.read();
        tx.unwrap_or_else(PoisonError::into_inner)
            .version
            .unwrap_or(Version::V1)
    }

    fn complete<B: nvsp::Body>(&mut self, packet: &Packet, body: &B) {
        // Drivers of all versions take the long form while a version is negotiated.
        let message = nvsp::encode(body);
        let length = nvsp::message_size(self.version());
        let answer = Answer::Completion(packet.transaction_id, message[..length].to_vec());
        // The request's type, by which faults are named, is that before the answer's.
        let request = match B::TYPE {
            MessageType::SUBCHANNEL => B::TYPE,
            MessageType(number) => MessageType(number - 1),
        };
        self.answer(&[FaultPoint::Nvsp(request)], answer);
    }

    /// Sends an answer, unless a fault was ordered for it.
    pub(crate) fn answer(&mut self, points: &[FaultPoint], mut answer: Answer) {
        match self.shared.fault(points) {
            None => {}
            Some(FaultAction::Mute) => {
                self.record(Direction::Host, "FAULT", "mute");
                return;
            }
            Some(FaultAction::Delay(time)) => {
                self.record(Direction::Host, "FAULT", format_args!("delay {time:?}"));
                self.deferred.push((Instant::now() + time, answer));
                return;
            }
            Some(FaultAction::Truncate(length)) => {
                self.record(
                    Direction::Host,
                    "FAULT",
                    format_args!("truncate to {length}"),
                );
                match &mut answer {
                    Answer::Completion(_, bytes) | Answer::Control(bytes) => bytes.truncate(length),
                }
            }
            Some(FaultAction::Duplicate) => {
                self.record(Direction::Host, "FAULT", "duplicate");
                self.send_answer(match &answer {
                    Answer::Completion(id, bytes) => Answer::Completion(*id, bytes.clone()),
                    Answer::Control(bytes) => Answer::Control(bytes.clone()),
                });
            }
            // Requests are refused before there is an answer.
            Some(FaultAction::Refuse) => {}
        }
        self.send_answer(answer);
    }

    /// Whether this request shall be refused.
    pub(crate) fn refuses(&self, request: FaultPoint) -> bool {
        self.shared.refuses(self.transport.name(), request)
    }

    fn send_answer(&mut self, answer: Answer) {
        match answer {
            Answer::Completion(transaction, payload) => {
                self.waiting.push_back((transaction, payload));
            }
            Answer::Control(message) => {
                let mut receive = self.shared.receive();
                let queued = receive.push_control(message);
                receive.pump();
                drop(receive);
                if !queued {
                    self.error("too many control messages wait for the guest");
                }
            }
        }
    }

    /// An NVSP message other than an RNDIS packet.
    fn message(&mut self, packet: &Packet, message: GuestMessage) {
        let ty = nvsp::message_type(&packet.payload).unwrap_or(MessageType(0));
        let name = format!("NVSP_{ty}");
        let mut fields = String::new();
        // Writing to a string does not fail.
        let _ = describe(&mut fields, &message);
        if self.shared.log.keeps_bytes() {
            let _ = write!(fields, " completion={}", packet.completion_requested);
        }
        self.record_message(Direction::GuestToHost, &name, &fields, &packet.payload);

        if !self.is_primary() {
            self.error(format_args!("{name} on a subchannel"));
            self.complete_empty(packet);
            return;
        }
        if let GuestMessage::Init(init) = message {
            self.init(packet, &init);
            return;
        }
        if self.session.is_none() {
            self.error(format_args!("{name} before a version was negotiated"));
            self.complete_empty(packet);
            return;
        }
        match message {
            GuestMessage::SendNdisVersion(_) => self.complete_empty(packet),
            GuestMessage::NdisConfig(config) => {
                if let Some(session) = &mut self.session {
                    session.max_frame = config.max_frame.get().clamp(68, 65535 + 14);
                    session.capabilities = Capabilities(config.capabilities.get());
                }
                self.complete_empty(packet);
            }
            GuestMessage::SendReceiveBuffer(buffer) => self.receive_buffer(packet, &buffer),
            GuestMessage::RevokeReceiveBuffer(_) => {
                self.shared.receive().revoke_buffer();
                self.complete_empty(packet);
            }
            GuestMessage::SendSendBuffer(buffer) => self.send_buffer(packet, &buffer),
            GuestMessage::RevokeSendBuffer(_) => {
                let tx = self.shared.tx.write();
                tx.unwrap_or_else(PoisonError::into_inner).send_buffer = None;
                self.complete_empty(packet);
            }
            GuestMessage::SwitchDataPath(switch) => {
                let path = DataPath(switch.active.get());
                if !self.shared.switch_data_path(path) {
                    self.error(format_args!("data path {}", path.0));
                }
                // This completion has no body.
                self.answer(
                    &[FaultPoint::Nvsp(MessageType::SWITCH_DATA_PATH)],
                    Answer::Completion(packet.transaction_id, Vec::new()),
                );
            }
            GuestMessage::SubchannelRequest(request) => self.subchannels(packet, &request),
            // A packet that is no completion, and one that is handled elsewhere.
            GuestMessage::SendRndisPacketComplete(_)
            | GuestMessage::SendRndisPacket(_)
            | GuestMessage::Init(_)
            | GuestMessage::Unknown(_) => {
                self.error(format_args!("unexpected {name}"));
                self.complete_empty(packet);
            }
        }
    }

    fn init(&mut self, packet: &Packet, init: &nvsp::Init) {
        let (min, max) = (init.min_version.get(), init.max_version.get());
        let newest = self.shared.config.max_version;
        let accepted = Version::ALL
            .into_iter()
            .find(|version| *version <= newest && (min..=max).contains(&version.0));
        let status = match accepted {
            Some(version) => {
                self.session = Some(Session {
                    version,
                    max_frame: 1514,
                    capabilities: Capabilities::default(),
                    vf_ready: None,
                    told: Wanted {
                        association: None,
                        ..lock(&self.shared.wanted).clone()
                    },
                    granted: 0,
                    table_due: false,
                });
                let tx = self.shared.tx.write();
                tx.unwrap_or_else(PoisonError::into_inner).version = Some(version);
                self.shared.receive().set_version(version);
                nvsp::Status::SUCCESS
            }
            None if min > newest.0 => nvsp::Status::VERSION_TOO_NEW,
            None => nvsp::Status::VERSION_UNSUPPORTED,
        };
        self.record(
            Direction::HostToGuest,
            "NVSP_INIT_COMPLETE",
            format_args!(
                "version={:#x} status={}",
                accepted.map_or(u32::MAX, |version| version.0),
                status.0
            ),
        );
        self.complete(
            packet,
            &nvsp::InitComplete {
                version: U32::new(accepted.map_or(u32::MAX, |version| version.0)),
                max_mdl_chain_length: U32::new(MAX_MDL_CHAIN),
                status: U32::new(status.0),
            },
        );
    }

    fn receive_buffer(&mut self, packet: &Packet, buffer: &nvsp::SendReceiveBuffer) {
        let max_frame = self.session.as_ref().map_or(1514, |s| s.max_frame);
        let limit = match self.session.as_ref().map(|session| session.version) {
            Some(version) if version > Version::V2 => nvsp::MAX_RECEIVE_BUFFER,
            _ => nvsp::MAX_RECEIVE_BUFFER_LEGACY,
        };
        let memory = self
            .transport
            .shared_memory(buffer.gpadl.get())
            .filter(|_| !self.refuses(FaultPoint::Nvsp(MessageType::SEND_RECEIVE_BUFFER)));
        let settings = self.shared.settings();
        let section = settings
            .receive_section_size
            .map_or(section_size(max_frame as usize), |size| size as usize);
        let sections = memory.and_then(|memory| {
            let mut receive = self.shared.receive();
            // A page more than the limit: drivers round up to pages.
            let right = memory.len() <= u64::from(limit + PAGE_SIZE) && !receive.has_buffer();
            right.then(|| receive.set_buffer(memory, section)).flatten()
        });
        let (status, size, count) = match sections {
            Some((size, count)) => (nvsp::Status::SUCCESS, size, count),
            None => (nvsp::Status::FAILURE, 0, 0),
        };
        let count = settings.receive_section_count.unwrap_or(count);
        let groups = settings.receive_groups.unwrap_or(u32::from(count != 0));
        let offset = settings.receive_section_offset.unwrap_or(0);
        self.record(
            Direction::HostToGuest,
            "NVSP_SEND_RECEIVE_BUFFER_COMPLETE",
            format_args!("status={} sections={count} size={size}", status.0),
        );
        self.complete(
            packet,
            &nvsp::SendReceiveBufferComplete {
                status: U32::new(status.0),
                num_sections: U32::new(groups),
                section: nvsp::ReceiveSection {
                    offset: U32::new(offset),
                    suballocation_size: U32::new(size),
                    num_suballocations: U32::new(count),
                    // Overflows only where a setting has made nonsense of it.
                    end_offset: U32::new(size.wrapping_mul(count)),
                },
            },
        );
    }

    fn send_buffer(&mut self, packet: &Packet, buffer: &nvsp::SendSendBuffer) {
        let memory = self
            .transport
            .shared_memory(buffer.gpadl.get())
            .filter(|memory| {
                (u64::from(SEND_SECTION)..=u64::from(nvsp::MAX_SEND_BUFFER + PAGE_SIZE))
                    .contains(&memory.len())
            })
            .filter(|_| !self.refuses(FaultPoint::Nvsp(MessageType::SEND_SEND_BUFFER)));
        let section = self.shared.settings().send_section_size;
        let section = section.unwrap_or(SEND_SECTION);
        let status = match memory {
            Some(memory) => {
                let tx = self.shared.tx.write();
                tx.unwrap_or_else(PoisonError::into_inner).send_buffer = Some(SendBuffer {
                    memory,
                    section_size: section,
                });
                nvsp::Status::SUCCESS
            }
            None => nvsp::Status::FAILURE,
        };
        self.record(
            Direction::HostToGuest,
            "NVSP_SEND_SEND_BUFFER_COMPLETE",
            format_args!("status={} section_size={section}", status.0),
        );
        self.complete(
            packet,
            &nvsp::SendSendBufferComplete {
                status: U32::new(status.0),
                section_size: U32::new(section),
            },
        );
    }

    fn subchannels(&mut self, packet: &Packet, request: &nvsp::SubchannelRequest) {
        let most = u32::from(self.shared.config.max_channels.max(1) - 1);
        let most = most.min(self.shared.settings().subchannels.unwrap_or(most));
        let wanted = request.num_subchannels.get();
        let right = request.operation.get() == nvsp::SubchannelOperation::ALLOCATE.0
            && self.version() >= Version::V5
            && wanted > 0
            && !self.refuses(FaultPoint::Nvsp(MessageType::SUBCHANNEL));
        let granted = if right { wanted.min(most) } else { 0 };
        let status = if granted > 0 {
            nvsp::Status::SUCCESS
        } else {
            nvsp::Status::FAILURE
        };
        if let Some(session) = &mut self.session {
            session.granted = granted as u16;
            session.table_due = granted > 0;
            session.vf_ready = Some(Instant::now());
        }
        self.record(
            Direction::HostToGuest,
            "NVSP_SUBCHANNEL",
            format_args!("status={} granted={granted}", status.0),
        );
        self.complete(
            packet,
            &nvsp::SubchannelComplete {
                status: U32::new(status.0),
                num_subchannels: U32::new(granted),
            },
        );
        if granted > 0 {
            self.transport.offer_subchannels(granted as u16);
        }
    }

    /// RNDIS messages: gathers them from send section and pages, and handles them.
    fn rndis_packet(&mut self, packet: &Packet, message: &nvsp::SendRndisPacket) {
        self.record_data(
            "NVSP_SEND_RNDIS_PACKET",
            format_args!("completion={}", packet.completion_requested),
            &packet.payload,
        );
        let mut data = std::mem::take(&mut self.data);
        let settings = self.shared.settings();
        let is_data = message.channel_type.get() == nvsp::ChannelType::DATA.0;
        let mut status = match self.gather(packet, message, &mut data) {
            Ok(()) => {
                let placed = self.count_placement(packet, message);
                let log = Settings::is_on(settings.log_frames).then_some(placed);
                self.rndis_messages(&mut data, log)
            }
            Err(what) => {
                self.error(what);
                nvsp::Status::INVALID_RNDIS_PACKET
            }
        };
        self.data = data;
        if is_data {
            status = settings.packet_status.map_or(status, nvsp::Status);
        }
        if is_data && packet.completion_requested && Settings::is_on(settings.hold_completions) {
            let message = nvsp::encode(&nvsp::SendRndisPacketComplete {
                status: U32::new(status.0),
            });
            let length = nvsp::message_size(self.version());
            self.held
                .push((packet.transaction_id, message[..length].to_vec()));
        } else if packet.completion_requested {
            self.complete(
                packet,
                &nvsp::SendRndisPacketComplete {
                    status: U32::new(status.0),
                },
            );
        }
    }

    /// Counts where the guest has put the messages of a packet, and says it.
    fn count_placement(&self, packet: &Packet, message: &nvsp::SendRndisPacket) -> &'static str {
        let in_section = message.section_index.get() != nvsp::INVALID_SECTION;
        let ranges = match &packet.kind {
            PacketKind::GpaDirect(ranges) => ranges.as_slice(),
            _ => &[],
        };
        let counters = &self.shared.counters;
        let (counter, name) = match (in_section, ranges.is_empty()) {
            (true, true) => (&counters.tx_in_sections, "section"),
            (true, false) => (&counters.tx_in_both, "both"),
            (false, _) => (&counters.tx_in_pages, "pages"),
        };
        counter.inc();
        // The header is what begins the first range, then.
        let split = ranges.first().filter(|_| !in_section).is_some_and(|range| {
            u64::from(range.byte_offset) + rndis::PACKET_HEADER_SIZE as u64 > u64::from(PAGE_SIZE)
        });
        if split {
            counters.tx_split_headers.inc();
        }
        name
    }

    /// Copies the RNDIS messages of a packet to `data`.
    fn gather(
        &self,
        packet: &Packet,
        message: &nvsp::SendRndisPacket,
        data: &mut Vec<u8>,
    ) -> Result<(), String> {
        data.clear();
        let section = message.section_index.get();
        if section != nvsp::INVALID_SECTION {
            let tx = self.shared.tx.read();
            let tx = tx.unwrap_or_else(PoisonError::into_inner);
            let Some(buffer) = &tx.send_buffer else {
                return Err("send section without send buffer".to_owned());
            };
            let length = message.section_size.get();
            if length > buffer.section_size {
                return Err(format!("{length} bytes in a send section"));
            }
            data.resize(length as usize, 0);
            let offset = u64::from(section) * u64::from(buffer.section_size);
            buffer
                .memory
                .read_at(offset, data)
                .map_err(|error| format!("send section {section}: {error}"))?;
        }
        if let PacketKind::GpaDirect(ranges) = &packet.kind {
            let total: u64 = ranges.iter().map(|range| range.len()).sum();
            if total + data.len() as u64 > MAX_DATA {
                return Err(format!("{total} bytes in one packet"));
            }
            for range in ranges {
                let at = data.len();
                data.resize(at + range.byte_count as usize, 0);
                self.transport
                    .read_pages(range, &mut data[at..])
                    .map_err(|error| format!("pages: {error}"))?;
            }
        }
        Ok(())
    }

    fn rndis_messages(&mut self, data: &mut [u8], log: Option<&str>) -> nvsp::Status {
        let mut at = 0;
        if data.is_empty() {
            self.error("RNDIS packet without message");
            return nvsp::Status::INVALID_RNDIS_PACKET;
        }
        while at < data.len() {
            let rest = &mut data[at..];
            let handled = match rndis::header(rest, rest.len()) {
                Ok((rndis::MessageType::PACKET, length)) => {
                    self.transmit(&mut rest[..length], log).map(|()| length)
                }
                Ok((_, length)) if self.is_primary() => {
                    self.control(&rest[..length]).map(|()| length)
                }
                Ok((ty, _)) => Err(rndis::Error::UnexpectedType(ty)),
                Err(error) => Err(error),
            };
            match handled {
                // At least the length of a header, so this ends.
                Ok(length) => at += length,
                Err(error) => {
                    self.error(error);
                    return nvsp::Status::INVALID_RNDIS_PACKET;
                }
            }
        }
        nvsp::Status::SUCCESS
    }

    /// A frame from the guest.
    fn transmit(&self, message: &mut [u8], log: Option<&str>) -> Result<(), rndis::Error> {
        let layout = rndis::packet_layout(message, message.len())?;
        if self.shared.log.keeps_bytes() {
            self.record_packet(message, &layout);
        }
        let ppis = message.get(layout.ppis).unwrap_or_default();
        let info = rndis::PacketInfo::collect(rndis::Ppis::new(ppis))?;
        let mut offload = TxOffload {
            vlan: info.vlan.map(rndis::Vlan::tci),
            ..TxOffload::default()
        };
        if let Some(checksum) = info.checksum.map(rndis::TxChecksum) {
            offload.checksum =
                checksum.has(rndis::TxChecksum::TCP) || checksum.has(rndis::TxChecksum::UDP);
            offload.ipv4_checksum = checksum.has(rndis::TxChecksum::IP_HEADER);
        }
        if let Some(large_send) = info.large_send.filter(|large_send| large_send.is_v2()) {
            // A size that is too large for segments is refused as zero is.
            offload.lso_mss = Some(u16::try_from(large_send.mss()).unwrap_or(0));
        }
        self.shared.counters.tx_messages.inc();
        let frame = message.get_mut(layout.frame).unwrap_or_default();
        if let Some(placed) = log {
            let fields = describe_frame(frame, &info, placed);
            self.record(Direction::GuestToHost, "FRAME", fields);
        }
        self.shared.port.deliver_from_synthetic(frame, &offload);
        Ok(())
    }

    /// Logs a packet: all that is in front of its frame, and which frame it is.
    fn record_packet(&self, message: &[u8], layout: &rndis::PacketLayout) {
        let frame = message.get(layout.frame.clone()).unwrap_or_default();
        let mut start = String::new();
        for byte in frame.iter().take(64) {
            // Writing to a string does not fail.
            let _ = write!(start, "{byte:02x}");
        }
        self.record_data(
            "RNDIS_PACKET",
            format_args!("length={} frame={start}", frame.len()),
            message.get(..layout.frame.start).unwrap_or_default(),
        );
    }

    /// The driver has shown a sign of life: it is not told of the VF before it is silent.
    pub(crate) fn postpone_vf(&mut self) {
        let running = self.shared.receive().is_running();
        if let Some(session) = &mut self.session {
            session.vf_ready = match session.vf_ready {
                // It has shown that its interface exists.
                Some(ready) if ready <= Instant::now() => Some(ready),
                _ if running => Some(Instant::now() + QUIET),
                _ => None,
            };
        }
    }

    /// The driver has opened its interface.
    pub(crate) fn vf_ready_now(&mut self) {
        if let Some(session) = &mut self.session {
            session.vf_ready = Some(Instant::now());
        }
    }

    fn association_differs(&self, session: &Session) -> bool {
        // Drivers say that they are capable of SR-IOV only from version 5 on.
        let capable = match session.version {
            Version::V4 => true,
            version => version > Version::V4 && session.capabilities.contains(Capabilities::SRIOV),
        };
        capable && lock(&self.shared.wanted).association != session.told.association
    }

    /// Brings what the host wants told to the guest, as far as there is room.
    fn tell_guest(&mut self) {
        let Some(session) = &self.session else {
            return;
        };
        let ready = session
            .vf_ready
            .is_some_and(|ready| ready <= Instant::now());
        if ready && self.association_differs(session) {
            self.tell_association();
        }
        self.tell_send_table();
        self.tell_link();
    }

    fn tell_association(&mut self) {
        let wanted = lock(&self.shared.wanted).association;
        let Some(session) = &mut self.session else {
            return;
        };
        // From one VF to another, the old one goes first.
        let steps = [
            session.told.association.map(|serial| (serial, false)),
            wanted.map(|serial| (serial, true)),
        ];
        for (serial, allocated) in steps.into_iter().flatten() {
            let message = nvsp::encode(&nvsp::VfAssociation {
                allocated: U32::new(allocated.into()),
                serial: U32::new(serial),
            });
            let length = nvsp::message_size(session.version);
            if self.transport.send_inband(0, &message[..length]).is_err() {
                return;
            }
            session.told.association = allocated.then_some(serial);
            *lock(&self.shared.told_association) = session.told.association;
            self.shared.record(
                Direction::HostToGuest,
                self.transport.name(),
                "NVSP_SEND_VF_ASSOCIATION",
                format_args!("allocated={allocated} serial={serial}"),
            );
        }
    }

    /// Sends the send indirection table when all subchannels are open.
    fn tell_send_table(&mut self) {
        let open = self.shared.receive().num_open();
        let Some(session) = &mut self.session else {
            return;
        };
        if !session.table_due || open != usize::from(session.granted) + 1 {
            return;
        }
        let entries = std::array::from_fn(|i| (i % open) as u32);
        let mut buffer = [0; nvsp::MAX_MESSAGE_SIZE];
        let sent = match nvsp::encode_send_table(&entries, &mut buffer) {
            Ok(length) => self.transport.send_inband(0, &buffer[..length]).is_ok(),
            Err(_) => false,
        };
        if sent {
            session.table_due = false;
            self.shared.record(
                Direction::HostToGuest,
                self.transport.name(),
                "NVSP_SEND_INDIRECTION_TABLE",
                format_args!("channels={open}"),
            );
        }
    }

    /// Indicates what has changed of the link.
    fn tell_link(&mut self) {
        if !self.shared.receive().is_running() {
            return;
        }
        let wanted = lock(&self.shared.wanted).clone();
        let Some(session) = &mut self.session else {
            return;
        };
        let mut events = Vec::new();
        if wanted.link != session.told.link {
            session.told.link = wanted.link;
            events.push((
                if wanted.link {
                    rndis::Status::MEDIA_CONNECT
                } else {
                    rndis::Status::MEDIA_DISCONNECT
                },
                Vec::new(),
            ));
        }
        if wanted.link_speed != session.told.link_speed {
            session.told.link_speed = wanted.link_speed;
            // Only a driver that teams wants to know.
            if session.capabilities.contains(Capabilities::TEAMING) {
                let speed = crate::rndis::link_speed_units(wanted.link_speed);
                events.push((
                    rndis::Status::LINK_SPEED_CHANGE,
                    speed.to_le_bytes().to_vec(),
                ));
            }
        }
        if wanted.network != session.told.network {
            session.told.network = wanted.network;
            events.push((rndis::Status::NETWORK_CHANGE, Vec::new()));
        }
        for (status, buffer) in events {
            let mut message = vec![0; 64];
            let Ok(length) = rndis::encode_indication(status, &buffer, &mut message) else {
                continue;
            };
            message.truncate(length);
            self.record(
                Direction::HostToGuest,
                "RNDIS_INDICATE_STATUS",
                format_args!("status={:#x}", status.0),
            );
            self.send_answer(Answer::Control(message));
        }
    }
}

/// The fields of a frame from the guest with its per-packet information.
fn describe_frame(frame: &[u8], info: &rndis::PacketInfo, placed: &str) -> String {
    let mut out = format!("length={} in={placed}", frame.len());
    // Writing to a string does not fail.
    if let Some(to) = frame::destination(frame) {
        let [a, b, c, d, e, f] = to;
        let _ = write!(out, " to={a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}");
    }
    if let Some([high, low]) = frame.get(12..14) {
        let _ = write!(out, " type=0x{high:02x}{low:02x}");
    }
    if let Some(hash) = info.hash {
        let _ = write!(out, " hash={hash:#x}");
    }
    if let Some(vlan) = info.vlan {
        let _ = write!(out, " tci={:#x}", vlan.tci());
    }
    if let Some(checksum) = info.checksum.map(rndis::TxChecksum) {
        let names = [
            (rndis::TxChecksum::IPV4, "ipv4"),
            (rndis::TxChecksum::IPV6, "ipv6"),
            (rndis::TxChecksum::TCP, "tcp"),
            (rndis::TxChecksum::UDP, "udp"),
            (rndis::TxChecksum::IP_HEADER, "ip"),
        ];
        let names = names.iter().filter(|(flag, _)| checksum.has(*flag));
        let names: Vec<_> = names.map(|&(_, name)| name).collect();
        let at = checksum.header_offset();
        let _ = write!(out, " checksum={}@{at}", names.join("+"));
    }
    if let Some(large_send) = info.large_send {
        let _ = write!(
            out,
            " lso={}{}@{}",
            large_send.mss(),
            if large_send.is_ipv6() { "v6" } else { "v4" },
            large_send.tcp_header_offset()
        );
    }
    out
}

/// Writes the fields of a message.
fn describe(out: &mut String, message: &GuestMessage) -> std::fmt::Result {
    match message {
        GuestMessage::Init(init) => write!(
            out,
            "min={:#x} max={:#x}",
            init.min_version.get(),
            init.max_version.get()
        ),
        GuestMessage::SendNdisVersion(version) => {
            write!(
                out,
                "version={}.{}",
                version.major.get(),
                version.minor.get()
            )
        }
        GuestMessage::NdisConfig(config) => write!(
            out,
            "max_frame={} capabilities={:#x}",
            config.max_frame.get(),
            config.capabilities.get()
        ),
        GuestMessage::SendReceiveBuffer(buffer) => {
            write!(
                out,
                "gpadl={:#x} id={:#x}",
                buffer.gpadl.get(),
                buffer.id.get()
            )
        }
        GuestMessage::RevokeReceiveBuffer(buffer) => write!(out, "id={:#x}", buffer.id.get()),
        GuestMessage::SendSendBuffer(buffer) => {
            write!(
                out,
                "gpadl={:#x} id={:#x}",
                buffer.gpadl.get(),
                buffer.id.get()
            )
        }
        GuestMessage::RevokeSendBuffer(buffer) => write!(out, "id={:#x}", buffer.id.get()),
        GuestMessage::SwitchDataPath(switch) => match DataPath(switch.active.get()) {
            DataPath::SYNTHETIC => write!(out, "to=synthetic"),
            DataPath::VF => write!(out, "to=vf"),
            DataPath(other) => write!(out, "to={other}"),
        },
        GuestMessage::SubchannelRequest(request) => write!(
            out,
            "operation={} subchannels={}",
            request.operation.get(),
            request.num_subchannels.get()
        ),
        GuestMessage::SendRndisPacket(_)
        | GuestMessage::SendRndisPacketComplete(_)
        | GuestMessage::Unknown(_) => Ok(()),
    }
}
