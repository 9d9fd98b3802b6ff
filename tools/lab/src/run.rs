// SPDX-License-Identifier: GPL-2.0
//! `hvlab run`: boots one guest.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;

use clap::{Args as ClapArgs, ValueEnum};
use vmm::{Config, Console, ExitReason, Vm, Window, HIGH_MMIO, LOW_MMIO};

use crate::cpio::Archive;
use crate::host::{Host, HostArgs};
use crate::level1::Launch;
use crate::signals;
use crate::terminal::{Keyboard, RawTerminal};

/// Where level 1 has what we brought along.
const LEVEL1_KERNEL: &str = "/lab/kernel";
const LEVEL1_IMAGE: &str = "/lab/image";
const LEVEL1_MODULES: &str = "/lab/modules";
const LEVEL1_OVERLAY: &str = "/lab/overlay";
const LEVEL1_CONSOLE: &str = "/lab/out/console";
const LEVEL1_LOG: &str = "/lab/out/log";
const LEVEL1_CONTROL: &str = "/run/control";
const LEVEL1_AGENT: &str = "/run/agent";
/// Beyond the guest's memory: level 1's kernel, its initramfs, this program and its buffers.
const LEVEL1_OVERHEAD: u32 = 640;

/// Our drivers.
const MODULES: [&str; 2] = ["hv_netvsc.ko", "hv_pci.ko"];
/// Kernel arguments of every guest.
const CMDLINE: &str = "console=ttyS0 panic=-1 tsc=reliable";
/// Keeps the built-in hv_pci from registering its name.
const BLACKLIST_HV_PCI: &str = "initcall_blacklist=init_hv_pci_drv";

/// Whose drivers the guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Drivers {
    /// The kernel's own.
    C,
    /// Those of this repository.
    Rust,
}

/// Files a guest is made of. The environment may name them once for all commands.
#[derive(Debug, Clone, ClapArgs)]
pub struct Files {
    /// Kernel of the guest (a bzImage), and of level 1
    #[arg(long, env = "HVLAB_KERNEL", value_name = "FILE")]
    pub kernel: PathBuf,
    /// Initramfs of the guest, and of level 1 (tools/image/make-image makes it)
    #[arg(long, env = "HVLAB_IMAGE", value_name = "FILE")]
    pub image: PathBuf,
    /// Folder with hv_netvsc.ko and hv_pci.ko for --drivers=rust
    #[arg(long, env = "HVLAB_MODULES", value_name = "DIR")]
    pub modules: Option<PathBuf>,
    /// QEMU, for machines without usable KVM
    #[arg(
        long,
        env = "HVLAB_QEMU",
        default_value = "qemu-system-x86_64",
        value_name = "PROGRAM"
    )]
    pub qemu: String,
}

