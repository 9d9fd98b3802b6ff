// SPDX-License-Identifier: GPL-2.0
//! What happens when we are told to end.
//!
//! The signals are blocked in all threads, and one thread takes them: it may do what a signal handler may not.

use std::sync::{Mutex, PoisonError};
use std::thread;

use nix::sys::signal::{SigSet, Signal};

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

/// Begins to take the signals. To be called before there are threads.
pub fn watch() -> Result<(), String> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        set.add(signal);
    }
    // Programs that we start get an empty mask from the standard library.
    set.thread_block()
        .map_err(|error| format!("signal mask: {error}"))?;
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || loop {
            let Ok(signal) = set.wait() else {
                continue;
            };
            let actions = {
                let mut actions = ACTIONS.lock().unwrap_or_else(PoisonError::into_inner);
                std::mem::take(&mut actions.1)
            };
            let (end, clean_up): (Vec<_>, Vec<_>) = actions
                .into_iter()
                .map(|(_, action)| action)
                .partition(|action| matches!(action, Action::End(_)));
            // A second signal finds nobody who ends in order any more.
            if end.is_empty() {
                run(clean_up);
                std::process::exit(128 + signal as i32);
            }
            run(end);
            let mut actions = ACTIONS.lock().unwrap_or_else(PoisonError::into_inner);
            actions
                .1
                .extend(clean_up.into_iter().map(|action| (0, action)));
        })
        .map(|_| ())
        .map_err(|error| format!("starting a thread: {error}"))
}

fn run(actions: Vec<Action>) {
    for action in actions.into_iter().rev() {
        let (Action::End(action) | Action::CleanUp(action)) = action;
        action();
    }
}
