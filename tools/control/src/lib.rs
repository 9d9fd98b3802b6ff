// SPDX-License-Identifier: GPL-2.0

//! The lab's control socket: JSON, one request and one reply a line.
//!
//! ```text
//! > {"command":"vf-link","nic":0,"up":false}
//! < {"ok":"done"}
//! > {"command":"status"}
//! < {"ok":{"status":{"vmbus_version":"6.0", ...}}}
//! ```
//!
//! The running lab implements [`Lab`]; [`Server`] brings it to a socket, [`serve`] to any other
//! stream. [`Client`] is the other end, and [`cli`] the command line for it.

#![forbid(unsafe_code)]

pub mod cli;
mod client;
mod server;

use std::{collections::BTreeMap, thread, time::Duration};

use serde::{Deserialize, Serialize};

pub use client::{Client, ClientError};
pub use server::{serve, Server};

/// The longest request that a server reads.
pub const MAX_REQUEST: u64 = 1024 * 1024;

/// Lines of the message log in one reply, at most.
pub const MAX_LOG_LINES: usize = 4096;

/// The longest host servicing that can be asked for.
pub const MAX_SERVICE: Duration = Duration::from_secs(600);

/// A request. NICs are numbered from zero in the order of the lab's configuration; each has at most
/// one VF.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Gives a NIC its VF: offers the virtual PCI bus and associates the VF.
    AddVf {
        /// The NIC.
        nic: u32,
    },
    /// Takes the VF away in order: ends the association, ejects, rescinds.
    RemoveVf {
        /// The NIC.
        nic: u32,
    },
    /// Sets the VF's link.
    VfLink {
        /// The NIC.
        nic: u32,
        /// Up or down.
        up: bool,
    },
    /// Lets the VF ask its driver to reset it, as after a failure of the hardware.
    ResetVf {
        /// The NIC.
        nic: u32,
    },
    /// Sends the association message alone.
    SetAssociation {
        /// The NIC.
        nic: u32,
        /// Associated or not.
        on: bool,
    },
    /// Asks the guest to eject the VF, alone.
    Eject {
        /// The NIC.
        nic: u32,
    },
    /// Rescinds a device without any warning to the guest.
    Rescind {
        /// The NIC.
        nic: u32,
        /// Which of its devices.
        device: Target,
    },
    /// Offers a rescinded device again.
    Offer {
        /// The NIC.
        nic: u32,
        /// Which of its devices.
        device: Target,
    },
    /// Sets the link that the synthetic NIC indicates.
    NicLink {
        /// The NIC.
        nic: u32,
        /// Up or down.
        up: bool,
    },
    /// Tells the guest that its NIC hangs on another network now.
    ChangeNetwork {
        /// The NIC.
        nic: u32,
    },
    /// Lets the synthetic NIC behave otherwise than usually.
    Set {
        /// The NIC.
        nic: u32,
        /// What of it.
        setting: Setting,
        /// Nothing is as usual.
        value: Option<u32>,
    },
    /// Sends something to the driver of the synthetic NIC as it is, right or wrong.
    Send {
        /// The NIC.
        nic: u32,
        /// What it is sent as.
        kind: Kind,
        /// Transaction of a completion.
        #[serde(default)]
        transaction: u64,
        /// The message as hexadecimal digits; several, of RNDIS, go in one packet.
        messages: Vec<String>,
        /// How many times.
        times: u32,
    },
    /// Lets something go wrong the next times it comes up.
    Fault {
        /// The NIC.
        nic: u32,
        /// What.
        fault: Fault,
        /// How many times; zero takes it back.
        times: u32,
    },
    /// Does something with a virtual PCI bus that is not a VF's.
    Pci {
        /// The bus, counted from zero as well.
        bus: u32,
        /// What.
        action: PciAction,
    },
    /// Host servicing: takes the VFs away and gives them back after a while. Replies at the end.
    Service {
        /// One NIC, or all.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        nic: Option<u32>,
        /// How long the VFs are gone.
        duration_ms: u64,
    },
    /// Runs a shell command in the network namespace of a NIC's peer. Replies at its end.
    Peer {
        /// The NIC.
        nic: u32,
        /// The command.
        run: String,
    },
    /// Reads the message log.
    Log {
        /// Sequence number of the first line; zero is the first line ever.
        #[serde(default)]
        since: u64,
    },
    /// Reads all counters.
    Counters,
    /// Reads the state of the lab.
    Status,
    /// Ends the lab.
    Quit,
}

