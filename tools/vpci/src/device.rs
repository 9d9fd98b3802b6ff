// SPDX-License-Identifier: GPL-2.0

//! The bus as a VMBus device: one channel, one worker.

use std::{
    collections::VecDeque,
    sync::{
        atomic::{AtomicBool, Ordering},
        Arc, Mutex, MutexGuard, PoisonError,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use hyperv_wire::vmbus::class;
use hyperv_wire::vpci::{self, MessageType, Request, SlotNumber, Status};
use vmbus_host::{
    Channel, Device, Direction, MessageLog, Offer, OpenRefused, Packet, PacketKind, SendError,
};

use crate::{
    bus::{Bus, Outgoing},
    faults::{FaultAction, Faults},
    function::PciFunction,
};

/// A packet on its way to the guest, with the transaction id it completes.
type Queued = (u64, Outgoing);

/// Bytes of a status.
const STATUS: usize = 4;
/// Bytes too many in an answer that is too long.
const EXCESS: usize = 512;

/// What the worker and the other threads share while the channel is open.
struct Session {
    channel: Arc<Channel>,
    /// What found no room in the ring yet, in order.
    outbox: Mutex<VecDeque<Queued>>,
}

struct Running {
    session: Arc<Session>,
    worker: JoinHandle<()>,
}

/// A virtual PCI bus on the VMBus.
pub struct VpciDevice {
    name: String,
    bus: Arc<Bus>,
    log: Arc<MessageLog>,
    faults: Arc<Faults>,
    running: Mutex<Option<Running>>,
    rescinded: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl VpciDevice {
    /// The device of `bus`; `name` is for the log.
    pub fn new(name: &str, bus: Arc<Bus>, log: Arc<MessageLog>, faults: Arc<Faults>) -> Arc<Self> {
        Arc::new(Self {
            name: name.to_owned(),
            bus,
            log,
            faults,
            running: Mutex::new(None),
            rescinded: AtomicBool::new(false),
        })
    }

    /// The bus.
    pub fn bus(&self) -> &Arc<Bus> {
        &self.bus
    }

    /// Puts a function on the bus, and tells the guest if it listens. Says whether the slot was free.
    pub fn add_function(
        &self,
        number: SlotNumber,
        serial: u32,
        numa_node: Option<u16>,
        model: Arc<dyn PciFunction>,
    ) -> bool {
        match self.bus.add_function(number, serial, numa_node, model) {
            Some(event) => {
                self.send(event);
                true
            }
            None => false,
        }
    }

    /// Pulls a function off the bus without asking the guest.
    pub fn remove_function(&self, number: SlotNumber) {
        let event = self.bus.remove_function(number);
        self.send(event);
    }

    /// Asks the guest to give a function up and waits until it has. Says whether it has.
    pub fn eject(&self, number: SlotNumber, timeout: Duration) -> bool {
        let event = self.bus.eject(number);
        if event.is_none() {
            return false;
        }
        self.send(event);
        let done = self.bus.wait_ejected(number, timeout);
        let outcome = if done { "done" } else { "timed out" };
        self.log.record(
            Direction::Host,
            &self.name,
            "eject",
            format_args!("slot={number:?} {outcome}"),
        );
        done
    }

    /// Tells the guest's driver that configuration blocks have changed.
    pub fn invalidate_blocks(&self, number: SlotNumber, block_mask: u64) {
        let event = self.bus.invalidate_blocks(number, block_mask);
        self.send(event);
    }

    /// Sends something as it is: the completion of a transaction, or a message. Says whether the guest has the
    /// channel open.
    pub fn send_raw(&self, completion: Option<u64>, payload: &[u8]) -> bool {
        let packet = Outgoing {
            completion: completion.is_some(),
            name: "RAW",
            fields: format!("length={}", payload.len()),
            payload: payload.to_vec(),
        };
        self.enqueue(completion.unwrap_or(0), packet)
    }

    /// Says that the device is about to be rescinded: what the guest then leaves behind is not its
    /// fault.
    pub fn about_to_rescind(&self) {
        self.rescinded.store(true, Ordering::Relaxed);
    }

    fn send(&self, event: Option<Outgoing>) {
        if let Some(event) = event {
            self.enqueue(0, event);
        }
    }

    fn enqueue(&self, transaction: u64, packet: Outgoing) -> bool {
        let session = lock(&self.running).as_ref().map(|r| r.session.clone());
        if let Some(session) = &session {
            lock(&session.outbox).push_back((transaction, packet));
            session.flush(&self.log);
        }
        session.is_some()
    }
}

impl Session {
    /// Sends what is queued, as far as there is room. The guest signals when there is more.
    fn flush(&self, log: &MessageLog) {
        let mut outbox = lock(&self.outbox);
        while let Some((transaction, packet)) = outbox.front() {
            let sent = if packet.completion {
                self.channel.send_completion(*transaction, &packet.payload)
            } else {
                self.channel.send_inband(0, false, &packet.payload)
            };
            match sent {
                Ok(()) => log.record_message(
                    Direction::HostToGuest,
                    self.channel.name(),
                    packet.name,
                    &packet.fields,
                    &packet.payload,
                ),
                Err(SendError::Full) => return,
                Err(error) => log.record(
                    Direction::Host,
                    self.channel.name(),
                    "send failed",
                    format_args!("{}: {error}", packet.name),
                ),
            }
            outbox.pop_front();
        }
    }

    fn handle(
        self: &Arc<Self>,
        bus: &Bus,
        log: &Arc<MessageLog>,
        faults: &Faults,
        packet: &Packet,
    ) {
        let name = self.channel.name();
        if packet.kind != PacketKind::InBand {
            log.record(
                Direction::GuestToHost,
                name,
                "packet",
                format_args!("unexpected {:?}", packet.kind),
            );
            return;
        }
        let message_type = MessageType::parse(&packet.payload).ok();
        let message = message_type
            .and_then(MessageType::name)
            .unwrap_or("message");
        let record = |fields: &dyn std::fmt::Display| {
            let completion = match log.keeps_bytes() {
                true => format!(" completion={}", packet.completion_requested),
                false => String::new(),
            };
            let fields = format!("{fields}{completion}");
            let bytes = &packet.payload;
            log.record_message(Direction::GuestToHost, name, message, fields, bytes);
        };
        let mut fault = None;
        let replies = match Request::parse(&packet.payload) {
            Ok(request) => {
                record(&Fields(&request));
                fault = message_type.and_then(|request| faults.take(request));
                if let Some(action) = fault {
                    log.record(Direction::Host, name, "FAULT", format_args!("{action:?}"));
                    bus.count_fault();
                }
                match fault {
                    Some(FaultAction::Mute) => return,
                    Some(FaultAction::Refuse) => {
                        vec![Outgoing::status(Status::INVALID_DEVICE_STATE)]
                    }
                    _ => bus.handle(&request),
                }
            }
            Err(error) => {
                record(&error);
                vec![bus.refuse()]
            }
        };
        let mut answers = Vec::new();
        for reply in replies {
            // What is to be answered wrongly is answered at least.
            if !reply.completion || packet.completion_requested || fault.is_some() {
                answers.push((packet.transaction_id, reply));
            } else if reply.failed() {
                log.record(Direction::Host, name, "refused", &reply.fields);
            }
        }
        match fault {
            Some(FaultAction::Late(delay)) => self.send_late(answers, delay, log),
            fault => lock(&self.outbox).extend(spoilt(answers, fault)),
        }
    }

    /// Sends something after a while, if the channel is open then.
    fn send_late(self: &Arc<Self>, answers: Vec<Queued>, delay: Duration, log: &Arc<MessageLog>) {
        let (session, log) = (self.clone(), log.clone());
        thread::spawn(move || {
            thread::sleep(delay);
            lock(&session.outbox).extend(answers);
            session.flush(&log);
        });
    }

    fn run(self: &Arc<Self>, bus: &Bus, log: &Arc<MessageLog>, faults: &Faults) {
        loop {
            loop {
                match self.channel.recv() {
                    Ok(Some(packet)) => {
                        self.handle(bus, log, faults, &packet);
                        self.flush(log);
                    }
                    Ok(None) => break,
                    Err(vmbus_host::RecvError::Closed) => return,
                    Err(error) => {
                        log.record(Direction::Host, self.channel.name(), "stopped", error);
                        return;
                    }
                }
            }
            self.flush(log);
            if self.channel.wait(None).is_err() {
                return;
            }
        }
    }
}

/// Answers as a fault has them.
fn spoilt(answers: Vec<Queued>, fault: Option<FaultAction>) -> Vec<Queued> {
    let mut sent = Vec::new();
    for (transaction, mut answer) in answers {
        match fault {
            Some(FaultAction::Short) => {
                let payload = &mut answer.payload;
                payload.truncate(if payload.len() > STATUS { STATUS } else { 0 });
            }
            Some(FaultAction::Long) => answer.payload.extend([0xff; EXCESS]),
            Some(FaultAction::Twice) => sent.push((transaction, answer.clone())),
            Some(FaultAction::Stray) => {
                sent.push((!transaction, Outgoing::status(Status::SUCCESS)));
            }
            _ => {}
        }
        sent.push((transaction, answer));
    }
    sent
}

/// The fields of a request for the log.
struct Fields<'a>(&'a Request<'a>);

impl std::fmt::Display for Fields<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Request::QueryProtocolVersion(version) => write!(f, "version={:#x}", version.0),
            Request::QueryBusRelations | Request::D0Exit => Ok(()),
            Request::QueryResourceRequirements(slot)
            | Request::ResourcesAssigned(slot)
            | Request::ResourcesReleased(slot) => write!(f, "slot={slot:?}"),
            Request::D0Entry { mmio_base } => write!(f, "mmio={mmio_base:#x}"),
            Request::CreateInterrupt(slot, i) => write!(
                f,
                "slot={slot:?} vector={:#x} count={} mode={} {}",
                i.vector,
                i.vector_count,
                i.delivery_mode,
                ProcessorList(&i.processors)
            ),
            Request::DeleteInterrupt(slot, i) => write!(
                f,
                "slot={slot:?} address={:#x} data={:#x} count={}",
                i.address(),
                i.data(),
                i.vector_count()
            ),
            Request::ReadBlock {
                slot,
                block,
                length,
            } => write!(f, "slot={slot:?} block={block} length={length}"),
            Request::WriteBlock { slot, block, data } => {
                write!(f, "slot={slot:?} block={block} length={}", data.len())
            }
            Request::EjectionComplete { slot, status } => {
                write!(f, "slot={slot:?} status={status:?}")
            }
            Request::PowerStateChange { slot, state } => write!(f, "slot={slot:?} state={state}"),
            Request::Unknown(message_type) => write!(f, "type={message_type:?}"),
        }
    }
}

