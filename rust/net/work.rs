// SPDX-License-Identifier: GPL-2.0

//! Work that is done later, in process context, for a network device.
//!
//! C header: [`include/linux/workqueue.h`](srctree/include/linux/workqueue.h)

use core::marker::PhantomPinned;

use hyperv_bindings as bindings;
use kernel::{
    prelude::*,
    time::Delta,
    types::Opaque, //
};

use crate::{
    device::Device,
    Driver, //
};

/// What a [`DelayedWork`] with the number `ID` in the private data `Self` does.
pub trait WorkItem<const ID: u64>: Driver {
    /// Does the work. May sleep.
    ///
    /// Whoever cancels the work waits for this: it must not wait for a lock of theirs.
    fn run(dev: &Device<Self>);
}

/// Private data of a device with a [`DelayedWork`].
///
/// Implement it with [`impl_has_delayed_work!`](crate::impl_has_delayed_work).
///
/// # Safety
///
/// `OFFSET` must be the offset of a field of the type `DelayedWork<Self, ID>`.
pub unsafe trait HasDelayedWork<const ID: u64>: WorkItem<ID> {
    /// Where the work is.
    const OFFSET: usize;
}

/// Declares the [`DelayedWork`]s of a device's private data.
#[macro_export]
macro_rules! impl_has_delayed_work {
    ($($ty:ident . $field:ident : $id:expr),* $(,)?) => {$(
        // SAFETY: The offset is that of the field; its type is checked.
        unsafe impl $crate::HasDelayedWork<{ $id }> for $ty {
            const OFFSET: usize = {
                const fn check(data: &$ty) -> &$crate::DelayedWork<$ty, { $id }> {
                    &data.$field
                }
                let _ = check;
                ::core::mem::offset_of!($ty, $field)
            };
        }
    )*};
}

/// Work that is scheduled with a delay, a field of the private data `T` of a device.
///
/// Dropping it cancels the work and waits for its end.
///
/// # Invariants
///
/// The inner `struct delayed_work` is initialised, with `Self::callback`.
#[pin_data(PinnedDrop)]
pub struct DelayedWork<T, const ID: u64> {
    #[pin]
    work: Opaque<bindings::delayed_work>,
    #[pin]
    _pin: PhantomPinned,
    _data: core::marker::PhantomData<fn(&T)>,
}

// SAFETY: Work can be scheduled and cancelled from any thread.
unsafe impl<T, const ID: u64> Send for DelayedWork<T, ID> {}

// SAFETY: The workqueue does its own locking.
unsafe impl<T, const ID: u64> Sync for DelayedWork<T, ID> {}

impl<T: HasDelayedWork<ID>, const ID: u64> DelayedWork<T, ID> {
    /// Creates an initialiser of work that is not scheduled.
    pub fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            // INVARIANT: The structure gets initialised.
            work <- Opaque::ffi_init(|slot| {
                // SAFETY: `slot` is valid for writes.
                unsafe { bindings::init_delayed_work(slot, Some(Self::callback)) };
            }),
            _pin: PhantomPinned,
            _data: core::marker::PhantomData,
        })
    }

    extern "C" fn callback(work: *mut bindings::work_struct) {
        // SAFETY: Only `Device::schedule` schedules work: that of the field at `OFFSET` in the
        // private data of a device. The device is alive, since dropping the data waits for us.
        let dev = unsafe {
            let data = work
                .byte_sub(core::mem::offset_of!(bindings::delayed_work, work))
                .byte_sub(core::mem::offset_of!(Self, work))
                .byte_sub(T::OFFSET)
                .cast::<T>();
            Device::<T>::from_data(data)
        };
        <T as WorkItem<ID>>::run(dev);
    }
}

impl<T: Driver> Device<T> {
    /// The work `ID` of the device.
    fn work<const ID: u64>(&self) -> *mut bindings::delayed_work
    where
        T: HasDelayedWork<ID>,
    {
        let data: *const T = &raw const *self.data();
        // SAFETY: By the safety requirements of `HasDelayedWork` there is such a field.
        let work = unsafe { data.byte_add(T::OFFSET).cast::<DelayedWork<T, ID>>() };
        // SAFETY: See above; the field lives as long as the data.
        unsafe { (*work).work.get() }
    }

    /// Schedules work `ID`, unless it is scheduled already. May be called in any context.
    pub fn schedule<const ID: u64>(&self, delay: Delta)
    where
        T: HasDelayedWork<ID>,
    {
        let millis = u32::try_from(delay.as_millis()).unwrap_or(u32::MAX);
        let jiffies = kernel::time::msecs_to_jiffies(millis);
        // SAFETY: The work is initialised by the type invariants of `DelayedWork`.
        unsafe { bindings::schedule_delayed_work(self.work::<ID>(), jiffies) };
    }

    /// Cancels work `ID`, and waits until it is not running. Tells whether it was scheduled.
    ///
    /// Not to be called from the work itself, which would wait for itself.
    pub fn cancel<const ID: u64>(&self) -> bool
    where
        T: HasDelayedWork<ID>,
    {
        // SAFETY: The work is initialised by the type invariants of `DelayedWork`.
        unsafe { bindings::cancel_delayed_work_sync(self.work::<ID>()) }
    }
}

#[pinned_drop]
impl<T, const ID: u64> PinnedDrop for DelayedWork<T, ID> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariants the work is initialised; we may sleep.
        unsafe { bindings::cancel_delayed_work_sync(self.work.get()) };
    }
}
