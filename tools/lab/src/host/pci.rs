// SPDX-License-Identifier: GPL-2.0
//! Virtual PCI buses that do not belong to a NIC, and what is on them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hyperv_wire::vpci::SlotNumber;
use lab_control::{unhex, BusStatus, FunctionStatus, PciAction};
use nvme::{DiskOptions, NvmeDisk, Store};
use pcitest::TestFunction;
use vmbus_host::{Counters, MessageLog, Platform, VmbusHost};
use vmm::Machine;
use vpci::{PciFunction, VpciDevice};

use super::bus::{released, usual_instance, BusMaker, EJECT};
use super::options::{vpci_name, HostArgs, PciSpec};
use super::Devices;

/// Serial numbers of disks are EUI-64s, which begin with a number of Microsoft's.
const DISK_SERIAL: u64 = 0x0015_5d00_0000_0000;

/// What a function is. A new kind needs to be named, set and made here, no more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// For tests of the bus.
    Test(pcitest::Options),
    /// An NVMe disk.
    Nvme(nvme::Options),
}

impl Kind {
    /// The kind of a function for which none is given.
    pub const DEFAULT: Self = Self::Test(pcitest::Options::DEFAULT);

    /// The kind with this name, without properties.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "test" => Some(Self::DEFAULT),
            "nvme" => Some(Self::Nvme(nvme::Options::DEFAULT)),
            _ => None,
        }
    }

    /// Its name.
    fn name(&self) -> &'static str {
        match self {
            Self::Test(_) => "test",
            Self::Nvme(_) => "nvme",
        }
    }

    /// Sets a property. `None` if there is no such property, otherwise whether the value is one.
    pub fn set(&mut self, key: &str, value: &str) -> Option<bool> {
        match self {
            Self::Test(options) => options.set(key, value),
            Self::Nvme(options) => options.set(key, value),
        }
    }

    /// Says what does not fit together.
    pub fn check(&self) -> Result<(), String> {
        match self {
            Self::Test(options) => options.check(),
            Self::Nvme(_) => Ok(()),
        }
    }

    /// Makes a function of a bus with a name for the log and counters. One that has left its bus is not used again.
    fn make(&self, bus: &PciBus, name: &str, serial: u32) -> Result<Arc<dyn PciFunction>, String> {
        match self {
            Self::Test(options) => match TestFunction::new(options, name, &bus.counters) {
                Ok(function) => Ok(function),
                Err(error) => Err(error.to_string()),
            },
            Self::Nvme(options) => bus.disk(options, name, serial),
        }
    }
}

/// A bus of the command line.
pub struct PciBus {
    maker: BusMaker,
    functions: Vec<Function>,
    at_boot: bool,
    host: Arc<VmbusHost>,
    counters: Arc<Counters>,
    log: Arc<MessageLog>,
    state: Mutex<State>,
    /// The content of disks, which stays when they leave the bus.
    stores: Mutex<BTreeMap<String, Arc<Store>>>,
}

/// What can be on a bus.
struct Function {
    slot: SlotNumber,
    serial: u32,
    node: Option<u16>,
    kind: Kind,
}

struct State {
    /// The bus while it is offered.
    device: Option<Arc<VpciDevice>>,
    /// Which of the functions are on the bus, or will be when it is offered.
    present: Vec<bool>,
}

impl PciBus {
    /// Makes a bus. It is not offered yet.
    pub(super) fn new(
        number: usize,
        spec: PciSpec,
        args: &HostArgs,
        machine: &Arc<Machine>,
        devices: &Devices,
    ) -> Self {
        let instance = spec
            .bus
            .unwrap_or_else(|| usual_instance(0x7a00 + number as u16));
        let version = spec.version.unwrap_or(args.vpci_version());
        let present = spec.functions.iter().map(|f| !f.later).collect();
        let functions = spec.functions.into_iter().enumerate();
        let functions = functions.map(|(index, function)| {
            let (device, within) = function.slot.unwrap_or((index as u8, 0));
            Function {
                slot: SlotNumber::new(device, within),
                // Unlike the numbers of VFs.
                serial: function
                    .serial
                    .unwrap_or(1000 + 100 * number as u32 + index as u32),
                node: function.node,
                kind: function.kind,
            }
        });
        Self {
            maker: BusMaker::new(&format!("pci{number}"), instance, version, machine, devices),
            functions: functions.collect(),
            at_boot: !spec.later,
            host: devices.bus.clone(),
            counters: devices.counters.clone(),
            log: devices.log.clone(),
            state: Mutex::new(State {
                device: None,
                present,
            }),
            stores: Mutex::default(),
        }
    }

