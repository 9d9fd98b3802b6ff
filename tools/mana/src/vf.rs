// SPDX-License-Identifier: GPL-2.0

//! The virtual function: registers, doorbells, the worker, packets.
//!
//! Doorbells of event, completion and receive queues only move numbers and may send an interrupt, so
//! they are handled where they are rung. Send queues and the shared memory belong to the worker.
//!
//! Lock order: the adapter, then the queues (see `queue`). The adapter is locked for writing only by
//! requests of the driver and by resets; whoever touches guest memory holds it at least for reading,
//! so after a reset nothing does any more.

use std::{
    sync::{
        atomic::{AtomicBool, Ordering},
        Arc, Condvar, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
    },
    thread::{self, JoinHandle},
};

use netvsp::{
    frame::{self, Network, Transport, TxOffload},
    rss, Delivery, RxFrame, SwitchPort, VfSink,
};
use vm_memory::GuestMemoryMmap;
use vmbus_host::{Counters, Direction, MessageLog};
use vpci::{Bar, Description, InterruptSender, MsixLayout, PciFunction};
use zerocopy::FromBytes;

use crate::{
    adapter::{
        request_name, Adapter, Effect, Limits, HWC_DOORBELL, MANA_DOORBELL, MESSAGE_MAX,
        VPORT_OFFSET,
    },
    queue::{gather, lock, scatter, Consumer, EventQueue, Fault, WorkQueue, Wqe},
    statistics::Statistics,
    wire::{
        completion, doorbell, event, pack_hwc_completion, pack_tx_completion, reconfig_data,
        register, typed_data, Establish, RequestHeader, RxOob, SharedHeader, TxOob, PAGE,
        SHARED_MEMORY,
    },
};

const VENDOR_MICROSOFT: u16 = 0x1414;
const DEVICE_MANA_VF: u16 = 0x00ba;

/// Size of BAR 0.
const BAR0_SIZE: u64 = 0x10_0000;
/// Offset of the shared memory in BAR 0.
const SHARED_MEMORY_AT: u64 = 0x1000;
/// Offset of the doorbell pages in BAR 0.
const DOORBELLS_AT: u64 = 0x1_0000;
/// BAR with the MSI-X table.
const MSIX_BAR: u8 = 4;
/// Size of the BAR with the MSI-X table.
const MSIX_BAR_SIZE: u64 = 0x8000;
/// Offset of the pending bits behind the MSI-X table.
const MSIX_PENDING: u32 = 0x4000;

/// Largest packet, Ethernet header included. This is the largest the driver accepts as `adapter_mtu`
/// without needing receive buffers of several pages at the usual MTU.
const FRAME: u16 = 9014;
/// Longest packet to send: a large send with its headers.
const TX_MAX: usize = 65536 + 256;
/// Packets sent between two announcements of their completions.
const TX_BATCH: usize = 32;

/// Where packets that the guest sends go.
pub trait Uplink: Send + Sync {
    /// Takes a packet. Its headers may be changed in place.
    fn transmit(&self, data: &mut [u8], offload: &TxOffload);
}

impl Uplink for SwitchPort {
    fn transmit(&self, data: &mut [u8], offload: &TxOffload) {
        self.deliver_from_vf(data, offload);
    }
}

/// What kind of VF to make.
#[derive(Clone, Debug)]
pub struct VfOptions {
    /// Name for the message log and the counters.
    pub name: String,
    /// Permanent MAC address, that of the synthetic NIC.
    pub mac: [u8; 6],
    /// Most send and receive queues, 1 to [`VfOptions::QUEUES_MAX`].
    pub queues: u16,
    /// Link speed in megabits per second.
    pub speed: u32,
}

impl VfOptions {
    /// Most queues a VF can have.
    pub const QUEUES_MAX: u16 = 64;
}

/// What the worker has to do.
#[derive(Default)]
struct Work {
    /// The driver has written the shared memory.
    shared_memory: bool,
    /// Send queues whose doorbell was rung.
    sends: Vec<u32>,
    stop: bool,
}

struct Vf {
    name: String,
    log: Arc<MessageLog>,
    uplink: Arc<dyn Uplink>,
    statistics: Statistics,
    adapter: RwLock<Adapter>,
    interrupts: OnceLock<InterruptSender>,
    shared_memory: Mutex<[u8; SHARED_MEMORY]>,
    work: Mutex<Work>,
    wake: Condvar,
    link_up: AtomicBool,
}