/// What can be done with a virtual PCI bus. Its functions are numbered from zero.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, clap::Subcommand)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum PciAction {
    /// Offer the bus with what is on it
    Offer,
    /// Eject what is on the bus, then rescind it
    Remove,
    /// Rescind the bus without any warning
    Rescind,
    /// Put a function on the bus
    Add {
        /// Number of the function
        #[arg(default_value_t = 0)]
        function: u32,
    },
    /// Ask the guest to give a function up
    Eject {
        /// Number of the function
        #[arg(default_value_t = 0)]
        function: u32,
    },
    /// Pull a function off the bus without asking
    Pull {
        /// Number of the function
        #[arg(default_value_t = 0)]
        function: u32,
    },
    /// Print the configuration space of a function, as hexadecimal digits
    Config {
        /// Number of the function
        #[arg(default_value_t = 0)]
        function: u32,
    },
    /// Tell the function's driver that configuration blocks have changed
    Invalidate {
        /// Number of the function
        function: u32,
        /// One bit for each block, 0x before hexadecimal digits
        #[arg(value_parser = parse_mask)]
        mask: u64,
    },
    /// Let something go wrong the next time it comes up
    Fault {
        /// What; only the faults of buses, pci-...
        fault: Fault,
        /// How many times; 0 takes it back
        #[arg(long, default_value_t = 1)]
        times: u32,
    },
    /// Answer a request otherwise than usually the next time it comes
    Answer {
        /// Which
        request: PciRequest,
        /// How; the answer of relations is a message
        how: Answer,
        /// How many times; 0 takes it back
        #[arg(long, default_value_t = 1)]
        times: u32,
    },
    /// Send messages to the guest's driver as they are
    Send {
        /// The bytes of each in hexadecimal digits
        #[arg(required = true)]
        messages: Vec<String>,
        /// Send them as completions of this transaction
        #[arg(long)]
        completion: Option<u64>,
        /// How many times, all in turn
        #[arg(long, default_value_t = 1)]
        times: u32,
    },
}

/// A request of the guest on a virtual PCI bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum PciRequest {
    /// Proposal of a version
    Version,
    /// What is on the bus
    Relations,
    /// Sizes of a function's BARs
    Requirements,
    /// The bus is to be used
    D0Entry,
    /// A function has its resources
    Assigned,
    /// A message for an interrupt
    CreateInterrupt,
    /// An interrupt is not used any more; the guest wants no answer
    DeleteInterrupt,
    /// A configuration block is read
    ReadBlock,
    /// A configuration block is written
    WriteBlock,
    /// The bus is not used any more
    D0Exit,
}

/// How a request is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Not at all; it is not carried out
    Mute,
    /// With an error; it is not carried out
    Refused,
    /// With the status alone, or without it if there is no more
    Short,
    /// With 512 bytes more
    Long,
    /// After a second
    Slow,
    /// After 7 seconds
    Late,
    /// After 35 seconds
    VeryLate,
    /// Twice
    Twice,
    /// After the completion of a transaction that is none
    Stray,
}

fn parse_mask(text: &str) -> Result<u64, std::num::ParseIntError> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    }
}

/// One of a NIC's devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// The synthetic network device.
    Nic,
    /// The virtual PCI bus with the VF.
    Vf,
}

/// What a synthetic NIC can do otherwise than usually.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Setting {
    /// Link speed in Mbit/s
    LinkSpeed,
    /// Size of the receive buffer's sections
    ReceiveSectionSize,
    /// Number of these sections, as the guest is told
    ReceiveSectionCount,
    /// Where they begin, as the guest is told
    ReceiveSectionOffset,
    /// Number of groups of sections, as the guest is told
    ReceiveGroups,
    /// Size of the send buffer's sections
    SendSectionSize,
    /// Most subchannels to grant
    Subchannels,
    /// Checksums in IPv4 that are offered, as bits of NDIS
    ChecksumV4,
    /// The same in IPv6
    ChecksumV6,
    /// Largest packet for large send offload in IPv4; 0: not offered
    LargeSendV4,
    /// The same in IPv6
    LargeSendV6,
    /// Options of large send offload in IPv6, as bits of NDIS
    LargeSendV6Options,
    /// Receive segment coalescing: 1 for IPv4, 2 for IPv6, 3 for both
    Rsc,
    /// Alignment of packets in one message, as a power of two
    PacketAlignment,
    /// Most packets in one message
    PacketsPerMessage,
    /// Entries of the RSS indirection table
    RssEntries,
    /// Status in the completions of the guest's frames
    PacketStatus,
    /// 1: what the guest sends stays in its rings
    HoldPackets,
    /// 1: frames are taken, and completed when this ends
    HoldCompletions,
    /// 1: each frame from the guest is a line of the message log
    LogFrames,
}

