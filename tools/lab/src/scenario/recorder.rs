// SPDX-License-Identifier: GPL-2.0
//! What guest and host say to each other, message by message, as the host's message log has it.
//!
//! There is a trace for each device. What was said while something was done in the guest is a section
//! of its text. The bus and each channel are read by threads of their own, so only the order within
//! each of them is that of the guest. Of what the host says the order depends on the host. Ids that are
//! names only are replaced with what they are the names of.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use regex::Regex;

use super::compare::section;
use super::guest::{Guest, COMMAND};
use super::Result;

/// The name of the bus among the channels of a device.
pub const BUS: &str = "bus";

/// A line of the message log.
pub struct Line<'a> {
    /// All of it.
    pub text: &'a str,
    /// Who says it, as in the log.
    pub direction: &'a str,
    /// The channel's name.
    pub channel: &'a str,
    /// The message's name.
    pub name: &'a str,
    /// What follows, without the bytes.
    pub fields: &'a str,
    /// The bytes.
    pub bytes: Vec<u8>,
}

impl<'a> Line<'a> {
    fn parse(text: &'a str) -> Result<Self> {
        let mut words = text.split_whitespace();
        let (Some(_), Some(direction), Some(channel), Some(name)) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            return Err(format!("no line of a message log: {text}").into());
        };
        let rest = text.split_once(name).map_or("", |(_, rest)| rest);
        let fields = rest.split(" bytes=").next().unwrap_or_default();
        let bytes = text.rsplit_once(" bytes=").map(|(_, hex)| bytes_of(hex));
        Ok(Self {
            text,
            direction,
            channel,
            name,
            fields,
            bytes: bytes.unwrap_or_default(),
        })
    }

    /// Whether the host says it.
    pub fn is_from_host(&self) -> bool {
        self.direction == "host>guest"
    }

    /// Whether the guest says it.
    pub fn is_from_guest(&self) -> bool {
        self.direction == "guest>host"
    }

    /// The value of a field.
    pub fn field(&self, name: &str) -> Option<u64> {
        let value = self
            .text
            .split_whitespace()
            .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))?;
        match value.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).ok(),
            None => value.parse().ok(),
        }
    }

    /// The host's message without ids.
    pub fn host_text(&self, channel: &str) -> Result<String> {
        let ids = Regex::new(" (relid|gpadl|open_id|connection)=[0-9a-fx]+")?;
        let fields = ids.replace_all(self.fields, "");
        Ok(format!("host  {channel} {}{fields}", self.name))
    }
}

/// The bytes that are written in hexadecimal digits.
pub fn bytes_of(hex: &str) -> Vec<u8> {
    (0..hex.len() / 2)
        .filter_map(|at| u8::from_str_radix(hex.get(2 * at..2 * at + 2)?, 16).ok())
        .collect()
}

/// The word of four bytes at an offset.
pub fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_le_bytes(*word))
}

