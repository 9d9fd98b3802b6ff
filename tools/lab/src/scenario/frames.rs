// SPDX-License-Identifier: GPL-2.0
//! Frames between hv_netvsc and its host: what goes with them, where they are, and a host that
//! is slow to take or to give them.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use hyperv_wire::rndis::{
    PacketBuilder, PacketId, PpiType, RxChecksum, Vlan, PACKET_HEADER_SIZE, PPI_SIZE,
};
use lab_agent::frames::{end_frame, frame, Common, ReceiveReport};
use lab_agent::packet::{parse_mac, Mac};
use lab_control::{Kind, Setting};
use zerocopy::little_endian::U16;

use super::ending::account_for;
use super::guest::{report, Boot, Guest, Nic};
use super::traffic::Link;
use super::vf::bonded;
use super::{ensure, eventually, hex, Context, Drivers, Result};

/// A hash that nothing computes by chance.
const HASH: u32 = 0x9abc_def1;

pub fn run(context: &mut Context<'_>) -> Result<()> {
    let lab = context.lab();
    let guest = context.boot(&Boot {
        cpus: 2,
        ..Boot::new(vec![Nic::new(0)])
    })?;
    let nic = guest.nics[0].clone();
    let link = Link::new(&guest, lab, &nic);
    context.check("two channels are open", || two_channels(&guest, &nic));

    context.check(
        "sent: checksum, large send, VLAN and hash are told, packet by packet",
        || told(&link),
    );
    context.check(
        "sent: a tag within a raw frame is taken out, a frame cut in its tag is vlan_error",
        || inline_tag(&link),
    );
    context.check(
        "sent: TCP over IPv4 and IPv6 by pages from all offsets within a page",
        || offsets(&link),
    );
    context.check(
        "frames of 60 to 65535 bytes arrive whole both ways with the largest MTU",
        || largest_mtu(&link),
    );
    context.check(
        "received: the host's word on checksums is taken, and not needed",
        || checksums(&link),
    );
    context.check("received: VLAN tag and hash of the host", || {
        tag_and_hash(&link)
    });
    context.check("received: packets coalesced of 2 to 562 fragments", || {
        fragments(&link)
    });
    context.check(
        "received: coalesced packets without first or last fragment are dropped",
        || broken_fragments(&link),
    );
    context.check(
        "received: lengths that are not true cost their packet only",
        || bad_lengths(&link),
    );
    match guest.drivers() {
        Drivers::Rust => {
            context.check(
                "received: malformed per-packet information costs its packet only",
                || bad_information(&link),
            );
        }
        Drivers::C => context.note(
            "the stock hv_netvsc looks at malformed per-packet information for ever: not tried with it",
        ),
    }
    context.check("packet filter: usual, promiscuous, closed", || {
        filters(&link)
    });
    context.check("another address goes to the host and to the wire", || {
        address(&link)
    });
    context.check(
        "the host's statuses 0 to 8 for sent packets: traffic goes on, no section is lost",
        || statuses(&link),
    );
    context.check(
        "sections full: tx_send_full counts, packets go by pages",
        || sections_full(&link),
    );
    context.check(
        "a host that takes nothing: the queue stops, rx_comp_busy counts, all goes on after",
        || not_taken(&link),
    );
    context.check("interface counters are those of the host", || {
        counters(&link, false)
    });
    context.check(
        "a VF that joins gets MTU, flags and multicast addresses",
        || joins(&link),
    );
    context.check("with a VF the counters of both paths are summed", || {
        counters(&link, true)
    });
    context.check(
        "no section of the receive buffer is left with the guest",
        || {
            eventually(Duration::from_secs(5), "all were given back", || {
                Ok(host_counter(&guest, "synthetic.rx_sections_held")? == 0)
            })
        },
    );
    context.finish(guest)
}

fn two_channels(guest: &Guest, nic: &Nic) -> Result<()> {
    eventually(Duration::from_secs(15), "two channels are open", || {
        Ok(guest.host.nic(nic)?.channels == 2)
    })
}

/// A counter of the first NIC at the host.
fn host_counter(guest: &Guest, name: &str) -> Result<u64> {
    let counters = guest.host.counters()?;
    let name = format!("net0.{name}");
    let value = counters.get(&name).copied();
    value.ok_or_else(|| format!("the host has no counter {name}").into())
}

/// A counter of `ethtool -S`.
fn statistic(guest: &Guest, name: &str) -> Result<u64> {
    let value = guest.statistics("eth0")?.get(name).copied();
    value.ok_or_else(|| format!("no counter {name}").into())
}

