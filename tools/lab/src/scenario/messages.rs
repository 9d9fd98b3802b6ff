// SPDX-License-Identifier: GPL-2.0
//! What hv_netvsc says to the host, message by message.
//!
//! There is a NIC for each version of NVSP. Packets are left out, but for some whose kind is known.

use std::fmt::Write as _;
use std::time::Duration;

use super::compare::Kept;
use super::guest::{Boot, Nic};
use super::recorder::{bytes_of, word, words, Device, Id, Line, Recorder, Said, Trace};
use super::suspend::contacts;
use super::vf::bonded;
use super::{ensure, Context, Result};

/// The name of the scenario.
pub const NAME: &str = "messages";

/// A NIC for each of them.
const VERSIONS: [&str; 6] = ["6.1", "6.0", "5.0", "4.0", "2.0", "1.0"];
/// The newest version and the oldest that knows of VFs.
const WITH_VF: [&str; 2] = ["6.1", "4.0"];
/// The versions of which packets are compared: all kinds of offloads, no UDP checksum, no VF.
const WITH_PACKETS: [&str; 3] = ["6.1", "4.0", "1.0"];
/// What has been silent for so long has ended.
const QUIET: Duration = Duration::from_millis(500);
/// The same where delayed work takes part.
const LONG_QUIET: Duration = Duration::from_millis(2000);
/// To these ports go the packets that are compared.
const PORTS: std::ops::RangeInclusive<u16> = 4240..=4249;
/// To this one TCP packets, of sizes that depend on timing.
const TCP_PORT: u16 = 5201;

/// What is done with an interface that is up: section and command, with `IF` for its name.
const STEPS: [(&str, &str); 27] = [
    ("promiscuous", "ip link set IF promisc on"),
    ("not promiscuous", "ip link set IF promisc off"),
    ("all multicast", "ip link set IF allmulticast on"),
    ("not all multicast", "ip link set IF allmulticast off"),
    ("MTU 1400", "ip link set IF mtu 1400"),
    ("MTU 9000", "ip link set IF mtu 9000"),
    ("MTU 1500", "ip link set IF mtu 1500"),
    ("MTU too large", "ip link set IF mtu 65535"),
    ("small buffers", "ethtool -G IF rx 1000 tx 100"),
    ("large buffers", "ethtool -G IF rx 9000 tx 170"),
    ("one channel", "ethtool -L IF combined 1"),
    ("two channels", "ethtool -L IF combined 2"),
    ("equal 1", "ethtool -X IF equal 1"),
    ("weight", "ethtool -X IF weight 1 3"),
    ("key", "ethtool -X IF hkey 01:02:03:04:05:06:07:08:09:0a:0b:0c:0d:0e:0f:10:11:12:13:14:15:16:17:18:19:1a:1b:1c:1d:1e:1f:20:21:22:23:24:25:26:27:28"),
    ("default table", "ethtool -X IF default"),
    ("rx off", "ethtool -K IF rx off"),
    ("rx on", "ethtool -K IF rx on"),
    ("tx off", "ethtool -K IF tx off"),
    ("tx on", "ethtool -K IF tx on"),
    ("lro off", "ethtool -K IF lro off"),
    ("lro on", "ethtool -K IF lro on"),
    ("tso off", "ethtool -K IF tso off"),
    ("tso on", "ethtool -K IF tso on"),
    ("other address", "ip link set IF address 60:45:bd:01:02:03"),
    ("address of a group", "ip link set IF address 61:45:bd:01:02:03"),
    ("hash of ports", "ethtool -N IF rx-flow-hash udp4 sdfn"),
];

/// What is done with a VF, whose name is `VF`.
const VF_STEPS: [(&str, &str); 8] = [
    ("VF: MTU 1400", "ip link set IF mtu 1400"),
    ("VF: MTU 1500", "ip link set IF mtu 1500"),
    ("VF: down", "ip link set VF down"),
    ("VF: up", "ip link set VF up"),
    ("VF: closed", "ip link set IF down"),
    ("VF: opened", "ip link set IF up"),
    ("VF: one channel", "ethtool -L IF combined 1"),
    ("VF: two channels", "ethtool -L IF combined 2"),
];

