// SPDX-License-Identifier: GPL-2.0

//! Ranges of guest memory that a guest describes by page numbers, and rings in them.

use std::sync::atomic::{fence, Ordering};

use hyperv_wire::{
    ring::{ControlWord, RingMemory, HEADER_LEN},
    vmbus::{self, PAGE_SIZE},
};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

use crate::Platform;

/// Access to described memory failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AccessError {
    /// The bytes are not within the range.
    #[error("access outside of the range")]
    OutOfRange,
    /// The guest named pages that it does not have.
    #[error("range names memory that the guest does not have")]
    NoMemory,
}

/// A range of guest memory: contiguous for the guest, scattered over pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpaRange {
    /// Bytes.
    pub byte_count: u32,
    /// Offset of the first byte in the first page.
    pub byte_offset: u32,
    /// A page number for each page touched.
    pub pfns: Vec<u64>,
}

impl From<vmbus::GpaRange<'_>> for GpaRange {
    fn from(range: vmbus::GpaRange<'_>) -> Self {
        Self {
            byte_count: range.header.byte_count.get(),
            byte_offset: range.header.byte_offset.get(),
            pfns: range.pfns.iter().map(|pfn| pfn.get()).collect(),
        }
    }
}

impl GpaRange {
    /// Bytes.
    pub fn len(&self) -> u64 {
        u64::from(self.byte_count)
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.byte_count == 0
    }

    /// Calls `run` for each physically contiguous piece of a part of the range, with its address,
    /// its place in the part and its length.
    pub fn for_each_run(
        &self,
        offset: u64,
        length: usize,
        mut run: impl FnMut(GuestAddress, usize, usize) -> Result<(), AccessError>,
    ) -> Result<(), AccessError> {
        let end = offset
            .checked_add(length as u64)
            .filter(|&end| end <= self.len())
            .ok_or(AccessError::OutOfRange)?;
        let page_size = u64::from(PAGE_SIZE);
        let first = u64::from(self.byte_offset);

        let mut at = offset;
        while at < end {
            let place = first + at;
            let mut page = (place / page_size) as usize;
            let address = self.page_address(page)? + place % page_size;
            let mut piece = page_size - place % page_size;
            // Pages that follow each other are one piece.
            while at + piece < end
                && self.page_address(page + 1)? == self.page_address(page)? + page_size
            {
                piece += page_size;
                page += 1;
            }
            let piece = piece.min(end - at);
            run(
                GuestAddress(address),
                (at - offset) as usize,
                piece as usize,
            )?;
            at += piece;
        }
        Ok(())
    }

    /// Address of a page of the range.
    fn page_address(&self, page: usize) -> Result<u64, AccessError> {
        let pfn = self.pfns.get(page).ok_or(AccessError::OutOfRange)?;
        // Room for one page behind it, so that the sums above cannot overflow.
        pfn.checked_mul(u64::from(PAGE_SIZE))
            .filter(|address| address.checked_add(2 * u64::from(PAGE_SIZE)).is_some())
            .ok_or(AccessError::NoMemory)
    }

    /// Whether the guest has all pages of the range.
    pub fn is_in(&self, memory: &GuestMemoryMmap) -> bool {
        self.for_each_run(0, self.byte_count as usize, |address, _, length| {
            memory
                .check_range(address, length)
                .then_some(())
                .ok_or(AccessError::NoMemory)
        })
        .is_ok()
    }

    /// Whether the guest lets the host access all pages of the range.
    pub(crate) fn is_shared(&self, platform: &dyn Platform) -> bool {
        self.pfns.iter().all(|&pfn| platform.is_shared(pfn))
    }

    /// Copies out of the range.
    pub fn read_at(
        &self,
        memory: &GuestMemoryMmap,
        offset: u64,
        to: &mut [u8],
    ) -> Result<(), AccessError> {
        self.for_each_run(offset, to.len(), |address, at, length| {
            memory
                .read_slice(&mut to[at..at + length], address)
                .map_err(|_| AccessError::NoMemory)
        })
    }

    /// Copies into the range.
    pub fn write_at(
        &self,
        memory: &GuestMemoryMmap,
        offset: u64,
        from: &[u8],
    ) -> Result<(), AccessError> {
        self.for_each_run(offset, from.len(), |address, at, length| {
            memory
                .write_slice(&from[at..at + length], address)
                .map_err(|_| AccessError::NoMemory)
        })
    }
}

/// A ring in guest memory.
#[derive(Debug)]
pub(crate) struct GuestRing {
    memory: GuestMemoryMmap,
    control: GuestAddress,
    data: GpaRange,
}

impl GuestRing {
    /// A ring of the given pages, the first of which has the control words. `None` if that is no
    /// ring or not the guest's memory.
    pub(crate) fn new(memory: &GuestMemoryMmap, pfns: &[u64]) -> Option<Self> {
        let (first, data) = pfns.split_first()?;
        let control = GuestAddress(first.checked_mul(u64::from(PAGE_SIZE))?);
        if data.is_empty() || !memory.check_range(control, HEADER_LEN as usize) {
            return None;
        }
        let data = GpaRange {
            byte_count: u32::try_from(data.len()).ok()?.checked_mul(PAGE_SIZE)?,
            byte_offset: 0,
            pfns: data.to_vec(),
        };
        data.is_in(memory).then(|| Self {
            memory: memory.clone(),
            control,
            data,
        })
    }

