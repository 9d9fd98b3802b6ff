// SPDX-License-Identifier: GPL-2.0
//! Scenario 12: the guest hibernates, to persistent memory that outlives its host.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use super::guest::{Boot, Guest, Nic};
use super::traffic::Link;
use super::vf::{bonded, unicast};
use super::{ensure, Context, Drivers, Result};

/// Of the persistent memory; little of it is used.
const SWAP: u64 = 512 << 20;
/// What hibernating or waking up may take.
const SLEEP: Duration = Duration::from_secs(180);
/// What a VF may take to come back.
const VF: Duration = Duration::from_secs(60);
/// What the user has set, and must find again.
const KEY: &str = "d1:d2:d3:d4:d5:d6:d7:d8:d9:da:db:dc:dd:de:df:e0:e1:e2:e3:e4:e5:e6:e7:e8:e9:ea:eb:ec:ed:ee:ef:f0:f1:f2:f3:f4:f5:f6:f7:f8";

pub fn run(context: &mut Context<'_>) -> Result<()> {
    with_memory_file(context, hibernate)
}

fn hibernate(context: &mut Context<'_>, pmem: &Path) -> Result<()> {
    File::create(pmem)?.set_len(SWAP)?;
    let lab = context.lab();
    let boot = Boot {
        cpus: 2,
        pmem: Some(pmem.to_owned()),
        ..Boot::new(vec![Nic::new(0)])
    };
    let guest = context.boot(&boot)?;
    let nic = guest.nics[0].clone();
    let link = Link::new(&guest, lab, &nic);
    persistent_memory(&guest)?;
    guest.sh("mkswap /dev/pmem0 && swapon /dev/pmem0 && echo 0 >/sys/power/image_size")?;
    guest.sh(&format!(
        "ethtool -L eth0 combined 2 && ethtool -G eth0 rx 4000 tx 1000 && ip link set eth0 mtu 1400 && \
         ethtool -X eth0 hkey {KEY} weight 3 1 && ethtool -K eth0 tso off && ethtool -N eth0 rx-flow-hash udp4 sd"
    ))?;
    link.pings()?;
    let before = settings(&guest)?;

    let streams = link.streams()?;
    context.check(
        "the machine is frozen, thawed, quiesced and restored",
        || {
            // All four with one command: the image is restored by the kernel that has made it.
            guest.sh("echo test_resume >/sys/power/disk")?;
            let connections = contacts(&guest)?;
            guest.sh_within("echo disk >/sys/power/state", SLEEP)?;
            let new = contacts(&guest)? - connections;
            // Thawed once, restored once.
            ensure(new == 2, || format!("{new} new contacts with the host"))
        },
    );
    context.check("all settings are as they were, and packets pass", || {
        unchanged(&guest, &before)?;
        link.pings()
    });
    let outcome = streams.collect()?;
    context.check("TCP lived through it", || outcome.alive());

    context.check("a VF joins", || {
        guest.host.add_vf(&nic)?;
        bonded(&guest, &nic)?;
        unicast(&link)
    });
    context.check(
        "frozen, thawed, quiesced and restored with the VF, which can carry the traffic",
        || {
            guest.sh("echo test_resume >/sys/power/disk")?;
            guest.sh_within("echo disk >/sys/power/state", SLEEP)?;
            by_vf(&link)
        },
    );

    context.check("the guest switches itself off", || {
        guest.sh("echo shutdown >/sys/power/disk; touch /root/before")?;
        guest.sh("(sleep 1; echo disk >/sys/power/state) </dev/null >/root/log 2>&1 &")?;
        guest.ended(SLEEP)
    });
    drop(guest);

    let guest = context.boot(&Boot {
        nics: vec![Nic::with_vf(0)],
        ..boot
    })?;
    let link = Link::new(&guest, lab, &nic);
    context.check("on a new host another kernel wakes it", || {
        persistent_memory(&guest)?;
        ensure(guest.exit("test -e /root/before", SLEEP)?.code != 0, || {
            "the new guest is the old one".into()
        })?;
        guest.sh("(sleep 1; cat /sys/class/block/pmem0/dev >/sys/power/resume) </dev/null >/dev/null 2>&1 &")?;
        taken_over(&guest, "test -e /root/before", SLEEP)
    });
    context.check(
        "all settings are as they were there, and packets pass",
        || {
            unchanged(&guest, &before)?;
            link.pings()
        },
    );
    context.check("the VF can carry the traffic there", || by_vf(&link));
    context.check("its interface can still be changed", || {
        // A user's indirection table names the second channel.
        guest.sh(
            "ethtool -X eth0 default && ethtool -L eth0 combined 1 && ip link set eth0 mtu 1500",
        )?;
        // The kernel takes up to a second to give a device with a new carrier its queues.
        guest.wait_until(
            &format!("ping -q -c 1 -W 1 {}", nic.peer_v4()),
            Duration::from_secs(10),
        )?;
        link.pings()
    });
    context.finish(guest)
}

