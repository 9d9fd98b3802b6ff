// SPDX-License-Identifier: GPL-2.0
//! A TCP stream with checked contents: does it live, and how long did it
//! ever stand still?

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use nix::sys::sendfile::sendfile64;
use serde::{Deserialize, Serialize};

use crate::gap::Gap;
use crate::pattern::Pattern;

/// The contents repeat after that many bytes.
const BLOCK: usize = 8192;

/// Bytes in a page of memory.
const PAGE: usize = 4096;
/// Bytes of a piece that is sent from a file.
const SLICE: usize = 4000;

/// Options of the sender.
#[derive(Debug, Clone, Args)]
pub struct SendOptions {
    /// Where the receiver listens
    #[arg(long)]
    pub to: SocketAddr,
    /// Bytes per second, 0 for as fast as it goes
    #[arg(long, default_value_t = 500_000)]
    pub rate: u64,
    /// Seconds; a SIGINT ends it earlier
    #[arg(long, default_value_t = 3600)]
    pub duration: u64,
    /// Send pages of a file, one piece from each offset within a page, and end
    #[arg(long)]
    pub offsets: bool,
}

/// Options of the receiver.
#[derive(Debug, Clone, Args)]
pub struct ReceiveOptions {
    /// Where to listen
    #[arg(long)]
    pub bind: SocketAddr,
    /// Give up when nothing came for so many seconds
    #[arg(long, default_value_t = 120)]
    pub idle: u64,
}

/// What one end saw.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Report {
    /// Bytes sent, or received in order and with the right contents.
    pub bytes: u64,
    /// The longest time without progress.
    pub longest_gap_ms: u64,
    /// Why the stream broke, if it did: a reset, a time-out, wrong contents.
    pub error: Option<String>,
    /// How long it lived.
    pub milliseconds: u64,
}

fn block() -> Vec<u8> {
    let mut block = vec![0; BLOCK];
    Pattern::new(2, 0).fill(&mut block);
    block
}

/// Sends until the time is over or `stop` is set, then closes the stream.
pub fn send(options: &SendOptions, stop: &AtomicBool) -> io::Result<Report> {
    if options.offsets {
        return send_offsets(options);
    }
    let mut stream = TcpStream::connect(options.to)?;
    stream.set_nodelay(true)?;
    // So that a stop is noticed on a stream that stands still.
    stream.set_write_timeout(Some(Duration::from_secs(1)))?;
    let block = block();
    let start = Instant::now();
    let end = start + Duration::from_secs(options.duration);
    // A hundred small writes a second show a gap better than a few large ones.
    let piece = match options.rate {
        0 => BLOCK,
        rate => (rate / 100).clamp(1, BLOCK as u64) as usize,
    };
    let mut report = Report::default();
    let mut gap = Gap::default();
    let mut due = start;
    while !stop.load(Ordering::Relaxed) && Instant::now() < end {
        let at = (report.bytes % BLOCK as u64) as usize;
        match stream.write(&block[at..BLOCK.min(at + piece)]) {
            Ok(count) => {
                report.bytes += count as u64;
                gap.arrival(Instant::now());
            }
            Err(error) if transient(&error) => continue,
            Err(error) => {
                report.error = Some(error.to_string());
                break;
            }
        }
        if options.rate > 0 {
            due = (due + Duration::from_millis(10)).max(Instant::now());
            thread::sleep(due.saturating_duration_since(Instant::now()));
        }
    }
    report.longest_gap_ms = gap.longest_ms();
    report.milliseconds = start.elapsed().as_millis() as u64;
    Ok(report)
}

/// Sends a piece from each offset within a page. The pages themselves are sent, not copies of
/// them, so each is written once only.
fn send_offsets(options: &SendOptions) -> io::Result<Report> {
    let path = std::env::temp_dir().join(format!("tcp-send-{}", std::process::id()));
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)?;
    fs::remove_file(&path)?;
    let stream = TcpStream::connect(options.to)?;
    let block = block().repeat(2);
    let start = Instant::now();
    let mut report = Report::default();
    for offset in 0..PAGE {
        let place = (offset * 2 * PAGE + offset) as u64;
        let at = report.bytes as usize % BLOCK;
        file.write_all_at(&block[at..at + SLICE], place)?;
        let mut next = place as i64;
        let end = next + SLICE as i64;
        while next < end {
            let left = (end - next) as usize;
            let sent = sendfile64(&stream, &file, Some(&mut next), left)?;
            report.bytes += sent as u64;
        }
    }
    report.milliseconds = start.elapsed().as_millis() as u64;
    Ok(report)
}

/// Takes one connection, and checks what comes until its end.
pub fn receive(options: &ReceiveOptions) -> io::Result<Report> {
    let listener = TcpListener::bind(options.bind)?;
    eprintln!("ready");
    let (mut stream, _) = listener.accept()?;
    drop(listener);
    stream.set_read_timeout(Some(Duration::from_secs(options.idle.max(1))))?;
    let block = block();
    let start = Instant::now();
    let mut report = Report::default();
    let mut gap = Gap::default();
    gap.arrival(start);
    let mut buffer = vec![0; 65_536];
    loop {
        let count = match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                report.error = Some(error.to_string());
                break;
            }
        };
        gap.arrival(Instant::now());
        let right = buffer[..count]
            .iter()
            .enumerate()
            .all(|(i, byte)| *byte == block[(report.bytes as usize + i) % BLOCK]);
        if !right {
            report.error = Some(format!("wrong contents after byte {}", report.bytes));
            break;
        }
        report.bytes += count as u64;
    }
    report.longest_gap_ms = gap.longest_ms();
    report.milliseconds = start.elapsed().as_millis() as u64;
    Ok(report)
}

fn transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_arrives_whole() {
        let bytes = transfer(38_741, false);
        assert!(bytes > 100_000);
    }

    #[test]
    fn pages_arrive_whole() {
        assert_eq!(transfer(38_742, true), (PAGE * SLICE) as u64);
    }

    /// Sends to ourselves; how many bytes arrived.
    fn transfer(port: u16, offsets: bool) -> u64 {
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let receiver = thread::spawn(move || {
            receive(&ReceiveOptions {
                bind: address,
                idle: 10,
            })
        });
        let options = SendOptions {
            to: address,
            rate: 1_000_000,
            duration: 1,
            offsets,
        };
        let stop = AtomicBool::new(false);
        let sent = loop {
            match send(&options, &stop) {
                Ok(report) => break report,
                Err(_) => thread::sleep(Duration::from_millis(20)),
            }
        };
        let received = receiver
            .join()
            .ok()
            .and_then(Result::ok)
            .unwrap_or_default();
        assert_eq!(sent.error, None);
        assert_eq!(received.error, None);
        assert_eq!(sent.bytes, received.bytes);
        received.bytes
    }
}
