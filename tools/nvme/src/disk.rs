// SPDX-License-Identifier: GPL-2.0

//! The function: registers, doorbells, the workers.
//!
//! Doorbells only move numbers and wake a worker. Each queue belongs to one worker: the first has the
//! admin queue, the others share the I/O queues, so that these are served at the same time.
//!
//! Lock order: the controller, then the queues (see `queue`), then the registers. The controller is
//! locked for writing by admin commands and by resets; whoever touches guest memory holds it at least
//! for reading, so after a reset nothing does any more.

use std::{
    sync::{Arc, Condvar, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    thread::{self, JoinHandle},
};

use vm_memory::GuestMemoryMmap;
use vmbus_host::{Counters, Direction, MessageLog};
use vpci::{Bar, Description, InterruptSender, MsixLayout, PciFunction};

use crate::{
    admin::Outcome,
    controller::{AdminQueues, Controller, Limits, ENTRIES_MAX},
    queue::{lock, Fault, SubmissionQueue},
    statistics::Statistics,
    store::Store,
    wire::{
        admin, capabilities, register, status_register, Command, Configuration, Status,
        EVENT_INVALID_DOORBELL, VERSION,
    },
};

const VENDOR_MICROSOFT: u16 = 0x1414;
/// An NVMe controller of Azure.
const DEVICE_NVME: u16 = 0xb111;
/// Mass storage, non-volatile memory, NVM Express.
const CLASS: [u8; 3] = [0x01, 0x08, 0x02];

/// BAR 0: registers and doorbells, the MSI-X table, the pending bits.
const BAR_SIZE: u64 = 0x4000;
const MSIX_TABLE: u32 = 0x2000;
const MSIX_PENDING: u32 = 0x3000;

/// Seconds that the driver shall give the controller to get ready: the host may be slow.
const READY_TIMEOUT: u64 = 60;
/// Threads for the I/O queues.
const WORKERS: usize = 2;
/// Commands carried out before a worker looks what else there is, and before it interrupts.
const BATCH: usize = 16;

/// What kind of disk to make.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// Name for the message log and the counters.
    pub name: String,
    /// Most I/O queues of each kind, 1 to [`DiskOptions::QUEUES_MAX`].
    pub queues: u16,
    /// Serial number, which is the namespace's EUI-64, too.
    pub serial: u64,
}

impl DiskOptions {
    /// Most I/O queues a disk can have.
    pub const QUEUES_MAX: u16 = 64;
}

/// What a worker has to do.
#[derive(Default)]
struct Work {
    /// The driver has written the configuration register.
    configure: bool,
    /// Submission queues that have commands.
    queues: Vec<u16>,
    stop: bool,
}

#[derive(Default)]
struct Worker {
    work: Mutex<Work>,
    wake: Condvar,
}

impl Worker {
    fn add(&self, add: impl FnOnce(&mut Work)) {
        add(&mut lock(&self.work));
        self.wake.notify_one();
    }

    fn add_queue(&self, id: u16) {
        self.add(|work| {
            if !work.queues.contains(&id) {
                work.queues.push(id);
            }
        });
    }
}

/// The registers, as far as they are not constant.
#[derive(Clone, Copy, Default)]
struct Registers {
    configuration: Configuration,
    status: u32,
    /// Sizes and addresses of the admin queues.
    attributes: u32,
    submission: u64,
    completion: u64,
}

