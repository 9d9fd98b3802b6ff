// SPDX-License-Identifier: GPL-2.0
//! The part of the command line that describes the host.

use std::str::FromStr;

use clap::Args;
use hyperv_wire::{nvsp, vpci::ProtocolVersion};
use vmbus_host::{Config, Guid, Version};

use super::pci::Kind;

/// The host's part of the command line.
#[derive(Debug, Clone, Args)]
pub struct HostArgs {
    /// A NIC: KEY=VALUE,… of mac, instance, serial, index, lan, channels, nvsp, pci, alias, vf=mana|later|none, bus, queues, slot, vf-mac; or `none`
    ///
    /// `mac`: address; `instance`: GUID, made of the address if not given; `serial`: pairs the NIC with its VF; `index`:
    /// its peer is in the network namespace hvlab<PID>-<index>; `lan`: it has no peer, but is on one
    /// network with the earlier NIC of that index and its peer; `channels`: most channels; `nvsp`: newest version,
    /// instead of `--nvsp-version`; `pci`: newest version on the VF's bus, instead of `--vpci-version`; `alias`: what the
    /// host calls it; `vf`: whether it has a VF at boot; `bus`: instance GUID of the VF's bus, whose third word becomes the
    /// PCI domain; `queues`: of the VF; `slot`: another serial number than the NIC's for the VF; `vf-mac`: another address
    /// than the NIC's for the VF.
    /// Repeat the option for more NICs. Without it there is one NIC with a VF.
    #[arg(long = "nic", value_name = "SPEC")]
    nics: Vec<NicOption>,
    /// A virtual PCI bus that is not a VF's: KEY=VALUE,… of bus, version, offer=boot|later, and of each function, with a + between them: kind, slot, serial, node, add=boot|later
    ///
    /// `bus`: instance GUID, whose third word becomes the PCI domain; `version`: newest version, instead of
    /// `--vpci-version`; `offer`: whether it is there at boot. `kind`: what the function is, given first (`test` if not given);
    /// `slot`: DEVICE or DEVICE.FUNCTION; `serial`: names its slot in the guest; `node`: NUMA node; `add`: whether
    /// it is on the bus at first. A `test` has `barN=SIZE[:64][:pref]` with a suffix K, M or G, `msi` and `msix`:
    /// numbers of vectors. An `nvme` disk has `size=SIZE` with a suffix M or G, `queues`: most of them, and `file`: its
    /// content, which is in memory otherwise.
    /// Repeat the option for more buses.
    #[arg(long = "pci", value_name = "SPEC")]
    buses: Vec<PciOption>,
    /// Newest version of the VMBus protocol that the host takes
    #[arg(long, default_value = "6.0", value_name = "VERSION", value_parser = vmbus_version)]
    vmbus_version: Version,
    /// Newest version of NVSP that the host takes
    #[arg(long, default_value = "6.1", value_name = "VERSION", value_parser = nvsp_version)]
    nvsp_version: nvsp::Version,
    /// Newest version of the virtual PCI protocol that the host takes
    #[arg(long, default_value = "1.4", value_name = "VERSION", value_parser = vpci_version)]
    vpci_version: ProtocolVersion,
}

/// What `--nic` may be.
#[derive(Debug, Clone)]
enum NicOption {
    None,
    Nic { text: String, spec: Spec },
}

/// What `--pci` may be.
#[derive(Debug, Clone)]
struct PciOption {
    text: String,
    spec: PciSpec,
}

/// A virtual PCI bus as the command line describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PciSpec {
    /// Instance GUID.
    pub bus: Option<Guid>,
    /// Newest version of the protocol that is taken.
    pub version: Option<ProtocolVersion>,
    /// It is not offered at boot.
    pub later: bool,
    /// What can be on it.
    pub functions: Vec<FunctionSpec>,
}