/// The frames that the guest sends while something is done, as the host logs them.
pub fn frames_logged(link: &Link<'_>, act: impl FnOnce() -> Result<()>) -> Result<Vec<String>> {
    let (host, nic) = (&link.guest.host, link.nic);
    let since = host.log_end()?;
    host.set(nic, Setting::LogFrames, Some(1))?;
    let done = act();
    host.set(nic, Setting::LogFrames, None)?;
    done?;
    let mut lines = host.log_since(since)?;
    lines.retain(|line| line.contains(" FRAME "));
    Ok(lines)
}

/// At least one of the lines has all the words.
pub fn has(lines: &[String], words: &[&str]) -> Result<()> {
    let found = lines
        .iter()
        .any(|line| words.iter().all(|word| line.contains(word)));
    ensure(found, || {
        let some: Vec<_> = lines.iter().take(20).map(String::as_str).collect();
        format!(
            "no frame with {words:?} among {}\n{}",
            lines.len(),
            some.join("\n")
        )
    })
}

/// A VLAN sub-interface, without anything at the peer.
fn with_vlan(guest: &Guest, act: impl FnOnce() -> Result<()>) -> Result<()> {
    guest.sh(
        "ip link add link eth0 name eth0.100 type vlan id 100 egress-qos-map 0:5 && \
         ip link set eth0.100 up && ip address add 10.100.0.2/24 dev eth0.100",
    )?;
    let done = act();
    guest.sh("ip link del eth0.100")?;
    done
}

fn told(link: &Link<'_>) -> Result<()> {
    let (guest, nic) = (link.guest, link.nic);
    let (v4, v6) = (nic.peer_v4(), nic.peer_v6());
    let receivers = [format!("{v4}:7021"), format!("[{v6}]:7022")];
    let mut tools = Vec::new();
    for to in &receivers {
        tools.push(guest.peer_tool(link.lab, nic, &format!("tcp-receive --bind {to}"))?);
    }
    let lines = frames_logged(link, || {
        guest.sh(&format!("ping -q -c 1 -W 5 {v4}"))?;
        guest.sh(&format!(
            "bash -c 'for p in 6001 6002 6003 6004; do echo x >/dev/udp/{v4}/$p; echo x >/dev/udp/{v6}/$p; done'"
        ))?;
        for to in &receivers {
            guest.sh(&format!(
                "lab-agent tcp-send --rate 800000 --duration 1 --to {to}"
            ))?;
        }
        with_vlan(guest, || {
            // Nobody answers to a request for an address, which has the tag as well.
            guest.exit("ping -q -c 1 -W 1 10.100.0.1", Duration::from_secs(20))?;
            Ok(())
        })
    })?;
    for tool in tools {
        let received: lab_agent::tcp::Report = tool.report(Duration::from_secs(20))?;
        ensure(received.error.is_none(), || format!("{received:?}"))?;
    }
    has(&lines, &["type=0x0800", "checksum=ipv4+udp@34"])?;
    has(&lines, &["type=0x86dd", "checksum=ipv6+udp@54"])?;
    has(&lines, &["type=0x0800", "checksum=ipv4+tcp@34"])?;
    has(&lines, &["type=0x86dd", "checksum=ipv6+tcp@54"])?;
    has(&lines, &["type=0x0800", "lso=1448v4@34"])?;
    has(&lines, &["type=0x86dd", "lso=1428v6@54"])?;
    has(&lines, &["type=0x0806", "tci=0xa064"])?;
    has(&lines, &["type=0x0800", "hash=0x"])?;
    // Echo requests have no checksum that a host computes.
    let icmp = lines
        .iter()
        .any(|line| line.contains("length=98 ") && !line.contains("checksum="));
    ensure(icmp, || "no plain frame of 98 bytes".into())
}

fn inline_tag(link: &Link<'_>) -> Result<()> {
    let guest = link.guest;
    let peer = parse_mac(&link.peer_mac()?)?;
    let own = parse_mac(&link.nic.mac())?;
    let mut frame = [&peer[..], &own, &[0x81, 0, 0x60, 0x2a, 0x88, 0xb6]].concat();
    frame.resize(100, 0x5a);
    let lines = frames_logged(link, || {
        guest
            .sh(&format!(
                "lab-agent frame-send --interface eth0 {}",
                hex(&frame)
            ))
            .map(drop)
    })?;
    has(&lines, &["length=96 ", "type=0x88b6", "tci=0x602a"])?;
    let before = statistic(guest, "vlan_error")?;
    guest.sh(&format!(
        "lab-agent frame-send --interface eth0 {}",
        hex(&frame[..16])
    ))?;
    let after = statistic(guest, "vlan_error")?;
    ensure(after == before + 1, || {
        format!("vlan_error was {before}, is {after}")
    })?;
    link.pings()
}

