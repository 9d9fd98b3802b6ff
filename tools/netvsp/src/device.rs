// SPDX-License-Identifier: GPL-2.0

//! The synthetic NIC: the VMBus device, its channels' workers, and what the host does with it.
//!
//! Each open channel has a worker, which takes the guest's packets. The primary channel's worker
//! is the only one that negotiates and that sends messages on its own account: what the host
//! wants told to the guest is state ([`Wanted`]), which that worker brings to the guest whenever
//! there is room. Frames for the guest are put into the rings by the thread that reads the
//! uplink.
//!
//! Locks, in the order in which they may be taken: the switch port's paths, then [`Receive`],
//! then a channel's own. `Wanted`, `Session` and the others are taken alone.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use hyperv_wire::ndis::PacketFilter;
use hyperv_wire::nvsp::{DataPath, Version};
use hyperv_wire::vmbus::class;
use vmbus_host::{Channel, Counter, Counters, Direction, MessageLog, Offer, OpenRefused};
use vmm_sys_util::eventfd::EventFd;

use crate::config::{Config, Fault, FaultAction, FaultPoint, Raw, Settings};
use crate::frame::{self, Mac};
use crate::port::{Delivery, Path, RxFrame, SwitchPort, SyntheticSink};
use crate::receive::Receive;
use crate::transport::{SharedMemory, Transport};
use crate::worker::Worker;

/// How long a frame waits for room before it is dropped.
const ROOM_WAIT: Duration = Duration::from_millis(100);

/// How long something that is sent as it is waits for room.
const RAW_WAIT: Duration = Duration::from_secs(2);

/// What the guest shall know, set by the host's user at any time.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    /// Serial number of the VF that belongs to the NIC.
    pub(crate) association: Option<u32>,
    /// The cable is plugged in.
    pub(crate) link: bool,
    /// Mbit/s.
    pub(crate) link_speed: u32,
    /// Counts changes of the network behind the NIC.
    pub(crate) network: u32,
}

/// What has been negotiated, for whoever asks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// NVSP version, if the guest's driver is connected.
    pub version: Option<Version>,
    /// Open channels, the primary one included.
    pub channels: usize,
    /// Packet filter, zero while the guest's interface is down.
    pub packet_filter: u32,
    /// The guest has switched its data path to the VF.
    pub data_path_is_vf: bool,
    /// Serial number of the VF that the guest was told of.
    pub association: Option<u32>,
    /// The cable is plugged in.
    pub link: bool,
}

/// The send buffer, for the workers of all channels.
pub(crate) struct SendBuffer {
    pub(crate) memory: Arc<dyn SharedMemory>,
    pub(crate) section_size: u32,
}

/// What transmission needs of the negotiated state.
#[derive(Default)]
pub(crate) struct TxState {
    pub(crate) version: Option<Version>,
    pub(crate) send_buffer: Option<SendBuffer>,
}

/// What all threads of a NIC share.
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) port: Arc<SwitchPort>,
    pub(crate) log: Arc<MessageLog>,
    pub(crate) wanted: Mutex<Wanted>,
    pub(crate) told_association: Mutex<Option<u32>>,
    pub(crate) tx: RwLock<TxState>,
    receive: Mutex<Receive>,
    room: Condvar,
    faults: Mutex<Vec<Fault>>,
    settings: Mutex<Settings>,
    /// Wakes the primary channel's worker.
    pub(crate) kick: EventFd,
    pub(crate) counters: NicCounters,
}

/// Counters of events other than frames.
pub(crate) struct NicCounters {
    pub(crate) switches: Counter,
    pub(crate) protocol_errors: Counter,
    pub(crate) no_room: Counter,
    pub(crate) tx_messages: Counter,
    pub(crate) tx_in_sections: Counter,
    pub(crate) tx_in_pages: Counter,
    pub(crate) tx_in_both: Counter,
    pub(crate) tx_split_headers: Counter,
}