/// A function as the command line describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FunctionSpec {
    /// Device and function number.
    pub slot: Option<(u8, u8)>,
    /// Names its slot in the guest.
    pub serial: Option<u32>,
    /// NUMA node.
    pub node: Option<u16>,
    /// It is not on the bus at first.
    pub later: bool,
    /// What it is.
    pub kind: Kind,
}

/// A NIC as the command line describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Spec {
    /// Address.
    pub mac: Option<[u8; 6]>,
    /// Instance GUID.
    pub instance: Option<Guid>,
    /// Pairs NIC and VF.
    pub serial: Option<u32>,
    /// Number of the peer's network namespace.
    pub index: Option<usize>,
    /// Index of the NIC whose network it is on.
    pub lan: Option<usize>,
    /// Most channels.
    pub channels: Option<u16>,
    /// What the host calls it.
    pub alias: Option<String>,
    /// Another serial number for the VF itself.
    pub slot: Option<u32>,
    /// Another address for the VF itself.
    pub vf_mac: Option<[u8; 6]>,
    /// Newest version of NVSP that is taken.
    pub nvsp: Option<nvsp::Version>,
    /// Newest version of the virtual PCI protocol that is taken on the VF's bus.
    pub pci: Option<ProtocolVersion>,
    /// Instance GUID of the VF's bus.
    pub bus: Option<Guid>,
    /// Queues of the VF.
    pub queues: Option<u16>,
    /// Whether there is a VF at boot.
    pub vf: Vf,
}

/// Whether a NIC has a VF at boot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Vf {
    /// Not yet.
    #[default]
    Later,
    /// A MANA VF.
    Mana,
}

/// A MAC address in the usual form.
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split([':', '-']);
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2)?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    // Bit 0 of the first byte makes a group address.
    (parts.next().is_none() && mac[0] & 1 == 0).then_some(mac)
}

fn number<T>(text: &str, range: std::ops::RangeInclusive<T>) -> Option<T>
where
    T: FromStr + PartialOrd,
{
    text.parse().ok().filter(|number| range.contains(number))
}

impl FromStr for NicOption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "none" {
            return Ok(Self::None);
        }
        let mut spec = Spec::default();
        for pair in text.split(',').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair
                .split_once('=')
                .ok_or_else(|| format!("{pair:?} is not KEY=VALUE"))?;
            let taken = match key {
                "mac" => parse_mac(value).map(|mac| spec.mac = Some(mac)),
                "instance" => Guid::parse(value)
                    .ok()
                    .map(|guid| spec.instance = Some(guid)),
                "serial" => number(value, 1..=u32::MAX).map(|serial| spec.serial = Some(serial)),
                "index" => number(value, 0..=255).map(|index| spec.index = Some(index)),
                "lan" => number(value, 0..=255).map(|lan| spec.lan = Some(lan)),
                "channels" => number(value, 1..=64).map(|channels| spec.channels = Some(channels)),
                "alias" => {
                    spec.alias = Some(value.to_owned());
                    Some(())
                }
                "slot" => number(value, 0..=u32::MAX).map(|slot| spec.slot = Some(slot)),
                "vf-mac" => parse_mac(value).map(|mac| spec.vf_mac = Some(mac)),
                "nvsp" => nvsp_version(value)
                    .ok()
                    .map(|version| spec.nvsp = Some(version)),
                "pci" => vpci_version(value)
                    .ok()
                    .map(|version| spec.pci = Some(version)),
                "bus" => Guid::parse(value).ok().map(|guid| spec.bus = Some(guid)),
                "queues" => number(value, 1..=64).map(|queues| spec.queues = Some(queues)),
                "vf" => match value {
                    "mana" => Some(Vf::Mana),
                    "later" | "none" => Some(Vf::Later),
                    _ => None,
                }
                .map(|vf| spec.vf = vf),
                _ => return Err(format!("{key:?} is no property of a NIC")),
            };
            taken.ok_or_else(|| format!("{value:?} is no {key}"))?;
        }
        Ok(Self::Nic {
            text: text.to_owned(),
            spec,
        })
    }
}

