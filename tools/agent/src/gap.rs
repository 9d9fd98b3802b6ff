// SPDX-License-Identifier: GPL-2.0
//! The longest time without traffic.

use std::time::{Duration, Instant};

/// Remembers the longest gap between two arrivals.
#[derive(Debug, Default)]
pub struct Gap {
    last: Option<Instant>,
    longest: Duration,
}

impl Gap {
    /// Something arrived at `now`.
    pub fn arrival(&mut self, now: Instant) {
        if let Some(last) = self.last {
            self.longest = self.longest.max(now.saturating_duration_since(last));
        }
        self.last = Some(now);
    }

    /// The longest gap so far, in milliseconds.
    pub fn longest_ms(&self) -> u64 {
        u64::try_from(self.longest.as_millis()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_gap_wins() {
        let start = Instant::now();
        let mut gap = Gap::default();
        assert_eq!(gap.longest_ms(), 0);
        for ms in [100, 110, 310, 315] {
            gap.arrival(start + Duration::from_millis(ms));
        }
        assert_eq!(gap.longest_ms(), 200);
    }
}