fn offsets(link: &Link<'_>) -> Result<()> {
    let (guest, nic) = (link.guest, link.nic);
    let before = host_counter(guest, "synthetic.tx_in_pages")?;
    let split = host_counter(guest, "synthetic.tx_split_headers")?;
    for to in [
        format!("{}:7023", nic.peer_v4()),
        format!("[{}]:7024", nic.peer_v6()),
    ] {
        let receiver = guest.peer_tool(link.lab, nic, &format!("tcp-receive --bind {to}"))?;
        let command = format!("lab-agent tcp-send --offsets --to {to}");
        let sent = guest.sh_within(&command, Duration::from_secs(120))?;
        let sent: lab_agent::tcp::Report = report(&command, &sent)?;
        let received: lab_agent::tcp::Report = receiver.report(Duration::from_secs(40))?;
        let whole = received.error.is_none() && received.bytes == sent.bytes && sent.bytes > 0;
        ensure(whole, || format!("sent: {sent:?}\nreceived: {received:?}"))?;
    }
    let pages = host_counter(guest, "synthetic.tx_in_pages")? - before;
    let split = host_counter(guest, "synthetic.tx_split_headers")? - split;
    ensure(pages > 100, || {
        format!("only {pages} packets came by pages, {split} with their header in two")
    })
}

fn largest_mtu(link: &Link<'_>) -> Result<()> {
    let guest = link.guest;
    let set = |mtu: u32| -> Result<()> {
        guest.peer(link.lab, link.nic, &format!("ip link set peer mtu {mtu}"))?;
        guest.sh(&format!("ip link set eth0 mtu {mtu}"))?;
        guest.wait_until(
            &format!("ping -q -c 1 -W 1 {}", link.nic.peer_v4()),
            Duration::from_secs(10),
        )
    };
    set(65_521)?;
    link.frames_out(300, 65_535)?;
    link.frames_in(300, 65_535)?;
    set(1500)?;
    two_channels(guest, link.nic)
}

/// An RNDIS packet message.
fn message(ppis: &[(PpiType, u32)], frame: &[u8]) -> Result<Vec<u8>> {
    fragment(ppis, None, frame)
}

fn fragment(ppis: &[(PpiType, u32)], id: Option<PacketId>, data: &[u8]) -> Result<Vec<u8>> {
    let mut header = [0; PACKET_HEADER_SIZE + 6 * PPI_SIZE];
    let failed = |error| format!("{error:?}");
    let mut builder = PacketBuilder::new(&mut header).map_err(failed)?;
    for &(ppi_type, value) in ppis {
        builder.ppi(ppi_type, value).map_err(failed)?;
    }
    if let Some(id) = id {
        builder.packet_id(id).map_err(failed)?;
    }
    let length = builder.finish(data.len() as u32, 0).map_err(failed)?;
    Ok([&header[..length], data].concat())
}

/// The messages of a packet coalesced of some fragments.
fn coalesced(frame: &[u8], count: usize, number: u16) -> Result<Vec<Vec<u8>>> {
    let size = frame.len().div_ceil(count);
    let at = |index: usize| (index * size).min(frame.len());
    (0..count)
        .map(|index| {
            let first = if index == 0 { PacketId::FIRST } else { 0 };
            let last = if index + 1 == count {
                PacketId::LAST
            } else {
                0
            };
            let id = PacketId {
                version: PacketId::VERSION,
                flags: PacketId::SUBALLOCATION | first | last,
                packet_id: U16::new(number),
            };
            fragment(&[], Some(id), &frame[at(index)..at(index + 1)])
        })
        .collect()
}

/// A receiver in the guest, and the frames that it waits for.
struct Crafted<'a> {
    link: &'a Link<'a>,
    interface: &'a str,
    size: usize,
    count: u32,
    hash: Option<u32>,
}