/// Arguments of `hvlab run`.
#[derive(Debug, Clone, ClapArgs)]
pub struct Args {
    #[command(flatten)]
    pub files: Files,
    #[command(flatten)]
    pub host: HostArgs,
    /// Whose drivers the guest runs
    #[arg(long, default_value = "c")]
    pub drivers: Drivers,
    /// Do not keep the built-in hv_pci from registering with --drivers=rust
    #[arg(long)]
    pub builtin_pci: bool,
    /// Virtual processors
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(vmm::MAX_CPUS)))]
    pub cpus: u32,
    /// Memory of the guest in MiB
    #[arg(long, default_value_t = 1024, value_name = "MIB")]
    pub memory: u32,
    /// NUMA nodes, among which processors and memory are divided
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub nodes: u32,
    /// MMIO space below 4 GiB for devices, in MiB
    #[arg(long, default_value_t = (LOW_MMIO.len >> 20) as u32, value_name = "MIB",
        value_parser = clap::value_parser!(u32).range(1..=i64::from((LOW_MMIO.len >> 20) as u32)))]
    pub low_mmio: u32,
    /// MMIO space above 4 GiB for devices, in MiB
    #[arg(long, default_value_t = (HIGH_MMIO.len >> 20) as u32, value_name = "MIB",
        value_parser = clap::value_parser!(u32).range(1..=i64::from((HIGH_MMIO.len >> 20) as u32)))]
    pub high_mmio: u32,
    /// A file that the guest has as persistent memory, /dev/pmem0, and that keeps what is written
    /// to it when the guest ends; its length is a multiple of 2 MiB
    #[arg(long, value_name = "FILE")]
    pub pmem: Option<PathBuf>,
    /// Isolate the guest's memory from the host, but for what it shares
    #[arg(long)]
    pub isolated: bool,
    /// Tell the guest to access configuration space by hypercalls
    #[arg(long)]
    pub mmio_hypercalls: bool,
    /// Have firmware describe a PCI bus without devices, of this segment (hexadecimal)
    #[arg(long, value_name = "SEGMENT", value_parser = hexadecimal)]
    pub pci_segment: Option<u16>,
    /// Words to add to the guest's kernel command line
    #[arg(
        long,
        default_value = "",
        value_name = "WORDS",
        allow_hyphen_values = true
    )]
    pub append: String,
    /// More files for the guest: a folder or an uncompressed cpio archive
    #[arg(long, value_name = "PATH")]
    pub overlay: Option<PathBuf>,
    /// Write the console to a file instead of the terminal
    #[arg(long, value_name = "FILE")]
    pub console: Option<PathBuf>,
    /// Connect the guest's second serial port with clients of this Unix socket
    #[arg(long, value_name = "SOCKET")]
    pub agent: Option<PathBuf>,
    /// Listen for `hvlab ctl` on this Unix socket
    #[arg(long, value_name = "SOCKET")]
    pub control: Option<PathBuf>,
    /// Write the message log to a file
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// Have all bytes of each message in the message log, and lines for data packets
    #[arg(long)]
    pub log_bytes: bool,
    /// Processors of level 1, if that is needed
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub level1_cpus: u32,
}

fn hexadecimal(text: &str) -> std::result::Result<u16, std::num::ParseIntError> {
    u16::from_str_radix(text.trim_start_matches("0x"), 16)
}

/// A failure, in words for the user.
type Result<T> = std::result::Result<T, String>;

fn file_error(path: &Path) -> impl FnOnce(io::Error) -> String + '_ {
    move |error| format!("{}: {error}", path.display())
}

impl Files {
    /// Says what is missing, and where it comes from, before anything is started.
    pub fn check(&self, own_drivers: bool) -> Result<()> {
        for (what, path) in [("kernel", &self.kernel), ("image", &self.image)] {
            File::open(path).map_err(|error| {
                let path = path.display();
                format!("{what} {path}: {error} (scripts/lab.sh makes it and names it to hvlab)")
            })?;
        }
        kernel_release(&self.kernel)?;
        if own_drivers {
            let dir = self.modules.as_ref().ok_or(
                "our drivers need --modules=DIR, the folder with hv_netvsc.ko and hv_pci.ko (make builds them)",
            )?;
            for path in MODULES.map(|name| dir.join(name)) {
                File::open(&path)
                    .map_err(|error| format!("{}: {error} (make builds it)", path.display()))?;
            }
        }
        Ok(())
    }
}

impl Args {
    /// Says what would go wrong later.
    pub fn check(&self) -> Result<()> {
        self.files.check(self.drivers == Drivers::Rust)?;
        match &self.control {
            Some(path) if UnixStream::connect(path).is_ok() => Err(format!(
                "{}: another lab listens there; end it (hvlab ctl quit), or give this one another socket (--control)",
                path.display()
            )),
            _ => Ok(()),
        }
    }

