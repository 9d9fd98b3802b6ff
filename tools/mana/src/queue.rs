// SPDX-License-Identifier: GPL-2.0

//! Queues in guest memory: event queues, completion queues, work queues.
//!
//! Producer and consumer counts run through all owner-bit generations, and the driver starts in
//! generation 1 over zeroed memory.
//!
//! Lock order: a receive queue, then a completion queue, then an event queue.

use std::sync::{
    atomic::{AtomicU32, Ordering},
    Arc, Mutex, MutexGuard, PoisonError,
};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vpci::InterruptSender;
use zerocopy::{little_endian::U32, FromBytes, IntoBytes};

use crate::wire::{
    event, EventEntry, ScatterEntry, WqeHeader, CQE, CQE_DATA, EQE, PAGE, SQE_MAX, WQE_UNIT,
};

/// Owner bits count generations modulo this.
const GENERATIONS: u32 = 8;

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The guest gave memory that it does not have, or an entry that makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault;

/// The pages of a queue.
#[derive(Clone, Debug)]
pub struct QueueMemory {
    memory: GuestMemoryMmap,
    pages: Vec<u64>,
}

impl QueueMemory {
    /// A queue that consists of `pages`.
    pub fn new(memory: GuestMemoryMmap, pages: Vec<u64>) -> Self {
        Self { memory, pages }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.pages.len() * PAGE as usize
    }

    fn address(&self, offset: usize) -> Result<GuestAddress, Fault> {
        let page = self.pages.get(offset / PAGE as usize).ok_or(Fault)?;
        Ok(GuestAddress(page + (offset % PAGE as usize) as u64))
    }

    /// Writes an entry that does not cross a page.
    ///
    /// Its last word has the owner bits, so it goes last.
    fn write_entry(&self, offset: usize, body: &[u8], last: u32) -> Result<(), Fault> {
        self.memory
            .write_slice(body, self.address(offset)?)
            .map_err(|_| Fault)?;
        let last_at = self.address(offset + body.len())?;
        self.memory
            .store(last, last_at, Ordering::Release)
            .map_err(|_| Fault)
    }

    /// Reads bytes that may wrap around the end of the queue.
    fn read_wrapping(&self, mut offset: usize, mut to: &mut [u8]) -> Result<(), Fault> {
        while !to.is_empty() {
            offset %= self.len();
            let in_page = PAGE as usize - offset % PAGE as usize;
            let (now, later) = to.split_at_mut(in_page.min(to.len()));
            self.memory
                .read_slice(now, self.address(offset)?)
                .map_err(|_| Fault)?;
            offset += now.len();
            to = later;
        }
        Ok(())
    }
}

/// Where an event or completion queue stands.
#[derive(Debug)]
struct Cursor {
    entries: u32,
    producer: u32,
    armed: bool,
}

impl Cursor {
    fn new(entries: usize, armed: bool) -> Self {
        let entries = entries as u32;
        Self {
            entries,
            producer: entries,
            armed,
        }
    }

    /// Index and owner bits of the next entry.
    fn next(&self) -> (usize, u32) {
        let index = self.producer % self.entries;
        let owner = (self.producer / self.entries) % GENERATIONS;
        (index as usize, owner)
    }

    fn advance(&mut self) {
        self.producer = (self.producer + 1) % (self.entries * GENERATIONS);
    }

    /// The driver has consumed up to `tail` and wants to hear of more. Says whether there is more
    /// already.
    fn arm(&mut self, tail: u32) -> bool {
        self.armed = tail == self.producer;
        !self.armed
    }
}

/// An event queue.
#[derive(Debug)]
pub struct EventQueue {
    memory: QueueMemory,
    vector: u16,
    cursor: Mutex<Cursor>,
}

impl EventQueue {
    /// An empty queue that interrupts by `vector` at the first event.
    pub fn new(memory: QueueMemory, vector: u16) -> Self {
        let cursor = Cursor::new(memory.len() / EQE, true);
        Self {
            memory,
            vector,
            cursor: Mutex::new(cursor),
        }
    }