/// An id in a message: where, and of which kind.
pub type Id = (usize, &'static str);

/// Writes a message in words of four bytes; ids by their names, and zeros at the end counted.
pub fn words(text: &mut String, bytes: &[u8], ids: &[Id], name: impl Fn(&str, u32) -> String) {
    let zeros = bytes.iter().rev().take_while(|byte| **byte == 0).count() / 4 * 4;
    let (written, zeros) = match zeros {
        // A few are easier to read as they are.
        0..=8 => (bytes, 0),
        _ => (&bytes[..bytes.len() - zeros], zeros),
    };
    for (at, chunk) in written.chunks(4).enumerate() {
        let id = ids.iter().find(|(offset, _)| *offset == 4 * at);
        let _ = match (id, word(chunk, 0)) {
            (Some((_, kind)), Some(value)) if value != u32::MAX => {
                write!(text, " {}", name(kind, value))
            }
            _ => {
                let _ = write!(text, " ");
                chunk.iter().try_for_each(|byte| write!(text, "{byte:02x}"))
            }
        };
    }
    if zeros > 0 {
        let _ = write!(text, " and {zeros} zeros");
    }
}

/// What was said since the last section ended, and the sections before.
#[derive(Default)]
pub struct Said {
    /// What the guest has sent, by the bus and each channel.
    pub from_guest: BTreeMap<String, Vec<String>>,
    /// What the bus of the guest does when it comes to it.
    pub late: Vec<String>,
    /// What is there, but how often, and when, depends on timing.
    pub any: BTreeSet<String>,
    /// The same in one section.
    pub any_here: BTreeSet<String>,
    /// What the host has sent.
    pub from_host: Vec<String>,
    text: String,
}

impl Said {
    /// Notes what the guest has sent.
    pub fn guest(&mut self, channel: &str, text: String) {
        let lines = self.from_guest.entry(channel.to_owned()).or_default();
        lines.push(text);
    }

    fn clear(&mut self) {
        self.from_guest.clear();
        self.late.clear();
        self.any_here.clear();
        self.from_host.clear();
    }

    /// Ends a section.
    fn end(&mut self, name: &str, exit: Option<i32>) {
        let exit = exit.map(|code| format!("exit code {code}"));
        self.late.sort();
        self.from_host.sort();
        let lines = exit
            .iter()
            .chain(self.from_guest.values().flatten())
            .chain(&self.late)
            .chain(&self.any_here)
            .chain(&self.from_host)
            .map(String::as_str);
        section(&mut self.text, name, lines);
        self.clear();
    }

    /// All that there is.
    fn finish(mut self) -> String {
        let lines = self.any.iter().map(String::as_str);
        section(&mut self.text, "at any time", lines);
        self.text
    }
}

/// A device on the bus, with its channels.
pub struct Device {
    instance: String,
    /// The relids of its channels, with the numbers of these.
    relids: BTreeMap<u64, u64>,
    /// Its GPADLs, and what they are called.
    gpadls: BTreeMap<u64, String>,
    /// Messages with the addresses of a GPADL's pages: how many, and bytes.
    bodies: (usize, usize),
}

/// The ids in the messages of the bus.
fn bus_ids(name: &str) -> &'static [Id] {
    match name {
        "GPADL_HEADER" | "GPADL_TEARDOWN" => &[(8, "relid"), (12, "gpadl")],
        "GPADL_BODY" => &[(12, "gpadl")],
        "OPEN_CHANNEL" => &[(8, "relid"), (12, "relid"), (16, "gpadl")],
        "CLOSE_CHANNEL" | "RELID_RELEASED" | "MODIFY_CHANNEL" => &[(8, "relid")],
        _ => &[],
    }
}

impl Device {
    /// The device with an instance GUID.
    pub fn new(instance: String) -> Self {
        Self {
            instance,
            relids: BTreeMap::new(),
            gpadls: BTreeMap::new(),
            bodies: (0, 0),
        }
    }

    /// Takes a message of the bus, if it is about this device.
    pub fn take(&mut self, line: &Line<'_>, said: &mut Said) -> Result<bool> {
        if !self.is_mine(line) {
            return Ok(false);
        }
        if line.is_from_host() {
            said.from_host.push(line.host_text(BUS)?);
            return Ok(true);
        }
        if line.is_from_guest() {
            self.guest_message(line, said);
            return Ok(true);
        }
        Ok(false)
    }

    /// Whether a message of the bus is about this device.
    fn is_mine(&mut self, line: &Line<'_>) -> bool {
        let relid = line.field("relid");
        if let ("OFFER_CHANNEL", Some(relid)) = (line.name, relid) {
            // A relid that was given up is another channel's later.
            self.relids.remove(&relid);
            if line.text.to_lowercase().contains(&self.instance) {
                let channel = line.field("subchannel").unwrap_or_default();
                self.relids.insert(relid, channel);
            }
        }
        let gpadl = || line.field("gpadl");
        match relid {
            Some(relid) => self.relids.contains_key(&relid),
            None => gpadl().is_some_and(|gpadl| self.gpadls.contains_key(&gpadl)),
        }
    }

    /// Notes what a GPADL is.
    fn gpadl(&mut self, bytes: &[u8]) {
        if let (Some(relid), Some(gpadl), Some(size)) =
            (word(bytes, 8), word(bytes, 12), word(bytes, 20))
        {
            let channel = self.name("relid", relid);
            let name = format!("<{size} bytes of {channel}>");
            self.gpadls.insert(gpadl.into(), name);
        }
    }

