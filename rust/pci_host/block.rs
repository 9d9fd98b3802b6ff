// SPDX-License-Identifier: GPL-2.0

//! Configuration blocks: how the driver of a function and the one of the physical function in the
//! host exchange data.
//!
//! Drivers of functions find them through the kernel's pci-hyperv-intf, which has one table of
//! operations for all buses.
//!
//! C source: `drivers/pci/controller/pci-hyperv-intf.c`

use core::{
    marker::PhantomData,
    ptr::addr_of_mut, //
};

use hyperv_bindings as bindings;
use kernel::prelude::*;

use crate::{
    bridge::HostBridge,
    ConfigOps, //
};

/// What a function's driver wants to have called when blocks have changed.
pub struct Invalidate {
    function: unsafe extern "C" fn(*mut c_void, u64),
    context: *mut c_void,
}

// SAFETY: The function may be called on any CPU, with its context.
unsafe impl Send for Invalidate {}

impl Invalidate {
    /// Tells the function's driver which of the first 64 blocks have changed.
    ///
    /// May be called in any context. The driver must not have replaced or withdrawn this, see
    /// [`BlockOps::set_invalidate`].
    pub fn call(&self, block_mask: u64) {
        // SAFETY: The function's driver keeps both valid until it replaces or withdraws them, and
        // an implementation of `BlockOps` drops them then.
        unsafe { (self.function)(self.context, block_mask) };
    }
}

/// Configuration blocks of the functions on a bus. All methods may sleep.
pub trait BlockOps: ConfigOps {
    /// Reads a block of the function `devfn`. Gives how many bytes it has, at most as many as there
    /// is room for.
    fn read_block(&self, devfn: u8, block: u32, data: &mut [u8]) -> Result<usize>;

    /// Writes a block of the function `devfn`.
    fn write_block(&self, devfn: u8, block: u32, data: &[u8]) -> Result;

    /// Sets what is called when blocks of the function `devfn` have changed. On return nobody calls,
    /// or will call, what was set before.
    fn set_invalidate(&self, devfn: u8, invalidate: Option<Invalidate>) -> Result;
}

/// Makes `T` the one who exchanges configuration blocks for all drivers. Dropping this gives the
/// place back.
///
/// # Invariants
///
/// The kernel's table has the operations of this object, and was empty before.
pub struct BlockInterface<T: BlockOps>(PhantomData<T>);

impl<T: BlockOps> BlockInterface<T> {
    const OPS: bindings::hyperv_pci_block_ops = bindings::hyperv_pci_block_ops {
        read_block: Some(Self::read_callback),
        write_block: Some(Self::write_callback),
        reg_blk_invalidate: Some(Self::set_callback),
    };

    /// Takes the place, or fails with `EBUSY` if somebody has it.
    ///
    /// To be called when a module is loaded, before it has any bus.
    pub fn register() -> Result<Self> {
        // SAFETY: The table is there for modules to write it when they are loaded and unloaded,
        // without a lock.
        unsafe {
            let table = addr_of_mut!(bindings::hvpci_block_ops);
            if (*table).read_block.is_some()
                || (*table).write_block.is_some()
                || (*table).reg_blk_invalidate.is_some()
            {
                return Err(EBUSY);
            }
            table.write(Self::OPS);
        }
        // INVARIANT: The table was just written.
        Ok(Self(PhantomData))
    }

    /// The bus of a function and its place there, or `ENODEV` if it is on another kind of bus.
    ///
    /// # Safety
    ///
    /// `dev` must be a function that has a driver, and that driver the caller.
    unsafe fn find<'a>(dev: *mut bindings::pci_dev) -> Result<(&'a T, u8)> {
        // SAFETY: By the safety requirements the function is valid and its bus was not removed.
        unsafe {
            let ops = HostBridge::<T>::ops_if_own((*dev).bus).ok_or(ENODEV)?;
            Ok((ops, (*dev).devfn as u8))
        }
    }

    extern "C" fn read_callback(
        dev: *mut bindings::pci_dev,
        buf: *mut c_void,
        len: c_uint,
        block: c_uint,
        returned: *mut c_uint,
    ) -> c_int {
        let read = || {
            // SAFETY: The function's driver calls this.
            let (ops, devfn) = unsafe { Self::find(dev) }?;
            if buf.is_null() {
                return Err(EINVAL);
            }
            // SAFETY: The caller passes a buffer of this length.
            let data = unsafe { core::slice::from_raw_parts_mut(buf.cast(), len as usize) };
            let count = ops.read_block(devfn, block, data)?;
            // SAFETY: The caller passes a valid pointer.
            unsafe { *returned = count.min(data.len()) as c_uint };
            Ok(())
        };
        read().map_or_else(|e: Error| e.to_errno(), |()| 0)
    }

    extern "C" fn write_callback(
        dev: *mut bindings::pci_dev,
        buf: *mut c_void,
        len: c_uint,
        block: c_uint,
    ) -> c_int {
        let write = || {
            // SAFETY: The function's driver calls this.
            let (ops, devfn) = unsafe { Self::find(dev) }?;
            if buf.is_null() {
                return Err(EINVAL);
            }
            // SAFETY: The caller passes a buffer of this length.
            let data = unsafe { core::slice::from_raw_parts(buf.cast::<u8>(), len as usize) };
            ops.write_block(devfn, block, data)
        };
        write().map_or_else(|e: Error| e.to_errno(), |()| 0)
    }

    extern "C" fn set_callback(
        dev: *mut bindings::pci_dev,
        context: *mut c_void,
        function: Option<unsafe extern "C" fn(*mut c_void, u64)>,
    ) -> c_int {
        let set = || {
            // SAFETY: The function's driver calls this.
            let (ops, devfn) = unsafe { Self::find(dev) }?;
            let invalidate = function.map(|function| Invalidate { function, context });
            ops.set_invalidate(devfn, invalidate)
        };
        set().map_or_else(|e: Error| e.to_errno(), |()| 0)
    }
}

impl<T: BlockOps> Drop for BlockInterface<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the table is ours, and it was empty before.
        unsafe { addr_of_mut!(bindings::hvpci_block_ops).write(pin_init::zeroed()) };
    }
}