impl Registers {
    fn bytes(&self) -> [u8; register::END] {
        let mut bytes = [0; register::END];
        for (at, value) in [
            (register::CAP, capabilities(ENTRIES_MAX, READY_TIMEOUT)),
            (register::ASQ, self.submission),
            (register::ACQ, self.completion),
        ] {
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        for (at, value) in [
            (register::VS, VERSION),
            (register::CC, self.configuration.0),
            (register::CSTS, self.status),
            (register::AQA, self.attributes),
        ] {
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    /// Writes what can be written.
    fn write(&mut self, at: usize, data: &[u8]) {
        let mut bytes = self.bytes();
        if let Some(to) = bytes.get_mut(at..at.saturating_add(data.len())) {
            to.copy_from_slice(data);
        }
        let word = |at: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&bytes[at..at + 4]);
            u32::from_le_bytes(word)
        };
        let wide = |at: usize| u64::from(word(at)) | (u64::from(word(at + 4)) << 32);
        self.configuration = Configuration(word(register::CC));
        self.attributes = word(register::AQA);
        self.submission = wide(register::ASQ);
        self.completion = wide(register::ACQ);
    }

    /// The admin queues, if the driver has asked for what there is.
    fn admin_queues(&self) -> Result<AdminQueues, Fault> {
        let entries = |last: u32| Some((last & 0xfff) + 1).filter(|entries| *entries >= 2);
        let submission = entries(self.attributes).ok_or(Fault)?;
        let completion = entries(self.attributes >> 16).ok_or(Fault)?;
        if !self.configuration.valid() {
            return Err(Fault);
        }
        Ok(AdminQueues {
            submission: (self.submission, submission),
            completion: (self.completion, completion),
        })
    }
}

struct Disk {
    name: String,
    log: Arc<MessageLog>,
    statistics: Arc<Statistics>,
    store: Arc<Store>,
    controller: RwLock<Controller>,
    registers: Mutex<Registers>,
    interrupts: OnceLock<InterruptSender>,
    /// That of the admin queue, then those of the I/O queues.
    workers: [Worker; 1 + WORKERS],
}

/// An NVMe controller with a disk.
pub struct NvmeDisk {
    disk: Arc<Disk>,
    limits: Limits,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl NvmeDisk {
    /// A controller in its power-on state, with `store` as its disk.
    pub fn new(
        options: &DiskOptions,
        memory: GuestMemoryMmap,
        store: Arc<Store>,
        counters: &Counters,
        log: Arc<MessageLog>,
    ) -> std::io::Result<Arc<Self>> {
        let queues = options.queues.clamp(1, DiskOptions::QUEUES_MAX);
        let limits = Limits {
            queues,
            vectors: queues + 1,
            serial: options.serial,
        };
        let statistics = Arc::new(Statistics::new(counters, &options.name));
        let controller = Controller::new(memory, limits.clone(), store.clone(), statistics.clone());
        let all = Self {
            disk: Arc::new(Disk {
                name: options.name.clone(),
                log,
                statistics,
                store,
                controller: RwLock::new(controller),
                registers: Mutex::default(),
                interrupts: OnceLock::new(),
                workers: Default::default(),
            }),
            limits,
            threads: Mutex::default(),
        };
        // Those which run end with `all` if another one cannot be started.
        for number in 0..all.disk.workers.len() {
            let disk = all.disk.clone();
            let thread = thread::Builder::new()
                .name(format!("{}-{number}", options.name))
                .spawn(move || disk.run(number))?;
            lock(&all.threads).push(thread);
        }
        Ok(Arc::new(all))
    }
}

impl Drop for NvmeDisk {
    fn drop(&mut self) {
        for worker in &self.disk.workers {
            worker.add(|work| work.stop = true);
        }
        for thread in lock(&self.threads).drain(..) {
            // A panic of a worker was reported where it happened.
            let _ = thread.join();
        }
    }
}

impl PciFunction for NvmeDisk {
    fn description(&self) -> Description {
        let mut bars = [None; 6];
        bars[0] = Some(Bar {
            size: BAR_SIZE,
            wide: true,
            prefetchable: false,
        });
        Description {
            vendor: VENDOR_MICROSOFT,
            device: DEVICE_NVME,
            revision: 1,
            class: CLASS,
            subsystem_vendor: VENDOR_MICROSOFT,
            subsystem: DEVICE_NVME,
            bars,
            msix: Some(MsixLayout {
                vectors: self.limits.vectors,
                bar: 0,
                table: MSIX_TABLE,
                pending: MSIX_PENDING,
            }),
            rom: None,
            msi: None,
        }
    }

