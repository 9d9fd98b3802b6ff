// SPDX-License-Identifier: GPL-2.0
//! Memory-mapped devices, which come, go and move while the guest runs.

use std::collections::BTreeMap;
use std::sync::{Arc, RwLock};

use thiserror::Error;

/// A device that answers for a range of guest physical addresses.
///
/// Called on a virtual processor's thread: be short, hand work on.
pub trait MmioDevice: Send + Sync {
    /// The guest reads `data.len()` (1 to 8) bytes at `offset` of the range.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// The guest writes `data` (1 to 8 bytes) at `offset` of the range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a range cannot be inserted.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum MmioError {
    /// The range has no bytes, or wraps around.
    #[error("bad range {base:#x}+{len:#x}")]
    BadRange {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Another device answers for some of it.
    #[error("range {base:#x}+{len:#x} overlaps another one")]
    Overlap {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
}

struct Range {
    len: u64,
    device: Arc<dyn MmioDevice>,
}

/// The address decoder.
#[derive(Default)]
pub struct MmioBus {
    ranges: RwLock<BTreeMap<u64, Range>>,
}

impl MmioBus {
    /// An empty bus.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets `device` answer for `len` bytes from `base`.
    pub fn insert(
        &self,
        base: u64,
        len: u64,
        device: Arc<dyn MmioDevice>,
    ) -> Result<(), MmioError> {
        let end = match base.checked_add(len) {
            Some(end) if len > 0 => end,
            _ => return Err(MmioError::BadRange { base, len }),
        };
        let mut ranges = self.ranges.write().unwrap();
        // The ranges do not overlap, so the last one that starts below the end has the highest end.
        if let Some((&other, range)) = ranges.range(..end).next_back() {
            if other + range.len > base {
                return Err(MmioError::Overlap { base, len });
            }
        }
        ranges.insert(base, Range { len, device });
        Ok(())
    }

    /// Removes the range that starts at `base`. Says whether there was one.
    pub fn remove(&self, base: u64) -> bool {
        self.ranges.write().unwrap().remove(&base).is_some()
    }

    fn find(&self, address: u64, len: usize) -> Option<(Arc<dyn MmioDevice>, u64)> {
        let ranges = self.ranges.read().unwrap();
        let (&base, range) = ranges.range(..=address).next_back()?;
        let offset = address - base;
        // An access which only begins in the range belongs to nobody.
        if offset.checked_add(len as u64)? > range.len {
            return None;
        }
        Some((range.device.clone(), offset))
    }

    /// A read by the guest. What nobody answers for reads as all ones.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// A write by the guest. Says whether somebody took it.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((device, offset)) => {
                device.write(offset, data);
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl MmioDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn decodes_by_range() {
        let bus = MmioBus::new();
        let a = Arc::new(Recorder::default());
        bus.insert(0x1000, 0x1000, a.clone()).unwrap();
        bus.insert(0x2000, 0x10, Arc::new(Recorder::default()))
            .unwrap();
        let mut data = [0; 4];
        bus.read(0x1ffc, &mut data);
        assert_eq!(data, [0xfc; 4]);
        bus.read(0x1ffd, &mut data);
        assert_eq!(data, [0xff; 4]);
        bus.read(0x2004, &mut data);
        assert_eq!(data, [4; 4]);
        bus.read(0x2010, &mut data);
        assert_eq!(data, [0xff; 4]);
        bus.read(0xfff, &mut data);
        assert_eq!(data, [0xff; 4]);
        assert!(bus.write(0x1000, &[1, 2]));
        assert!(!bus.write(0x3000, &[1]));
        assert_eq!(*a.0.lock().unwrap(), [(0, vec![1, 2])]);
    }

    #[test]
    fn refuses_overlap() {
        let bus = MmioBus::new();
        let device = || Arc::new(Recorder::default());
        bus.insert(0x1000, 0x1000, device()).unwrap();
        for (base, len) in [(0x1000, 1), (0x1fff, 1), (0xfff, 2), (0, 0x10000)] {
            assert_eq!(
                bus.insert(base, len, device()),
                Err(MmioError::Overlap { base, len })
            );
        }
        bus.insert(0xfff, 1, device()).unwrap();
        bus.insert(0x2000, 1, device()).unwrap();
        assert!(bus.insert(u64::MAX, 2, device()).is_err());
        assert!(bus.insert(5, 0, device()).is_err());
        assert!(bus.remove(0x1000));
        assert!(!bus.remove(0x1000));
        bus.insert(0x1800, 4, device()).unwrap();
    }
}
