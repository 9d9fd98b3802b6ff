// SPDX-License-Identifier: GPL-2.0

//! Memory-mapped I/O space that the VMBus hands out to its devices.
//!
//! C source: [`drivers/hv/vmbus_drv.c`](srctree/drivers/hv/vmbus_drv.c)

use core::ptr::NonNull;

use hyperv_bindings as bindings;
use kernel::{
    device,
    error::to_result,
    prelude::*, //
};

use crate::Device;

/// A range of guest-physical addresses where no memory is, reserved for one device.
///
/// Dropping it gives the range back.
///
/// # Invariants
///
/// `res` was allocated by `vmbus_allocate_mmio()` and not freed since.
pub struct MmioRange {
    res: NonNull<bindings::resource>,
}

// SAFETY: The resource may be freed from any thread.
unsafe impl Send for MmioRange {}

// SAFETY: Shared access only reads fields that do not change.
unsafe impl Sync for MmioRange {}

impl Device<device::Bound> {
    /// Reserves `size` bytes of MMIO space between the addresses `min` and `max`, both included, at
    /// a multiple of `align`. Sleeps.
    pub fn allocate_mmio(&self, min: u64, max: u64, size: u64, align: u64) -> Result<MmioRange> {
        let mut res = core::ptr::null_mut();
        // SAFETY: The device is valid, and the function only writes `res`.
        to_result(unsafe {
            bindings::vmbus_allocate_mmio(&mut res, self.as_raw(), min, max, size, align, false)
        })?;
        // INVARIANT: The allocation succeeded.
        Ok(MmioRange {
            res: NonNull::new(res).ok_or(ENOMEM)?,
        })
    }
}

impl MmioRange {
    /// First address.
    pub fn start(&self) -> u64 {
        // SAFETY: By the type invariants the resource is valid; its bounds do not change.
        unsafe { self.res.as_ref().start }
    }

    /// Number of bytes.
    pub fn len(&self) -> u64 {
        // SAFETY: By the type invariants the resource is valid; its bounds do not change.
        unsafe { self.res.as_ref().end - self.res.as_ref().start + 1 }
    }

    /// Never true, since empty ranges are not handed out.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The C resource, which is valid as long as the range is.
    pub fn as_raw(&self) -> *mut bindings::resource {
        self.res.as_ptr()
    }
}

impl Drop for MmioRange {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the range was allocated and not freed yet.
        unsafe { bindings::vmbus_free_mmio(self.start(), self.len()) };
    }
}
