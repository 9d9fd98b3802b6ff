// SPDX-License-Identifier: GPL-2.0

//! The message log: one line a message, of all devices, with bounded memory.

use std::{
    collections::VecDeque,
    fmt::{Display, Write as _},
    io::Write,
    sync::{
        atomic::{AtomicBool, Ordering},
        Arc, Mutex,
    },
    time::Instant,
};

use crate::lock;

/// Who sent the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The guest.
    GuestToHost,
    /// The host.
    HostToGuest,
    /// Nobody: an event inside of the host.
    Host,
}

impl Direction {
    /// How the direction is shown.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::GuestToHost => "guest>host",
            Self::HostToGuest => "host>guest",
            Self::Host => "host      ",
        }
    }
}

/// The longest line that is kept; what a guest sends decides on lengths.
const MAX_LINE: usize = 512;

struct Lines {
    lines: VecDeque<String>,
    /// Sequence number of the first line kept.
    first: u64,
    tee: Option<Box<dyn Write + Send>>,
}

/// The message log.
pub struct MessageLog {
    start: Instant,
    max_lines: usize,
    /// Lines end with the bytes of their message.
    with_bytes: AtomicBool,
    lines: Mutex<Lines>,
}

/// A part of the log.
#[derive(Clone, Debug, Default)]
pub struct LogPage {
    /// The lines.
    pub lines: Vec<String>,
    /// Sequence number to continue with.
    pub next: u64,
    /// Lines that were asked for but are no longer kept.
    pub dropped: u64,
}

impl MessageLog {
    /// An empty log that keeps the newest `max_lines` lines.
    pub fn new(max_lines: usize) -> Arc<Self> {
        Arc::new(Self {
            start: Instant::now(),
            max_lines: max_lines.max(1),
            with_bytes: AtomicBool::new(false),
            lines: Mutex::new(Lines {
                lines: VecDeque::new(),
                first: 0,
                tee: None,
            }),
        })
    }

    /// Writes every line from now on to `to` as well.
    pub fn tee(&self, to: Box<dyn Write + Send>) {
        lock(&self.lines).tee = Some(to);
    }

    /// From now on lines end with the bytes of their message, and data packets have lines, too.
    pub fn keep_bytes(&self) {
        self.with_bytes.store(true, Ordering::Relaxed);
    }

    /// Whether messages are logged with all their bytes.
    pub fn keeps_bytes(&self) -> bool {
        self.with_bytes.load(Ordering::Relaxed)
    }

    /// Adds a line: time since the log began, direction, channel, name of the message, fields.
    pub fn record(&self, direction: Direction, channel: &str, name: &str, fields: impl Display) {
        self.add(direction, channel, name, fields, &[]);
    }

    /// The same for a message whose bytes are at hand.
    pub fn record_message(
        &self,
        direction: Direction,
        channel: &str,
        name: &str,
        fields: impl Display,
        bytes: &[u8],
    ) {
        let bytes = if self.keeps_bytes() { bytes } else { &[] };
        self.add(direction, channel, name, fields, bytes);
    }

    fn add(
        &self,
        direction: Direction,
        channel: &str,
        name: &str,
        fields: impl Display,
        bytes: &[u8],
    ) {
        let mut line = String::new();
        // The lock is taken first, so that times never go backwards in the log.
        let mut log = lock(&self.lines);
        let time = self.start.elapsed();
        // Writing to a string fails only if a Display implementation does.
        let _ = write!(
            line,
            "{:5}.{:06} {} {channel} {name} {fields}",
            time.as_secs(),
            time.subsec_micros(),
            direction.as_str(),
        );
        line.truncate(line.trim_end().len());
        if line.len() > MAX_LINE {
            let end = (0..=MAX_LINE).rev().find(|&n| line.is_char_boundary(n));
            line.truncate(end.unwrap_or(0));
            line.push('…');
        }
        if !bytes.is_empty() {
            line.push_str(" bytes=");
            for byte in bytes {
                let _ = write!(line, "{byte:02x}");
            }
        }

        if let Some(tee) = &mut log.tee {
            // The log itself is complete; a reader that went away gets no more lines.
            if writeln!(tee, "{line}").is_err() {
                log.tee = None;
            }
        }
        if log.lines.len() == self.max_lines {
            log.lines.pop_front();
            log.first += 1;
        }
        log.lines.push_back(line);
    }

    /// Lines from a sequence number on; zero is the first line ever.
    pub fn since(&self, sequence: u64) -> LogPage {
        let log = lock(&self.lines);
        let next = log.first + log.lines.len() as u64;
        let from = sequence.clamp(log.first, next);
        let skip = (from - log.first) as usize;
        LogPage {
            lines: log.lines.iter().skip(skip).cloned().collect(),
            next,
            dropped: log.first.saturating_sub(sequence),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_newest_lines_and_says_what_is_lost() {
        let log = MessageLog::new(2);
        assert!(log.since(0).lines.is_empty());
        for n in 0..3 {
            log.record(
                Direction::GuestToHost,
                "vmbus",
                "TEST",
                format_args!("n={n}"),
            );
        }
        let page = log.since(0);
        assert_eq!(page.dropped, 1);
        assert_eq!(page.next, 3);
        assert_eq!(page.lines.len(), 2);
        assert!(page.lines[1].ends_with("guest>host vmbus TEST n=2"));
        assert!(log.since(3).lines.is_empty());
        // A number from another run is not an error.
        assert_eq!(log.since(99).next, 3);
    }

    #[test]
    fn bytes_are_kept_when_asked_for() {
        let log = MessageLog::new(2);
        let record = || log.record_message(Direction::Host, "x", "y", "z=1", &[0x0a, 0xff]);
        record();
        log.keep_bytes();
        record();
        let lines = log.since(0).lines;
        assert!(lines[0].ends_with("y z=1"));
        assert!(lines[1].ends_with("y z=1 bytes=0aff"));
    }

    #[test]
    fn long_lines_are_cut() {
        let log = MessageLog::new(1);
        log.record(Direction::Host, "x", "y", "é".repeat(MAX_LINE));
        assert!(log.since(0).lines[0].len() <= MAX_LINE + '…'.len_utf8());
    }
}
