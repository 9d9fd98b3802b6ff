// SPDX-License-Identifier: GPL-2.0

//! The admin commands.

use std::sync::Arc;

use zerocopy::{FromZeros, IntoBytes};

use crate::{
    controller::{Controller, ENTRIES_MAX, TRANSFER_MAX, TRANSFER_MAX_LOG2},
    queue::{lock, CompletionQueue, SubmissionQueue},
    wire::{
        admin, cns, feature, log, Command, Eui64Descriptor, Health, IdentifyController,
        IdentifyNamespace, Status, BLOCK_SHIFT, NAMESPACE, VERSION,
    },
};

const VENDOR_MICROSOFT: u16 = 0x1414;
/// What the disk says it is.
const MODEL: &str = "Hyper-V Lab NVMe Disk";
const FIRMWARE: &[u8; 8] = b"1.0     ";
/// Most requests for events at a time.
const EVENT_REQUESTS: usize = 4;
/// Length of the log pages about errors (one of them), health and firmware.
const ERROR_LOG: usize = 64;
const LOG: usize = 512;
/// In kelvins.
const TEMPERATURE: u16 = 300;
const WARNING_TEMPERATURE: u16 = 343;
const CRITICAL_TEMPERATURE: u16 = 353;

/// What follows from an admin command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is complete, with this result.
    Done(u32),
    /// It completes when there is an event.
    Held,
}

/// A text that is filled up with spaces.
fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut bytes = [b' '; N];
    for (to, from) in bytes.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    bytes
}

impl Controller {
    /// Carries out an admin command.
    pub fn admin(&mut self, command: &Command) -> Result<Outcome, Status> {
        self.statistics.admin.inc();
        if command.flags != 0 {
            return Err(Status::INVALID_FIELD);
        }
        match command.opcode {
            admin::IDENTIFY => self.identify(command)?,
            admin::CREATE_CQ => self.create_cq(command)?,
            admin::CREATE_SQ => self.create_sq(command)?,
            admin::DELETE_SQ => {
                let (id, _) = command.halves(10);
                if id == 0 || self.submissions.remove(&id).is_none() {
                    return Err(Status::INVALID_QUEUE_IDENTIFIER);
                }
            }
            admin::DELETE_CQ => {
                let (id, _) = command.halves(10);
                if id == 0 || !self.completions.contains_key(&id) {
                    return Err(Status::INVALID_QUEUE_IDENTIFIER);
                }
                if self.submissions.values().any(|q| q.completions.id() == id) {
                    return Err(Status::INVALID_QUEUE_DELETION);
                }
                self.completions.remove(&id);
            }
            admin::GET_LOG_PAGE => self.log_page(command)?,
            // Commands are carried out one after the other: when this one is, the one to abort was.
            admin::ABORT => return Ok(Outcome::Done(1)),
            admin::SET_FEATURES => return self.set_feature(command).map(Outcome::Done),
            admin::GET_FEATURES => {
                let id = command.word(10) as u8;
                let value = self.features.get(&id).ok_or(Status::INVALID_FIELD)?;
                return Ok(Outcome::Done(*value));
            }
            admin::ASYNC_EVENT_REQUEST => {
                let mut requests = lock(&self.event_requests);
                if requests.len() == EVENT_REQUESTS {
                    return Err(Status::TOO_MANY_EVENT_REQUESTS);
                }
                requests.push(command.id.get());
                return Ok(Outcome::Held);
            }
            _ => return Err(Status::INVALID_OPCODE),
        }
        Ok(Outcome::Done(0))
    }

