// SPDX-License-Identifier: GPL-2.0
//! Reproducible contents, so that the receiving end can check every byte.

/// A stream of pseudo-random numbers (SplitMix64).
#[derive(Debug, Clone)]
pub struct Pattern(u64);

impl Pattern {
    /// The stream number `index` of `seed`.
    pub fn new(seed: u64, index: u64) -> Self {
        let mut start = Self(seed ^ index.wrapping_mul(0xd6e8_feb8_6659_fd93));
        start.next();
        start
    }

    /// The next number.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Fills `buffer` with the following bytes.
    pub fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]);
        }
    }

    /// Whether `buffer` holds the following bytes.
    pub fn matches(&mut self, buffer: &[u8]) -> bool {
        buffer
            .chunks(8)
            .all(|chunk| *chunk == self.next().to_le_bytes()[..chunk.len()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filled_bytes_match_and_others_do_not() {
        for length in [0, 1, 7, 8, 9, 1500] {
            let mut bytes = vec![0; length];
            Pattern::new(1, 2).fill(&mut bytes);
            assert!(Pattern::new(1, 2).matches(&bytes));
            if length > 0 {
                assert!(!Pattern::new(1, 3).matches(&bytes));
                bytes[length - 1] ^= 1;
                assert!(!Pattern::new(1, 2).matches(&bytes));
            }
        }
    }
}
