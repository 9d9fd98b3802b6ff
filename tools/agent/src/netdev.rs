// SPDX-License-Identifier: GPL-2.0
//! Questions to the kernel's netlink family `netdev`: what it knows of a device's queues, of the
//! NAPI instances that serve them, and their counters.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::error::Error;
use std::ffi::c_int;
use std::os::fd::{AsRawFd, OwnedFd};

use clap::{Args, ValueEnum};
use nix::errno::Errno;
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{
    bind, recv, send, setsockopt, socket, AddressFamily, MsgFlags, NetlinkAddr, SockFlag,
    SockProtocol, SockType,
};
use nix::sys::time::TimeVal;

/// Options of `netdev`.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// What is asked for
    #[arg(value_enum)]
    pub what: What,
    /// The interface
    pub interface: String,
}

/// What can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum What {
    /// The queues in use
    Queues,
    /// The NAPI instances
    Napis,
    /// The counters of the device
    Stats,
    /// The counters of each queue
    QueueStats,
}

/// One object of an answer: numbers by name.
pub type Object = BTreeMap<String, u64>;

/// Version of the family.
const VERSION: u8 = 1;
/// In requests for counters, what they are to be given for, and the value for queues.
const QSTATS_SCOPE: u16 = 4;
const SCOPE_QUEUE: u32 = 1;

impl What {
    /// The command.
    fn command(self) -> u8 {
        match self {
            Self::Queues => 10,
            Self::Napis => 11,
            Self::Stats | Self::QueueStats => 12,
        }
    }

    /// The attribute with the index of the interface.
    fn interface(self) -> u16 {
        match self {
            Self::Queues => 2,
            Self::Napis | Self::Stats | Self::QueueStats => 1,
        }
    }

    /// The attributes of an answer, as the kernel's specification of the family calls them.
    fn attributes(self) -> &'static [(u16, &'static str)] {
        match self {
            Self::Queues => &[(1, "id"), (2, "ifindex"), (3, "type"), (4, "napi-id")],
            Self::Napis => &[(1, "ifindex"), (2, "id"), (3, "irq"), (4, "pid")],
            Self::Stats | Self::QueueStats => &[
                (1, "ifindex"),
                (2, "queue-type"),
                (3, "queue-id"),
                (8, "rx-packets"),
                (9, "rx-bytes"),
                (10, "tx-packets"),
                (11, "tx-bytes"),
                (12, "rx-alloc-fail"),
                (29, "tx-stop"),
                (30, "tx-wake"),
            ],
        }
    }
}

/// Size of the header of a message, of the one of a generic message after it, and of an attribute.
const HEADER: usize = 16;
const GENERIC: usize = 4;
const ATTRIBUTE: usize = 4;
/// The bits of an attribute's type that are flags.
const ATTRIBUTE_FLAGS: u16 = 0xc000;

/// The family that knows the numbers of the others: its number, the request, the attributes.
const CONTROL: u16 = 16;
const CONTROL_VERSION: u8 = 1;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;

/// Asks, and returns what the kernel answers.
pub fn ask(options: &Options) -> Result<Vec<Object>, Box<dyn Error>> {
    let index = nix::net::if_::if_nametoindex(options.interface.as_str())
        .map_err(|error| format!("{}: {error}", options.interface))?;
    let what = options.what;
    let socket = Socket::new()?;

    let name = attribute(FAMILY_NAME, b"netdev\0");
    let mut family = None;
    socket.ask(
        CONTROL,
        GET_FAMILY,
        CONTROL_VERSION,
        libc::NLM_F_ACK,
        &name,
        |number, value| {
            if number == FAMILY_ID {
                family = value.try_into().ok().map(u16::from_ne_bytes);
            }
            Ok(())
        },
        || (),
    )?;
    let family = family.ok_or("the kernel does not tell the number of the family netdev")?;

    let mut request = attribute(what.interface(), &index.to_ne_bytes());
    if what == What::QueueStats {
        request.extend(attribute(QSTATS_SCOPE, &SCOPE_QUEUE.to_ne_bytes()));
    }
    let object = RefCell::new(Object::new());
    let mut objects = Vec::new();
    socket.ask(
        family,
        what.command(),
        VERSION,
        libc::NLM_F_DUMP,
        &request,
        |number, value| {
            let known = what.attributes().iter().find(|(known, _)| *known == number);
            if let Some((_, name)) = known {
                let value = number_in(value)?;
                object.borrow_mut().insert((*name).to_owned(), value);
            }
            Ok(())
        },
        || objects.push(object.take()),
    )?;
    Ok(objects)
}

/// A netlink socket for generic families.
struct Socket(OwnedFd);

