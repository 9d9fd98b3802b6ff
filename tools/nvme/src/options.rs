// SPDX-License-Identifier: GPL-2.0

//! What a disk is, as words on a command line.

use std::{io, path::PathBuf};

use crate::{DiskOptions, Store};

/// Least and most size.
const SIZE_MIN: u64 = 1 << 20;
const SIZE_MAX: u64 = 1 << 40;

/// What a disk is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Size in bytes.
    pub size: u64,
    /// Most I/O queues of each kind.
    pub queues: u16,
    /// File with the content, which is in memory otherwise.
    pub file: Option<PathBuf>,
}

impl Options {
    /// 256 MiB in memory.
    pub const DEFAULT: Self = Self {
        size: 256 << 20,
        queues: 16,
        file: None,
    };
}

/// A size with a suffix M or G.
fn size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.strip_suffix('G') {
        Some(digits) => (digits, 30),
        None => (text.strip_suffix('M')?, 20),
    };
    let number: u64 = digits.parse().ok()?;
    number
        .checked_mul(1 << shift)
        .filter(|size| (SIZE_MIN..=SIZE_MAX).contains(size))
}

impl Options {
    /// Sets `size=SIZE`, `queues=NUMBER` or `file=PATH`. `None` if there is no such property, otherwise whether
    /// the value is one.
    pub fn set(&mut self, key: &str, value: &str) -> Option<bool> {
        match key {
            "size" => Some(size(value).map(|size| self.size = size).is_some()),
            "queues" => {
                let queues = value.parse().ok();
                let queues = queues.filter(|n| (1..=DiskOptions::QUEUES_MAX).contains(n));
                Some(queues.map(|queues| self.queues = queues).is_some())
            }
            "file" => {
                self.file = Some(value.into());
                Some(!value.is_empty())
            }
            _ => None,
        }
    }

    /// What the disk's content is in.
    pub fn store(&self) -> io::Result<Store> {
        match &self.file {
            Some(path) => Store::file(path, self.size).map_err(|error| {
                io::Error::new(error.kind(), format!("{}: {error}", path.display()))
            }),
            None => Store::memory(self.size),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_set() {
        let mut options = Options::DEFAULT;
        for (key, value, valid) in [
            ("size", "64M", Some(true)),
            ("size", "0M", Some(false)),
            ("size", "1025G", Some(false)),
            ("size", "512", Some(false)),
            ("size", "99999999999G", Some(false)),
            ("queues", "64", Some(true)),
            ("queues", "0", Some(false)),
            ("queues", "65", Some(false)),
            ("file", "", Some(false)),
            ("file", "/tmp/disk", Some(true)),
            ("msi", "1", None),
        ] {
            assert_eq!(options.set(key, value), valid, "{key}={value}");
        }
        assert_eq!(options.size, 64 << 20);
        assert_eq!(
            (options.queues, options.file),
            (64, Some("/tmp/disk".into()))
        );
    }

    #[test]
    fn a_file_that_cannot_be_is_named() {
        let options = Options {
            file: Some("/nowhere/disk".into()),
            ..Options::DEFAULT
        };
        let error = options.store().unwrap_err().to_string();
        assert!(error.starts_with("/nowhere/disk: "), "{error}");
    }
}
