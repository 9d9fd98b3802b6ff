// SPDX-License-Identifier: GPL-2.0
//! One piece of work between two marks, with the time it took.
//!
//! The marks are for the counter of instructions (`tools/insncount`), where the lab runs under it; elsewhere they do
//! nothing. Nothing else of this program runs between them than what the options ask for, so that a count is the
//! work's and not that of starting programs.

use std::fs;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use nix::sys::socket::{setsockopt, sockopt};
use serde::{Deserialize, Serialize};

#[path = "../../insncount/src/marks.rs"]
mod marks;

/// Between two looks at the file that tells when it is over.
const LOOK: Duration = Duration::from_millis(20);

/// Before the first mark.
const SETTLE: Duration = Duration::from_millis(200);
/// Bytes of a UDP packet that make an Ethernet frame of 64.
const PAYLOAD: usize = 18;
/// Packets that the kernel takes at a time.
const MOST: u32 = 64;

/// What is to be done between the marks.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// Write this to a file: PATH=TEXT
    #[arg(long, value_name = "PATH=TEXT")]
    pub write: Option<String>,
    /// Send so many UDP packets
    #[arg(long, value_name = "N", requires = "to")]
    pub packets: Option<u32>,
    /// Where they go
    #[arg(long, value_name = "ADDRESS")]
    pub to: Option<SocketAddr>,
    /// Packets that the kernel is given, and gives to the driver, at a time
    #[arg(long, default_value_t = 1)]
    pub burst: u32,
    /// Do all that so many times
    #[arg(long, default_value_t = 1)]
    pub times: u32,
    /// Milliseconds between two times, for the host to catch up
    #[arg(long, default_value_t = 30)]
    pub pause_ms: u64,
    /// Send an empty datagram there, for a peer that waits for it
    #[arg(long, value_name = "ADDRESS")]
    pub kick: Option<SocketAddr>,
    /// Wait until the number in this file has grown
    #[arg(long, value_name = "PATH")]
    pub until: Option<PathBuf>,
    /// By how much
    #[arg(long, default_value_t = 1)]
    pub by: u64,
    /// Stop waiting when the number has not changed for so many milliseconds
    #[arg(long, default_value_t = 3000)]
    pub idle_ms: u64,
}

/// How it went.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Report {
    /// Time between the marks; with a number to wait for, until it grew last.
    pub nanoseconds: u64,
    /// By how much the number has grown.
    pub grown: u64,
    /// Time of all processors that was not idle, in units of 10 ms.
    pub busy_ticks: u64,
}

/// Does it.
pub fn count(options: &Options) -> io::Result<Report> {
    let write = options
        .write
        .as_deref()
        .map(|text| {
            text.split_once('=')
                .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "--write PATH=TEXT"))
        })
        .transpose()?;
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    if options.burst > 1 {
        setsockopt(&socket, sockopt::UdpGsoSegment, &(PAYLOAD as i32))?;
    }
    // What ended just before us may not be gone yet.
    thread::sleep(SETTLE);
    let before = options.until.as_deref().map_or(Ok(0), number)?;
    let busy = busy_ticks()?;
    let start = Instant::now();
    mark::<{ marks::START }>();
    let result = work(options, write, &socket, before);
    mark::<{ marks::STOP }>();
    let (grown, end) = result?;
    Ok(Report {
        nanoseconds: end.duration_since(start).as_nanos() as u64,
        grown,
        busy_ticks: busy_ticks()? - busy,
    })
}

fn work(
    options: &Options,
    write: Option<(&str, &str)>,
    socket: &UdpSocket,
    before: u64,
) -> io::Result<(u64, Instant)> {
    if let Some(to) = options.kick {
        socket.send_to(&[], to)?;
    }
    for time in 0..options.times {
        if time != 0 {
            thread::sleep(Duration::from_millis(options.pause_ms));
        }
        if let Some((path, text)) = write {
            fs::write(path, text)?;
        }
        if let (Some(packets), Some(to)) = (options.packets, options.to) {
            let burst = options.burst.clamp(1, MOST);
            let payload = [0; PAYLOAD * MOST as usize];
            for _ in 0..packets / burst {
                socket.send_to(&payload[..PAYLOAD * burst as usize], to)?;
            }
        }
    }
    let Some(path) = &options.until else {
        return Ok((0, Instant::now()));
    };
    let mut last = before;
    let mut changed = Instant::now();
    loop {
        let now = number(path)?;
        if now != last {
            last = now;
            changed = Instant::now();
        }
        if now - before >= options.by || changed.elapsed() >= Duration::from_millis(options.idle_ms)
        {
            return Ok((now - before, changed));
        }
        thread::sleep(LOOK);
    }
}

fn number(path: &Path) -> io::Result<u64> {
    fs::read_to_string(path)?
        .trim()
        .parse()
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// What all processors together have spent on anything.
fn busy_ticks() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/stat")?;
    let fields = text
        .lines()
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(1)
        .map(|word| word.parse().unwrap_or(0));
    // User, nice, system, idle, waiting, interrupts.
    Ok(fields
        .take(7)
        .enumerate()
        .filter(|(index, _)| ![3, 4].contains(index))
        .map(|(_, ticks): (_, u64)| ticks)
        .sum())
}

/// Executes a mark.
#[allow(unsafe_code)]
fn mark<const MARK: u32>() {
    // SAFETY: a no-operation, whose address is not accessed.
    unsafe {
        std::arch::asm!(
            ".byte {a}, {b}, {c}",
            ".long {mark}",
            a = const marks::OPCODE[0],
            b = const marks::OPCODE[1],
            c = const marks::OPCODE[2],
            mark = const MARK,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_does_not_grow_ends_the_wait() {
        let path = std::env::temp_dir().join(format!("lab-agent-count-{}", std::process::id()));
        let options = Options {
            write: Some(format!("{}=7\n", path.display())),
            packets: None,
            to: None,
            burst: 1,
            times: 1,
            pause_ms: 0,
            kick: None,
            until: Some(path.clone()),
            by: 4,
            idle_ms: 60,
        };
        fs::write(&path, "3\n").expect("a temporary file");
        let enough = count(&options).expect("counts");
        fs::write(&path, "5\n").expect("a temporary file");
        let too_little = count(&options).expect("counts");
        fs::remove_file(&path).expect("its removal");
        assert_eq!((enough.grown, too_little.grown), (4, 2));
    }
}
