// SPDX-License-Identifier: GPL-2.0
//! A NIC with its switch port, its peer's network namespace, and its VF.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use hyperv_wire::{nvsp, rndis, vpci::SlotNumber};
use lab_control::{DataPath, Fault, Kind, NicStatus, Setting, VfStatus};
use mana::{ManaVf, VfOptions};
use netvsp::{FaultAction, FaultPoint, Nic, Raw, SwitchPort, Uplink};
use vmbus_host::{Counters, Direction, MessageLog, Platform, VmbusHost};
use vmm::Machine;
use vpci::VpciDevice;

use super::bus::{released, usual_instance, BusMaker, EJECT};
use super::options::{nvsp_name, vpci_name, HostArgs, Spec, Vf as VfWish};
use super::Devices;

/// What the driver of the synthetic device may take to be told of its VF.
const TELL: Duration = Duration::from_secs(5);
/// First version of NVSP in which a driver can be told of a VF.
const FIRST_WITH_ASSOCIATION: nvsp::Version = nvsp::Version::V4;
/// How late a delayed answer to a switch of the data path comes.
const DATA_PATH_DELAY: Duration = Duration::from_secs(3);
/// Queues of a VF if nothing else is said.
const VF_QUEUES: u16 = 16;
/// Mbit/s that the VF says it has.
const VF_SPEED: u32 = 100_000;
/// The first NIC's address if nothing else is said, of a block that Azure uses.
const MAC: [u8; 6] = [0x00, 0x0d, 0x3a, 0xf5, 0x76, 0x00];
/// The tap in the peer's network namespace.
const TAP: &str = "peer";
/// The bridge there, when NICs share a network.
const BRIDGE: &str = "lan";
/// What the ports of the bridge let through: the largest frames that a guest is likely to be set up for.
const BRIDGE_MTU: &str = "9216";
/// Where network namespaces have their names.
const NAMESPACES: &str = "/run/netns";
/// What a command in the peer's namespace may take.
const PEER_COMMAND: Duration = Duration::from_secs(100);

/// A NIC.
pub struct LabNic {
    nic: Arc<Nic>,
    offered: AtomicBool,
    peer: Peer,
    serial: u32,
    /// The serial number that the VF itself says.
    slot: u32,
    vf_options: VfOptions,
    vf_at_boot: bool,
    bus: BusMaker,
    bus_host: Arc<VmbusHost>,
    log: Arc<MessageLog>,
    counters: Arc<Counters>,
    vf: Mutex<VfState>,
}

/// The VF of a NIC.
#[derive(Default)]
struct VfState {
    /// The bus and what is on it, while it is offered.
    present: Option<Vf>,
    /// The VF is to be offered as soon as the NIC's driver knows what it is for.
    wanted: bool,
    /// Link of the VF, also of the next one.
    link_down: bool,
}

struct Vf {
    device: Arc<VpciDevice>,
    function: Arc<ManaVf>,
}

