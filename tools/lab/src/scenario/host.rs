// SPDX-License-Identifier: GPL-2.0
//! The host of a guest under test, by its control socket.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use lab_control::{
    Client, DataPath, Fault, Kind, LogPage, NicStatus, PciAction, Reply, Request, Setting, Status,
    Target,
};

use super::guest::Nic;
use super::{hex, Result};

/// A host opens its socket before the guest runs.
const CONNECT: Duration = Duration::from_secs(10);

/// A connection to the control socket.
pub struct Host {
    path: PathBuf,
    client: Mutex<Client>,
}

impl Host {
    /// Connects to a host that is just starting, as long as it is alive.
    pub fn connect(path: &Path, alive: impl Fn() -> bool) -> Result<Self> {
        let deadline = Instant::now() + CONNECT;
        let client = loop {
            match Client::connect(path, Duration::ZERO) {
                Ok(client) => break client,
                Err(error) if Instant::now() >= deadline || !alive() => return Err(error.into()),
                Err(_) => thread::sleep(Duration::from_millis(50)),
            }
        };
        Ok(Self {
            path: path.to_owned(),
            client: Mutex::new(client),
        })
    }

    fn request(&self, request: &Request) -> Result<Reply> {
        let mut client = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        client
            .request(request)
            .map_err(|error| format!("host: {request:?}: {error}").into())
    }

    /// All counters.
    pub fn counters(&self) -> Result<BTreeMap<String, u64>> {
        match self.request(&Request::Counters)? {
            Reply::Counters(counters) => Ok(counters),
            other => Err(format!("host: counters: {other:?}").into()),
        }
    }

    /// One of them, which there must be.
    pub fn counter(&self, name: &str) -> Result<u64> {
        let value = self.counters()?.get(name).copied();
        value.ok_or_else(|| format!("the host has no counter {name}").into())
    }

    /// The state of the host.
    pub fn status(&self) -> Result<Status> {
        match self.request(&Request::Status)? {
            Reply::Status(status) => Ok(status),
            other => Err(format!("host: status: {other:?}").into()),
        }
    }

    /// The message log from a line on, and the number of the line after it.
    pub fn log(&self, since: u64) -> Result<(Vec<String>, u64)> {
        let (mut lines, mut next) = (Vec::new(), since);
        loop {
            let page = self.log_page(next)?;
            if page.lines.is_empty() {
                return Ok((lines, next));
            }
            if page.dropped > 0 {
                return Err(format!("{} lines of the log are lost", page.dropped).into());
            }
            next = page.next;
            lines.extend(page.lines);
        }
    }

    /// A NIC's state; NICs are told apart by their instance, as they may come in any order.
    pub fn nic(&self, nic: &Nic) -> Result<NicStatus> {
        let status = self.status()?;
        let number = number(&status, nic)?;
        Ok(status.nics[number as usize].clone())
    }

    /// The number by which the host knows a NIC: its place in the order of offers.
    pub fn number(&self, nic: &Nic) -> Result<u32> {
        number(&self.status()?, nic)
    }

    /// Gives a NIC its VF.
    pub fn add_vf(&self, nic: &Nic) -> Result<()> {
        let nic = self.number(nic)?;
        self.request(&Request::AddVf { nic }).map(drop)
    }

    /// Takes a NIC's VF away.
    pub fn remove_vf(&self, nic: &Nic) -> Result<()> {
        let nic = self.number(nic)?;
        self.request(&Request::RemoveVf { nic }).map(drop)
    }

    /// Sets the VF's link.
    pub fn vf_link(&self, nic: &Nic, up: bool) -> Result<()> {
        let nic = self.number(nic)?;
        self.request(&Request::VfLink { nic, up }).map(drop)
    }

    /// Sets the link of the synthetic NIC.
    pub fn nic_link(&self, nic: &Nic, up: bool) -> Result<()> {
        let nic = self.number(nic)?;
        self.request(&Request::NicLink { nic, up }).map(drop)
    }

    /// Tells the guest that a NIC hangs on another network now.
    pub fn change_network(&self, nic: &Nic) -> Result<()> {
        let nic = self.number(nic)?;
        self.request(&Request::ChangeNetwork { nic }).map(drop)
    }

    /// Lets the synthetic NIC behave otherwise than usually, or as usual.
    pub fn set(&self, nic: &Nic, setting: Setting, value: Option<u32>) -> Result<()> {
        let nic = self.number(nic)?;
        self.request(&Request::Set {
            nic,
            setting,
            value,
        })
        .map(drop)
    }

    /// Sends messages to the driver of the synthetic NIC as they are.
    pub fn send(&self, nic: &Nic, kind: Kind, messages: &[Vec<u8>], times: u32) -> Result<()> {
        let messages = messages.iter().map(|bytes| hex(bytes)).collect();
        self.send_hex(nic, kind, u64::MAX, messages, times)
    }

