// SPDX-License-Identifier: GPL-2.0
//! Ethernet frames of random sizes, each byte checked at the other end.
//!
//! The receiver acknowledges every few frames, and the sender keeps only a
//! window of them outstanding, so that a slow machine does not look like a
//! lossy network.

use std::io;
use std::time::{Duration, Instant};

use clap::Args;
use serde::{Deserialize, Serialize};

use crate::packet::{address_of, parse_mac, Mac, Socket, ETHERTYPE};
use crate::pattern::Pattern;

/// Ethernet header.
const ETHERNET: usize = 14;
/// Kind, three unused bytes, sequence number, number of frames, length.
const HEADER: usize = ETHERNET + 16;
/// Room for the largest frame that any device here takes.
const LARGEST: usize = 65_550;
/// Frames on the way at once.
const WINDOW: u32 = 128;
/// Frames per acknowledgement.
const ACKNOWLEDGE_EVERY: u32 = 16;
/// When no acknowledgement comes for so long, what is outstanding is lost.
const STALL: Duration = Duration::from_secs(2);

const DATA: u8 = 1;
const END: u8 = 2;
const ACKNOWLEDGE: u8 = 3;
const ACKNOWLEDGE_END: u8 = 4;

/// What both ends must agree on.
#[derive(Debug, Clone, Args)]
pub struct Common {
    /// The interface to use
    #[arg(long)]
    pub interface: String,
    /// Chooses sizes and contents
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Smallest frame, without the checksum
    #[arg(long, default_value_t = 60)]
    pub smallest: usize,
    /// Largest frame, without the checksum
    #[arg(long, default_value_t = 1514)]
    pub largest: usize,
    /// How many frames
    #[arg(long, default_value_t = 10_000)]
    pub count: u32,
}

/// Options of the sender.
#[derive(Debug, Clone, Args)]
pub struct SendOptions {
    /// What both ends agree on.
    #[command(flatten)]
    pub common: Common,
    /// Hardware address of the other end
    #[arg(long)]
    pub destination: String,
    /// How often to ask whether the other end has seen the last frame
    #[arg(long, default_value_t = 20)]
    pub attempts: u32,
}

/// Options of the receiver.
#[derive(Debug, Clone, Args)]
pub struct ReceiveOptions {
    /// What both ends agree on.
    #[command(flatten)]
    pub common: Common,
    /// Give up when nothing came for so many seconds
    #[arg(long, default_value_t = 30)]
    pub idle: u64,
    /// Take only frames with this hash of the driver
    #[arg(long)]
    pub hash: Option<u32>,
}

/// What the sender saw.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct SendReport {
    /// Frames sent.
    pub sent: u32,
    /// Bytes of them.
    pub bytes: u64,
    /// How often the window stayed closed too long.
    pub stalls: u32,
    /// Whether the receiver confirmed the end.
    pub confirmed: bool,
    /// How long it took.
    pub milliseconds: u64,
}

/// What the receiver saw.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ReceiveReport {
    /// Different frames received whole.
    pub received: u32,
    /// Bytes of them.
    pub bytes: u64,
    /// Frames with a wrong length or wrong contents.
    pub corrupted: u32,
    /// Frames that came again.
    pub duplicated: u32,
    /// Frames that came after a later one.
    pub reordered: u32,
    /// Frames that never came.
    pub lost: u32,
    /// The sequence numbers of the first ones of them.
    pub missing: Vec<usize>,
    /// Size of the smallest and the largest frame.
    pub smallest: usize,
    /// See `smallest`.
    pub largest: usize,
}

impl Common {
    /// The size of frame `sequence`; the first two are the extremes.
    fn size(&self, sequence: u32) -> usize {
        match sequence {
            0 => self.largest,
            1 => self.smallest,
            _ => {
                let span = (self.largest - self.smallest) as u64 + 1;
                let random = Pattern::new(!self.seed, sequence.into()).next() % span;
                self.smallest + random as usize
            }
        }
    }

    fn check(&self) -> io::Result<()> {
        let valid = (HEADER..=LARGEST).contains(&self.smallest)
            && (self.smallest..=LARGEST).contains(&self.largest);
        if valid && self.count > 0 {
            Ok(())
        } else {
            Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("sizes must lie between {HEADER} and {LARGEST}, count must not be 0"),
            ))
        }
    }
}

