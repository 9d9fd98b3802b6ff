// SPDX-License-Identifier: GPL-2.0
//! A guest under test with its host, and what may be asked of both.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use lab_agent::client::{Client, Running};
use lab_agent::protocol::Exit;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::host::peer_name;
use crate::run::Files;

use super::host::Host;
use super::{ensure, Drivers, Result};

/// What an ordinary command in the guest may take; the guest may be emulated twice over.
pub const COMMAND: Duration = Duration::from_secs(40);
/// From the start of the virtual machine to the first answer of the agent.
const BOOT: Duration = Duration::from_secs(150);

/// Memory of a guest in MiB.
pub const MEMORY: u32 = 1024;

/// One NIC as Azure would give it.
#[derive(Debug, Clone)]
pub struct Nic {
    /// Counted from 0; names the peer's namespace and the addresses.
    pub index: usize,
    /// Pairs the synthetic device and the VF.
    pub serial: u32,
    /// The instance GUID of the virtual PCI bus, when there is a VF at boot.
    pub bus: String,
    /// Whether the VF is there at boot.
    pub vf: bool,
    /// Index of the NIC on whose network it is, without a peer of its own.
    pub lan: Option<usize>,
    /// The NIC whose address it has; its own index as a rule.
    pub twin: usize,
    /// More properties for the host.
    pub more: &'static str,
    /// Newest NVSP version that the host takes from it.
    pub nvsp: Option<&'static str>,
    /// Newest virtual PCI protocol version that it takes on the VF's bus.
    pub pci: Option<&'static str>,
}

impl Nic {
    /// NIC `index` with the addresses that belong to it, without a VF.
    pub fn new(index: usize) -> Self {
        Self {
            index,
            serial: index as u32 + 1,
            bus: format!("e9ac9b28-{:04x}-4466-9ae3-4b849c3ee03b", 0x7870 + index),
            vf: false,
            lan: None,
            twin: index,
            more: "",
            nvsp: None,
            pci: None,
        }
    }

    /// The same with a VF.
    pub fn with_vf(index: usize) -> Self {
        Self {
            vf: true,
            ..Self::new(index)
        }
    }

    /// The same on another NIC's network.
    pub fn on_lan(index: usize, lan: usize) -> Self {
        Self {
            lan: Some(lan),
            ..Self::new(index)
        }
    }

    /// Hardware address, as the guest prints it.
    pub fn mac(&self) -> String {
        format!("60:45:bd:e9:60:{:02x}", 0xa3 + self.twin)
    }

    /// The instance GUID, which repeats the address as on Azure.
    pub fn instance(&self) -> String {
        let low = format!("60{:02x}", 0xa3 + self.index);
        format!("6045bde9-{low}-6045-bde9-{low}6045bde9")
    }

    /// The PCI domain that the bus GUID asks for.
    pub fn domain(&self) -> u16 {
        u16::from_str_radix(&self.bus[9..13], 16).unwrap_or(0)
    }

    /// The name that udev gives the VF.
    pub fn vf_name(&self) -> String {
        format!("enP{}s{}", self.domain(), self.serial)
    }

    /// The synthetic interface when it is the only one, or NICs are offered in order.
    pub fn name(&self) -> String {
        format!("eth{}", self.index)
    }

    /// The guest's address.
    pub fn guest_v4(&self) -> String {
        format!("10.0.{}.2", self.index)
    }

    /// The peer's address.
    pub fn peer_v4(&self) -> String {
        format!("10.0.{}.1", self.index)
    }

    /// The guest's IPv6 address.
    pub fn guest_v6(&self) -> String {
        format!("fd00:{}::2", self.index)
    }

    /// The peer's IPv6 address.
    pub fn peer_v6(&self) -> String {
        format!("fd00:{}::1", self.index)
    }
}

