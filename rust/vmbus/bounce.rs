// SPDX-License-Identifier: GPL-2.0

//! Guest memory of a packet for a host that may access only what is shared with it.
//!
//! C header: [`include/linux/dma-mapping.h`](srctree/include/linux/dma-mapping.h)

use core::ptr::null_mut;

use hyperv_bindings as bindings;
use kernel::{
    device::Bound,
    dma::DataDirection,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{
            Atomic,
            Full, //
        }, //
    }, //
};

use crate::{
    gpa::GpaRanges,
    Device,
    HV_PAGE_SIZE, //
};

/// Has what an isolated virtual machine sends keep its offset in the page when it is copied to
/// shared memory.
pub(crate) fn prepare(dev: &Device<Bound>) {
    // SAFETY: The device is valid. The bus gives it DMA parameters before it is probed.
    unsafe {
        bindings::dma_set_min_align_mask(
            &raw mut (*dev.as_raw()).device,
            HV_PAGE_SIZE as c_uint - 1,
        )
    };
}

struct Mapping {
    address: bindings::dma_addr_t,
    len: usize,
}

/// Shared copies of the memory that a packet refers to, see [`GpaRanges::bounce`].
///
/// Dropping it frees the copies. To be kept until the host has completed the packet. May be dropped
/// in any context.
pub struct Bounce(KBox<Inner>);

/// # Invariants
///
/// All `mappings` are mapped for `dev`.
struct Inner {
    dev: ARef<Device>,
    mappings: KVec<Mapping>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        for mapping in &self.mappings {
            // SAFETY: By the type invariants, with the arguments of the mapping.
            unsafe {
                bindings::dma_unmap_phys(
                    &raw mut (*self.dev.as_raw()).device,
                    mapping.address,
                    mapping.len,
                    DataDirection::ToDevice.into(),
                    0,
                )
            };
        }
    }
}

/// A place for the copies of a packet in flight.
///
/// # Invariants
///
/// The pointer is null, or comes from [`KBox::into_raw`] and is ours.
pub struct AtomicBounce(Atomic<*mut Inner>);

impl AtomicBounce {
    /// Nothing.
    pub const fn new() -> Self {
        // INVARIANT: The pointer is null.
        Self(Atomic::new(null_mut()))
    }

    /// Puts copies, or nothing, there and returns what was there.
    pub fn swap(&self, bounce: Option<Bounce>) -> Option<Bounce> {
        let new = bounce.map_or(null_mut(), |bounce| KBox::into_raw(bounce.0));
        // INVARIANT: The pointer is null or that of a box, which has no other owner now.
        let old = self.0.xchg(new, Full);
        // SAFETY: By the type invariants the pointer comes from `into_raw`, and nobody else has it
        // now.
        (!old.is_null()).then(|| Bounce(unsafe { KBox::from_raw(old) }))
    }
}

impl Default for AtomicBounce {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for AtomicBounce {
    fn drop(&mut self) {
        self.swap(None);
    }
}

impl GpaRanges {
    /// Replaces all ranges by copies of them that the host can see. Only for isolated virtual
    /// machines, see [`is_isolated`](crate::is_isolated).
    ///
    /// Does not sleep. Fails with `ENOMEM`, and with `EINVAL` if a range is no memory; then the
    /// ranges must not be sent.
    pub fn bounce(&mut self, dev: &ARef<Device>) -> Result<Bounce> {
        let mut inner = KBox::new(
            Inner {
                dev: dev.clone(),
                mappings: KVec::with_capacity(self.count(), GFP_ATOMIC)?,
            },
            GFP_ATOMIC,
        )?;
        self.replace_each(|phys, len| {
            // Who pushed the range has only said so.
            let end = phys.checked_add(len as u64).ok_or(EINVAL)?;
            for pfn in (phys / HV_PAGE_SIZE as u64)..end.div_ceil(HV_PAGE_SIZE as u64) {
                // SAFETY: No requirements.
                if !unsafe { bindings::pfn_valid(pfn as usize) } {
                    return Err(EINVAL);
                }
            }
            // SAFETY: The device is valid and has the operations of the bus. The range is memory,
            // and physically contiguous.
            let address = unsafe {
                bindings::dma_map_phys(
                    &raw mut (*dev.as_raw()).device,
                    phys,
                    len,
                    DataDirection::ToDevice.into(),
                    0,
                )
            };
            if address == DMA_MAPPING_ERROR {
                return Err(ENOMEM);
            }
            // INVARIANT: It has just been mapped. The capacity is that of all ranges.
            let _ = inner
                .mappings
                .push_within_capacity(Mapping { address, len });
            Ok(address)
        })?;
        Ok(Bounce(inner))
    }
}

/// What a mapping that failed has as address, `DMA_MAPPING_ERROR`.
const DMA_MAPPING_ERROR: bindings::dma_addr_t = !0;
