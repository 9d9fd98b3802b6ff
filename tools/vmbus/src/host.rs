// SPDX-License-Identifier: GPL-2.0

//! The control plane: one connection with the guest, offers, channels, GPADLs.
//!
//! All state is changed by the control thread only; the lock is for those who look at it. No lock is
//! held while a device is called, since a device's worker may ask for something meanwhile.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Display,
    sync::{
        atomic::{AtomicU32, AtomicUsize, Ordering},
        mpsc, Arc, Condvar, Mutex, PoisonError, RwLock,
    },
    thread,
    time::{Duration, Instant},
};

use hyperv_wire::vmbus::{
    self, status, ChannelId, GpadlBody, GpadlCreated, GpadlHeader, GpadlTeardown, GpadlTorndown,
    InitiateContact, MessageBuffer, MessageHeader, MessageType, ModifyChannel,
    ModifyChannelResponse, OfferChannel, OpenChannel, OpenResult, TlConnectRequest,
    TlConnectResult, Version, VersionResponse, DEFAULT_SINT, EVENT_CONNECTION_ID, EVENT_FLAG_COUNT,
    MAX_MESSAGE_LEN, MESSAGE_CONNECTION_ID, MESSAGE_CONNECTION_ID_V5, PAGE_SIZE,
    SYNIC_MESSAGE_TYPE,
};
use vm_memory::{GuestAddress, GuestMemory, VolatileMemory};
use zerocopy::{Immutable, IntoBytes};

use crate::{
    channel::{Channel, OpenParameters},
    describe::describe,
    gpadl::{GpadlTable, PartialGpadl},
    hv_status, lock, Counter, Counters, Device, Direction, Guid, HvStatus, MessageLog, Offer,
    Platform,
};

/// Connection id for messages that the host names in its answer to a guest of protocol 5.0 or
/// later. Another one than the guest began with, so that a guest which ignores it is noticed.
const HOST_MESSAGE_CONNECTION_ID: u32 = 0x104;

/// Connection id of a channel's signal is this plus its relid.
const CHANNEL_CONNECTION_BASE: u32 = (DEFAULT_SINT as u32) << 12;

/// Messages that may wait for the control thread. A guest waits for an answer to nearly each.
const MAX_QUEUED_MESSAGES: usize = 1024;

/// GPADLs that a guest may have, complete or not.
const MAX_GPADLS: usize = 4096;

/// How the host behaves.
#[derive(Clone, Debug)]
pub struct Config {
    /// Newest version of the protocol that is accepted.
    pub max_version: Version,
    /// Whether each channel has a connection id of its own, as on every current host. Otherwise the
    /// guest marks the channel in the interrupt page, which exists before protocol 5.0 only.
    pub dedicated_interrupts: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            max_version: Version::V6_0,
            dedicated_interrupts: true,
        }
    }
}

/// A device could not be added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddDeviceError {
    /// There is one with this instance GUID.
    #[error("there is a device with instance {0} already")]
    DuplicateInstance(Guid),
}

/// What the guest holds of the host's resources.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Negotiated version; `None` without a connection.
    pub version: Option<Version>,
    /// Channels offered and not rescinded, the open ones included.
    pub offered: usize,
    /// Open channels.
    pub open: usize,
    /// Rescinded channels whose id the guest has not released.
    pub unreleased: usize,
    /// Established GPADLs.
    pub gpadls: usize,
}

enum Request {
    Message { connection: u32, message: Vec<u8> },
    DeviceAdded,
    RemoveDevice(Guid),
    OfferSubchannels { instance: Guid, count: u16 },
    Reset(mpsc::Sender<()>),
    Shutdown,
}

/// The way to the control thread.
#[derive(Clone)]
pub(crate) struct Requests {
    sender: mpsc::Sender<Request>,
    /// Removals that the control thread has not come to.
    removals: Arc<Mutex<Vec<Guid>>>,
}

impl Requests {
    fn send(&self, request: Request) {
        // Fails only after shutdown, when there is nothing left to do.
        let _ = self.sender.send(request);
    }

    pub(crate) fn offer_subchannels(&self, instance: Guid, count: u16) {
        self.send(Request::OfferSubchannels { instance, count });
    }

    pub(crate) fn remove_device(&self, instance: Guid) {
        lock(&self.removals).push(instance);
        self.send(Request::RemoveDevice(instance));
    }
}

#[derive(Clone, Copy)]
struct Connection {
    version: Version,
    message_vp: u32,
    message_sint: u8,
    /// Where the guest has to send its messages.
    message_connection: u32,
    offers_requested: bool,
}

struct DeviceEntry {
    device: Arc<dyn Device>,
    name: String,
    offer: Offer,
    offered: bool,
}

/// A channel that is entered as open, and the device that is to be told.
type Opened = (Arc<dyn Device>, Arc<Channel>);

enum ChannelState {
    Offered,
    Open(Arc<Channel>),
    Rescinded,
}

struct ChannelEntry {
    device: Arc<dyn Device>,
    name: String,
    instance: Guid,
    subchannel_index: u16,
    state: ChannelState,
}