    fn word(&self, word: ControlWord) -> GuestAddress {
        GuestAddress(self.control.0 + u64::from(word.offset()))
    }
}

// The pages were checked once and guest memory never shrinks, so no access can fail. If one did, zeros
// or nothing would go over: the ring would look corrupt and the channel would end.
impl RingMemory for GuestRing {
    fn data_len(&self) -> u32 {
        self.data.byte_count
    }

    fn load(&self, word: ControlWord) -> u32 {
        self.memory
            .load::<u32>(self.word(word), Ordering::Acquire)
            .map_or(0, u32::from_le)
    }

    fn store(&self, word: ControlWord, value: u32) {
        let stored = self
            .memory
            .store(value.to_le(), self.word(word), Ordering::Release);
        debug_assert!(stored.is_ok());
    }

    fn fence(&self) {
        fence(Ordering::SeqCst);
    }

    fn read(&self, offset: u32, to: &mut [u8]) {
        if self
            .data
            .read_at(&self.memory, u64::from(offset), to)
            .is_err()
        {
            to.fill(0);
        }
    }

    fn write(&self, offset: u32, from: &[u8]) {
        let written = self.data.write_at(&self.memory, u64::from(offset), from);
        debug_assert!(written.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap()
    }

    #[test]
    fn scattered_pages_are_one_range() {
        let memory = memory();
        let range = GpaRange {
            byte_count: 0x2000,
            byte_offset: 0x10,
            pfns: vec![3, 4, 1],
        };
        assert!(range.is_in(&memory));
        let data: Vec<u8> = (0..0x2000).map(|n| (n % 251) as u8).collect();
        range.write_at(&memory, 0, &data).unwrap();

        let mut pieces = Vec::new();
        range
            .for_each_run(0, 0x2000, |address, at, length| {
                pieces.push((address.0, at, length));
                Ok(())
            })
            .unwrap();
        assert_eq!(pieces, [(0x3010, 0, 0x1ff0), (0x1000, 0x1ff0, 0x10)]);

        for (offset, length) in [
            (0, 0),
            (0, 1),
            (0xfef, 2),
            (0x1fef, 2),
            (0x1fff, 1),
            (0, 0x2000),
        ] {
            let mut read = vec![0; length];
            range.read_at(&memory, offset, &mut read).unwrap();
            assert_eq!(read, data[offset as usize..][..length]);
        }
    }

    #[test]
    fn bad_ranges_are_refused() {
        let memory = memory();
        let range = |byte_count, byte_offset, pfns: &[u64]| GpaRange {
            byte_count,
            byte_offset,
            pfns: pfns.to_vec(),
        };
        for (bad, error) in [
            (range(0x1001, 0, &[1]), AccessError::OutOfRange),
            (range(0x1000, 1, &[1]), AccessError::OutOfRange),
            (range(1, 0, &[]), AccessError::OutOfRange),
            (range(1, 0, &[0x10]), AccessError::NoMemory),
            (range(1, 0, &[u64::MAX]), AccessError::NoMemory),
            (range(1, 0, &[u64::MAX >> 12]), AccessError::NoMemory),
        ] {
            let mut to = vec![0; bad.byte_count as usize];
            assert_eq!(bad.read_at(&memory, 0, &mut to), Err(error), "{bad:?}");
            assert!(!bad.is_in(&memory));
        }
        let good = range(0x1000, 0, &[1]);
        assert_eq!(
            good.read_at(&memory, 0xfff, &mut [0; 2]),
            Err(AccessError::OutOfRange)
        );
        assert_eq!(
            good.read_at(&memory, u64::MAX, &mut [0; 2]),
            Err(AccessError::OutOfRange)
        );
    }

    #[test]
    fn a_ring_needs_pages_that_exist() {
        let memory = memory();
        for pfns in [&[][..], &[1], &[1, 0x10], &[0x10, 1], &[u64::MAX, 1]] {
            assert!(GuestRing::new(&memory, pfns).is_none(), "{pfns:?}");
        }
        let ring = GuestRing::new(&memory, &[1, 4, 3]).unwrap();
        assert_eq!(ring.data_len(), 0x2000);
        ring.store(ControlWord::FeatureBits, 5);
        assert_eq!(memory.read_obj::<u32>(GuestAddress(0x1040)).unwrap(), 5);
        ring.write(0xffe, &[1, 2, 3, 4]);
        assert_eq!(memory.read_obj::<u16>(GuestAddress(0x4ffe)).unwrap(), 0x201);
        assert_eq!(memory.read_obj::<u16>(GuestAddress(0x3000)).unwrap(), 0x403);
    }
}