/// A MANA virtual function.
pub struct ManaVf {
    vf: Arc<Vf>,
    limits: Limits,
    worker: Mutex<Option<JoinHandle<()>>>,
}

impl ManaVf {
    /// A VF in its power-on state, with the link up.
    pub fn new(
        options: &VfOptions,
        memory: GuestMemoryMmap,
        uplink: Arc<dyn Uplink>,
        counters: &Counters,
        log: Arc<MessageLog>,
    ) -> std::io::Result<Arc<Self>> {
        let queues = options.queues.clamp(1, VfOptions::QUEUES_MAX);
        let limits = Limits {
            queues,
            vectors: queues + 1,
            frame: FRAME,
            mac: options.mac,
            speed: options.speed,
        };
        let vf = Arc::new(Vf {
            name: options.name.clone(),
            log,
            uplink,
            statistics: Statistics::new(counters, &options.name),
            adapter: RwLock::new(Adapter::new(memory, limits.clone())),
            interrupts: OnceLock::new(),
            shared_memory: Mutex::new([0; SHARED_MEMORY]),
            work: Mutex::default(),
            wake: Condvar::new(),
            link_up: AtomicBool::new(true),
        });
        let worker = thread::Builder::new().name(options.name.clone()).spawn({
            let vf = vf.clone();
            move || vf.run()
        })?;
        Ok(Arc::new(Self {
            vf,
            limits,
            worker: Mutex::new(Some(worker)),
        }))
    }

    /// Plugs the cable of the VF in or pulls it, and tells the driver.
    pub fn set_link(&self, up: bool) {
        self.vf.link_up.store(up, Ordering::Relaxed);
        self.vf.tell_link();
    }

    /// Whether the link of the VF is up.
    pub fn link(&self) -> bool {
        self.vf.link_up.load(Ordering::Relaxed)
    }

    /// Asks the driver to reset the adapter, which then does nothing until it is set up again. Says
    /// whether there is a driver to ask.
    pub fn request_reset(&self) -> bool {
        let mut adapter = self.vf.write();
        let Some(events) = adapter.hwc.as_ref().map(|hwc| hwc.events.clone()) else {
            return false;
        };
        adapter.resetting = true;
        self.vf
            .record(Direction::HostToGuest, "HWC_RESET_REQUEST", "");
        if let Some(interrupts) = self.vf.interrupts.get() {
            events.post(event::HWC_RESET_REQUEST, [0; 3], interrupts);
        }
        true
    }

    /// Whether the driver has brought the network interface up.
    pub fn is_receiving(&self) -> bool {
        let adapter = self.vf.read();
        adapter.steering.enabled && !adapter.resetting
    }
}

impl Drop for ManaVf {
    fn drop(&mut self) {
        lock(&self.vf.work).stop = true;
        self.vf.wake.notify_all();
        if let Some(worker) = lock(&self.worker).take() {
            // A panic of the worker was reported where it happened.
            let _ = worker.join();
        }
    }
}

impl PciFunction for ManaVf {
    fn description(&self) -> Description {
        let bar = |size| {
            Some(Bar {
                size,
                wide: true,
                prefetchable: true,
            })
        };
        let mut bars = [None; 6];
        bars[0] = bar(BAR0_SIZE);
        bars[usize::from(MSIX_BAR)] = bar(MSIX_BAR_SIZE);
        Description {
            vendor: VENDOR_MICROSOFT,
            device: DEVICE_MANA_VF,
            revision: 0,
            // Ethernet controller.
            class: [2, 0, 0],
            subsystem_vendor: VENDOR_MICROSOFT,
            subsystem: DEVICE_MANA_VF,
            bars,
            msix: Some(MsixLayout {
                vectors: self.limits.vectors,
                bar: MSIX_BAR,
                table: 0,
                pending: MSIX_PENDING,
            }),
            rom: None,
            msi: None,
        }
    }