/// What something is sent to the driver of the synthetic NIC as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// An NVSP message
    Nvsp,
    /// A completion
    Completion,
    /// RNDIS messages in one packet for data
    Rndis,
    /// RNDIS messages in one packet for control messages
    RndisControl,
}

/// What can go wrong with a NIC or its VF.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// Synthetic NIC: the proposal of a version has no answer
    NvspInitUnanswered,
    /// Synthetic NIC: the receive buffer is refused
    ReceiveBufferRefused,
    /// Synthetic NIC: the send buffer is refused
    SendBufferRefused,
    /// Synthetic NIC: the initialisation of RNDIS has no answer
    RndisInitUnanswered,
    /// Synthetic NIC: the setting of an object has no answer
    RndisSetUnanswered,
    /// Synthetic NIC: the setting of an object is refused
    RndisSetRefused,
    /// Synthetic NIC: the request for subchannels is refused
    SubchannelsRefused,
    /// Synthetic NIC: a subchannel cannot be opened
    SubchannelOpenRefused,
    /// Synthetic NIC: the switch of the data path has no answer
    DataPathUnanswered,
    /// Synthetic NIC: the switch of the data path is answered after three seconds
    DataPathDelayed,
    /// Virtual PCI bus: the proposal of a version has no answer
    PciVersionUnanswered,
    /// Virtual PCI bus: the guest is not told which functions there are
    PciRelationsUnsent,
    /// Virtual PCI bus: the D0 entry has no answer
    PciD0Unanswered,
    /// Virtual PCI bus: the D0 entry is refused
    PciD0Refused,
    /// Virtual PCI bus: the resources assigned to a function are refused
    PciResourcesRefused,
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Response {
    /// It was carried out.
    Ok(Reply),
    /// It was not.
    Error(String),
}

/// What a request that was carried out gives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// Nothing to tell.
    Done,
    /// What a command printed.
    Output(String),
    /// A part of the message log.
    Log(LogPage),
    /// Counters by name.
    Counters(BTreeMap<String, u64>),
    /// The state of the lab.
    Status(Status),
}

/// A part of the message log.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogPage {
    /// The lines.
    pub lines: Vec<String>,
    /// What to ask for next.
    pub next: u64,
    /// Lines that were asked for but are no longer kept.
    pub dropped: u64,
}

/// The state of the lab.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Negotiated version of the VMBus; `None` while the guest is not connected.
    pub vmbus_version: Option<String>,
    /// Channels that are offered and not rescinded.
    pub channels_offered: u64,
    /// Channels that are open.
    pub channels_open: u64,
    /// Rescinded channels whose ids the guest has not released.
    pub channels_unreleased: u64,
    /// Established GPADLs.
    pub gpadls: u64,
    /// Interrupts that the guest has set up on virtual PCI buses.
    pub interrupts: u64,
    /// The NICs.
    pub nics: Vec<NicStatus>,
    /// The virtual PCI buses that are not a VF's.
    #[serde(default)]
    pub buses: Vec<BusStatus>,
}

/// The state of a virtual PCI bus that is not a VF's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BusStatus {
    /// Instance GUID.
    pub instance: String,
    /// Whether the bus is offered.
    pub offered: bool,
    /// Whether the guest's driver has it open.
    pub open: bool,
    /// Negotiated protocol.
    pub vpci_version: Option<String>,
    /// Interrupts that the guest has set up.
    pub interrupts: u32,
    /// The functions that can be on it.
    pub functions: Vec<FunctionStatus>,
}

/// The state of a function of a virtual PCI bus.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionStatus {
    /// What it is.
    pub kind: String,
    /// Device number.
    pub device: u8,
    /// Function number.
    pub function: u8,
    /// Serial number, which names its slot.
    pub serial: u32,
    /// Whether it is on the bus, or will be when that is offered.
    pub present: bool,
}

