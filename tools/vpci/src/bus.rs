// SPDX-License-Identifier: GPL-2.0

//! A virtual PCI bus: the protocol's state machine, the configuration window and the mapped BARs.
//!
//! Nothing here knows of channels: requests come in parsed, what is to be sent is returned.
//!
//! Lock order: `State`, then a function's `Decode`, then the MSI state and the interrupt table. Device
//! models and the MMIO bus are called with at most `Decode` held.

use std::{
    collections::BTreeMap,
    sync::{
        atomic::{AtomicU32, Ordering},
        Arc, Condvar, Mutex, MutexGuard, Weak,
    },
    time::{Duration, Instant},
};

use hyperv_wire::{
    hypercall::{self, Retarget},
    vpci::{
        self, bus_relations_size, config_window, write_bus_relations, ChildMessage,
        CreateInterruptReply, Function, InvalidateBlock, MessageType, ProtocolVersion, ReadBlock,
        Request, ResourceRequirementsReply, SlotNumber, Status, BARS, BLOCK_SIZE_MAX,
    },
    Guid,
};
use vmbus_host::{Counter, Counters, Direction, MessageLog};
use vmm::mmio::{MmioBus, MmioDevice};
use zerocopy::IntoBytes;

use crate::{
    config::{ConfigSpace, Effects},
    function::PciFunction,
    interrupts::{self, InterruptCounters, InterruptTable, SignalMsi},
    msi::{InterruptSender, MessageSignals},
};

/// What a bus is.
#[derive(Clone, Debug)]
pub struct BusOptions {
    /// Instance GUID of the VMBus device. Bytes 4 and 5 become the guest's PCI domain.
    pub instance: Guid,
    /// Newest protocol version the bus accepts.
    pub newest_version: ProtocolVersion,
    /// Number of virtual processors of the machine.
    pub processors: u32,
}

/// A packet to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// Whether it completes the request; otherwise it is an in-band packet.
    pub completion: bool,
    /// Name for the message log.
    pub name: &'static str,
    /// Decoded fields for the message log.
    pub fields: String,
    /// The packet.
    pub payload: Vec<u8>,
}

impl Outgoing {
    pub(crate) fn status(status: Status) -> Self {
        let mut payload = vec![0; 4];
        // The buffer has the size of a status.
        let _ = vpci::write_status(status, &mut payload);
        Self {
            completion: true,
            name: "completion",
            fields: format!("status={status:?}"),
            payload,
        }
    }

    /// Whether this is a completion that reports a failure.
    pub fn failed(&self) -> bool {
        self.completion && Status::parse(&self.payload).map_or(true, Status::is_failure)
    }

    fn reply(fields: String, payload: &[u8]) -> Self {
        Self {
            completion: true,
            name: "completion",
            fields: format!("status=SUCCESS {fields}"),
            payload: payload.to_vec(),
        }
    }

    fn event(name: &'static str, fields: String, payload: &[u8]) -> Self {
        Self {
            completion: false,
            name,
            fields,
            payload: payload.to_vec(),
        }
    }
}

/// What a bus has seen.
#[derive(Clone, Debug, Default)]
pub struct BusCounters {
    /// Functions on the bus.
    pub functions: Counter,
    /// BARs that are mapped now.
    pub mapped_bars: Counter,
    /// D0 entries.
    pub d0_entries: Counter,
    /// Requests that were refused.
    pub refused: Counter,
    /// Requests for which a fault was ordered.
    pub faults: Counter,
    /// Interrupts.
    pub interrupts: InterruptCounters,
}

impl BusCounters {
    /// The counters `NAME.*`.
    pub fn new(counters: &Counters, name: &str) -> Self {
        let counter = |what| counters.counter(&format!("{name}.{what}"));
        Self {
            functions: counter("functions"),
            mapped_bars: counter("mapped_bars"),
            d0_entries: counter("d0_entries"),
            refused: counter("refused"),
            faults: counter("faults"),
            interrupts: InterruptCounters::new(counters, name),
        }
    }
}

/// Configuration space and mapping of a function.
struct Decode {
    config: ConfigSpace,
    mapped: [Option<(u64, u64)>; BARS],
}

