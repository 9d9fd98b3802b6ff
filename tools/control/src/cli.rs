// SPDX-License-Identifier: GPL-2.0

//! `hvlab ctl`: the control socket from the command line.

use std::{
    io::{self, Write},
    path::PathBuf,
    thread,
    time::Duration,
};

use clap::{Args, Subcommand, ValueEnum};

use crate::{
    Client, ClientError, Fault, Kind, LogPage, PciAction, Reply, Request, Setting, Status, Target,
    MAX_SERVICE,
};

/// Control a running lab.
#[derive(Debug, Args)]
pub struct Ctl {
    /// Control socket of the lab.
    #[arg(long, env = "HVLAB_SOCKET", default_value = "hvlab.sock")]
    socket: PathBuf,

    /// Seconds to wait for a lab that is starting.
    #[arg(long, default_value_t = 0)]
    wait: u64,

    /// Print the reply as JSON.
    #[arg(long)]
    json: bool,

    #[command(subcommand)]
    command: Command,
}

/// Up or down.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Link {
    Up,
    Down,
}

/// A number, or nothing for what is usual.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Value(Option<u32>);

fn parse_value(text: &str) -> Result<Value, String> {
    let number = match text.strip_prefix("0x") {
        _ if text == "usual" => return Ok(Value(None)),
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    };
    number
        .map(|number| Value(Some(number)))
        .map_err(|error| format!("{error}: a number or `usual` is wanted"))
}

/// On or off.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Switch {
    On,
    Off,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Give a NIC its VF.
    AddVf {
        /// Number of the NIC.
        #[arg(default_value_t = 0)]
        nic: u32,
    },
    /// Take a NIC's VF away in order.
    RemoveVf {
        /// Number of the NIC.
        #[arg(default_value_t = 0)]
        nic: u32,
    },
    /// Set the VF's link.
    VfLink {
        /// The state.
        link: Link,
        /// Number of the NIC.
        #[arg(default_value_t = 0)]
        nic: u32,
    },
    /// Let the VF ask its driver to reset it.
    ResetVf {
        /// Number of the NIC.
        #[arg(default_value_t = 0)]
        nic: u32,
    },
    /// Tell the guest that the NIC has a VF, or that it has none.
    SetAssociation {
        /// The state.
        on: Switch,
        /// Number of the NIC.
        #[arg(default_value_t = 0)]
        nic: u32,
    },
    /// Ask the guest to eject the VF.
    Eject {
        /// Number of the NIC.
        #[arg(default_value_t = 0)]
        nic: u32,
    },
    /// Rescind a device without any warning.
    Rescind {
        /// Which device.
        device: Target,
        /// Number of the NIC.
        #[arg(default_value_t = 0)]
        nic: u32,
    },
    /// Offer a rescinded device again.
    Offer {
        /// Which device.
        device: Target,
        /// Number of the NIC.
        #[arg(default_value_t = 0)]
        nic: u32,
    },
    /// Tell the guest that its NIC hangs on another network now.
    ChangeNetwork {
        /// Number of the NIC.
        #[arg(default_value_t = 0)]
        nic: u32,
    },
    /// Let the synthetic NIC behave otherwise than usually.
    Set {
        /// What of it.
        setting: Setting,
        /// A number, 0x before hexadecimal digits, or `usual`.
        #[arg(value_parser = parse_value)]
        value: Value,
        /// Number of the NIC.
        #[arg(default_value_t = 0)]
        nic: u32,
    },
    /// Send something to the driver of the synthetic NIC as it is, right or wrong.
    Send {
        /// What it is sent as.
        kind: Kind,
        /// The message as hexadecimal digits; several RNDIS messages go in one packet.
        #[arg(required = true)]
        messages: Vec<String>,
        /// Number of the NIC.
        #[arg(long, default_value_t = 0)]
        nic: u32,
        /// Transaction of a completion.
        #[arg(long, default_value_t = 0)]
        transaction: u64,
        /// How many times.
        #[arg(long, default_value_t = 1)]
        times: u32,
    },
    /// Let something go wrong the next time it comes up.
    Fault {
        /// What.
        fault: Fault,
        /// Number of the NIC.
        #[arg(default_value_t = 0)]
        nic: u32,
        /// How many times; 0 takes it back.
        #[arg(long, default_value_t = 1)]
        times: u32,
    },
    /// Do something with a virtual PCI bus that is not a VF's.
    Pci {
        /// Number of the bus.
        bus: u32,
        #[command(subcommand)]
        action: PciAction,
    },
    /// Set the link of the synthetic NIC.
    NicLink {
        /// The state.
        link: Link,
        /// Number of the NIC.
        #[arg(default_value_t = 0)]
        nic: u32,
    },
    /// Host servicing: take the VF away and give it back.
    Service {
        /// Seconds that the VF is gone.
        #[arg(long, default_value_t = 3.0, allow_negative_numbers = true)]
        duration: f64,
        /// Only this NIC.
        #[arg(long)]
        nic: Option<u32>,
    },
    /// Run a command at the other end of a NIC's wire, such as: ping -c 3 10.0.0.2
    Peer {
        /// Number of the NIC.
        #[arg(long, default_value_t = 0)]
        nic: u32,
        /// The command for a shell there; it may take 100 seconds.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Print the message log.
    Log {
        /// Go on printing.
        #[arg(long, short)]
        follow: bool,
        /// Begin with this line number.
        #[arg(long, default_value_t = 0)]
        since: u64,
    },
    /// Print all counters.
    Counters {
        /// Only those whose name contains this.
        #[arg(default_value = "")]
        pattern: String,
    },
    /// Print the state of the lab.
    Status,
    /// End the lab.
    Quit,
}