    fn identify(&self, command: &Command) -> Result<(), Status> {
        let namespace = command.namespace.get();
        let known = || match namespace {
            NAMESPACE => Ok(()),
            _ => Err(Status::INVALID_NAMESPACE),
        };
        // The NVM command set is number 0.
        let command_set = (command.word(11) >> 24) as u8;
        match command.word(10) as u8 {
            cns::CONTROLLER => self.give_page(command, &self.describe()),
            cns::NAMESPACE => {
                known()?;
                self.give_page(command, &self.describe_namespace())
            }
            cns::ACTIVE_NAMESPACES => {
                // Those with numbers above the given one.
                let list = match namespace {
                    0 => NAMESPACE,
                    1..=0xffff_fffd => 0,
                    _ => return Err(Status::INVALID_NAMESPACE),
                };
                self.give_page(command, &list.to_le_bytes())
            }
            cns::NAMESPACE_DESCRIPTORS => {
                known()?;
                let descriptor = Eui64Descriptor {
                    kind: 1,
                    length: 8,
                    reserved: [0; 2],
                    eui64: self.limits.serial.to_be_bytes(),
                };
                self.give_page(command, &descriptor)
            }
            // The structures exist, and nothing in them is set.
            cns::COMMAND_SET_NAMESPACE if command_set == 0 => {
                known()?;
                self.give_page(command, &0_u8)
            }
            cns::COMMAND_SET_CONTROLLER if command_set == 0 => self.give_page(command, &0_u8),
            _ => Err(Status::INVALID_FIELD),
        }
    }

    fn describe(&self) -> IdentifyController {
        const IO_CONTROLLER: u8 = 1;
        // One slot, which cannot be written.
        const FIRMWARE_UPDATES: u8 = (1 << 1) | 1;
        // Log pages can be read from an offset on.
        const LOG_OFFSETS: u8 = 1 << 2;
        const DATASET_MANAGEMENT: u16 = 1 << 2;
        const WRITE_ZEROES: u16 = 1 << 3;
        // There is one, and FLUSH is for one namespace only.
        const WRITE_CACHE: u8 = (2 << 1) | 1;
        let serial = format!("{:016X}", self.limits.serial);
        let mut all = IdentifyController::new_zeroed();
        all.vendor = VENDOR_MICROSOFT.into();
        all.subsystem_vendor = VENDOR_MICROSOFT.into();
        all.serial = padded(&serial);
        all.model = padded(MODEL);
        all.firmware = *FIRMWARE;
        all.max_transfer = TRANSFER_MAX_LOG2;
        all.controller = 1.into();
        all.version = VERSION.into();
        all.kind = IO_CONTROLLER;
        all.event_limit = EVENT_REQUESTS as u8 - 1;
        all.firmware_updates = FIRMWARE_UPDATES;
        all.log_attributes = LOG_OFFSETS;
        all.warning_temperature = WARNING_TEMPERATURE.into();
        all.critical_temperature = CRITICAL_TEMPERATURE.into();
        // 64 and 16 bytes at least and at most.
        all.sq_entry = 0x66;
        all.cq_entry = 0x44;
        all.namespaces = NAMESPACE.into();
        all.optional_commands = (DATASET_MANAGEMENT | WRITE_ZEROES).into();
        all.write_cache = WRITE_CACHE;
        let name = format!("nqn.2026-01.org.example:hvlab:{serial}");
        for (to, from) in all.name.iter_mut().zip(name.bytes()) {
            *to = from;
        }
        all
    }

    fn describe_namespace(&self) -> IdentifyNamespace {
        // Deallocated blocks read as zeros, and WRITE ZEROES may deallocate.
        const DEALLOCATE: u8 = (1 << 3) | 1;
        let mut all = IdentifyNamespace::new_zeroed();
        all.blocks = [self.blocks().into(); 3];
        all.deallocate = DEALLOCATE;
        all.eui64 = self.limits.serial.to_be_bytes();
        all.block_shift = BLOCK_SHIFT as u8;
        all
    }

    /// Number and size of the queue that is to be created.
    fn new_queue<T>(
        &self,
        command: &Command,
        existing: &std::collections::BTreeMap<u16, T>,
    ) -> Result<(u16, u32), Status> {
        const CONTIGUOUS: u32 = 1;
        let (id, last) = command.halves(10);
        if id == 0 || id > self.limits.queues || existing.contains_key(&id) {
            return Err(Status::INVALID_QUEUE_IDENTIFIER);
        }
        let entries = u32::from(last) + 1;
        if !(2..=ENTRIES_MAX).contains(&entries) {
            return Err(Status::INVALID_QUEUE_SIZE);
        }
        if command.word(11) & CONTIGUOUS == 0 {
            return Err(Status::INVALID_FIELD);
        }
        Ok((id, entries))
    }

