// SPDX-License-Identifier: GPL-2.0

//! What a test function has, as words on a command line.

use vpci::Bar;

use crate::{BAR0, MSIX_MAX, REGISTERS_LEN};

/// Least size of a BAR.
const BAR_MIN: u64 = 4 << 10;
/// Largest size of a BAR.
const BAR_MAX: u64 = 16 << 30;
/// Largest size of a BAR below 4 GiB.
const NARROW_MAX: u64 = 2 << 30;

/// What a test function has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// BARs; the first one has the registers.
    pub bars: [Option<Bar>; 6],
    /// MSI vectors.
    pub msi: Option<u8>,
    /// MSI-X vectors.
    pub msix: Option<u16>,
}

impl Options {
    /// Registers and nothing else.
    pub const DEFAULT: Self = Self {
        bars: [Some(BAR0), None, None, None, None, None],
        msi: None,
        msix: None,
    };
}

/// A size with a suffix K, M or G.
fn size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.chars().last()? {
        'K' => (&text[..text.len() - 1], 10),
        'M' => (&text[..text.len() - 1], 20),
        'G' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().ok()?;
    number.checked_mul(1 << shift)
}

/// `SIZE[:64][:pref]`.
fn bar(text: &str) -> Option<Bar> {
    let mut words = text.split(':');
    let mut bar = Bar {
        size: size(words.next()?)?,
        wide: false,
        prefetchable: false,
    };
    for word in words {
        match word {
            "64" => bar.wide = true,
            "pref" => bar.prefetchable = true,
            _ => return None,
        }
    }
    let max = if bar.wide { BAR_MAX } else { NARROW_MAX };
    (bar.size.is_power_of_two() && (BAR_MIN..=max).contains(&bar.size)).then_some(bar)
}

impl Options {
    /// Sets `barN=SIZE[:64][:pref]`, `msi=VECTORS` or `msix=VECTORS`. `None` if there is no such property,
    /// otherwise whether the value is one.
    pub fn set(&mut self, key: &str, value: &str) -> Option<bool> {
        if let Some(number) = key.strip_prefix("bar") {
            let number: usize = number.parse().ok().filter(|number| *number < 6)?;
            let bar = bar(value).filter(|bar| number > 0 || bar.size >= REGISTERS_LEN);
            self.bars[number] = bar;
            return Some(bar.is_some());
        }
        match key {
            "msi" => {
                let vectors = value.parse().ok();
                self.msi = vectors.filter(|count: &u8| count.is_power_of_two() && *count <= 32);
                Some(self.msi.is_some())
            }
            "msix" => {
                let vectors = value.parse().ok();
                self.msix = vectors.filter(|count| (1..=MSIX_MAX).contains(count));
                Some(self.msix.is_some())
            }
            _ => None,
        }
    }

    /// Says what does not fit together.
    pub fn check(&self) -> Result<(), String> {
        let wide = |number: usize| self.bars[number].is_some_and(|bar| bar.wide);
        if wide(5) {
            return Err("BAR 5 cannot be 64 bits wide".into());
        }
        match (0..5).find(|&number| wide(number) && self.bars[number + 1].is_some()) {
            Some(number) => Err(format!(
                "there is no BAR {}: BAR {number} is 64 bits wide",
                number + 1
            )),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_set() {
        let mut options = Options::DEFAULT;
        for (key, value) in [
            ("bar1", "4K"),
            ("bar2", "16G:64:pref"),
            ("bar4", "64M:pref"),
            ("msi", "32"),
            ("msix", "2048"),
        ] {
            assert_eq!(options.set(key, value), Some(true), "{key}={value}");
        }
        assert_eq!(options.check(), Ok(()));
        let wide = options.bars[2].unwrap();
        assert_eq!(
            (wide.size, wide.wide, wide.prefetchable),
            (16 << 30, true, true)
        );
        assert_eq!(options.bars[1].unwrap().size, 4096);
        assert_eq!((options.msi, options.msix), (Some(32), Some(2048)));
        assert_eq!(options.set("bar3", "8K"), Some(true));
        assert!(options.check().is_err());
        for (key, value) in [
            ("bar0", "4K"),
            ("bar1", "2K"),
            ("bar1", "5K"),
            ("bar1", "4G"),
            ("bar1", "32G:64"),
            ("bar1", "4K:io"),
            ("msi", "3"),
            ("msi", "64"),
            ("msix", "0"),
            ("msix", "2049"),
        ] {
            assert_eq!(options.set(key, value), Some(false), "{key}={value}");
        }
        assert_eq!(options.set("bar6", "4K"), None);
        assert_eq!(options.set("queues", "4"), None);
    }
}
