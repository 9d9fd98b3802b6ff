// SPDX-License-Identifier: GPL-2.0

//! Queues in guest memory.
//!
//! Lock order: a submission queue, then a completion queue.

use std::{
    collections::VecDeque,
    sync::{
        atomic::{AtomicU32, Ordering},
        Arc, Mutex, MutexGuard, PoisonError,
    },
};

use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};
use vpci::InterruptSender;
use zerocopy::{little_endian::U16, FromZeros, IntoBytes};

use crate::wire::{Command, Completion, PAGE};

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The guest named memory that it does not have, or a place beyond the end of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault;

/// The memory of a queue, which is contiguous.
#[derive(Debug)]
struct Ring {
    memory: GuestMemoryMmap,
    address: u64,
    entries: u32,
    entry: usize,
}

impl Ring {
    fn new(
        memory: &GuestMemoryMmap,
        address: u64,
        entries: u32,
        entry: usize,
    ) -> Result<Self, Fault> {
        let there = memory.check_range(GuestAddress(address), entries as usize * entry);
        if address % PAGE != 0 || !there {
            return Err(Fault);
        }
        Ok(Self {
            memory: memory.clone(),
            address,
            entries,
            entry,
        })
    }

    fn at(&self, index: u32) -> GuestAddress {
        // The range was checked as a whole, so this does not overflow.
        GuestAddress(self.address + u64::from(index) * self.entry as u64)
    }

    fn after(&self, index: u32) -> u32 {
        (index + 1) % self.entries
    }

    /// The value of a doorbell as an index.
    fn index(&self, value: u32) -> Result<u32, Fault> {
        if value < self.entries {
            Ok(value)
        } else {
            Err(Fault)
        }
    }
}

/// Where a completion queue stands.
#[derive(Debug)]
struct State {
    /// Where the next entry goes, and its phase tag.
    tail: u32,
    phase: bool,
    /// Up to where the driver has taken entries.
    head: u32,
    /// Completions for which there was no room.
    waiting: VecDeque<Completion>,
    /// Entries were added since the last interrupt.
    unannounced: bool,
}

/// A completion queue.
#[derive(Debug)]
pub struct CompletionQueue {
    id: u16,
    ring: Ring,
    vector: Option<u16>,
    state: Mutex<State>,
}

impl CompletionQueue {
    /// An empty queue, over memory that the driver has set to zeros.
    pub fn new(
        memory: &GuestMemoryMmap,
        id: u16,
        address: u64,
        entries: u32,
        vector: Option<u16>,
    ) -> Result<Self, Fault> {
        Ok(Self {
            id,
            ring: Ring::new(memory, address, entries, size_of::<Completion>())?,
            vector,
            state: Mutex::new(State {
                tail: 0,
                phase: true,
                head: 0,
                waiting: VecDeque::new(),
                unannounced: false,
            }),
        })
    }

    /// Number of the queue.
    pub fn id(&self) -> u16 {
        self.id
    }

    /// Whether completions wait for room. Nothing more may be begun then whose completion comes here.
    pub fn is_full(&self) -> bool {
        !lock(&self.state).waiting.is_empty()
    }

    /// Adds a completion. Whoever adds the last of a batch calls [`Self::announce`].
    pub fn post(&self, completion: Completion) -> Result<(), Fault> {
        let mut state = lock(&self.state);
        state.waiting.push_back(completion);
        self.fill(&mut state)
    }

    /// Moves what waits into the queue, as far as there is room.
    fn fill(&self, state: &mut State) -> Result<(), Fault> {
        while let Some(completion) = state.waiting.front_mut() {
            let next = self.ring.after(state.tail);
            if next == state.head {
                break;
            }
            completion.status |= U16::new(state.phase.into());
            // The last word has the phase tag, so it goes last.
            const LAST: usize = size_of::<Completion>() - 4;
            let (body, last) = completion.as_bytes().split_at(LAST);
            let last = u32::from_ne_bytes([last[0], last[1], last[2], last[3]]);
            let at = self.ring.at(state.tail);
            let memory = &self.ring.memory;
            memory.write_slice(body, at).map_err(|_| Fault)?;
            memory
                .store(last, GuestAddress(at.0 + LAST as u64), Ordering::Release)
                .map_err(|_| Fault)?;
            state.waiting.pop_front();
            state.tail = next;
            state.phase ^= next == 0;
            state.unannounced = true;
        }
        Ok(())
    }

    /// Interrupts if there are new entries.
    pub fn announce(&self, interrupts: &InterruptSender) {
        let unannounced = std::mem::take(&mut lock(&self.state).unannounced);
        if let (true, Some(vector)) = (unannounced, self.vector) {
            interrupts.fire(vector);
        }
    }

    /// The driver has taken entries. Says whether completions had to wait for that.
    pub fn ring(&self, value: u32) -> Result<bool, Fault> {
        let mut state = lock(&self.state);
        state.head = self.ring.index(value)?;
        let waited = !state.waiting.is_empty();
        self.fill(&mut state)?;
        Ok(waited)
    }
}

/// A submission queue.
#[derive(Debug)]
pub struct SubmissionQueue {
    id: u16,
    ring: Ring,
    /// Where completions go.
    pub completions: Arc<CompletionQueue>,
    /// End of the commands, as rung by the driver.
    tail: AtomicU32,
    head: Mutex<u32>,
}

impl SubmissionQueue {
    /// An empty queue.
    pub fn new(
        memory: &GuestMemoryMmap,
        id: u16,
        address: u64,
        entries: u32,
        completions: Arc<CompletionQueue>,
    ) -> Result<Self, Fault> {
        Ok(Self {
            id,
            ring: Ring::new(memory, address, entries, size_of::<Command>())?,
            completions,
            tail: AtomicU32::new(0),
            head: Mutex::new(0),
        })
    }

    /// Number of the queue.
    pub fn id(&self) -> u16 {
        self.id
    }

    /// The driver has added commands.
    pub fn ring(&self, value: u32) -> Result<(), Fault> {
        self.tail.store(self.ring.index(value)?, Ordering::Release);
        Ok(())
    }

    /// Takes the next command.
    pub fn take(&self) -> Result<Option<Command>, Fault> {
        let mut head = lock(&self.head);
        if *head == self.tail.load(Ordering::Acquire) {
            return Ok(None);
        }
        let mut command = Command::new_zeroed();
        self.ring
            .memory
            .read_slice(command.as_mut_bytes(), self.ring.at(*head))
            .map_err(|_| Fault)?;
        *head = self.ring.after(*head);
        Ok(Some(command))
    }

    /// Adds the completion of a command, of a given status field.
    pub fn complete(&self, id: u16, result: u32, status: u16) -> Result<(), Fault> {
        let head = *lock(&self.head);
        self.completions.post(Completion {
            result: result.into(),
            reserved: 0.into(),
            // An index is below the 65536 entries that a queue can have.
            sq_head: U16::new(head as u16),
            sq: self.id.into(),
            id: id.into(),
            status: status.into(),
        })
    }
}
