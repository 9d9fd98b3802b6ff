// SPDX-License-Identifier: GPL-2.0
//! A given number of small UDP packets, as fast as the receiver's host takes them.

use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use serde::{Deserialize, Serialize};

use crate::packet::{address_of, parse_mac, Socket};

/// Options of the flood.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// The interface to send from
    #[arg(long)]
    pub interface: String,
    /// The receiver's hardware address
    #[arg(long)]
    pub destination: String,
    /// The address in the packets' IPv4 header
    #[arg(long)]
    pub to: Ipv4Addr,
    /// The source address there
    #[arg(long)]
    pub from: Ipv4Addr,
    /// Packets
    #[arg(long)]
    pub count: u64,
    /// Bytes of each, with its Ethernet header and check sequence
    #[arg(long, default_value_t = 64)]
    pub size: usize,
    /// Connections: as many source ports in turn
    #[arg(long, default_value_t = 1)]
    pub flows: u16,
    /// Packets sent at a time
    #[arg(long, default_value_t = 64)]
    pub burst: u64,
    /// Microseconds between two bursts
    #[arg(long, default_value_t = 1000)]
    pub pause_us: u64,
    /// Wait for a datagram on this UDP port first
    #[arg(long, value_name = "PORT")]
    pub wait_on: Option<u16>,
}

/// What was sent.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Report {
    /// Packets.
    pub sent: u64,
    /// From the first to the last.
    pub nanoseconds: u64,
}

/// Headers before the payload: Ethernet, IPv4, UDP.
const HEADERS: usize = 14 + 20 + 8;
/// The frame check sequence, which is the network card's business.
const CHECK: usize = 4;
const FIRST_PORT: u16 = 20000;
/// The port that the packets are sent to (RFC 863).
const DISCARD: u16 = 9;

/// Sends.
pub fn flood(options: &Options) -> io::Result<Report> {
    let socket = Socket::open(&options.interface)?;
    let mut frame = frame(options)?;
    let flows = options.flows.max(1);
    if let Some(port) = options.wait_on {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port))?;
        // The one who starts this waits for the word.
        eprintln!("ready");
        socket.recv_from(&mut [0])?;
    }
    let start = Instant::now();
    for sent in 0..options.count {
        if sent != 0 && sent % options.burst.max(1) == 0 {
            thread::sleep(Duration::from_micros(options.pause_us));
        }
        let port = FIRST_PORT + (sent % u64::from(flows)) as u16;
        frame[34..36].copy_from_slice(&port.to_be_bytes());
        socket.send(&frame)?;
    }
    Ok(Report {
        sent: options.count,
        nanoseconds: start.elapsed().as_nanos() as u64,
    })
}

/// The frame without its source port.
fn frame(options: &Options) -> io::Result<Vec<u8>> {
    let len = options.size.saturating_sub(CHECK).clamp(HEADERS, 1514);
    let mut frame = vec![0; len];
    frame[..6].copy_from_slice(&parse_mac(&options.destination)?);
    frame[6..12].copy_from_slice(&address_of(&options.interface)?);
    frame[12..14].copy_from_slice(&[0x08, 0x00]);
    let ip = &mut frame[14..34];
    ip[..2].copy_from_slice(&[0x45, 0]);
    ip[2..4].copy_from_slice(&((len - 14) as u16).to_be_bytes());
    // Time to live, and UDP.
    ip[8..10].copy_from_slice(&[64, 17]);
    ip[12..16].copy_from_slice(&options.from.octets());
    ip[16..20].copy_from_slice(&options.to.octets());
    let sum = checksum(ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let udp = &mut frame[34..];
    udp[2..4].copy_from_slice(&DISCARD.to_be_bytes());
    // No checksum: it would be another one for each source port.
    udp[4..6].copy_from_slice(&((len - 34) as u16).to_be_bytes());
    Ok(frame)
}

/// The Internet checksum of a header whose checksum field is zero.
fn checksum(header: &[u8]) -> u16 {
    let mut sum: u32 = header
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_that_of_the_standard() {
        // RFC 1071's example: the sum of these is ddf2.
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(checksum(&bytes), !0xddf2);
    }
}
