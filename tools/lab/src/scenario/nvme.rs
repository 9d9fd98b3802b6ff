// SPDX-License-Identifier: GPL-2.0
//! Scenario `nvme`: an NVMe disk on a virtual PCI bus, as Azure's VMs have it.

use std::time::Duration;

use lab_agent::client::Running;
use lab_control::PciAction;
use serde_json::Value;

use super::ending::no_resources;
use super::guest::{Boot, Guest};
use super::{ensure, eventually, Context, Drivers, Result};

/// Processors of the guest, each of which gets a queue.
const CPUS: u32 = 3;
/// Size of the disk in MiB.
const SIZE: u64 = 96;
/// What each processor has of the disk for random writes, in MiB.
const REGION: u64 = 16;
/// Where there is data that must outlive everything, in MiB, and how much.
const KEPT_AT: u64 = 64;
const KEPT: u64 = 8;
/// The instance of the bus; the domain is made of its third word.
const BUS: &str = "e9ac9b28-5a4e-4466-9ae3-4b849c3ee03b";
const ADDRESS: &str = "5a4e:00:00.0";
/// Serial number of the function, which names its slot.
const SERIAL: u32 = 23;
/// When nvme looks why a command is not complete, also one of a disk that is gone.
const TIMEOUT: Duration = Duration::from_secs(15);
/// Until a disk has come or gone.
const DEADLINE: Duration = Duration::from_secs(30);
/// For what fio does in one go.
const FIO: Duration = Duration::from_secs(120);
/// How long fio runs at most beside other things.
const LOAD: Duration = Duration::from_secs(240);
/// Resets under load.
const RESETS: u64 = 3;

pub fn run(context: &mut Context<'_>) -> Result<()> {
    let guest = context.boot(&Boot {
        cpus: CPUS,
        pci: vec![format!(
            "bus={BUS},kind=nvme,size={SIZE}M,queues=8,serial={SERIAL}"
        )],
        append: format!("nvme_core.io_timeout={}", TIMEOUT.as_secs()),
        ..Boot::new(Vec::new())
    })?;
    let disk = Disk { guest: &guest };
    context.check("the disk is there, with its domain, slot and size", || {
        disk.present()
    });
    context.check("each processor has a queue and its interrupt", || {
        disk.queues().map(drop)
    });
    context.check(
        "fio on all queues: every block read back, guest and host agree",
        || disk.random(),
    );
    context.check("transfers of 1 MiB, data for later", || disk.write_kept());
    context.check("discarded blocks are zeros", || disk.discard());

    context.check("the admin interrupt follows its affinity", || {
        disk.admin_interrupt()
    });
    let load = disk.load()?;
    context.check("processors go and come under fio, queues with them", || {
        disk.hotplug()
    });
    context.check(
        &format!("the controller is reset {RESETS} times under fio"),
        || disk.reset("class/nvme/*/reset_controller", RESETS),
    );
    context.check("function-level reset under fio", || {
        guest.sh(&format!(
            "echo flr >/sys/bus/pci/devices/{ADDRESS}/reset_method"
        ))?;
        disk.reset(&format!("bus/pci/devices/{ADDRESS}/reset"), 1)
    });
    context.check("fio lived through it, every block read back", || {
        unharmed(load)
    });

    context.check("removed and found again by sysfs", || {
        guest.sh(&format!("echo 1 >/sys/bus/pci/devices/{ADDRESS}/remove"))?;
        disk.absent()?;
        no_interrupts(&guest)?;
        guest.sh("echo 1 >/sys/bus/pci/rescan")?;
        disk.kept()
    });
    context.check("ejected under fio, and put on the bus again", || {
        disk.lost(|| guest.host.pci(0, PciAction::Eject { function: 0 }))?;
        guest.host.pci(0, PciAction::Add { function: 0 })?;
        if guest.drivers() == Drivers::C {
            // The stock driver gives a function that comes later neither resources nor a driver.
            let there = format!("[ -e /sys/bus/pci/devices/{ADDRESS} ]");
            guest.wait_until(&there, DEADLINE)?;
            guest.sh("echo 1 >/sys/bus/pci/rescan")?;
        }
        disk.kept()
    });
    // The stock driver keeps a function that is missing in new relations.
    if guest.drivers() == Drivers::Rust {
        context.check("pulled off the bus under fio, and put there again", || {
            disk.lost(|| guest.host.pci(0, PciAction::Pull { function: 0 }))?;
            guest.host.pci(0, PciAction::Add { function: 0 })?;
            disk.kept()
        });
    }
    context.check("the bus is rescinded under fio, and offered again", || {
        disk.lost(|| guest.host.pci(0, PciAction::Rescind))?;
        guest.host.pci(0, PciAction::Offer)?;
        disk.kept()
    });
    context.check(
        "the bus's driver is unbound under fio, and bound again",
        || {
            let write =
                |what| guest.sh(&format!("echo {BUS} >/sys/bus/vmbus/drivers/hv_pci/{what}"));
            disk.lost(|| write("unbind").map(drop))?;
            no_resources(&guest)?;
            write("bind")?;
            disk.kept()
        },
    );
    context.check("no interrupt was lost: no command timed out", || {
        let late = guest.dmesg("nvme nvme.*(timeout|polled|Abort)")?;
        ensure(late.is_empty(), || late.join("\n"))
    });
    context.finish(guest)
}

