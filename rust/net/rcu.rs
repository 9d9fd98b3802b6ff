// SPDX-License-Identifier: GPL-2.0

//! A counted pointer that is read under RCU and replaced at run time.

use core::{
    marker::PhantomData,
    mem::ManuallyDrop,
    ptr::{
        null_mut,
        NonNull, //
    },
};

use hyperv_bindings as bindings;
use kernel::sync::{
    aref::{
        ARef,
        AlwaysRefCounted, //
    },
    atomic::{
        Acquire,
        Atomic,
        Full, //
    },
    rcu,
    Arc,
    ArcBorrow, //
};

/// A guard for a caller that delays grace periods by other means than a lock of its own.
///
/// # Safety
///
/// The caller must be in what RCU takes for a read-side critical section as long as the result is
/// in use.
#[inline]
pub(crate) unsafe fn assume_read_locked() -> ManuallyDrop<rcu::Guard> {
    // SAFETY: A guard has no content. By the safety requirements what it stands for is true, and it
    // is never dropped, so that nothing is unlocked that was not locked.
    ManuallyDrop::new(unsafe { core::mem::transmute::<(), rcu::Guard>(()) })
}

/// Smart pointers that an [`RcuSlot`] can hold.
///
/// # Safety
///
/// `from_raw` takes back what `into_raw` gave, once. Until then the pointer is valid for shared
/// access and `count` makes another smart pointer to the same object.
pub unsafe trait Counted: Sized + Send + Sync {
    /// What is pointed to.
    type Target;

    /// Gives the reference away.
    fn into_raw(this: Self) -> NonNull<Self::Target>;

    /// Takes a reference back.
    ///
    /// # Safety
    ///
    /// `ptr` must come from `into_raw`, whose reference is consumed.
    unsafe fn from_raw(ptr: NonNull<Self::Target>) -> Self;

    /// Makes another reference.
    ///
    /// # Safety
    ///
    /// `ptr` must come from `into_raw`, and its reference must not have been taken back.
    unsafe fn count(ptr: NonNull<Self::Target>) -> Self;
}

// SAFETY: The three functions are those of `Arc`.
unsafe impl<T: Send + Sync> Counted for Arc<T> {
    type Target = T;

    fn into_raw(this: Self) -> NonNull<T> {
        // SAFETY: An `Arc` never is null.
        unsafe { NonNull::new_unchecked(Arc::into_raw(this).cast_mut()) }
    }

    unsafe fn from_raw(ptr: NonNull<T>) -> Self {
        // SAFETY: By the safety requirements.
        unsafe { Arc::from_raw(ptr.as_ptr()) }
    }

    unsafe fn count(ptr: NonNull<T>) -> Self {
        // SAFETY: By the safety requirements there is a reference, which keeps the object alive.
        unsafe { ArcBorrow::from_raw(ptr.as_ptr()) }.into()
    }
}

// SAFETY: The three functions are those of `ARef`.
unsafe impl<T: AlwaysRefCounted + Send + Sync> Counted for ARef<T> {
    type Target = T;

    fn into_raw(this: Self) -> NonNull<T> {
        ARef::into_raw(this)
    }

    unsafe fn from_raw(ptr: NonNull<T>) -> Self {
        // SAFETY: By the safety requirements.
        unsafe { ARef::from_raw(ptr) }
    }

    unsafe fn count(ptr: NonNull<T>) -> Self {
        // SAFETY: By the safety requirements the object is alive.
        unsafe { ptr.as_ref() }.into()
    }
}

/// A place for a counted pointer, or none.
///
/// Readers borrow the object for the time of an RCU read-side critical section, or get a reference
/// of their own. Whoever takes the pointer out waits for those who borrow.
///
/// # Invariants
///
/// `ptr` is null or comes from `P::into_raw`, and its reference belongs to the slot. A reference
/// that was taken out is given back only after a grace period.
pub struct RcuSlot<P: Counted> {
    ptr: Atomic<*mut P::Target>,
    _owns: PhantomData<P>,
}

// SAFETY: A slot is a `P` that can be shared and taken from any thread, which `P` allows.
unsafe impl<P: Counted> Send for RcuSlot<P> {}

// SAFETY: See above.
unsafe impl<P: Counted> Sync for RcuSlot<P> {}

impl<P: Counted> RcuSlot<P> {
    /// An empty slot.
    pub const fn new() -> Self {
        Self {
            ptr: Atomic::new(null_mut()),
            _owns: PhantomData,
        }
    }

    /// Borrows the object as long as the read-side critical section lasts.
    #[inline]
    pub fn borrow<'a>(&'a self, _guard: &'a rcu::Guard) -> Option<&'a P::Target> {
        // SAFETY: By the type invariants the object lives until a grace period after it was taken
        // out of the slot, and `_guard` delays the end of that.
        NonNull::new(self.ptr.load(Acquire)).map(|ptr| unsafe { ptr.as_ref() })
    }

    /// A reference to the object.
    pub fn get(&self) -> Option<P> {
        let _guard = rcu::read_lock();
        // SAFETY: By the type invariants the slot's reference has not been given back, which waits
        // for `_guard`.
        NonNull::new(self.ptr.load(Acquire)).map(|ptr| unsafe { P::count(ptr) })
    }

    /// Whether there is no object.
    pub fn is_empty(&self) -> bool {
        self.ptr.load(Acquire).is_null()
    }

    /// Puts another object, or none, into the slot and returns the former one.
    ///
    /// If there was one this sleeps until nobody borrows it any more, so the caller must not borrow
    /// from the slot.
    pub fn replace(&self, new: Option<P>) -> Option<P> {
        let new = new.map_or(null_mut(), |p| P::into_raw(p).as_ptr());
        // INVARIANT: The new reference belongs to the slot.
        let old = NonNull::new(self.ptr.xchg(new, Full))?;
        // SAFETY: No requirements; we may sleep.
        unsafe { bindings::synchronize_net() };
        // SAFETY: The reference belonged to the slot, and only we have taken it out.
        Some(unsafe { P::from_raw(old) })
    }
}

impl<P: Counted> Default for RcuSlot<P> {
    fn default() -> Self {
        Self::new()
    }
}

impl<P: Counted> Drop for RcuSlot<P> {
    fn drop(&mut self) {
        // Nobody can borrow from a slot that is being dropped.
        if let Some(ptr) = NonNull::new(*self.ptr.get_mut()) {
            // SAFETY: By the type invariants the reference is ours.
            drop(unsafe { P::from_raw(ptr) });
        }
    }
}