/// A function on the bus.
struct Slot {
    number: SlotNumber,
    serial: u32,
    numa_node: Option<u16>,
    model: Arc<dyn PciFunction>,
    signals: Arc<MessageSignals>,
    decode: Mutex<Decode>,
    mapped_bars: Counter,
}

impl Slot {
    fn decode(&self) -> MutexGuard<'_, Decode> {
        self.decode.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn describe(&self) -> Function {
        let d = self.model.description();
        Function {
            vendor: d.vendor,
            device: d.device,
            revision: d.revision,
            programming_interface: d.class[2],
            subclass: d.class[1],
            base_class: d.class[0],
            subsystem: u32::from(d.subsystem_vendor) | (u32::from(d.subsystem) << 16),
            slot: self.number,
            serial: self.serial,
            numa_node: self.numa_node,
        }
    }

    /// Brings the MMIO bus in line with what the function decodes.
    ///
    /// A range that another device has already is left out: the guest is about to move one of them.
    fn remap(
        self: &Arc<Self>,
        decode: &mut Decode,
        wanted: [Option<(u64, u64)>; BARS],
        bus: &MmioBus,
    ) {
        for (bar, wanted) in wanted.into_iter().enumerate() {
            if decode.mapped[bar] == wanted {
                continue;
            }
            if let Some((base, _)) = decode.mapped[bar].take() {
                bus.remove(base);
                self.mapped_bars.sub(1);
            }
            if let Some((base, size)) = wanted {
                let device = Arc::new(BarRange {
                    slot: self.clone(),
                    bar,
                });
                if bus.insert(base, size, device).is_ok() {
                    decode.mapped[bar] = Some((base, size));
                    self.mapped_bars.inc();
                }
            }
        }
    }

    /// Power-on state: nothing decoded, no messages, the model at rest.
    fn reset(self: &Arc<Self>, bus: &MmioBus) {
        let mut decode = self.decode();
        self.remap(&mut decode, [None; BARS], bus);
        self.signals.reset();
        decode.config = ConfigSpace::new(&self.model.description(), self.signals.clone());
        drop(decode);
        self.model.reset();
    }

    fn config_write(self: &Arc<Self>, offset: usize, data: &[u8], bus: &MmioBus) {
        let mut decode = self.decode();
        let Effects {
            decode: moved,
            reset,
        } = decode.config.write(offset, data);
        if moved {
            let wanted = decode.config.mapped();
            self.remap(&mut decode, wanted, bus);
        }
        drop(decode);
        if reset {
            self.reset(bus);
        }
    }
}

struct BarRange {
    slot: Arc<Slot>,
    bar: usize,
}

impl MmioDevice for BarRange {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if !self.slot.signals.read(self.bar, offset, data) {
            self.slot.model.bar_read(self.bar, offset, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if !self.slot.signals.write(self.bar, offset, data) {
            self.slot.model.bar_write(self.bar, offset, data);
        }
    }
}

#[derive(Default)]
struct State {
    version: Option<ProtocolVersion>,
    /// Guest-physical address of the configuration window while in D0.
    window: Option<u64>,
    /// The guest has asked for the bus relations, so it wants to hear of changes.
    watched: bool,
    functions: BTreeMap<u32, Arc<Slot>>,
    ejecting: Vec<u32>,
}

/// A virtual PCI bus.
pub struct Bus {
    options: BusOptions,
    mmio: Arc<MmioBus>,
    interrupts: Arc<InterruptTable>,
    selected: AtomicU32,
    state: Mutex<State>,
    ejected: Condvar,
    counters: BusCounters,
    this: Weak<Bus>,
}

/// The configuration window on the MMIO bus.
struct Window(Weak<Bus>);

impl MmioDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.0.upgrade() {
            Some(bus) => bus.window_read(offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(bus) = self.0.upgrade() {
            bus.window_write(offset, data);
        }
    }
}

impl Bus {
    /// An empty bus whose windows appear on `mmio` and whose interrupts go to `signal`.
    pub fn new(
        options: BusOptions,
        mmio: Arc<MmioBus>,
        signal: SignalMsi,
        counters: BusCounters,
    ) -> Arc<Self> {
        let interrupts = Arc::new(InterruptTable::new(
            options.processors,
            signal,
            counters.interrupts.clone(),
        ));
        Arc::new_cyclic(|this| Self {
            options,
            mmio,
            interrupts,
            selected: AtomicU32::new(0),
            state: Mutex::new(State::default()),
            ejected: Condvar::new(),
            counters,
            this: this.clone(),
        })
    }