impl Crafted<'_> {
    /// Sends packets of messages that are made of the frames, and what ends them.
    fn receive(
        &self,
        ppis: &[(PpiType, u32)],
        mut make: impl FnMut(u32, &[u8]) -> Result<Vec<Vec<u8>>>,
    ) -> Result<ReceiveReport> {
        let (guest, nic) = (self.link.guest, self.link.nic);
        let common = Common {
            interface: self.interface.to_owned(),
            seed: 5,
            smallest: self.size,
            largest: self.size,
            count: self.count,
        };
        let hash = self.hash.map(|hash| format!(" --hash {hash}"));
        let command = format!(
            "lab-agent frames-receive --idle 5 --interface {} --seed {} --smallest {size} --largest {size} --count {}{}",
            common.interface,
            common.seed,
            common.count,
            hash.unwrap_or_default(),
            size = self.size,
        );
        let receiver = guest.start(&command, Duration::from_secs(60))?;
        guest.wait_until("grep -q ' 88b5 ' /proc/net/packet", Duration::from_secs(10))?;
        let (to, from): (Mac, Mac) = (parse_mac(&nic.mac())?, parse_mac(&self.link.peer_mac()?)?);
        for sequence in 0..common.count {
            let messages = make(sequence, &frame(&common, sequence, to, from))?;
            if !messages.is_empty() {
                guest.host.send(nic, Kind::Rndis, &messages, 1)?;
            }
        }
        let end = message(ppis, &end_frame(&common, to, from))?;
        guest.host.send(nic, Kind::Rndis, &[end], 1)?;
        let exit = receiver.wait()?;
        report(&command, &format!("{}{}", exit.stdout, exit.stderr))
    }
}

fn arrived(report: &ReceiveReport, received: u32, lost: u32) -> Result<()> {
    let good = report.received == received
        && report.lost == lost
        && report.corrupted == 0
        && report.duplicated == 0;
    ensure(good, || format!("{report:?}"))
}

/// A UDP datagram to a port where nobody listens.
fn datagram(link: &Link<'_>, good_ip: bool, good_udp: bool) -> Result<Vec<u8>> {
    let (to, from) = (parse_mac(&link.nic.mac())?, parse_mac(&link.peer_mac()?)?);
    let index = link.nic.index as u8;
    let (source, destination) = ([10, 0, index, 1], [10, 0, index, 2]);
    let sum = |words: &[u8]| {
        let sum: u32 = words
            .chunks(2)
            .map(|pair| {
                u32::from(u16::from_be_bytes([
                    pair[0],
                    pair.get(1).copied().unwrap_or(0),
                ]))
            })
            .sum();
        let folded = (sum & 0xffff) + (sum >> 16);
        !((folded & 0xffff) + (folded >> 16)) as u16
    };
    let payload = [0x42; 30];
    let length = (8 + payload.len()) as u16;
    let ports = [&6999u16.to_be_bytes()[..], &6998u16.to_be_bytes()].concat();
    let mut udp = [&ports[..], &length.to_be_bytes(), &[0, 0], &payload].concat();
    let pseudo = [&source[..], &destination, &[0, 17], &length.to_be_bytes()].concat();
    let mut checksum = sum(&[&pseudo[..], &udp].concat());
    if !good_udp {
        checksum ^= 0x5555;
    }
    udp[6..8].copy_from_slice(&checksum.to_be_bytes());
    let total = 20 + length;
    let mut ip = [
        &[0x45, 0][..],
        &total.to_be_bytes(),
        &[0, 1, 0, 0, 64, 17, 0, 0],
        &source,
        &destination,
    ]
    .concat();
    let mut checksum = sum(&ip);
    if !good_ip {
        checksum ^= 0x5555;
    }
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    Ok([&to[..], &from, &[8, 0], &ip, &udp].concat())
}

/// Datagrams without listener, and those with a wrong checksum.
fn udp_counts(guest: &Guest) -> Result<[u64; 3]> {
    let text = guest.sh("cat /proc/net/snmp")?;
    let value = |protocol: &str, name: &str| -> Option<u64> {
        let mut lines = text.lines().filter(|line| line.starts_with(protocol));
        let place = lines.next()?.split(' ').position(|word| word == name)?;
        lines.next()?.split(' ').nth(place)?.parse().ok()
    };
    let all = [
        value("Udp:", "NoPorts"),
        value("Udp:", "InCsumErrors"),
        value("Ip:", "InHdrErrors"),
    ];
    match all {
        [Some(a), Some(b), Some(c)] => Ok([a, b, c]),
        _ => Err(text.into()),
    }
}

