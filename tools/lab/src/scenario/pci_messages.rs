// SPDX-License-Identifier: GPL-2.0
//! What hv_pci says to the host, message by message, and how it sends interrupts to other processors.
//!
//! There is a bus with a VF for each version of the protocol, and one with other functions. Vectors are names only, which the kernel
//! chooses, and so are the messages that the host makes for interrupts. Hypercalls are made on another
//! thread than that which reads the channel.

use std::collections::BTreeMap;
use std::time::Duration;

use hyperv_wire::vpci::CreateInterruptReply;
use lab_control::PciAction;
use regex::{Captures, Regex};

use super::compare::Kept;
use super::guest::{Boot, Guest, Nic};
use super::recorder::{word, words, Device, Id, Line, Recorder, Said, Trace};
use super::suspend::contacts;
use super::vf::{bonded, BONDING};
use super::{ensure, Context, Result};

/// The name of the scenario.
pub const NAME: &str = "pci-messages";

/// A bus for each of them.
const VERSIONS: [&str; 4] = ["1.1", "1.2", "1.3", "1.4"];
/// What has been silent for so long has ended.
const QUIET: Duration = Duration::from_millis(700);
/// What an interrupt may take to come, and so to move.
const MOVE: Duration = Duration::from_secs(20);

/// The channel's name in the texts.
const CHANNEL: &str = "0";
/// The same for hypercalls.
const HYPERCALL: &str = "hypercall";
/// Processors of the guest.
const PROCESSORS: u32 = 2;
/// How the names of sections begin in which interrupts are sent to a processor.
const MOVES: &str = "interrupts to processor ";
/// The name of the hypercall.
const RETARGET: &str = "RETARGET";
/// What hv_pci says for several interrupts at once.
const SHARED_VECTOR: u8 = 32;
/// What the kernel gives an interrupt that is not yet in use.
const RESERVED_VECTOR: u8 = 0xef;

/// The interrupts of a function: what they are called, and how the driver for tests asks for them.
const VECTORS: [(&str, &str, u32); 4] = [
    ("MSI", "msi", 1),
    ("4 MSIs", "msi", 4),
    ("32 MSIs", "msi", 32),
    ("MSI-X", "msix", 3),
];

/// Differences that are to stay.
pub const KEPT: &[Kept] = &[
    Kept {
        place: "(vf|other)-1.[1-4]/(VF: probe|suspend and resume|MSI|MSI-X)",
        stock: &[
            "guest 0 CREATE_INTERRUPT[23]? vector=reserved .*",
            "guest 0 DELETE_INTERRUPT .*",
            "host  0 completion status=SUCCESS",
        ],
        ours: &[],
        why: "the kernel asks for the message of an interrupt when it allocates it, and again when it \
              gives it a vector; the stock driver has the host make it twice, ours the second time only",
    },
    Kept {
        place: "other-1.[1-4]/add( again)?",
        stock: &[],
        ours: &[
            "guest 0 RESOURCES_ASSIGNED2? .*",
            "host  0 completion status=SUCCESS",
        ],
        why: "when a function is put on a bus that is in use, the stock driver does not tell the host \
              that it has its resources; ours does, as when the bus is probed",
    },
    Kept {
        place: "other-1.[1-4]/unbind",
        stock: &[],
        ours: &["guest 0 RESOURCES_RELEASED .*"],
        why: "when a bus is removed, the stock driver has forgotten its functions by the time it would \
              tell the host that their resources are free; ours tells it, as both do before a suspend",
    },
];