    /// Instance GUID of the bus.
    pub fn instance(&self) -> Guid {
        self.options.instance
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Puts a function on the bus, and says what to tell the guest if it is watching.
    ///
    /// `None` if the slot is taken.
    pub fn add_function(
        &self,
        number: SlotNumber,
        serial: u32,
        numa_node: Option<u16>,
        model: Arc<dyn PciFunction>,
    ) -> Option<Option<Outgoing>> {
        let description = model.description();
        let signals = Arc::new(MessageSignals::new(
            description.msix,
            self.interrupts.clone(),
        ));
        let slot = Arc::new(Slot {
            number,
            serial,
            numa_node,
            signals: signals.clone(),
            decode: Mutex::new(Decode {
                config: ConfigSpace::new(&description, signals.clone()),
                mapped: [None; BARS],
            }),
            model: model.clone(),
            mapped_bars: self.counters.mapped_bars.clone(),
        });
        let mut state = self.state();
        if state.functions.contains_key(&number.raw()) {
            return None;
        }
        model.attach(InterruptSender::new(signals));
        state.functions.insert(number.raw(), slot);
        self.counters.functions.inc();
        Some(state.watched.then(|| Self::relations(&state)))
    }

    /// Pulls a function off the bus without asking, and says what to tell the guest.
    pub fn remove_function(&self, number: SlotNumber) -> Option<Outgoing> {
        let mut state = self.state();
        let slot = state.functions.remove(&number.raw())?;
        self.counters.functions.sub(1);
        let event = state.watched.then(|| Self::relations(&state));
        drop(state);
        self.take_down(&slot, false);
        event
    }

    /// What asks the guest to give a function up; `None` if there is nobody to ask or nothing to eject.
    pub fn eject(&self, number: SlotNumber) -> Option<Outgoing> {
        let mut state = self.state();
        if !state.watched || !state.functions.contains_key(&number.raw()) {
            return None;
        }
        if !state.ejecting.contains(&number.raw()) {
            state.ejecting.push(number.raw());
        }
        let message = ChildMessage::new(MessageType::EJECT, number);
        Some(Outgoing::event(
            "EJECT",
            format!("slot={number:?}"),
            message.as_bytes(),
        ))
    }

    /// Waits until the guest has given the function up. Says whether it has.
    pub fn wait_ejected(&self, number: SlotNumber, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut state = self.state();
        while state.ejecting.contains(&number.raw()) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self
                .ejected
                .wait_timeout(state, left)
                .unwrap_or_else(|e| e.into_inner())
                .0;
        }
        true
    }

    /// What tells the guest that configuration blocks have changed.
    pub fn invalidate_blocks(&self, number: SlotNumber, block_mask: u64) -> Option<Outgoing> {
        let state = self.state();
        if !state.watched || !state.functions.contains_key(&number.raw()) {
            return None;
        }
        let message = InvalidateBlock::new(number, block_mask);
        Some(Outgoing::event(
            "INVALIDATE_BLOCK",
            format!("slot={number:?} mask={block_mask:#x}"),
            message.as_bytes(),
        ))
    }

    /// Resets a function that has left the bus and takes its interrupts back.
    fn take_down(&self, slot: &Arc<Slot>, lost: bool) {
        slot.reset(&self.mmio);
        self.interrupts
            .release(lost, |number| number != slot.number.raw());
    }

    /// The channel is gone: everything back to the beginning.
    ///
    /// Interrupts that still exist count as reclaimed if the guest closed the channel of its own will
    /// (`orderly`), and not if it was told that the device is gone.
    pub fn close(&self, orderly: bool) {
        let mut state = self.state();
        let window = state.window.take();
        state.version = None;
        state.watched = false;
        state.ejecting.clear();
        let functions: Vec<_> = state.functions.values().cloned().collect();
        drop(state);
        self.ejected.notify_all();
        if let Some(base) = window {
            self.mmio.remove(base);
        }
        for slot in &functions {
            slot.reset(&self.mmio);
        }
        self.interrupts.release(orderly, |_| false);
    }