/// Differences that are to stay.
pub const KEPT: &[Kept] = &[
    Kept {
        place: "nvsp-[56].[01]/(two channels|equal 1|weight|VF: two channels)",
        stock: &["guest 0 RNDIS_SET oid=GEN_RECEIVE_SCALE_PARAMETERS .* and [0-9]+ zeros"],
        ours: &["guest 0 RNDIS_SET oid=GEN_RECEIVE_SCALE_PARAMETERS .* (beac01fa|25262728)"],
        why: "the stock driver forgets the hash key when it has had one channel, and then has the \
              host hash with a key of zeros; ours keeps it",
    },
    Kept {
        place: "nvsp-.*/VF: (MTU .*|one channel|two channels)",
        stock: &[],
        ours: &["guest 0 NVSP_SWITCH_DATA_PATH .* 81000000 01000000 .*"],
        why: "the lab's host sets the data path to synthetic when the channel is closed (others were \
              not tested); ours tells the host again after a change, the stock driver leaves it \
              there while it sends by the VF",
    },
    Kept {
        place: "nvsp-[14].0/.*UDP packet.*",
        stock: &["guest packet to port .* info 0: .*"],
        ours: &["guest packet to port 424[0-3]: .*"],
        why: "the stock driver has hosts before version 5 compute checksums of UDP, which it has \
              not enabled there; ours computes them itself",
    },
    Kept {
        place: "nvsp-[14].0/UDP packet without offload",
        stock: &["guest packet to port 4244: .* 24000000 and 12 zeros"],
        ours: &["guest packet to port 4244: .* and 28 zeros"],
        why: "without per-packet information ours states no place for it; the stock driver states \
              one, of length zero",
    },
];

pub fn run(context: &mut Context<'_>) -> Result<()> {
    let lab = context.lab();
    let nics = VERSIONS.iter().enumerate().map(|(index, version)| Nic {
        nvsp: Some(version),
        ..Nic::new(index)
    });
    let mut guest = context.boot(&Boot {
        cpus: 2,
        log_bytes: true,
        ..Boot::new(nics.collect())
    })?;
    let nics = guest.nics.clone();
    for nic in &nics {
        guest.peer_server(lab, nic, &["iperf3", "-s"])?;
    }
    let traces = nics.iter().map(NicTrace::new).collect();
    let mut recorder = Recorder::new(&guest, traces, LONG_QUIET)?;
    let all: Vec<_> = (0..nics.len()).collect();
    context.check("hv_netvsc is unloaded and loaded", || {
        recorder.phase(&all, "remove", "rmmod hv_netvsc", LONG_QUIET)?;
        recorder.phase(&all, "probe", "modprobe hv_netvsc", LONG_QUIET)
    });
    context.check("open, change, close", || {
        let mut step = |name: &str, command: &str, quiet| {
            let command = |nic: usize| command.replace("IF", &nics[nic].name());
            recorder.phases(&all, name, command, quiet)
        };
        step("MTU while closed", "ip link set IF mtu 1450", QUIET)?;
        step("MTU while closed, back", "ip link set IF mtu 1500", QUIET)?;
        step("open", "ip link set IF up", LONG_QUIET)?;
        for (name, command) in STEPS {
            step(name, command, QUIET)?;
        }
        let old = |nic: usize| {
            let nic = &nics[nic];
            format!("ip link set {} address {}", nic.name(), nic.mac())
        };
        recorder.phases(&all, "old address", old, QUIET)?;
        let close = |nic: usize| format!("ip link set {} down", nics[nic].name());
        recorder.phases(&all, "close", close, QUIET)?;
        let open = |nic: usize| format!("ip link set {} up", nics[nic].name());
        recorder.phases(&all, "open again", open, LONG_QUIET)
    });
    for (index, version) in VERSIONS.iter().enumerate() {
        if WITH_PACKETS.contains(version) {
            context.check(&format!("NVSP {version}: packets of each kind"), || {
                recorder.packets(index, &nics[index])
            });
        }
    }
    context.check("link down and up", || {
        for (name, up) in [("link down", false), ("link up", true)] {
            recorder.action(&all, name, LONG_QUIET, || {
                nics.iter().try_for_each(|nic| guest.host.nic_link(nic, up))
            })?;
        }
        Ok(())
    });
    context.check("the machine is suspended and resumed", || {
        // Without a place for the image the devices are frozen and thawed, and that is all.
        let freeze = "echo disk >/sys/power/state 2>/dev/null";
        let before = contacts(&guest)?;
        recorder.phase(&all, "suspend and resume", freeze, LONG_QUIET)?;
        let new = contacts(&guest)? - before;
        ensure(new == 1, || format!("{new} new contacts with the host"))
    });
    context.check("VFs join and leave", || {
        let with_vf = all.iter().copied();
        let with_vf: Vec<_> = with_vf
            .filter(|&index| WITH_VF.contains(&VERSIONS[index]))
            .collect();
        recorder.action(&with_vf, "VF: joins", LONG_QUIET, || {
            for &index in &with_vf {
                guest.host.add_vf(&nics[index])?;
                bonded(&guest, &nics[index])?;
            }
            Ok(())
        })?;
        for (name, command) in VF_STEPS {
            let command = |nic: usize| {
                let nic = &nics[nic];
                let command = command.replace("IF", &nic.name());
                command.replace("VF", &nic.vf_name())
            };
            recorder.phases(&with_vf, name, command, LONG_QUIET)?;
        }
        recorder.action(&with_vf, "VF: leaves", LONG_QUIET, || {
            with_vf
                .iter()
                .try_for_each(|&index| guest.host.remove_vf(&nics[index]))
        })
    });
    context.check("the open interfaces are removed", || {
        recorder.phase(&all, "remove while open", "rmmod hv_netvsc", LONG_QUIET)
    });
    let texts: Vec<_> = recorder.finish().collect();
    for (version, text) in VERSIONS.iter().zip(texts) {
        context.text(&format!("nvsp-{version}"), &text)?;
    }
    context.finish(guest)
}

