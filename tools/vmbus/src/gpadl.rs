// SPDX-License-Identifier: GPL-2.0

//! GPADLs: guest memory that the guest lends to the host for a while.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, RwLock},
};

use hyperv_wire::vmbus::{GpaRanges, RangeError, PAGE_SIZE};
use vm_memory::GuestMemoryMmap;

use crate::{
    lock,
    memory::{AccessError, GpaRange},
    Counter, Guid, Platform,
};

/// Access to a GPADL failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GpadlError {
    /// The guest has taken its memory back.
    #[error("GPADL is torn down")]
    TornDown,
    /// The memory is not as the guest said.
    #[error(transparent)]
    Access(#[from] AccessError),
}

/// Memory lent by the guest. All its ranges are one sequence of bytes.
#[derive(Debug)]
pub struct Gpadl {
    id: u32,
    relid: u32,
    instance: Guid,
    length: u64,
    ranges: Vec<GpaRange>,
    memory: GuestMemoryMmap,
    /// Held for reading during every access, so that teardown waits for those under way.
    torn_down: RwLock<bool>,
}

impl Gpadl {
    /// The guest's number for it.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The channel for which it was established.
    pub fn relid(&self) -> u32 {
        self.relid
    }

    /// The device of that channel.
    pub(crate) fn instance(&self) -> Guid {
        self.instance
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.length
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Copies out of the memory.
    pub fn read_at(&self, offset: u64, to: &mut [u8]) -> Result<(), GpadlError> {
        let length = to.len();
        self.access(offset, length, |range, start, at, length| {
            range.read_at(&self.memory, start, &mut to[at..at + length])
        })
    }

    /// Copies into the memory.
    pub fn write_at(&self, offset: u64, from: &[u8]) -> Result<(), GpadlError> {
        self.access(offset, from.len(), |range, start, at, length| {
            range.write_at(&self.memory, start, &from[at..at + length])
        })
    }

    /// Calls `part` for each range that `offset..offset + length` touches, with the place in the
    /// range, the place in the buffer and the length.
    fn access(
        &self,
        offset: u64,
        length: usize,
        mut part: impl FnMut(&GpaRange, u64, usize, usize) -> Result<(), AccessError>,
    ) -> Result<(), GpadlError> {
        let torn_down = self
            .torn_down
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        if *torn_down {
            return Err(GpadlError::TornDown);
        }
        offset
            .checked_add(length as u64)
            .filter(|&end| end <= self.length)
            .ok_or(AccessError::OutOfRange)?;

        let mut skip = offset;
        let mut done = 0;
        for range in &self.ranges {
            if done == length {
                break;
            }
            if skip >= range.len() {
                skip -= range.len();
                continue;
            }
            let piece = (range.len() - skip).min((length - done) as u64) as usize;
            part(range, skip, done, piece)?;
            done += piece;
            skip = 0;
        }
        Ok(())
    }

    /// Page numbers, if the memory is made of whole pages: the condition for rings.
    pub(crate) fn pages(&self) -> Option<Vec<u64>> {
        let mut pages = Vec::new();
        for range in &self.ranges {
            if range.byte_offset != 0 || range.byte_count % PAGE_SIZE != 0 {
                return None;
            }
            pages.extend_from_slice(&range.pfns);
        }
        Some(pages)
    }

    /// Ends all access; returns when none is under way.
    pub(crate) fn tear_down(&self) {
        *self
            .torn_down
            .write()
            .unwrap_or_else(PoisonError::into_inner) = true;
    }
}

/// A GPADL of which not all messages have come.
#[derive(Debug)]
pub(crate) struct PartialGpadl {
    pub(crate) relid: u32,
    pub(crate) instance: Guid,
    range_count: u16,
    length: usize,
    buffer: Vec<u8>,
}

/// Why a GPADL could not be established.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum EstablishError {
    #[error("{0}")]
    Range(RangeError),
    #[error("no range at all")]
    NoRange,
    #[error("more bytes than announced")]
    TooLong,
    #[error("pages that the guest does not have")]
    NoMemory,
    #[error("pages that the guest hides from the host")]
    Hidden,
}

impl PartialGpadl {
    pub(crate) fn new(relid: u32, instance: Guid, range_count: u16, length: u16) -> Self {
        Self {
            relid,
            instance,
            range_count,
            length: usize::from(length),
            buffer: Vec::with_capacity(usize::from(length)),
        }
    }

    /// Adds bytes of the range buffer. Whether it is complete is the result.
    pub(crate) fn add(&mut self, bytes: &[u8]) -> Result<bool, EstablishError> {
        if bytes.len() > self.length - self.buffer.len() {
            return Err(EstablishError::TooLong);
        }
        self.buffer.extend_from_slice(bytes);
        Ok(self.buffer.len() == self.length)
    }

    /// Makes the GPADL of the complete range buffer.
    pub(crate) fn finish(self, id: u32, platform: &dyn Platform) -> Result<Gpadl, EstablishError> {
        let memory = platform.memory();
        if self.range_count == 0 {
            return Err(EstablishError::NoRange);
        }
        let mut ranges = Vec::new();
        let mut length = 0;
        for range in GpaRanges::new(&self.buffer, self.range_count.into()) {
            let range = GpaRange::from(range.map_err(EstablishError::Range)?);
            if !range.is_in(memory) {
                return Err(EstablishError::NoMemory);
            }
            if !range.is_shared(platform) {
                return Err(EstablishError::Hidden);
            }
            length += range.len();
            ranges.push(range);
        }
        Ok(Gpadl {
            id,
            relid: self.relid,
            instance: self.instance,
            length,
            ranges,
            memory: memory.clone(),
            torn_down: RwLock::new(false),
        })
    }
}

/// All GPADLs of the guest.
#[derive(Debug)]
pub(crate) struct GpadlTable {
    table: Mutex<HashMap<u32, Arc<Gpadl>>>,
    count: Counter,
}

impl GpadlTable {
    pub(crate) fn new(count: Counter) -> Self {
        Self {
            table: Mutex::default(),
            count,
        }
    }

    pub(crate) fn len(&self) -> usize {
        lock(&self.table).len()
    }

    pub(crate) fn get(&self, id: u32) -> Option<Arc<Gpadl>> {
        lock(&self.table).get(&id).cloned()
    }

    pub(crate) fn insert(&self, gpadl: Gpadl) {
        let mut table = lock(&self.table);
        table.insert(gpadl.id, Arc::new(gpadl));
        self.count.set(table.len() as u64);
    }

    /// Takes a GPADL out and ends all access to it.
    pub(crate) fn tear_down(&self, id: u32) -> Option<Arc<Gpadl>> {
        let gpadl = {
            let mut table = lock(&self.table);
            let gpadl = table.remove(&id);
            self.count.set(table.len() as u64);
            gpadl
        }?;
        gpadl.tear_down();
        Some(gpadl)
    }

    /// Tears down all that `condition` holds for; returns their number.
    pub(crate) fn tear_down_if(&self, condition: impl Fn(&Gpadl) -> bool) -> usize {
        let ids: Vec<u32> = lock(&self.table)
            .values()
            .filter(|gpadl| condition(gpadl))
            .map(|gpadl| gpadl.id)
            .collect();
        ids.into_iter().filter_map(|id| self.tear_down(id)).count()
    }
}