    fn relations(state: &State) -> Outgoing {
        let version = state.version.unwrap_or(ProtocolVersion::V1_1);
        let functions: Vec<_> = state.functions.values().map(|s| s.describe()).collect();
        let mut payload = vec![0; bus_relations_size(version, functions.len())];
        // There are at most as many functions as slot numbers.
        let _ = write_bus_relations(version, &functions, &mut payload);
        let list: Vec<_> = functions
            .iter()
            .map(|f| {
                format!(
                    "{:?}={:04x}:{:04x}/serial {}",
                    f.slot, f.vendor, f.device, f.serial
                )
            })
            .collect();
        Outgoing::event(
            version.bus_relations().name().unwrap_or("BUS_RELATIONS"),
            format!("count={} [{}]", functions.len(), list.join(", ")),
            &payload,
        )
    }

    /// Handles a request and gives what is to be sent, in this order.
    pub fn handle(&self, request: &Request<'_>) -> Vec<Outgoing> {
        match self.try_handle(request) {
            Ok(outgoing) => outgoing,
            Err(status) => {
                // A version that is too new is part of the negotiation.
                if status != Status::REVISION_MISMATCH {
                    self.counters.refused.inc();
                }
                vec![Outgoing::status(status)]
            }
        }
    }

    /// What answers a packet that could not be parsed.
    pub fn refuse(&self) -> Outgoing {
        self.counters.refused.inc();
        Outgoing::status(Status::INFO_LENGTH_MISMATCH)
    }

    /// Notes that a request has met its fault.
    pub(crate) fn count_fault(&self) {
        self.counters.faults.inc();
    }

    fn slot(state: &State, number: SlotNumber) -> Result<Arc<Slot>, Status> {
        let slot = state.functions.get(&number.raw());
        slot.cloned().ok_or(Status::NO_SUCH_DEVICE)
    }