/// What to boot.
#[derive(Debug, Clone)]
pub struct Boot {
    /// The NICs, in the order in which the host offers them.
    pub nics: Vec<Nic>,
    /// The virtual PCI buses that are not a VF's, as `--pci` describes them.
    pub pci: Vec<String>,
    /// Virtual processors.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory: u32,
    /// NUMA nodes.
    pub nodes: u32,
    /// MMIO space above 4 GiB in MiB.
    pub high_mmio: Option<u32>,
    /// With our drivers: the kernel's hv_pci has registered before ours, as on a machine
    /// whose command line does not keep it from that.
    pub builtin_pci: bool,
    /// A file that the guest has as persistent memory.
    pub pmem: Option<PathBuf>,
    /// The guest's memory is isolated from the host.
    pub isolated: bool,
    /// The guest is told to access configuration space by hypercalls.
    pub mmio_hypercalls: bool,
    /// Segment of an empty PCI bus that firmware describes.
    pub pci_segment: Option<u16>,
    /// More words for the kernel's command line.
    pub append: String,
    /// Newest VMBus version that the host takes.
    pub vmbus_version: Option<&'static str>,
    /// Newest NVSP version that the host takes.
    pub nvsp_version: Option<&'static str>,
    /// Newest virtual PCI protocol version that the host takes.
    pub vpci_version: Option<&'static str>,
    /// An archive with more files for the guest.
    pub overlay: Option<PathBuf>,
    /// Whether the message log has all bytes.
    pub log_bytes: bool,
}

impl Boot {
    /// A guest with these NICs and one processor.
    pub fn new(nics: Vec<Nic>) -> Self {
        Self {
            nics,
            pci: Vec::new(),
            cpus: 1,
            memory: MEMORY,
            nodes: 1,
            high_mmio: None,
            builtin_pci: false,
            pmem: None,
            isolated: false,
            mmio_hypercalls: false,
            pci_segment: None,
            append: String::new(),
            vmbus_version: None,
            nvsp_version: None,
            vpci_version: None,
            overlay: None,
            log_bytes: false,
        }
    }
}

/// A running guest.
pub struct Guest {
    process: Child,
    agent: Arc<Client>,
    /// Its host.
    pub host: Host,
    /// Its NICs.
    pub nics: Vec<Nic>,
    /// Console, message log and the like.
    pub folder: PathBuf,
    drivers: Drivers,
    peers: Vec<Child>,
    accounted: AtomicUsize,
    has_crashed: AtomicBool,
}

/// Where the runner finds things.
#[derive(Debug, Clone)]
pub struct Lab {
    /// This program.
    pub hvlab: PathBuf,
    /// The agent, for the peers.
    pub agent: PathBuf,
    /// What guests are made of.
    pub files: Files,
}

impl Lab {
    /// Finds this program and the agent beside it.
    pub fn new(files: &Files) -> Result<Self> {
        let hvlab = std::env::current_exe()?;
        let agent = hvlab.with_file_name("lab-agent");
        if !agent.exists() {
            return Err(format!("{} is missing, build it with: make", agent.display()).into());
        }
        Ok(Self {
            hvlab,
            agent,
            files: files.clone(),
        })
    }
}