impl Recorder<'_, NicTrace> {
    /// One packet of each kind.
    fn packets(&mut self, index: usize, nic: &Nic) -> Result<()> {
        let (name, peer, peer_v6) = (nic.name(), nic.peer_v4(), nic.peer_v6());
        self.guest.sh(&format!(
            "ip address replace {}/24 dev {name}; ip address replace {}/64 dev {name} nodad; \
             ping -q -c 3 -W 5 {peer} && ping -q -c 3 -W 5 {peer_v6} && \
             ip link add link {name} name vlan{index} type vlan id 1234 && \
             ip link set vlan{index} type vlan egress 0:5 && ip link set vlan{index} up && \
             ip address add 10.9.{index}.2/24 dev vlan{index} && \
             ip neigh add 10.9.{index}.1 lladdr 02:00:00:00:00:01 dev vlan{index} nud permanent",
            nic.guest_v4(),
            nic.guest_v6(),
        ))?;
        let send = |length: u32, to: &str, port: u16| {
            format!("bash -c 'head -c {length} /dev/zero >/dev/udp/{to}/{port}'")
        };
        let vlan = format!("10.9.{index}.1");
        let steps = [
            ("small UDP packet", send(10, &peer, 4240)),
            ("large UDP packet", send(1400, &peer, 4241)),
            ("UDP packet over IPv6", send(10, &peer_v6, 4242)),
            ("UDP packet with VLAN", send(10, &vlan, 4243)),
            (
                "UDP packet without offload",
                format!(
                    "ethtool -K {name} tx off; {}; ethtool -K {name} tx on",
                    send(10, &peer, 4244)
                ),
            ),
            (
                "TCP over IPv4",
                format!("for i in 1 2 3; do iperf3 -i 0 -t 1 -c {peer} && break; done >/dev/null"),
            ),
            (
                "TCP over IPv6",
                format!(
                    "for i in 1 2 3; do iperf3 -i 0 -t 1 -c {peer_v6} && break; done >/dev/null"
                ),
            ),
        ];
        for (step, command) in steps {
            self.phase(&[index], step, &command, QUIET)?;
        }
        self.guest.sh(&format!("ip link delete vlan{index}"))?;
        self.phase(&[index], "VLAN gone", "true", QUIET)
    }
}

/// What a NIC and its host have said to each other.
struct NicTrace {
    /// Name of the NIC's primary channel; those of others go on with a dot.
    channel: String,
    device: Device,
    said: Said,
    /// The NVSP message in front of an RNDIS message.
    pending: Option<String>,
}

/// The ids in the guest's messages.
fn ids(name: &str) -> &'static [Id] {
    match name {
        "NVSP_SEND_RECEIVE_BUFFER" | "NVSP_SEND_SEND_BUFFER" => &[(4, "gpadl")],
        "NVSP_SEND_RNDIS_PACKET" => &[(8, "section")],
        _ if name.starts_with("RNDIS_") && name != "RNDIS_PACKET" => &[(8, "request")],
        _ => &[],
    }
}

impl Trace for NicTrace {
    fn take(&mut self, line: &Line<'_>) -> Result<bool> {
        let channel = match line.channel {
            "vmbus" => return self.device.take(line, &mut self.said),
            channel if channel == self.channel => "0",
            channel => match channel.strip_prefix(&self.channel) {
                Some(number) if number.starts_with('.') => &number[1..],
                _ => return Ok(false),
            },
        };
        if line.is_from_host() {
            self.said.from_host.push(line.host_text(channel)?);
            return Ok(true);
        }
        Ok(line.is_from_guest() && self.guest_message(channel, line))
    }

