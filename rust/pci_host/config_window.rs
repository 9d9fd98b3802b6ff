// SPDX-License-Identifier: GPL-2.0

//! MMIO space that the driver itself accesses.

use hyperv_bindings as bindings;
use kernel::prelude::*;
use vmbus::MmioRange;

/// How [`kernel::io::Io`] gets at a mapping.
#[cfg(kernel_7_3)]
mod io {
    use super::MappedRange;
    use kernel::{
        io::{
            IoBase,
            Mmio,
            MmioBackend,
            MmioRaw,
            Region, //
        },
        prelude::*, //
    };

    pub(super) type Raw = MmioRaw<Region>;

    pub(super) fn raw(addr: *mut c_void, len: usize) -> Result<Raw> {
        Raw::new_region(addr as usize, len)
    }

    impl<'a> IoBase<'a> for &'a MappedRange {
        type Backend = MmioBackend;
        type Target = Region;

        fn as_view(self) -> Mmio<'a, Region> {
            // SAFETY: By the type invariants the mapping is valid as long as `self`.
            unsafe { Mmio::from_raw(self.io) }
        }
    }
}

/// The same before 7.3.
#[cfg(not(kernel_7_3))]
mod io {
    use super::MappedRange;
    use core::ops::Deref;
    use kernel::{
        io::{
            Mmio,
            MmioRaw, //
        },
        prelude::*, //
    };

    pub(super) type Raw = MmioRaw;

    pub(super) fn raw(addr: *mut c_void, len: usize) -> Result<Raw> {
        Raw::new(addr as usize, len)
    }

    impl Deref for MappedRange {
        type Target = Mmio;

        fn deref(&self) -> &Mmio {
            // SAFETY: By the type invariants the mapping is valid as long as `self`.
            unsafe { Mmio::from_raw(&self.io) }
        }
    }
}

/// A range of MMIO space, mapped for access.
///
/// # Invariants
///
/// `io` is the mapping of the whole of `range`.
pub struct MappedRange {
    io: io::Raw,
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
        // SAFETY: It was just mapped, and nobody uses it.
        let io = io::raw(addr, len).inspect_err(|_| unsafe { bindings::iounmap(addr) })?;
        // INVARIANT: The whole range was mapped.
        Ok(Self { io, range })
    }

    /// First guest-physical address.
    pub fn start(&self) -> u64 {
        self.range.start()
    }
}

impl Drop for MappedRange {
    fn drop(&mut self) {
        // SAFETY: By the type invariants this is a mapping of ours; nobody can use it any more.
        unsafe { bindings::iounmap(self.io.addr() as *mut c_void) };
    }
}
