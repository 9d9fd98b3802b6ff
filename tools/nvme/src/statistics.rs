// SPDX-License-Identifier: GPL-2.0

//! What the controller counts.

use vmbus_host::{Counter, Counters};

/// What the controller counts.
#[derive(Debug, Default)]
pub struct Statistics {
    /// Times the controller was enabled.
    pub enabled: Counter,
    /// Admin commands.
    pub admin: Counter,
    /// READ commands that were carried out.
    pub reads: Counter,
    /// WRITE commands that were carried out.
    pub writes: Counter,
    /// Bytes read.
    pub read_bytes: Counter,
    /// Bytes written.
    pub written_bytes: Counter,
    /// FLUSH commands that were carried out.
    pub flushes: Counter,
    /// WRITE ZEROES and DATASET MANAGEMENT commands that were carried out.
    pub zeroes: Counter,
    /// Commands that ended with an error.
    pub refused: Counter,
    /// Things no driver may do: wrong doorbells, queues in memory that is not there.
    pub protocol_errors: Counter,
}

impl Statistics {
    /// The counters `NAME.*`.
    pub fn new(counters: &Counters, name: &str) -> Self {
        let counter = |what| counters.counter(&format!("{name}.{what}"));
        Self {
            enabled: counter("enabled"),
            admin: counter("admin"),
            reads: counter("reads"),
            writes: counter("writes"),
            read_bytes: counter("read_bytes"),
            written_bytes: counter("written_bytes"),
            flushes: counter("flushes"),
            zeroes: counter("zeroes"),
            refused: counter("refused"),
            protocol_errors: counter("protocol_errors"),
        }
    }
}
