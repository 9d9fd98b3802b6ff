// SPDX-License-Identifier: GPL-2.0

//! A spinlock that keeps interrupts away, which the `kernel` crate lacks, and a memory barrier,
//! which it has in another form since 7.3.
//!
//! The spinlock is needed for whatever a channel callback or an interrupt chip shares with code
//! that can be interrupted.

use hyperv_bindings as bindings;
use kernel::sync::lock::{
    Backend,
    Guard,
    Lock, //
};

/// A full memory barrier between CPUs.
#[inline(always)]
pub fn smp_mb() {
    // SAFETY: No requirements.
    unsafe { bindings::smp_mb() };
}

/// A spinlock that is held with interrupts off (`spin_lock_irqsave`).
pub type SpinLockIrq<T> = Lock<T, SpinLockIrqBackend>;

/// A [`Guard`] of a [`SpinLockIrq`].
pub type SpinLockIrqGuard<'a, T> = Guard<'a, T, SpinLockIrqBackend>;

/// A [`Backend`] of a spinlock that is taken with interrupts off.
pub struct SpinLockIrqBackend;

// SAFETY: A `spinlock_t` ensures mutual exclusion; `relock` is the default, which locks the same
// way.
unsafe impl Backend for SpinLockIrqBackend {
    type State = bindings::spinlock_t;
    /// The interrupt flags to be restored.
    type GuardState = kernel::ffi::c_ulong;

    unsafe fn init(
        ptr: *mut Self::State,
        name: *const kernel::ffi::c_char,
        key: *mut bindings::lock_class_key,
    ) {
        // SAFETY: By the safety requirements `ptr` is valid for writes, `name` and `key` for reads.
        unsafe { bindings::__spin_lock_init(ptr, name, key) }
    }

    unsafe fn lock(ptr: *mut Self::State) -> Self::GuardState {
        // SAFETY: By the safety requirements the lock is initialised.
        unsafe { bindings::spin_lock_irqsave(ptr) }
    }

    unsafe fn unlock(ptr: *mut Self::State, guard_state: &Self::GuardState) {
        // SAFETY: By the safety requirements the caller owns the lock, and `guard_state` is what
        // locking it returned.
        unsafe { bindings::spin_unlock_irqrestore(ptr, *guard_state) }
    }

    unsafe fn try_lock(ptr: *mut Self::State) -> Option<Self::GuardState> {
        let mut flags = 0;
        // SAFETY: By the safety requirements the lock is initialised.
        unsafe { bindings::spin_trylock_irqsave(ptr, &mut flags) }.then_some(flags)
    }

    unsafe fn assert_is_held(ptr: *mut Self::State) {
        // SAFETY: By the safety requirements the lock is initialised.
        unsafe { bindings::spin_assert_is_held(ptr) }
    }
}

/// Creates a [`SpinLockIrq`] initialiser with the given name and a newly-created lock class.
#[macro_export]
macro_rules! new_spinlock_irq {
    ($inner:expr $(, $name:literal)? $(,)?) => {
        $crate::sync::SpinLockIrq::new(
            $inner,
            ::kernel::optional_name!($($name)?),
            ::kernel::static_lock_class!(),
        )
    };
}