/// Why the command failed.
#[derive(Debug, thiserror::Error)]
pub enum CtlError {
    /// Nobody there.
    #[error(
        "{}: {error}: no lab listens there; start one (make lab), or name its socket with --socket",
        socket.display()
    )]
    NoLab {
        /// Where it was looked for.
        socket: PathBuf,
        /// What was found.
        error: ClientError,
    },
    /// The request.
    #[error("{}: {error}", socket.display())]
    Request {
        /// Where it was sent.
        socket: PathBuf,
        /// Why it failed.
        error: ClientError,
    },
    /// The output.
    #[error("output: {0}")]
    Output(#[from] io::Error),
    /// The command line.
    #[error("a duration is a number of seconds, from 0 to 600")]
    Duration,
    /// The lab.
    #[error("the lab replied with something else than what was asked for")]
    UnexpectedReply,
}

impl Command {
    fn request(&self) -> Result<Request, CtlError> {
        Ok(match *self {
            Self::Peer { nic, ref command } => Request::Peer {
                nic,
                run: command.join(" "),
            },
            Self::AddVf { nic } => Request::AddVf { nic },
            Self::RemoveVf { nic } => Request::RemoveVf { nic },
            Self::VfLink { link, nic } => Request::VfLink {
                nic,
                up: matches!(link, Link::Up),
            },
            Self::ResetVf { nic } => Request::ResetVf { nic },
            Self::SetAssociation { on, nic } => Request::SetAssociation {
                nic,
                on: matches!(on, Switch::On),
            },
            Self::Eject { nic } => Request::Eject { nic },
            Self::Rescind { device, nic } => Request::Rescind { nic, device },
            Self::Offer { device, nic } => Request::Offer { nic, device },
            Self::NicLink { link, nic } => Request::NicLink {
                nic,
                up: matches!(link, Link::Up),
            },
            Self::ChangeNetwork { nic } => Request::ChangeNetwork { nic },
            Self::Set {
                setting,
                value,
                nic,
            } => Request::Set {
                nic,
                setting,
                value: value.0,
            },
            Self::Send {
                kind,
                ref messages,
                nic,
                transaction,
                times,
            } => Request::Send {
                nic,
                kind,
                transaction,
                messages: messages.clone(),
                times,
            },
            Self::Fault { fault, nic, times } => Request::Fault { nic, fault, times },
            Self::Pci { bus, ref action } => Request::Pci {
                bus,
                action: action.clone(),
            },
            Self::Service { duration, nic } => {
                let duration = Duration::try_from_secs_f64(duration)
                    .ok()
                    .filter(|duration| *duration <= MAX_SERVICE)
                    .ok_or(CtlError::Duration)?;
                Request::Service {
                    nic,
                    duration_ms: duration.as_millis() as u64,
                }
            }
            Self::Log { since, .. } => Request::Log { since },
            Self::Counters { .. } => Request::Counters,
            Self::Status => Request::Status,
            Self::Quit => Request::Quit,
        })
    }
}

