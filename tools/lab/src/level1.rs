// SPDX-License-Identifier: GPL-2.0
//! Level 1: a machine emulated by QEMU whose kernel has the KVM we need.
//!
//! Where there is no usable KVM, a command line of ours runs there instead of here, as if it ran here: its standard
//! streams are ours, its exit status is ours, the files it reads are block devices there, and the files and sockets it
//! makes appear here at once (virtio serial ports). The machine boots the kernel and the initramfs of the guest under
//! test, with an archive appended that holds this program; there it is the first process ([`init`]).

pub mod init;

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::cpio::Archive;
use crate::signals;
use crate::terminal::Keyboard;

/// Processor of level 1: AMD's virtualization, no XSAVE (inconsistent for nested guests under emulation), and RDRAND for
/// isolated guests.
const CPU: &str = "Opteron_G3,-misalignsse,+svm,+npt,+x2apic,+rdrand";
/// Kernel arguments of level 1.
///
/// At each exit of a nested guest QEMU 10.0 clears a bit in the word of pending interrupts without atomics: what
/// another thread sets at that moment is lost until the local APIC gets its next interrupt. A periodic timer makes that
/// a matter of milliseconds; with a one-shot timer, what the kernel would use, level 1 could stand still for ever.
const CMDLINE: &str =
    "console=ttyS0 quiet panic=-1 mitigations=off nokaslr clocksource=tsc tsc=reliable no_timer_check \
     nohz=off highres=off random.trust_bootloader=on kvm.halt_poll_ns=0";
/// The standard streams have a port each; status another.
const STDIN_PORT: &str = "hvlab.stdin";
const STDOUT_PORT: &str = "hvlab.stdout";
const STDERR_PORT: &str = "hvlab.stderr";
const STATUS_PORT: &str = "hvlab.status";
/// The first line of the status port; the last is "exit" with the exit status.
const STARTED: &str = "started";
/// What the plugin writes.
const PLUGIN_PORT: &str = "hvlab.plugin";
/// The file with the console of level 1's kernel.
const CONSOLE: &str = "console";
/// What QEMU has after level 1's last word until it must have ended.
const POWER_OFF: Duration = Duration::from_secs(20);

/// Why a command could not run in level 1.
#[derive(Debug, Error)]
pub enum Level1Error {
    /// No QEMU.
    #[error("cannot run {qemu}: {error} (install the package qemu-system-x86)")]
    Qemu {
        /// Program.
        qemu: String,
        /// Why.
        error: io::Error,
    },
    /// Something with a file.
    #[error("{path}: {error}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The machine ended before the command did.
    #[error("level 1 ended early ({status}); its console:\n{console}")]
    Died {
        /// QEMU's exit status.
        status: String,
        /// The end of its console.
        console: String,
    },
}

fn file_error(path: &Path) -> impl FnOnce(io::Error) -> Level1Error + '_ {
    move |error| Level1Error::File {
        path: path.to_owned(),
        error,
    }
}

/// What to run in level 1, and with what.
pub struct Launch {
    /// Arguments of this program, without its name.
    pub args: Vec<String>,
    /// Environment of it.
    pub env: Vec<(String, String)>,
    /// Kernel of level 1.
    pub kernel: PathBuf,
    /// Initramfs of level 1; ours is appended.
    pub image: PathBuf,
    /// Big files to read: (here, there).
    pub disks: Vec<(PathBuf, String)>,
    /// Small files or folders to read: (here, there).
    pub files: Vec<(PathBuf, String)>,
    /// Files that are written: (here, there).
    pub outputs: Vec<(PathBuf, String)>,
    /// Unix sockets that are listened on: (here, there).
    pub sockets: Vec<(PathBuf, String)>,
    /// Whether our standard input is the command's.
    pub stdin: bool,
    /// Processors of level 1.
    pub cpus: u32,
    /// Memory of level 1 in MiB.
    pub memory: u32,
    /// QEMU's program.
    pub qemu: String,
    /// A plugin for QEMU, and the path there of what it writes to its argument `out`.
    pub plugin: Option<(PathBuf, String)>,
}

