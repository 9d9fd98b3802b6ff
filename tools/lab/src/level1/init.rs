// SPDX-License-Identifier: GPL-2.0
//! The first process of level 1.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::{Job, PortLink, STARTED, STATUS_PORT, STDERR_PORT, STDIN_PORT, STDOUT_PORT};

/// Where the initramfs has it.
const JOB: &str = "/lab/job.json";
/// Modules of level 1: KVM, disks, and what connects guests.
const MODULES: [&str; 4] = ["kvm-amd", "tun", "veth", "virtio_blk"];
/// Devices appear when the kernel gets to it.
const DEVICES: Duration = Duration::from_secs(20);
/// How long to wait for a port that has no reader yet.
const NO_READER: Duration = Duration::from_millis(200);

/// Whether this process was started as level 1's first one.
pub fn is_init() -> bool {
    std::process::id() == 1
        && std::env::args_os()
            .next()
            .is_some_and(|name| name == "/lab/init")
}

/// Does the job and switches the machine off.
pub fn run() -> ! {
    let mut status = match open_port(STATUS_PORT) {
        Ok(status) => status,
        Err(error) => {
            // The console's last lines are what the other side shows then.
            eprintln!("hvlab: level 1: {error}");
            power_off();
        }
    };
    let _ = writeln!(status, "{STARTED}");
    let code = job().unwrap_or_else(|error| {
        eprintln!("hvlab: level 1: {error}");
        125
    });
    let _ = writeln!(status, "exit {code}");
    power_off()
}

fn power_off() -> ! {
    // SAFETY: these calls have no memory arguments; there is nothing left that they could disturb.
    #[expect(unsafe_code)]
    unsafe {
        libc::sync();
        libc::reboot(libc::RB_POWER_OFF);
    }
    // It returns only when it may not switch off.
    loop {
        thread::sleep(Duration::from_secs(1));
    }
}

fn context<T>(what: impl std::fmt::Display, result: io::Result<T>) -> Result<T, String> {
    result.map_err(|error| format!("{what}: {error}"))
}

/// Waits for something that the kernel is about to make.
fn wait_for<T>(what: &str, mut find: impl FnMut() -> Option<T>) -> io::Result<T> {
    let start = Instant::now();
    loop {
        if let Some(found) = find() {
            return Ok(found);
        }
        if start.elapsed() > DEVICES {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("{what} has not appeared"),
            ));
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// The device of a port, by its name.
fn port_device(name: &str) -> io::Result<PathBuf> {
    wait_for(name, || {
        fs::read_dir("/sys/class/virtio-ports")
            .ok()?
            .flatten()
            .find(|entry| {
                fs::read_to_string(entry.path().join("name")).is_ok_and(|text| text.trim() == name)
            })
            .map(|entry| Path::new("/dev").join(entry.file_name()))
    })
}

fn open_port(name: &str) -> io::Result<File> {
    let device = port_device(name)?;
    OpenOptions::new().read(true).write(true).open(device)
}

fn job() -> Result<i32, String> {
    let bytes = context(JOB, fs::read(JOB))?;
    let job: Job = serde_json::from_slice(&bytes).map_err(|error| format!("{JOB}: {error}"))?;
    let modprobe = Command::new("modprobe").arg("-a").args(MODULES).status();
    if !context("modprobe", modprobe)?.success() {
        return Err(format!("modprobe -a {} failed", MODULES.join(" ")));
    }
    for (index, path) in job.disks.iter().enumerate() {
        let device = format!("/dev/vd{}", (b'a' + index as u8) as char);
        context(
            &device,
            wait_for(&device, || Path::new(&device).exists().then_some(())),
        )?;
        link(&device, path)?;
    }
    for port in &job.ports {
        if port.socket {
            let port = port.clone();
            if let Some(dir) = Path::new(&port.path).parent() {
                context(dir.display(), fs::create_dir_all(dir))?;
            }
            thread::spawn(move || {
                if let Err(error) = bridge(&port) {
                    eprintln!("hvlab: level 1: {}: {error}", port.path);
                }
            });
        } else {
            let device = context(&port.name, port_device(&port.name))?;
            link(&device.to_string_lossy(), &port.path)?;
        }
    }
    let [stdin, stdout, stderr] = [STDIN_PORT, STDOUT_PORT, STDERR_PORT]
        .map(|name| context(name, open_port(name)).map(Stdio::from));
    let status = Command::new("/lab/hvlab")
        .args(&job.args)
        .envs(job.env)
        .stdin(stdin?)
        .stdout(stdout?)
        .stderr(stderr?)
        .status();
    // A command that was killed has no status; say so like a shell.
    Ok(context("/lab/hvlab", status)?.code().unwrap_or(128))
}

fn link(device: &str, path: &str) -> Result<(), String> {
    if let Some(dir) = Path::new(path).parent() {
        context(dir.display(), fs::create_dir_all(dir))?;
    }
    context(path, symlink(device, path))
}

/// Connects a port with the socket at a path, whenever somebody outside talks to it.
fn bridge(port: &PortLink) -> io::Result<()> {
    let file = open_port(&port.name)?;
    let mut reader = file.try_clone()?;
    let mut buf = [0; 4096];
    let mut inner: Option<UnixStream> = None;
    loop {
        let len = reader.read(&mut buf)?;
        if len == 0 {
            // Nobody is connected outside, or no longer.
            if let Some(stream) = inner.take() {
                let _ = stream.shutdown(std::net::Shutdown::Both);
            }
            thread::sleep(NO_READER);
            continue;
        }
        if inner.is_none() {
            let stream = wait_for(&port.path, || UnixStream::connect(&port.path).ok())?;
            let mut from = stream.try_clone()?;
            let mut to = file.try_clone()?;
            thread::spawn(move || io::copy(&mut from, &mut to));
            inner = Some(stream);
        }
        if let Some(stream) = &mut inner {
            if stream.write_all(&buf[..len]).is_err() {
                inner = None;
            }
        }
    }
}
