// SPDX-License-Identifier: GPL-2.0
//! Scenario 20: the guest starts another kernel, or crashes into one, which finds a host that the first one has left.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::Duration;

use super::guest::{Boot, Guest, Lab, Nic};
use super::suspend::{persistent_memory, taken_over, with_memory_file};
use super::traffic::Link;
use super::vf::{bonded, load_order};
use super::{ensure, Context, Result};

/// How often.
const ROUNDS: usize = 2;
/// What writing the archive, or a start, may take.
const START: Duration = Duration::from_secs(120);
/// Size of the persistent memory in which the guest finds the kernel.
const SIZE: u64 = 64 << 20;
/// What a kernel that a crash starts has as memory.
const CRASH_MEMORY: &str = "448M";
/// So much of the memory of the one that has crashed is sent to the peer.
const DUMP: u64 = 4 << 20;
/// The TCP port for that.
const PORT: u16 = 7000;

pub fn run(context: &mut Context<'_>) -> Result<()> {
    with_memory_file(context, kexec)
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
        append: format!("crashkernel={CRASH_MEMORY}"),
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
            prepare(&guest, kernel, "-l")?;
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
    context.check("a crash under load starts another kernel, with VF", || {
        prepare(&guest, kernel, "-p --append='nr_cpus=1 reset_devices'")?;
        guest.crashes();
        // On another processor than the one that has booted.
        guest.sh(&format!(
            "(ping -q -f {} & sleep 1; taskset -c 1 sh -c 'echo c >/proc/sysrq-trigger') </dev/null >/dev/null 2>&1 &",
            nic.peer_v4()
        ))?;
        taken_over(&guest, "test -e /proc/vmcore", START)
    });
    context.check("it sends the crashed kernel's memory to the peer", || {
        bonded(&guest, &nic)?;
        link.pings()?;
        dump(&guest, lab, &nic)
    });
    context.finish(guest)
}

/// Sends what has crashed to the peer, which must get the same.
fn dump(guest: &Guest, lab: &Lab, nic: &Nic) -> Result<()> {
    let memory = format!("head -c {DUMP} /proc/vmcore");
    let sum = guest.sh_within(&format!("{memory} | sha256sum"), START)?;
    guest.sh(&format!(
        "({memory} | nc -l -p {PORT}) </dev/null >/dev/null 2>&1 &"
    ))?;
    guest.wait_until(
        &format!("ss -lntH sport {PORT} | grep -q ."),
        Duration::from_secs(10),
    )?;
    // nc ends with its input, which a pipe that it may write to itself never does.
    let received = guest.peer(
        lab,
        nic,
        &format!(
            "f=$(mktemp -u) && mkfifo $f && nc {} {PORT} <>$f | sha256sum; rm $f",
            nic.guest_v4()
        ),
    )?;
    ensure(received == sum, || {
        format!("{sum} was sent, {received} received")
    })
}

/// Loads the kernel, and an archive of all files that there are.
fn prepare(guest: &Guest, kernel: u64, options: &str) -> Result<()> {
    persistent_memory(guest)?;
    guest.sh_within(
        &format!(
            "head -c {kernel} /dev/pmem0 >/tmp/kernel && mkdir -p /tmp/root && mount --bind / /tmp/root && \
             (cd /tmp/root && find . | cpio -o -H newc >/tmp/files) && umount /tmp/root && \
             kexec -s {options} /tmp/kernel --initrd=/tmp/files --reuse-cmdline && \
             rm /tmp/kernel /tmp/files && touch /tmp/before"
        ),
        START,
    )?;
    Ok(())
}