/// A port of level 1 that stands for a path there.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
struct PortLink {
    name: String,
    path: String,
    socket: bool,
}

/// What level 1's first process has to do.
#[derive(Debug, Serialize, Deserialize)]
struct Job {
    args: Vec<String>,
    env: Vec<(String, String)>,
    ports: Vec<PortLink>,
    /// Paths that stand for the block devices, in their order.
    disks: Vec<String>,
}

/// The processor's time stamp counter.
#[expect(unsafe_code)]
fn tsc() -> u64 {
    // SAFETY: The instruction reads a register, which every x86-64 processor has.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// How fast the processor's time stamp counter is, which is that of level 1 as well.
///
/// A kernel that is emulated on a busy machine finds it out wrongly, by several times.
fn tsc_khz() -> u64 {
    let read = || {
        // The clock is read between two reads of the counter, which are to be close together.
        let closest = (0..10).map(|_| (tsc(), Instant::now(), tsc()));
        let closest = closest.min_by_key(|(before, _, after)| after.wrapping_sub(*before));
        let (before, clock, _) = closest.expect("there are ten");
        (before, clock)
    };
    let (first, start) = read();
    thread::sleep(Duration::from_millis(100));
    let (last, end) = read();
    let nanoseconds = end.duration_since(start).as_nanos().max(1) as u64;
    last.wrapping_sub(first).saturating_mul(1_000_000) / nanoseconds
}

/// A folder that goes away with its owner.
struct ScratchDir(PathBuf);

impl ScratchDir {
    fn new() -> Result<Self, Level1Error> {
        let base = std::env::temp_dir();
        for attempt in 0.. {
            let path = base.join(format!("hvlab-{}-{attempt}", std::process::id()));
            match fs::create_dir(&path) {
                Ok(()) => return Ok(Self(path)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && attempt < 100 => {}
                Err(error) => return Err(file_error(&path)(error)),
            }
        }
        unreachable!()
    }
}

impl Drop for ScratchDir {
    fn drop(&mut self) {
        // Nothing depends on it.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// QEMU, which does not outlive us.
struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// QEMU's options take commas doubled.
fn escape(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

impl Launch {
    /// The archive that makes an initramfs level 1's.
    fn archive(&self) -> Result<Vec<u8>, Level1Error> {
        let mut archive = Archive::new();
        let program = std::env::current_exe().map_err(file_error(Path::new("/proc/self/exe")))?;
        archive
            .copy("lab/hvlab", &program)
            .map_err(file_error(&program))?;
        archive.symlink("lab/init", "hvlab");
        // The agent is a program of its own beside this one; the guests get it from here.
        let agent = program.with_file_name("lab-agent");
        if agent.exists() {
            archive
                .copy("lab/lab-agent", &agent)
                .map_err(file_error(&agent))?;
        }
        for (here, there) in &self.files {
            archive
                .copy(there.trim_start_matches('/'), here)
                .map_err(file_error(here))?;
        }
        let job = Job {
            args: self.args.clone(),
            env: self.env.clone(),
            ports: self.ports(),
            disks: self.disks.iter().map(|(_, there)| there.clone()).collect(),
        };
        let job = serde_json::to_vec(&job).expect("a structure of strings can be written");
        archive.file("lab/job.json", 0o644, &job);
        Ok(archive.finish())
    }

    fn ports(&self) -> Vec<PortLink> {
        let outputs = self.outputs.iter().map(|(_, there)| (there, false));
        let sockets = self.sockets.iter().map(|(_, there)| (there, true));
        outputs
            .chain(sockets)
            .enumerate()
            .map(|(index, (path, socket))| PortLink {
                name: format!("hvlab.{index}"),
                path: path.clone(),
                socket,
            })
            .chain(self.plugin.iter().map(|(_, path)| PortLink {
                name: PLUGIN_PORT.to_owned(),
                path: path.clone(),
                socket: false,
            }))
            .collect()
    }

    fn command(&self, dir: &Path) -> Command {
        let mut qemu = Command::new(&self.qemu);
        qemu.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        .args([
            "-machine",
            "pc",
            "-accel",
            "tcg,thread=multi,tb-size=512",
            "-cpu",
            CPU,
        ])
        .args([
            "-smp",
            &self.cpus.to_string(),
            "-m",
            &self.memory.to_string(),
        ])
        .arg("-kernel")
        .arg(&self.kernel)
        .arg("-initrd")
        .arg(dir.join("initrd"))
        .args(["-append", &format!("{CMDLINE} tsc_early_khz={}", tsc_khz())])
        .args(["-serial", &format!("file:{}", escape(&dir.join(CONSOLE)))])
        .args(["-device", "virtio-rng-pci"])
        .args(["-device", "virtio-serial-pci,max_ports=31"]);
        let mut port = |name: &str, backend: &str| {
            qemu.args(["-chardev", &format!("{backend},id={name}")])
                .args([
                    "-device",
                    &format!("virtserialport,chardev={name},name={name}"),
                ]);
        };
        for name in [STDIN_PORT, STDOUT_PORT, STDERR_PORT, STATUS_PORT] {
            port(name, &format!("socket,path={}", escape(&dir.join(name))));
        }
        let outputs = self
            .outputs
            .iter()
            .map(|(here, _)| format!("file,path={}", escape(here)));
        let sockets = self
            .sockets
            .iter()
            .map(|(here, _)| format!("socket,path={},server=on,wait=off", escape(here)));
        // It connects before the machine runs.
        let path = dir.join(PLUGIN_PORT);
        let plugin = self
            .plugin
            .iter()
            .map(|_| format!("socket,path={},server=on,wait=off", escape(&path)));
        let backends = outputs.chain(sockets).chain(plugin);
        for (link, backend) in self.ports().iter().zip(backends) {
            port(&link.name, &backend);
        }
        if let Some((library, _)) = &self.plugin {
            let plugin = format!("{},out={}", escape(library), escape(&path));
            qemu.args(["-plugin", &plugin]);
        }
        for (index, (here, _)) in self.disks.iter().enumerate() {
            qemu.args([
                "-drive",
                &format!(
                    "file={},format=raw,if=none,readonly=on,id=disk{index}",
                    escape(here)
                ),
                "-device",
                &format!("virtio-blk-pci,drive=disk{index}"),
            ]);
        }
        qemu
    }

    /// Runs the command, writes its output to `stdout` and our standard error, and gives its exit status.
    pub fn run(&self, mut stdout: impl Write + Send + 'static) -> Result<i32, Level1Error> {
        let scratch = ScratchDir::new()?;
        let dir = scratch.0.as_path();
        let _on_signal = signals::clean_up_by({
            let dir = dir.to_owned();
            let sockets: Vec<_> = self.sockets.iter().map(|(here, _)| here.clone()).collect();
            // What is left of it if this fails does no harm.
            move || {
                let _ = fs::remove_dir_all(dir);
                for socket in sockets {
                    let _ = fs::remove_file(socket);
                }
            }
        });
        let initrd = dir.join("initrd");
        File::create(&initrd)
            .and_then(|mut file| {
                io::copy(&mut File::open(&self.image)?, &mut file)?;
                // Archives follow each other at multiples of four.
                let len = file.metadata()?.len() as usize;
                file.write_all(&[0; 4][..len.next_multiple_of(4) - len])
            })
            .map_err(file_error(&self.image))?;
        let archive = self.archive()?;
        File::options()
            .append(true)
            .open(&initrd)
            .and_then(|mut file| file.write_all(&archive))
            .map_err(file_error(&initrd))?;
        drop(archive);

        // QEMU opens the same file.
        let path = dir.join(CONSOLE);
        let mut console = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(file_error(&path))?;
        let listen = |name: &str| {
            let path = dir.join(name);
            UnixListener::bind(&path).map_err(file_error(&path))
        };
        let stdin = listen(STDIN_PORT)?;
        let output = listen(STDOUT_PORT)?;
        let stderr = listen(STDERR_PORT)?;
        let status = listen(STATUS_PORT)?;
        let mut command = self.command(dir);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        // SAFETY: prctl is async-signal-safe and touches nothing but the new process.
        #[expect(unsafe_code)]
        unsafe {
            command.pre_exec(|| {
                // It must not run on when we are killed.
                match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                    0 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                }
            });
        }
        let mut qemu = command
            .spawn()
            .map(Qemu)
            .map_err(|error| Level1Error::Qemu {
                qemu: self.qemu.clone(),
                error,
            })?;

        // QEMU connects before it starts, or ends.
        let with_stdin = self.stdin;
        thread::spawn(move || {
            if let Ok((mut stream, _)) = stdin.accept() {
                if with_stdin {
                    let _ = io::copy(&mut Keyboard::new(), &mut stream);
                }
                // The end of our input is not the end of the command: keep the port open.
                loop {
                    thread::park();
                }
            }
        });
        let output = thread::spawn(move || {
            if let Ok((stream, _)) = output.accept() {
                copy_out(stream, &mut stdout);
            }
        });
        let stderr = thread::spawn(move || {
            if let Ok((stream, _)) = stderr.accept() {
                copy_out(stream, &mut io::stderr());
            }
        });
        let in_use = dir.to_owned();
        let reader = thread::spawn(move || -> Option<i32> {
            let (stream, _) = status.accept().ok()?;
            for line in BufReader::new(stream).lines() {
                let line = line.ok()?;
                if line == STARTED {
                    // Level 1 has all it needs: leave nothing behind even if we are killed.
                    let _ = fs::remove_dir_all(&in_use);
                } else if let Some(code) = line.strip_prefix("exit ") {
                    return code.parse().ok();
                }
            }
            None
        });
        // The last word comes before the end; without one, the end of QEMU ends the connection.
        let mut ended = None;
        while !reader.is_finished() {
            if let Some(status) = qemu.0.try_wait().ok().flatten() {
                ended.get_or_insert((status, Instant::now()));
            }
            // Ended without ever having connected.
            if ended.is_some_and(|(_, at)| at.elapsed() > Duration::from_secs(1)) {
                break;
            }
            thread::sleep(Duration::from_millis(50));
        }
        let code = reader
            .is_finished()
            .then(|| reader.join().ok().flatten())
            .flatten();
        let Some(code) = code else {
            let mut text = Vec::new();
            // Whatever can be read of it helps.
            let _ = console.read_to_end(&mut text);
            let console = text;
            let console = String::from_utf8_lossy(&console);
            let lines: Vec<_> = console.lines().collect();
            let status = qemu.0.try_wait().ok().flatten();
            return Err(Level1Error::Died {
                status: status.map_or("no status".into(), |status| status.to_string()),
                console: lines[lines.len().saturating_sub(40)..].join("\n"),
            });
        };
        let deadline = Instant::now() + POWER_OFF;
        while Instant::now() < deadline && matches!(qemu.0.try_wait(), Ok(None)) {
            thread::sleep(Duration::from_millis(20));
        }
        // The end of QEMU ends the streams, and there may be something left in them.
        drop(qemu);
        let _ = output.join();
        let _ = stderr.join();
        Ok(code)
    }
}

/// Copies at once what there is, for somebody who watches.
fn copy_out(mut from: impl Read, to: &mut impl Write) {
    let mut buf = [0; 4096];
    while let Ok(len @ 1..) = from.read(&mut buf) {
        if to.write_all(&buf[..len]).and_then(|()| to.flush()).is_err() {
            break;
        }
    }
}
