// SPDX-License-Identifier: GPL-2.0
//! Entering a named network namespace.

use std::fs::File;
use std::io;
use std::path::Path;

use nix::sched::{setns, CloneFlags};

/// Moves the calling thread into the network namespace `name`, as made by
/// `ip netns add`.
pub fn enter(name: &str) -> io::Result<()> {
    let path = Path::new("/run/netns").join(name);
    let namespace = File::open(&path)
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
    setns(namespace, CloneFlags::CLONE_NEWNET)?;
    Ok(())
}
