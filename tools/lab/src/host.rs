// SPDX-License-Identifier: GPL-2.0
//! What is behind the guest's VMBus: the bus, its NICs and their VFs, other PCI buses, and the control socket.

mod bus;
mod nic;
mod options;
mod pci;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::sync::{mpsc, Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use lab_control::{Fault, Kind, Lab, LogPage, PciAction, Server, Setting, Status, Target};
use vmbus_host::{Counter, Counters, Direction, MessageLog, Platform, VmbusHost};
use vmm::{Hypercalls, Machine, Stopper};
use vpci::RetargetRouter;

pub use nic::peer_name;
use nic::LabNic;
pub use options::HostArgs;
use pci::PciBus;

/// Lines of the message log that are kept.
const LOG_LINES: usize = 100_000;
/// How often it is looked whether a VF can be offered now.
const OFFER_INTERVAL: Duration = Duration::from_millis(20);

/// The VMBus with its devices, and who controls them.
pub struct Host {
    devices: Arc<Devices>,
    server: Option<Server>,
    offering: Option<Offering>,
}

/// The thread that offers VFs when their time has come.
struct Offering {
    thread: JoinHandle<()>,
    stop: mpsc::Sender<()>,
}

/// All that the control socket reaches.
struct Devices {
    bus: Arc<VmbusHost>,
    retarget: Arc<RetargetRouter>,
    log: Arc<MessageLog>,
    counters: Arc<Counters>,
    nics: Vec<LabNic>,
    buses: Vec<PciBus>,
    stopper: Mutex<Option<Stopper>>,
}

/// Takes the guest's hypercalls to who serves them.
struct Router {
    bus: Arc<VmbusHost>,
    retarget: Arc<RetargetRouter>,
    log: Arc<MessageLog>,
    refused: Counter,
    mmio: Counter,
}

impl Hypercalls for Router {
    fn post_message(&self, connection: u32, message_type: u32, payload: &[u8]) -> u16 {
        self.bus.post_message(connection, message_type, payload)
    }

    fn signal_event(&self, connection: u32, flag: u16) -> u16 {
        self.bus.signal_event(connection, flag)
    }

    fn retarget_device_interrupt(&self, input: &[u8]) -> u16 {
        self.retarget.retarget(input)
    }

    fn mmio_accessed(&self) {
        self.mmio.inc();
    }

    fn retarget_refused(&self, status: u16) {
        self.refused.inc();
        self.log.record(
            Direction::Host,
            "hypercall",
            "RETARGET_REFUSED",
            format_args!("status={status:#x}"),
        );
    }
}

impl Host {
    /// A host as the command line describes it. The message log goes to a file as well, if one is given,
    /// and may have all bytes of the messages.
    pub fn new(
        args: &HostArgs,
        log_file: Option<&Path>,
        log_bytes: bool,
        machine: &Arc<Machine>,
    ) -> Result<Self, String> {
        let log = MessageLog::new(LOG_LINES);
        if let Some(path) = log_file {
            let file =
                File::create(path).map_err(|error| format!("{}: {error}", path.display()))?;
            log.tee(Box::new(file));
        }
        if log_bytes {
            log.keep_bytes();
        }
        let counters = Counters::new();
        let platform: Arc<dyn Platform> = machine.clone();
        let bus = VmbusHost::new(platform, args.vmbus_config(), log.clone(), counters.clone());
        let retarget = Arc::new(RetargetRouter::with_log(log.clone()));
        let mut devices = Devices {
            bus,
            retarget,
            log,
            counters,
            nics: Vec::new(),
            buses: Vec::new(),
            stopper: Mutex::new(None),
        };
        for (number, spec) in args.nics().into_iter().enumerate() {
            let nic = LabNic::new(number, spec, args, machine, &devices)?;
            devices.nics.push(nic);
        }
        for (number, spec) in args.buses().enumerate() {
            let bus = PciBus::new(number, spec, args, machine, &devices);
            devices.buses.push(bus);
        }
        // Only now: a NIC that cannot be made ends it all.
        for nic in &devices.nics {
            nic.start()?;
        }
        for bus in &devices.buses {
            bus.start()?;
        }
        let devices = Arc::new(devices);
        let (stop, stopped) = mpsc::channel();
        let thread = thread::Builder::new()
            .name("vf-offers".into())
            .spawn({
                let devices = devices.clone();
                move || {
                    while stopped.recv_timeout(OFFER_INTERVAL)
                        == Err(mpsc::RecvTimeoutError::Timeout)
                    {
                        devices.nics.iter().for_each(LabNic::offer_wanted_vf);
                    }
                }
            })
            .map_err(|error| error.to_string())?;
        Ok(Self {
            devices,
            server: None,
            offering: Some(Offering { thread, stop }),
        })
    }

    /// Who serves the guest's hypercalls.
    pub fn hypercalls(&self) -> Arc<dyn Hypercalls> {
        Arc::new(Router {
            bus: self.devices.bus.clone(),
            retarget: self.devices.retarget.clone(),
            log: self.devices.log.clone(),
            refused: self.devices.counters.counter("retarget.refused"),
            mmio: self.devices.counters.counter("hypercalls.mmio"),
        })
    }