    fn create_cq(&mut self, command: &Command) -> Result<(), Status> {
        const INTERRUPTS: u16 = 1 << 1;
        let (id, entries) = self.new_queue(command, &self.completions)?;
        let (flags, vector) = command.halves(11);
        let vector = (flags & INTERRUPTS != 0).then_some(vector);
        if vector.is_some_and(|vector| vector >= self.limits.vectors) {
            return Err(Status::INVALID_INTERRUPT_VECTOR);
        }
        let [address, _] = command.prps();
        let queue = CompletionQueue::new(&self.memory, id, address, entries, vector)
            .map_err(|_| Status::INVALID_FIELD)?;
        self.completions.insert(id, Arc::new(queue));
        Ok(())
    }

    fn create_sq(&mut self, command: &Command) -> Result<(), Status> {
        let (id, entries) = self.new_queue(command, &self.submissions)?;
        let (_, completions) = command.halves(11);
        let completions = self
            .completions
            .get(&completions)
            .filter(|queue| queue.id() != 0)
            .ok_or(Status::INVALID_COMPLETION_QUEUE)?;
        let [address, _] = command.prps();
        let queue = SubmissionQueue::new(&self.memory, id, address, entries, completions.clone())
            .map_err(|_| Status::INVALID_FIELD)?;
        self.submissions.insert(id, Arc::new(queue));
        Ok(())
    }

    fn log_page(&self, command: &Command) -> Result<(), Status> {
        let (id, low) = command.halves(10);
        let (high, _) = command.halves(11);
        let words = ((u64::from(high) << 16) | u64::from(low)) + 1;
        let length = usize::try_from(words * 4)
            .ok()
            .filter(|length| *length <= TRANSFER_MAX)
            .ok_or(Status::INVALID_FIELD)?;
        let (mut page, size) = match id as u8 {
            log::ERRORS => (Vec::new(), ERROR_LOG),
            log::HEALTH => (self.health().as_bytes().to_vec(), LOG),
            // Slot 1 is in use; the revisions follow.
            log::FIRMWARE => ([[1, 0, 0, 0, 0, 0, 0, 0], *FIRMWARE].concat(), LOG),
            _ => return Err(Status::INVALID_LOG_PAGE),
        };
        page.resize(size, 0);
        let offset = u64::from(command.word(12)) | (u64::from(command.word(13)) << 32);
        let rest = usize::try_from(offset)
            .ok()
            .filter(|offset| offset % 4 == 0)
            .and_then(|offset| page.get(offset..))
            .ok_or(Status::INVALID_FIELD)?;
        self.give(command, rest, length)
    }

    fn health(&self) -> Health {
        let statistics = &self.statistics;
        let units = |bytes: u64| (bytes / 512).div_ceil(1000);
        let mut health = Health::new_zeroed();
        health.temperature = TEMPERATURE.into();
        health.spare = 100;
        health.spare_threshold = 10;
        health.counts = [
            units(statistics.read_bytes.get()),
            units(statistics.written_bytes.get()),
            statistics.reads.get(),
            statistics.writes.get(),
        ]
        .map(|count| [count.into(), 0.into()]);
        health
    }

    fn set_feature(&mut self, command: &Command) -> Result<u32, Status> {
        const SAVE: u32 = 1 << 31;
        let id = command.word(10) as u8;
        if command.word(10) & SAVE != 0 {
            return Err(Status::INVALID_FIELD);
        }
        let last = u32::from(self.limits.queues - 1);
        let place = self.features.get_mut(&id).ok_or(Status::INVALID_FIELD)?;
        if id == feature::NUMBER_OF_QUEUES {
            // What there is, whatever the driver would like; both counts are less one.
            *place = last | (last << 16);
            return Ok(*place);
        }
        *place = command.word(11);
        Ok(0)
    }
}