    fn try_handle(&self, request: &Request<'_>) -> Result<Vec<Outgoing>, Status> {
        let success = || Ok(vec![Outgoing::status(Status::SUCCESS)]);
        let mut state = self.state();

        if let Request::QueryProtocolVersion(version) = *request {
            if state.watched || state.window.is_some() {
                return Err(Status::INVALID_DEVICE_STATE);
            }
            if version > self.options.newest_version || !ProtocolVersion::ALL.contains(&version) {
                return Err(Status::REVISION_MISMATCH);
            }
            state.version = Some(version);
            return success();
        }

        if state.version.is_none() {
            return Err(Status::INVALID_DEVICE_STATE);
        }
        let in_d0 = |state: &State| match state.window {
            Some(_) => Ok(()),
            None => Err(Status::INVALID_DEVICE_STATE),
        };
        match *request {
            Request::QueryBusRelations => {
                state.watched = true;
                Ok(vec![Self::relations(&state)])
            }
            Request::QueryResourceRequirements(number) => {
                let bars = Self::slot(&state, number)?.decode().config.bar_masks();
                let reply = ResourceRequirementsReply::new(bars);
                Ok(vec![Outgoing::reply(
                    format!("bars={bars:x?}"),
                    reply.as_bytes(),
                )])
            }
            Request::D0Entry { mmio_base } => {
                if state.window.is_some() {
                    return Err(Status::INVALID_DEVICE_STATE);
                }
                let window = Arc::new(Window(self.this.clone()));
                self.mmio
                    .insert(mmio_base, config_window::LENGTH, window)
                    .map_err(|_| Status::INVALID_PARAMETER)?;
                state.window = Some(mmio_base);
                self.counters.d0_entries.inc();
                success()
            }
            Request::D0Exit => {
                let base = state.window.take();
                let functions: Vec<_> = state.functions.values().cloned().collect();
                drop(state);
                if let Some(base) = base {
                    self.mmio.remove(base);
                }
                for slot in &functions {
                    slot.reset(&self.mmio);
                }
                self.interrupts.release(true, |_| false);
                success()
            }
            Request::ResourcesAssigned(number) => {
                in_d0(&state)?;
                Self::slot(&state, number)?;
                success()
            }
            Request::ResourcesReleased(number) => {
                let slot = Self::slot(&state, number)?;
                drop(state);
                // The guest suspends: it does not give interrupts back, and does not use them.
                self.take_down(&slot, false);
                success()
            }
            Request::CreateInterrupt(number, ref interrupt) => {
                in_d0(&state)?;
                Self::slot(&state, number)?;
                let made = self
                    .interrupts
                    .create(number.raw(), interrupt)
                    .map_err(|error| match error {
                        interrupts::Error::Full => Status::INSUFFICIENT_RESOURCES,
                        _ => Status::INVALID_PARAMETER,
                    })?;
                let reply = CreateInterruptReply::new(made);
                Ok(vec![Outgoing::reply(
                    format!("address={:#x} data={:#x}", made.address(), made.data()),
                    reply.as_bytes(),
                )])
            }
            Request::DeleteInterrupt(number, ref interrupt) => {
                self.interrupts
                    .delete(number.raw(), interrupt)
                    .map_err(|_| Status::INVALID_PARAMETER)?;
                success()
            }
            Request::ReadBlock {
                slot,
                block,
                length,
            } => {
                let slot = Self::slot(&state, slot)?;
                drop(state);
                let mut data = slot
                    .model
                    .read_block(block, length as usize)
                    .ok_or(Status::NOT_SUPPORTED)?;
                data.truncate(length as usize);
                let mut payload = [0; 4 + BLOCK_SIZE_MAX];
                let size = ReadBlock::write_reply(&data, &mut payload)
                    .map_err(|_| Status::INVALID_PARAMETER)?;
                Ok(vec![Outgoing::reply(
                    format!("length={}", data.len()),
                    &payload[..size],
                )])
            }
            Request::WriteBlock { slot, block, data } => {
                let slot = Self::slot(&state, slot)?;
                drop(state);
                if !slot.model.write_block(block, data) {
                    return Err(Status::NOT_SUPPORTED);
                }
                success()
            }
            Request::EjectionComplete { slot: number, .. } => {
                if !state.ejecting.contains(&number.raw()) {
                    return Err(Status::INVALID_DEVICE_STATE);
                }
                let slot = state.functions.remove(&number.raw());
                drop(state);
                if let Some(slot) = slot {
                    self.counters.functions.sub(1);
                    self.take_down(&slot, true);
                }
                // Whoever waits for the ejection finds the function at rest.
                self.state().ejecting.retain(|n| *n != number.raw());
                self.ejected.notify_all();
                success()
            }
            Request::PowerStateChange { slot, .. } => {
                Self::slot(&state, slot)?;
                success()
            }
            Request::QueryProtocolVersion(_) | Request::Unknown(_) => Err(Status::NOT_SUPPORTED),
        }
    }

    /// A `HvRetargetDeviceInterrupt` hypercall. `None` if it is about another bus.
    pub fn retarget(&self, input: &Retarget<'_>) -> Option<u16> {
        let instance = self.options.instance.to_bytes();
        if input.device & !7 != hypercall::device_id(&instance, 0) {
            return None;
        }
        let processors = self.options.processors;
        let vp = (0..processors).find(|vp| input.target.contains(*vp));
        let Some(vp) = vp.filter(|_| input.target.is_within(processors)) else {
            return Some(hypercall::status::INVALID_VP_INDEX);
        };
        let moved = self.interrupts.retarget(
            (input.device & 7) as u8,
            input.msi_address,
            input.msi_data,
            vp,
            input.vector,
        );
        Some(match moved {
            Ok(()) => hypercall::status::SUCCESS,
            Err(_) => hypercall::status::INVALID_PARAMETER,
        })
    }

    fn selected(&self) -> Option<Arc<Slot>> {
        let number = self.selected.load(Ordering::Relaxed);
        self.state().functions.get(&number).cloned()
    }