/// Locks a mutex. What it guards is consistent at every point where a holder could panic.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(crate) fn receive(&self) -> MutexGuard<'_, Receive> {
        lock(&self.receive)
    }

    /// Sends what waits for the guest and wakes those who wait for room.
    pub(crate) fn pump(&self) {
        let mut receive = self.receive();
        receive.pump();
        // Seldom; a notification costs a system call.
        if receive.waiting > 0 {
            self.room.notify_all();
        }
    }

    /// What is otherwise than usually.
    pub(crate) fn settings(&self) -> Settings {
        *lock(&self.settings)
    }

    pub(crate) fn wake_primary(&self) {
        // Fails only if the counter is at its limit, and then the event is set.
        let _ = self.kick.write(1);
    }

    pub(crate) fn record(
        &self,
        direction: Direction,
        channel: &str,
        name: &str,
        fields: impl fmt::Display,
    ) {
        self.log.record(direction, channel, name, fields);
    }

    /// Something of the guest that makes no sense.
    pub(crate) fn protocol_error(&self, channel: &str, what: impl fmt::Display) {
        self.counters.protocol_errors.inc();
        self.record(Direction::Host, channel, "PROTOCOL_ERROR", what);
    }

    /// Uses up one time of the first such fault.
    fn take_fault(&self, wanted: impl Fn(&Fault) -> bool) -> Option<FaultAction> {
        let mut faults = lock(&self.faults);
        let fault = faults.iter_mut().find(|fault| wanted(fault))?;
        fault.times -= 1;
        let action = fault.action;
        faults.retain(|fault| fault.times > 0);
        Some(action)
    }

    /// The fault that the answer at one of the given points shall have.
    pub(crate) fn fault(&self, points: &[FaultPoint]) -> Option<FaultAction> {
        self.take_fault(|fault| {
            fault.action != FaultAction::Refuse && points.contains(&fault.point)
        })
    }

    /// Whether a request shall be refused.
    pub(crate) fn refuses(&self, channel: &str, point: FaultPoint) -> bool {
        let refuse = self
            .take_fault(|fault| fault.action == FaultAction::Refuse && fault.point == point)
            .is_some();
        if refuse {
            self.record(Direction::Host, channel, "FAULT", "refuse");
        }
        refuse
    }

    /// Forgets the guest's driver.
    fn reset(&self) {
        self.port.set_synthetic_sink(None);
        *self.tx.write().unwrap_or_else(PoisonError::into_inner) = TxState::default();
        *lock(&self.told_association) = None;
        self.receive().reset();
        self.room.notify_all();
    }

    /// Puts a frame into its channel's batch, waiting for room until `deadline`.
    fn push<'a>(
        &'a self,
        mut receive: MutexGuard<'a, Receive>,
        frame: RxFrame<'_>,
        coalesced: bool,
        deadline: &mut Option<Instant>,
    ) -> (MutexGuard<'a, Receive>, bool) {
        loop {
            if let Ok(taken) = receive.push(frame, coalesced) {
                return (receive, taken);
            }
            // What is in the batches must reach the guest, or it will never make room.
            receive.pump();
            let now = Instant::now();
            let end = *deadline.get_or_insert(now + ROOM_WAIT);
            // The guest may have closed meanwhile.
            if now >= end || !receive.wants(frame.data) {
                self.counters.no_room.inc();
                return (receive, false);
            }
            receive.waiting += 1;
            receive = self
                .room
                .wait_timeout(receive, end - now)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            receive.waiting -= 1;
        }
    }
}

/// The synthetic path, as the switch port sees it.
struct Sink {
    shared: Arc<Shared>,
    /// Set when a frame has waited in vain: the rest of the batch does not wait again.
    deadline: Mutex<Option<Instant>>,
}

impl SyntheticSink for Sink {
    fn deliver(&self, frame: RxFrame<'_>) -> Delivery {
        let mut deadline = lock(&self.deadline);
        let receive = self.shared.receive();
        if !receive.wants(frame.data) {
            return Delivery::Dropped;
        }
        let coalesced = frame.gso_size.is_some() && receive.may_coalesce(frame.data);
        let taken = match frame.gso_size {
            Some(mss) if !coalesced => {
                let mut guard = Some(receive);
                let mut any = false;
                let fits = frame::segment(frame.data, mss.into(), |data| {
                    let segment = RxFrame {
                        data,
                        checksum_valid: true,
                        gso_size: None,
                    };
                    let receive = guard.take().unwrap_or_else(|| self.shared.receive());
                    let (receive, taken) = self.shared.push(receive, segment, false, &mut deadline);
                    any |= taken;
                    guard = Some(receive);
                });
                fits && any
            }
            _ => self.shared.push(receive, frame, coalesced, &mut deadline).1,
        };
        if taken {
            Delivery::Delivered
        } else {
            Delivery::Dropped
        }
    }