impl Guest {
    /// Boots a guest and waits for its agent.
    pub fn boot(lab: &Lab, drivers: Drivers, boot: &Boot, folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder)?;
        let socket = |name: &str| folder.join(name);
        let mut command = Command::new(&lab.hvlab);
        command
            .arg("run")
            .arg("--kernel")
            .arg(&lab.files.kernel)
            .arg("--image")
            .arg(&lab.files.image)
            .args(["--drivers", drivers.word()])
            .args(["--memory", &boot.memory.to_string()])
            .args(["--cpus", &boot.cpus.to_string()])
            .args(["--nodes", &boot.nodes.to_string()])
            .arg("--console")
            .arg(socket("console.log"))
            .arg("--agent")
            .arg(socket("agent.sock"))
            .arg("--control")
            .arg(socket("control.sock"))
            .arg("--log")
            .arg(socket("messages.log"));
        for nic in &boot.nics {
            let mut text = format!(
                "mac={},instance={},serial={},index={}",
                nic.mac(),
                nic.instance(),
                nic.serial,
                nic.index
            );
            text += &format!(",bus={}", nic.bus);
            if let Some(lan) = nic.lan {
                text += &format!(",lan={lan}");
            }
            text += &format!(",bus={}{}", nic.bus, nic.more);
            if nic.vf {
                text += ",vf=mana";
            }
            if let Some(version) = nic.nvsp {
                text += &format!(",nvsp={version}");
            }
            if let Some(version) = nic.pci {
                text += &format!(",pci={version}");
            }
            command.args(["--nic", &text]);
        }
        if boot.nics.is_empty() {
            command.args(["--nic", "none"]);
        }
        for bus in &boot.pci {
            command.args(["--pci", bus]);
        }
        for (option, value) in [
            ("--vmbus-version", boot.vmbus_version),
            ("--nvsp-version", boot.nvsp_version),
            ("--vpci-version", boot.vpci_version),
        ] {
            if let Some(value) = value {
                command.args([option, value]);
            }
        }
        if let Some(mib) = boot.high_mmio {
            command.arg(format!("--high-mmio={mib}"));
        }
        if let Some(path) = &boot.pmem {
            command.arg("--pmem").arg(path);
        }
        if boot.log_bytes {
            command.arg("--log-bytes");
        }
        if boot.builtin_pci {
            command.arg("--builtin-pci");
        }
        if let Some(overlay) = &boot.overlay {
            command.arg("--overlay").arg(overlay);
        }
        if boot.isolated {
            command.arg("--isolated");
        }
        if boot.mmio_hypercalls {
            command.arg("--mmio-hypercalls");
        }
        if let Some(segment) = boot.pci_segment {
            command.arg(format!("--pci-segment={segment:x}"));
        }
        if let Some(modules) = &lab.files.modules {
            command.arg("--modules").arg(modules);
        }
        let append = format!("lab.address {}", boot.append);
        command.args(["--append", append.trim_end()]);
        let output = fs::File::create(folder.join("hvlab.log"))?;
        let mut process = command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .map_err(|error| format!("{}: {error}", lab.hvlab.display()))?;
        let connected = (|| {
            let pid = nix::unistd::Pid::from_raw(process.id() as i32);
            let alive = || !ended(pid);
            let host = Host::connect(&socket("control.sock"), alive)?;
            let agent = Client::connect(&socket("agent.sock"), BOOT, alive)?;
            Result::Ok((agent, host))
        })();
        match connected {
            Ok((agent, host)) => Ok(Self {
                process,
                agent: Arc::new(agent),
                host,
                nics: boot.nics.clone(),
                folder: folder.to_owned(),
                drivers,
                peers: Vec::new(),
                accounted: AtomicUsize::new(0),
                has_crashed: AtomicBool::new(false),
            }),
            Err(error) => {
                // A VMM that is about to end says why.
                let deadline = Instant::now() + Duration::from_secs(3);
                let mut ended = process.try_wait()?;
                while ended.is_none() && Instant::now() < deadline {
                    thread::sleep(Duration::from_millis(50));
                    ended = process.try_wait()?;
                }
                let _ = process.kill();
                let _ = process.wait();
                let ended =
                    ended.map_or(String::new(), |status| format!("; the VMM ended, {status}"));
                Err(format!(
                    "the guest does not boot: {error}{ended}\n{}\n{}",
                    tail(&folder.join("hvlab.log"), 15),
                    tail(&folder.join("console.log"), 15)
                )
                .into())
            }
        }
    }

    /// Which drivers it runs.
    pub fn drivers(&self) -> Drivers {
        self.drivers
    }

    /// How many of the errors in the kernel's log the scenario wanted to see.
    pub fn accounted(&self) -> usize {
        self.accounted.load(Ordering::Relaxed)
    }

    /// The next so many errors in the kernel's log were wanted.
    pub fn account(&self, errors: usize) {
        self.accounted.fetch_add(errors, Ordering::Relaxed);
    }

    /// Runs a command, whatever it returns.
    pub fn exit(&self, command: &str, timeout: Duration) -> Result<Exit> {
        Ok(self.agent.run(command, timeout)?)
    }

    /// Runs a command that must succeed, and returns what it printed.
    pub fn sh(&self, command: &str) -> Result<String> {
        self.sh_within(command, COMMAND)
    }

    /// The same with another deadline.
    pub fn sh_within(&self, command: &str, timeout: Duration) -> Result<String> {
        let exit = self.exit(command, timeout)?;
        if exit.code == 0 {
            return Ok(exit.stdout);
        }
        let how = if exit.timed_out {
            format!("took more than {} s", timeout.as_secs())
        } else {
            format!("exit code {}", exit.code)
        };
        let output = last_lines(&format!("{}{}", exit.stdout, exit.stderr), 20);
        Err(format!("guest: {command}: {how}\n{output}").into())
    }

    /// Starts a command that runs beside others.
    pub fn start(&self, command: &str, timeout: Duration) -> Result<Running<'_>> {
        Ok(self.agent.start(command, timeout)?)
    }

    /// Waits, in the guest, until a shell condition holds.
    pub fn wait_until(&self, condition: &str, timeout: Duration) -> Result<()> {
        // Seconds since boot, as dash has no clock of its own.
        let command = format!(
            "now() {{ read -r up _ </proc/uptime; up=${{up%%.*}}; }}; now; end=$((up + {})); \
             until {condition}; do now; [ $up -ge $end ] && exit 99; sleep 0.2; done >/dev/null 2>&1",
            timeout.as_secs().max(1)
        );
        let exit = self.exit(&command, timeout * 2 + COMMAND)?;
        match exit.code {
            0 => Ok(()),
            _ => Err(format!("not within {} s: {condition}", timeout.as_secs()).into()),
        }
    }

    /// What a command prints as JSON.
    pub fn json(&self, command: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.sh(command)?)?)
    }

    /// The counters of `ethtool -S`.
    pub fn statistics(&self, interface: &str) -> Result<BTreeMap<String, u64>> {
        let text = self.sh(&format!("ethtool -S {interface}"))?;
        Ok(text
            .lines()
            .filter_map(|line| {
                let (name, value) = line.trim().split_once(": ")?;
                Some((name.to_owned(), value.trim().parse().ok()?))
            })
            .collect())
    }

    /// The lines of the kernel's log that match an extended regular expression.
    pub fn dmesg(&self, pattern: &str) -> Result<Vec<String>> {
        let exit = self.exit(&format!("dmesg -t | grep -E '{pattern}'"), COMMAND)?;
        Ok(exit.stdout.lines().map(str::to_owned).collect())
    }

    /// A command in the namespace of a NIC's peer.
    pub fn peer_command(&self, lab: &Lab, nic: &Nic) -> Command {
        let mut command = Command::new(&lab.agent);
        command.args(["--netns", &peer_name(self.process.id(), nic.index)]);
        command
    }

    /// Runs a shell command beside the peer of a NIC.
    pub fn peer(&self, lab: &Lab, nic: &Nic, command: &str) -> Result<String> {
        let output = self
            .peer_command(lab, nic)
            .args(["exec", "sh", "-c", command])
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            return Ok(text);
        }
        let errors = String::from_utf8_lossy(&output.stderr);
        Err(format!("peer: {command}: {}\n{text}{errors}", output.status).into())
    }

    /// Starts a tool beside the peer; a receiver has opened its socket when this returns.
    pub fn peer_tool(&self, lab: &Lab, nic: &Nic, tool: &str) -> Result<Tool> {
        let child = self
            .peer_command(lab, nic)
            .args(tool.split_whitespace())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        Tool::new(child, tool)
    }

    /// Starts a server beside the peer that lives as long as the guest.
    pub fn peer_server(&mut self, lab: &Lab, nic: &Nic, argv: &[&str]) -> Result<()> {
        let child = self
            .peer_command(lab, nic)
            .arg("exec")
            .args(argv)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        self.peers.push(child);
        Ok(())
    }

    /// The guest crashes as it was told to. Its host must say so in the end.
    pub fn crashes(&self) {
        self.has_crashed.store(true, Ordering::Relaxed);
    }

    /// Waits until the guest has switched itself off.
    pub fn ended(&self, timeout: Duration) -> Result<()> {
        let pid = nix::unistd::Pid::from_raw(self.process.id() as i32);
        super::eventually(timeout, "the guest switches itself off", || Ok(ended(pid)))
    }

    /// Ends the virtual machine.
    pub fn stop(mut self) -> Result<()> {
        self.host.quit();
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            if let Some(status) = self.process.try_wait()? {
                let words = tail(&self.folder.join("hvlab.log"), 15);
                let good = if self.has_crashed.load(Ordering::Relaxed) {
                    status.code() == Some(1) && words.contains("the guest reported a crash")
                } else {
                    status.success()
                };
                return ensure(good, || format!("the host ended with {status}\n{words}"));
            }
            thread::sleep(Duration::from_millis(50));
        }
        Err("the host does not end when asked to".into())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        for child in self.peers.iter_mut().chain([&mut self.process]) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Whether a child process has ended; leaves its status for the one who waits for it.