struct Frame {
    kind: u8,
    sequence: u32,
    count: u32,
}

fn compose(buffer: &mut [u8], to: Mac, from: Mac, frame: &Frame) {
    let length = buffer.len() as u32;
    buffer[..6].copy_from_slice(&to);
    buffer[6..12].copy_from_slice(&from);
    buffer[12..14].copy_from_slice(&ETHERTYPE.to_be_bytes());
    buffer[14..18].copy_from_slice(&[frame.kind, 0, 0, 0]);
    buffer[18..22].copy_from_slice(&frame.sequence.to_be_bytes());
    buffer[22..26].copy_from_slice(&frame.count.to_be_bytes());
    buffer[26..30].copy_from_slice(&length.to_be_bytes());
}

fn word(buffer: &[u8], offset: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&buffer[offset..offset + 4]);
    u32::from_be_bytes(bytes)
}

fn parse(buffer: &[u8]) -> Option<Frame> {
    (buffer.len() >= HEADER).then(|| Frame {
        kind: buffer[14],
        sequence: word(buffer, 18),
        count: word(buffer, 22),
    })
}

/// A frame as [`send`] sends it.
pub fn frame(common: &Common, sequence: u32, to: Mac, from: Mac) -> Vec<u8> {
    let mut buffer = vec![0; common.size(sequence)];
    fill(&mut buffer, common, sequence, to, from);
    buffer
}

/// The frame that ends what [`send`] sends.
pub fn end_frame(common: &Common, to: Mac, from: Mac) -> Vec<u8> {
    let frame = Frame {
        kind: END,
        sequence: common.count,
        count: common.count,
    };
    short(to, from, &frame).to_vec()
}

fn fill(buffer: &mut [u8], common: &Common, sequence: u32, to: Mac, from: Mac) {
    let frame = Frame {
        kind: DATA,
        sequence,
        count: common.count,
    };
    compose(buffer, to, from, &frame);
    Pattern::new(common.seed, sequence.into()).fill(&mut buffer[HEADER..]);
}

/// A short frame, padded to the smallest that Ethernet knows.
fn short(to: Mac, from: Mac, frame: &Frame) -> [u8; 60] {
    let mut buffer = [0; 60];
    compose(&mut buffer, to, from, frame);
    buffer
}

/// Sends the frames.
pub fn send(options: &SendOptions) -> io::Result<SendReport> {
    let common = &options.common;
    common.check()?;
    let socket = Socket::open(&common.interface)?;
    let from = address_of(&common.interface)?;
    let to = parse_mac(&options.destination)?;
    let start = Instant::now();
    let mut report = SendReport::default();
    let mut input = vec![0; LARGEST];
    let mut buffer = vec![0; common.largest];
    // Frames that the other end has, or that are given up.
    let mut settled = 0;
    let mut progress = Instant::now();
    while report.sent < common.count {
        let full = report.sent - settled >= WINDOW;
        let wait = if full {
            Duration::from_millis(100)
        } else {
            Duration::ZERO
        };
        if full || report.sent % ACKNOWLEDGE_EVERY == 0 {
            if let Some(length) = socket.receive(&mut input, wait)? {
                if let Some(frame) =
                    parse(&input[..length]).filter(|frame| frame.kind == ACKNOWLEDGE)
                {
                    settled = settled.max(frame.sequence.min(report.sent));
                    progress = Instant::now();
                }
                continue;
            }
        }
        if full {
            if progress.elapsed() < STALL {
                continue;
            }
            report.stalls += 1;
            settled = report.sent;
            progress = Instant::now();
        }
        let frame = &mut buffer[..common.size(report.sent)];
        fill(frame, common, report.sent, to, from);
        socket.send(frame)?;
        report.sent += 1;
        report.bytes += frame.len() as u64;
    }
    let end = end_frame(common, to, from);
    'end: for _ in 0..options.attempts {
        socket.send(&end)?;
        let deadline = Instant::now() + Duration::from_millis(500);
        while let Some(wait) = deadline.checked_duration_since(Instant::now()) {
            if let Some(length) = socket.receive(&mut input, wait)? {
                if parse(&input[..length]).is_some_and(|frame| frame.kind == ACKNOWLEDGE_END) {
                    report.confirmed = true;
                    break 'end;
                }
            }
        }
    }
    report.milliseconds = start.elapsed().as_millis() as u64;
    Ok(report)
}

