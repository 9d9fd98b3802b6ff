// SPDX-License-Identifier: GPL-2.0

//! On arm64 the interrupts of virtual PCI buses are SPIs of the GIC, and any that is free will do.

/// First SPI of a GIC, whose interrupts below are those of each CPU.
pub const GIC_FIRST: u32 = 32;

/// First SPI for virtual PCI buses. Those below are left to devices that the firmware describes.
///
/// A multiple of the largest number of MSIs of one function, see [`find_unused`].
pub const FIRST: u32 = 64;

/// The number after the last SPI.
pub const END: u32 = 1020;

/// Finds `count` consecutive SPIs that are not used, and gives the first.
///
/// That is a multiple of the next power of two, and up to there all are unused: a function with
/// several MSIs makes their messages by replacing the low bits of the first one's.
pub fn find_unused(count: u32, is_used: impl Fn(u32) -> bool) -> Option<u32> {
    let size = count.checked_next_power_of_two()?;
    let mut first = FIRST.checked_next_multiple_of(size)?;
    loop {
        let end = first.checked_add(size)?;
        if end > END {
            return None;
        }
        if !(first..end).any(&is_used) {
            return Some(first);
        }
        first = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// What is in use, as the GIC's interrupt domain knows it.
    #[derive(Default)]
    struct Gic(BTreeSet<u32>);

    impl Gic {
        fn allocate(&mut self, count: u32) -> Option<u32> {
            let first = find_unused(count, |spi| self.0.contains(&spi))?;
            assert!(first >= FIRST && first + count <= END);
            for spi in first..first + count {
                assert!(self.0.insert(spi), "SPI {spi} twice");
            }
            Some(first)
        }
    }

    #[test]
    fn one_at_a_time_until_all_are_in_use() {
        let mut gic = Gic::default();
        for spi in FIRST..END {
            assert_eq!(gic.allocate(1), Some(spi));
        }
        assert_eq!(gic.allocate(1), None);
        gic.0.remove(&700);
        assert_eq!(gic.allocate(2), None);
        assert_eq!(gic.allocate(1), Some(700));
    }

    #[test]
    fn several_are_aligned() {
        let mut gic = Gic::default();
        assert_eq!(gic.allocate(1), Some(64));
        assert_eq!(gic.allocate(32), Some(96));
        assert_eq!(gic.allocate(3), Some(68));
        // The fourth of the three is not taken, but in the way of those who need all four.
        assert_eq!(gic.allocate(4), Some(72));
        assert_eq!(gic.allocate(2), Some(66));
        assert_eq!(gic.allocate(1), Some(65));
        assert_eq!(gic.allocate(1), Some(71));
    }

    #[test]
    fn the_last_block_is_not_cut_off() {
        // 1020 is no multiple of 8: the block from 1016 on has four SPIs.
        let mut gic = Gic::default();
        while gic.allocate(8).is_some() {}
        assert_eq!(gic.allocate(4), Some(1016));
        assert_eq!(gic.allocate(1), None);
    }

    #[test]
    fn what_others_use_is_left_alone() {
        // A device of the firmware's or another driver's has taken them before.
        let mut gic = Gic((64..200).collect());
        assert_eq!(gic.allocate(1), Some(200));
        assert_eq!(gic.allocate(16), Some(208));
    }

    #[test]
    fn absurd_numbers_find_nothing() {
        assert_eq!(find_unused(1024, |_| false), None);
        assert_eq!(find_unused(u32::MAX, |_| false), None);
        assert_eq!(find_unused(1 << 31, |_| false), None);
    }
}