/// The state of one NIC.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicStatus {
    /// Instance GUID.
    pub instance: String,
    /// MAC address.
    pub mac: String,
    /// Whether the device is offered.
    pub offered: bool,
    /// Whether the guest's driver has it open.
    pub open: bool,
    /// Negotiated NVSP version.
    pub nvsp_version: Option<String>,
    /// Link that the host indicates.
    pub link_up: bool,
    /// Open channels, subchannels included.
    pub channels: u32,
    /// Where the guest has put the data path.
    pub data_path: DataPath,
    /// Network namespace of the tap on the host's side.
    pub netns: Option<String>,
    /// Its VF, if it is configured to have one.
    pub vf: Option<VfStatus>,
}

/// Where a NIC's traffic goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DataPath {
    /// Over the VMBus channels.
    #[default]
    Synthetic,
    /// Over the VF.
    Vf,
}

/// The state of a VF.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VfStatus {
    /// Instance GUID of its virtual PCI bus.
    pub instance: String,
    /// Serial number that pairs it with the NIC.
    pub serial: u32,
    /// Whether the bus is offered.
    pub offered: bool,
    /// Whether the guest's driver has it open.
    pub open: bool,
    /// Whether the guest has been told that it has a VF.
    pub associated: bool,
    /// Link of the VF.
    pub link_up: bool,
    /// Negotiated protocol of the virtual PCI bus.
    pub vpci_version: Option<String>,
    /// Interrupts that the guest has set up.
    pub interrupts: u32,
}

/// What the running lab can do. An error is a sentence for whoever asked.
pub trait Lab: Send + Sync {
    /// See [`Request::AddVf`].
    fn add_vf(&self, nic: u32) -> Result<(), String>;

    /// See [`Request::RemoveVf`]. Returns when the guest has released the device.
    fn remove_vf(&self, nic: u32) -> Result<(), String>;

    /// See [`Request::VfLink`].
    fn set_vf_link(&self, nic: u32, up: bool) -> Result<(), String>;

    /// See [`Request::ResetVf`].
    fn reset_vf(&self, nic: u32) -> Result<(), String>;

    /// See [`Request::SetAssociation`].
    fn set_association(&self, nic: u32, on: bool) -> Result<(), String>;

    /// See [`Request::Eject`].
    fn eject(&self, nic: u32) -> Result<(), String>;

    /// See [`Request::Rescind`].
    fn rescind(&self, nic: u32, device: Target) -> Result<(), String>;

    /// See [`Request::Offer`].
    fn offer(&self, nic: u32, device: Target) -> Result<(), String>;

    /// See [`Request::NicLink`].
    fn set_nic_link(&self, nic: u32, up: bool) -> Result<(), String>;

    /// See [`Request::ChangeNetwork`].
    fn change_network(&self, nic: u32) -> Result<(), String>;

    /// See [`Request::Set`].
    fn set(&self, nic: u32, setting: Setting, value: Option<u32>) -> Result<(), String>;

    /// See [`Request::Send`]. Sends once.
    fn send(
        &self,
        nic: u32,
        kind: Kind,
        transaction: u64,
        messages: &[Vec<u8>],
    ) -> Result<(), String>;

    /// See [`Request::Fault`].
    fn fault(&self, nic: u32, fault: Fault, times: u32) -> Result<(), String>;

    /// See [`Request::Pci`]. Gives what is to be printed, if anything.
    fn pci(&self, bus: u32, action: &PciAction) -> Result<Option<String>, String>;

    /// Writes a line of what the control socket does into the message log.
    fn note(&self, event: &str);

    /// See [`Request::Peer`]. Gives what the command printed.
    fn run_at_peer(&self, nic: u32, command: &str) -> Result<String, String>;

    /// See [`Request::Log`].
    fn log(&self, since: u64, max_lines: usize) -> LogPage;

    /// See [`Request::Counters`].
    fn counters(&self) -> BTreeMap<String, u64>;

    /// See [`Request::Status`].
    fn status(&self) -> Status;

    /// See [`Request::Quit`]. Returns at once.
    fn quit(&self);
}