    fn flush(&self) {
        *lock(&self.deadline) = None;
        self.shared.receive().pump();
    }
}

/// A worker's thread.
struct Running {
    thread: JoinHandle<()>,
    stop: Arc<EventFd>,
}

/// A synthetic NIC.
pub struct Nic {
    shared: Arc<Shared>,
    workers: Mutex<HashMap<u16, Running>>,
}

impl fmt::Debug for Nic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nic")
            .field("config", &self.shared.config)
            .finish_non_exhaustive()
    }
}

impl Nic {
    /// A NIC that hangs on the given switch port.
    pub fn new(
        config: Config,
        port: Arc<SwitchPort>,
        log: Arc<MessageLog>,
        counters: &Counters,
    ) -> io::Result<Arc<Self>> {
        let counter = |what| counters.counter(&format!("{}.{what}", config.name));
        let nic_counters = NicCounters {
            switches: counter("data_path_switches"),
            protocol_errors: counter("protocol_errors"),
            no_room: counter("synthetic.rx_no_room"),
            tx_messages: counter("synthetic.tx_messages"),
            tx_in_sections: counter("synthetic.tx_in_sections"),
            tx_in_pages: counter("synthetic.tx_in_pages"),
            tx_in_both: counter("synthetic.tx_in_both"),
            tx_split_headers: counter("synthetic.tx_split_headers"),
        };
        let receive = Receive::new(
            &config.name,
            config.mac,
            usize::from(config.max_channels.max(1)),
            counters,
        );
        Ok(Arc::new(Self {
            shared: Arc::new(Shared {
                wanted: Mutex::new(Wanted {
                    association: None,
                    link: true,
                    link_speed: config.link_speed,
                    network: 0,
                }),
                told_association: Mutex::new(None),
                tx: RwLock::new(TxState::default()),
                receive: Mutex::new(receive),
                room: Condvar::new(),
                faults: Mutex::new(Vec::new()),
                settings: Mutex::new(Settings::default()),
                kick: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
                counters: nic_counters,
                config,
                port,
                log,
            }),
            workers: Mutex::new(HashMap::new()),
        }))
    }

    /// The switch port.
    pub fn port(&self) -> &Arc<SwitchPort> {
        &self.shared.port
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.shared.config
    }

    /// Tells the guest which VF belongs to the NIC, now and whenever its driver starts.
    pub fn set_vf_association(&self, serial: Option<u32>) {
        lock(&self.shared.wanted).association = serial;
        self.shared.wake_primary();
    }

    /// Plugs the cable in or pulls it.
    pub fn set_link(&self, up: bool) {
        lock(&self.shared.wanted).link = up;
        self.shared.port.set_link(up);
        self.shared.wake_primary();
    }

    /// Changes the link speed, in Mbit/s.
    pub fn set_link_speed(&self, speed: u32) {
        lock(&self.shared.wanted).link_speed = speed;
        self.shared.wake_primary();
    }

    /// Tells the guest that it hangs on another network now.
    pub fn change_network(&self) {
        let mut wanted = lock(&self.shared.wanted);
        wanted.network = wanted.network.wrapping_add(1);
        drop(wanted);
        self.shared.wake_primary();
    }

    /// Lets an answer go wrong, instead of what was ordered for it before.
    pub fn inject(&self, fault: Fault) {
        let mut faults = lock(&self.shared.faults);
        faults.retain(|old| (old.point, old.action) != (fault.point, fault.action));
        if fault.times > 0 {
            faults.push(fault);
        }
    }

    /// Changes how the host behaves.
    pub fn adjust(&self, change: impl FnOnce(&mut Settings)) {
        change(&mut lock(&self.shared.settings));
    }

    /// Sends something to the guest's driver as it is, waiting for room.
    pub fn send_raw(&self, raw: &Raw) -> Result<(), String> {
        let deadline = Instant::now() + RAW_WAIT;
        let mut receive = self.shared.receive();
        loop {
            match receive.send_raw(raw)? {
                true => break,
                false if Instant::now() >= deadline => {
                    return Err("the guest makes no room for it".to_owned());
                }
                false => {}
            }
            receive.waiting += 1;
            receive = self
                .shared
                .room
                .wait_timeout(receive, ROOM_WAIT)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            receive.waiting -= 1;
        }
        drop(receive);
        let (name, length) = match raw {
            Raw::Nvsp(bytes) => ("RAW_NVSP", bytes.len()),
            Raw::Completion(_, bytes) => ("RAW_COMPLETION", bytes.len()),
            Raw::Rndis { messages, .. } => ("RAW_RNDIS", messages.iter().map(Vec::len).sum()),
        };
        let (direction, nic) = (Direction::HostToGuest, &self.shared.config.name);
        self.shared
            .record(direction, nic, name, format_args!("length={length}"));
        Ok(())
    }