pub fn run(context: &mut Context<'_>) -> Result<()> {
    let nics = VERSIONS.iter().enumerate().map(|(index, version)| Nic {
        pci: Some(version),
        ..Nic::new(index)
    });
    let bus = |number: usize| format!("e9ac9b28-{:04x}-4466-9ae3-4b849c3ee03b", 0x7a00 + number);
    let buses = VERSIONS.iter().enumerate().map(|(number, version)| {
        let functions = "slot=2,bar0=64K,msi=32,msix=3+slot=3,bar0=64K,add=later";
        format!(
            "bus={},version={version},offer=later,{functions}",
            bus(number)
        )
    });
    let guest = context.boot(&Boot {
        cpus: PROCESSORS,
        log_bytes: true,
        pci: buses.collect(),
        ..Boot::new(nics.collect())
    })?;
    let nics = guest.nics.clone();
    let count = VERSIONS.len();
    let vfs = nics
        .iter()
        .map(|nic| PciTrace::new(format!("vpci{}", nic.index), nic.bus.clone()));
    let others = (0..count).map(|number| PciTrace::new(format!("pci{number}"), bus(number)));
    let traces = vfs.chain(others).collect::<Result<_>>()?;
    let mut recorder = Recorder::new(&guest, traces, QUIET)?;
    // The traces of the VFs' buses, and of the others.
    let (vfs, others): (Vec<_>, Vec<_>) = (0..2 * count).partition(|&trace| trace < count);
    let each = |act: &dyn Fn(&Nic) -> Result<()>| nics.iter().try_for_each(act);

    // Drivers of functions come when they are told to.
    guest.sh("modprobe -a mana pci_test && echo 0 >/sys/bus/pci/drivers_autoprobe")?;
    context.check("buses are probed and scanned", || {
        recorder.action(&vfs, "probe", QUIET, || {
            each(&|nic| guest.host.add_vf(nic))?;
            each(&|nic| scanned(&guest, nic.domain(), 0))
        })
    });
    context.check("the VFs' drivers set up MSI-X", || {
        recorder.action(&vfs, "VF: probe", QUIET, || {
            each(&|nic| bind_vf(&guest, nic))
        })
    });
    context.check("interrupts move to another processor and back", || {
        for processor in [1, 0] {
            let name = format!("{MOVES}{processor}");
            recorder.action(&vfs, &name, QUIET, || send_interrupts(&guest, processor))?;
        }
        Ok(())
    });
    context.check("the machine is suspended and resumed", || {
        // Without a place for the image the devices are frozen and thawed, and that is all.
        let freeze = "echo disk >/sys/power/state 2>/dev/null";
        let before = contacts(&guest)?;
        recorder.phase(&vfs, "suspend and resume", freeze, QUIET)?;
        let new = contacts(&guest)? - before;
        ensure(new == 1, || format!("{new} new contacts with the host"))?;
        // Only now packets go by the VFs again.
        let again = |nic: usize| {
            let name = nics[nic].vf_name();
            format!("ip link set {name} down; ip link set {name} up")
        };
        recorder.phases(&vfs, "VF: down and up after resume", again, QUIET)?;
        each(&|nic| bonded(&guest, nic))?;
        let name = format!("{MOVES}1 after resume");
        recorder.action(&vfs, &name, QUIET, || send_interrupts(&guest, 1))
    });
    context.check("VFs are ejected, their buses rescinded", || {
        recorder.action(&vfs, "eject", QUIET, || each(&|nic| guest.host.eject(nic)))?;
        recorder.action(&vfs, "rescind", QUIET, || {
            each(&|nic| guest.host.rescind_vf(nic))
        })
    });
    let mut all = |name: &str, action: PciAction, there: &[usize]| {
        recorder.action(&others, name, QUIET, || {
            (0..count).try_for_each(|bus| guest.host.pci(bus, action.clone()))?;
            for (bus, slot) in (0..count).flat_map(|bus| there.iter().map(move |slot| (bus, slot)))
            {
                scanned(&guest, 0x7a00 + bus as u16, *slot)?;
            }
            Ok(())
        })
    };
    context.check("functions come, go and are ejected", || {
        all("offer", PciAction::Offer, &[2])?;
        all("add", PciAction::Add { function: 1 }, &[2, 3])?;
        all("pull", PciAction::Pull { function: 1 }, &[2])?;
        all("add again", PciAction::Add { function: 1 }, &[2, 3])?;
        all("eject one of two", PciAction::Eject { function: 1 }, &[2])
    });
    context.check(
        "MSI, several MSIs at once and MSI-X are set up and move",
        || {
            let driver = |trace: usize| {
                let function = format!("{:04x}:00:02.0", 0x7a00 + trace - count);
                format!("echo {function} >/sys/bus/pci/drivers/pci_test/bind")
            };
            recorder.phases(&others, "bind a driver", driver, QUIET)?;
            for (name, kind, vectors) in VECTORS {
                // An interrupt moves when it comes the next time.
                let to = |processor| format!("pin {processor}' 'fire 0 {vectors} 2");
                let steps = [
                    (
                        name.to_owned(),
                        format!("vectors {kind} {vectors} {vectors}"),
                    ),
                    (format!("{MOVES}1: {name}"), to(1)),
                    (format!("{MOVES}0: {name}"), to(0)),
                    (format!("{name}: free"), "free".to_owned()),
                ];
                for (step, command) in steps {
                    let command = |trace: usize| {
                        let folder = format!("{:04x}:00:02.0", 0x7a00 + trace - count);
                        format!(
                            "for c in '{command}'; do \
                             echo $c >/sys/kernel/debug/pci_test/{folder}/do || break; done"
                        )
                    };
                    recorder.phases(&others, &step, command, QUIET)?;
                }
            }
            Ok(())
        },
    );
    context.check("buses are removed and come back", || {
        for what in ["unbind", "bind"] {
            let command = |trace: usize| {
                format!(
                    "echo {} >/sys/bus/vmbus/drivers/hv_pci/{what}",
                    bus(trace - count)
                )
            };
            recorder.phases(&others, what, command, QUIET)?;
        }
        Ok(())
    });
    context.check("buses with a function are rescinded", || {
        recorder.action(&others, "rescind", QUIET, || {
            (0..count).try_for_each(|bus| guest.host.pci(bus, PciAction::Rescind))
        })
    });
    let texts = recorder.finish().collect::<Vec<_>>();
    let names = ["vf", "other"].iter();
    let names = names.flat_map(|what| VERSIONS.map(|version| format!("{what}-{version}")));
    for (name, text) in names.zip(texts) {
        context.text(&name, &text)?;
    }
    context.finish(guest)
}

