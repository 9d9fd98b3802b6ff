// SPDX-License-Identifier: GPL-2.0

//! The server end.

use std::{
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{
        atomic::{AtomicBool, AtomicUsize, Ordering},
        Arc,
    },
    thread,
};

use crate::{execute, Lab, Request, Response, MAX_REQUEST};

/// Connections served at once.
const MAX_CONNECTIONS: usize = 16;

/// Reads requests and writes replies until the other end has no more.
pub fn serve(lab: &dyn Lab, reader: impl Read, mut writer: impl Write) -> io::Result<()> {
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = (&mut reader)
            .take(MAX_REQUEST)
            .read_until(b'\n', &mut line)?;
        if read == 0 {
            return Ok(());
        }
        let complete = line.last() == Some(&b'\n');
        if !complete && read as u64 == MAX_REQUEST {
            // What follows cannot be told from the rest of this line.
            return reply(&mut writer, &Response::Error("request is too long".into()));
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        let response = match serde_json::from_slice::<Request>(&line) {
            Ok(request) => execute(lab, &request),
            Err(error) => Response::Error(format!("bad request: {error}")),
        };
        reply(&mut writer, &response)?;
    }
}

fn reply(writer: &mut impl Write, response: &Response) -> io::Result<()> {
    let mut line = serde_json::to_vec(response)?;
    line.push(b'\n');
    writer.write_all(&line)?;
    writer.flush()
}

/// A server on a Unix socket. It ends, and the socket goes away, when this is dropped.
pub struct Server {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Server {
    /// Listens on `path`. A socket there that nobody listens on any more is replaced.
    pub fn start(path: &Path, lab: Arc<dyn Lab>) -> io::Result<Self> {
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                if UnixStream::connect(path).is_ok() {
                    return Err(error);
                }
                fs::remove_file(path)?;
                UnixListener::bind(path)?
            }
            other => other?,
        };
        let stop = Arc::new(AtomicBool::new(false));
        let thread = thread::Builder::new().name("control".into()).spawn({
            let stop = stop.clone();
            move || accept(&listener, &lab, &stop)
        })?;
        Ok(Self {
            path: path.to_owned(),
            stop,
            thread: Some(thread),
        })
    }
}

/// Serves each connection in a thread of its own.
fn accept(listener: &UnixListener, lab: &Arc<dyn Lab>, stop: &AtomicBool) {
    let connections = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        if stop.load(Ordering::Acquire) {
            return;
        }
        let Ok(mut stream) = stream else {
            // Out of file descriptors: do not spin until there are some.
            thread::sleep(std::time::Duration::from_millis(100));
            continue;
        };
        if connections.fetch_add(1, Ordering::AcqRel) >= MAX_CONNECTIONS {
            connections.fetch_sub(1, Ordering::AcqRel);
            // Nobody to tell if even this fails.
            let _ = reply(&mut stream, &Response::Error("too many connections".into()));
            continue;
        }
        let (lab, connections) = (lab.clone(), connections.clone());
        thread::spawn(move || {
            // An error is a client that went away.
            let _ = serve(&*lab, &stream, &stream);
            connections.fetch_sub(1, Ordering::AcqRel);
        });
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // Wakes the thread out of accept().
        let woken = UnixStream::connect(&self.path).is_ok();
        if let (Some(thread), true) = (self.thread.take(), woken) {
            // A panic there has been reported by the thread itself.
            let _ = thread.join();
        }
        let _ = fs::remove_file(&self.path);
    }
}
