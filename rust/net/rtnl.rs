// SPDX-License-Identifier: GPL-2.0

//! The RTNL, the lock of network configuration.
//!
//! Functions that need it take a `&`[`Rtnl`] as evidence. Callbacks that the networking core calls
//! with the lock held get one; everybody else gets it from [`lock`] or [`try_lock`].
//!
//! C header: [`include/linux/rtnetlink.h`](srctree/include/linux/rtnetlink.h)

use core::ops::Deref;

use hyperv_bindings as bindings;
use kernel::types::NotThreadSafe;

/// Evidence that the RTNL is held by the current thread.
///
/// # Invariants
///
/// The RTNL is held as long as a value exists.
pub struct Rtnl(NotThreadSafe);

impl Rtnl {
    /// # Safety
    ///
    /// The RTNL must be held by this thread as long as the result exists.
    pub(crate) unsafe fn assume() -> Self {
        // INVARIANT: By the safety requirements.
        Self(NotThreadSafe)
    }
}

/// The RTNL, taken by this thread and released when the guard is dropped.
///
/// Releasing it also finishes the unregistration of devices, which sleeps.
pub struct Guard(Rtnl);

impl Deref for Guard {
    type Target = Rtnl;

    fn deref(&self) -> &Rtnl {
        &self.0
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // SAFETY: By the invariants of `Rtnl` the lock is held.
        unsafe { bindings::rtnl_unlock() };
    }
}

/// Takes the RTNL. Sleeps.
pub fn lock() -> Guard {
    // SAFETY: No requirements but that the caller can sleep.
    unsafe { bindings::rtnl_lock() };
    // INVARIANT: The lock was just taken.
    Guard(Rtnl(NotThreadSafe))
}

/// Takes the RTNL if it is free.
///
/// Work that is cancelled by somebody who holds the RTNL must not wait for it.
pub fn try_lock() -> Option<Guard> {
    // SAFETY: No requirements.
    if unsafe { bindings::rtnl_trylock() } == 0 {
        return None;
    }
    // INVARIANT: The lock was just taken.
    Some(Guard(Rtnl(NotThreadSafe)))
}