    fn window_read(&self, offset: u64, data: &mut [u8]) {
        let Some(offset) = offset.checked_sub(config_window::CONFIG_SPACE) else {
            data.fill(0);
            if offset == config_window::SLOT && data.len() == 4 {
                let number = self.selected.load(Ordering::Relaxed);
                data.copy_from_slice(&number.to_le_bytes());
            }
            return;
        };
        match self.selected() {
            Some(slot) => slot.decode().config.read(offset as usize, data),
            None => data.fill(0xff),
        }
    }

    fn window_write(&self, offset: u64, data: &[u8]) {
        match offset.checked_sub(config_window::CONFIG_SPACE) {
            Some(offset) => {
                if let Some(slot) = self.selected() {
                    slot.config_write(offset as usize, data, &self.mmio);
                }
            }
            None => {
                if let (config_window::SLOT, Ok(number)) = (offset, <[u8; 4]>::try_from(data)) {
                    self.selected
                        .store(u32::from_le_bytes(number), Ordering::Relaxed);
                }
            }
        }
    }

    /// Configuration space of a function, as a guest reads it.
    pub fn config(&self, number: SlotNumber) -> Option<Vec<u8>> {
        let slot = self.state().functions.get(&number.raw()).cloned()?;
        let mut data = vec![0; config_window::CONFIG_SPACE_SIZE as usize];
        slot.decode().config.read(0, &mut data);
        Some(data)
    }

    /// The protocol version agreed on.
    pub fn version(&self) -> Option<ProtocolVersion> {
        self.state().version
    }

    /// What the bus has seen.
    pub fn counters(&self) -> &BusCounters {
        &self.counters
    }
}

/// Finds the bus a retarget hypercall is about.
#[derive(Default)]
pub struct RetargetRouter {
    /// The buses with their names.
    buses: Mutex<Vec<(String, Weak<Bus>)>>,
    log: Option<Arc<MessageLog>>,
}

impl RetargetRouter {
    /// A router without buses.
    pub fn new() -> Self {
        Self::default()
    }

    /// One that writes hypercalls to the log, if that has the bytes of messages, as one for a bus.
    pub fn with_log(log: Arc<MessageLog>) -> Self {
        Self {
            log: Some(log),
            ..Self::default()
        }
    }

    /// Adds a bus; it is forgotten when it is dropped.
    pub fn add(&self, name: &str, bus: &Arc<Bus>) {
        let mut buses = self.buses.lock().unwrap_or_else(|e| e.into_inner());
        buses.retain(|(_, bus)| bus.strong_count() != 0);
        buses.push((name.to_owned(), Arc::downgrade(bus)));
    }

    /// Handles the input of the hypercall, variable header included, and gives its status.
    pub fn retarget(&self, input: &[u8]) -> u16 {
        let mut name = None;
        let status = self.try_retarget(input, &mut name);
        if let Some(log) = self.log.as_ref().filter(|log| log.keeps_bytes()) {
            let name = name.as_deref().unwrap_or("hypercall");
            let fields = format!("status={status:#x}");
            log.record_message(Direction::GuestToHost, name, "RETARGET", fields, input);
        }
        status
    }

    fn try_retarget(&self, input: &[u8], name: &mut Option<String>) -> u16 {
        let variable = input.len().saturating_sub(Retarget::FIXED) / 8;
        let parsed = match Retarget::parse(input, variable.min(usize::from(u16::MAX)) as u16) {
            Ok(parsed) => parsed,
            Err(error) => return error.status(),
        };
        if parsed.partition != hypercall::PARTITION_SELF {
            return hypercall::status::INVALID_PARTITION_ID;
        }
        let buses = self.buses.lock().unwrap_or_else(|e| e.into_inner());
        let mut result = hypercall::status::INVALID_PARAMETER;
        for (bus_name, bus) in buses.iter() {
            let status = bus.upgrade().and_then(|bus| bus.retarget(&parsed));
            if let Some(status) = status {
                *name = Some(bus_name.clone());
                result = status;
            }
            // Buses with like GUIDs have the same device ids; one of them has the interrupt.
            if status == Some(hypercall::status::SUCCESS) {
                break;
            }
        }
        result
    }
}
