// SPDX-License-Identifier: GPL-2.0

//! The state of the controller, and the commands for its namespace.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use vm_memory::GuestMemoryMmap;
use zerocopy::{FromBytes, IntoBytes};

use crate::{
    prp::Pieces,
    queue::{CompletionQueue, Fault, SubmissionQueue},
    statistics::Statistics,
    store::Store,
    wire::{
        feature,
        io,
        BlockRange,
        Command,
        Status,
        BLOCK_SHIFT,
        NAMESPACE,
        PAGE, //
    },
};

/// Most entries of a queue.
pub const ENTRIES_MAX: u32 = 1024;
/// log2 of the longest transfer in pages. Beyond 2 MiB a list of pages needs more than one page.
pub const TRANSFER_MAX_LOG2: u8 = 10;
/// The longest transfer.
pub const TRANSFER_MAX: usize = (PAGE as usize) << TRANSFER_MAX_LOG2;
/// Values of features after a reset; those not listed do not exist.
const FEATURES: [(u8, u32); 8] = [
    (feature::ARBITRATION, 0),
    (feature::POWER_MANAGEMENT, 0),
    (feature::TEMPERATURE_THRESHOLD, 343),
    (feature::ERROR_RECOVERY, 0),
    (feature::VOLATILE_WRITE_CACHE, 1),
    (feature::NUMBER_OF_QUEUES, 0),
    (feature::WRITE_ATOMICITY, 0),
    (feature::ASYNC_EVENTS, 0),
];

/// What the controller offers.
#[derive(Clone, Debug)]
pub struct Limits {
    /// I/O queues of each kind.
    pub queues: u16,
    /// Interrupt vectors.
    pub vectors: u16,
    /// Serial number of the disk.
    pub serial: u64,
}

/// Where the admin queues are.
#[derive(Clone, Copy, Debug)]
pub struct AdminQueues {
    /// Address and number of entries of the submission queue.
    pub submission: (u64, u32),
    /// The same of the completion queue.
    pub completion: (u64, u32),
}

/// The state of the controller.
pub struct Controller {
    pub(crate) memory: GuestMemoryMmap,
    pub(crate) limits: Limits,
    pub(crate) store: Arc<Store>,
    pub(crate) statistics: Arc<Statistics>,
    /// Whether it is enabled.
    pub(crate) enabled: bool,
    /// Submission queues by number, that of the admin commands included.
    pub(crate) submissions: BTreeMap<u16, Arc<SubmissionQueue>>,
    /// Completion queues by number.
    pub(crate) completions: BTreeMap<u16, Arc<CompletionQueue>>,
    /// Values of features.
    pub(crate) features: BTreeMap<u8, u32>,
    /// Commands that complete when there is an event.
    pub(crate) event_requests: Mutex<Vec<u16>>,
}

impl Controller {
    /// The controller after power-on.
    pub fn new(
        memory: GuestMemoryMmap,
        limits: Limits,
        store: Arc<Store>,
        statistics: Arc<Statistics>,
    ) -> Self {
        Self {
            memory,
            limits,
            store,
            statistics,
            enabled: false,
            submissions: BTreeMap::new(),
            completions: BTreeMap::new(),
            features: FEATURES.into(),
            event_requests: Mutex::default(),
        }
    }

    /// Back to the state after power-on.
    pub fn reset(&mut self) {
        *self = Self::new(
            self.memory.clone(),
            self.limits.clone(),
            self.store.clone(),
            self.statistics.clone(),
        );
    }

    /// Begins to take admin commands.
    pub fn enable(&mut self, queues: &AdminQueues) -> Result<(), Fault> {
        let (address, entries) = queues.completion;
        let completions =
            CompletionQueue::new(&self.memory, 0, address, entries, Some(0)).map(Arc::new)?;
        let (address, entries) = queues.submission;
        let submissions =
            SubmissionQueue::new(&self.memory, 0, address, entries, completions.clone())?;
        self.completions.insert(0, completions);
        self.submissions.insert(0, Arc::new(submissions));
        self.enabled = true;
        self.statistics.enabled.inc();
        Ok(())
    }

    /// Number of blocks.
    pub fn blocks(&self) -> u64 {
        self.store.size() >> BLOCK_SHIFT
    }

