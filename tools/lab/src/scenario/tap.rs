// SPDX-License-Identifier: GPL-2.0
//! One line a check, in the Test Anything Protocol.

use std::io::Write;
use std::time::Instant;

/// Numbers and counts the checks of a run.
pub struct Tap {
    out: Box<dyn Write + Send>,
    start: Instant,
    passed: usize,
    failed: Vec<String>,
}

impl Tap {
    /// Starts a run that reports to `out`.
    pub fn new(out: Box<dyn Write + Send>) -> Self {
        Self {
            out,
            start: Instant::now(),
            passed: 0,
            failed: Vec::new(),
        }
    }

    /// Reports a check; the lines of an error explain it.
    pub fn check(&mut self, name: &str, result: Result<(), String>) -> bool {
        let number = self.passed + self.failed.len() + 1;
        match result {
            Ok(()) => {
                self.passed += 1;
                self.line(&format!("ok {number} - {name}"));
                true
            }
            Err(why) => {
                self.failed.push(name.to_owned());
                self.line(&format!("not ok {number} - {name}"));
                for line in why.lines() {
                    self.line(&format!("#     {line}"));
                }
                false
            }
        }
    }

    /// Shows how far the run is.
    pub fn note(&mut self, text: &str) {
        let seconds = self.start.elapsed().as_secs();
        for line in text.lines() {
            self.line(&format!("# {seconds:4} s  {line}"));
        }
    }

    /// How many checks failed so far.
    pub fn failures(&self) -> usize {
        self.failed.len()
    }

    /// Prints the sums; true when every check passed.
    pub fn finish(&mut self) -> bool {
        let (passed, failed) = (self.passed, self.failed.len());
        self.line(&format!("1..{}", passed + failed));
        for name in std::mem::take(&mut self.failed) {
            self.line(&format!("# failed: {name}"));
        }
        self.line(&format!("{passed} passed, {failed} failed"));
        // A run that checked nothing has proved nothing.
        failed == 0 && passed > 0
    }

    fn line(&mut self, text: &str) {
        // Nobody left to tell when this fails.
        let _ = writeln!(self.out, "{text}").and_then(|()| self.out.flush());
    }
}