fn checksums(link: &Link<'_>) -> Result<()> {
    let guest = link.guest;
    let (right, wrong) = (RxChecksum::UDP_SUCCEEDED, RxChecksum::UDP_FAILED);
    let mend = RxChecksum::IP_SUCCEEDED | RxChecksum::IP_VALUE_INVALID | right;
    // The host's word, whether the sums of IP and UDP are right; what the guest is to count.
    let cases = [
        (None, true, true, [1, 0, 0]),
        (None, true, false, [0, 1, 0]),
        (Some(right), true, false, [1, 0, 0]),
        (Some(wrong), true, true, [1, 0, 0]),
        (Some(wrong), true, false, [0, 1, 0]),
        (Some(mend), false, true, [1, 0, 0]),
        (Some(right), false, true, [0, 0, 1]),
    ];
    for (word, good_ip, good_udp, expected) in cases {
        let ppis: Vec<_> = word
            .into_iter()
            .map(|word| (PpiType::CHECKSUM, word))
            .collect();
        let packet = message(&ppis, &datagram(link, good_ip, good_udp)?)?;
        let before = udp_counts(guest)?;
        guest.host.send(link.nic, Kind::Rndis, &[packet], 5)?;
        let mut grown = [0; 3];
        eventually(Duration::from_secs(5), "they are counted", || {
            let now = udp_counts(guest)?;
            grown = [0, 1, 2].map(|i| now[i] - before[i]);
            Ok(grown.iter().sum::<u64>() >= 5)
        })?;
        ensure(grown == expected.map(|count| count * 5), || {
            format!(
                "the host says {word:x?}, IP {good_ip}, UDP {good_udp}: \
                 NoPorts, InCsumErrors, InHdrErrors grew by {grown:?}"
            )
        })?;
    }
    Ok(())
}

fn tag_and_hash(link: &Link<'_>) -> Result<()> {
    let guest = link.guest;
    let ppis = [
        (PpiType::IEEE8021Q, Vlan::from_tci(100).0),
        (PpiType::HASH_VALUE, HASH),
    ];
    with_vlan(guest, || {
        let crafted = Crafted {
            link,
            interface: "eth0.100",
            size: 700,
            count: 10,
            hash: Some(HASH),
        };
        // Every other one has another hash, which the receiver does not take.
        let report = crafted.receive(&ppis, |sequence, frame| {
            let ppis = [ppis[0], (PpiType::HASH_VALUE, HASH ^ (sequence & 1))];
            Ok(vec![message(&ppis, frame)?])
        })?;
        arrived(&report, 5, 5)
    })
}

fn fragments(link: &Link<'_>) -> Result<()> {
    let mut crafted = Crafted {
        link,
        interface: "eth0",
        size: 3000,
        count: 3,
        hash: None,
    };
    let report = crafted.receive(&[], |sequence, frame| {
        coalesced(frame, [2, 3, 60][sequence as usize], sequence as u16)
    })?;
    arrived(&report, 3, 0)?;
    crafted.size = 50_000;
    crafted.count = 4;
    let report = crafted.receive(&[], |sequence, frame| {
        coalesced(
            frame,
            [40, 100, 300, 562][sequence as usize],
            sequence as u16,
        )
    })?;
    arrived(&report, 4, 0)
}

fn broken_fragments(link: &Link<'_>) -> Result<()> {
    let crafted = Crafted {
        link,
        interface: "eth0",
        size: 3000,
        count: 5,
        hash: None,
    };
    let report = crafted.receive(&[], |sequence, frame| {
        let mut all = coalesced(frame, 4, sequence as u16)?;
        match sequence {
            1 => drop(all.remove(0)),
            3 => drop(all.pop()),
            _ => {}
        }
        Ok(all)
    })?;
    account_for(link.guest, &["eth0: "])?;
    arrived(&report, 3, 2)?;
    link.pings()
}