/// The only function of a bus: where Azure has it for MANA.
fn slot() -> SlotNumber {
    SlotNumber::new(0, 0)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl LabNic {
    /// Makes a NIC and its peer's network namespace. Nothing is offered yet.
    pub(super) fn new(
        number: usize,
        spec: Spec,
        args: &HostArgs,
        machine: &Arc<Machine>,
        devices: &Devices,
    ) -> Result<Self, String> {
        let name = format!("net{number}");
        let failed = |error: std::io::Error| format!("{name}: {error}");
        let mac = spec.mac.unwrap_or_else(|| {
            let mut mac = MAC;
            mac[5] = number as u8;
            mac
        });
        let mut config = netvsp::Config::new(&name, mac);
        config.max_version = spec.nvsp.unwrap_or(args.nvsp_version());
        if let Some(instance) = spec.instance {
            config.instance = instance;
        }
        if let Some(channels) = spec.channels {
            config.max_channels = channels;
        }
        if let Some(alias) = &spec.alias {
            config.friendly_name.clone_from(alias);
        }
        let index = spec.index.unwrap_or(number);
        let peer = match spec.lan {
            None => Peer::new(index)?,
            Some(lan) => Peer::shared(lan),
        };
        let tap = match spec.lan {
            None => TAP.to_owned(),
            Some(_) => format!("{TAP}{index}"),
        };
        let uplink =
            Uplink::tap(&tap, Some(&peer.path())).map_err(|error| format!("{name}: {error}"))?;
        match spec.lan {
            None => peer.bring_up()?,
            Some(_) => peer.join(&tap)?,
        }
        let port = SwitchPort::new(&name, mac, uplink, &devices.counters).map_err(failed)?;
        let nic = Nic::new(config, port, devices.log.clone(), &devices.counters).map_err(failed)?;

        let serial = spec.serial.unwrap_or(number as u32 + 1);
        // 7870 is usual for MANA on Azure.
        let instance = spec
            .bus
            .unwrap_or_else(|| usual_instance(0x7870 + number as u16));
        Ok(Self {
            nic,
            offered: AtomicBool::new(false),
            peer,
            serial,
            slot: spec.slot.unwrap_or(serial),
            vf_options: VfOptions {
                name: format!("vf{number}"),
                mac: spec.vf_mac.unwrap_or(mac),
                queues: spec.queues.unwrap_or(VF_QUEUES),
                speed: VF_SPEED,
            },
            vf_at_boot: spec.vf == VfWish::Mana,
            bus: BusMaker::new(
                &format!("vpci{number}"),
                instance,
                spec.pci.unwrap_or(args.vpci_version()),
                machine,
                devices,
            ),
            bus_host: devices.bus.clone(),
            log: devices.log.clone(),
            counters: devices.counters.clone(),
            vf: Mutex::default(),
        })
    }

    /// Offers what is there at boot.
    pub(super) fn start(&self) -> Result<(), String> {
        self.offer()?;
        if self.vf_at_boot {
            self.want_vf();
        }
        Ok(())
    }

    fn want_vf(&self) {
        // The association comes first: the guest's driver knows then what the new function is for.
        self.set_association(true);
        lock(&self.vf).wanted = true;
    }

    /// Offers a wanted VF if it is time. A host offers a VF only to a guest whose driver of the synthetic device has
    /// connected and has been told of it.
    pub(super) fn offer_wanted_vf(&self) {
        if !lock(&self.vf).wanted {
            return;
        }
        let status = self.nic.status();
        // Older drivers cannot be told.
        let untold = status
            .version
            .is_some_and(|version| version < FIRST_WITH_ASSOCIATION);
        if status.association.is_none() && !untold {
            return;
        }
        if let Err(error) = self.offer_vf() {
            self.log
                .record(Direction::Host, self.bus.name(), "NOT_OFFERED", error);
            lock(&self.vf).wanted = false;
        }
    }

    fn name(&self) -> &str {
        &self.nic.config().name
    }

    /// Offers the synthetic device.
    pub(super) fn offer(&self) -> Result<(), String> {
        self.bus_host
            .add_device(self.nic.clone())
            .map_err(|error| format!("{}: {error}", self.name()))?;
        self.offered.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Rescinds the synthetic device.
    pub(super) fn rescind(&self) -> Result<(), String> {
        let instance = self.nic.config().instance;
        self.offered.store(false, Ordering::Relaxed);
        self.bus_host.remove_device(instance);
        released(&self.bus_host, instance)
    }

    /// Sets the link of the synthetic device.
    pub(super) fn set_link(&self, up: bool) {
        self.nic.set_link(up);
    }

    /// Tells the guest that the synthetic device hangs on another network.
    pub(super) fn change_network(&self) {
        self.nic.change_network();
    }

    /// Changes how the synthetic device behaves.
    pub(super) fn set(&self, setting: Setting, value: Option<u32>) {
        if setting == Setting::LinkSpeed {
            let usual = self.nic.config().link_speed;
            self.nic.set_link_speed(value.unwrap_or(usual));
            return;
        }
        self.nic.adjust(|settings| {
            let place = match setting {
                Setting::LinkSpeed => return,
                Setting::ReceiveSectionSize => &mut settings.receive_section_size,
                Setting::ReceiveSectionCount => &mut settings.receive_section_count,
                Setting::ReceiveSectionOffset => &mut settings.receive_section_offset,
                Setting::ReceiveGroups => &mut settings.receive_groups,
                Setting::SendSectionSize => &mut settings.send_section_size,
                Setting::Subchannels => &mut settings.subchannels,
                Setting::ChecksumV4 => &mut settings.checksum_v4,
                Setting::ChecksumV6 => &mut settings.checksum_v6,
                Setting::LargeSendV4 => &mut settings.large_send_v4,
                Setting::LargeSendV6 => &mut settings.large_send_v6,
                Setting::LargeSendV6Options => &mut settings.large_send_v6_options,
                Setting::Rsc => &mut settings.rsc,
                Setting::PacketAlignment => &mut settings.packet_alignment,
                Setting::PacketsPerMessage => &mut settings.packets_per_message,
                Setting::RssEntries => &mut settings.rss_entries,
                Setting::PacketStatus => &mut settings.packet_status,
                Setting::HoldPackets => &mut settings.hold_packets,
                Setting::HoldCompletions => &mut settings.hold_completions,
                Setting::LogFrames => &mut settings.log_frames,
            };
            *place = value;
        });
    }

    /// Sends something to the driver of the synthetic device as it is.
    pub(super) fn send(
        &self,
        kind: Kind,
        transaction: u64,
        messages: &[Vec<u8>],
    ) -> Result<(), String> {
        let first = messages.first().cloned().unwrap_or_default();
        let raw = match kind {
            Kind::Nvsp => Raw::Nvsp(first),
            Kind::Completion => Raw::Completion(transaction, first),
            Kind::Rndis | Kind::RndisControl => Raw::Rndis {
                control: kind == Kind::RndisControl,
                messages: messages.to_vec(),
            },
        };
        let sent = self.nic.send_raw(&raw);
        sent.map_err(|error| format!("{}: {error}", self.name()))
    }

    /// Tells the guest whether the NIC has a VF.
    pub(super) fn set_association(&self, on: bool) {
        self.nic.set_vf_association(on.then_some(self.serial));
    }

    /// Gives the NIC its VF, now or as soon as its driver is there.
    pub(super) fn add_vf(&self) -> Result<(), String> {
        {
            let vf = lock(&self.vf);
            if vf.present.is_some() || vf.wanted {
                return Err(format!("{} has its VF", self.name()));
            }
        }
        self.want_vf();
        // Usually it takes a few milliseconds; without a driver it takes until there is one.
        let deadline = Instant::now() + TELL;
        while self.nic.status().version.is_some() && Instant::now() < deadline {
            if !lock(&self.vf).wanted {
                break;
            }
            thread::sleep(super::OFFER_INTERVAL);
        }
        Ok(())
    }

    /// Offers the bus with the VF.
    pub(super) fn offer_vf(&self) -> Result<(), String> {
        let mut vf = lock(&self.vf);
        if vf.present.is_some() {
            return Err(format!("{} has its VF", self.name()));
        }
        let machine = self.bus.machine();
        let function = ManaVf::new(
            &self.vf_options,
            machine.memory().clone(),
            self.nic.port().clone(),
            &self.counters,
            self.log.clone(),
        )
        .map_err(|error| format!("{}: {error}", self.vf_options.name))?;
        if vf.link_down {
            function.set_link(false);
        }
        let device = self.bus.make();
        if !device.add_function(slot(), self.slot, None, function.clone()) {
            return Err(format!("{}: the slot is taken", self.bus.name()));
        }
        self.nic.port().set_vf_sink(Some(function.clone()));
        if let Err(error) = self.bus_host.add_device(device.clone()) {
            self.nic.port().set_vf_sink(None);
            return Err(format!("{}: {error}", self.bus.name()));
        }
        vf.present = Some(Vf { device, function });
        vf.wanted = false;
        Ok(())
    }

    /// Takes the VF away as a host does that has time: the guest gives it up first.
    pub(super) fn remove_vf(&self) -> Result<(), String> {
        if std::mem::take(&mut lock(&self.vf).wanted) {
            self.set_association(false);
            return Ok(());
        }
        let device = self.present()?;
        // A guest without a driver for the bus, or a slow one, loses it anyway.
        device.eject(slot(), EJECT);
        let rescinded = self.rescind_vf();
        self.set_association(false);
        rescinded
    }

    fn present(&self) -> Result<Arc<VpciDevice>, String> {
        match &lock(&self.vf).present {
            Some(vf) => Ok(vf.device.clone()),
            None => Err(format!("{} has no VF now", self.name())),
        }
    }

    /// Asks the guest to give the VF up.
    pub(super) fn eject(&self) -> Result<(), String> {
        if self.present()?.eject(slot(), EJECT) {
            Ok(())
        } else {
            Err(format!(
                "the guest has not given the VF up within {} seconds",
                EJECT.as_secs()
            ))
        }
    }

    /// Rescinds the bus with the VF.
    pub(super) fn rescind_vf(&self) -> Result<(), String> {
        let Some(vf) = lock(&self.vf).present.take() else {
            return Err(format!("{} has no VF now", self.name()));
        };
        let instance = vf.device.bus().instance();
        self.nic.port().set_vf_sink(None);
        vf.device.about_to_rescind();
        self.bus_host.remove_device(instance);
        released(&self.bus_host, instance)
    }

    /// Sets the link of the VF, also for the next one.
    pub(super) fn set_vf_link(&self, up: bool) -> Result<(), String> {
        let mut vf = lock(&self.vf);
        vf.link_down = !up;
        if let Some(vf) = &vf.present {
            vf.function.set_link(up);
        }
        Ok(())
    }

    /// Lets something go wrong the next times it comes up.
    pub(super) fn inject(&self, fault: Fault, times: u32) {
        use nvsp::MessageType as Nvsp;
        let nic = |point, action| {
            self.nic.inject(netvsp::Fault {
                point,
                action,
                times,
            });
        };
        let (mute, refuse) = (FaultAction::Mute, FaultAction::Refuse);
        if self.bus.inject(fault, times) {
            return;
        }
        match fault {
            Fault::NvspInitUnanswered => nic(FaultPoint::Nvsp(Nvsp::INIT), mute),
            Fault::ReceiveBufferRefused => {
                nic(FaultPoint::Nvsp(Nvsp::SEND_RECEIVE_BUFFER), refuse);
            }
            Fault::SendBufferRefused => nic(FaultPoint::Nvsp(Nvsp::SEND_SEND_BUFFER), refuse),
            Fault::RndisInitUnanswered => {
                nic(FaultPoint::Rndis(rndis::MessageType::INITIALIZE), mute);
            }
            Fault::RndisSetUnanswered => nic(FaultPoint::Rndis(rndis::MessageType::SET), mute),
            Fault::RndisSetRefused => nic(FaultPoint::Rndis(rndis::MessageType::SET), refuse),
            Fault::SubchannelsRefused => nic(FaultPoint::Nvsp(Nvsp::SUBCHANNEL), refuse),
            Fault::SubchannelOpenRefused => nic(FaultPoint::SubchannelOpen, refuse),
            Fault::DataPathUnanswered => nic(FaultPoint::Nvsp(Nvsp::SWITCH_DATA_PATH), mute),
            Fault::DataPathDelayed => nic(
                FaultPoint::Nvsp(Nvsp::SWITCH_DATA_PATH),
                FaultAction::Delay(DATA_PATH_DELAY),
            ),
            // The bus has taken it.
            Fault::PciVersionUnanswered
            | Fault::PciRelationsUnsent
            | Fault::PciD0Unanswered
            | Fault::PciD0Refused
            | Fault::PciResourcesRefused => {}
        }
    }

    /// Lets the VF ask its driver to reset it.
    pub(super) fn reset_vf(&self) -> Result<(), String> {
        let function = match &lock(&self.vf).present {
            Some(vf) => vf.function.clone(),
            None => return Err(format!("{} has no VF now", self.name())),
        };
        if function.request_reset() {
            Ok(())
        } else {
            Err(format!(
                "{}: no driver is there to reset it",
                self.vf_options.name
            ))
        }
    }

    /// The state for the control socket.
    pub(super) fn status(&self) -> NicStatus {
        let config = self.nic.config();
        let status = self.nic.status();
        let vf = lock(&self.vf);
        let device = vf.present.as_ref().map(|vf| &vf.device);
        let version = device.and_then(|device| device.bus().version());
        let mac: Vec<String> = config
            .mac
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        NicStatus {
            instance: config.instance.to_string(),
            mac: mac.join(":"),
            offered: self.offered.load(Ordering::Relaxed),
            open: status.version.is_some(),
            nvsp_version: status.version.map(nvsp_name),
            link_up: status.link,
            channels: status.channels as u32,
            data_path: if status.data_path_is_vf {
                DataPath::Vf
            } else {
                DataPath::Synthetic
            },
            netns: Some(self.peer.name.clone()),
            vf: Some(VfStatus {
                instance: self.bus.instance().to_string(),
                serial: self.serial,
                offered: device.is_some(),
                open: version.is_some(),
                associated: status.association.is_some(),
                link_up: !vf.link_down,
                vpci_version: version.map(vpci_name),
                interrupts: self.bus.interrupts(),
            }),
        }
    }

    /// Runs a shell command in the namespace of the peer.
    pub(super) fn run_at_peer(&self, command: &str) -> Result<String, String> {
        self.peer.run(command)
    }

    /// Ends the switch port.
    pub(super) fn shut_down(&self) {
        self.nic.port().set_vf_sink(None);
        lock(&self.vf).present = None;
        self.nic.port().shut_down();
    }
}

/// The network namespace of a NIC's peer. It goes when this is dropped.
struct Peer {
    name: String,
    index: usize,
    /// Another NIC's, which takes care of it.
    shared: bool,
}

/// The name of a peer's namespace, unlike that of any other lab on this machine.
pub fn peer_name(pid: u32, index: usize) -> String {
    format!("hvlab{pid}-{index}")
}

/// Deletes what labs that were killed have left behind.
fn remove_stale_peers() {
    let entries = fs::read_dir(NAMESPACES).into_iter().flatten().flatten();
    for name in entries.filter_map(|entry| entry.file_name().into_string().ok()) {
        if peer_pid(&name).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            // Another lab may be doing the same.
            let _ = ip(&["netns", "delete", &name]);
        }
    }
}

/// Whose a namespace is, if it is a lab's.
fn peer_pid(name: &str) -> Option<u32> {
    let (pid, index) = name.strip_prefix("hvlab")?.split_once('-')?;
    index.parse::<usize>().ok()?;
    pid.parse().ok()
}

fn ip(args: &[&str]) -> Result<(), String> {
    let output = Command::new("ip")
        .args(args)
        .output()
        .map_err(|error| format!("ip: {error} (install the package iproute2)"))?;
    if output.status.success() {
        return Ok(());
    }
    let reason = String::from_utf8_lossy(&output.stderr);
    Err(format!("ip {}: {}", args.join(" "), reason.trim()))
}

impl Peer {
    fn new(index: usize) -> Result<Self, String> {
        let peer = Self {
            name: peer_name(std::process::id(), index),
            index,
            shared: false,
        };
        remove_stale_peers();
        ip(&["netns", "add", &peer.name])?;
        Ok(peer)
    }

    /// The peer of an earlier NIC.
    fn shared(index: usize) -> Self {
        Self {
            name: peer_name(std::process::id(), index),
            index,
            shared: true,
        }
    }

    fn path(&self) -> PathBuf {
        Path::new(NAMESPACES).join(&self.name)
    }

    /// Runs a shell command there and gives what it prints.
    fn run(&self, command: &str) -> Result<String, String> {
        let script = "exec 2>&1; exec timeout \"$1\" sh -c \"$2\"";
        let seconds = PEER_COMMAND.as_secs().to_string();
        let output = Command::new("ip")
            .args(["netns", "exec", &self.name, "sh", "-c", script, "sh"])
            .args([&seconds, command])
            .stdin(Stdio::null())
            .output()
            .map_err(|error| format!("ip: {error}"))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        match output.status.code() {
            Some(0) => Ok(text),
            // What coreutils' and busybox's timeout end with.
            Some(124 | 143) => Err(format!("{text}(ended after {seconds} s)")),
            _ => Err(format!("{text}({})", output.status)),
        }
    }

    /// Gives the tap its addresses. The hardware address is the same in each run: a guest that slept
    /// meanwhile still knows it.
    fn bring_up(&self) -> Result<(), String> {
        let address = format!("12:34:56:78:9a:{:02x}", self.index);
        self.ip(&["link", "set", "lo", "up"])?;
        self.ip(&["link", "set", TAP, "address", &address])?;
        self.give_addresses(TAP)
    }

    fn give_addresses(&self, interface: &str) -> Result<(), String> {
        let v4 = format!("10.0.{}.1/24", self.index);
        let v6 = format!("fd00:{}::1/64", self.index);
        self.ip(&["link", "set", interface, "up"])?;
        self.ip(&["addr", "add", &v4, "dev", interface])?;
        self.ip(&["addr", "add", &v6, "dev", interface, "nodad"])
    }

    /// Puts the tap of one more NIC on the network of the first: on a bridge, which has the addresses.
    fn join(&self, tap: &str) -> Result<(), String> {
        if self.ip(&["link", "show", BRIDGE]).is_err() {
            self.ip(&[
                "link",
                "add",
                BRIDGE,
                "type",
                "bridge",
                "mcast_snooping",
                "0",
            ])?;
            self.ip(&["addr", "flush", "dev", TAP])?;
            self.ip(&["link", "set", TAP, "mtu", BRIDGE_MTU, "master", BRIDGE])?;
            self.ip(&["link", "set", BRIDGE, "mtu", "1500"])?;
            self.give_addresses(BRIDGE)?;
        }
        self.ip(&[
            "link", "set", tap, "mtu", BRIDGE_MTU, "master", BRIDGE, "up",
        ])
    }

    fn ip(&self, args: &[&str]) -> Result<(), String> {
        ip(&[&["-n", &self.name], args].concat())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        if !self.shared {
            // It may have been deleted by hand.
            let _ = ip(&["netns", "delete", &self.name]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_tell_whose_they_are() {
        assert_eq!(peer_pid(&peer_name(4711, 3)), Some(4711));
        for name in [
            "hvlab", "hvlab0", "hvlab-0", "hvlab1-", "hvlab1-x", "other1-0",
        ] {
            assert_eq!(peer_pid(name), None, "{name}");
        }
    }
}