fn ended(pid: nix::unistd::Pid) -> bool {
    use nix::sys::wait::{waitid, Id, WaitPidFlag, WaitStatus};
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    !matches!(waitid(Id::Pid(pid), flags), Ok(WaitStatus::StillAlive))
}

/// A traffic tool that runs beside the peer.
pub struct Tool {
    child: Child,
    name: String,
    output: Option<thread::JoinHandle<String>>,
}

impl Tool {
    fn new(mut child: Child, name: &str) -> Result<Self> {
        let mut stdout = child.stdout.take().ok_or("no standard output")?;
        let mut stderr = child.stderr.take().ok_or("no standard error")?;
        if name.contains("-receive") || name.contains("--wait-on") {
            let mut ready = [0; 6];
            if stderr.read_exact(&mut ready).is_err() || ready != *b"ready\n" {
                let mut text = String::from_utf8_lossy(&ready).into_owned();
                let _ = stderr.read_to_string(&mut text);
                let _ = child.wait();
                return Err(format!("peer: {name}: {text}").into());
            }
        }
        let output = thread::spawn(move || {
            let mut text = String::new();
            let _ = stdout.read_to_string(&mut text);
            let _ = stderr.read_to_string(&mut text);
            text
        });
        Ok(Self {
            child,
            name: name.to_owned(),
            output: Some(output),
        })
    }

