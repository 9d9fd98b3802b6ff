// SPDX-License-Identifier: GPL-2.0
//! What happens when we are told to end.
//!
//! A handler passes each signal on to a thread, which may do what a handler may not. (Blocking the signals and waiting
//! for them would be shorter, but programs that we start would inherit that.)

use std::io::{self, Read};
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use vmm_sys_util::signal::register_signal_handler;

/// Those that ask for the end.
const SIGNALS: [libc::c_int; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

/// Where the handler writes the number of a signal.
static HANDLER_END: AtomicI32 = AtomicI32::new(-1);

/// Tells whoever can end in order to do so; else it is to clean up, and the program exits.
enum Action {
    End(Box<dyn FnOnce() + Send>),
    CleanUp(Box<dyn FnOnce() + Send>),
}

/// What to do, by number, newest last.
static ACTIONS: Mutex<(u64, Vec<(u64, Action)>)> = Mutex::new((0, Vec::new()));

/// An action that counts as long as this exists.
#[must_use]
pub struct Registered(u64);

impl Drop for Registered {
    fn drop(&mut self) {
        let mut actions = ACTIONS.lock().unwrap_or_else(PoisonError::into_inner);
        actions.1.retain(|(number, _)| *number != self.0);
    }
}

fn register(action: Action) -> Registered {
    let mut actions = ACTIONS.lock().unwrap_or_else(PoisonError::into_inner);
    actions.0 += 1;
    let number = actions.0;
    actions.1.push((number, action));
    Registered(number)
}

/// On a signal, `action` sees to it that the program ends in order, soon.
pub fn end_by(action: impl FnOnce() + Send + 'static) -> Registered {
    register(Action::End(Box::new(action)))
}

/// On a signal that makes the program exit at once, `action` comes first.
pub fn clean_up_by(action: impl FnOnce() + Send + 'static) -> Registered {
    register(Action::CleanUp(Box::new(action)))
}

extern "C" fn handle(signal: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let byte = signal as u8;
    // SAFETY: write is async-signal-safe and reads one byte of ours; errno is the interrupted code's, so it is put back.
    #[expect(unsafe_code)]
    unsafe {
        let errno = libc::__errno_location();
        let saved = *errno;
        libc::write(
            HANDLER_END.load(Ordering::Relaxed),
            (&raw const byte).cast(),
            1,
        );
        *errno = saved;
    }
}

/// Begins to take the signals.
pub fn watch() -> io::Result<()> {
    let (mut reader, writer) = UnixStream::pair()?;
    // A full pipe has signals enough in it.
    writer.set_nonblocking(true)?;
    HANDLER_END.store(writer.as_raw_fd(), Ordering::Relaxed);
    // It stays open for the handler.
    let _ = writer.into_raw_fd();
    for signal in SIGNALS {
        register_signal_handler(signal, handle)
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
    }
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            let mut signal = [0];
            while reader.read_exact(&mut signal).is_ok() {
                take(128 + i32::from(signal[0]));
            }
        })
        .map(|_| ())
}

/// Ends the program as a signal does, but with exit status 0.
pub fn end() {
    take(0);
}

fn take(status: i32) {
    let actions = {
        let mut actions = ACTIONS.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut actions.1)
    };
    let (end, clean_up): (Vec<_>, Vec<_>) = actions
        .into_iter()
        .partition(|(_, action)| matches!(action, Action::End(_)));
    // A second signal finds nobody who ends in order any more.
    if end.is_empty() {
        run(clean_up);
        std::process::exit(status);
    }
    // Who registered them may still take them back.
    let mut actions = ACTIONS.lock().unwrap_or_else(PoisonError::into_inner);
    actions.1.extend(clean_up);
    drop(actions);
    run(end);
}

fn run(actions: Vec<(u64, Action)>) {
    for (_, action) in actions.into_iter().rev() {
        let (Action::End(action) | Action::CleanUp(action)) = action;
        action();
    }
}
