// SPDX-License-Identifier: GPL-2.0

//! A work queue of one's own, whose items run one after the other.
//!
//! C header: [`include/linux/workqueue.h`](srctree/include/linux/workqueue.h)

use core::{
    ops::Deref,
    ptr::NonNull, //
};

use hyperv_bindings as bindings;
use kernel::{
    prelude::*,
    workqueue::Queue, //
};

/// An ordered work queue. Dropping it runs what is queued and waits for it.
///
/// # Invariants
///
/// `queue` is a work queue that this object owns.
pub struct OrderedQueue {
    queue: NonNull<bindings::workqueue_struct>,
}

// SAFETY: Work queues may be used and destroyed from any thread.
unsafe impl Send for OrderedQueue {}

// SAFETY: See above.
unsafe impl Sync for OrderedQueue {}

impl OrderedQueue {
    /// Creates a queue that is named `name` with `number` in hexadecimal behind it.
    pub fn new(name: &'static CStr, number: u32) -> Result<Self> {
        let flags = bindings::wq_flags_WQ_UNBOUND | bindings::wq_flags___WQ_ORDERED;
        // SAFETY: The format takes a string and an unsigned integer.
        let queue = unsafe {
            bindings::alloc_workqueue_noprof(
                c"%s%x".as_char_ptr(),
                flags,
                1,
                name.as_char_ptr(),
                number,
            )
        };
        // INVARIANT: The queue was just created.
        Ok(Self {
            queue: NonNull::new(queue).ok_or(ENOMEM)?,
        })
    }
}

impl Deref for OrderedQueue {
    type Target = Queue;

    fn deref(&self) -> &Queue {
        // SAFETY: By the type invariants the queue is valid, for the life of `self`.
        unsafe { Queue::from_raw(self.queue.as_ptr()) }
    }
}

impl Drop for OrderedQueue {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the queue is ours. Nobody else can queue anything, since
        // a reference to the queue lives no longer than this object.
        unsafe { bindings::destroy_workqueue(self.queue.as_ptr()) };
    }
}
