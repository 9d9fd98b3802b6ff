// SPDX-License-Identifier: GPL-2.0

//! Where the blocks are.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::Path, //
};

use nix::{
    fcntl::{fallocate, FallocateFlags},
    sys::memfd::{memfd_create, MFdFlags},
};

/// The content of a disk: a sparse file, which may have no name.
#[derive(Debug)]
pub struct Store {
    file: File,
    size: u64,
}

impl Store {
    /// A disk of zeros in memory, which is taken as it is written.
    pub fn memory(size: u64) -> io::Result<Self> {
        let file = File::from(memfd_create("nvme", MFdFlags::MFD_CLOEXEC)?);
        Self::new(file, size)
    }

    /// A disk in a file, which is made if it does not exist and brought to this size.
    pub fn file(path: &Path, size: u64) -> io::Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        Self::new(file, size)
    }

    fn new(file: File, size: u64) -> io::Result<Self> {
        file.set_len(size)?;
        Ok(Self { file, size })
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Reads all of `to`.
    pub(crate) fn read(&self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(to, offset)
    }

    /// Writes all of `from`.
    pub(crate) fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.file.write_all_at(from, offset)
    }

    /// Makes a range read as zeros, and gives its space back.
    pub(crate) fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        if length == 0 {
            return Ok(());
        }
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let signed = |value| i64::try_from(value).map_err(io::Error::other);
        fallocate(&self.file, flags, signed(offset)?, signed(length)?)?;
        Ok(())
    }

    /// What was written stays, whatever happens to this process or machine.
    pub(crate) fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}