    /// Offset and length in bytes of a range of blocks.
    fn range(&self, first: u64, count: u64) -> Result<(u64, u64), Status> {
        match first.checked_add(count) {
            Some(end) if end <= self.blocks() => Ok((first << BLOCK_SHIFT, count << BLOCK_SHIFT)),
            _ => Err(Status::LBA_OUT_OF_RANGE),
        }
    }

    /// The memory that a command names, of a length that was limited.
    pub(crate) fn pieces(&self, command: &Command, length: usize) -> Result<Pieces<'_>, Status> {
        Pieces::new(&self.memory, command.prps(), length)
    }

    /// Carries out a command for the namespace.
    pub fn io(&self, command: &Command, buffer: &mut Vec<u8>) -> Result<(), Status> {
        // Neither one of two fused commands nor one with a scatter-gather list.
        if command.flags != 0 {
            return Err(Status::INVALID_FIELD);
        }
        let statistics = &self.statistics;
        let namespace = || match command.namespace.get() {
            NAMESPACE => Ok(()),
            _ => Err(Status::INVALID_NAMESPACE),
        };
        match command.opcode {
            io::READ | io::WRITE => {
                namespace()?;
                let (first, count) = command.blocks();
                let (offset, length) = self.range(first, count)?;
                let length = usize::try_from(length)
                    .ok()
                    .filter(|length| *length <= TRANSFER_MAX)
                    .ok_or(Status::INVALID_FIELD)?;
                let pieces = self.pieces(command, length)?;
                buffer.resize(length, 0);
                if command.opcode == io::READ {
                    self.store
                        .read(offset, buffer)
                        .map_err(|_| Status::UNRECOVERED_READ_ERROR)?;
                    pieces.scatter(buffer)?;
                    statistics.reads.inc();
                    statistics.read_bytes.add(length as u64);
                } else {
                    const UNIT_ACCESS: u32 = 1 << 30;
                    pieces.gather(buffer)?;
                    self.write(|store| store.write(offset, buffer))?;
                    if command.word(12) & UNIT_ACCESS != 0 {
                        self.write(Store::flush)?;
                    }
                    statistics.writes.inc();
                    statistics.written_bytes.add(length as u64);
                }
            }
            io::FLUSH => {
                namespace()?;
                self.write(Store::flush)?;
                statistics.flushes.inc();
            }
            io::WRITE_ZEROES => {
                namespace()?;
                let (first, count) = command.blocks();
                let (offset, length) = self.range(first, count)?;
                self.write(|store| store.zero(offset, length))?;
                statistics.zeroes.inc();
            }
            io::DATASET_MANAGEMENT => {
                namespace()?;
                self.manage_dataset(command)?;
                statistics.zeroes.inc();
            }
            _ => return Err(Status::INVALID_OPCODE),
        }
        Ok(())
    }

    fn write(&self, write: impl FnOnce(&Store) -> std::io::Result<()>) -> Result<(), Status> {
        write(&self.store).map_err(|_| Status::WRITE_FAULT)
    }

    fn manage_dataset(&self, command: &Command) -> Result<(), Status> {
        const DEALLOCATE: u32 = 1 << 2;
        let count = (command.word(10) & 0xff) as usize + 1;
        let mut bytes = vec![0; count * size_of::<BlockRange>()];
        self.pieces(command, bytes.len())?.gather(&mut bytes)?;
        let ranges: Result<Vec<_>, _> = bytes
            .chunks_exact(size_of::<BlockRange>())
            .filter_map(|bytes| BlockRange::read_from_bytes(bytes).ok())
            .map(|range| self.range(range.first.get(), range.count.get().into()))
            .collect();
        let ranges = ranges?;
        if command.word(11) & DEALLOCATE != 0 {
            for (offset, length) in ranges {
                self.write(|store| store.zero(offset, length))?;
            }
        }
        Ok(())
    }

    /// Gives data to the driver that may be longer or shorter than it asked for.
    pub(crate) fn give(&self, command: &Command, data: &[u8], length: usize) -> Result<(), Status> {
        let mut bytes = data[..data.len().min(length)].to_vec();
        bytes.resize(length, 0);
        self.pieces(command, length)?.scatter(&bytes)
    }

    /// The same of a structure that is a page long with the zeros after it.
    pub(crate) fn give_page(
        &self,
        command: &Command,
        data: &(impl IntoBytes + zerocopy::Immutable),
    ) -> Result<(), Status> {
        self.give(command, data.as_bytes(), PAGE as usize)
    }
}