/// Overwrites a 32-bit field.
fn patch(message: &mut [u8], offset: usize, value: u32) {
    message[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
}

/// Sends messages that are not to be believed; afterwards all must be as before.
fn survives(link: &Link<'_>, bad: Vec<Vec<u8>>) -> Result<()> {
    for (i, message) in bad.into_iter().enumerate() {
        link.guest.host.send(link.nic, Kind::Rndis, &[message], 2)?;
        link.guest
            .sh(&format!("ping -q -c 2 -i 0.1 -W 5 {}", link.nic.peer_v4()))
            .map_err(|error| format!("after message {i}: {error}"))?;
    }
    account_for(link.guest, &["eth0: "])?;
    Ok(())
}

fn bad_lengths(link: &Link<'_>) -> Result<()> {
    let good = message(&[(PpiType::HASH_VALUE, 1)], &datagram(link, true, true)?)?;
    // Offsets of the fields: length, offset and length of the frame and of the information.
    let cases = [
        (4, 0),
        (4, 8),
        (4, u32::MAX),
        (8, 0xffff),
        (8, u32::MAX - 7),
        (12, u32::MAX),
        (12, 0x1_0000),
        (32, 0xffff_fff0),
        (36, 0x1000),
    ];
    let mut bad: Vec<_> = cases
        .iter()
        .map(|&(offset, value)| {
            let mut message = good.clone();
            patch(&mut message, offset, value);
            message
        })
        .collect();
    // An unknown type, and one that ends within its header.
    let mut unknown = good.clone();
    patch(&mut unknown, 0, 0x77);
    bad.push(unknown);
    bad.push(good[..20].to_vec());
    survives(link, bad)
}

fn bad_information(link: &Link<'_>) -> Result<()> {
    let ppis = [(PpiType::HASH_VALUE, 1), (PpiType::CHECKSUM, 0)];
    let good = message(&ppis, &datagram(link, true, true)?)?;
    // Size, type and offset of the first element.
    let at = PACKET_HEADER_SIZE;
    let cases = [
        (at, 0),
        (at, 4),
        (at, 0x1000),
        (at, u32::MAX),
        (at + 8, 0),
        (at + 8, 100),
        (at + 8, 14),
        (at + 8, u32::MAX),
    ];
    let bad = cases.iter().map(|&(offset, value)| {
        let mut message = good.clone();
        patch(&mut message, offset, value);
        message
    });
    survives(link, bad.collect())
}

fn filters(link: &Link<'_>) -> Result<()> {
    let (guest, nic) = (link.guest, link.nic);
    let last = |since: u64, wanted: &str| -> Result<()> {
        let mut text = String::new();
        let right = eventually(Duration::from_secs(5), "the filter", || {
            let lines = guest.host.log_since(since)?;
            let line = lines.iter().rfind(|line| line.contains(" PACKET_FILTER "));
            text = line.cloned().unwrap_or_default();
            Ok(text.ends_with(&format!("filter={wanted}")))
        });
        right.map_err(|error| format!("{error} {wanted}: '{text}'").into())
    };
    for (command, wanted) in [
        ("promisc on", "0x20"),
        ("promisc off", "0xd"),
        ("allmulticast on promisc on", "0x20"),
        ("promisc off", "0xd"),
        ("down", "0x0"),
    ] {
        let since = guest.host.log_end()?;
        for word in command.split(" promisc").take(1) {
            guest.sh(&format!("ip link set eth0 {word}"))?;
        }
        if command.ends_with("on promisc on") {
            guest.sh("ip link set eth0 promisc on")?;
        }
        last(since, wanted)?;
    }
    let received = statistic(guest, "rx_queue_0_packets")?;
    let dropped = host_counter(guest, "synthetic.rx_dropped")?;
    guest.peer(
        link.lab,
        nic,
        &format!(
            "ip neigh replace {v4} lladdr {} dev peer; ping -q -c 5 -i 0.05 -W 1 {v4}; ip neigh del {v4} dev peer; true",
            nic.mac(),
            v4 = nic.guest_v4()
        ),
    )?;
    let good = statistic(guest, "rx_queue_0_packets")? == received
        && host_counter(guest, "synthetic.rx_dropped")? >= dropped + 5;
    ensure(good, || "a closed interface has received".into())?;
    let since = guest.host.log_end()?;
    guest.sh(
        "ip link set eth0 allmulticast off; ip link set eth0 up; ip -6 address add fd00:0::2/64 dev eth0 nodad",
    )?;
    last(since, "0xd")?;
    link.pings()
}

fn address(link: &Link<'_>) -> Result<()> {
    let (guest, nic) = (link.guest, link.nic);
    for address in ["60:45:bd:12:34:56".to_owned(), nic.mac()] {
        let since = guest.host.log_end()?;
        guest.sh(&format!(
            "ip link set eth0 down; ip link set eth0 address {address} && ip link set eth0 up && \
             ip -6 address add fd00:0::2/64 dev eth0 nodad"
        ))?;
        let lines = guest.host.log_since(since)?;
        let wanted = format!(" ADDRESS mac={address}");
        ensure(lines.iter().any(|line| line.ends_with(&wanted)), || {
            lines.join("\n")
        })?;
        link.ping(&nic.peer_v4(), "")?;
        let text = guest.peer(link.lab, nic, &format!("ip neigh show {}", nic.guest_v4()))?;
        ensure(text.contains(&address), || {
            format!("at the peer: {text}, not {address}")
        })?;
    }
    Ok(())
}

/// Lets the kernel's generator send frames, which may take until something else happens.
fn generate(link: &Link<'_>, count: u32) -> Result<String> {
    let (nic, mac) = (link.nic, link.peer_mac()?);
    link.guest.sh("modprobe pktgen")?;
    Ok(format!(
        "cd /proc/net/pktgen && echo rem_device_all >kpktgend_0 && echo add_device eth0 >kpktgend_0 && \
         for c in 'count {count}' 'pkt_size 200' 'delay 0' 'dst {}' 'dst_mac {mac}'; do echo \"$c\" >eth0; done && \
         echo start >pgctrl; cat eth0; echo rem_device_all >kpktgend_0",
        nic.peer_v4()
    ))
}

fn statuses(link: &Link<'_>) -> Result<()> {
    let (guest, nic) = (link.guest, link.nic);
    for status in 0..=8 {
        guest.host.set(nic, Setting::PacketStatus, Some(status))?;
        link.ping(&nic.peer_v4(), "")?;
    }
    // More than there are sections.
    guest.sh(&generate(link, 400)?)?;
    guest.host.set(nic, Setting::PacketStatus, None)?;
    let lines = account_for(guest, &["nvsp_rndis_pkt_complete error status: [0-8]$"])?;
    ensure(!lines.is_empty(), || "no word on it".into())?;
    let before = statistic(guest, "tx_send_full")?;
    let lines = frames_logged(link, || guest.sh(&generate(link, 160)?).map(drop))?;
    let in_section = lines
        .iter()
        .filter(|line| line.contains("in=section"))
        .count();
    ensure(
        in_section >= 160 && statistic(guest, "tx_send_full")? == before,
        || format!("{in_section} of {} frames were in a section", lines.len()),
    )
}

fn sections_full(link: &Link<'_>) -> Result<()> {
    let (guest, nic) = (link.guest, link.nic);
    let full = statistic(guest, "tx_send_full")?;
    let pages = host_counter(guest, "synthetic.tx_in_pages")?;
    guest.host.set(nic, Setting::HoldCompletions, Some(1))?;
    // It ends when all it has sent was completed.
    let generator = guest.start(&generate(link, 2000)?, Duration::from_secs(60))?;
    let counted = guest.wait_until(
        &format!("[ $(ethtool -S eth0 | grep -w tx_send_full: | tr -dc 0-9) -gt {full} ]"),
        Duration::from_secs(20),
    );
    guest.host.set(nic, Setting::HoldCompletions, None)?;
    let done = generator.wait()?;
    counted?;
    ensure(!done.timed_out && done.code == 0, || format!("{done:?}"))?;
    let full = statistic(guest, "tx_send_full")? - full;
    let pages = host_counter(guest, "synthetic.tx_in_pages")? - pages;
    ensure(full > 0 && pages >= full / 8, || {
        format!("tx_send_full grew by {full}, {pages} came by pages")
    })?;
    link.pings()
}

fn not_taken(link: &Link<'_>) -> Result<()> {
    const COUNT: u32 = 20_000;
    let (guest, nic) = (link.guest, link.nic);
    let names = ["stop_queue", "wake_queue", "rx_comp_busy"];
    let before = guest.statistics("eth0")?;
    let sent = host_counter(guest, "synthetic.tx_packets")?;
    let packet = message(&[], &datagram(link, true, true)?)?;
    guest.host.set(nic, Setting::HoldPackets, Some(1))?;
    let generator = guest.start(&generate(link, COUNT)?, Duration::from_secs(120))?;
    let stopped = guest.wait_until(
        &format!(
            "[ $(ethtool -S eth0 | grep -w stop_queue: | tr -dc 0-9) -gt {} ]",
            before.get("stop_queue").copied().unwrap_or(0)
        ),
        Duration::from_secs(30),
    );
    // Completions take the room that is kept free, then there is none.
    let busy = stopped.and_then(|()| {
        guest
            .host
            .send(nic, Kind::Rndis, &[packet], 9000)
            .or_else(|error| match error.to_string().contains("no room") {
                true => Ok(()),
                false => Err(error),
            })?;
        guest.wait_until(
            "[ $(ethtool -S eth0 | grep -w rx_comp_busy: | tr -dc 0-9) -gt 0 ]",
            Duration::from_secs(10),
        )
    });
    guest.host.set(nic, Setting::HoldPackets, None)?;
    let done = generator.wait()?;
    busy?;
    ensure(!done.timed_out && done.code == 0, || format!("{done:?}"))?;
    eventually(Duration::from_secs(10), "the host has got all", || {
        Ok(host_counter(guest, "synthetic.tx_packets")? >= sent + u64::from(COUNT))
    })?;
    let after = guest.statistics("eth0")?;
    let grown: BTreeMap<_, _> = names
        .iter()
        .map(|&name| (name, after[name] - before[name]))
        .collect();
    ensure(grown.values().all(|&count| count > 0), || {
        format!("grown by {grown:?}")
    })?;
    link.pings()
}

/// The interface's counters grow as those of the host.
fn counters(link: &Link<'_>, vf: bool) -> Result<()> {
    let (guest, nic) = (link.guest, link.nic);
    let names: &[&str] = match vf {
        // The two count the bytes of what a VF receives in different ways.
        true => &["tx_packets", "rx_packets"],
        false => &["tx_packets", "rx_packets", "tx_bytes", "rx_bytes"],
    };
    let both = || -> Result<Vec<(u64, u64)>> {
        let host = guest.host.counters()?;
        let value = |name: &str| host.get(name).copied().unwrap_or(0);
        names
            .iter()
            .map(|name| {
                let text = guest.sh(&format!("cat /sys/class/net/eth0/statistics/{name}"))?;
                let host =
                    value(&format!("net0.synthetic.{name}")) + value(&format!("net0.vf.{name}"));
                Ok((text.trim().parse()?, host))
            })
            .collect()
    };
    let multicast = || -> Result<u64> {
        let text = guest.sh("cat /sys/class/net/eth0/statistics/multicast")?;
        Ok(text.trim().parse()?)
    };
    // Nothing is on its way when it begins.
    let mut before = both()?;
    eventually(Duration::from_secs(10), "no traffic", || {
        let earlier = std::mem::replace(&mut before, both()?);
        Ok(earlier == before)
    })?;
    let groups = multicast()?;
    let start = Instant::now();
    guest.sh(&format!(
        "ping -q -c 100 -i 0.01 -s 1000 -W 5 {}",
        nic.peer_v4()
    ))?;
    // Requests for addresses that nobody has are broadcast.
    guest.peer(
        link.lab,
        nic,
        &format!(
            "ping -q -c 2 -i 0.3 -W 1 10.0.{}.78 >/dev/null; true",
            nic.index
        ),
    )?;
    let mut grown = Vec::new();
    eventually(Duration::from_secs(10), "guest and host agree", || {
        let now = both()?;
        grown = before
            .iter()
            .zip(now)
            .map(|(before, now)| (now.0 - before.0, now.1 - before.1))
            .collect();
        // The kernel may send something by the VF itself, which is not eth0's.
        let slack = if vf { 8 } else { 0 };
        Ok(grown
            .iter()
            .all(|&(guest, host)| guest >= 100 && (guest..=guest + slack).contains(&host)))
    })
    .map_err(|error| {
        format!(
            "{error}: {names:?} grew by {grown:?} (guest, host) in {:?}",
            start.elapsed()
        )
    })?;
    ensure(multicast()? > groups, || {
        "broadcasts are not counted as multicast".into()
    })
}

fn joins(link: &Link<'_>) -> Result<()> {
    const GROUP: &str = "01:00:5e:01:02:03";
    let (guest, nic) = (link.guest, link.nic);
    guest.sh(&format!(
        "ip link set eth0 mtu 1400 && ip link set eth0 promisc on && ip maddress add {GROUP} dev eth0"
    ))?;
    guest.host.add_vf(nic)?;
    bonded(guest, nic)?;
    let name = nic.vf_name();
    let shown = || guest.sh(&format!("ip -d link show {name}; ip maddress show {name}"));
    let text = shown()? + &guest.sh("ip link show eth0")?;
    let good = ["SLAVE", "PROMISC", "UP", "mtu 1400", "master eth0", GROUP]
        .iter()
        .all(|word| text.contains(word));
    ensure(good, || text)?;
    guest.sh(&format!(
        "ip link set eth0 promisc off; ip maddress del {GROUP} dev eth0; ip link set eth0 mtu 1500"
    ))?;
    bonded(guest, nic)?;
    let text = shown()?;
    // The stock driver leaves the flag of the VF, but not the mode.
    let good =
        text.contains("promiscuity 0 ") && !text.contains(GROUP) && text.contains("mtu 1500");
    ensure(good, || text)?;
    link.pings()
}
