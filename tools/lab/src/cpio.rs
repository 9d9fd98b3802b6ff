// SPDX-License-Identifier: GPL-2.0
//! Writes archives an initramfs can be made of ("newc" cpio).

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;

/// An archive in the making.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inode: u32,
    directories: BTreeSet<String>,
}

impl Archive {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    fn entry(&mut self, name: &str, mode: u32, data: &[u8]) {
        self.inode += 1;
        let size = u32::try_from(data.len()).expect("cpio cannot hold files of 4 GiB");
        // Magic; inode, mode, uid, gid, links, mtime, size, device (2), special device (2), name length, checksum.
        let fields = [
            self.inode,
            mode,
            0,
            0,
            1,
            0,
            size,
            0,
            0,
            0,
            0,
            name.len() as u32 + 1,
            0,
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// The folders above `name`, those that are not there yet.
    fn parents(&mut self, name: &str) {
        for (at, _) in name.match_indices('/') {
            let parent = &name[..at];
            if self.directories.insert(parent.to_owned()) {
                self.entry(parent, DIRECTORY | 0o755, &[]);
            }
        }
    }

    /// Adds a file. Names are relative to the root and have no leading slash.
    pub fn file(&mut self, name: &str, permissions: u32, data: &[u8]) {
        self.parents(name);
        self.entry(name, REGULAR | permissions, data);
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, name: &str, target: &str) {
        self.parents(name);
        self.entry(name, SYMLINK | 0o777, target.as_bytes());
    }

    /// Adds a file or a whole folder of the host.
    pub fn copy(&mut self, name: &str, source: &Path) -> io::Result<()> {
        let metadata = fs::symlink_metadata(source)?;
        let kind = metadata.file_type();
        if kind.is_symlink() {
            let target = fs::read_link(source)?;
            self.symlink(name, &target.to_string_lossy());
        } else if kind.is_dir() {
            let mut entries: Vec<_> = fs::read_dir(source)?.collect::<Result<_, _>>()?;
            entries.sort_by_key(fs::DirEntry::file_name);
            for entry in entries {
                let below = entry.file_name().to_string_lossy().into_owned();
                let name = if name.is_empty() {
                    below
                } else {
                    format!("{name}/{below}")
                };
                self.copy(&name, &entry.path())?;
            }
        } else if !kind.is_fifo() && !kind.is_socket() {
            let permissions = metadata.permissions().mode() & 0o777;
            self.file(name, permissions, &fs::read(source)?);
        }
        Ok(())
    }

    /// The archive's bytes.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout() {
        let mut archive = Archive::new();
        archive.file("lab/a", 0o755, b"hello");
        archive.symlink("lab/b", "a");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        // Folder, file, link, trailer; the folder once.
        assert_eq!(text.matches("070701").count(), 4);
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[14..22], b"000041ed");
        assert_eq!(&bytes[110..114], b"lab\0");
        // The next header follows at a multiple of four.
        assert_eq!(&bytes[116..122], b"070701");
        assert_eq!(&bytes[116 + 54..116 + 62], b"00000005");
    }
}
