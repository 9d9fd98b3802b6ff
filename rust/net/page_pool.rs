// SPDX-License-Identifier: GPL-2.0

//! Page pools: memory for received frames that is used again and again.
//!
//! C header: [`include/net/page_pool/types.h`](srctree/include/net/page_pool/types.h)

use core::{
    marker::PhantomData,
    mem::ManuallyDrop,
    ptr::NonNull, //
};

use hyperv_bindings as bindings;
use kernel::{
    error::from_err_ptr,
    prelude::*, //
};

use crate::NetDevice;

/// Pages that a pool keeps at most, beside those that its NAPI instance has at hand.
const SIZE: u32 = 512;

/// A pool of pages for one NAPI instance.
///
/// Pages that are still in use when it is dropped keep what they need of it.
///
/// # Invariants
///
/// `pool` is a valid pool, to which this holds the user's reference.
pub(crate) struct PagePool {
    pool: NonNull<bindings::page_pool>,
}

// SAFETY: A pool can be destroyed by any thread.
unsafe impl Send for PagePool {}

// SAFETY: The only method that changes it asks for the right context.
unsafe impl Sync for PagePool {}

impl PagePool {
    /// Makes a pool for the receive queue `queue` of `dev`. Sleeps.
    ///
    /// # Safety
    ///
    /// `napi` must stay valid as long as the pool exists, and be disabled when that is dropped.
    pub(crate) unsafe fn new(
        dev: &NetDevice,
        queue: u16,
        napi: *mut bindings::napi_struct,
    ) -> Result<Self> {
        // SAFETY: All-zeroes is a valid value of this C structure.
        let mut params: bindings::page_pool_params = unsafe { core::mem::zeroed() };
        // SAFETY: Both members of each union are the same structure.
        let (fast, slow) = unsafe {
            (
                params.__bindgen_anon_1.fast.as_mut(),
                &mut params.__bindgen_anon_2.slow,
            )
        };
        fast.pool_size = SIZE;
        fast.nid = bindings::NUMA_NO_NODE;
        fast.napi = napi;
        slow.netdev = dev.as_raw();
        slow.queue_idx = queue.into();
        // SAFETY: The parameters are valid. The device leaves the pool to another one when it is
        // unregistered, if pages are still in use then.
        let pool = from_err_ptr(unsafe { bindings::page_pool_create(&params) })?;
        // INVARIANT: The pool is new and ours.
        Ok(Self {
            pool: NonNull::new(pool).ok_or(ENOMEM)?,
        })
    }

    pub(crate) fn as_raw(&self) -> *mut bindings::page_pool {
        self.pool.as_ptr()
    }

    /// Takes a page.
    ///
    /// # Safety
    ///
    /// The caller must run in the poll of the pool's NAPI instance, in a softirq, as long as the
    /// page exists.
    pub(crate) unsafe fn page(&self) -> Option<Page<'_>> {
        // SAFETY: The pool is valid, and nobody else allocates by the safety requirements.
        let address = unsafe { bindings::page_pool_alloc_address(self.as_raw()) };
        // INVARIANT: The page is new.
        NonNull::new(address.cast()).map(|address| Page {
            pool: self,
            address,
            _not_send: PhantomData,
        })
    }
}

impl Drop for PagePool {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the reference is ours.
        unsafe { bindings::page_pool_destroy(self.as_raw()) };
    }
}

/// A page of a pool, to which it returns when this is dropped.
///
/// # Invariants
///
/// `address` is that of a page of `pool`, which belongs to this alone. We are in the poll of the
/// pool's NAPI instance.
pub(crate) struct Page<'a> {
    pool: &'a PagePool,
    address: NonNull<u8>,
    _not_send: PhantomData<*mut ()>,
}

impl Page<'_> {
    /// Bytes of a page.
    pub(crate) const SIZE: u32 = kernel::page::PAGE_SIZE as u32;

    /// Where the page begins.
    pub(crate) fn address(&self) -> NonNull<u8> {
        self.address
    }

    /// Gives the page away, to C. Whoever has it gives it back to the pool.
    pub(crate) fn forget(self) {
        let _ = ManuallyDrop::new(self);
    }
}

impl Drop for Page<'_> {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the page is ours, and this is the context for which the
        // pool keeps pages without a lock.
        unsafe {
            bindings::page_pool_recycle_address(self.pool.as_raw(), self.address.as_ptr().cast());
        }
    }
}