    /// The same in hex, and with a transaction id.
    pub fn send_hex(
        &self,
        nic: &Nic,
        kind: Kind,
        transaction: u64,
        messages: Vec<String>,
        times: u32,
    ) -> Result<()> {
        self.request(&Request::Send {
            nic: self.number(nic)?,
            kind,
            transaction,
            messages,
            times,
        })
        .map(drop)
    }

    /// The number of the message log's next line.
    pub fn log_end(&self) -> Result<u64> {
        let mut since = 0;
        loop {
            let page = self.log_page(since)?;
            if page.lines.is_empty() {
                return Ok(page.next);
            }
            since = page.next;
        }
    }

    /// The lines of the message log from one on.
    pub fn log_since(&self, mut since: u64) -> Result<Vec<String>> {
        let mut lines = Vec::new();
        loop {
            let page = self.log_page(since)?;
            if page.lines.is_empty() {
                return Ok(lines);
            }
            lines.extend(page.lines);
            since = page.next;
        }
    }

    fn log_page(&self, since: u64) -> Result<LogPage> {
        match self.request(&Request::Log { since })? {
            Reply::Log(page) => Ok(page),
            other => Err(format!("host: log: {other:?}").into()),
        }
    }

    /// Lets something go wrong the next times it comes up.
    pub fn fault(&self, nic: &Nic, fault: Fault, times: u32) -> Result<()> {
        let nic = self.number(nic)?;
        self.request(&Request::Fault { nic, fault, times })
            .map(drop)
    }

    /// Does something with a virtual PCI bus that is not a VF's.
    pub fn pci(&self, bus: usize, action: PciAction) -> Result<()> {
        let bus = bus as u32;
        self.request(&Request::Pci { bus, action }).map(drop)
    }

    /// Configuration space of a function on such a bus, as the host has it.
    pub fn pci_config(&self, bus: usize, function: u32) -> Result<String> {
        let request = Request::Pci {
            bus: bus as u32,
            action: PciAction::Config { function },
        };
        match self.request(&request)? {
            Reply::Output(digits) => Ok(digits),
            other => Err(format!("host: {request:?}: {other:?}").into()),
        }
    }

    /// Says that the NIC has a VF, or none, whatever there is.
    pub fn set_association(&self, nic: &Nic, on: bool) -> Result<()> {
        let nic = self.number(nic)?;
        self.request(&Request::SetAssociation { nic, on }).map(drop)
    }

    /// Asks the guest to give a VF up, and waits until it has.
    pub fn eject(&self, nic: &Nic) -> Result<()> {
        let nic = self.number(nic)?;
        self.request(&Request::Eject { nic }).map(drop)
    }

    /// Takes the VF's bus away without warning.
    pub fn rescind_vf(&self, nic: &Nic) -> Result<()> {
        let (nic, device) = (self.number(nic)?, Target::Vf);
        self.request(&Request::Rescind { nic, device }).map(drop)
    }

    /// Offers the VF's bus again.
    pub fn offer_vf(&self, nic: &Nic) -> Result<()> {
        let (nic, device) = (self.number(nic)?, Target::Vf);
        self.request(&Request::Offer { nic, device }).map(drop)
    }

    /// Starts a servicing that takes the VF away for a while; ends with it.
    pub fn service(&self, nic: &Nic, duration: Duration) -> Result<Servicing> {
        let request = Request::Service {
            nic: Some(self.number(nic)?),
            duration_ms: u64::try_from(duration.as_millis())?,
        };
        // A connection of its own, as the reply comes at the end.
        let mut client = Client::connect(&self.path, CONNECT)?;
        Ok(Servicing(thread::spawn(move || {
            client
                .request(&request)
                .map(drop)
                .map_err(|error| format!("host: {request:?}: {error}"))
        })))
    }

    /// Whether the guest has put the data path on the VF.
    pub fn data_path_is_vf(&self, nic: &Nic) -> Result<bool> {
        Ok(self.nic(nic)?.data_path == DataPath::Vf)
    }

    /// The version that the NIC's driver has negotiated.
    pub fn nvsp_version(&self, nic: &Nic) -> Result<String> {
        self.nic(nic)?
            .nvsp_version
            .ok_or_else(|| "no NVSP version negotiated".into())
    }

    /// Asks the host to end.
    pub fn quit(&self) {
        // One that has ended already cannot be asked, which its process tells.
        let _ = self.request(&Request::Quit);
    }
}

fn number(status: &Status, nic: &Nic) -> Result<u32> {
    let instance = nic.instance();
    let found = status
        .nics
        .iter()
        .position(|candidate| candidate.instance.eq_ignore_ascii_case(&instance));
    match found {
        Some(number) => Ok(number as u32),
        None => Err(format!("the host has no NIC {instance}: {status:?}").into()),
    }
}

/// A servicing under way.
pub struct Servicing(JoinHandle<std::result::Result<(), String>>);

impl Servicing {
    /// Waits for its end.
    pub fn wait(self) -> Result<()> {
        match self.0.join() {
            Ok(result) => result.map_err(Into::into),
            Err(_) => Err("the servicing's thread panicked".into()),
        }
    }
}
