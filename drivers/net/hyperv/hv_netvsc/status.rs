// SPDX-License-Identifier: GPL-2.0

//! What debugfs shows of a device: what was negotiated, what is going on, what has happened.

use core::pin::Pin;

use kernel::{
    prelude::*,
    seq_file::SeqFile,
    seq_print,
    str::CString,
    sync::{
        atomic::Relaxed,
        rcu,
        Arc, //
    },
    time::{
        Delta,
        Instant,
        Monotonic, //
    }, //
};
use net::{
    debugfs::{
        Dir,
        File,
        Show, //
    },
    Device,
    DeviceRef,
    Features,
    RcuSlot, //
};

use crate::{
    connection::Shared,
    device::Netvsc, //
};

/// Something that took some time.
#[derive(Clone, Copy)]
struct Event {
    what: &'static str,
    cause: &'static str,
    end: Instant<Monotonic>,
    took: Delta,
    result: i32,
}

/// Something that happens now and then.
#[derive(Clone, Copy, Default)]
struct Kind {
    count: u64,
    failed: u64,
    last: Option<Event>,
    /// The longest time it took, in microseconds.
    longest: i64,
}

impl Kind {
    fn note(&mut self, event: Event) {
        self.count += 1;
        if event.result != 0 {
            self.failed += 1;
        }
        self.longest = self.longest.max(event.took.as_micros_ceil());
        self.last = Some(event);
    }

    fn show(&self, to: &SeqFile, name: &str) {
        seq_print!(to, "{}: {}\n", name, self.count);
        seq_print!(to, "{} failed: {}\n", name, self.failed);
        if let Some(last) = &self.last {
            let ago = last.end.elapsed().as_millis();
            seq_print!(
                to,
                "{} last: {}, {}, {}.{:03} s ago, took {} us, result {}\n",
                name,
                last.what,
                last.cause,
                ago / 1000,
                ago % 1000,
                last.took.as_micros_ceil(),
                last.result
            );
            seq_print!(to, "{} longest: {} us\n", name, self.longest);
        }
    }
}

/// What has happened to a device.
#[derive(Default)]
pub(crate) struct History {
    to_vf: u64,
    to_synthetic: u64,
    switches: Kind,
    connections: Kind,
}

/// Does something and measures it.
fn timed(work: impl FnOnce() -> Result) -> (Result, Delta) {
    let start = Instant::<Monotonic>::now();
    let result = work();
    (result, start.elapsed())
}

/// Switches the data path, and notes that.
pub(crate) fn switching(
    dev: &Device<Netvsc>,
    to_vf: bool,
    cause: &'static str,
    work: impl FnOnce() -> Result,
) -> Result {
    let (result, took) = timed(work);
    let mut history = dev.data().history.lock();
    match (result, to_vf) {
        (Ok(()), true) => history.to_vf += 1,
        (Ok(()), false) => history.to_synthetic += 1,
        (Err(_), _) => {}
    }
    history.switches.note(Event {
        what: if to_vf {
            "to the VF"
        } else {
            "to the synthetic path"
        },
        cause,
        end: Instant::now(),
        took,
        result: result.map_or_else(|e| e.to_errno(), |()| 0),
    });
    result
}

/// Makes the connection anew, and notes that.
pub(crate) fn reconnecting(
    dev: &Device<Netvsc>,
    cause: &'static str,
    work: impl FnOnce() -> Result,
) -> Result {
    let (result, took) = timed(work);
    dev.data().history.lock().connections.note(Event {
        what: "made anew",
        cause,
        end: Instant::now(),
        took,
        result: result.map_or_else(|e| e.to_errno(), |()| 0),
    });
    result
}

/// The folder of this module in debugfs, while there is one.
static FOLDER: RcuSlot<Arc<Dir>> = RcuSlot::new();

/// Keeps the folder until it is dropped.
pub(crate) struct FolderInUse;

impl FolderInUse {
    /// Makes the folder.
    pub(crate) fn new() -> Self {
        // Without memory nothing can be seen, and that is all.
        FOLDER.replace(Arc::new(Dir::new(c"hv_netvsc", None), GFP_KERNEL).ok());
        Self
    }
}

impl Drop for FolderInUse {
    fn drop(&mut self) {
        FOLDER.replace(None);
    }
}

/// The files of a device.
pub(crate) struct Files {
    // Before its folder.
    _status: Pin<KBox<File<Status>>>,
    _folder: Dir,
}

impl Files {
    /// Makes them, in a folder named by the device's GUID.
    pub(crate) fn new(dev: &Device<Netvsc>) -> Result<Self> {
        let top = FOLDER.get().ok_or(ENODEV)?;
        let name = CString::try_from_fmt(fmt!("{}", net::Shown(dev.data().hv.instance())))?;
        let folder = Dir::new(&name, Some(&top));
        let status = KBox::pin_init(
            File::new(&folder, c"status", Status(dev.to_ref())),
            GFP_KERNEL,
        )?;
        Ok(Self {
            _status: status,
            _folder: folder,
        })
    }
}