/// `boot` or `later`.
fn is_later(text: &str) -> Option<bool> {
    match text {
        "boot" => Some(false),
        "later" => Some(true),
        _ => None,
    }
}

/// `DEVICE` or `DEVICE.FUNCTION`.
fn slot(text: &str) -> Option<(u8, u8)> {
    let (device, function) = text.split_once('.').unwrap_or((text, "0"));
    Some((number(device, 0..=31)?, number(function, 0..=7)?))
}

impl PciSpec {
    /// The bus's part of a pair. `None` if it is not the bus's, otherwise whether the value is one.
    fn set(&mut self, key: &str, value: &str) -> Option<bool> {
        match key {
            "bus" => {
                self.bus = Guid::parse(value).ok();
                Some(self.bus.is_some())
            }
            "version" => {
                self.version = vpci_version(value).ok();
                Some(self.version.is_some())
            }
            "offer" => {
                let later = is_later(value);
                self.later = later == Some(true);
                Some(later.is_some())
            }
            _ => None,
        }
    }
}

impl FunctionSpec {
    fn new(kind: Kind) -> Self {
        Self {
            slot: None,
            serial: None,
            node: None,
            later: false,
            kind,
        }
    }

    /// The function's part of a pair, in the same way.
    fn set(&mut self, key: &str, value: &str) -> Option<bool> {
        match key {
            "kind" => {
                let kind = Kind::named(value);
                let known = kind.is_some();
                if let Some(kind) = kind {
                    self.kind = kind;
                }
                Some(known)
            }
            "slot" => {
                self.slot = slot(value);
                Some(self.slot.is_some())
            }
            "serial" => {
                self.serial = number(value, 0..=u32::MAX);
                Some(self.serial.is_some())
            }
            "node" => {
                self.node = number(value, 0..=u16::MAX);
                Some(self.node.is_some())
            }
            "add" => {
                let later = is_later(value);
                self.later = later == Some(true);
                Some(later.is_some())
            }
            _ => self.kind.set(key, value),
        }
    }
}

impl FromStr for PciOption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut spec = PciSpec::default();
        for part in text.split('+') {
            let mut function = FunctionSpec::new(Kind::DEFAULT);
            for pair in part.split(',').filter(|pair| !pair.is_empty()) {
                let (key, value) = pair
                    .split_once('=')
                    .ok_or_else(|| format!("{pair:?} is not KEY=VALUE"))?;
                let taken = spec
                    .set(key, value)
                    .or_else(|| function.set(key, value))
                    .ok_or_else(|| format!("{key:?} is no property of such a bus or function"))?;
                if !taken {
                    return Err(format!("{value:?} is no {key}"));
                }
            }
            function.kind.check()?;
            spec.functions.push(function);
        }
        Ok(Self {
            text: text.to_owned(),
            spec,
        })
    }
}

/// A version among the known ones, by its usual name.
fn version<T: Copy>(text: &str, known: &[(String, T)]) -> Result<T, String> {
    let names = || {
        known
            .iter()
            .map(|(name, _)| name.as_str())
            .collect::<Vec<_>>()
            .join(", ")
    };
    // 5 and 5.0 are the same.
    let full = |name: &str| match name.contains('.') {
        true => name.to_owned(),
        false => format!("{name}.0"),
    };
    known
        .iter()
        .find(|(name, _)| full(name) == full(text))
        .map(|&(_, version)| version)
        .ok_or_else(|| format!("known versions are {}", names()))
}

fn vmbus_version(text: &str) -> Result<Version, String> {
    version(
        text,
        &Version::ALL.map(|version| (version.to_string(), version)),
    )
}

fn nvsp_version(text: &str) -> Result<nvsp::Version, String> {
    version(
        text,
        &nvsp::Version::ALL.map(|version| (nvsp_name(version), version)),
    )
}