    fn attach(&self, interrupts: InterruptSender) {
        // A controller is put on one bus only.
        let _ = self.disk.interrupts.set(interrupts);
    }

    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        let registers = lock(&self.disk.registers).bytes();
        let source = registers.get(at..at.saturating_add(data.len()));
        if let (0, Some(source)) = (bar, source) {
            data.copy_from_slice(source);
        }
    }

    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]) {
        if bar != 0 {
            return;
        }
        if let Some(at) = offset.checked_sub(register::DOORBELLS) {
            if let (0, Ok(value)) = (at % 4, <[u8; 4]>::try_from(data)) {
                self.disk.ring(at / 4, u32::from_le_bytes(value));
            }
            return;
        }
        let mut registers = lock(&self.disk.registers);
        let before = registers.configuration;
        registers.write(usize::try_from(offset).unwrap_or(usize::MAX), data);
        if registers.configuration != before {
            drop(registers);
            self.disk.workers[0].add(|work| work.configure = true);
        }
    }

    fn reset(&self) {
        let mut controller = self.disk.write();
        controller.reset();
        *lock(&self.disk.registers) = Registers::default();
        for worker in &self.disk.workers {
            worker.add(|work| {
                work.configure = false;
                work.queues.clear();
            });
        }
    }
}

impl Disk {
    fn read(&self) -> RwLockReadGuard<'_, Controller> {
        self.controller
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Controller> {
        self.controller
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn record(&self, direction: Direction, name: &str, fields: impl std::fmt::Display) {
        self.log.record(direction, &self.name, name, fields);
    }

    fn fault(&self, what: &str) {
        self.statistics.protocol_errors.inc();
        self.record(Direction::Host, "PROTOCOL_ERROR", what);
    }

    /// The controller cannot go on: the driver must reset it.
    fn fail(&self, what: &str) {
        self.fault(what);
        lock(&self.registers).status |= status_register::FATAL;
    }

    fn has_failed(&self) -> bool {
        lock(&self.registers).status & status_register::FATAL != 0
    }

    /// The worker of a queue.
    fn worker(&self, queue: u16) -> &Worker {
        match queue.checked_sub(1) {
            None => &self.workers[0],
            Some(number) => &self.workers[1 + usize::from(number) % WORKERS],
        }
    }

    /// Doorbell `number` is rung.
    fn ring(&self, number: u64, value: u32) {
        let controller = self.read();
        let id = u16::try_from(number / 2).unwrap_or(u16::MAX);
        let rung = if number % 2 == 0 {
            match controller.submissions.get(&id) {
                Some(queue) => queue.ring(value).map(|()| self.worker(id).add_queue(id)),
                None => Err(Fault),
            }
        } else {
            match controller.completions.get(&id) {
                Some(queue) => queue.ring(value).map(|waited| {
                    if waited {
                        // The workers announce what was added now, and go on.
                        for queue in controller.submissions.values() {
                            if queue.completions.id() == id {
                                self.worker(queue.id()).add_queue(queue.id());
                            }
                        }
                    }
                }),
                None => Err(Fault),
            }
        };
        if rung.is_err() {
            self.fault(&format!("doorbell {number} value {value:#x}"));
            self.tell(&controller, EVENT_INVALID_DOORBELL);
        }
    }

    /// Tells the driver of an event if it has asked for that.
    fn tell(&self, controller: &Controller, event: u32) {
        let Some(queue) = controller.submissions.get(&0) else {
            return;
        };
        let Some(request) = lock(&controller.event_requests).pop() else {
            return;
        };
        if queue.complete(request, event, 0).is_err() {
            self.fail("admin queue");
        }
        self.announce(queue);
    }

    fn announce(&self, queue: &SubmissionQueue) {
        if let Some(interrupts) = self.interrupts.get() {
            queue.completions.announce(interrupts);
        }
    }

    /// A worker.
    fn run(&self, number: usize) {
        let worker = &self.workers[number];
        let mut buffer = Vec::new();
        loop {
            let mut work = lock(&worker.work);
            while !work.stop && !work.configure && work.queues.is_empty() {
                work = worker
                    .wake
                    .wait(work)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            if work.stop {
                return;
            }
            let configure = std::mem::take(&mut work.configure);
            let queues = std::mem::take(&mut work.queues);
            drop(work);
            if configure {
                self.configure();
            }
            for id in queues {
                let more = if id == 0 {
                    self.serve_admin()
                } else {
                    self.serve(id, &mut buffer)
                };
                if more {
                    worker.add_queue(id);
                }
            }
        }
    }

    /// The driver has written the configuration register: does what it says now.
    fn configure(&self) {
        let mut controller = self.write();
        let registers = *lock(&self.registers);
        let configuration = registers.configuration;
        let mut status = registers.status;
        if !configuration.enabled() {
            controller.reset();
            status = 0;
        } else if !controller.enabled && !self.has_failed() {
            let enabled = registers
                .admin_queues()
                .and_then(|queues| controller.enable(&queues));
            match enabled {
                Ok(()) => status |= status_register::READY,
                Err(Fault) => {
                    self.fault(&format!("{configuration:x?}"));
                    status |= status_register::FATAL;
                }
            }
        }
        if configuration.shutdown() {
            if let Err(error) = self.store.flush() {
                self.record(Direction::Host, "flush failed", error);
            }
            status |= status_register::SHUTDOWN_COMPLETE;
        }
        self.record(
            Direction::GuestToHost,
            "CONFIGURE",
            format_args!("{:#x} status={status:#x}", configuration.0),
        );
        lock(&self.registers).status = status;
    }

    /// Carries out some admin commands. Says whether there may be more.
    fn serve_admin(&self) -> bool {
        let mut controller = self.write();
        let Some(queue) = controller.submissions.get(&0).cloned() else {
            return false;
        };
        self.serve_queue(&queue, |command| {
            let outcome = controller.admin(command);
            self.record(
                Direction::GuestToHost,
                admin::name(command.opcode),
                Fields(command, &outcome),
            );
            match outcome {
                Ok(Outcome::Done(result)) => Some((result, Status::SUCCESS)),
                Ok(Outcome::Held) => None,
                Err(status) => Some((0, status)),
            }
        })
    }

    /// Carries out some commands of an I/O queue. Says whether there may be more.
    fn serve(&self, id: u16, buffer: &mut Vec<u8>) -> bool {
        let controller = self.read();
        let Some(queue) = controller.submissions.get(&id) else {
            return false;
        };
        self.serve_queue(queue, |command| {
            let done = controller.io(command, buffer);
            Some((0, done.err().unwrap_or(Status::SUCCESS)))
        })
    }

    /// Takes commands, has them carried out and completes those that are.
    fn serve_queue(
        &self,
        queue: &SubmissionQueue,
        mut carry_out: impl FnMut(&Command) -> Option<(u32, Status)>,
    ) -> bool {
        let mut serve = || -> Result<bool, Fault> {
            for _ in 0..BATCH {
                if queue.completions.is_full() {
                    return Ok(false);
                }
                let Some(command) = queue.take()? else {
                    return Ok(false);
                };
                if let Some((result, status)) = carry_out(&command) {
                    if status != Status::SUCCESS {
                        self.statistics.refused.inc();
                    }
                    queue.complete(command.id.get(), result, status.field())?;
                }
            }
            Ok(true)
        };
        let more = if self.has_failed() {
            Ok(false)
        } else {
            serve()
        };
        self.announce(queue);
        more.unwrap_or_else(|Fault| {
            self.fail(&format!("queue {}", queue.id()));
            false
        })
    }
}

/// An admin command for the log.
struct Fields<'a>(&'a Command, &'a Result<Outcome, Status>);

impl std::fmt::Display for Fields<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self(command, outcome) = self;
        let [w10, w11] = [10, 11].map(|number| command.word(number));
        write!(
            f,
            "id={:#x} nsid={:#x} cdw10={w10:#x} cdw11={w11:#x}",
            command.id.get(),
            command.namespace.get()
        )?;
        match outcome {
            Ok(Outcome::Done(result)) => write!(f, " result={result:#x}"),
            Ok(Outcome::Held) => Ok(()),
            Err(status) => write!(f, " status={:#x}", status.0),
        }
    }
}
