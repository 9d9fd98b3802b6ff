// SPDX-License-Identifier: GPL-2.0

//! Requests that a bus can be told to treat badly.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use hyperv_wire::vpci::MessageType;

/// What goes wrong with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultAction {
    /// It is neither carried out nor answered.
    Mute,
    /// It is refused.
    Refuse,
    /// It is carried out; all that is answered is its status, or nothing if there is no more than that.
    Short,
    /// It is carried out, and the answer has more bytes than belong to it.
    Long,
    /// It is carried out, and answered so late.
    Late(Duration),
    /// It is carried out and answered twice.
    Twice,
    /// It is carried out, and before it something is answered that was not asked.
    Stray,
}

struct Fault {
    request: MessageType,
    action: FaultAction,
    times: u32,
}

/// The faults that were ordered; they outlive a bus.
#[derive(Default)]
pub struct Faults(Mutex<Vec<Fault>>);

impl Faults {
    /// Lets the next requests of a kind go wrong, instead of what was ordered for them before.
    pub fn inject(&self, request: MessageType, action: FaultAction, times: u32) {
        let mut faults = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        faults.retain(|fault| fault.request != request);
        if times > 0 {
            faults.push(Fault {
                request,
                action,
                times,
            });
        }
    }

    /// What shall go wrong with this request.
    pub(crate) fn take(&self, request: MessageType) -> Option<FaultAction> {
        let mut faults = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fault = faults.iter_mut().find(|fault| fault.request == request)?;
        fault.times -= 1;
        let action = fault.action;
        faults.retain(|fault| fault.times > 0);
        Some(action)
    }
}
