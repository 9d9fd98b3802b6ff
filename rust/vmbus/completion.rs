// SPDX-License-Identifier: GPL-2.0

//! Completions that can be waited for with a deadline, which `kernel::sync::Completion` lacks.
//!
//! C header: [`include/linux/completion.h`](srctree/include/linux/completion.h)

use hyperv_bindings as bindings;
use kernel::{
    prelude::*,
    time::Delta,
    types::Opaque, //
};

/// An event that one side waits for, at most for a given time, and the other signals.
///
/// # Invariants
///
/// The inner `struct completion` is initialised.
#[pin_data]
pub struct Completion {
    #[pin]
    inner: Opaque<bindings::completion>,
}

// SAFETY: A `struct completion` may be used from any thread.
unsafe impl Send for Completion {}

// SAFETY: A `struct completion` has a lock of its own.
unsafe impl Sync for Completion {}

impl Completion {
    /// Creates an initialiser of an event that has not happened yet.
    pub fn new() -> impl PinInit<Self> {
        // INVARIANT: `init_completion` initialises the structure.
        pin_init!(Self {
            inner <- Opaque::ffi_init(|slot: *mut bindings::completion| {
                // SAFETY: `slot` is valid for writes.
                unsafe { bindings::init_completion(slot) };
            }),
        })
    }

    /// Signals the event. May be called in any context.
    pub fn complete(&self) {
        // SAFETY: By the type invariants the completion is initialised.
        unsafe { bindings::complete(self.inner.get()) };
    }

    /// Forgets that the event has happened, to wait for it again.
    pub fn reinit(&self) {
        // SAFETY: By the type invariants the completion is initialised; C allows this concurrently
        // with `complete`, which is then either forgotten or not.
        unsafe { bindings::reinit_completion(self.inner.get()) };
    }

    /// Waits at most `timeout`, at least a tick, and tells whether the event happened. Sleeps.
    pub fn wait_timeout(&self, timeout: Delta) -> bool {
        let millis = u32::try_from(timeout.as_millis()).unwrap_or(if timeout.is_negative() {
            0
        } else {
            u32::MAX
        });
        let jiffies = kernel::time::msecs_to_jiffies(millis).max(1);
        // SAFETY: By the type invariants the completion is initialised.
        unsafe { bindings::wait_for_completion_timeout(self.inner.get(), jiffies) != 0 }
    }

    /// Tells whether the event happened, without waiting.
    pub fn try_wait(&self) -> bool {
        // SAFETY: By the type invariants the completion is initialised.
        unsafe { bindings::try_wait_for_completion(self.inner.get()) }
    }
}
