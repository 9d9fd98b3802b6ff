// SPDX-License-Identifier: GPL-2.0

//! Requests to the host that wait for a completion.
//!
//! Each request has a slot of its own for the answer. The transaction id names the slot and how
//! often it was used before: an answer that comes too late finds another number there and is not
//! taken for that of a later request.

use hyperv_wire::vpci::SlotNumber;
use kernel::prelude::*;
use vmbus::{
    new_spinlock_irq,
    sync::SpinLockIrq,
    Completion, //
};

/// Requests that can be under way. More than one is rare.
const SLOTS: usize = 64;

/// Bytes of an answer that are kept, more than the longest the host has to give.
const RESPONSE_MAX: usize = 160;

#[derive(PartialEq, Eq)]
enum Phase {
    Free,
    Waiting,
    Done,
}

struct State {
    phase: Phase,
    uses: u32,
    len: usize,
    response: [u8; RESPONSE_MAX],
    /// Which use was given up, and whose the interrupt is that may still come.
    late: Option<(u32, SlotNumber)>,
}

/// Whom an answer is for.
pub(crate) enum Taker {
    /// Somebody who waits for it.
    Waiting,
    /// Somebody who has given up waiting for an interrupt of this function.
    Late(SlotNumber),
    /// Nobody.
    Nobody,
}

#[pin_data]
struct Slot {
    #[pin]
    done: Completion,
    #[pin]
    state: SpinLockIrq<State>,
}

impl Slot {
    fn new() -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            done <- Completion::new(),
            state <- new_spinlock_irq!(State {
                phase: Phase::Free,
                uses: 0,
                len: 0,
                response: [0; RESPONSE_MAX],
                late: None,
            }),
        })
    }
}

/// The requests that are under way.
pub(crate) struct Requests {
    slots: KVec<Pin<KBox<Slot>>>,
}

impl Requests {
    /// Allocates the slots.
    pub(crate) fn new() -> Result<Self> {
        let mut slots = KVec::with_capacity(SLOTS, GFP_KERNEL)?;
        for _ in 0..SLOTS {
            slots.push(KBox::pin_init(Slot::new(), GFP_KERNEL)?, GFP_KERNEL)?;
        }
        Ok(Self { slots })
    }

    /// Takes a slot for a new request, or fails with `EAGAIN` if all are taken.
    pub(crate) fn begin(&self) -> Result<Request<'_>> {
        for (index, slot) in self.slots.iter().enumerate() {
            let mut state = slot.state.lock();
            if state.phase != Phase::Free {
                continue;
            }
            state.phase = Phase::Waiting;
            state.uses = state.uses.wrapping_add(1);
            slot.done.reinit();
            // The host does not answer requests with the id 0, which this never is.
            let id = u64::from(state.uses) << 32 | (index as u64 + 1);
            return Ok(Request { slot, id });
        }
        Err(EAGAIN)
    }

    /// Hands in the host's answer.
    pub(crate) fn complete(&self, id: u64, payload: &[u8]) -> Taker {
        let slot = (id as u32)
            .checked_sub(1)
            .and_then(|index| self.slots.get(index as usize));
        let Some(slot) = slot else {
            return Taker::Nobody;
        };
        let uses = (id >> 32) as u32;
        let mut state = slot.state.lock();
        if let Some((_, function)) = state.late.take_if(|(late, _)| *late == uses) {
            return Taker::Late(function);
        }
        if state.phase != Phase::Waiting || state.uses != uses {
            return Taker::Nobody;
        }
        let len = payload.len().min(RESPONSE_MAX);
        state.response[..len].copy_from_slice(&payload[..len]);
        state.len = len;
        state.phase = Phase::Done;
        // Under the lock, so that it cannot signal a later request with the same slot.
        slot.done.complete();
        Taker::Waiting
    }
}

/// A request that is under way. Dropping it forgets the request, and its answer if one comes.
pub(crate) struct Request<'a> {
    slot: &'a Slot,
    id: u64,
}

impl Request<'_> {
    /// The transaction id to send it with.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// The event of the answer's arrival.
    pub(crate) fn done(&self) -> &Completion {
        &self.slot.done
    }

    /// Gives up waiting for an interrupt of a function, which may still come. Tells whether there was
    /// no answer yet.
    pub(crate) fn give_up(&self, function: SlotNumber) -> bool {
        let mut state = self.slot.state.lock();
        let waiting = state.phase == Phase::Waiting;
        if waiting {
            state.late = Some((state.uses, function));
        }
        waiting
    }

    /// The answer, if there is one.
    pub(crate) fn response(&self) -> Option<Response> {
        let state = self.slot.state.lock();
        (state.phase == Phase::Done).then_some(Response {
            bytes: state.response,
            len: state.len,
        })
    }
}

impl Drop for Request<'_> {
    fn drop(&mut self) {
        self.slot.state.lock().phase = Phase::Free;
    }
}

/// The host's answer to a request, without the packet's header.
pub(crate) struct Response {
    bytes: [u8; RESPONSE_MAX],
    len: usize,
}

impl Response {
    /// The answer as the host sent it, to be parsed.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}
