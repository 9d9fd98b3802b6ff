// SPDX-License-Identifier: GPL-2.0
//! A packet socket bound to one interface and one EtherType.
#![allow(unsafe_code)]

use std::fs;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::net::if_::if_nametoindex;
use nix::sys::socket::{recv, setsockopt, sockopt, MsgFlags};
use nix::sys::time::TimeVal;

/// A hardware address.
pub type Mac = [u8; 6];

/// The EtherType for local experiments (IEEE 802).
pub const ETHERTYPE: u16 = 0x88b5;

/// Enough for the frames of a whole window while the reader is not scheduled.
const RECEIVE_BUFFER: usize = 8 << 20;

/// A raw packet socket.
pub struct Socket(OwnedFd);

impl Socket {
    /// Opens a socket on `interface` which gets the frames of [`ETHERTYPE`].
    pub fn open(interface: &str) -> io::Result<Self> {
        Self::with_type(interface, ETHERTYPE)
    }

    /// Opens a socket on `interface` which only sends, frames of any EtherType.
    pub fn sender(interface: &str) -> io::Result<Self> {
        Self::with_type(interface, 0)
    }

    fn with_type(interface: &str, ethertype: u16) -> io::Result<Self> {
        let index = if_nametoindex(interface)?;
        let protocol = ethertype.to_be();
        // SAFETY: the call takes no pointer.
        let fd = unsafe {
            libc::socket(
                libc::AF_PACKET,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC,
                i32::from(protocol),
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just returned by socket() and belongs to nobody else.
        let socket = Self(unsafe { OwnedFd::from_raw_fd(fd) });
        setsockopt(&socket.0, sockopt::RcvBufForce, &RECEIVE_BUFFER)?;
        let address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: protocol,
            sll_ifindex: index as i32,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        // SAFETY: `address` is a valid sockaddr_ll of the length given and outlives the call.
        let bound = unsafe {
            libc::bind(
                socket.0.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as u32,
            )
        };
        if bound < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(socket)
    }

    /// Takes only frames whose hash is this one, as their driver has noted it.
    pub fn only_with_hash(&self, hash: u32) -> io::Result<()> {
        let instruction = |code: u32, jf: u8, k: u32| libc::sock_filter {
            code: code as u16,
            jt: 0,
            jf,
            k,
        };
        let ancillary = (libc::SKF_AD_OFF + libc::SKF_AD_RXHASH) as u32;
        let mut program = [
            instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, ancillary),
            instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, hash),
            instruction(libc::BPF_RET | libc::BPF_K, 0, u32::MAX),
            instruction(libc::BPF_RET | libc::BPF_K, 0, 0),
        ];
        let filter = libc::sock_fprog {
            len: program.len() as u16,
            filter: program.as_mut_ptr(),
        };
        // SAFETY: `filter` is a valid sock_fprog of the length given; it and the program it points
        // to outlive the call, which only reads them.
        let attached = unsafe {
            libc::setsockopt(
                self.0.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ATTACH_FILTER,
                (&raw const filter).cast(),
                size_of::<libc::sock_fprog>() as u32,
            )
        };
        match attached {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Sends one whole frame.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        loop {
            match nix::unistd::write(&self.0, frame) {
                Ok(_) => return Ok(()),
                // A full device queue is no failure of the test.
                Err(nix::Error::ENOBUFS | nix::Error::EAGAIN) => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Takes one frame, or `None` when none came within `timeout`.
    pub fn receive(&self, buffer: &mut [u8], timeout: Duration) -> io::Result<Option<usize>> {
        let flags = if timeout.is_zero() {
            MsgFlags::MSG_DONTWAIT
        } else {
            self.set_timeout(timeout)?;
            MsgFlags::empty()
        };
        match recv(self.0.as_raw_fd(), buffer, flags) {
            Ok(count) => Ok(Some(count)),
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        let value = TimeVal::new(
            timeout.as_secs().try_into().unwrap_or(i64::MAX),
            // Zero would mean to wait for ever.
            timeout.subsec_micros().max(1).into(),
        );
        setsockopt(&self.0, sockopt::ReceiveTimeout, &value)?;
        Ok(())
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The hardware address of `interface`.
pub fn address_of(interface: &str) -> io::Result<Mac> {
    let text = fs::read_to_string(format!("/sys/class/net/{interface}/address"));
    // A foreign network namespace's interfaces are not in this mount's sysfs.
    match text {
        Ok(text) => parse_mac(text.trim()),
        Err(_) => from_list(interface),
    }
}

fn from_list(interface: &str) -> io::Result<Mac> {
    nix::ifaddrs::getifaddrs()?
        .filter(|entry| entry.interface_name == interface)
        .find_map(|entry| entry.address?.as_link_addr()?.addr())
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("no interface {interface}")))
}

/// Reads `aa:bb:cc:dd:ee:ff`.
pub fn parse_mac(text: &str) -> io::Result<Mac> {
    let mut mac = Mac::default();
    let mut parts = text.split(':');
    for byte in &mut mac {
        *byte = parts
            .next()
            .and_then(|part| u8::from_str_radix(part, 16).ok())
            .ok_or_else(|| bad_mac(text))?;
    }
    match parts.next() {
        None => Ok(mac),
        Some(_) => Err(bad_mac(text)),
    }
}

/// Reads a frame as hexadecimal digits.
pub fn parse_frame(text: &str) -> io::Result<Vec<u8>> {
    let digits: Option<Vec<u32>> = text.chars().map(|digit| digit.to_digit(16)).collect();
    match digits {
        Some(digits) if digits.len() % 2 == 0 => Ok(digits
            .chunks_exact(2)
            .map(|pair| ((pair[0] << 4) | pair[1]) as u8)
            .collect()),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "a frame is an even number of hexadecimal digits",
        )),
    }
}

fn bad_mac(text: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        format!("'{text}' is no hardware address"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_as_digits() {
        assert_eq!(parse_frame("00aF").ok(), Some(vec![0, 0xaf]));
        assert!(parse_frame("00a").is_err());
        assert!(parse_frame("0x").is_err());
    }

    #[test]
    fn hardware_addresses() {
        assert_eq!(
            parse_mac("60:45:bd:e9:60:a3").ok(),
            Some([0x60, 0x45, 0xbd, 0xe9, 0x60, 0xa3])
        );
        for bad in [
            "",
            "60:45:bd:e9:60",
            "60:45:bd:e9:60:a3:00",
            "60:45:bd:e9:60:zz",
        ] {
            assert!(parse_mac(bad).is_err());
        }
    }
}
