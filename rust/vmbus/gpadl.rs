// SPDX-License-Identifier: GPL-2.0

//! GPADLs: guest memory that the host may read and write by a handle.

use core::{
    marker::PhantomData,
    ptr::NonNull, //
};

use hyperv_bindings as bindings;
use kernel::{
    device,
    error::to_result,
    prelude::*,
    sync::aref::ARef,
    transmute::FromBytes, //
};

use crate::Device;

/// A buffer shared with the host.
///
/// The buffer is zeroed, owned by this object and virtually contiguous. Dropping the object takes
/// it back from the host; this sleeps until the host agrees (or rescinds the device). If the host
/// does not give the buffer back, its memory is leaked.
///
/// On VMBus before 4.0 ([`protocol_version`](crate::protocol_version)) drop it before the channel
/// is closed, on later versions after that.
///
/// # Invariants
///
/// `gpadl.buffer` is an allocation of `vzalloc()` with `gpadl.size` bytes, known to the host by
/// `gpadl.gpadl_handle`.
pub struct Gpadl {
    device: ARef<Device>,
    gpadl: bindings::vmbus_gpadl,
}

// SAFETY: The buffer may be used and freed from any thread.
unsafe impl Send for Gpadl {}

// SAFETY: The buffer is only accessed in the way of `SharedBytes`.
unsafe impl Sync for Gpadl {}

impl Gpadl {
    /// Allocates `size` bytes, rounded up to whole pages, and shares them with the host. Sleeps
    /// until the host has answered.
    pub fn new(dev: &Device<device::Bound>, size: usize) -> Result<Self> {
        if size == 0 {
            return Err(EINVAL);
        }
        let size = kernel::page::page_align(size).ok_or(EOVERFLOW)?;
        let len = u32::try_from(size)?;
        // SAFETY: No requirements.
        let buffer = NonNull::new(unsafe { bindings::vzalloc_noprof(size) }).ok_or(ENOMEM)?;

        // SAFETY: All-zeroes is a valid value of this C structure.
        let mut gpadl: bindings::vmbus_gpadl = unsafe { core::mem::zeroed() };
        // SAFETY: The device's primary channel and the buffer are valid.
        let established = to_result(unsafe {
            bindings::vmbus_establish_gpadl(dev.offer().as_raw(), buffer.as_ptr(), len, &mut gpadl)
        });
        if let Err(e) = established {
            // In a confidential VM memory that could not be made private again must be leaked.
            if !gpadl.decrypted {
                // SAFETY: The buffer is ours again.
                unsafe { bindings::vfree(buffer.as_ptr()) };
            }
            return Err(e);
        }
        // INVARIANT: The GPADL is established.
        Ok(Self {
            device: (&**dev).into(),
            gpadl,
        })
    }

    /// The number by which the host knows the buffer.
    pub fn handle(&self) -> u32 {
        self.gpadl.gpadl_handle
    }

    /// Number of bytes.
    pub fn size(&self) -> usize {
        self.gpadl.size as usize
    }

    /// A part of the buffer, or `ERANGE` if it is not inside.
    #[inline]
    pub fn bytes(&self, offset: usize, len: usize) -> Result<SharedBytes<'_>> {
        let end = offset.checked_add(len).ok_or(ERANGE)?;
        if end > self.size() {
            return Err(ERANGE);
        }
        // SAFETY: `offset` is inside the buffer.
        let start = unsafe { self.gpadl.buffer.cast::<u8>().add(offset) };
        // INVARIANT: `len` bytes from `start` are inside the buffer, which lives as long as `self`.
        Ok(SharedBytes {
            start,
            len,
            _buffer: PhantomData,
        })
    }

    /// Number of a page of the buffer, both in Hyper-V's pages. `ERANGE` if `page` is not inside.
    pub fn pfn(&self, page: usize) -> Result<u64> {
        let at = page.checked_mul(crate::HV_PAGE_SIZE).ok_or(ERANGE)?;
        let bytes = self.bytes(at, 1)?;
        // SAFETY: The address is inside an allocation of `vzalloc()`.
        Ok(unsafe { bindings::virt_to_hvpfn(bytes.start.cast()) } as u64)
    }
}

impl Drop for Gpadl {
    fn drop(&mut self) {
        // SAFETY: The device's primary channel is valid, and by the type invariants the GPADL is
        // established.
        let result = unsafe {
            bindings::vmbus_teardown_gpadl(self.device.offer().as_raw(), &mut self.gpadl)
        };
        if result != 0 || self.gpadl.decrypted {
            dev_warn!(
                self.device.as_ref(),
                "leaking a shared buffer, which the host did not give back\n"
            );
            return;
        }
        // SAFETY: By the type invariants it came from `vzalloc()`, and the host does not use it
        // any more.
        unsafe { bindings::vfree(self.gpadl.buffer) };
    }
}

/// Bytes that the host may change at any time.
///
/// They are never lent out as a slice, only copied; what matters is to look only at the copy.
///
/// # Invariants
///
/// `len` bytes from `start` are valid for `'a`.
#[derive(Clone, Copy)]
pub struct SharedBytes<'a> {
    start: *mut u8,
    len: usize,
    _buffer: PhantomData<&'a Gpadl>,
}

impl SharedBytes<'_> {
    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address of the first byte, for C functions that copy from or to here.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start
    }

    /// `len` of the bytes from `start` on, or `ERANGE` if there are not so many.
    #[inline]
    pub fn part(&self, start: usize, len: usize) -> Result<Self> {
        if start.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(ERANGE);
        }
        Ok(Self {
            // SAFETY: `start` is within the bytes, or one behind.
            start: unsafe { self.start.add(start) },
            len,
            _buffer: PhantomData,
        })
    }

    /// Copies all bytes to `to`, or `EINVAL` if that does not have the same length.
    #[inline]
    pub fn copy_to(&self, to: &mut [u8]) -> Result {
        if to.len() != self.len {
            return Err(EINVAL);
        }
        // SAFETY: By the type invariants the source is valid; the lengths are equal and the
        // destination is exclusively ours. Concurrent changes by the host are like those of a
        // device: they give arbitrary bytes, and any byte is a valid `u8`.
        unsafe {
            core::ptr::copy_nonoverlapping(self.start.cast_const(), to.as_mut_ptr(), self.len)
        };
        Ok(())
    }

    /// Copies `from` to the first bytes, or `EINVAL` if there are not so many.
    #[inline]
    pub fn copy_from(&self, from: &[u8]) -> Result {
        if from.len() > self.len {
            return Err(EINVAL);
        }
        // SAFETY: By the type invariants the destination is valid, and nobody has a reference to
        // it: the buffer is only accessed by copying.
        unsafe { core::ptr::copy_nonoverlapping(from.as_ptr(), self.start, from.len()) };
        Ok(())
    }

    /// Reads a value at `offset` in bytes, or `ERANGE` if it is not inside.
    pub fn read<T: FromBytes>(&self, offset: usize) -> Result<T> {
        let end = offset
            .checked_add(core::mem::size_of::<T>())
            .ok_or(ERANGE)?;
        if end > self.len {
            return Err(ERANGE);
        }
        // SAFETY: The bytes are valid by the type invariants, and any bytes make a `T`.
        Ok(unsafe { self.start.add(offset).cast::<T>().read_unaligned() })
    }
}