#[derive(Default)]
struct State {
    connection: Option<Connection>,
    devices: Vec<DeviceEntry>,
    channels: BTreeMap<u32, ChannelEntry>,
    partial_gpadls: HashMap<u32, PartialGpadl>,
}

impl State {
    /// Relids of all channels of a device, the primary channel last.
    fn relids_of(&self, instance: Guid) -> Vec<u32> {
        let mut relids: Vec<(u16, u32)> = self
            .channels
            .iter()
            .filter(|(_, channel)| channel.instance == instance)
            .map(|(&relid, channel)| (channel.subchannel_index, relid))
            .collect();
        relids.sort_by_key(|&(index, relid)| (index == 0, index, relid));
        relids.into_iter().map(|(_, relid)| relid).collect()
    }

    fn free_relid(&self) -> Option<u32> {
        (1..EVENT_FLAG_COUNT).find(|relid| !self.channels.contains_key(relid))
    }

    fn has_unreleased(&self, instance: Guid) -> bool {
        self.channels.values().any(|channel| {
            channel.instance == instance && matches!(channel.state, ChannelState::Rescinded)
        })
    }
}

struct HostCounters {
    messages_in: Counter,
    messages_out: Counter,
    protocol_errors: Counter,
    signals: Counter,
    interrupts: Counter,
    offered: Counter,
    open: Counter,
    unreleased: Counter,
    relids: Counter,
}

struct Shared {
    platform: Arc<dyn Platform>,
    config: Config,
    log: Arc<MessageLog>,
    counters: HostCounters,
    gpadls: Arc<GpadlTable>,
    state: Mutex<State>,
    /// Notified after each request.
    changed: Condvar,
    /// Open channels by the connection id of their signal.
    signals: RwLock<HashMap<u32, Arc<Channel>>>,
    /// Open channels by relid, and the guest's interrupt page, for signals that are not dedicated.
    interrupt_page: Mutex<Option<GuestAddress>>,
    queued: AtomicUsize,
    /// What the connected guest of protocol 5.0 or later uses; zero otherwise.
    extra_message_connection: AtomicU32,
    requests: Requests,
}

/// The VMBus of one virtual machine.
pub struct VmbusHost {
    shared: Arc<Shared>,
    thread: Mutex<Option<thread::JoinHandle<()>>>,
}