    /// Adds an event, and interrupts if the driver waits for one.
    pub fn post(&self, event_type: u8, details: [u32; 3], interrupts: &InterruptSender) {
        let mut cursor = lock(&self.cursor);
        let (index, owner) = cursor.next();
        let entry = EventEntry {
            details: details.map(U32::new),
            info: U32::new(u32::from(event_type) | (owner << 29)),
        };
        let body = &entry.as_bytes()[..EQE - 4];
        if self
            .memory
            .write_entry(index * EQE, body, entry.info.get())
            .is_err()
        {
            return;
        }
        cursor.advance();
        if std::mem::take(&mut cursor.armed) {
            interrupts.fire(self.vector);
        }
    }

    /// The driver has rung the doorbell.
    pub fn ring(&self, tail: u32, arm: bool, interrupts: &InterruptSender) {
        if arm && lock(&self.cursor).arm(tail) {
            interrupts.fire(self.vector);
        }
    }
}

/// A completion queue.
#[derive(Debug)]
pub struct CompletionQueue {
    id: u32,
    memory: QueueMemory,
    events: Arc<EventQueue>,
    state: Mutex<CompletionState>,
}

#[derive(Debug)]
struct CompletionState {
    cursor: Cursor,
    /// Entries were added since the last event was.
    unannounced: bool,
}

impl CompletionQueue {
    /// An empty queue.
    pub fn new(id: u32, memory: QueueMemory, events: Arc<EventQueue>, armed: bool) -> Self {
        let cursor = Cursor::new(memory.len() / CQE, armed);
        Self {
            id,
            memory,
            events,
            state: Mutex::new(CompletionState {
                cursor,
                unannounced: false,
            }),
        }
    }

    /// Adds a completion for a work queue. Whoever adds the last of a batch calls
    /// [`Self::announce`].
    pub fn post(&self, data: &[u8; CQE_DATA], wq: u32, is_sq: bool) -> Result<(), Fault> {
        let mut state = lock(&self.state);
        let (index, owner) = state.cursor.next();
        let info = (wq & 0xff_ffff) | (u32::from(is_sq) << 24) | (owner << 29);
        self.memory.write_entry(index * CQE, data, info)?;
        state.cursor.advance();
        state.unannounced = true;
        Ok(())
    }

    /// Adds an event if there are new completions and the driver waits for them.
    pub fn announce(&self, interrupts: &InterruptSender) {
        let mut state = lock(&self.state);
        if std::mem::take(&mut state.unannounced) && std::mem::take(&mut state.cursor.armed) {
            self.post_event(interrupts);
        }
    }

    fn post_event(&self, interrupts: &InterruptSender) {
        self.events
            .post(event::COMPLETION, [self.id & 0xff_ffff, 0, 0], interrupts);
    }

    /// The driver has rung the doorbell.
    pub fn ring(&self, tail: u32, arm: bool, interrupts: &InterruptSender) {
        if arm && lock(&self.state).cursor.arm(tail) {
            self.post_event(interrupts);
        }
    }
}

/// An entry of a work queue, copied out of guest memory.
#[derive(Debug)]
pub struct Wqe {
    /// Its header.
    pub header: WqeHeader,
    /// Where it is, in bytes from the beginning of the queue.
    pub offset: u32,
    bytes: [u8; SQE_MAX],
}

impl Wqe {
    /// Out-of-band data.
    pub fn oob(&self) -> &[u8] {
        &self.bytes[8..8 + self.header.oob]
    }

    /// The pieces of guest memory.
    pub fn pieces(&self) -> impl Iterator<Item = (u64, usize)> + '_ {
        let start = 8 + self.header.oob;
        self.bytes[start..]
            .chunks_exact(size_of::<ScatterEntry>())
            .take(self.header.sges)
            .filter_map(|bytes| ScatterEntry::read_from_bytes(bytes).ok())
            .map(|entry| (entry.address.get(), entry.size.get() as usize))
    }

    /// Sum of the lengths of the pieces.
    pub fn size(&self) -> usize {
        self.pieces().fold(0, |sum, (_, n)| sum.saturating_add(n))
    }
}