    /// Asks the tool to end, then waits for its report.
    pub fn stop<T: DeserializeOwned>(self) -> Result<T> {
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        // One that has ended by itself needs no signal.
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT);
        self.report(Duration::from_secs(30))
    }

    /// Waits for the tool's report.
    pub fn report<T: DeserializeOwned>(mut self, timeout: Duration) -> Result<T> {
        let deadline = Instant::now() + timeout;
        while self.child.try_wait()?.is_none() {
            if Instant::now() >= deadline {
                return Err(format!("peer: {} does not end", self.name).into());
            }
            thread::sleep(Duration::from_millis(20));
        }
        let text = match self.output.take().map(thread::JoinHandle::join) {
            Some(Ok(text)) => text,
            _ => String::new(),
        };
        report(&self.name, &text)
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The report in what a traffic tool printed.
pub fn report<T: DeserializeOwned>(name: &str, text: &str) -> Result<T> {
    let line = text.lines().find(|line| line.starts_with('{'));
    line.and_then(|line| serde_json::from_str(line).ok())
        .ok_or_else(|| format!("{name}: no report but '{}'", text.trim()).into())
}

/// The last lines of a file.
pub fn tail(path: &Path, lines: usize) -> String {
    let text = fs::read(path).unwrap_or_default();
    let name = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    format!(
        "--- {name}\n{}",
        last_lines(&String::from_utf8_lossy(&text), lines)
    )
}

fn last_lines(text: &str, lines: usize) -> String {
    let all: Vec<_> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