    fn guest_message(&mut self, line: &Line<'_>, said: &mut Said) {
        let (name, bytes) = (line.name, &line.bytes);
        let mut shown = bytes.as_slice();
        match name {
            "GPADL_HEADER" => {
                self.gpadl(bytes);
                // What follows are the addresses of pages.
                shown = bytes.get(..28).unwrap_or(bytes);
            }
            "GPADL_BODY" => {
                self.bodies.0 += 1;
                self.bodies.1 += bytes.len();
                let text = format!(
                    "guest {BUS} GPADL_BODY: {} messages, {} bytes",
                    self.bodies.0, self.bodies.1
                );
                if self.bodies.0 > 1 {
                    said.from_guest.entry(BUS.to_owned()).or_default().pop();
                }
                said.guest(BUS, text);
                return;
            }
            _ => {}
        }
        let mut text = format!("guest {BUS} {name} {} bytes:", bytes.len());
        let id = |kind: &str, value| self.name(kind, value);
        words(&mut text, shown, bus_ids(name), id);
        if name == "RELID_RELEASED" {
            said.late.push(text);
            return;
        }
        self.bodies = (0, 0);
        said.guest(BUS, text);
    }

    /// What an id is the name of; any id of an unknown kind is as good as another.
    pub fn name(&self, kind: &str, value: u32) -> String {
        let known = match kind {
            "relid" => self
                .relids
                .get(&value.into())
                .map(|channel| format!("<channel {channel}>")),
            "gpadl" => self.gpadls.get(&value.into()).cloned(),
            _ => Some(format!("<{kind}>")),
        };
        known.unwrap_or_else(|| format!("<unknown {kind}>"))
    }
}

/// What a device and its host have said to each other.
pub trait Trace {
    /// Takes a line of the log. Says whether it is of this device and of interest.
    fn take(&mut self, line: &Line<'_>) -> Result<bool>;

    /// What was said.
    fn said(&mut self) -> &mut Said;

    /// Called before a section ends.
    fn complete(&mut self, _section: &str) {}

    /// All that there is.
    fn into_said(self) -> Said;
}

/// Follows the host's message log.
pub struct Recorder<'a, T> {
    /// The guest.
    pub guest: &'a Guest,
    traces: Vec<T>,
    next: u64,
}

impl<'a, T: Trace> Recorder<'a, T> {
    /// Begins with these traces, one for each device, and without what was said before.
    pub fn new(guest: &'a Guest, traces: Vec<T>, quiet: Duration) -> Result<Self> {
        let mut recorder = Self {
            guest,
            traces,
            next: 0,
        };
        // What there was before tells of ids only.
        recorder.settle(quiet)?;
        for trace in &mut recorder.traces {
            trace.complete("");
            trace.said().clear();
            trace.said().any.clear();
        }
        Ok(recorder)
    }

    /// Takes what there is in the log until nothing more comes.
    fn settle(&mut self, quiet: Duration) -> Result<()> {
        let mut last = Instant::now();
        loop {
            let (lines, next) = self.guest.host.log(self.next)?;
            self.next = next;
            for line in &lines {
                let line = Line::parse(line)?;
                for trace in &mut self.traces {
                    if trace.take(&line)? {
                        last = Instant::now();
                    }
                }
            }
            if last.elapsed() >= quiet {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn end(&mut self, device: usize, name: &str, exit: Option<i32>) {
        let trace = &mut self.traces[device];
        trace.complete(name);
        trace.said().end(name, exit);
    }

    /// Runs a command, which may be refused, and writes what it has led to.
    pub fn phase(
        &mut self,
        devices: &[usize],
        name: &str,
        command: &str,
        quiet: Duration,
    ) -> Result<()> {
        let exit = self.guest.exit(command, COMMAND * 2)?;
        self.settle(quiet)?;
        for &device in devices {
            self.end(device, name, Some(exit.code));
        }
        Ok(())
    }

    /// The same with a command for each device.
    pub fn phases(
        &mut self,
        devices: &[usize],
        name: &str,
        command: impl Fn(usize) -> String,
        quiet: Duration,
    ) -> Result<()> {
        let all = devices.iter().map(|&device| {
            let command = command(device);
            format!("({command}) >/dev/null 2>&1; echo $?; ")
        });
        let codes = self
            .guest
            .sh_within(&all.collect::<String>(), COMMAND * 2)?;
        self.settle(quiet)?;
        for (&device, code) in devices.iter().zip(codes.lines()) {
            self.end(device, name, Some(code.parse()?));
        }
        Ok(())
    }

    /// The same with something else than a command.
    pub fn action(
        &mut self,
        devices: &[usize],
        name: &str,
        quiet: Duration,
        act: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        act()?;
        self.settle(quiet)?;
        for &device in devices {
            self.end(device, name, None);
        }
        Ok(())
    }

    /// The texts.
    pub fn finish(self) -> impl Iterator<Item = String> {
        let said = self.traces.into_iter().map(Trace::into_said);
        said.map(Said::finish)
    }
}
