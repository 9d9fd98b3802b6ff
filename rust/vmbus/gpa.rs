// SPDX-License-Identifier: GPL-2.0

//! Guest memory that a packet refers to.

use core::mem::{
    offset_of,
    MaybeUninit, //
};

use hyperv_bindings as bindings;
use kernel::prelude::*;

use crate::{
    ring::{
        packet_len,
        sent, //
    },
    Ring,
    HV_PAGE_SIZE,
    PAGE_BUFFERS_MAX, //
};

/// The fixed part of a GPA-direct packet, as C has it, without the ranges.
#[repr(C, packed)]
struct GpaDirectHeader {
    // Filled in by the bus driver.
    descriptor: [u8; 16],
    reserved: u32,
    range_count: u32,
}

/// Up to [`PAGE_BUFFERS_MAX`] pages of guest memory in several ranges.
///
/// A range is contiguous in guest-physical memory and may begin and end inside of a page.
///
/// # Invariants
///
/// The first `used` words are initialised: `header.range_count` complete ranges.
#[repr(C)]
pub struct GpaRanges {
    header: GpaDirectHeader,
    /// For each range its length and offset, then its page numbers.
    words: [MaybeUninit<u64>; 2 * PAGE_BUFFERS_MAX],
    used: usize,
    pages: usize,
}

impl GpaRanges {
    /// No range.
    #[inline]
    pub fn new() -> Self {
        // INVARIANT: Nothing is used.
        Self {
            header: GpaDirectHeader {
                descriptor: [0; 16],
                reserved: 0,
                range_count: 0,
            },
            words: [const { MaybeUninit::uninit() }; 2 * PAGE_BUFFERS_MAX],
            used: 0,
            pages: 0,
        }
    }

    /// Appends the range of `len` bytes that begins at `offset` in the page `pfn`. An empty one is
    /// left out.
    ///
    /// Fails with `E2BIG` if that would be too many pages, and with `EINVAL` if `offset` is not in
    /// the page.
    #[inline(always)]
    pub fn push(&mut self, pfn: u64, offset: u32, len: u32) -> Result {
        if len == 0 {
            return Ok(());
        }
        let offset = offset as usize;
        if offset >= HV_PAGE_SIZE {
            return Err(EINVAL);
        }
        let pages = (offset + len as usize).div_ceil(HV_PAGE_SIZE);
        if self.pages + pages > PAGE_BUFFERS_MAX {
            return Err(E2BIG);
        }
        // A range has at least one page, so there are never more than two words a page.
        let (range, free) = self
            .words
            .get_mut(self.used..)
            .and_then(|free| free.split_first_mut())
            .ok_or(E2BIG)?;
        range.write(u64::from(len) | ((offset as u64) << 32));
        let (first, others) = free.split_first_mut().ok_or(E2BIG)?;
        first.write(pfn);
        if pages > 1 {
            for (page, pfn) in others
                .get_mut(..pages - 1)
                .ok_or(E2BIG)?
                .iter_mut()
                .zip(pfn + 1..)
            {
                page.write(pfn);
            }
        }
        // INVARIANT: All these words have just been written.
        self.used += 1 + pages;
        self.pages += pages;
        self.header.range_count += 1;
        Ok(())
    }
}

impl GpaRanges {
    /// Number of ranges.
    pub(crate) fn count(&self) -> usize {
        self.header.range_count as usize
    }

    /// Moves each range to where `replace` says: it is given the physical address and the length,
    /// and returns another address with the same offset in the page.
    pub(crate) fn replace_each(
        &mut self,
        mut replace: impl FnMut(u64, usize) -> Result<u64>,
    ) -> Result {
        let mut words = self.words.get_mut(..self.used).ok_or(EINVAL)?;
        while let [head, pfns @ ..] = words {
            // SAFETY: By the type invariants the used words are initialised.
            let head = unsafe { head.assume_init() };
            let (len, offset) = (head as u32 as usize, (head >> 32) as usize);
            let pages = (offset + len).div_ceil(HV_PAGE_SIZE);
            let (pfns, rest) = pfns.split_at_mut_checked(pages).ok_or(EINVAL)?;
            let first = pfns.first_mut().ok_or(EINVAL)?;
            // SAFETY: As above.
            let first = unsafe { first.assume_init() };
            let page = HV_PAGE_SIZE as u64;
            let address = replace(first * page + offset as u64, len)?;
            if address % page != offset as u64 {
                return Err(EINVAL);
            }
            for (slot, pfn) in pfns.iter_mut().zip(address / page..) {
                slot.write(pfn);
            }
            words = rest;
        }
        Ok(())
    }
}

impl Default for GpaRanges {
    fn default() -> Self {
        Self::new()
    }
}

impl Ring<'_> {
    /// Sends `payload` together with ranges of guest memory, and wants a reply.
    ///
    /// The host may use the memory until it completes the packet.
    ///
    /// Fails as [`Ring::send_inband`] does.
    #[inline]
    pub fn send_ranges(&self, ranges: &mut GpaRanges, payload: &[u8], id: u64) -> Result {
        if ranges.used == 0 {
            return Err(EINVAL);
        }
        let len = packet_len(payload)?;
        let size = offset_of!(GpaRanges, words) + ranges.used * size_of::<u64>();
        // SAFETY: By the type invariants the channel is open, and `size` bytes of `ranges` are
        // initialised, the header and complete ranges. The function copies them and the payload,
        // and writes only to the header.
        sent(unsafe {
            bindings::vmbus_sendpacket_mpb_desc(
                self.raw(),
                (&raw mut *ranges).cast(),
                size as u32,
                payload.as_ptr().cast_mut().cast(),
                len,
                id,
            )
        })
    }
}

/// A page of private memory in which the host reads a request.
///
/// The owner keeps it until the host has completed the packet that refers to it.
pub struct RequestPage(KBox<PageBytes>);

#[derive(Zeroable)]
#[repr(C, align(4096))]
struct PageBytes([u8; HV_PAGE_SIZE]);

impl RequestPage {
    /// Allocates a page of zeroes.
    #[inline]
    pub fn new() -> Result<Self> {
        Ok(Self(KBox::init(
            pin_init::init_zeroed::<PageBytes>(),
            GFP_KERNEL,
        )?))
    }

    /// The bytes.
    pub fn bytes_mut(&mut self) -> &mut [u8; HV_PAGE_SIZE] {
        &mut self.0 .0
    }

    /// Number of the page, in Hyper-V's pages.
    pub fn pfn(&self) -> u64 {
        // SAFETY: The allocation lies in the kernel's direct mapping.
        unsafe { bindings::virt_to_hvpfn((&raw const *self.0).cast_mut().cast()) as u64 }
    }
}