    /// The same command line for level 1, and what it needs there.
    pub fn level1(&self) -> Launch {
        let mut args = vec![
            "run".to_owned(),
            format!(
                "--drivers={}",
                if self.drivers == Drivers::C {
                    "c"
                } else {
                    "rust"
                }
            ),
            format!("--cpus={}", self.cpus),
            format!("--memory={}", self.memory),
            format!("--nodes={}", self.nodes),
            format!("--low-mmio={}", self.low_mmio),
            format!("--high-mmio={}", self.high_mmio),
            format!("--append={}", self.append),
        ];
        if self.builtin_pci {
            args.push("--builtin-pci".to_owned());
        }
        if self.log_bytes {
            args.push("--log-bytes".to_owned());
        }
        if self.isolated {
            args.push("--isolated".to_owned());
        }
        if self.mmio_hypercalls {
            args.push("--mmio-hypercalls".to_owned());
        }
        if let Some(segment) = self.pci_segment {
            args.push(format!("--pci-segment={segment:x}"));
        }
        args.extend(self.host.to_args());
        let mut env = Vec::new();
        let mut files = Vec::new();
        let mut disks = Vec::new();
        let mut outputs = Vec::new();
        let mut sockets = Vec::new();
        for (here, there, name) in [
            (&self.files.kernel, LEVEL1_KERNEL, "HVLAB_KERNEL"),
            (&self.files.image, LEVEL1_IMAGE, "HVLAB_IMAGE"),
        ] {
            disks.push((here.clone(), there.to_owned()));
            env.push((name.to_owned(), there.to_owned()));
        }
        if let (Some(modules), Drivers::Rust) = (&self.files.modules, self.drivers) {
            files.push((modules.clone(), LEVEL1_MODULES.to_owned()));
            env.push(("HVLAB_MODULES".to_owned(), LEVEL1_MODULES.to_owned()));
        }
        let mut map = |list: &mut Vec<_>, option: &str, here: &Option<PathBuf>, there: &str| {
            if let Some(here) = here {
                args.push(format!("--{option}={there}"));
                list.push((here.clone(), there.to_owned()));
            }
        };
        map(&mut files, "overlay", &self.overlay, LEVEL1_OVERLAY);
        map(&mut outputs, "console", &self.console, LEVEL1_CONSOLE);
        map(&mut outputs, "log", &self.log, LEVEL1_LOG);
        map(&mut sockets, "control", &self.control, LEVEL1_CONTROL);
        map(&mut sockets, "agent", &self.agent, LEVEL1_AGENT);
        Launch {
            args,
            env,
            kernel: self.files.kernel.clone(),
            image: self.files.image.clone(),
            disks,
            files,
            outputs,
            sockets,
            stdin: self.console.is_none(),
            cpus: self.level1_cpus,
            memory: self.memory + LEVEL1_OVERHEAD,
            qemu: self.files.qemu.clone(),
            plugin: None,
        }
    }

    /// Everything that goes over the image: our modules, the agent, the caller's overlay.
    fn overlay(&self) -> Result<Vec<u8>> {
        let mut archive = Archive::new();
        if let Ok(program) = std::env::current_exe() {
            let agent = program.with_file_name("lab-agent");
            if agent.exists() {
                archive
                    .copy("usr/bin/lab-agent", &agent)
                    .map_err(file_error(&agent))?;
            }
        }
        if let (Some(dir), Drivers::Rust) = (&self.files.modules, self.drivers) {
            let release = kernel_release(&self.files.kernel)?;
            for name in MODULES {
                let path = dir.join(name);
                archive
                    .copy(&format!("usr/lib/modules/{release}/updates/{name}"), &path)
                    .map_err(file_error(&path))?;
            }
        }
        match &self.overlay {
            Some(path) if path.is_dir() => archive.copy("", path).map_err(file_error(path))?,
            Some(path) => {
                let mut bytes = archive.finish();
                bytes.extend(fs::read(path).map_err(file_error(path))?);
                return Ok(bytes);
            }
            None => {}
        }
        Ok(archive.finish())
    }

    fn cmdline(&self) -> String {
        let mut words = vec![CMDLINE];
        if self.drivers == Drivers::Rust && !self.builtin_pci {
            words.push(BLACKLIST_HV_PCI);
        }
        words.push(&self.append);
        words.join(" ")
    }
}