/// The file `status` of a device.
pub(crate) struct Status(pub(crate) DeviceRef<Netvsc>);

impl Show for Status {
    fn show(&self, to: &SeqFile) {
        let dev = &*self.0;
        let data = dev.data();
        seq_print!(to, "interface: {}\n", dev.name());
        let vmbus = vmbus::protocol_version().0;
        seq_print!(to, "vmbus version: {}.{}\n", vmbus >> 16, vmbus & 0xffff);

        let bond = &data.bond;
        let path = if bond.data_path_is_vf.load(Relaxed) {
            "VF"
        } else {
            "synthetic"
        };
        seq_print!(to, "data path: {}\n", path);
        match bond.association() {
            Some(serial) => seq_print!(to, "vf serial: {}\n", serial),
            None => seq_print!(to, "vf serial: none\n"),
        }
        match bond.vf.get() {
            Some(vf) => {
                let running = if vf.is_running() { "up" } else { "down" };
                let carrier = if vf.has_carrier() {
                    "carrier"
                } else {
                    "no carrier"
                };
                seq_print!(to, "vf: {}, {}, {}\n", vf.name(), running, carrier);
            }
            None => seq_print!(to, "vf: none\n"),
        }

        let history = data.history.lock();
        let (to_vf, to_synthetic) = (history.to_vf, history.to_synthetic);
        let (switches, connections) = (history.switches, history.connections);
        drop(history);
        switches.show(to, "switches");
        seq_print!(to, "switches to VF: {}\n", to_vf);
        seq_print!(to, "switches to synthetic: {}\n", to_synthetic);
        connections.show(to, "reconnects");
        let recovery = data.recovery.lock();
        let (timeouts, recovered) = (recovery.timeouts, recovery.recovered);
        drop(recovery);
        seq_print!(to, "transmit timeouts: {}\n", timeouts);
        seq_print!(to, "transmit recoveries: {}\n", recovered);

        match data.shared.get() {
            Some(shared) => connection(to, dev, &shared),
            None => seq_print!(to, "connection: none\n"),
        }
    }
}

/// Shows what was negotiated and how full everything is.
fn connection(to: &SeqFile, dev: &Device<Netvsc>, shared: &Shared) {
    seq_print!(to, "connection: open\n");
    let version = shared.version();
    let (major, minor) = version.ndis_version();
    seq_print!(to, "nvsp version: {:#x}\n", version.0);
    // The minor version is written with five digits, as NDIS has it.
    seq_print!(to, "ndis version: {}.{}\n", major, minor);
    {
        let guard = rcu::read_lock();
        if let Some(recv) = shared.recv.borrow(&guard) {
            seq_print!(
                to,
                "receive buffer: {} sections of {} bytes\n",
                recv.sections,
                recv.section_size
            );
        }
        if let Some(send) = shared.send.borrow(&guard) {
            seq_print!(
                to,
                "send buffer: {} sections of {} bytes, {} in use\n",
                send.sections,
                send.section_size,
                send.in_use()
            );
        }
    }
    seq_print!(
        to,
        "packets per message: {}\n",
        shared.rndis.max_packets.load(Relaxed)
    );
    seq_print!(
        to,
        "packet alignment: {}\n",
        shared.rndis.alignment.load(Relaxed)
    );
    let checksums = dev.data().tx_checksums.load(Relaxed);
    seq_print!(to, "transmit checksums:");
    for (bit, name) in ["tcp4", "udp4", "tcp6", "udp6"].into_iter().enumerate() {
        if checksums & (1 << bit) != 0 {
            seq_print!(to, " {}", name);
        }
    }
    seq_print!(to, "\nlarge send: {}\n", shared.gso_max.load(Relaxed));
    let lro = dev.features().contains(Features::LRO);
    seq_print!(
        to,
        "receive coalescing: {}\n",
        if lro { "on" } else { "off" }
    );
    let link = if shared.link_down.load(Relaxed) {
        "down"
    } else {
        "up"
    };
    seq_print!(to, "link: {}\n", link);
    seq_print!(to, "queues offered: {}\n", shared.max_queues.load(Relaxed));
    seq_print!(to, "queues: {}\n", shared.num_queues());
    seq_print!(
        to,
        "channel relid cpu send_free_percent recv_bytes in_flight owed stopped\n"
    );
    for (index, queue) in shared.queues.iter().enumerate() {
        let Some(channel) = queue.channel() else {
            continue;
        };
        let Ok(ring) = channel.ring() else {
            continue;
        };
        let (cpu, free, bytes) = (
            ring.target_cpu(),
            ring.write_space_percent(),
            ring.bytes_to_read(),
        );
        drop(ring);
        seq_print!(
            to,
            "{} {} {} {} {} {} {} {}\n",
            index,
            channel.relid(),
            cpu,
            free,
            bytes,
            queue.tx.in_flight(),
            queue.owed.load(Relaxed),
            u8::from(dev.is_queue_blocked(index as u16))
        );
    }
}