/// Waits until the guest has found a function.
fn scanned(guest: &Guest, domain: u16, slot: usize) -> Result<()> {
    let path = format!("test -e /sys/bus/pci/devices/{domain:04x}:00:{slot:02x}.0/config");
    guest.wait_until(&path, BONDING)
}

/// The function on a NIC's bus, as the guest names it.
fn device(nic: &Nic) -> String {
    format!("{:04x}:00:00.0", nic.domain())
}

/// Gives a VF its driver.
fn bind_vf(guest: &Guest, nic: &Nic) -> Result<()> {
    let device = device(nic);
    guest.sh(&format!("echo {device} >/sys/bus/pci/drivers/mana/bind"))?;
    bonded(guest, nic)
}

/// Sends all interrupts of the VFs to a processor, and lets them come: they move then.
fn send_interrupts(guest: &Guest, processor: usize) -> Result<()> {
    let interrupts = guest.nics.iter().map(device);
    let interrupts = interrupts.fold(String::new(), |all, device| {
        all + &format!("/sys/bus/pci/devices/{device}/msi_irqs/* ")
    });
    let peers = guest.nics.iter().map(|nic| nic.peer_v4() + " ");
    let peers = peers.collect::<String>();
    guest.sh(&format!(
        "for i in {interrupts}; do echo {processor} >/proc/irq/${{i##*/}}/smp_affinity_list || exit 1; done"
    ))?;
    let moved = format!(
        "for p in {peers}; do ping -q -c 1 -W 1 $p; for n in 1 2 3 4 5 6 7 8; do \
         bash -c \"echo >/dev/udp/$p/9\"; done; done; \
         for i in {interrupts}; do \
         [ $(cat /proc/irq/${{i##*/}}/effective_affinity_list) = {processor} ] || exit 1; done"
    );
    guest.wait_until(&format!("({moved})"), MOVE)
}

/// What a bus and its host have said to each other.
struct PciTrace {
    channel: String,
    device: Device,
    said: Said,
    /// How many interrupts the messages that the host has made are for, by the first one's data.
    made: BTreeMap<u32, u16>,
    /// Stands for the data of such a message.
    data: Regex,
    /// Stands for a set of processors.
    processors: Regex,
}

impl Trace for PciTrace {
    fn take(&mut self, line: &Line<'_>) -> Result<bool> {
        if line.channel == "vmbus" {
            return self.device.take(line, &mut self.said);
        }
        if line.channel != self.channel {
            return Ok(false);
        }
        if line.is_from_guest() {
            self.guest_message(line);
        } else if line.is_from_host() {
            if let Ok(Ok(interrupt)) = CreateInterruptReply::parse(&line.bytes) {
                self.made.insert(interrupt.data(), interrupt.vector_count());
            }
            let text = line.host_text(CHANNEL)?;
            let text = text.split(" address=").next().unwrap_or_default();
            self.said.from_host.push(text.to_owned());
        } else if line.name == "refused" {
            self.said.from_host.push(format!("host  {CHANNEL} refused"));
        } else {
            return Ok(false);
        }
        Ok(true)
    }