impl Ctl {
    /// Carries the command out and prints the reply.
    pub fn run(&self) -> Result<(), CtlError> {
        let failed = |error| CtlError::Request {
            socket: self.socket.clone(),
            error,
        };
        let mut request = self.command.request()?;
        let mut client =
            Client::connect(&self.socket, Duration::from_secs(self.wait)).map_err(|error| {
                CtlError::NoLab {
                    socket: self.socket.clone(),
                    error,
                }
            })?;
        let mut out = io::stdout().lock();
        loop {
            let reply = client.request(&request).map_err(failed)?;
            if self.json {
                serde_json::to_writer(&mut out, &reply).map_err(io::Error::from)?;
                writeln!(out)?;
            } else {
                self.print(&mut out, &reply)?;
            }
            out.flush()?;

            // The log comes in pages.
            let Command::Log { follow, .. } = self.command else {
                return Ok(());
            };
            let Reply::Log(page) = reply else {
                return Err(CtlError::UnexpectedReply);
            };
            if page.lines.is_empty() {
                if !follow {
                    return Ok(());
                }
                thread::sleep(Duration::from_millis(300));
            }
            request = Request::Log { since: page.next };
        }
    }

    fn print(&self, out: &mut impl Write, reply: &Reply) -> io::Result<()> {
        match reply {
            Reply::Done => Ok(()),
            Reply::Output(text) => write!(out, "{text}"),
            Reply::Log(page) => print_log(out, page),
            Reply::Counters(counters) => {
                let pattern = match &self.command {
                    Command::Counters { pattern } => pattern.as_str(),
                    _ => "",
                };
                for (name, value) in counters.iter().filter(|(name, _)| name.contains(pattern)) {
                    writeln!(out, "{name} {value}")?;
                }
                Ok(())
            }
            Reply::Status(status) => print_status(out, status),
        }
    }
}

fn print_log(out: &mut impl Write, page: &LogPage) -> io::Result<()> {
    if page.dropped != 0 {
        writeln!(out, "({} older lines are no longer kept)", page.dropped)?;
    }
    page.lines
        .iter()
        .try_for_each(|line| writeln!(out, "{line}"))
}

fn print_status(out: &mut impl Write, status: &Status) -> io::Result<()> {
    let state = |on: bool, yes: &'static str, no: &'static str| if on { yes } else { no };
    writeln!(
        out,
        "vmbus: version {}, {} channels offered, {} open, {} unreleased, {} GPADLs, {} interrupts",
        status.vmbus_version.as_deref().unwrap_or("none"),
        status.channels_offered,
        status.channels_open,
        status.channels_unreleased,
        status.gpadls,
        status.interrupts,
    )?;
    for (number, nic) in status.nics.iter().enumerate() {
        writeln!(
            out,
            "nic {number}: {} mac {} {}, NVSP {}, link {}, {} channels, data path {}{}",
            nic.instance,
            nic.mac,
            if nic.open {
                "open"
            } else {
                state(nic.offered, "offered", "absent")
            },
            nic.nvsp_version.as_deref().unwrap_or("none"),
            state(nic.link_up, "up", "down"),
            nic.channels,
            match nic.data_path {
                crate::DataPath::Synthetic => "synthetic",
                crate::DataPath::Vf => "VF",
            },
            nic.netns
                .as_deref()
                .map(|netns| format!(", netns {netns}"))
                .unwrap_or_default(),
        )?;
        if let Some(vf) = &nic.vf {
            writeln!(
                out,
                "  vf: {} serial {} {}, {}, link {}, protocol {}, {} interrupts",
                vf.instance,
                vf.serial,
                if vf.open {
                    "open"
                } else {
                    state(vf.offered, "offered", "absent")
                },
                state(vf.associated, "associated", "not associated"),
                state(vf.link_up, "up", "down"),
                vf.vpci_version.as_deref().unwrap_or("none"),
                vf.interrupts,
            )?;
        }
    }
    for (number, bus) in status.buses.iter().enumerate() {
        writeln!(
            out,
            "bus {number}: {} {}, protocol {}, {} interrupts",
            bus.instance,
            if bus.open {
                "open"
            } else {
                state(bus.offered, "offered", "absent")
            },
            bus.vpci_version.as_deref().unwrap_or("none"),
            bus.interrupts,
        )?;
        for (number, function) in bus.functions.iter().enumerate() {
            writeln!(
                out,
                "  function {number}: {} at {:02x}.{} serial {} {}",
                function.kind,
                function.device,
                function.function,
                function.serial,
                state(function.present, "present", "absent"),
            )?;
        }
    }
    Ok(())
}
