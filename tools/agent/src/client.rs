// SPDX-License-Identifier: GPL-2.0
//! The runner's end of the serial line.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{mpsc, Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::protocol::{Exit, Op, Outcome, Request, Response};

/// What the line may take on top of a command's own timeout.
const LINE_GRACE: Duration = Duration::from_secs(20);

/// Why a request to the agent failed.
#[derive(Debug)]
pub enum Error {
    /// The connection to the serial port is gone.
    Closed,
    /// Nothing came back in time: the guest hangs, or has died.
    NoAnswer(Duration),
    /// The agent could not do it.
    Agent(String),
    /// The socket could not be used.
    Io(io::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("the guest's serial line is closed"),
            Self::NoAnswer(time) => {
                write!(f, "no answer from the guest within {} s", time.as_secs())
            }
            Self::Agent(text) => write!(f, "the agent in the guest: {text}"),
            Self::Io(error) => write!(f, "serial line: {error}"),
        }
    }
}

impl std::error::Error for Error {}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Requests that wait for their answer.
type Open = Arc<Mutex<HashMap<u64, mpsc::Sender<Outcome>>>>;

/// A connection to the agent in a guest; requests may overlap.
pub struct Client {
    writer: Mutex<UnixStream>,
    open: Open,
    closed: Arc<AtomicBool>,
    next: AtomicU64,
}

/// A command that runs in the guest.
pub struct Running<'a> {
    client: &'a Client,
    id: u64,
    answer: mpsc::Receiver<Outcome>,
    limit: Duration,
}

impl Client {
    /// Connects to the unix socket that carries the serial port, and waits
    /// until the agent answers.
    pub fn connect(
        path: &Path,
        timeout: Duration,
        alive: impl Fn() -> bool,
    ) -> Result<Self, Error> {
        let deadline = Instant::now() + timeout;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() >= deadline || !alive() => return Err(error.into()),
                Err(_) => thread::sleep(Duration::from_millis(100)),
            }
        };
        let open = Open::default();
        let closed = Arc::new(AtomicBool::new(false));
        let reader = BufReader::new(stream.try_clone()?);
        thread::spawn({
            let (open, closed) = (open.clone(), closed.clone());
            move || {
                dispatch(reader, &open);
                closed.store(true, Ordering::Relaxed);
                // Dropping the senders ends every wait.
                open.lock().unwrap_or_else(PoisonError::into_inner).clear();
            }
        });
        let client = Self {
            writer: Mutex::new(stream),
            open,
            closed,
            next: AtomicU64::new(1),
        };
        // The guest drops what arrives before the agent has opened the port.
        loop {
            let pong = client
                .send(Op::Ping)?
                .1
                .recv_timeout(Duration::from_secs(1));
            match pong {
                Ok(_) => return Ok(client),
                Err(_) if client.closed.load(Ordering::Relaxed) || !alive() => {
                    return Err(Error::Closed)
                }
                Err(_) if Instant::now() >= deadline => return Err(Error::NoAnswer(timeout)),
                Err(_) => {}
            }
        }
    }

    fn send(&self, op: Op) -> Result<(u64, mpsc::Receiver<Outcome>), Error> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = mpsc::channel();
        self.open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(id, sender);
        let mut text = serde_json::to_vec(&Request { id, op })
            .map_err(|error| Error::Agent(error.to_string()))?;
        text.push(b'\n');
        self.writer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write_all(&text)?;
        Ok((id, receiver))
    }

    /// Starts a shell command in the guest.
    pub fn start(&self, command: &str, timeout: Duration) -> Result<Running<'_>, Error> {
        let (id, answer) = self.send(Op::Run {
            command: command.to_owned(),
            stdin: String::new(),
            timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
        })?;
        Ok(Running {
            client: self,
            id,
            answer,
            limit: timeout + LINE_GRACE,
        })
    }

    /// Runs a shell command in the guest.
    pub fn run(&self, command: &str, timeout: Duration) -> Result<Exit, Error> {
        self.start(command, timeout)?.wait()
    }
}

impl Running<'_> {
    /// Waits for the end of the command.
    pub fn wait(self) -> Result<Exit, Error> {
        match self.answer.recv_timeout(self.limit) {
            Ok(Outcome::Exited(exit)) => Ok(exit),
            Ok(Outcome::Failed(text)) => Err(Error::Agent(text)),
            Ok(Outcome::Done) => Err(Error::Agent("answered out of turn".into())),
            Err(mpsc::RecvTimeoutError::Timeout) => Err(Error::NoAnswer(self.limit)),
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(Error::Closed),
        }
    }

    /// Asks the command to end (SIGINT), then waits for it.
    pub fn stop(self) -> Result<Exit, Error> {
        // A command that has ended by itself cannot be signalled, which is fine.
        self.client.send(Op::Signal {
            target: self.id,
            signal: libc::SIGINT,
        })?;
        self.wait()
    }
}

fn dispatch(reader: impl BufRead, open: &Open) {
    for line in reader.split(b'\n') {
        let Ok(line) = line else { break };
        // Whatever is no answer is noise from before the agent took the line.
        let Ok(response) = serde_json::from_slice::<Response>(&line) else {
            continue;
        };
        let waiting = open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&response.id);
        if let Some(waiting) = waiting {
            let _ = waiting.send(response.result);
        }
    }
}
