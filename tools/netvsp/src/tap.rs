// SPDX-License-Identifier: GPL-2.0

//! The uplink of a switch port: a tap device, or anything else that carries one frame with a
//! [`VnetHeader`] per read and write.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::thread;

use crate::frame::VnetHeader;

const TUNSETIFF: u64 = 0x4004_54ca;
const TUNSETOFFLOAD: u64 = 0x4004_54d0;
const TUNSETVNETHDRSZ: u64 = 0x4004_54d8;

const IFF_TAP: i16 = 0x0002;
const IFF_NO_PI: i16 = 0x1000;
const IFF_VNET_HDR: i16 = 0x4000;

/// What the tap may hand over unfinished: checksums and TCP segmentation of both kinds, with
/// congestion marks.
const TUN_F_CSUM: u64 = 0x01;
const TUN_F_TSO4: u64 = 0x02;
const TUN_F_TSO6: u64 = 0x04;
const TUN_F_TSO_ECN: u64 = 0x08;

/// Why a tap could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name does not fit an interface name.
    #[error("{0:?} is no valid interface name")]
    Name(String),
    /// The network namespace could not be entered.
    #[error("network namespace {0}: {1}")]
    Namespace(String, io::Error),
    /// The tap driver could not be opened.
    #[error("/dev/net/tun: {0} (is the tun module loaded?)")]
    Device(io::Error),
    /// The tap driver refused a request.
    #[error("tap {0}: {1}: {2}")]
    Request(String, &'static str, io::Error),
}

/// A frame source and sink.
#[derive(Debug)]
pub struct Uplink(File);

impl Uplink {
    /// Makes the tap `name`, in the network namespace of the given path (as in `/run/netns`) or
    /// in the caller's. It exists as long as the result does.
    pub fn tap(name: &str, namespace: Option<&Path>) -> Result<Self, TapError> {
        if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains(['/', '\0']) {
            return Err(TapError::Name(name.to_owned()));
        }
        let Some(path) = namespace else {
            return open_tap(name);
        };
        let failed = |error| TapError::Namespace(path.display().to_string(), error);
        let namespace = File::open(path).map_err(failed)?;
        // Entering a namespace is for a thread, so one is made for it.
        thread::scope(|scope| {
            let opener = scope.spawn(|| {
                enter_network_namespace(&namespace).map_err(failed)?;
                open_tap(name)
            });
            opener
                .join()
                .unwrap_or_else(|_| Err(failed(io::Error::other("thread panicked"))))
        })
    }

    /// Takes a descriptor that carries one frame with header per read and write, such as a
    /// sequenced packet socket. It must not block.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(File::from(fd))
    }

    /// Receives a frame into `buffer`. `None` if there is none now.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<(VnetHeader, usize)>> {
        let length = match (&self.0).read(buffer) {
            Ok(length) => length,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                return Ok(None)
            }
            Err(error) => return Err(error),
        };
        let Some((header, _)) = buffer[..length].split_first_chunk::<{ VnetHeader::SIZE }>() else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        Ok(Some((VnetHeader::from_bytes(*header), length)))
    }

    /// Sends a frame given in parts.
    pub fn send(&self, header: VnetHeader, parts: &[&[u8]]) -> io::Result<()> {
        let header = header.to_bytes();
        let mut slices = [IoSlice::new(&[]); 4];
        slices[0] = IoSlice::new(&header);
        for (slice, part) in slices[1..].iter_mut().zip(parts) {
            *slice = IoSlice::new(part);
        }
        let length: usize = slices.iter().map(|slice| slice.len()).sum();
        // One write is one frame.
        if (&self.0).write_vectored(&slices[..=parts.len()])? < length {
            return Err(io::ErrorKind::WriteZero.into());
        }
        Ok(())
    }
}

impl AsRawFd for Uplink {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

fn open_tap(name: &str) -> Result<Uplink, TapError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .map_err(TapError::Device)?;
    set_up_tap(&file, name)
        .map_err(|(what, error)| TapError::Request(name.to_owned(), what, error))?;
    Ok(Uplink(file))
}

#[expect(unsafe_code, reason = "system call")]
fn enter_network_namespace(namespace: &File) -> io::Result<()> {
    // SAFETY: setns takes integers only; the descriptor is open.
    match unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[expect(unsafe_code, reason = "system calls")]
fn set_up_tap(file: &File, name: &str) -> Result<(), (&'static str, io::Error)> {
    /// The part of `struct ifreq` that the driver looks at, in its full length.
    #[repr(C)]
    struct Request {
        name: [u8; libc::IFNAMSIZ],
        flags: i16,
        rest: [u8; 22],
    }

    let check = |what, result| match result {
        -1 => Err((what, io::Error::last_os_error())),
        _ => Ok(()),
    };
    let mut request = Request {
        name: [0; libc::IFNAMSIZ],
        flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR,
        rest: [0; 22],
    };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    let fd = file.as_raw_fd();
    // SAFETY: the request is as long as `struct ifreq` and outlives the call.
    let result = unsafe { libc::ioctl(fd, TUNSETIFF as _, &mut request) };
    check("creating it", result)?;

    let size = VnetHeader::SIZE as libc::c_int;
    // SAFETY: the driver reads one integer, which outlives the call.
    let result = unsafe { libc::ioctl(fd, TUNSETVNETHDRSZ as _, &size) };
    check("setting its header size", result)?;

    let offloads = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
    // SAFETY: this request takes its argument by value.
    let result = unsafe { libc::ioctl(fd, TUNSETOFFLOAD as _, offloads) };
    check("setting its offloads", result)
}