/// Checks that the guest has no interrupt of the host's.
fn no_interrupts(guest: &Guest) -> Result<()> {
    eventually(DEADLINE, "all interrupts are given back", || {
        Ok(guest.host.counters()?["pci0.interrupts.live"] == 0)
    })
}

/// An interrupt of the disk.
#[derive(Debug)]
struct Interrupt {
    /// Number, as in `/proc/irq`.
    number: u32,
    /// Queue; 0 is that of the admin commands.
    queue: u32,
    /// How often each processor had it.
    counts: Vec<u64>,
}

/// The disk's interrupts in the text of `/proc/interrupts`, whose first line names the processors.
fn interrupts(text: &str) -> Vec<Interrupt> {
    let processors = text.lines().next().unwrap_or_default();
    let processors = processors.split_whitespace().count();
    let all = text.lines().filter_map(|line| {
        let (_, queue) = line.rsplit_once("nvme")?;
        let (_, queue) = queue.split_once('q')?;
        let mut words = line.split_whitespace();
        Some(Interrupt {
            number: words.next()?.trim_end_matches(':').parse().ok()?,
            queue: queue.trim().parse().ok()?,
            counts: words
                .take(processors)
                .filter_map(|word| word.parse().ok())
                .collect(),
        })
    });
    all.collect()
}

/// What a run of fio has done.
#[derive(Debug, Default)]
struct Done {
    read: u64,
    written: u64,
    error: i64,
}

/// The disk in the guest.
struct Disk<'a> {
    guest: &'a Guest,
}

