// SPDX-License-Identifier: GPL-2.0
//! The clock of a PC, read-only: the guest takes its date from it.

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// Seconds, minutes, … as the registers number them.
const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;

/// 24-hour mode, numbers in BCD.
const STATUS_B_24_HOURS: u8 = 1 << 1;
/// The battery is fine.
const STATUS_D_VALID: u8 = 1 << 7;
/// 32.768 kHz time base.
const STATUS_A_TIME_BASE: u8 = 0x20;

/// Index and data port.
#[derive(Default)]
pub struct Cmos {
    index: AtomicU8,
}

/// Year, month and day of a day counted from 1970-01-01.
fn civil(days: u64) -> (u64, u64, u64) {
    let leap = |year: u64| year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let mut left = days;
    let mut year = 1970;
    loop {
        let length = if leap(year) { 366 } else { 365 };
        if left < length {
            break;
        }
        left -= length;
        year += 1;
    }
    let february = if leap(year) { 29 } else { 28 };
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if left < length {
            break;
        }
        left -= length;
        month += 1;
    }
    (year, month, left + 1)
}

fn bcd(value: u64) -> u8 {
    (value / 10 % 10 * 16 + value % 10) as u8
}

fn register(index: u8, now: u64) -> u8 {
    let (year, month, day) = civil(now / 86400);
    match index {
        SECONDS => bcd(now % 60),
        MINUTES => bcd(now / 60 % 60),
        HOURS => bcd(now / 3600 % 24),
        // 1970-01-01 was a Thursday, the fifth day.
        WEEKDAY => bcd((now / 86400 + 4) % 7 + 1),
        DAY => bcd(day),
        MONTH => bcd(month),
        YEAR => bcd(year % 100),
        CENTURY => bcd(year / 100),
        STATUS_A => STATUS_A_TIME_BASE,
        STATUS_B => STATUS_B_24_HOURS,
        STATUS_D => STATUS_D_VALID,
        _ => 0,
    }
}

impl Cmos {
    /// The guest chooses a register.
    pub fn select(&self, index: u8) {
        // Bit 7 masks the NMI.
        self.index.store(index & 0x7f, Ordering::Relaxed);
    }

    /// The guest reads the chosen register.
    pub fn read(&self) -> u8 {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |now| now.as_secs());
        register(self.index.load(Ordering::Relaxed), now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (days, date) in [
            (0, (1970, 1, 1)),
            (58, (1970, 2, 28)),
            (59, (1970, 3, 1)),
            (11016, (2000, 2, 29)),
            (11322, (2000, 12, 31)),
            (20778, (2026, 11, 21)),
        ] {
            assert_eq!(civil(days), date, "day {days}");
        }
    }

    #[test]
    fn registers() {
        // 2026-11-21 01:35:09, a Saturday.
        let now = 20778 * 86400 + 3600 + 35 * 60 + 9;
        let read: Vec<u8> = [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS]
            .map(|index| register(index, now))
            .to_vec();
        assert_eq!(read, [0x20, 0x26, 0x11, 0x21, 0x07, 0x01, 0x35, 0x09]);
        assert_eq!(register(STATUS_A, now) & 0x80, 0);
    }
}