/// A send or receive queue.
#[derive(Debug)]
pub struct WorkQueue {
    id: u32,
    memory: QueueMemory,
    entry_max: usize,
    /// Where completions go.
    pub completions: Arc<CompletionQueue>,
    /// End of the entries, in bytes that have run through the queue, as rung by the driver.
    tail: AtomicU32,
    head: Mutex<u32>,
}

impl WorkQueue {
    /// An empty queue.
    pub fn new(
        id: u32,
        memory: QueueMemory,
        entry_max: usize,
        completions: Arc<CompletionQueue>,
    ) -> Self {
        Self {
            id,
            memory,
            entry_max,
            completions,
            tail: AtomicU32::new(0),
            head: Mutex::new(0),
        }
    }

    /// Number of the queue.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The driver has rung the doorbell.
    pub fn ring(&self, tail: u32) {
        self.tail.store(tail, Ordering::Release);
    }

    /// Locks the queue for taking entries.
    pub fn consumer(&self) -> Consumer<'_> {
        Consumer {
            queue: self,
            head: lock(&self.head),
        }
    }
}

/// The consuming end of a work queue.
pub struct Consumer<'a> {
    queue: &'a WorkQueue,
    head: MutexGuard<'a, u32>,
}

impl Consumer<'_> {
    /// Copies the next entry, which stays in the queue. `None` if there is none.
    pub fn peek(&self) -> Result<Option<Wqe>, Fault> {
        let head = *self.head;
        let available = self.queue.tail.load(Ordering::Acquire).wrapping_sub(head) as usize;
        if available == 0 {
            return Ok(None);
        }
        let size = self.queue.memory.len();
        if available > size || available % WQE_UNIT as usize != 0 {
            return Err(Fault);
        }
        let offset = head as usize % size;
        let mut bytes = [0; SQE_MAX];
        self.queue
            .memory
            .read_wrapping(offset, &mut bytes[..WQE_UNIT as usize])?;
        let mut first = [0; 8];
        first.copy_from_slice(&bytes[..8]);
        let header = WqeHeader::parse(first);
        let length = header.length();
        if length > available || length > self.queue.entry_max {
            return Err(Fault);
        }
        let unit = WQE_UNIT as usize;
        self.queue
            .memory
            .read_wrapping(offset + unit, &mut bytes[unit..length])?;
        Ok(Some(Wqe {
            header,
            offset: offset as u32,
            bytes,
        }))
    }

    /// Takes the entry out.
    pub fn take(&mut self, wqe: &Wqe) {
        *self.head = self.head.wrapping_add(wqe.header.length() as u32);
    }
}

/// Copies the data of an entry out of guest memory.
pub fn gather(memory: &GuestMemoryMmap, wqe: &Wqe, to: &mut Vec<u8>) -> Result<(), Fault> {
    to.resize(wqe.size(), 0);
    let mut at = 0;
    for (address, length) in wqe.pieces() {
        memory
            .read_slice(&mut to[at..at + length], GuestAddress(address))
            .map_err(|_| Fault)?;
        at += length;
    }
    Ok(())
}

/// Copies `parts` one after the other to where an entry points.
///
/// The caller has checked that they fit.
pub fn scatter(memory: &GuestMemoryMmap, wqe: &Wqe, parts: &[&[u8]]) -> Result<(), Fault> {
    let mut pieces = wqe.pieces();
    let (mut address, mut room) = pieces.next().ok_or(Fault)?;
    for part in parts {
        let mut rest = *part;
        while !rest.is_empty() {
            if room == 0 {
                (address, room) = pieces.next().ok_or(Fault)?;
                continue;
            }
            let (now, later) = rest.split_at(room.min(rest.len()));
            memory
                .write_slice(now, GuestAddress(address))
                .map_err(|_| Fault)?;
            address = address.checked_add(now.len() as u64).ok_or(Fault)?;
            room -= now.len();
            rest = later;
        }
    }
    Ok(())
}