impl Disk<'_> {
    /// Where the disk is in sysfs; the controller may be called otherwise when it comes again.
    fn find(&self) -> Result<String> {
        let pattern = format!("/sys/bus/pci/devices/{ADDRESS}/nvme/nvme*/nvme*n1/size");
        self.guest
            .wait_until(&format!("grep -q '^[1-9]' {pattern}"), DEADLINE)?;
        let path = self.guest.sh(&format!("ls {pattern}"))?;
        let name = path.trim().rsplit('/').nth(1);
        Ok(name.ok_or("no disk")?.to_owned())
    }

    fn present(&self) -> Result<()> {
        let guest = self.guest;
        let name = self.find()?;
        let text = guest.sh("lspci -D -n -k")?;
        let want = format!("{ADDRESS} 0108: 1414:b111 (rev 01)");
        ensure(
            text.lines().filter(|line| line.contains(':')).count() >= 2
                && text.starts_with(&want)
                && text.contains("driver in use: nvme"),
            || text.clone(),
        )?;
        let slot = guest.sh(&format!("cat /sys/bus/pci/slots/{SERIAL}/address"))?;
        ensure(ADDRESS.starts_with(slot.trim()), || {
            format!("slot {SERIAL} is {slot}")
        })?;
        let blocks = guest.sh(&format!("cat /sys/block/{name}/size"))?;
        ensure(blocks.trim() == (SIZE * 2048).to_string(), || {
            format!("{blocks} blocks")
        })?;
        let text = guest.sh(&format!("cat /sys/block/{name}/device/serial"))?;
        ensure(text.trim() == format!("00155D00{SERIAL:08X}"), || text)
    }

    /// Waits until the disk is gone.
    fn absent(&self) -> Result<()> {
        let gone = format!("! [ -e /sys/bus/pci/devices/{ADDRESS} ] && ! ls /sys/block/nvme*");
        self.guest.wait_until(&gone, DEADLINE)
    }

    /// The interrupts of all queues.
    fn interrupts(&self) -> Result<Vec<Interrupt>> {
        Ok(interrupts(&self.guest.sh("cat /proc/interrupts")?))
    }

    /// Checks that each processor has the interrupt of one queue; gives those.
    fn queues(&self) -> Result<Vec<Interrupt>> {
        let text = self
            .guest
            .sh("cat /proc/interrupts; grep -H . /proc/irq/*/effective_affinity_list")?;
        let all = interrupts(&text);
        let (admin, mut queues): (Vec<_>, Vec<_>) = all.into_iter().partition(|i| i.queue == 0);
        ensure(admin.len() == 1 && queues.len() == CPUS as usize, || {
            format!("interrupts are {admin:?} and {queues:?}")
        })?;
        queues.sort_by_key(|interrupt| interrupt.queue);
        let served = queues.iter().filter_map(|interrupt| {
            let file = format!("/proc/irq/{}/effective_affinity_list:", interrupt.number);
            text.lines().find_map(|line| line.strip_prefix(&file))
        });
        let mut served: Vec<_> = served.collect();
        served.sort_unstable();
        let wanted: Vec<_> = (0..CPUS).map(|cpu| cpu.to_string()).collect();
        ensure(served == wanted, || format!("interrupts go to {served:?}"))?;
        Ok(queues)
    }

    /// The command line of fio.
    fn fio(&self, options: &str) -> Result<String> {
        Ok(format!(
            "exec fio --name=disk --filename=/dev/{} --direct=1 --ioengine=libaio --thread --group_reporting \
             --output-format=json --verify_state_save=0 {options}",
            self.find()?
        ))
    }

    fn run(&self, options: &str) -> Result<Done> {
        let text = self.guest.sh_within(&self.fio(options)?, FIO)?;
        let done = report(&text)?;
        ensure(done.error == 0, || text)?;
        Ok(done)
    }

    /// Random writes from all processors, each to its own region, read back and compared.
    fn random(&self) -> Result<()> {
        let name = |what: &str| format!("pci0.0.{what}");
        let counters = || self.guest.host.counters();
        let before = (self.queues()?, counters()?);
        let done = self.run(&format!(
            "--rw=randwrite --bsrange=512-32k --bs_unaligned=0 --iodepth=8 --fsync=64 --numjobs={CPUS} \
             --cpus_allowed=0-{} --cpus_allowed_policy=split --size=2M --offset_increment={REGION}M --verify=crc32c",
            CPUS - 1
        ))?;
        let after = (self.queues()?, counters()?);
        let grown = |what: &str| after.1[&name(what)] - before.1[&name(what)];
        let bytes = u64::from(CPUS) << 21;
        ensure(
            (done.written, grown("written_bytes")) == (bytes, bytes)
                && (done.read, grown("read_bytes")) == (bytes, bytes),
            || {
                let host = (grown("written_bytes"), grown("read_bytes"));
                format!("{done:?}, the host has {host:?}, {bytes} are wanted")
            },
        )?;
        ensure(grown("flushes") > 0, || "no block was flushed".into())?;
        for (before, after) in before.0.iter().zip(&after.0) {
            let grown: Vec<_> = after
                .counts
                .iter()
                .zip(&before.counts)
                .map(|(after, before)| after - before)
                .collect();
            let one = grown.iter().filter(|&&count| count > 0).count() == 1;
            ensure(one, || {
                format!("queue {} interrupted {grown:?} times", after.queue)
            })?;
        }
        Ok(())
    }

    /// Data that is compared whenever the disk was away.
    fn write_kept(&self) -> Result<()> {
        let done = self.run(&format!("--rw=write {}", kept()))?;
        // fio has read it back, too.
        let whole = (KEPT << 20, KEPT << 20);
        ensure((done.written, done.read) == whole, || format!("{done:?}"))
    }

    /// Checks that the data is there once the disk is.
    fn kept(&self) -> Result<()> {
        self.find()?;
        self.queues()?;
        let done = self.run(&format!("--rw=read {}", kept()))?;
        ensure(done.read == KEPT << 20, || format!("{done:?}"))
    }

    fn discard(&self) -> Result<()> {
        let before = self.guest.host.counters()?["pci0.0.zeroes"];
        let name = self.find()?;
        self.guest.sh(&format!(
            "blkdiscard -o {} -l {} /dev/{name}",
            1 << 20,
            2 << 20
        ))?;
        let zeros = format!(
            "dd if=/dev/{name} bs=1M skip=1 count=2 iflag=direct 2>/dev/null | tr -d '\\0' | wc -c"
        );
        let other = self.guest.sh(&zeros)?;
        ensure(other.trim() == "0", || {
            format!("{other} bytes are not zero")
        })?;
        let after = self.guest.host.counters()?["pci0.0.zeroes"];
        ensure(after > before, || "the host has discarded nothing".into())
    }

    /// Starts random writes that are read back, until they are stopped.
    fn load(&self) -> Result<Running<'_>> {
        let command = self.fio(&format!(
            "--rw=randwrite --bs=4k --iodepth=4 --rate_iops=200 --numjobs={CPUS} --size=1M --offset_increment={REGION}M --verify=crc32c \
             --verify_backlog=32 --time_based --runtime={}",
            LOAD.as_secs()
        ))?;
        let running = self.guest.start(&command, LOAD + DEADLINE)?;
        // It has begun to write when the host has seen that.
        let written = || -> Result<u64> { Ok(self.guest.host.counters()?["pci0.0.writes"]) };
        let before = written()?;
        eventually(DEADLINE, "fio writes", || Ok(written()? > before + 20))?;
        Ok(running)
    }

    /// Does something while fio writes that takes its disk away: it ends, with an error.
    fn lost(&self, act: impl FnOnce() -> Result<()>) -> Result<()> {
        let running = self.load()?;
        let acted = act();
        let exit = if acted.is_ok() {
            running.wait()?
        } else {
            running.stop()?
        };
        acted?;
        let text = format!("{}{}", exit.stdout, exit.stderr);
        ensure(
            exit.code != 0 && !exit.timed_out && report(&text)?.error != 0,
            || format!("fio ended with {}\n{text}", exit.code),
        )?;
        self.absent()
    }

    /// The admin queue's interrupt goes from processor to processor.
    fn admin_interrupt(&self) -> Result<()> {
        let all = self.interrupts()?;
        let admin = all.iter().find(|interrupt| interrupt.queue == 0);
        let number = admin.ok_or("no admin interrupt")?.number;
        for cpu in [CPUS as usize - 1, 0] {
            self.guest
                .sh(&format!("echo {cpu} >/proc/irq/{number}/smp_affinity_list"))?;
            // The namespaces are looked for with admin commands.
            let command = "cat /proc/interrupts; for c in /sys/class/nvme/*; do echo 1 >$c/rescan_controller; done; \
                           sleep 0.2; cat /proc/interrupts";
            let mut last = String::new();
            eventually(DEADLINE, "it has moved", || {
                let text = self.guest.sh(command)?;
                let mut counts = interrupts(&text)
                    .into_iter()
                    .filter(|interrupt| interrupt.queue == 0)
                    .map(|interrupt| interrupt.counts);
                let (Some(before), Some(after)) = (counts.next(), counts.next()) else {
                    return Err(text.into());
                };
                last = format!("processor {cpu} wanted: {before:?} then {after:?}");
                let mut pairs = before.iter().zip(&after).enumerate();
                Ok(pairs.all(|(n, (before, after))| (n == cpu) == (after > before)))
            })
            .map_err(|error| format!("{error}: {last}"))?;
        }
        Ok(())
    }

    /// Each processor but the first goes and comes again, and its queue's interrupt with it.
    fn hotplug(&self) -> Result<()> {
        for cpu in 1..CPUS as usize {
            let online = format!("/sys/devices/system/cpu/cpu{cpu}/online");
            self.guest.sh(&format!("echo 0 >{online}"))?;
            self.progress()?;
            self.guest.sh(&format!("echo 1 >{online}"))?;
            self.progress()?;
            let before = self.queues()?;
            eventually(DEADLINE, "its queue interrupts again", || {
                let mut after = self.interrupts()?;
                after.retain(|interrupt| interrupt.queue > 0);
                after.sort_by_key(|interrupt| interrupt.queue);
                Ok(before
                    .iter()
                    .zip(&after)
                    .any(|(before, after)| after.counts[cpu] > before.counts[cpu]))
            })?;
        }
        Ok(())
    }

    /// Waits until fio has gone on.
    fn progress(&self) -> Result<()> {
        let reads = || -> Result<u64> { Ok(self.guest.host.counters()?["pci0.0.reads"]) };
        let before = reads()?;
        eventually(DEADLINE, "fio goes on", || Ok(reads()? > before + 50))
    }

    /// Resets the controller by a file in sysfs.
    fn reset(&self, file: &str, times: u64) -> Result<()> {
        let enabled = || -> Result<u64> { Ok(self.guest.host.counters()?["pci0.0.enabled"]) };
        let before = enabled()?;
        for _ in 0..times {
            self.guest
                .sh(&format!("for f in /sys/{file}; do echo 1 >$f; done"))?;
            self.progress()?;
        }
        let after = enabled()?;
        ensure(after == before + times, || {
            format!("the controller was enabled {} times", after - before)
        })?;
        self.queues().map(drop)
    }
}

/// Ends fio, which must not have noticed anything.
fn unharmed(load: Running<'_>) -> Result<()> {
    let exit = load.stop()?;
    let text = format!("{}{}", exit.stdout, exit.stderr);
    let done = report(&text)?;
    let good = done.error == 0 && done.read > 0 && !text.contains("verify:");
    ensure(good, || text)
}

/// Options for the data that is kept.
fn kept() -> String {
    format!("--bs=1M --offset={KEPT_AT}M --size={KEPT}M --verify=crc32c")
}

/// What fio printed.
fn report(text: &str) -> Result<Done> {
    // Messages come before and after.
    let json = text.find('{').and_then(|start| {
        let mut values = serde_json::Deserializer::from_str(&text[start..]).into_iter::<Value>();
        values.next()?.ok()
    });
    let json = json.ok_or_else(|| format!("fio: no report but '{}'", text.trim()))?;
    let job = &json["jobs"][0];
    let bytes = |way: &str| job[way]["io_bytes"].as_u64().unwrap_or(0);
    Ok(Done {
        read: bytes("read"),
        written: bytes("write"),
        error: job["error"].as_i64().unwrap_or(-1),
    })
}