/// Receives and checks the frames.
pub fn receive(options: &ReceiveOptions) -> io::Result<ReceiveReport> {
    let common = &options.common;
    common.check()?;
    let socket = Socket::open(&common.interface)?;
    if let Some(hash) = options.hash {
        socket.only_with_hash(hash)?;
    }
    let own = address_of(&common.interface)?;
    // The runner starts the sender when it reads this.
    eprintln!("ready");
    let mut report = ReceiveReport {
        smallest: usize::MAX,
        ..ReceiveReport::default()
    };
    let mut seen = vec![false; common.count as usize];
    let mut next = 0;
    let mut unacknowledged = 0;
    let mut buffer = vec![0; LARGEST];
    loop {
        let Some(length) = socket.receive(&mut buffer, Duration::from_secs(options.idle))? else {
            break;
        };
        let bytes = &buffer[..length];
        let Some(frame) = parse(bytes) else {
            report.corrupted += 1;
            continue;
        };
        let mut peer = Mac::default();
        peer.copy_from_slice(&bytes[6..12]);
        match frame.kind {
            DATA => {
                let good = frame.sequence < common.count
                    && frame.count == common.count
                    && length == common.size(frame.sequence)
                    && word(bytes, 26) as usize == length
                    && Pattern::new(common.seed, frame.sequence.into()).matches(&bytes[HEADER..]);
                if !good {
                    report.corrupted += 1;
                    continue;
                }
                let slot = &mut seen[frame.sequence as usize];
                if *slot {
                    report.duplicated += 1;
                    continue;
                }
                *slot = true;
                report.received += 1;
                report.bytes += length as u64;
                report.smallest = report.smallest.min(length);
                report.largest = report.largest.max(length);
                report.reordered += u32::from(frame.sequence < next);
                next = next.max(frame.sequence + 1);
                unacknowledged += 1;
                if unacknowledged >= ACKNOWLEDGE_EVERY {
                    unacknowledged = 0;
                    let frame = Frame {
                        kind: ACKNOWLEDGE,
                        sequence: next,
                        count: report.received,
                    };
                    socket.send(&short(peer, own, &frame))?;
                }
            }
            END => {
                let frame = Frame {
                    kind: ACKNOWLEDGE_END,
                    sequence: next,
                    count: report.received,
                };
                // The sender asks again when this one is lost; waiting for
                // that here would cost every good run the same time.
                for _ in 0..3 {
                    socket.send(&short(peer, own, &frame))?;
                }
                break;
            }
            _ => {}
        }
    }
    report.lost = common.count - report.received;
    let missing = seen.iter().enumerate().filter(|(_, &seen)| !seen);
    report.missing = missing.map(|(sequence, _)| sequence).take(10).collect();
    if report.received == 0 {
        report.smallest = 0;
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn common() -> Common {
        Common {
            interface: String::new(),
            seed: 7,
            smallest: 60,
            largest: 1514,
            count: 1000,
        }
    }

    #[test]
    fn sizes_cover_the_range_and_stay_in_it() {
        let common = common();
        let sizes: Vec<_> = (0..1000).map(|sequence| common.size(sequence)).collect();
        assert_eq!((sizes[0], sizes[1]), (1514, 60));
        assert!(sizes.iter().all(|size| (60..=1514).contains(size)));
        assert!(sizes.iter().filter(|&&size| size > 1400).count() > 20);
    }

    #[test]
    fn limits_are_checked() {
        assert!(common().check().is_ok());
        for change in [
            |c: &mut Common| c.smallest = HEADER - 1,
            |c: &mut Common| c.largest = LARGEST + 1,
            |c: &mut Common| c.largest = c.smallest - 1,
            |c: &mut Common| c.count = 0,
        ] {
            let mut common = common();
            change(&mut common);
            assert!(common.check().is_err());
        }
    }

    #[test]
    fn headers_survive_the_way() {
        let frame = Frame {
            kind: DATA,
            sequence: 0x0102_0304,
            count: 5,
        };
        let bytes = short([1; 6], [2; 6], &frame);
        let parsed = parse(&bytes);
        assert!(parsed.is_some_and(|p| p.kind == DATA && p.sequence == 0x0102_0304 && p.count == 5));
        assert!(parse(&bytes[..HEADER - 1]).is_none());
    }
}