impl Socket {
    fn new() -> Result<Self, Box<dyn Error>> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkGeneric,
        )?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        setsockopt(&socket, ReceiveTimeout, &TimeVal::new(5, 0))?;
        Ok(Self(socket))
    }

    /// Sends a request, and takes the answers until the kernel says that they are all. Each
    /// attribute is given to `attribute`; `end` is called after each message.
    #[allow(clippy::too_many_arguments)]
    fn ask(
        &self,
        family: u16,
        command: u8,
        version: u8,
        flags: c_int,
        attributes: &[u8],
        mut attribute: impl FnMut(u16, &[u8]) -> Result<(), String>,
        mut end: impl FnMut(),
    ) -> Result<(), Box<dyn Error>> {
        let len = u32::try_from(HEADER + GENERIC + attributes.len())?;
        let flags = u16::try_from(flags | libc::NLM_F_REQUEST)?;
        let mut request = Vec::new();
        request.extend(len.to_ne_bytes());
        request.extend(family.to_ne_bytes());
        request.extend(flags.to_ne_bytes());
        // Sequence number and port: one request is under way at a time.
        request.extend([0; 8]);
        request.extend([command, version, 0, 0]);
        request.extend(attributes);
        send(self.0.as_raw_fd(), &request, MsgFlags::empty())?;

        let mut buffer = vec![0; 64 << 10];
        loop {
            let len = recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            let mut rest = &buffer[..len];
            while !rest.is_empty() {
                let (kind, message) = next(&mut rest, HEADER, |header| {
                    let len = u32::from_ne_bytes(header[..4].try_into().ok()?);
                    let kind = u16::from_ne_bytes(header[4..6].try_into().ok()?);
                    Some((usize::try_from(len).ok()?, kind))
                })?;
                // Both begin with an error number, 0 for none.
                if kind == libc::NLMSG_DONE as u16 || kind == libc::NLMSG_ERROR as u16 {
                    let error = message.first_chunk().ok_or("a message is too short")?;
                    return match i32::from_ne_bytes(*error) {
                        0 => Ok(()),
                        error => Err(Errno::from_raw(-error).into()),
                    };
                }
                if kind != family {
                    continue;
                }
                let mut list = message.get(GENERIC..).ok_or("a message is too short")?;
                while !list.is_empty() {
                    let (number, value) = next(&mut list, ATTRIBUTE, |header| {
                        let len = u16::from_ne_bytes(header[..2].try_into().ok()?);
                        let kind = u16::from_ne_bytes(header[2..4].try_into().ok()?);
                        Some((len.into(), kind & !ATTRIBUTE_FLAGS))
                    })?;
                    attribute(number, value)?;
                }
                end();
            }
        }
    }
}

/// Takes a message or an attribute off `rest`: its kind and what comes after its header, from which
/// `read` tells its length and kind. What follows begins at a multiple of 4 bytes.
fn next<'a>(
    rest: &mut &'a [u8],
    header: usize,
    read: impl FnOnce(&[u8]) -> Option<(usize, u16)>,
) -> Result<(u16, &'a [u8]), String> {
    let bytes = *rest;
    let (len, kind) = bytes
        .get(..header)
        .and_then(read)
        .ok_or("an answer is too short")?;
    let value = bytes
        .get(header..len)
        .ok_or_else(|| format!("an answer tells of {len} bytes and has {}", bytes.len()))?;
    *rest = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    Ok((kind, value))
}

/// An attribute of a request.
fn attribute(number: u16, value: &[u8]) -> Vec<u8> {
    let len = ATTRIBUTE + value.len();
    let mut bytes = Vec::from((len as u16).to_ne_bytes());
    bytes.extend(number.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(len.next_multiple_of(4), 0);
    bytes
}

/// A number of 32 or 64 bits.
fn number_in(bytes: &[u8]) -> Result<u64, String> {
    if let Ok(bytes) = bytes.try_into() {
        return Ok(u32::from_ne_bytes(bytes).into());
    }
    let bytes = bytes
        .try_into()
        .map_err(|_| format!("a number of {} bytes", bytes.len()))?;
    Ok(u64::from_ne_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(header: &[u8]) -> Option<(usize, u16)> {
        Some((header[0].into(), header[2].into()))
    }

    #[test]
    fn attributes_are_taken_one_by_one() {
        let bytes = [attribute(7, b"abcde"), attribute(9, &[1, 0, 0, 0])].concat();
        let mut rest = &bytes[..];
        assert_eq!(next(&mut rest, ATTRIBUTE, header), Ok((7, &b"abcde"[..])));
        assert_eq!(
            next(&mut rest, ATTRIBUTE, header),
            Ok((9, &[1, 0, 0, 0][..]))
        );
        assert!(rest.is_empty());
    }

    #[test]
    fn short_answers_are_refused() {
        // Less than a header, less than the length, a length less than the header.
        for bytes in [&[4, 0][..], &[8, 0, 1, 0, 5], &[3, 0, 1, 0]] {
            assert!(
                next(&mut &bytes[..], ATTRIBUTE, header).is_err(),
                "{bytes:?}"
            );
        }
    }

    #[test]
    fn numbers_have_two_sizes() {
        assert_eq!(number_in(&7u32.to_ne_bytes()), Ok(7));
        assert_eq!(number_in(&(1u64 << 40).to_ne_bytes()), Ok(1 << 40));
        assert!(number_in(&[0; 2]).is_err());
    }
}