    fn said(&mut self) -> &mut Said {
        &mut self.said
    }

    fn into_said(self) -> Said {
        self.said
    }
}

impl NicTrace {
    fn new(nic: &Nic) -> Self {
        Self {
            channel: format!("net{}", nic.index),
            device: Device::new(nic.instance()),
            said: Said::default(),
            pending: None,
        }
    }

    fn guest_message(&mut self, channel: &str, line: &Line<'_>) -> bool {
        let (name, bytes) = (line.name, &line.bytes);
        if name == "RNDIS_PACKET" {
            return self.packet(line.fields, bytes);
        }
        let fields = match line.fields.split_once("completion=") {
            Some((_, completion)) => format!(" completion={}", completion.trim()),
            None if name.starts_with("RNDIS_") => {
                let fields = line.fields.split(" length=").next();
                fields.unwrap_or_default().to_owned()
            }
            None => String::new(),
        };
        let mut text = format!("guest {channel} {name}{fields} {} bytes:", bytes.len());
        self.words(&mut text, bytes, ids(name));
        match name {
            "NVSP_SEND_RNDIS_PACKET" => {
                // Only of interest if the next message is.
                self.pending = Some(text);
                return false;
            }
            // For packets as well, so their number depends on those.
            "NVSP_COMPLETION" => {
                self.said.any.insert(text.replacen(channel, "*", 1));
                return false;
            }
            // The host may see the channel closed before it reads them.
            "NVSP_REVOKE_RECEIVE_BUFFER" | "NVSP_REVOKE_SEND_BUFFER" => {
                self.said.any.insert(text);
                return true;
            }
            _ => {}
        }
        if name.starts_with("RNDIS_") {
            if let Some(pending) = self.pending.take() {
                self.said.guest(channel, pending);
            }
        }
        self.said.guest(channel, text);
        true
    }

    fn words(&self, text: &mut String, bytes: &[u8], ids: &[Id]) {
        words(text, bytes, ids, |kind, value| {
            self.device.name(kind, value)
        });
    }

    /// A packet: taken if it is one of ours.
    fn packet(&mut self, fields: &str, bytes: &[u8]) -> bool {
        let pending = self.pending.take();
        let frame = fields.rsplit_once("frame=").map(|(_, hex)| bytes_of(hex));
        let frame = frame.unwrap_or_default();
        let port = match frame.get(12..14) {
            Some([0x08, 0x00]) => frame.get(36..38),
            Some([0x86, 0xdd]) => frame.get(56..58),
            _ => None,
        };
        let port = match port {
            Some(&[high, low]) => u16::from_be_bytes([high, low]),
            _ => return false,
        };
        let mut text = format!("guest packet to port {port}:");
        if PORTS.contains(&port) {
            let length = fields.split_whitespace().next().unwrap_or_default();
            let _ = write!(text, " {length}");
            if let Some(pending) = pending {
                // The channel depends on a hash with a random key.
                let pending = pending.split_once(' ').map_or("", |(_, rest)| rest);
                let pending = pending.split_once(' ').map_or("", |(_, rest)| rest);
                let _ = write!(text, " {pending}, RNDIS:");
            }
            self.words(&mut text, bytes.get(..44).unwrap_or(bytes), &[]);
            self.infos(&mut text, bytes);
            self.said.guest("packets", text);
            return true;
        }
        if port == TCP_PORT {
            self.infos(&mut text, bytes);
            self.said.any_here.insert(text);
        }
        false
    }

    /// The per-packet information of a packet.
    fn infos(&self, text: &mut String, bytes: &[u8]) {
        const HASH: u32 = 8;
        let (Some(offset), Some(length)) = (word(bytes, 36 - 8), word(bytes, 40 - 8)) else {
            return;
        };
        let mut rest = bytes.get(8 + offset as usize..).unwrap_or_default();
        rest = rest.get(..length as usize).unwrap_or(rest);
        while let (Some(size), Some(kind)) = (word(rest, 0), word(rest, 4)) {
            let size = (size as usize).clamp(12, rest.len().max(12));
            let _ = write!(text, " info {kind}:");
            let info = rest.get(..size).unwrap_or(rest);
            match kind {
                HASH => self.words(text, info, &[(12, "hash")]),
                _ => self.words(text, info, &[]),
            }
            rest = rest.get(size..).unwrap_or_default();
        }
    }
}