    /// A disk with the content that it had when it was on the bus before.
    fn disk(
        &self,
        options: &nvme::Options,
        name: &str,
        serial: u32,
    ) -> Result<Arc<dyn PciFunction>, String> {
        let mut stores = self.stores.lock().unwrap_or_else(PoisonError::into_inner);
        let store = match stores.get(name) {
            Some(store) => store.clone(),
            None => {
                let store = Arc::new(options.store().map_err(|error| error.to_string())?);
                stores.insert(name.to_owned(), store.clone());
                store
            }
        };
        let options = DiskOptions {
            name: name.to_owned(),
            queues: options.queues,
            serial: DISK_SERIAL | u64::from(serial),
        };
        let memory = self.maker.machine().memory().clone();
        let disk = NvmeDisk::new(&options, memory, store, &self.counters, self.log.clone());
        match disk {
            Ok(disk) => Ok(disk),
            Err(error) => Err(error.to_string()),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Offers the bus if it is there at boot.
    pub(super) fn start(&self) -> Result<(), String> {
        match self.at_boot {
            true => self.offer(),
            false => Ok(()),
        }
    }

    fn name(&self) -> &str {
        self.maker.name()
    }

    /// Carries out what the control socket asks for, and gives what is to be printed.
    pub(super) fn act(&self, action: &PciAction) -> Result<Option<String>, String> {
        let done = match *action {
            PciAction::Offer => self.offer(),
            PciAction::Remove => self.remove(),
            PciAction::Rescind => self.rescind(),
            PciAction::Add { function } => self.add(function),
            PciAction::Eject { function } => self.eject(function),
            PciAction::Pull { function } => self.pull(function),
            PciAction::Config { function } => {
                let slot = self.present(function)?.slot;
                let config = self.device()?.bus().config(slot);
                let digits = |bytes: Vec<u8>| {
                    bytes.iter().fold(String::new(), |mut text, byte| {
                        // Writing to a string does not fail.
                        let _ = write!(text, "{byte:02x}");
                        text
                    })
                };
                return Ok(config.map(digits));
            }
            PciAction::Invalidate { function, mask } => {
                let slot = self.function(function)?.slot;
                self.device()?.invalidate_blocks(slot, mask);
                Ok(())
            }
            PciAction::Fault { fault, times } => match self.maker.inject(fault, times) {
                true => Ok(()),
                false => Err("this is no fault of a virtual PCI bus".into()),
            },
            PciAction::Answer {
                request,
                how,
                times,
            } => {
                self.maker.answer(request, how, times);
                Ok(())
            }
            PciAction::Send {
                ref messages,
                completion,
                times,
            } => self.send(messages, completion, times),
        };
        done.map(|()| None)
    }

    fn send(&self, messages: &[String], completion: Option<u64>, times: u32) -> Result<(), String> {
        let messages = messages.iter().map(|message| unhex(message));
        let messages = messages.collect::<Result<Vec<_>, _>>()?;
        let device = self.device()?;
        let mut open = (0..times).flat_map(|_| &messages);
        match open.all(|message| device.send_raw(completion, message)) {
            true => Ok(()),
            false => Err(format!("the guest does not have {} open", self.name())),
        }
    }

    fn function(&self, number: u32) -> Result<&Function, String> {
        self.functions.get(number as usize).ok_or_else(|| {
            format!(
                "{} has no function {number}: they count from 0, and there are {}",
                self.name(),
                self.functions.len()
            )
        })
    }

    fn device(&self) -> Result<Arc<VpciDevice>, String> {
        let device = self.state().device.clone();
        device.ok_or_else(|| format!("{} is not offered now", self.name()))
    }

    fn put(&self, device: &VpciDevice, number: usize) -> Result<(), String> {
        let function = &self.functions[number];
        let name = format!("{}.{number}", self.name());
        let model = function
            .kind
            .make(self, &name, function.serial)
            .map_err(|error| format!("{name}: {error}"))?;
        match device.add_function(function.slot, function.serial, function.node, model) {
            true => Ok(()),
            false => Err(format!("{}: its slot is taken", name)),
        }
    }

    /// Offers the bus with what is on it.
    fn offer(&self) -> Result<(), String> {
        let mut state = self.state();
        if state.device.is_some() {
            return Err(format!("{} is offered", self.name()));
        }
        let device = self.maker.make();
        for number in (0..self.functions.len()).filter(|&number| state.present[number]) {
            self.put(&device, number)?;
        }
        self.host
            .add_device(device.clone())
            .map_err(|error| format!("{}: {error}", self.name()))?;
        state.device = Some(device);
        Ok(())
    }

    /// Takes the bus away as a host does that has time: the guest gives up what is on it first. All of it is there again when
    /// the bus is offered again.
    fn remove(&self) -> Result<(), String> {
        let device = self.device()?;
        let present = self.state().present.clone();
        for (function, _) in self.functions.iter().zip(present).filter(|(_, on)| *on) {
            // A guest without a driver for the bus, or a slow one, loses it anyway.
            device.eject(function.slot, EJECT);
        }
        self.rescind()
    }

    /// Rescinds the bus without warning.
    fn rescind(&self) -> Result<(), String> {
        let Some(device) = self.state().device.take() else {
            return Err(format!("{} is not offered now", self.name()));
        };
        device.about_to_rescind();
        self.host.remove_device(self.maker.instance());
        released(&self.host, self.maker.instance())
    }

    /// Puts a function on the bus.
    fn add(&self, number: u32) -> Result<(), String> {
        self.function(number)?;
        let mut state = self.state();
        let present = &mut state.present[number as usize];
        if *present {
            return Err(format!("{} has its function {number}", self.name()));
        }
        *present = true;
        if let Some(device) = state.device.clone() {
            if let Err(error) = self.put(&device, number as usize) {
                state.present[number as usize] = false;
                return Err(error);
            }
        }
        Ok(())
    }

    fn gone(&self, number: u32) {
        self.state().present[number as usize] = false;
    }

    fn present(&self, number: u32) -> Result<&Function, String> {
        let function = self.function(number)?;
        match self.state().present[number as usize] {
            true => Ok(function),
            false => Err(format!(
                "{} does not have its function {number} now",
                self.name()
            )),
        }
    }

    /// Asks the guest to give a function up.
    fn eject(&self, number: u32) -> Result<(), String> {
        let function = self.present(number)?;
        if let Ok(device) = self.device() {
            if !device.eject(function.slot, EJECT) {
                return Err(format!(
                    "the guest has not given the function up within {} seconds",
                    EJECT.as_secs()
                ));
            }
        }
        self.gone(number);
        Ok(())
    }

    /// Pulls a function off the bus without asking.
    fn pull(&self, number: u32) -> Result<(), String> {
        let function = self.present(number)?;
        if let Ok(device) = self.device() {
            device.remove_function(function.slot);
        }
        self.gone(number);
        Ok(())
    }

    /// The state for the control socket.
    pub(super) fn status(&self) -> BusStatus {
        let state = self.state();
        let version = state.device.as_ref().and_then(|d| d.bus().version());
        let functions = self.functions.iter().zip(&state.present);
        BusStatus {
            instance: self.maker.instance().to_string(),
            offered: state.device.is_some(),
            open: version.is_some(),
            vpci_version: version.map(vpci_name),
            interrupts: self.maker.interrupts(),
            functions: functions
                .map(|(function, &present)| FunctionStatus {
                    kind: function.kind.name().to_owned(),
                    device: function.slot.device(),
                    function: function.slot.function(),
                    serial: function.serial,
                    present,
                })
                .collect(),
        }
    }

    /// Lets the functions go.
    pub(super) fn shut_down(&self) {
        self.state().device = None;
    }
}
