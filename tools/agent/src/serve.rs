// SPDX-License-Identifier: GPL-2.0
//! The agent's end of the serial line.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{mpsc, Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{killpg, Signal};
use nix::sys::termios::{cfmakeraw, tcflush, tcgetattr, tcsetattr, FlushArg, SetArg};
use nix::unistd::Pid;

use crate::protocol::{Exit, Op, Outcome, Request, Response};

/// The most of each output stream that is sent back; the rest is dropped with a note.
const OUTPUT_LIMIT: usize = 4 << 20;

/// How long the output of a command is awaited after its end, for those
/// that leave a process behind with the streams open.
const OUTPUT_GRACE: Duration = Duration::from_millis(300);

struct Agent {
    line: Mutex<File>,
    running: Mutex<HashMap<u64, Pid>>,
}

/// Serves requests on the terminal device `path` until it fails.
pub fn serve(path: &Path) -> io::Result<()> {
    let line = OpenOptions::new().read(true).write(true).open(path)?;
    let mut settings = tcgetattr(&line)?;
    cfmakeraw(&mut settings);
    tcsetattr(&line, SetArg::TCSANOW, &settings)?;
    // What arrived before raw mode may be mangled; the client asks again.
    tcflush(&line, FlushArg::TCIFLUSH)?;
    let reader = BufReader::new(line.try_clone()?);
    let agent = Arc::new(Agent {
        line: Mutex::new(line),
        running: Mutex::default(),
    });
    for request in reader.split(b'\n') {
        let Ok(request) = serde_json::from_slice::<Request>(&request?) else {
            continue;
        };
        match request.op {
            Op::Ping => agent.answer(request.id, Outcome::Done),
            Op::Signal { target, signal } => {
                let result = agent.signal(target, signal);
                agent.answer(request.id, result);
            }
            Op::Run {
                command,
                stdin,
                timeout_ms,
            } => {
                let agent = agent.clone();
                thread::spawn(move || {
                    let timeout = Duration::from_millis(timeout_ms);
                    let result = agent.run(request.id, &command, stdin, timeout);
                    agent.answer(request.id, result);
                });
            }
        }
    }
    Ok(())
}

impl Agent {
    fn answer(&self, id: u64, result: Outcome) {
        let Ok(mut text) = serde_json::to_vec(&Response { id, result }) else {
            return;
        };
        text.push(b'\n');
        // The client has a deadline of its own, so a broken line needs no report.
        let _ = self
            .line
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write_all(&text);
    }

    fn signal(&self, target: u64, signal: i32) -> Outcome {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(&group) = running.get(&target) else {
            return Outcome::Failed(format!("request {target} is not running"));
        };
        let sent = Signal::try_from(signal).and_then(|signal| killpg(group, signal));
        match sent {
            Ok(()) => Outcome::Done,
            Err(error) => Outcome::Failed(error.to_string()),
        }
    }

    fn run(&self, id: u64, command: &str, stdin: String, timeout: Duration) -> Outcome {
        let child = Command::new("sh")
            .arg("-c")
            .arg(command)
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let mut child = match child {
            Ok(child) => child,
            Err(error) => return Outcome::Failed(format!("cannot run sh: {error}")),
        };
        let group = Pid::from_raw(child.id() as i32);
        let lock = || self.running.lock().unwrap_or_else(PoisonError::into_inner);
        lock().insert(id, group);
        let result = collect(&mut child, group, stdin, timeout);
        lock().remove(&id);
        match result {
            Ok(exit) => Outcome::Exited(exit),
            Err(error) => Outcome::Failed(error.to_string()),
        }
    }
}

fn collect(child: &mut Child, group: Pid, stdin: String, timeout: Duration) -> io::Result<Exit> {
    if let Some(mut pipe) = child.stdin.take() {
        thread::spawn(move || {
            // A command that does not read its input is no error.
            let _ = pipe.write_all(stdin.as_bytes());
        });
    }
    let stdout = gather(child.stdout.take());
    let stderr = gather(child.stderr.take());
    let deadline = Instant::now() + timeout;
    let mut pause = Duration::from_millis(1);
    let mut timed_out = false;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() >= deadline {
            timed_out = true;
            // It may have ended since; then there is nobody to kill.
            let _ = killpg(group, Signal::SIGKILL);
            break child.wait()?;
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    };
    Ok(Exit {
        code: status
            .code()
            .or(status.signal().map(|signal| 128 + signal))
            .unwrap_or(-1),
        timed_out,
        stdout: stdout.take(),
        stderr: stderr.take(),
    })
}

/// The output of a stream, read by a thread of its own.
struct Gathered {
    text: Arc<Mutex<Vec<u8>>>,
    ended: mpsc::Receiver<()>,
}

fn gather(stream: Option<impl Read + Send + 'static>) -> Gathered {
    let text = Arc::new(Mutex::new(Vec::new()));
    let (end, ended) = mpsc::channel();
    if let Some(mut stream) = stream {
        let text = text.clone();
        thread::spawn(move || {
            let mut buffer = [0; 16384];
            while let Ok(count @ 1..) = stream.read(&mut buffer) {
                let mut text = text.lock().unwrap_or_else(PoisonError::into_inner);
                let room = OUTPUT_LIMIT.saturating_sub(text.len());
                text.extend_from_slice(&buffer[..count.min(room)]);
                if count > room && room > 0 {
                    text.extend_from_slice(b"\n[output cut]\n");
                }
            }
            let _ = end.send(());
        });
    }
    Gathered { text, ended }
}

impl Gathered {
    fn take(self) -> String {
        let _ = self.ended.recv_timeout(OUTPUT_GRACE);
        let text = self.text.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&text).into_owned()
    }
}