struct ProcessorList<'a>(&'a vpci::Processors);

impl std::fmt::Display for ProcessorList<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            vpci::Processors::Mask(mask) => write!(f, "mask={mask:#x}"),
            vpci::Processors::List { indexes, count } => {
                write!(f, "vps={:?}", &indexes[..usize::from(*count)])
            }
        }
    }
}

impl Device for VpciDevice {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn offer(&self) -> Offer {
        Offer::new(class::PCI, self.bus.instance())
    }

    fn open(&self, channel: Arc<Channel>) -> Result<(), OpenRefused> {
        let session = Arc::new(Session {
            channel,
            outbox: Mutex::new(VecDeque::new()),
        });
        let (bus, log, worker_session) = (self.bus.clone(), self.log.clone(), session.clone());
        let faults = self.faults.clone();
        let worker = thread::Builder::new()
            .name(self.name.clone())
            .spawn(move || worker_session.run(&bus, &log, &faults))
            .map_err(|e| OpenRefused(format!("worker: {e}")))?;
        *lock(&self.running) = Some(Running { session, worker });
        Ok(())
    }

    fn close(&self, _subchannel_index: u16) {
        let running = lock(&self.running).take();
        if let Some(running) = running {
            // The worker ends by itself when the channel is closed. A panic in it was reported.
            let _ = running.worker.join();
        }
        self.bus.close(!self.rescinded.load(Ordering::Relaxed));
    }
}