impl VmbusHost {
    /// Makes the bus and starts its control thread.
    pub fn new(
        platform: Arc<dyn Platform>,
        config: Config,
        log: Arc<MessageLog>,
        counters: Arc<Counters>,
    ) -> Arc<Self> {
        let (sender, receiver) = mpsc::channel();
        let counter = |name: &str| counters.counter(&format!("vmbus.{name}"));
        let shared = Arc::new(Shared {
            platform,
            config,
            log,
            counters: HostCounters {
                messages_in: counter("messages.in"),
                messages_out: counter("messages.out"),
                protocol_errors: counter("protocol_errors"),
                signals: counter("signals"),
                interrupts: counter("interrupts"),
                offered: counter("channels.offered"),
                open: counter("channels.open"),
                unreleased: counter("channels.unreleased"),
                relids: counter("relids"),
            },
            gpadls: Arc::new(GpadlTable::new(counter("gpadls"))),
            state: Mutex::default(),
            changed: Condvar::new(),
            signals: RwLock::default(),
            interrupt_page: Mutex::new(None),
            queued: AtomicUsize::new(0),
            extra_message_connection: AtomicU32::new(0),
            requests: Requests {
                sender,
                removals: Arc::default(),
            },
        });
        let control = Control(shared.clone());
        let thread = thread::spawn(move || control.run(&receiver));
        Arc::new(Self {
            shared,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// The guest's hypercall "post message". Only queues.
    pub fn post_message(&self, connection: u32, message_type: u32, payload: &[u8]) -> HvStatus {
        let shared = &self.shared;
        let v5 = shared.config.max_version >= Version::V5_0;
        let known = match connection {
            0 => false,
            MESSAGE_CONNECTION_ID => true,
            MESSAGE_CONNECTION_ID_V5 => v5,
            other => other == shared.extra_message_connection.load(Ordering::Acquire),
        };
        if !known {
            return hv_status::INVALID_CONNECTION_ID;
        }
        if message_type != SYNIC_MESSAGE_TYPE || payload.len() > MAX_MESSAGE_LEN {
            return hv_status::INVALID_PARAMETER;
        }
        // Several processors may pass the check at once; the limit is not exact.
        if shared.queued.load(Ordering::Relaxed) >= MAX_QUEUED_MESSAGES {
            return hv_status::INSUFFICIENT_BUFFERS;
        }
        shared.queued.fetch_add(1, Ordering::Relaxed);
        shared.requests.send(Request::Message {
            connection,
            message: payload.to_vec(),
        });
        hv_status::SUCCESS
    }

    /// The guest's hypercall "signal event". Only wakes workers.
    pub fn signal_event(&self, connection: u32, flag: u16) -> HvStatus {
        let shared = &self.shared;
        if flag != 0 {
            return hv_status::INVALID_PARAMETER;
        }
        shared.counters.signals.inc();
        if connection == EVENT_CONNECTION_ID {
            return shared.signal_marked_channels();
        }
        let signals = shared
            .signals
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        match signals.get(&connection) {
            Some(channel) => {
                channel.signal_from_guest();
                hv_status::SUCCESS
            }
            // Nothing wrong with that: the channel may just have been closed or rescinded.
            None => hv_status::INVALID_CONNECTION_ID,
        }
    }

    /// Adds a device. A connected guest is offered it at once, or as soon as it has released the
    /// channels of a removed device with the same instance.
    pub fn add_device(&self, device: Arc<dyn Device>) -> Result<(), AddDeviceError> {
        let offer = device.offer();
        let instance = offer.instance;
        let mut state = lock(&self.shared.state);
        let taken = state
            .devices
            .iter()
            .any(|entry| entry.offer.instance == instance);
        if taken && !lock(&self.shared.requests.removals).contains(&instance) {
            return Err(AddDeviceError::DuplicateInstance(instance));
        }
        state.devices.push(DeviceEntry {
            name: device.name(),
            device,
            offer,
            offered: false,
        });
        drop(state);
        self.shared.requests.send(Request::DeviceAdded);
        Ok(())
    }

    /// Removes a device: rescinds all its channels. Its `close` is called before the guest hears of
    /// it. Asynchronous; a device's worker may call it.
    pub fn remove_device(&self, instance: Guid) {
        self.shared.requests.remove_device(instance);
    }

    /// Waits until a removed device's channels are released by the guest. Not for devices.
    pub fn wait_removed(&self, instance: Guid, timeout: Duration) -> bool {
        self.wait_for(timeout, |shared, state| {
            !lock(&shared.requests.removals).contains(&instance) && !state.has_unreleased(instance)
        })
    }

    /// Waits until a condition on the usage holds. Not for devices.
    pub fn wait_usage(&self, timeout: Duration, condition: impl Fn(&Usage) -> bool) -> bool {
        self.wait_for(timeout, |shared, state| condition(&shared.usage(state)))
    }

    fn wait_for(&self, timeout: Duration, condition: impl Fn(&Shared, &State) -> bool) -> bool {
        let deadline = Instant::now() + timeout;
        let mut state = lock(&self.shared.state);
        loop {
            if condition(&self.shared, &state) {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self
                .shared
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Offers the subchannels `1..=count` of a device whose primary channel is open. Asynchronous.
    pub fn offer_subchannels(&self, instance: Guid, count: u16) {
        self.shared.requests.offer_subchannels(instance, count);
    }

    /// What the guest holds.
    pub fn usage(&self) -> Usage {
        self.shared.usage(&lock(&self.shared.state))
    }

    /// Forgets the connection, as when the virtual machine is reset. Waits until all channels are
    /// closed. Not for devices.
    pub fn reset(&self) {
        let (done, wait) = mpsc::channel();
        self.shared.requests.send(Request::Reset(done));
        // An error means that the control thread has ended, which closed everything as well.
        let _ = wait.recv();
    }

    /// Closes everything and ends the control thread. Not for devices.
    pub fn shutdown(&self) {
        self.shared.requests.send(Request::Shutdown);
        if let Some(thread) = lock(&self.thread).take() {
            // A panic there has been reported by the thread itself.
            let _ = thread.join();
        }
    }
}

impl Drop for VmbusHost {
    fn drop(&mut self) {
        self.shutdown();
    }
}

impl Shared {
    fn usage(&self, state: &State) -> Usage {
        let mut usage = Usage {
            version: state.connection.map(|connection| connection.version),
            gpadls: self.gpadls.len(),
            ..Usage::default()
        };
        for channel in state.channels.values() {
            match channel.state {
                ChannelState::Offered => usage.offered += 1,
                ChannelState::Open(_) => {
                    usage.offered += 1;
                    usage.open += 1;
                }
                ChannelState::Rescinded => usage.unreleased += 1,
            }
        }
        usage
    }

    /// Wakes the channels that the guest has marked in the interrupt page.
    fn signal_marked_channels(&self) -> HvStatus {
        let page = *lock(&self.interrupt_page);
        let Some(page) = page else {
            return hv_status::INVALID_CONNECTION_ID;
        };
        // The upper half of the page is for signals to the host.
        let to_host = GuestAddress(page.0 + u64::from(PAGE_SIZE) / 2);
        let bytes = EVENT_FLAG_COUNT as usize / 8;
        let Ok(flags) = self.platform.memory().get_slice(to_host, bytes) else {
            return hv_status::INVALID_CONNECTION_ID;
        };
        let signals = self.signals.read().unwrap_or_else(PoisonError::into_inner);
        for word in 0..bytes / 4 {
            let Ok(cell) = flags.get_atomic_ref::<AtomicU32>(word * 4) else {
                continue;
            };
            let mut marked = u32::from_le(cell.swap(0, Ordering::AcqRel));
            while marked != 0 {
                let relid = word as u32 * 32 + marked.trailing_zeros();
                marked &= marked - 1;
                if let Some(channel) = signals.get(&(CHANNEL_CONNECTION_BASE + relid)) {
                    channel.signal_from_guest();
                }
            }
        }
        hv_status::SUCCESS
    }
}

/// The control thread.
struct Control(Arc<Shared>);

impl Control {
    fn run(&self, receiver: &mpsc::Receiver<Request>) {
        let shared = &self.0;
        for request in receiver {
            match request {
                Request::Message {
                    connection,
                    message,
                } => {
                    shared.queued.fetch_sub(1, Ordering::Relaxed);
                    self.message(connection, &message);
                }
                Request::DeviceAdded => self.offer_devices(),
                Request::RemoveDevice(instance) => {
                    self.remove_device(instance);
                    let mut removals = lock(&shared.requests.removals);
                    if let Some(at) = removals.iter().position(|&other| other == instance) {
                        removals.remove(at);
                    }
                }
                Request::OfferSubchannels { instance, count } => {
                    self.offer_subchannels(instance, count);
                }
                Request::Reset(done) => {
                    self.disconnect("reset");
                    // Whoever asked may have gone away.
                    let _ = done.send(());
                }
                Request::Shutdown => {
                    self.disconnect("shutdown");
                    break;
                }
            }
            self.publish_usage();
        }
        self.publish_usage();
    }

    fn publish_usage(&self) {
        let shared = &self.0;
        let state = lock(&shared.state);
        let usage = shared.usage(&state);
        let counters = &shared.counters;
        counters.offered.set(usage.offered as u64);
        counters.open.set(usage.open as u64);
        counters.unreleased.set(usage.unreleased as u64);
        counters.relids.set(state.channels.len() as u64);
        shared.changed.notify_all();
    }

    fn note(&self, name: &str, fields: impl Display) {
        self.0.log.record(Direction::Host, "vmbus", name, fields);
    }

    /// The guest did something that the protocol forbids.
    fn protocol_error(&self, what: impl Display) {
        self.0.counters.protocol_errors.inc();
        self.note("PROTOCOL_ERROR", what);
    }

    /// Sends a message to the processor and interrupt source that the guest chose on connect.
    fn send_to(&self, vp: u32, sint: u8, message: &MessageBuffer) {
        let shared = &self.0;
        let (name, fields) = describe(message.as_bytes());
        let bytes = message.as_bytes();
        shared
            .log
            .record_message(Direction::HostToGuest, "vmbus", name, fields, bytes);
        shared.counters.messages_out.inc();
        shared
            .platform
            .post_message(vp, sint, SYNIC_MESSAGE_TYPE, message.as_bytes());
    }

    fn send(&self, message: &MessageBuffer) {
        let connection = lock(&self.0.state).connection;
        match connection {
            Some(connection) => {
                self.send_to(connection.message_vp, connection.message_sint, message);
            }
            None => self.note("NOT_SENT", "no connection"),
        }
    }

    fn send_body<T: IntoBytes + Immutable>(&self, message_type: MessageType, body: &T) {
        if let Some(message) = MessageBuffer::new(message_type, body) {
            self.send(&message);
        }
    }

    /// Handles a message of the guest.
    fn message(&self, connection: u32, message: &[u8]) {
        let shared = &self.0;
        shared.counters.messages_in.inc();
        let (name, fields) = describe(message);
        shared
            .log
            .record_message(Direction::GuestToHost, "vmbus", name, fields, message);
        let Ok((header, body)) = vmbus::parse::<MessageHeader>(message) else {
            return self.protocol_error("message without header");
        };
        let message_type = MessageType(header.message_type.get());

        if message_type == MessageType::INITIATE_CONTACT {
            return self.parsed(name, body, |m, _| self.initiate_contact(connection, m));
        }
        let Some(current) = lock(&shared.state).connection else {
            return self.protocol_error(format_args!("{name} without connection"));
        };
        if connection != current.message_connection {
            return self.protocol_error(format_args!("{name} on connection {connection:#x}"));
        }
        match message_type {
            MessageType::REQUEST_OFFERS => self.request_offers(),
            MessageType::OPEN_CHANNEL => {
                self.parsed(name, body, |m, _| self.open_channel(current, m))
            }
            MessageType::CLOSE_CHANNEL => self.parsed(name, body, |m, _| self.close_channel(m)),
            MessageType::GPADL_HEADER => {
                self.parsed(name, body, |m, rest| self.gpadl_header(m, rest))
            }
            MessageType::GPADL_BODY => self.parsed(name, body, |m, rest| self.gpadl_body(m, rest)),
            MessageType::GPADL_TEARDOWN => self.parsed(name, body, |m, _| self.gpadl_teardown(m)),
            MessageType::RELID_RELEASED => self.parsed(name, body, |m, _| self.relid_released(m)),
            MessageType::MODIFY_CHANNEL => {
                self.parsed(name, body, |m, _| self.modify_channel(current.version, m));
            }
            MessageType::TL_CONNECT_REQUEST => self.parsed(name, body, |m, _| self.tl_connect(m)),
            MessageType::UNLOAD => self.unload(),
            _ => self.protocol_error(format_args!("unexpected message {message_type}")),
        }
    }

    /// Calls `handle` with the message's structure and what follows it.
    fn parsed<T>(&self, name: &str, body: &[u8], handle: impl FnOnce(&T, &[u8]))
    where
        T: zerocopy::FromBytes + zerocopy::KnownLayout + Immutable + zerocopy::Unaligned,
    {
        match vmbus::parse::<T>(body) {
            Ok((message, rest)) => handle(&message, rest),
            Err(short) => self.protocol_error(format_args!("{name} is too short: {short}")),
        }
    }

    fn initiate_contact(&self, connection: u32, message: &InitiateContact) {
        let shared = &self.0;
        if lock(&shared.state).connection.is_some() {
            // A new kernel, after kexec or a crash.
            self.disconnect("new contact");
        }

        let version = Version(message.version.get());
        let v5 = version >= Version::V5_0;
        let (vp, sint) = (
            message.target_vp.get(),
            if v5 {
                message.message_sint()
            } else {
                DEFAULT_SINT
            },
        );
        // SINT 0 is the hypervisor's own.
        if vp >= shared.platform.vp_count() || !(1..16).contains(&sint) {
            return self.protocol_error(format_args!("no processor {vp} or no SINT {sint}"));
        }
        if connection
            != if v5 {
                MESSAGE_CONNECTION_ID_V5
            } else {
                MESSAGE_CONNECTION_ID
            }
        {
            self.protocol_error(format_args!(
                "version {version} proposed on connection {connection:#x}"
            ));
            return self.answer_contact(vp, sint, false, 0);
        }
        if !version.is_known() || version > shared.config.max_version {
            return self.answer_contact(vp, sint, false, 0);
        }

        let message_connection = if v5 {
            HOST_MESSAGE_CONNECTION_ID
        } else {
            MESSAGE_CONNECTION_ID
        };
        shared
            .extra_message_connection
            .store(if v5 { message_connection } else { 0 }, Ordering::Release);
        let interrupt_page = message.interrupt_page_or_target.get();
        *lock(&shared.interrupt_page) =
            (!v5 && interrupt_page != 0 && interrupt_page % u64::from(PAGE_SIZE) == 0)
                .then_some(GuestAddress(interrupt_page))
                .filter(|&page| {
                    shared
                        .platform
                        .memory()
                        .check_range(page, PAGE_SIZE as usize)
                });
        lock(&shared.state).connection = Some(Connection {
            version,
            message_vp: vp,
            message_sint: sint,
            message_connection,
            offers_requested: false,
        });
        self.answer_contact(vp, sint, true, message_connection);
    }

    fn answer_contact(&self, vp: u32, sint: u8, supported: bool, message_connection: u32) {
        let response = VersionResponse {
            version_supported: supported.into(),
            connection_state: 0,
            padding: 0.into(),
            message_connection_id: message_connection.into(),
        };
        if let Some(message) = MessageBuffer::new(MessageType::VERSION_RESPONSE, &response) {
            self.send_to(vp, sint, &message);
        }
    }

    fn request_offers(&self) {
        let again = match &mut lock(&self.0.state).connection {
            Some(connection) => std::mem::replace(&mut connection.offers_requested, true),
            None => false,
        };
        if again {
            return self.protocol_error("offers requested twice");
        }
        self.offer_devices();
        self.send(&MessageBuffer::empty(MessageType::ALL_OFFERS_DELIVERED));
    }

    /// Offers each device that is not offered and whose instance the guest does not know any more.
    fn offer_devices(&self) {
        let mut offers = Vec::new();
        {
            let mut state = lock(&self.0.state);
            let state = &mut *state;
            if !state
                .connection
                .is_some_and(|connection| connection.offers_requested)
            {
                return;
            }
            for index in 0..state.devices.len() {
                let entry = &state.devices[index];
                let instance = entry.offer.instance;
                // A guest that gets an offer for an instance which it still has takes it for a
                // subchannel. So wait until it has released all channels of the old one.
                if entry.offered || !state.relids_of(instance).is_empty() {
                    continue;
                }
                let Some(relid) = state.free_relid() else {
                    self.note("NOT_OFFERED", format_args!("{}: no free relid", entry.name));
                    continue;
                };
                offers.push(self.offer_message(&entry.offer, relid, 0));
                let channel = ChannelEntry {
                    device: entry.device.clone(),
                    name: entry.name.clone(),
                    instance,
                    subchannel_index: 0,
                    state: ChannelState::Offered,
                };
                state.channels.insert(relid, channel);
                state.devices[index].offered = true;
            }
        }
        for offer in offers {
            self.send_body(MessageType::OFFER_CHANNEL, &offer);
        }
    }

    fn offer_message(&self, offer: &Offer, relid: u32, subchannel_index: u16) -> OfferChannel {
        let dedicated = self.0.config.dedicated_interrupts;
        OfferChannel {
            class: offer.class,
            instance: offer.instance,
            flags: offer.flags.into(),
            mmio_megabytes: offer.mmio_megabytes.into(),
            user_defined: offer.user_defined,
            subchannel_index: subchannel_index.into(),
            relid: relid.into(),
            is_dedicated: u16::from(dedicated).into(),
            connection_id: if dedicated {
                CHANNEL_CONNECTION_BASE + relid
            } else {
                EVENT_CONNECTION_ID
            }
            .into(),
            ..OfferChannel::default()
        }
    }

    fn offer_subchannels(&self, instance: Guid, count: u16) {
        let mut offers = Vec::new();
        {
            let mut state = lock(&self.0.state);
            let state = &mut *state;
            let primary_open = state.channels.values().any(|channel| {
                channel.instance == instance
                    && channel.subchannel_index == 0
                    && matches!(channel.state, ChannelState::Open(_))
            });
            let entry = state
                .devices
                .iter()
                .find(|entry| entry.offer.instance == instance && entry.offered);
            let (true, Some(entry)) = (primary_open, entry) else {
                // The primary channel was closed meanwhile.
                return;
            };
            for index in 1..=count {
                let exists = state.channels.values().any(|channel| {
                    channel.instance == instance
                        && channel.subchannel_index == index
                        && !matches!(channel.state, ChannelState::Rescinded)
                });
                if exists {
                    continue;
                }
                let Some(relid) = state.free_relid() else {
                    self.note("NOT_OFFERED", format_args!("{}: no free relid", entry.name));
                    break;
                };
                offers.push(self.offer_message(&entry.offer, relid, index));
                state.channels.insert(
                    relid,
                    ChannelEntry {
                        device: entry.device.clone(),
                        name: format!("{}.{index}", entry.name),
                        instance,
                        subchannel_index: index,
                        state: ChannelState::Offered,
                    },
                );
            }
        }
        for offer in offers {
            self.send_body(MessageType::OFFER_CHANNEL, &offer);
        }
    }

    fn open_channel(&self, connection: Connection, message: &OpenChannel) {
        let relid = message.relid.get();
        let answer = |status: u32| {
            self.send_body(
                MessageType::OPEN_CHANNEL_RESULT,
                &OpenResult {
                    relid: message.relid,
                    open_id: message.open_id,
                    status: status.into(),
                },
            );
        };
        match self.try_open(connection, relid, message) {
            Ok(Some((device, channel))) => match device.open(channel.clone()) {
                Ok(()) => answer(status::SUCCESS),
                Err(refused) => {
                    self.note(
                        "OPEN_REFUSED",
                        format_args!("{}: {refused}", channel.name()),
                    );
                    self.forget_open_channel(relid, &channel);
                    answer(status::UNSUCCESSFUL);
                }
            },
            // Rescinded: the guest's open has crossed the rescind, which ends its wait.
            Ok(None) => {}
            Err(error) => {
                self.protocol_error(format_args!("open of relid {relid}: {error}"));
                answer(status::INVALID_PARAMETER);
            }
        }
    }

    /// Makes the channel and enters it into the tables. `None` if the channel is rescinded.
    fn try_open(
        &self,
        connection: Connection,
        relid: u32,
        message: &OpenChannel,
    ) -> Result<Option<Opened>, String> {
        let shared = &self.0;
        let mut state = lock(&shared.state);
        let entry = state.channels.get_mut(&relid).ok_or("not offered")?;
        match entry.state {
            ChannelState::Offered => {}
            ChannelState::Open(_) => return Err("open already".into()),
            ChannelState::Rescinded => return Ok(None),
        }
        let target_vp = message.target_vp.get();
        if target_vp >= shared.platform.vp_count() {
            return Err(format!("no processor {target_vp}"));
        }
        let gpadl = shared
            .gpadls
            .get(message.ring_gpadl.get())
            .filter(|gpadl| gpadl.relid() == relid)
            .ok_or("no such GPADL on this channel")?;
        let parameters = OpenParameters {
            name: entry.name.clone(),
            instance: entry.instance,
            relid,
            subchannel_index: entry.subchannel_index,
            version: connection.version,
            target_vp,
            sint: connection.message_sint,
            open_data: message.user_data,
            ring_gpadl: message.ring_gpadl.get(),
            ring_pages: gpadl.pages().ok_or("rings are not whole pages")?,
            downstream_page: message.downstream_page_offset.get(),
        };
        let channel = Channel::new(
            parameters,
            shared.platform.clone(),
            shared.gpadls.clone(),
            shared.requests.clone(),
            shared.counters.interrupts.clone(),
        )
        .map_err(|error| error.to_string())?;
        let channel = Arc::new(channel);
        entry.state = ChannelState::Open(channel.clone());
        let device = entry.device.clone();
        // Before the device is called, so that no signal is lost.
        shared
            .signals
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(CHANNEL_CONNECTION_BASE + relid, channel.clone());
        Ok(Some((device, channel)))
    }

    /// Ends the rings of a channel that is no longer open; the device has not been told.
    fn forget_open_channel(&self, relid: u32, channel: &Channel) {
        self.0
            .signals
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&(CHANNEL_CONNECTION_BASE + relid));
        channel.close();
        if let Some(entry) = lock(&self.0.state).channels.get_mut(&relid) {
            if matches!(entry.state, ChannelState::Open(_)) {
                entry.state = ChannelState::Offered;
            }
        }
    }

    /// Closes a channel if it is open and tells its device. Whether it was is the result.
    fn close_if_open(&self, relid: u32) -> bool {
        let open = lock(&self.0.state)
            .channels
            .get(&relid)
            .and_then(|entry| match &entry.state {
                ChannelState::Open(channel) => Some((channel.clone(), entry.device.clone())),
                _ => None,
            });
        let Some((channel, device)) = open else {
            return false;
        };
        self.forget_open_channel(relid, &channel);
        device.close(channel.subchannel_index());
        true
    }

    fn close_channel(&self, message: &ChannelId) {
        let relid = message.relid.get();
        let (instance, index, rescinded) = {
            let state = lock(&self.0.state);
            let Some(entry) = state.channels.get(&relid) else {
                drop(state);
                return self.protocol_error(format_args!("close of unknown relid {relid}"));
            };
            (
                entry.instance,
                entry.subchannel_index,
                matches!(entry.state, ChannelState::Rescinded),
            )
        };
        if !self.close_if_open(relid) {
            // A close that crosses a rescind is in order.
            if !rescinded {
                self.protocol_error(format_args!("close of relid {relid}, which is not open"));
            }
            return;
        }
        if index == 0 {
            // Subchannels live only as long as their primary channel is open.
            let relids = lock(&self.0.state).relids_of(instance);
            for subchannel in relids.into_iter().filter(|&other| other != relid) {
                self.rescind(subchannel);
            }
        }
    }

    /// Closes a channel and takes its offer back.
    fn rescind(&self, relid: u32) {
        self.close_if_open(relid);
        {
            let mut state = lock(&self.0.state);
            match state.channels.get_mut(&relid) {
                Some(entry) if !matches!(entry.state, ChannelState::Rescinded) => {
                    entry.state = ChannelState::Rescinded;
                }
                _ => return,
            }
            state.partial_gpadls.retain(|_, gpadl| gpadl.relid != relid);
        }
        self.send_body(
            MessageType::RESCIND_CHANNEL_OFFER,
            &ChannelId {
                relid: relid.into(),
            },
        );
    }

    fn remove_device(&self, instance: Guid) {
        let relids = {
            let mut state = lock(&self.0.state);
            // The first: a second one with the same instance is its successor.
            let at = state
                .devices
                .iter()
                .position(|entry| entry.offer.instance == instance);
            let Some(at) = at else {
                return;
            };
            if !state.devices.remove(at).offered {
                return;
            }
            state.relids_of(instance)
        };
        for relid in relids {
            self.rescind(relid);
        }
    }

    fn relid_released(&self, message: &ChannelId) {
        let relid = message.relid.get();
        let state = lock(&self.0.state)
            .channels
            .get(&relid)
            .map(|entry| matches!(entry.state, ChannelState::Rescinded));
        match state {
            None => return self.protocol_error(format_args!("release of unknown relid {relid}")),
            // The guest could not make use of the offer.
            Some(false) => self.note("OFFER_DECLINED", format_args!("relid={relid}")),
            Some(true) => {}
        }
        if self.close_if_open(relid) {
            self.protocol_error(format_args!("release of relid {relid}, which is open"));
        }
        lock(&self.0.state).channels.remove(&relid);
        // After a rescind a guest need not tear down its GPADLs.
        let gpadls = self.0.gpadls.tear_down_if(|gpadl| gpadl.relid() == relid);
        if gpadls != 0 {
            self.note(
                "GPADLS_RELEASED",
                format_args!("relid={relid} count={gpadls}"),
            );
        }
        self.offer_devices();
    }

    fn gpadl_header(&self, message: &GpadlHeader, rest: &[u8]) {
        let (relid, id) = (message.relid.get(), message.gpadl.get());
        let begun = {
            let mut state = lock(&self.0.state);
            let state = &mut *state;
            match state.channels.get(&relid) {
                None => Err("not offered"),
                Some(entry) if matches!(entry.state, ChannelState::Rescinded) => return,
                Some(entry) => {
                    if state.partial_gpadls.contains_key(&id) || self.0.gpadls.get(id).is_some() {
                        Err("the id is in use")
                    } else if state.partial_gpadls.len() + self.0.gpadls.len() >= MAX_GPADLS {
                        Err("too many")
                    } else {
                        let gpadl = PartialGpadl::new(
                            relid,
                            entry.instance,
                            message.range_count.get(),
                            message.range_buffer_len.get(),
                        );
                        state.partial_gpadls.insert(id, gpadl);
                        Ok(())
                    }
                }
            }
        };
        match begun {
            Ok(()) => self.gpadl_add(id, rest),
            Err(error) => {
                self.protocol_error(format_args!("GPADL {id:#x} for relid {relid}: {error}"));
                self.gpadl_created(relid, id, status::INVALID_PARAMETER);
            }
        }
    }

    fn gpadl_body(&self, message: &GpadlBody, rest: &[u8]) {
        self.gpadl_add(message.gpadl.get(), rest);
    }

    /// Adds to a GPADL, and establishes it when it is complete.
    fn gpadl_add(&self, id: u32, bytes: &[u8]) {
        let shared = &self.0;
        let mut state = lock(&shared.state);
        let Some(partial) = state.partial_gpadls.get_mut(&id) else {
            drop(state);
            return self.protocol_error(format_args!("body of unknown GPADL {id:#x}"));
        };
        let relid = partial.relid;
        // A message is padded by nobody, but a header may be longer than what it announces.
        let complete = match partial.add(bytes) {
            Ok(false) => return,
            Ok(true) => Ok(()),
            Err(error) => Err(error),
        };
        let partial = state.partial_gpadls.remove(&id);
        drop(state);
        let Some(partial) = partial else {
            return;
        };
        match complete.and_then(|()| partial.finish(id, &*shared.platform)) {
            Ok(gpadl) => {
                shared.gpadls.insert(gpadl);
                self.gpadl_created(relid, id, status::SUCCESS);
            }
            Err(error) => {
                self.protocol_error(format_args!("GPADL {id:#x}: {error}"));
                self.gpadl_created(relid, id, status::INVALID_PARAMETER);
            }
        }
    }

    fn gpadl_created(&self, relid: u32, gpadl: u32, status: u32) {
        self.send_body(
            MessageType::GPADL_CREATED,
            &GpadlCreated {
                relid: relid.into(),
                gpadl: gpadl.into(),
                status: status.into(),
            },
        );
    }

    fn gpadl_teardown(&self, message: &GpadlTeardown) {
        let id = message.gpadl.get();
        let ring_of_open = {
            let state = lock(&self.0.state);
            state.channels.values().any(|entry| {
                matches!(&entry.state, ChannelState::Open(channel)
                    if channel.ring_gpadl() == id)
            })
        };
        if ring_of_open {
            self.protocol_error(format_args!("teardown of GPADL {id:#x}: a ring in use"));
            // The guest takes the memory anyway, so the host must let go of it.
            self.close_if_open(message.relid.get());
        }
        if self.0.gpadls.tear_down(id).is_none() {
            self.protocol_error(format_args!("teardown of unknown GPADL {id:#x}"));
        }
        self.send_body(
            MessageType::GPADL_TORNDOWN,
            &GpadlTorndown {
                gpadl: message.gpadl,
            },
        );
    }

    fn modify_channel(&self, version: Version, message: &ModifyChannel) {
        let (relid, vp) = (message.relid.get(), message.target_vp.get());
        if version < Version::V4_1 {
            return self.protocol_error(format_args!("modify channel in version {version}"));
        }
        let channel =
            lock(&self.0.state)
                .channels
                .get(&relid)
                .and_then(|entry| match &entry.state {
                    ChannelState::Open(channel) => Some(channel.clone()),
                    _ => None,
                });
        let status = match channel {
            Some(channel) if vp < self.0.platform.vp_count() => {
                channel.set_target_vp(vp);
                status::SUCCESS
            }
            _ => {
                self.protocol_error(format_args!("relid {relid} to processor {vp}"));
                status::INVALID_PARAMETER
            }
        };
        // Older hosts do not answer.
        if version >= Version::V5_3 {
            self.send_body(
                MessageType::MODIFY_CHANNEL_RESPONSE,
                &ModifyChannelResponse {
                    relid: message.relid,
                    status: status.into(),
                },
            );
        }
    }

    /// There are no Hyper-V sockets here.
    fn tl_connect(&self, message: &TlConnectRequest) {
        self.send_body(
            MessageType::TL_CONNECT_RESULT,
            &TlConnectResult {
                endpoint: message.endpoint,
                service: message.service,
                status: status::CONNECTION_REFUSED.into(),
            },
        );
    }

    fn unload(&self) {
        let Some(connection) = lock(&self.0.state).connection else {
            return;
        };
        self.disconnect("unload");
        self.send_to(
            connection.message_vp,
            connection.message_sint,
            &MessageBuffer::empty(MessageType::UNLOAD_RESPONSE),
        );
    }

    /// Closes all channels and forgets everything that the guest had.
    fn disconnect(&self, why: &str) {
        let shared = &self.0;
        let relids: Vec<u32> = {
            let state = lock(&shared.state);
            let mut relids: Vec<(bool, u32)> = state
                .channels
                .iter()
                .map(|(&relid, entry)| (entry.subchannel_index == 0, relid))
                .collect();
            // Subchannels first.
            relids.sort_unstable();
            relids.into_iter().map(|(_, relid)| relid).collect()
        };
        let open = relids
            .into_iter()
            .filter(|&relid| self.close_if_open(relid))
            .count();
        {
            let mut state = lock(&shared.state);
            state.connection = None;
            state.channels.clear();
            state.partial_gpadls.clear();
            for entry in &mut state.devices {
                entry.offered = false;
            }
        }
        shared.extra_message_connection.store(0, Ordering::Release);
        *lock(&shared.interrupt_page) = None;
        let gpadls = shared.gpadls.tear_down_if(|_| true);
        self.note(
            "DISCONNECT",
            format_args!("reason=\"{why}\" open_channels={open} gpadls={gpadls}"),
        );
    }
}
