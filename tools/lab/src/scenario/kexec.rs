// SPDX-License-Identifier: GPL-2.0
//! Scenario 20: the guest starts another kernel, which finds a host that the first one has left.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::time::Duration;

use super::guest::{Boot, Guest, Nic};
use super::suspend::{persistent_memory, taken_over};
use super::traffic::Link;
use super::vf::{bonded, load_order};
use super::{ensure, Context, Result};

/// How often.
const ROUNDS: usize = 2;
/// What writing the archive, or a start, may take.
const START: Duration = Duration::from_secs(120);
/// Size of the persistent memory in which the guest finds the kernel.
const SIZE: u64 = 64 << 20;

pub fn run(context: &mut Context<'_>) -> Result<()> {
    fs::create_dir_all(&context.options.output)?;
    let pmem = context
        .options
        .output
        .join(format!("{}-kexec.pmem", context.drivers));
    let result = kexec(context, &pmem);
    // There is none if it could not be made.
    let _ = fs::remove_file(&pmem);
    result
}

fn kexec(context: &mut Context<'_>, pmem: &Path) -> Result<()> {
    let lab = context.lab();
    let mut memory = File::create(pmem)?;
    // It may be a block device.
    let kernel = io::copy(&mut File::open(&lab.files.kernel)?, &mut memory)?;
    ensure(kernel <= SIZE, || {
        format!("a kernel of {kernel} bytes is too large")
    })?;
    memory.set_len(SIZE)?;
    let guest = context.boot(&Boot {
        cpus: 2,
        pmem: Some(pmem.to_owned()),
        ..Boot::new(vec![Nic::new(0)])
    })?;
    let nic = guest.nics[0].clone();
    let link = Link::new(&guest, lab, &nic);
    load_order(&guest)?;
    for round in 1..=ROUNDS {
        let vf = round == ROUNDS;
        let name = format!(
            "kernel {round} is started by the one before it, {} VF, under load",
            if vf { "with" } else { "without" }
        );
        context.check(&name, || {
            if vf {
                guest.host.add_vf(&nic)?;
                bonded(&guest, &nic)?;
            }
            prepare(&guest, kernel)?;
            // The load is there to be cut off.
            guest.sh(&format!(
                "(ping -q -f {} & sleep 1; kexec -e) </dev/null >/dev/null 2>&1 &",
                nic.peer_v4()
            ))?;
            taken_over(&guest, "test ! -e /tmp/before", START)
        });
        context.check(&format!("packets pass with kernel {round}"), || {
            if vf {
                bonded(&guest, &nic)?;
            }
            link.pings()
        });
    }
    context.finish(guest)
}

/// Loads the kernel, and an archive of all files that there are.
fn prepare(guest: &Guest, kernel: u64) -> Result<()> {
    persistent_memory(guest)?;
    guest.sh_within(
        &format!(
            "head -c {kernel} /dev/pmem0 >/tmp/kernel && mkdir -p /tmp/root && mount --bind / /tmp/root && \
             (cd /tmp/root && find . | cpio -o -H newc >/tmp/files) && umount /tmp/root && \
             kexec -s -l /tmp/kernel --initrd=/tmp/files --reuse-cmdline && \
             rm /tmp/kernel /tmp/files && touch /tmp/before"
        ),
        START,
    )?;
    Ok(())
}
