// SPDX-License-Identifier: GPL-2.0
//! The terminal that a guest's console is on.

use std::io::{self, IsTerminal, Read};

use crate::signals;

/// What Ctrl-] sends; typed, it ends the lab.
const ESCAPE: u8 = 0x1d;

/// Rows and columns of the terminal, if standard input is one that has a size.
pub fn size() -> Option<(u16, u16)> {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the pointer is to a winsize of ours that lives through the call.
    #[expect(unsafe_code)]
    let got = unsafe { libc::ioctl(libc::STDIN_FILENO, libc::TIOCGWINSZ, &raw mut size) };
    (got == 0 && size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}

/// Standard input as it goes to the guest. On a terminal, Ctrl-] ends the lab.
pub struct Keyboard {
    escape: bool,
}

impl Keyboard {
    /// To be read by one thread.
    pub fn new() -> Self {
        Self {
            escape: io::stdin().is_terminal(),
        }
    }
}

impl Read for Keyboard {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = io::stdin().read(buf)?;
        if self.escape && buf[..len].contains(&ESCAPE) {
            signals::end();
        }
        Ok(len)
    }
}

/// The terminal in raw mode, until dropped.
pub struct RawTerminal {
    saved: libc::termios,
    _on_signal: signals::Registered,
}

impl RawTerminal {
    /// All keys are the guest's from now on, but one. `None` if standard input is no terminal.
    pub fn new() -> Option<Self> {
        use vmm_sys_util::terminal::Terminal;
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return None;
        }
        let lock = stdin.lock();
        // SAFETY: an all-zero termios is a valid value of this plain structure.
        #[expect(unsafe_code)]
        let mut saved: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: the pointer is to a termios of ours that lives through the call.
        #[expect(unsafe_code)]
        let got = unsafe { libc::tcgetattr(libc::STDIN_FILENO, &mut saved) };
        if got != 0 {
            return None;
        }
        eprintln!("hvlab: this terminal is the guest's console now; Ctrl-] ends the lab");
        lock.set_raw_mode().ok()?;
        Some(Self {
            saved,
            _on_signal: signals::clean_up_by(move || restore(&saved)),
        })
    }
}

fn restore(saved: &libc::termios) {
    // SAFETY: the pointer is to a termios of ours that lives through the call.
    #[expect(unsafe_code)]
    unsafe {
        libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, saved);
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore(&self.saved);
    }
}