    fn said(&mut self) -> &mut Said {
        &mut self.said
    }

    fn complete(&mut self, section: &str) {
        let moves = section.starts_with(MOVES);
        if moves {
            // On its way an interrupt may come once more where it was.
            if let Some(lines) = self.said.from_guest.get_mut(HYPERCALL) {
                let mut last = BTreeMap::new();
                for line in lines.drain(..) {
                    let data = self.data.find(&line).map(|found| found.as_str().to_owned());
                    last.insert(data, line);
                }
                lines.extend(last.into_values());
            }
        }
        for line in self.said.from_guest.values_mut().flatten() {
            // The guest may use a message before the log has the host's answer.
            let named = self.data.replace_all(line, |found: &Captures<'_>| {
                let data: u32 = found[1].parse().unwrap_or_default();
                match self.made.range(..=data).next_back() {
                    Some((_, 1)) => "<message>".to_owned(),
                    Some((first, &count)) if data - first < count.into() => {
                        format!("<message {} of {count}>", data - first + 1)
                    }
                    _ => format!("<unknown message {data:#x}>"),
                }
            });
            // Usually the kernel chooses.
            let named = self.processors.replace_all(&named, |found: &Captures<'_>| {
                match found[1].parse::<u32>() {
                    Ok(set) if moves || !set.is_power_of_two() => format!("<processors {set:#x}>"),
                    _ => "<a processor>".to_owned(),
                }
            });
            *line = named.into_owned();
        }
    }

    fn into_said(self) -> Said {
        self.said
    }
}

/// The ids in the guest's messages.
fn ids(name: &str, bytes: &[u8]) -> &'static [Id] {
    match name {
        "BUS_D0_ENTRY" => &[(8, "window"), (12, "window")],
        "CREATE_INTERRUPT2" => &[(12, "list")],
        "CREATE_INTERRUPT3" => &[(16, "list")],
        "DELETE_INTERRUPT" => &[(12, "data")],
        RETARGET => match word(bytes, 44) {
            // A set in banks, of which there is one.
            Some(2) => &[(28, "data"), (40, "vector"), (64, "processors")],
            _ => &[(28, "data"), (40, "vector"), (48, "processors")],
        },
        _ => &[],
    }
}

impl PciTrace {
    fn new(channel: String, instance: String) -> Result<Self> {
        Ok(Self {
            channel,
            device: Device::new(instance),
            said: Said::default(),
            made: BTreeMap::new(),
            data: Regex::new("<data ([0-9]+)>")?,
            processors: Regex::new("<processors ([0-9]+)>")?,
        })
    }

    fn guest_message(&mut self, line: &Line<'_>) {
        let name = line.name;
        let mut bytes = line.bytes.clone();
        let mut fields = String::new();
        // The vector has one byte or four.
        let vector = match name {
            "CREATE_INTERRUPT" | "CREATE_INTERRUPT2" => bytes.get_mut(8..9),
            "CREATE_INTERRUPT3" => bytes.get_mut(8..12),
            _ => None,
        };
        if let Some(vector) = vector {
            fields = match vector {
                [SHARED_VECTOR, 0, 0, 0] | [SHARED_VECTOR] => " vector=shared".to_owned(),
                [RESERVED_VECTOR, 0, 0, 0] | [RESERVED_VECTOR] => " vector=reserved".to_owned(),
                [_, 0, 0, 0] | [_] => " vector=any".to_owned(),
                _ => format!(" vector={vector:x?}"),
            };
            vector.fill(0);
        }
        for field in ["completion=", "status="] {
            if let Some((_, value)) = line.fields.rsplit_once(field) {
                let value = value.split_whitespace().next().unwrap_or_default();
                fields += &format!(" {field}{value}");
            }
        }
        let channel = match name {
            RETARGET => HYPERCALL,
            _ => CHANNEL,
        };
        let mut text = format!("guest {channel} {name}{fields} {} bytes:", bytes.len());
        words(&mut text, &bytes, ids(name, &bytes), |kind, value| {
            // How many processors, and the first.
            let list = (value & 0xffff, value >> 16);
            match (kind, list) {
                ("data" | "processors", _) => format!("<{kind} {value}>"),
                ("list", (1, 0..PROCESSORS)) => "<a processor>".to_owned(),
                ("list", _) => format!("<processors {list:?}>"),
                (kind, _) => self.device.name(kind, value),
            }
        });
        self.said.guest(channel, text);
    }
}