fn vpci_version(text: &str) -> Result<ProtocolVersion, String> {
    version(
        text,
        &ProtocolVersion::ALL.map(|version| (vpci_name(version), version)),
    )
}

/// Usual name of an NVSP version, always with a dot.
pub fn nvsp_name(version: nvsp::Version) -> String {
    match version.name() {
        Some(name) if name.contains('.') => name.to_owned(),
        Some(name) => format!("{name}.0"),
        None => format!("{:#x}", version.0),
    }
}

/// Usual name of a virtual PCI protocol version.
pub fn vpci_name(version: ProtocolVersion) -> String {
    format!("{}.{}", version.0 >> 16, version.0 & 0xffff)
}

impl HostArgs {
    /// The NICs, in the order in which they are offered.
    pub fn nics(&self) -> Vec<Spec> {
        if self.nics.is_empty() {
            return vec![Spec {
                vf: Vf::Mana,
                ..Spec::default()
            }];
        }
        self.nics
            .iter()
            .filter_map(|nic| match nic {
                NicOption::None => None,
                NicOption::Nic { spec, .. } => Some(spec.clone()),
            })
            .collect()
    }

    /// The virtual PCI buses that are not a VF's.
    pub fn buses(&self) -> impl Iterator<Item = PciSpec> + '_ {
        self.buses.iter().map(|bus| bus.spec.clone())
    }

    /// How the bus behaves.
    pub fn vmbus_config(&self) -> Config {
        Config {
            max_version: self.vmbus_version,
            ..Config::default()
        }
    }

    /// Newest NVSP version.
    pub fn nvsp_version(&self) -> nvsp::Version {
        self.nvsp_version
    }

    /// Newest virtual PCI protocol version.
    pub fn vpci_version(&self) -> ProtocolVersion {
        self.vpci_version
    }

    /// The same as command line arguments.
    pub fn to_args(&self) -> Vec<String> {
        let nics = self.nics.iter().map(|nic| match nic {
            NicOption::None => "none",
            NicOption::Nic { text, .. } => text,
        });
        let mut args: Vec<String> = nics.map(|text| format!("--nic={text}")).collect();
        args.extend(self.buses.iter().map(|bus| format!("--pci={}", bus.text)));
        args.push(format!("--vmbus-version={}", self.vmbus_version));
        args.push(format!("--nvsp-version={}", nvsp_name(self.nvsp_version)));
        args.push(format!("--vpci-version={}", vpci_name(self.vpci_version)));
        args
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        host: HostArgs,
    }

    fn parse(args: &[&str]) -> Result<HostArgs, String> {
        Cli::try_parse_from(std::iter::once(&"hvlab").chain(args))
            .map(|cli| cli.host)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn nics_are_parsed() {
        let args = parse(&[
            "--nic=mac=60:45:bd:e9:60:a3,serial=7,vf=mana,bus=e9ac9b28-cf63-4466-9ae3-4b849c3ee03b",
            "--nic=",
            "--nic=index=3,lan=0,channels=4,nvsp=5,pci=1.2,queues=2,vf=later",
            "--nic=none",
        ])
        .unwrap();
        let nics = args.nics();
        assert_eq!(nics.len(), 3);
        assert_eq!(nics[0].mac, Some([0x60, 0x45, 0xbd, 0xe9, 0x60, 0xa3]));
        assert_eq!((nics[0].serial, nics[0].vf), (Some(7), Vf::Mana));
        assert_eq!(nics[0].bus.unwrap().to_bytes()[4..6], [0x63, 0xcf]);
        assert_eq!(nics[1], Spec::default());
        assert_eq!(
            (nics[2].index, nics[2].channels, nics[2].queues),
            (Some(3), Some(4), Some(2))
        );
        assert_eq!((nics[1].lan, nics[2].lan), (None, Some(0)));
        assert_eq!(nics[2].nvsp, Some(nvsp::Version::V5));
        assert_eq!(nics[2].pci, Some(ProtocolVersion::V1_2));

        let again = args.to_args();
        let again: Vec<&str> = again.iter().map(String::as_str).collect();
        assert_eq!(parse(&again).unwrap().nics(), nics);

        assert!(parse(&["--nic=none"]).unwrap().nics().is_empty());
        assert_eq!(parse(&[]).unwrap().nics().len(), 1);
    }

    #[test]
    fn buses_are_parsed() {
        let args = parse(&[
            "--pci=bus=e9ac9b28-cf63-4466-9ae3-4b849c3ee03b,version=1.2,msix=64,bar2=16G:64:pref+slot=3.1,node=1,\
             serial=5,msi=4,add=later",
            "--pci=offer=later",
            "--pci=kind=nvme,size=64M,queues=2",
        ])
        .unwrap();
        let buses: Vec<_> = args.buses().collect();
        assert_eq!(buses.len(), 3);
        assert_eq!(buses[0].bus.unwrap().to_bytes()[4..6], [0x63, 0xcf]);
        assert_eq!(buses[0].version, Some(ProtocolVersion::V1_2));
        let [first, second] = &buses[0].functions[..] else {
            panic!("{buses:?}");
        };
        assert_eq!((first.slot, first.later), (None, false));
        assert_eq!((second.slot, second.node), (Some((3, 1)), Some(1)));
        assert_eq!((second.serial, second.later), (Some(5), true));
        assert_ne!(first.kind, second.kind);
        assert!(buses[1].later);
        assert_eq!(buses[1].functions, [FunctionSpec::new(Kind::DEFAULT)]);
        assert_ne!(buses[2].functions[0].kind, Kind::DEFAULT);

        let again = args.to_args();
        let again: Vec<&str> = again.iter().map(String::as_str).collect();
        assert!(parse(&again).unwrap().buses().eq(buses));
        for bus in [
            "bus=1",
            "version=1.5",
            "offer=now",
            "kind=disk",
            "slot=32",
            "slot=1.8",
            "slot=1.1.1",
            "bar1=4K:64,bar2=4K",
            "msi=5",
            "msi",
            "queues=2",
            "kind=nvme,queues=0",
            "kind=nvme,msi=1",
        ] {
            assert!(parse(&[&format!("--pci={bus}")]).is_err(), "{bus}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for nic in [
            "mac",
            "mac=60:45:bd:e9:60",
            "mac=60:45:bd:e9:60:a3:00",
            "mac=61:45:bd:e9:60:a3",
            "mac=6:45:bd:e9:60:a3",
            "serial=0",
            "serial=-1",
            "index=256",
            "channels=0",
            "queues=65",
            "nvsp=3",
            "pci=1.0",
            "vf=mlx5",
            "bus=1",
            "speed=1",
        ] {
            assert!(parse(&[&format!("--nic={nic}")]).is_err(), "{nic}");
        }
        for version in [
            "--vmbus-version=1.1",
            "--nvsp-version=3",
            "--vpci-version=1.5",
        ] {
            assert!(parse(&[version]).is_err(), "{version}");
        }
    }

    #[test]
    fn versions_have_their_usual_names() {
        for (name, version) in [
            ("6.0", Version::V6_0),
            ("4.1", Version::V4_1),
            ("4", Version::V4_0),
        ] {
            let args = parse(&["--vmbus-version", name]).unwrap();
            assert_eq!(args.vmbus_config().max_version, version);
        }
        for (name, version) in [
            ("6.1", nvsp::Version::V61),
            ("5.0", nvsp::Version::V5),
            ("1", nvsp::Version::V1),
        ] {
            let args = parse(&["--nvsp-version", name]).unwrap();
            assert_eq!(args.nvsp_version(), version);
        }
        let args = parse(&["--vpci-version", "1.2"]).unwrap();
        assert_eq!(args.vpci_version(), ProtocolVersion::V1_2);
    }
}
