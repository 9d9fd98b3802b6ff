// SPDX-License-Identifier: GPL-2.0
//! How large a kernel module is, from the sections of its file.

use std::fs;
use std::io;
use std::path::PathBuf;

use clap::Args;
use serde::{Deserialize, Serialize};

/// Section flags and types of ELF.
const WRITE: u64 = 1;
const ALLOC: u64 = 2;
const EXECUTABLE: u64 = 4;

/// Which module.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// The module's file
    pub file: PathBuf,
}

/// Bytes of what stays in memory; sections for the initialization are not counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Code.
    pub text: u64,
    /// Constants.
    pub constants: u64,
    /// Variables.
    pub data: u64,
}

/// Measures it.
pub fn size(options: &Options) -> io::Result<Report> {
    sections(&fs::read(&options.file)?).ok_or_else(|| {
        let text = format!("{}: no 64-bit ELF file", options.file.display());
        io::Error::new(io::ErrorKind::InvalidData, text)
    })
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<u64> {
    let mut number = [0; 8];
    number[..N].copy_from_slice(bytes.get(at..at.checked_add(N)?)?);
    Some(u64::from_le_bytes(number))
}

fn sections(file: &[u8]) -> Option<Report> {
    // 64 bits, little endian.
    if !file.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let table = number::<8>(file, 0x28)? as usize;
    let entry = number::<2>(file, 0x3a)? as usize;
    let count = number::<2>(file, 0x3c)? as usize;
    let names = number::<2>(file, 0x3e)? as usize;
    let header = |index: usize| file.get(table + index * entry..)?.get(..64);
    let names = number::<8>(header(names)?, 0x18)? as usize;
    let mut report = Report::default();
    for index in 0..count {
        let header = header(index)?;
        let name = file.get(names + number::<4>(header, 0)? as usize..)?;
        let flags = number::<8>(header, 8)?;
        let size = number::<8>(header, 0x20)?;
        if flags & ALLOC == 0 || name.starts_with(b".init") {
            continue;
        }
        let sum = if flags & EXECUTABLE != 0 {
            &mut report.text
        } else if flags & WRITE != 0 {
            &mut report.data
        } else {
            &mut report.constants
        };
        *sum += size;
    }
    Some(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file with these sections: name, flags, size.
    fn file(list: &[(&str, u64, u64)]) -> Vec<u8> {
        let mut names = vec![0];
        let mut headers = vec![0; 64];
        for (name, flags, size) in list {
            let mut header = vec![0; 64];
            header[..4].copy_from_slice(&(names.len() as u32).to_le_bytes());
            header[8..16].copy_from_slice(&flags.to_le_bytes());
            header[0x20..0x28].copy_from_slice(&size.to_le_bytes());
            headers.extend(header);
            names.extend(name.as_bytes());
            names.push(0);
        }
        let count = list.len() as u16 + 2;
        let mut header = vec![0; 64];
        header[0x18..0x20].copy_from_slice(&(64 + 64 * u64::from(count)).to_le_bytes());
        headers.extend(header);
        let mut file = b"\x7fELF\x02\x01".to_vec();
        file.resize(64, 0);
        file[0x28..0x30].copy_from_slice(&64u64.to_le_bytes());
        file[0x3a..0x3c].copy_from_slice(&64u16.to_le_bytes());
        file[0x3c..0x3e].copy_from_slice(&count.to_le_bytes());
        file[0x3e..0x40].copy_from_slice(&(count - 1).to_le_bytes());
        file.extend(headers);
        file.extend(names);
        file
    }

    #[test]
    fn sections_are_summed_by_what_they_are() {
        let file = file(&[
            (".text", ALLOC | EXECUTABLE, 1000),
            (".text.unlikely", ALLOC | EXECUTABLE, 10),
            (".init.text", ALLOC | EXECUTABLE, 500),
            (".rodata", ALLOC, 200),
            (".data", ALLOC | WRITE, 30),
            (".bss", ALLOC | WRITE, 4),
            (".debug_info", 0, 9999),
        ]);
        let expected = Report {
            text: 1010,
            constants: 200,
            data: 34,
        };
        assert_eq!(sections(&file), Some(expected));
        for cut in 0..file.len() - 1 {
            // Must not panic.
            let _ = sections(&file[..cut]);
        }
        assert_eq!(sections(b"#!/bin/sh"), None);
    }
}
