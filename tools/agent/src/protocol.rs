// SPDX-License-Identifier: GPL-2.0
//! Messages on the second serial port: one JSON value a line, both ways.

use serde::{Deserialize, Serialize};

/// A request to the agent; the answer carries the same `id`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the client, unique while the request is open.
    pub id: u64,
    /// What to do.
    pub op: Op,
}

/// What the agent can do.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Op {
    /// Answer at once.
    Ping,
    /// Run a shell command and answer when it has ended.
    Run {
        /// Given to `sh -c`.
        command: String,
        /// Fed to its standard input.
        #[serde(default)]
        stdin: String,
        /// Its process group is killed after that long.
        timeout_ms: u64,
    },
    /// Send a signal to the process group of the running request `target`.
    Signal {
        /// The `id` of the request that runs the command.
        target: u64,
        /// The signal's number.
        signal: i32,
    },
}

/// An answer of the agent.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Response {
    /// Of the request.
    pub id: u64,
    /// What came of it.
    pub result: Outcome,
}

/// What came of a request.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Done, nothing to report.
    Done,
    /// The command ran.
    Exited(Exit),
    /// The request could not be carried out.
    Failed(String),
}

/// How a command ended.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Exit {
    /// Exit code; 128 plus the signal's number when a signal ended it.
    pub code: i32,
    /// Whether the deadline ended it.
    pub timed_out: bool,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
}