    fn attach(&self, interrupts: InterruptSender) {
        // A VF is put on one bus only.
        let _ = self.vf.interrupts.set(interrupts);
    }

    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if bar != 0 {
            return;
        }
        if let Some(at) = in_shared_memory(offset, data.len()) {
            data.copy_from_slice(&lock(&self.vf.shared_memory)[at..at + data.len()]);
            return;
        }
        let mut registers = [0; 0x20];
        for (at, value) in [
            (register::DOORBELL_OFFSET, DOORBELLS_AT),
            (register::DOORBELL_PAGE_SIZE, PAGE),
            (register::SHARED_MEMORY_OFFSET, SHARED_MEMORY_AT),
        ] {
            let at = at as usize;
            registers[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        if let Some(source) = registers.get(at..at.saturating_add(data.len())) {
            data.copy_from_slice(source);
        }
    }

    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]) {
        if bar != 0 {
            return;
        }
        if let Some(at) = in_shared_memory(offset, data.len()) {
            self.vf.write_shared_memory(at, data);
        } else if let (Some(at), Ok(value)) =
            (offset.checked_sub(DOORBELLS_AT), <[u8; 8]>::try_from(data))
        {
            self.vf
                .ring((at / PAGE) as u32, at % PAGE, u64::from_le_bytes(value));
        }
    }

    fn reset(&self) {
        self.vf.write().reset();
        *lock(&self.vf.shared_memory) = [0; SHARED_MEMORY];
        let mut work = lock(&self.vf.work);
        work.sends.clear();
        work.shared_memory = false;
    }
}

/// Offset in the shared memory, if all of an access lies there.
fn in_shared_memory(offset: u64, len: usize) -> Option<usize> {
    let at = usize::try_from(offset.checked_sub(SHARED_MEMORY_AT)?).ok()?;
    (at.checked_add(len)? <= SHARED_MEMORY).then_some(at)
}

impl VfSink for ManaVf {
    fn deliver(&self, frame: RxFrame<'_>) -> Delivery {
        self.vf.receive(frame)
    }

    fn flush(&self) {
        let Some(interrupts) = self.vf.interrupts.get() else {
            return;
        };
        for queue in self.vf.read().receives.values() {
            queue.completions.announce(interrupts);
        }
    }
}