    /// Lets `quit` end the machine, and serves the control socket if there is to be one.
    pub fn serve(&mut self, stopper: Stopper, control: Option<&Path>) -> Result<(), String> {
        *self
            .devices
            .stopper
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(stopper);
        if let Some(path) = control {
            let server = Server::start(path, self.devices.clone())
                .map_err(|error| format!("{}: {error}", path.display()))?;
            self.server = Some(server);
        }
        Ok(())
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.server.take();
        if let Some(Offering { thread, stop }) = self.offering.take() {
            drop(stop);
            // A panic there has been reported by the thread itself.
            let _ = thread.join();
        }
        // Channels are closed before what is behind them ends.
        self.devices.bus.shutdown();
        for nic in &self.devices.nics {
            nic.shut_down();
        }
        self.devices.buses.iter().for_each(PciBus::shut_down);
    }
}

impl Devices {
    fn nic(&self, number: u32) -> Result<&LabNic, String> {
        self.nics.get(number as usize).ok_or_else(|| {
            format!(
                "there is no NIC {number}: they count from 0, and there are {}",
                self.nics.len()
            )
        })
    }
}

impl Lab for Devices {
    fn add_vf(&self, nic: u32) -> Result<(), String> {
        self.nic(nic)?.add_vf()
    }

    fn remove_vf(&self, nic: u32) -> Result<(), String> {
        self.nic(nic)?.remove_vf()
    }

    fn set_vf_link(&self, nic: u32, up: bool) -> Result<(), String> {
        self.nic(nic)?.set_vf_link(up)
    }

    fn reset_vf(&self, nic: u32) -> Result<(), String> {
        self.nic(nic)?.reset_vf()
    }

    fn set_association(&self, nic: u32, on: bool) -> Result<(), String> {
        self.nic(nic)?.set_association(on);
        Ok(())
    }

    fn eject(&self, nic: u32) -> Result<(), String> {
        self.nic(nic)?.eject()
    }

    fn rescind(&self, nic: u32, device: Target) -> Result<(), String> {
        match device {
            Target::Nic => self.nic(nic)?.rescind(),
            Target::Vf => self.nic(nic)?.rescind_vf(),
        }
    }

    fn offer(&self, nic: u32, device: Target) -> Result<(), String> {
        match device {
            Target::Nic => self.nic(nic)?.offer(),
            Target::Vf => self.nic(nic)?.offer_vf(),
        }
    }

    fn set_nic_link(&self, nic: u32, up: bool) -> Result<(), String> {
        self.nic(nic)?.set_link(up);
        Ok(())
    }

    fn change_network(&self, nic: u32) -> Result<(), String> {
        self.nic(nic)?.change_network();
        Ok(())
    }

    fn set(&self, nic: u32, setting: Setting, value: Option<u32>) -> Result<(), String> {
        self.nic(nic)?.set(setting, value);
        Ok(())
    }

    fn send(
        &self,
        nic: u32,
        kind: Kind,
        transaction: u64,
        messages: &[Vec<u8>],
    ) -> Result<(), String> {
        self.nic(nic)?.send(kind, transaction, messages)
    }

    fn fault(&self, nic: u32, fault: Fault, times: u32) -> Result<(), String> {
        self.nic(nic)?.inject(fault, times);
        Ok(())
    }

    fn pci(&self, bus: u32, action: &PciAction) -> Result<Option<String>, String> {
        let found = self.buses.get(bus as usize).ok_or_else(|| {
            format!(
                "there is no bus {bus}: they count from 0, and there are {}",
                self.buses.len()
            )
        })?;
        found.act(action)
    }

    fn note(&self, event: &str) {
        let (name, fields) = event.split_once(' ').unwrap_or((event, ""));
        self.log.record(Direction::Host, "control", name, fields);
    }

    fn run_at_peer(&self, nic: u32, command: &str) -> Result<String, String> {
        self.nic(nic)?.run_at_peer(command)
    }

    fn log(&self, since: u64, max_lines: usize) -> LogPage {
        let page = self.log.since(since);
        let skipped = page.lines.len().saturating_sub(max_lines) as u64;
        let mut lines = page.lines;
        lines.truncate(max_lines);
        LogPage {
            lines,
            next: page.next - skipped,
            dropped: page.dropped,
        }
    }

    fn counters(&self) -> BTreeMap<String, u64> {
        self.counters.snapshot()
    }

    fn status(&self) -> Status {
        let usage = self.bus.usage();
        let nics: Vec<_> = self.nics.iter().map(LabNic::status).collect();
        let buses: Vec<_> = self.buses.iter().map(PciBus::status).collect();
        Status {
            vmbus_version: usage.version.map(|version| version.to_string()),
            channels_offered: usage.offered as u64,
            channels_open: usage.open as u64,
            channels_unreleased: usage.unreleased as u64,
            gpadls: usage.gpadls as u64,
            interrupts: nics
                .iter()
                .filter_map(|nic| nic.vf.as_ref())
                .map(|vf| vf.interrupts)
                .chain(buses.iter().map(|bus| bus.interrupts))
                .map(u64::from)
                .sum(),
            nics,
            buses,
        }
    }

    fn quit(&self) {
        let stopper = self.stopper.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stopper) = &*stopper {
            stopper.stop();
        }
    }
}
