// SPDX-License-Identifier: GPL-2.0
//! A TCP stream with checked contents: does it live, and how long did it
//! ever stand still?

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use serde::{Deserialize, Serialize};

use crate::gap::Gap;
use crate::pattern::Pattern;

/// The contents repeat after that many bytes.
const BLOCK: usize = 8192;

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
        let address = SocketAddr::from(([127, 0, 0, 1], 38_741));
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
        assert!(sent.bytes > 100_000);
        assert_eq!(sent.bytes, received.bytes);
    }
}
