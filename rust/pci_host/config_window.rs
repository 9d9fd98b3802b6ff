// SPDX-License-Identifier: GPL-2.0

//! MMIO space that the driver itself accesses.

use core::ops::Deref;

use hyperv_bindings as bindings;
use kernel::{
    io::{
        Mmio,
        MmioRaw, //
    },
    prelude::*, //
};
use vmbus::MmioRange;

/// A range of MMIO space, mapped for access.
///
/// # Invariants
///
/// `io` is the mapping of the whole of `range`.
pub struct MappedRange {
    io: MmioRaw,
    range: MmioRange,
}

impl MappedRange {
    /// Maps `range` and marks it as exclusively used.
    pub fn new(range: MmioRange) -> Result<Self> {
        let len = usize::try_from(range.len())?;
        // SAFETY: The resource is valid and ours.
        unsafe { (*range.as_raw()).flags |= bindings::IORESOURCE_BUSY as kernel::ffi::c_ulong };
        // SAFETY: The range is reserved for us, so nothing else is there.
        let addr = unsafe { bindings::ioremap(range.start(), len) };
        if addr.is_null() {
            return Err(ENOMEM);
        }
        // INVARIANT: The whole range was mapped.
        Ok(Self {
            io: MmioRaw::new(addr as usize, len)?,
            range,
        })
    }

    /// First guest-physical address.
    pub fn start(&self) -> u64 {
        self.range.start()
    }
}

impl Deref for MappedRange {
    type Target = Mmio;

    fn deref(&self) -> &Mmio {
        // SAFETY: By the type invariants the mapping is valid as long as `self`.
        unsafe { Mmio::from_raw(&self.io) }
    }
}

impl Drop for MappedRange {
    fn drop(&mut self) {
        // SAFETY: By the type invariants this is a mapping of ours; nobody can use it any more.
        unsafe { bindings::iounmap(self.io.addr() as *mut c_void) };
    }
}