/// Runs a scenario with a file for a guest's persistent memory, which it makes.
pub fn with_memory_file(
    context: &mut Context<'_>,
    scenario: fn(&mut Context<'_>, &Path) -> Result<()>,
) -> Result<()> {
    let output = &context.options.output;
    fs::create_dir_all(output)?;
    let file = output.join(format!(
        "{}-{}.pmem",
        context.drivers, context.scenario.name
    ));
    let result = scenario(context, &file);
    // There is none if it could not be made.
    let _ = fs::remove_file(&file);
    result
}

/// Waits for the persistent memory, whose devices come one after the other.
pub fn persistent_memory(guest: &Guest) -> Result<()> {
    guest.sh("modprobe -a nfit nd_pmem")?;
    guest.wait_until("test -b /dev/pmem0", Duration::from_secs(20))
}

/// Waits until a kernel that takes over from another one answers, for which `condition` holds.
pub fn taken_over(guest: &Guest, condition: &str, limit: Duration) -> Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        // What is sent while one kernel takes over from the other is lost.
        match guest.exit(condition, Duration::from_secs(5)) {
            Ok(exit) if exit.code == 0 => return Ok(()),
            result if Instant::now() >= deadline => {
                return Err(format!("no kernel takes over; last answer: {result:?}").into());
            }
            _ => std::thread::sleep(Duration::from_millis(200)),
        }
    }
}

/// Brings the VF up anew, and waits until it carries the traffic: mana resumes without an event that would take the
/// data path back, with both driver sets.
fn by_vf(link: &Link<'_>) -> Result<()> {
    let name = link.nic.vf_name();
    link.guest
        .sh(&format!("ip link set {name} down && ip link set {name} up"))?;
    let deadline = Instant::now() + VF;
    loop {
        let result = unicast(link);
        if result.is_ok() || Instant::now() >= deadline {
            return result;
        }
        std::thread::sleep(Duration::from_millis(500));
    }
}

/// How often the guest has made contact with the host.
pub fn contacts(guest: &Guest) -> Result<usize> {
    let log = fs::read_to_string(guest.folder.join("messages.log"))?;
    Ok(log.matches(" INITIATE_CONTACT ").count())
}

/// What the user can set and the driver keeps.
fn settings(guest: &Guest) -> Result<String> {
    let table = match guest.drivers() {
        // The stock driver fills the indirection table anew each time it connects.
        Drivers::C => "ethtool -x eth0 | grep -v ' [0-9]*:'",
        Drivers::Rust => "ethtool -x eth0",
    };
    guest.sh(&format!(
        "{table}; ethtool -l eth0; ethtool -g eth0; ethtool -k eth0; ethtool -n eth0 rx-flow-hash udp4; \
         cat /sys/class/net/eth0/mtu /sys/class/net/eth0/address /sys/class/net/eth0/operstate",
    ))
}

fn unchanged(guest: &Guest, before: &str) -> Result<()> {
    let after = settings(guest)?;
    let changed: Vec<_> = before
        .lines()
        .zip(after.lines())
        .filter(|(before, after)| before != after)
        .map(|(before, after)| format!("{before} -> {after}"))
        .collect();
    ensure(before == after, || changed.join("\n"))
}