    /// What has been negotiated.
    pub fn status(&self) -> Status {
        let tx = self.shared.tx.read();
        let version = tx.unwrap_or_else(PoisonError::into_inner).version;
        let association = *lock(&self.shared.told_association);
        let link = lock(&self.shared.wanted).link;
        // Before the lock of `receive`, which comes after the port's.
        let data_path_is_vf = self.shared.port.data_path_is_vf();
        let receive = self.shared.receive();
        Status {
            version,
            channels: receive.num_open(),
            packet_filter: receive.filter().0,
            data_path_is_vf,
            association,
            link,
        }
    }

    /// Starts the worker of an opened channel.
    pub(crate) fn open_transport(&self, transport: Arc<dyn Transport>) -> Result<(), String> {
        let index = transport.subchannel_index();
        let name = transport.name().to_owned();
        if index != 0 && self.shared.refuses(&name, FaultPoint::SubchannelOpen) {
            return Err("a fault was ordered".to_owned());
        }
        if !self.shared.receive().open(transport.clone()) {
            return Err(format!("there is no subchannel {index}"));
        }
        let stop = match EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) {
            Ok(stop) => Arc::new(stop),
            Err(error) => {
                self.shared.receive().close(index.into());
                return Err(error.to_string());
            }
        };
        if index == 0 {
            let sink = Sink {
                shared: self.shared.clone(),
                deadline: Mutex::new(None),
            };
            self.shared.port.set_synthetic_sink(Some(Arc::new(sink)));
        }
        let worker = Worker::new(self.shared.clone(), transport, stop.clone());
        let spawned = thread::Builder::new()
            .name(name)
            .spawn(move || worker.run());
        match spawned {
            Ok(thread) => {
                lock(&self.workers).insert(index, Running { thread, stop });
                // Perhaps the last of the subchannels that were granted.
                self.shared.wake_primary();
                Ok(())
            }
            Err(error) => {
                self.close_transport(index);
                Err(error.to_string())
            }
        }
    }

    /// Ends the worker of a closed channel.
    pub(crate) fn close_transport(&self, index: u16) {
        let running = lock(&self.workers).remove(&index);
        if let Some(running) = running {
            // Fails only if the counter is at its limit, and then the event is set.
            let _ = running.stop.write(1);
            if running.thread.join().is_err() {
                self.shared
                    .protocol_error(&self.shared.config.name, "the worker has panicked");
            }
        }
        self.shared.receive().close(index.into());
        if index == 0 {
            self.shared.reset();
        }
    }
}

impl vmbus_host::Device for Nic {
    fn name(&self) -> String {
        self.shared.config.name.clone()
    }

    fn offer(&self) -> Offer {
        Offer::new(class::NETWORK, self.shared.config.instance)
    }

    fn open(&self, channel: Arc<Channel>) -> Result<(), OpenRefused> {
        self.open_transport(channel).map_err(OpenRefused)
    }

    fn close(&self, subchannel_index: u16) {
        self.close_transport(subchannel_index);
    }
}

impl Shared {
    /// Moves the traffic to the path that the guest has chosen.
    pub(crate) fn switch_data_path(&self, path: DataPath) -> bool {
        let to = match path {
            DataPath::SYNTHETIC => Path::Synthetic,
            DataPath::VF => Path::Vf,
            _ => return false,
        };
        self.port.switch_data_path(to);
        self.counters.switches.inc();
        true
    }

    /// Sets the address that the guest uses from now on.
    pub(crate) fn set_mac(&self, mac: Mac) {
        self.port.set_mac(mac);
        self.receive().set_mac(mac);
    }

    /// Sets the packet filter.
    pub(crate) fn set_filter(&self, filter: PacketFilter) {
        self.receive().set_filter(filter);
        self.room.notify_all();
    }

    /// Stops RNDIS.
    pub(crate) fn stop(&self) {
        self.receive().stop();
        self.room.notify_all();
    }
}
