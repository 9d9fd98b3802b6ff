// SPDX-License-Identifier: GPL-2.0
//! A sequence-numbered UDP stream: loss, reordering and the longest gap.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use nix::sys::socket::{setsockopt, sockopt};
use serde::{Deserialize, Serialize};

use crate::gap::Gap;
use crate::pattern::Pattern;

/// Sequence number and the mark of the end.
const HEADER: usize = 16;
const END: u64 = 1;
/// The end is sent that often, since nobody repeats it.
const ENDS: u32 = 10;
const RECEIVE_BUFFER: usize = 4 << 20;

/// Options of the sender.
#[derive(Debug, Clone, Args)]
pub struct SendOptions {
    /// Where the receiver listens
    #[arg(long)]
    pub to: SocketAddr,
    /// Datagrams per second
    #[arg(long, default_value_t = 200)]
    pub rate: u32,
    /// Bytes per datagram
    #[arg(long, default_value_t = 512)]
    pub size: usize,
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
    #[arg(long, default_value_t = 60)]
    pub idle: u64,
}

/// What the sender did.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct SendReport {
    /// Datagrams sent.
    pub sent: u64,
    /// Datagrams that the socket refused.
    pub refused: u64,
}

/// What the receiver saw.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ReceiveReport {
    /// Datagrams that the sender says it sent; 0 when its end never came.
    pub sent: u64,
    /// Different datagrams received.
    pub received: u64,
    /// Datagrams that never came.
    pub lost: u64,
    /// Datagrams that came after a later one.
    pub reordered: u64,
    /// Datagrams that came again.
    pub duplicated: u64,
    /// Datagrams with wrong contents.
    pub corrupted: u64,
    /// The longest time without one.
    pub longest_gap_ms: u64,
}

/// Sends until the time is over or `stop` is set.
pub fn send(options: &SendOptions, stop: &AtomicBool) -> io::Result<SendReport> {
    let socket = UdpSocket::bind(if options.to.is_ipv4() {
        "0.0.0.0:0"
    } else {
        "[::]:0"
    })?;
    socket.connect(options.to)?;
    let mut report = SendReport::default();
    let mut buffer = vec![0; options.size.clamp(HEADER, 65_000)];
    let start = Instant::now();
    let end = start + Duration::from_secs(options.duration);
    let pause = Duration::from_secs(1) / options.rate.max(1);
    let mut due = start;
    while !stop.load(Ordering::Relaxed) && Instant::now() < end {
        buffer[..8].copy_from_slice(&report.sent.to_be_bytes());
        Pattern::new(1, report.sent).fill(&mut buffer[HEADER..]);
        match socket.send(&buffer) {
            Ok(_) => report.sent += 1,
            // A peer that is not there yet, or a full queue: it counts, and goes on.
            Err(_) => report.refused += 1,
        }
        // A sender that was held up does not catch up in a burst.
        due = (due + pause).max(Instant::now());
        thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    buffer[..8].copy_from_slice(&report.sent.to_be_bytes());
    buffer[8..16].copy_from_slice(&END.to_be_bytes());
    for _ in 0..ENDS {
        let _ = socket.send(&buffer);
        thread::sleep(Duration::from_millis(20));
    }
    Ok(report)
}

/// Receives until the sender's end has come.
pub fn receive(options: &ReceiveOptions) -> io::Result<ReceiveReport> {
    let socket = UdpSocket::bind(options.bind)?;
    setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER)?;
    socket.set_read_timeout(Some(Duration::from_secs(options.idle.max(1))))?;
    eprintln!("ready");
    let mut tally = Tally::default();
    let mut buffer = vec![0; 65_536];
    loop {
        match socket.recv(&mut buffer) {
            Ok(length) if tally.datagram(&buffer[..length], Instant::now()) => break,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(tally.finish())
}

#[derive(Default)]
struct Tally {
    report: ReceiveReport,
    seen: Vec<bool>,
    gap: Gap,
}

impl Tally {
    /// Counts a datagram; true when it is the end.
    fn datagram(&mut self, bytes: &[u8], now: Instant) -> bool {
        let report = &mut self.report;
        let Some((head, contents)) = bytes.split_at_checked(HEADER) else {
            report.corrupted += 1;
            return false;
        };
        let number = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&head[at..at + 8]);
            u64::from_be_bytes(word)
        };
        let sequence = number(0);
        if number(8) == END {
            report.sent = sequence;
            return true;
        }
        // A million datagrams more than expected are no sequence of ours.
        let limit = self.seen.len() as u64 + 1_000_000;
        if sequence > limit || !Pattern::new(1, sequence).matches(contents) {
            report.corrupted += 1;
            return false;
        }
        let index = sequence as usize;
        if index < self.seen.len() {
            if self.seen[index] {
                report.duplicated += 1;
                return false;
            }
            report.reordered += 1;
        } else {
            self.seen.resize(index + 1, false);
        }
        self.seen[index] = true;
        report.received += 1;
        self.gap.arrival(now);
        false
    }

    fn finish(mut self) -> ReceiveReport {
        let expected = self.report.sent.max(self.seen.len() as u64);
        self.report.lost = expected - self.report.received;
        self.report.longest_gap_ms = self.gap.longest_ms();
        self.report
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn datagram(sequence: u64, mark: u64) -> Vec<u8> {
        let mut bytes = vec![0; 64];
        bytes[..8].copy_from_slice(&sequence.to_be_bytes());
        bytes[8..16].copy_from_slice(&mark.to_be_bytes());
        Pattern::new(1, sequence).fill(&mut bytes[HEADER..]);
        bytes
    }

    #[test]
    fn loss_reordering_and_duplicates_are_counted() {
        let mut tally = Tally::default();
        let now = Instant::now();
        // 3 never comes, 1 comes late, 4 comes twice, 5 is damaged, 6 and 7 are lost at the end.
        for sequence in [0, 2, 1, 4, 4] {
            assert!(!tally.datagram(&datagram(sequence, 0), now));
        }
        let mut damaged = datagram(5, 0);
        damaged[40] ^= 1;
        tally.datagram(&damaged, now);
        tally.datagram(&[0; HEADER - 1], now);
        tally.datagram(&datagram(u64::MAX, 0), now);
        assert!(tally.datagram(&datagram(8, END), now));
        let report = tally.finish();
        assert_eq!(report.sent, 8);
        assert_eq!(report.received, 4);
        assert_eq!(report.lost, 4);
        assert_eq!(report.reordered, 1);
        assert_eq!(report.duplicated, 1);
        assert_eq!(report.corrupted, 3);
    }
}
