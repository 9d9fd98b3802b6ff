// SPDX-License-Identifier: GPL-2.0

//! The client end.

use std::{
    io::{self, BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use crate::{Reply, Request, Response};

/// How long a reply may take: for a removal, a guest gets 30 seconds to give the VF up and 60 to release its bus.
const REPLY_TIMEOUT: Duration = Duration::from_secs(120);

/// A request failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The lab cannot be reached, or no longer.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The reply makes no sense.
    #[error("bad reply: {0}")]
    Reply(#[from] serde_json::Error),
    /// The lab refused.
    #[error("{0}")]
    Refused(String),
}

/// A connection to a lab.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects; waits for a lab that is only just starting.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, ClientError> {
        let deadline = Instant::now() + timeout;
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => {
                    return Ok(Self {
                        stream: BufReader::new(stream),
                    })
                }
                Err(error) if Instant::now() >= deadline => return Err(error.into()),
                Err(_) => thread::sleep(Duration::from_millis(100)),
            }
        }
    }

    /// Sends a request and waits for its reply.
    pub fn request(&mut self, request: &Request) -> Result<Reply, ClientError> {
        let timeout = match request {
            Request::Service { duration_ms, .. } => {
                REPLY_TIMEOUT + Duration::from_millis(*duration_ms)
            }
            _ => REPLY_TIMEOUT,
        };
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        self.stream.get_ref().set_read_timeout(Some(timeout))?;
        self.stream.get_mut().write_all(&line)?;

        let mut line = Vec::new();
        if self.stream.read_until(b'\n', &mut line)? == 0 {
            let ended = io::Error::new(io::ErrorKind::UnexpectedEof, "the lab has ended");
            return Err(ended.into());
        }
        match serde_json::from_slice(&line)? {
            Response::Ok(reply) => Ok(reply),
            Response::Error(error) => Err(ClientError::Refused(error)),
        }
    }
}