impl Vf {
    fn read(&self) -> RwLockReadGuard<'_, Adapter> {
        self.adapter.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Adapter> {
        self.adapter.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn record(&self, direction: Direction, name: &str, fields: impl std::fmt::Display) {
        self.log.record(direction, &self.name, name, fields);
    }

    fn fault(&self, what: &str) {
        self.statistics.faults.inc();
        self.record(Direction::Host, "fault", what);
    }

    /// A doorbell is rung.
    fn ring(&self, page: u32, offset: u64, value: u64) {
        let Some(interrupts) = self.interrupts.get() else {
            return;
        };
        if page != HWC_DOORBELL && page != MANA_DOORBELL {
            return;
        }
        let id = (value & 0xff_ffff) as u32;
        let tail = (value >> 32) as u32;
        let arm = tail & (1 << 31) != 0;
        let count = tail & !(1 << 31);
        let adapter = self.read();
        let hwc = adapter.hwc.as_ref();
        match offset {
            doorbell::EVENT => {
                if let Some(queue) = adapter.events.get(&(id & 0xffff)) {
                    queue.ring(count, arm, interrupts);
                }
            }
            doorbell::COMPLETION => {
                if let Some(queue) = adapter.completions.get(&id) {
                    queue.ring(count, arm, interrupts);
                }
            }
            doorbell::RECEIVE => {
                let hwc = hwc.map(|hwc| &hwc.receive).filter(|q| q.id() == id);
                if let Some(queue) = hwc.or_else(|| adapter.receives.get(&id)) {
                    queue.ring(tail);
                }
            }
            doorbell::SEND => {
                let hwc = hwc.map(|hwc| &hwc.send).filter(|q| q.id() == id);
                if let Some(queue) = hwc.or_else(|| adapter.sends.get(&id)) {
                    queue.ring(tail);
                    self.wake(|work| {
                        if !work.sends.contains(&id) {
                            work.sends.push(id);
                        }
                    });
                }
            }
            _ => {}
        }
    }

    fn wake(&self, add: impl FnOnce(&mut Work)) {
        add(&mut lock(&self.work));
        self.wake.notify_one();
    }

    fn write_shared_memory(&self, at: usize, data: &[u8]) {
        let mut memory = lock(&self.shared_memory);
        memory[at..at + data.len()].copy_from_slice(data);
        // The last byte hands the memory over to the adapter.
        if at + data.len() == SHARED_MEMORY {
            memory[SHARED_MEMORY - 1] |= (SharedHeader::OWNED_BY_ADAPTER >> 24) as u8;
            self.wake(|work| work.shared_memory = true);
        }
    }

    /// The worker.
    fn run(&self) {
        let mut packet = Vec::new();
        loop {
            let mut work = lock(&self.work);
            while !work.stop && !work.shared_memory && work.sends.is_empty() {
                work = self.wake.wait(work).unwrap_or_else(PoisonError::into_inner);
            }
            if work.stop {
                return;
            }
            let shared_memory = std::mem::take(&mut work.shared_memory);
            let sends = std::mem::take(&mut work.sends);
            drop(work);
            if shared_memory {
                self.handle_shared_memory();
            }
            for id in sends {
                let adapter = self.read();
                let is_hwc = adapter.hwc.as_ref().is_some_and(|hwc| hwc.send.id() == id);
                if is_hwc {
                    drop(adapter);
                    self.handle_requests(&mut packet);
                } else if let Some(queue) = adapter.sends.get(&id) {
                    self.transmit(&adapter, queue, &mut packet);
                }
            }
        }
    }

    fn handle_shared_memory(&self) {
        let memory = *lock(&self.shared_memory);
        let mut last = [0; 4];
        last.copy_from_slice(&memory[SHARED_MEMORY - 4..]);
        let header = SharedHeader(u32::from_le_bytes(last));
        let mut adapter = self.write();
        let mut announcements = Vec::new();
        let status = match header.message_type() {
            SharedHeader::ESTABLISH => {
                let request = Establish::parse(&memory);
                self.record(
                    Direction::GuestToHost,
                    "ESTABLISH_HWC",
                    format_args!("queues={:x?} vector={}", request.queues, request.vector),
                );
                announcements = adapter.establish(&request);
                0
            }
            SharedHeader::DESTROY => {
                self.record(Direction::GuestToHost, "DESTROY_HWC", "");
                adapter.reset();
                0
            }
            other => {
                self.fault(&format!("shared memory message {other}"));
                1
            }
        };
        let events = adapter.hwc.as_ref().map(|hwc| hwc.events.clone());
        // The answer first: the driver reads it before it waits for the events.
        let response = header.response(status).0.to_le_bytes();
        lock(&self.shared_memory)[SHARED_MEMORY - 4..].copy_from_slice(&response);
        if let (Some(events), Some(interrupts)) = (events, self.interrupts.get()) {
            for (event_type, data) in announcements {
                events.post(event_type, [data, 0, 0], interrupts);
            }
        }
    }

    /// Handles the requests on the hardware channel.
    fn handle_requests(&self, message: &mut Vec<u8>) {
        let Some(interrupts) = self.interrupts.get() else {
            return;
        };
        let mut adapter = self.write();
        while let Some(hwc) = adapter.hwc.clone() {
            match self.handle_request(&mut adapter, &hwc.send, &hwc.receive, message) {
                Ok(true) => hwc.send.completions.announce(interrupts),
                Ok(false) => return,
                Err(Fault) => return self.fault("hardware channel"),
            }
        }
    }

    /// Handles one request. Says whether there was one.
    fn handle_request(
        &self,
        adapter: &mut Adapter,
        send: &WorkQueue,
        receive: &WorkQueue,
        message: &mut Vec<u8>,
    ) -> Result<bool, Fault> {
        let mut requests = send.consumer();
        let Some(wqe) = requests.peek()? else {
            return Ok(false);
        };
        if wqe.size() > MESSAGE_MAX {
            return Err(Fault);
        }
        gather(adapter.memory(), &wqe, message)?;
        requests.take(&wqe);
        if adapter.resetting {
            return Ok(true);
        }
        let (header, rest) = RequestHeader::read_from_prefix(message).map_err(|_| Fault)?;
        let name = request_name(&header);
        let (response, status, effect) = adapter.request(&header, rest, &self.statistics);
        self.record(
            Direction::GuestToHost,
            name,
            format_args!("size={} status={status:#x}", message.len()),
        );

        let mut buffers = receive.consumer();
        let buffer = buffers.peek()?.ok_or(Fault)?;
        if buffer.size() < response.len() {
            return Err(Fault);
        }
        scatter(adapter.memory(), &buffer, &[&response])?;
        buffers.take(&buffer);

        // Both completions go to one queue, and the driver frees the request before it looks at
        // the response.
        let sent = pack_hwc_completion(wqe.offset, 0);
        send.completions.post(&sent, send.id(), true)?;
        let received = pack_hwc_completion(buffer.offset, response.len() as u32);
        receive.completions.post(&received, receive.id(), false)?;
        drop((requests, buffers));
        self.apply(effect)?;
        Ok(true)
    }

    fn apply(&self, effect: Effect) -> Result<(), Fault> {
        let Some(interrupts) = self.interrupts.get() else {
            return Ok(());
        };
        match effect {
            Effect::None => {}
            Effect::TestEvent(queue) => queue.post(event::TEST, [0; 3], interrupts),
            Effect::Fence(queue) => {
                // Packets are completed when they are received, so there is nothing to wait for.
                let data = RxOob::default().pack(completion::RX_FENCE);
                queue.completions.post(&data, queue.id(), false)?;
                queue.completions.announce(interrupts);
            }
            // A driver that has just come up believes that the link is up.
            Effect::ReceiveEnabled { events } => {
                if !self.link_up.load(Ordering::Relaxed) {
                    self.post_link(&events, false, interrupts);
                }
            }
        }
        Ok(())
    }

    fn post_link(&self, events: &EventQueue, up: bool, interrupts: &InterruptSender) {
        let (name, data_type) = if up {
            ("HW_LINK_CONNECT", reconfig_data::LINK_CONNECT)
        } else {
            ("HW_LINK_DISCONNECT", reconfig_data::LINK_DISCONNECT)
        };
        self.record(Direction::HostToGuest, name, "");
        let details = [typed_data(data_type, 0), 0, 0];
        events.post(event::HWC_RECONFIG_DATA, details, interrupts);
    }

    /// Tells the driver of the state of the link, if it is listening.
    fn tell_link(&self) {
        let adapter = self.read();
        let (Some(hwc), Some(interrupts)) = (&adapter.hwc, self.interrupts.get()) else {
            return;
        };
        if adapter.steering.enabled && !adapter.resetting {
            let up = self.link_up.load(Ordering::Relaxed);
            self.post_link(&hwc.events, up, interrupts);
        }
    }

    /// Sends what is in a send queue.
    fn transmit(&self, adapter: &Adapter, queue: &WorkQueue, packet: &mut Vec<u8>) {
        let Some(interrupts) = self.interrupts.get() else {
            return;
        };
        let mut sends = queue.consumer();
        let mut unannounced = 0;
        loop {
            match self.transmit_one(adapter, queue, &mut sends, packet) {
                Ok(true) => unannounced += 1,
                Ok(false) => break,
                Err(Fault) => {
                    self.fault(&format!("send queue {}", queue.id()));
                    break;
                }
            }
            if unannounced == TX_BATCH {
                queue.completions.announce(interrupts);
                unannounced = 0;
            }
        }
        queue.completions.announce(interrupts);
    }

    /// Sends one packet. Says whether there was one.
    fn transmit_one(
        &self,
        adapter: &Adapter,
        queue: &WorkQueue,
        sends: &mut Consumer<'_>,
        packet: &mut Vec<u8>,
    ) -> Result<bool, Fault> {
        let Some(wqe) = sends.peek()? else {
            return Ok(false);
        };
        let size = wqe.size();
        let completion_type = match TxOob::parse(wqe.oob()) {
            Some(oob) if oob.vport_offset != VPORT_OFFSET => {
                self.statistics.tx_wrong_vport.inc();
                completion::TX_VPORT_OUT_OF_RANGE
            }
            Some(oob) if (frame::ETHERNET_HEADER..=TX_MAX).contains(&size) => {
                if adapter.resetting || !self.link_up.load(Ordering::Relaxed) {
                    self.statistics.tx_disabled.inc();
                } else {
                    gather(adapter.memory(), &wqe, packet)?;
                    self.uplink.transmit(packet, &offload(&wqe, &oob));
                    self.statistics.sent(packet);
                }
                completion::TX_OKAY
            }
            _ => {
                self.statistics.tx_invalid_oob.inc();
                completion::TX_INVALID_OOB
            }
        };
        let data = pack_tx_completion(completion_type, wqe.offset);
        queue.completions.post(&data, queue.id(), true)?;
        sends.take(&wqe);
        Ok(true)
    }

    /// Receives a packet.
    ///
    /// The driver expects completions in the order of its buffers, so a packet is dropped before it
    /// takes a buffer or not at all.
    fn receive(&self, frame: RxFrame<'_>) -> Delivery {
        let adapter = self.read();
        if !adapter.steering.enabled || adapter.resetting || !self.link_up.load(Ordering::Relaxed) {
            return Delivery::NotReady;
        }
        let hash = hash(&adapter.steering.key, frame.data);
        let Some(queue) = adapter.receive_queue(hash.map(|(_, hash)| hash)) else {
            self.statistics.rx_disabled.inc();
            return Delivery::Dropped;
        };
        let vlan = frame::vlan_tci(frame.data);
        let (macs, rest) = match vlan {
            Some(_) => (&frame.data[..12], &frame.data[12 + frame::VLAN_TAG..]),
            None => (frame.data, &[][..]),
        };
        let length = macs.len() + rest.len();

        let mut buffers = queue.consumer();
        let buffer = match buffers.peek() {
            Ok(Some(buffer)) => buffer,
            Ok(None) => {
                self.statistics.rx_no_wqe.inc();
                return Delivery::Dropped;
            }
            Err(Fault) => {
                self.statistics.faults.inc();
                return Delivery::Dropped;
            }
        };
        let Some(length) = u16::try_from(length)
            .ok()
            .filter(|length| usize::from(*length) <= buffer.size())
        else {
            self.statistics.rx_too_long.inc();
            return Delivery::Dropped;
        };
        let checksums = frame::verify_checksums(frame.data, frame.checksum_valid);
        let (tcp_checksum, udp_checksum) = match checksums.transport {
            Some((Transport::Tcp, right)) => (Some(right), None),
            Some((Transport::Udp, right)) => (None, Some(right)),
            None => (None, None),
        };
        let is_ipv6 = frame::headers(frame.data).is_some_and(|h| h.network == Network::V6);
        let oob = RxOob {
            vlan,
            ip_checksum: if is_ipv6 { Some(true) } else { checksums.ipv4 },
            tcp_checksum,
            udp_checksum,
            hash,
            length,
            wqe_offset: buffer.offset,
        };
        let data = oob.pack(completion::RX_OKAY);
        let done = scatter(adapter.memory(), &buffer, &[macs, rest])
            .and_then(|()| queue.completions.post(&data, queue.id(), false));
        if done.is_err() {
            self.statistics.faults.inc();
            return Delivery::Dropped;
        }
        buffers.take(&buffer);
        self.statistics.received(frame.data);
        Delivery::Delivered
    }
}

/// What the guest wants done to a packet.
fn offload(wqe: &Wqe, oob: &TxOob) -> TxOffload {
    let large = wqe.header.oob_in_sgl && wqe.header.data_unit != 0;
    TxOffload {
        checksum: oob.tcp_checksum || oob.udp_checksum,
        ipv4_checksum: oob.ip_checksum && oob.ipv4,
        lso_mss: large.then_some(wqe.header.data_unit),
        vlan: oob.vlan,
    }
}

/// Type and value of the hash over a packet.
fn hash(key: &[u8; 40], packet: &[u8]) -> Option<(u16, u32)> {
    const TYPES: rss::Types = rss::Types {
        ipv4: true,
        tcp_ipv4: true,
        ipv6: true,
        tcp_ipv6: true,
    };
    let headers = frame::headers(packet)?;
    let is_tcp = matches!(headers.transport, Some((Transport::Tcp, _)));
    let hash_type = match (headers.network, is_tcp) {
        (Network::V4, false) => RxOob::HASH_IPV4,
        (Network::V4, true) => RxOob::HASH_TCP_IPV4,
        (Network::V6, false) => RxOob::HASH_IPV6,
        (Network::V6, true) => RxOob::HASH_TCP_IPV6,
    };
    let input = frame::hash_input(packet, TYPES)?;
    Some((hash_type, rss::toeplitz(key, &input)))
}