/// The release string of a bzImage: where the setup header points to, up to the first blank.
fn kernel_release(kernel: &Path) -> Result<String> {
    use std::io::{Read, Seek, SeekFrom};
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(kernel)?;
        file.seek(SeekFrom::Start(0x20e))?;
        let mut pointer = [0; 2];
        file.read_exact(&mut pointer)?;
        // The pointer counts from the second sector.
        file.seek(SeekFrom::Start(
            u64::from(u16::from_le_bytes(pointer)) + 0x200,
        ))?;
        let mut text = Vec::new();
        file.take(128).read_to_end(&mut text)?;
        Ok(text)
    };
    let text = read().map_err(file_error(kernel))?;
    let release: String = text
        .iter()
        .take_while(|byte| byte.is_ascii_graphic())
        .map(|&byte| char::from(byte))
        .collect();
    if release.starts_with(|first: char| first.is_ascii_digit()) {
        Ok(release)
    } else {
        Err(format!(
            "{}: no kernel release in it, is it a bzImage?",
            kernel.display()
        ))
    }
}

/// The first MiB of a window.
fn beginning(window: Window, mib: u32) -> Window {
    Window {
        len: u64::from(mib) << 20,
        ..window
    }
}

/// Standard input in a form that the console can wait for.
fn keyboard() -> io::Result<File> {
    let (reader, mut writer) = UnixStream::pair()?;
    // It ends with the program.
    thread::spawn(move || io::copy(&mut Keyboard::new(), &mut writer));
    Ok(OwnedFd::from(reader).into())
}

/// Boots a guest here. Gives the exit status.
pub fn run(args: &Args) -> Result<i32> {
    args.check()?;
    let overlay = args.overlay()?;
    let overlay_file = std::env::temp_dir().join(format!("hvlab-overlay-{}", std::process::id()));
    fs::write(&overlay_file, overlay).map_err(file_error(&overlay_file))?;
    let terminal = if args.console.is_none() {
        RawTerminal::new()
    } else {
        None
    };
    let console = match &args.console {
        Some(path) => Console {
            output: Box::new(File::create(path).map_err(file_error(path))?),
            input: None,
        },
        None => Console {
            output: Box::new(io::stdout()),
            input: Some(keyboard().map_err(|error| error.to_string())?),
        },
    };
    let vm = Vm::new(Config {
        kernel: args.files.kernel.clone(),
        initrds: vec![args.files.image.clone(), overlay_file.clone()],
        cmdline: args.cmdline(),
        cpus: args.cpus,
        memory: u64::from(args.memory) << 20,
        nodes: args.nodes,
        pmem: args.pmem.clone(),
        isolated: args.isolated,
        mmio_hypercalls: args.mmio_hypercalls,
        pci_segment: args.pci_segment,
        console,
        agent: args.agent.clone(),
        low_mmio: beginning(LOW_MMIO, args.low_mmio),
        high_mmio: beginning(HIGH_MMIO, args.high_mmio),
    });
    // It is in the guest's memory now.
    let _ = fs::remove_file(&overlay_file);
    let vm = vm.map_err(|error| error.to_string())?;
    let mut host = Host::new(
        &args.host,
        args.log.as_deref(),
        args.log_bytes,
        &vm.machine(),
    )?;
    let handle = vm
        .start(host.hypercalls())
        .map_err(|error| error.to_string())?;
    host.serve(handle.stopper(), args.control.as_deref())?;
    let stopper = handle.stopper();
    let on_signal = signals::end_by(move || stopper.stop());
    let reason = handle.wait();
    drop(on_signal);
    drop(host);
    drop(terminal);
    let code = match &reason {
        ExitReason::PowerOff | ExitReason::Stopped => 0,
        ExitReason::Reset => 2,
        _ => 1,
    };
    if code != 0 {
        eprintln!("hvlab: {reason}");
    }
    Ok(code)
}

/// Runs level 1 in our place. Gives the command's exit status.
pub fn run_in_level1(args: &Args) -> Result<i32> {
    args.check()?;
    if args.pmem.is_some() {
        return Err(
            "--pmem needs usable KVM on this machine: an emulated one does not keep the file"
                .into(),
        );
    }
    let _terminal = if args.console.is_none() {
        RawTerminal::new()
    } else {
        None
    };
    args.level1()
        .run(io::stdout())
        .map_err(|error| error.to_string())
}
