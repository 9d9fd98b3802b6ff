// SPDX-License-Identifier: GPL-2.0

//! Memory of which only the pages that were written exist.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

const PAGE: u64 = 4096;
/// Pages that one BAR may have. A guest that wants more loses what it writes.
const PAGES_MAX: usize = 4096;

/// Sparse memory; it reads as zero where nothing was written.
#[derive(Default)]
pub struct Sparse(Mutex<BTreeMap<u64, Box<[u8]>>>);

impl Sparse {
    /// Reads at `offset`.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let pages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (at, byte) in (offset..).zip(data) {
            *byte = pages
                .get(&(at / PAGE))
                .map_or(0, |page| page[(at % PAGE) as usize]);
        }
    }

    /// Writes at `offset`.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let mut pages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (at, byte) in (offset..).zip(data) {
            let number = at / PAGE;
            if pages.len() >= PAGES_MAX && !pages.contains_key(&number) {
                return;
            }
            let page = pages
                .entry(number)
                .or_insert_with(|| vec![0; PAGE as usize].into());
            page[(at % PAGE) as usize] = *byte;
        }
    }

    /// Forgets all.
    pub fn clear(&self) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_written_is_there() {
        let memory = Sparse::default();
        let end = (16 << 30) - 4;
        for (offset, data) in [(0, [1, 2, 3, 4]), (PAGE - 2, [5, 6, 7, 8]), (end, [9; 4])] {
            memory.write(offset, &data);
            let mut back = [0; 4];
            memory.read(offset, &mut back);
            assert_eq!(back, data);
        }
        let mut back = [1; 8];
        memory.read(8 << 30, &mut back);
        assert_eq!(back, [0; 8]);
        assert_eq!(memory.0.lock().unwrap().len(), 3);
        for number in 0..2 * PAGES_MAX as u64 {
            memory.write(number * PAGE, &[1]);
        }
        assert_eq!(memory.0.lock().unwrap().len(), PAGES_MAX);
        memory.clear();
        memory.read(0, &mut back);
        assert_eq!(back, [0; 8]);
    }
}