/// Carries a request out.
pub fn execute(lab: &dyn Lab, request: &Request) -> Response {
    let done = match *request {
        Request::AddVf { nic } => lab.add_vf(nic),
        Request::RemoveVf { nic } => lab.remove_vf(nic),
        Request::VfLink { nic, up } => lab.set_vf_link(nic, up),
        Request::ResetVf { nic } => lab.reset_vf(nic),
        Request::SetAssociation { nic, on } => lab.set_association(nic, on),
        Request::Eject { nic } => lab.eject(nic),
        Request::Rescind { nic, device } => lab.rescind(nic, device),
        Request::Offer { nic, device } => lab.offer(nic, device),
        Request::NicLink { nic, up } => lab.set_nic_link(nic, up),
        Request::ChangeNetwork { nic } => lab.change_network(nic),
        Request::Set {
            nic,
            setting,
            value,
        } => lab.set(nic, setting, value),
        Request::Send {
            nic,
            kind,
            transaction,
            ref messages,
            times,
        } => send(lab, nic, kind, transaction, messages, times),
        Request::Fault { nic, fault, times } => lab.fault(nic, fault, times),
        Request::Pci { bus, ref action } => match lab.pci(bus, action) {
            Ok(Some(output)) => return Response::Ok(Reply::Output(output)),
            other => other.map(drop),
        },
        Request::Service { nic, duration_ms } => {
            service(lab, nic, Duration::from_millis(duration_ms))
        }
        Request::Peer { nic, ref run } => {
            return match lab.run_at_peer(nic, run) {
                Ok(output) => Response::Ok(Reply::Output(output)),
                Err(error) => Response::Error(error),
            }
        }
        Request::Log { since } => return Response::Ok(Reply::Log(lab.log(since, MAX_LOG_LINES))),
        Request::Counters => return Response::Ok(Reply::Counters(lab.counters())),
        Request::Status => return Response::Ok(Reply::Status(lab.status())),
        Request::Quit => {
            lab.quit();
            Ok(())
        }
    };
    match done {
        Ok(()) => Response::Ok(Reply::Done),
        Err(error) => Response::Error(error),
    }
}

/// Sends something as it is.
fn send(
    lab: &dyn Lab,
    nic: u32,
    kind: Kind,
    transaction: u64,
    messages: &[String],
    times: u32,
) -> Result<(), String> {
    let several = matches!(kind, Kind::Rndis | Kind::RndisControl);
    if messages.is_empty() || (messages.len() > 1 && !several) {
        return Err("one message is sent at a time, unless it is RNDIS".into());
    }
    let messages = messages.iter().map(|message| unhex(message));
    let messages = messages.collect::<Result<Vec<_>, _>>()?;
    (0..times).try_for_each(|_| lab.send(nic, kind, transaction, &messages))
}

/// The bytes of hexadecimal digits.
///
/// # Errors
///
/// A text for the user if the text is something else.
pub fn unhex(text: &str) -> Result<Vec<u8>, String> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let bytes = text.as_bytes().chunks(2).map(|pair| match *pair {
        [high, low] => Some(((digit(high)? << 4) | digit(low)?) as u8),
        _ => None,
    });
    bytes
        .collect::<Option<Vec<_>>>()
        .ok_or_else(|| "a message is an even number of hexadecimal digits".into())
}

/// Host servicing: takes the VFs away, waits, gives them back.
fn service(lab: &dyn Lab, nic: Option<u32>, duration: Duration) -> Result<(), String> {
    if duration > MAX_SERVICE {
        return Err(format!(
            "servicing takes at most {} seconds",
            MAX_SERVICE.as_secs()
        ));
    }
    let status = lab.status();
    let present = |nic: u32| {
        status
            .nics
            .get(nic as usize)
            .and_then(|nic| nic.vf.as_ref())
            .is_some_and(|vf| vf.offered)
    };
    let nics: Vec<u32> = match nic {
        Some(nic) if present(nic) => vec![nic],
        Some(nic) => return Err(format!("NIC {nic} has no VF now")),
        None => (0..status.nics.len() as u32)
            .filter(|&nic| present(nic))
            .collect(),
    };
    if nics.is_empty() {
        return Err("no NIC has a VF now".into());
    }

    lab.note(&format!(
        "SERVICE_BEGIN nics={nics:?} duration={duration:?}"
    ));
    let mut result = Ok(());
    for &nic in &nics {
        result = result.and(lab.remove_vf(nic));
    }
    thread::sleep(duration);
    // Even if a guest was slow to give a VF back: it has to come back.
    for &nic in &nics {
        result = result.and(lab.add_vf(nic));
    }
    lab.note(&format!("SERVICE_END result={result:?}"));
    result
}
