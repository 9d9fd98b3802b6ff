// SPDX-License-Identifier: GPL-2.0

//! Ethernet frames: headers, checksums, offloads done in software, hashes.

use crate::rss;

/// Length of the Ethernet header.
pub const ETHERNET_HEADER: usize = 14;
/// Length of a VLAN tag.
pub const VLAN_TAG: usize = 4;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;

const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;

const TCP_FIN: u8 = 0x01;
const TCP_SYN: u8 = 0x02;
const TCP_PSH: u8 = 0x08;
const TCP_ACK: u8 = 0x10;
const TCP_CWR: u8 = 0x80;

/// A MAC address.
pub type Mac = [u8; 6];

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// Transport protocol with a checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Transport {
    /// Offset of the checksum in the header.
    pub fn checksum_offset(self) -> usize {
        match self {
            Self::Tcp => 16,
            Self::Udp => 6,
        }
    }

    fn number(self) -> u8 {
        match self {
            Self::Tcp => PROTOCOL_TCP,
            Self::Udp => PROTOCOL_UDP,
        }
    }

    fn min_header(self) -> usize {
        match self {
            Self::Tcp => 20,
            Self::Udp => 8,
        }
    }
}

/// Where the headers of an IP frame are. All offsets lie in the frame, with the whole header
/// (for TCP without options) behind them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers {
    /// Kind of IP.
    pub network: Network,
    /// Offset of the IP header.
    pub network_offset: usize,
    /// Transport protocol and offset of its header; `None` for others and for fragments.
    pub transport: Option<(Transport, usize)>,
    /// End of the IP packet as its header states, at most the end of the frame. A header that
    /// leaves the length open (large send) means the end of the frame.
    pub end: usize,
}

/// Destination address.
pub fn destination(frame: &[u8]) -> Option<Mac> {
    frame.get(..6)?.try_into().ok()
}

/// Whether an address is a group address (broadcast included).
pub fn is_group(mac: &Mac) -> bool {
    mac[0] & 1 != 0
}

/// Whether an address is the broadcast address.
pub fn is_broadcast(mac: &Mac) -> bool {
    *mac == [0xff; 6]
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn put16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// Tag control information of a frame with a VLAN tag.
pub fn vlan_tci(frame: &[u8]) -> Option<u16> {
    (be16(frame, 12)? == ETHERTYPE_VLAN).then(|| be16(frame, 14))?
}

/// A VLAN tag as it stands in a frame.
pub fn vlan_tag(tci: u16) -> [u8; VLAN_TAG] {
    let [a, b] = ETHERTYPE_VLAN.to_be_bytes();
    let [c, d] = tci.to_be_bytes();
    [a, b, c, d]
}

/// Finds the headers of an IP frame, with or without VLAN tag.
pub fn headers(frame: &[u8]) -> Option<Headers> {
    let (mut ethertype, mut at) = (be16(frame, 12)?, ETHERNET_HEADER);
    if ethertype == ETHERTYPE_VLAN {
        ethertype = be16(frame, 16)?;
        at += VLAN_TAG;
    }
    match ethertype {
        ETHERTYPE_IPV4 => headers_v4(frame, at),
        ETHERTYPE_IPV6 => headers_v6(frame, at),
        _ => None,
    }
}

fn headers_v4(frame: &[u8], at: usize) -> Option<Headers> {
    let header = frame.get(at..at + 20)?;
    let header_length = usize::from(header[0] & 15) * 4;
    if header[0] >> 4 != 4 || header_length < 20 || frame.len() < at + header_length {
        return None;
    }
    let total = match be16(header, 2)? {
        0 => frame.len() - at,
        length => usize::from(length).max(header_length),
    };
    let end = (at + total).min(frame.len());
    let fragment = be16(header, 6)? & 0x3fff != 0;
    let transport = if fragment {
        None
    } else {
        transport(frame, header[9], at + header_length, end)
    };
    Some(Headers {
        network: Network::V4,
        network_offset: at,
        transport,
        end,
    })
}

fn headers_v6(frame: &[u8], at: usize) -> Option<Headers> {
    let header = frame.get(at..at + 40)?;
    if header[0] >> 4 != 6 {
        return None;
    }
    let end = match be16(header, 4)? {
        0 => frame.len(),
        length => (at + 40 + usize::from(length)).min(frame.len()),
    };
    let (mut next, mut offset) = (header[6], at + 40);
    // Hop-by-hop, routing and destination options; a fragment has no checksum of its own.
    while let 0 | 43 | 60 = next {
        let Some(extension) = frame.get(offset..offset + 8) else {
            break;
        };
        next = extension[0];
        offset += (usize::from(extension[1]) + 1) * 8;
    }
    Some(Headers {
        network: Network::V6,
        network_offset: at,
        transport: transport(frame, next, offset, end),
        end,
    })
}

fn transport(frame: &[u8], protocol: u8, at: usize, end: usize) -> Option<(Transport, usize)> {
    let transport = match protocol {
        PROTOCOL_TCP => Transport::Tcp,
        PROTOCOL_UDP => Transport::Udp,
        _ => return None,
    };
    (at + transport.min_header() <= end && end <= frame.len()).then_some((transport, at))
}

/// Whether a frame opens a TCP connection: SYN without ACK.
pub fn is_tcp_syn(frame: &[u8]) -> bool {
    match headers(frame) {
        Some(Headers {
            transport: Some((Transport::Tcp, at)),
            ..
        }) => frame[at + 13] & (TCP_SYN | TCP_ACK) == TCP_SYN,
        _ => false,
    }
}

/// Adds bytes to a one's complement sum. All parts but the last must have an even length.
fn sum(mut total: u64, data: &[u8]) -> u64 {
    let mut chunks = data.chunks_exact(4);
    for chunk in &mut chunks {
        // The sum of 32-bit words folds to the sum of 16-bit words, and 2^32 of them fit.
        total += u64::from(u32::from_be_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]));
    }
    total
        + match *chunks.remainder() {
            [a] => u64::from(a) << 8,
            [a, b] => u64::from(u16::from_be_bytes([a, b])),
            [a, b, c] => (u64::from(u16::from_be_bytes([a, b])) << 16) + (u64::from(c) << 8),
            _ => 0,
        }
}

/// Folds a sum to 16 bits.
fn fold(mut total: u64) -> u16 {
    while total >> 16 != 0 {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}

/// Sum of the pseudo header of a transport segment of `length` bytes.
fn pseudo_header(frame: &[u8], headers: &Headers, transport: Transport, length: usize) -> u64 {
    let at = headers.network_offset;
    let addresses = match headers.network {
        Network::V4 => &frame[at + 12..at + 20],
        Network::V6 => &frame[at + 8..at + 40],
    };
    sum(0, addresses) + u64::from(transport.number()) + length as u64
}

/// Computes the checksum of an IPv4 header.
fn set_ipv4_checksum(frame: &mut [u8], at: usize) {
    let end = at + usize::from(frame[at] & 15) * 4;
    put16(frame, at + 10, 0);
    let checksum = !fold(sum(0, &frame[at..end]));
    put16(frame, at + 10, checksum);
}

/// Completes a checksum over `frame[start..]` of which the field at `start + offset` holds the
/// sum of the pseudo header. Returns false if there is no such field.
#[must_use]
pub fn complete_checksum(frame: &mut [u8], start: usize, offset: usize) -> bool {
    if start + offset + 2 > frame.len() {
        return false;
    }
    // Padding behind the IP packet does not count.
    let end = headers(frame).map_or(frame.len(), |h| h.end.max(start + offset + 2));
    let checksum = match !fold(sum(0, &frame[start..end])) {
        0 => 0xffff,
        checksum => checksum,
    };
    put16(frame, start + offset, checksum);
    true
}

/// What can be said about the checksums of a received frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChecksumState {
    /// Of the IPv4 header; `None` if the frame has none.
    pub ipv4: Option<bool>,
    /// Of TCP or UDP; `None` if the frame has none.
    pub transport: Option<(Transport, bool)>,
}

/// Verifies the checksums of a frame. With `trusted`, that of TCP or UDP is known to be right.
pub fn verify_checksums(frame: &[u8], trusted: bool) -> ChecksumState {
    let Some(headers) = headers(frame) else {
        return ChecksumState::default();
    };
    let at = headers.network_offset;
    let ipv4 = (headers.network == Network::V4).then(|| {
        let end = at + usize::from(frame[at] & 15) * 4;
        fold(sum(0, &frame[at..end])) == 0xffff
    });
    let transport = headers.transport.and_then(|(transport, start)| {
        let segment = &frame[start..headers.end];
        let field = be16(segment, transport.checksum_offset())?;
        // A UDP checksum may be left out in IPv4; then there is nothing to say about it.
        if transport == Transport::Udp && field == 0 {
            return None;
        }
        let right = trusted || {
            let pseudo = pseudo_header(frame, &headers, transport, segment.len());
            fold(sum(pseudo, segment)) == 0xffff
        };
        Some((transport, right))
    });
    ChecksumState { ipv4, transport }
}

/// What the guest wants done to a frame that it sends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TxOffload {
    /// Compute the TCP or UDP checksum.
    pub checksum: bool,
    /// Compute the checksum of the IPv4 header.
    pub ipv4_checksum: bool,
    /// Cut the TCP segment into segments of so many bytes of payload. Implies both checksums.
    pub lso_mss: Option<u16>,
    /// Put a VLAN tag with this tag control information into the frame.
    pub vlan: Option<u16>,
}

/// A frame that does not allow what is asked for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OffloadError {
    /// Checksum offload for something else than TCP or UDP.
    #[error("checksum offload for a frame that is neither TCP nor UDP")]
    NoTransport,
    /// Large send for something else than TCP.
    #[error("large send offload for a frame that is not TCP")]
    NotTcp,
    /// The headers do not fit the frame, or the segment size is zero.
    #[error("large send offload with impossible lengths")]
    BadLength,
}

/// The header in front of frames at the tap (`struct virtio_net_hdr`), which tells of pending
/// checksums and segmentation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VnetHeader {
    /// Bits [`Self::NEEDS_CHECKSUM`] and [`Self::DATA_VALID`].
    pub flags: u8,
    /// [`Self::GSO_NONE`] and following, perhaps with [`Self::GSO_ECN`].
    pub gso_type: u8,
    /// Length of all headers.
    pub header_length: u16,
    /// Payload of a segment.
    pub gso_size: u16,
    /// Where the checksum starts.
    pub checksum_start: u16,
    /// Where it is stored, from there.
    pub checksum_offset: u16,
}

impl VnetHeader {
    /// Length of the header.
    pub const SIZE: usize = 10;
    /// The checksum must be completed.
    pub const NEEDS_CHECKSUM: u8 = 1;
    /// The checksum was verified.
    pub const DATA_VALID: u8 = 2;
    /// One packet.
    pub const GSO_NONE: u8 = 0;
    /// TCP over IPv4, to be segmented.
    pub const GSO_TCPV4: u8 = 1;
    /// TCP over IPv6, to be segmented.
    pub const GSO_TCPV6: u8 = 4;
    /// The segment carries a congestion mark.
    pub const GSO_ECN: u8 = 0x80;

    /// As bytes, in the byte order of this machine.
    pub fn to_bytes(self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        bytes[0] = self.flags;
        bytes[1] = self.gso_type;
        let fields = [
            self.header_length,
            self.gso_size,
            self.checksum_start,
            self.checksum_offset,
        ];
        for (to, field) in bytes[2..].chunks_exact_mut(2).zip(fields) {
            to.copy_from_slice(&field.to_ne_bytes());
        }
        bytes
    }

    /// From bytes, in the byte order of this machine.
    pub fn from_bytes(bytes: [u8; Self::SIZE]) -> Self {
        let field = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            header_length: field(2),
            gso_size: field(4),
            checksum_start: field(6),
            checksum_offset: field(8),
        }
    }
}

/// Brings the headers of a frame into the state that goes with the returned header: pending
/// checksums hold the sum of the pseudo header, lengths are those of the whole frame.
///
/// The header counts without VLAN tag: one in [`TxOffload::vlan`] is put in on the way out, see
/// [`VnetHeader::shifted`].
pub fn prepare_transmit(frame: &mut [u8], offload: &TxOffload) -> Result<VnetHeader, OffloadError> {
    if let Some(mss) = offload.lso_mss {
        return prepare_large_send(frame, mss);
    }
    if !offload.checksum && !offload.ipv4_checksum {
        return Ok(VnetHeader::default());
    }
    let headers = headers(frame).ok_or(OffloadError::NoTransport)?;
    if offload.ipv4_checksum && headers.network == Network::V4 {
        set_ipv4_checksum(frame, headers.network_offset);
    }
    if !offload.checksum {
        return Ok(VnetHeader::default());
    }
    let (transport, start) = headers.transport.ok_or(OffloadError::NoTransport)?;
    let field = start + transport.checksum_offset();
    let pseudo = pseudo_header(frame, &headers, transport, headers.end - start);
    put16(frame, field, fold(pseudo));
    Ok(VnetHeader {
        flags: VnetHeader::NEEDS_CHECKSUM,
        checksum_start: start as u16,
        checksum_offset: transport.checksum_offset() as u16,
        ..VnetHeader::default()
    })
}

fn prepare_large_send(frame: &mut [u8], mss: u16) -> Result<VnetHeader, OffloadError> {
    // The length in the IP header is that of the large packet or zero; the frame decides.
    let found = headers(frame).ok_or(OffloadError::NotTcp)?;
    let at = found.network_offset;
    let length = frame.len() - at;
    let gso_type = match found.network {
        Network::V4 => {
            let total = u16::try_from(length).map_err(|_| OffloadError::BadLength)?;
            put16(frame, at + 2, total);
            set_ipv4_checksum(frame, at);
            VnetHeader::GSO_TCPV4
        }
        Network::V6 => {
            let payload = u16::try_from(length - 40).map_err(|_| OffloadError::BadLength)?;
            put16(frame, at + 4, payload);
            VnetHeader::GSO_TCPV6
        }
    };
    let found = headers(frame).ok_or(OffloadError::NotTcp)?;
    let Some((Transport::Tcp, start)) = found.transport else {
        return Err(OffloadError::NotTcp);
    };
    let header_length = start + usize::from(frame[start + 12] >> 4) * 4;
    if mss == 0 || header_length < start + 20 || header_length > frame.len() {
        return Err(OffloadError::BadLength);
    }
    let pseudo = pseudo_header(frame, &found, Transport::Tcp, frame.len() - start);
    put16(frame, start + 16, fold(pseudo));
    let mut header = VnetHeader {
        flags: VnetHeader::NEEDS_CHECKSUM,
        checksum_start: start as u16,
        checksum_offset: 16,
        ..VnetHeader::default()
    };
    // A frame of one segment needs no segmentation; the tap refuses it as such.
    if frame.len() - header_length > usize::from(mss) {
        let ecn = frame[start + 13] & TCP_CWR != 0;
        header.gso_type = gso_type | if ecn { VnetHeader::GSO_ECN } else { 0 };
        header.header_length = header_length as u16;
        header.gso_size = mss;
    }
    Ok(header)
}

impl VnetHeader {
    /// The header for the frame with `bytes` more in front of the network header.
    #[must_use]
    pub fn shifted(mut self, bytes: u16) -> Self {
        if self.flags & Self::NEEDS_CHECKSUM != 0 {
            self.checksum_start += bytes;
        }
        if self.gso_type != Self::GSO_NONE {
            self.header_length += bytes;
        }
        self
    }

    /// Whether the frame is one of several segments.
    pub fn is_gso(&self) -> bool {
        self.gso_type & !Self::GSO_ECN != Self::GSO_NONE
    }
}

/// Cuts a large TCP frame into frames with at most `mss` bytes of payload, complete with
/// checksums, and gives each to `deliver`. Returns false if the frame does not allow it.
pub fn segment(frame: &[u8], mss: usize, mut deliver: impl FnMut(&mut Vec<u8>)) -> bool {
    let Some(found) = headers(frame) else {
        return false;
    };
    let Some((Transport::Tcp, start)) = found.transport else {
        return false;
    };
    let header_length = start + usize::from(frame[start + 12] >> 4) * 4;
    if mss == 0 || header_length < start + 20 || header_length > found.end {
        return false;
    }
    let at = found.network_offset;
    let payload = &frame[header_length..found.end];
    let mut flags = frame[start + 13];
    let first_flags = flags;
    let sequence = u32::from_be_bytes([
        frame[start + 4],
        frame[start + 5],
        frame[start + 6],
        frame[start + 7],
    ]);
    let id = be16(frame, at + 4).unwrap_or(0);
    let mut out = Vec::with_capacity(header_length + mss);
    let count = payload.len().div_ceil(mss).max(1);
    for i in 0..count {
        let from = i * mss;
        let part = &payload[from..payload.len().min(from + mss)];
        out.clear();
        out.extend_from_slice(&frame[..header_length]);
        out.extend_from_slice(part);
        let total = out.len() - at;
        match found.network {
            Network::V4 => {
                put16(&mut out, at + 2, total as u16);
                put16(&mut out, at + 4, id.wrapping_add(i as u16));
                set_ipv4_checksum(&mut out, at);
            }
            Network::V6 => put16(&mut out, at + 4, (total - 40) as u16),
        }
        let sequence = sequence.wrapping_add(from as u32);
        out[start + 4..start + 8].copy_from_slice(&sequence.to_be_bytes());
        if i > 0 {
            flags &= !TCP_CWR;
        }
        out[start + 13] = if i + 1 < count {
            flags & !(TCP_FIN | TCP_PSH)
        } else {
            flags | (first_flags & (TCP_FIN | TCP_PSH))
        };
        let length = out.len() - start;
        put16(&mut out, start + 16, 0);
        let pseudo = pseudo_header(&out, &found, Transport::Tcp, length);
        let checksum = !fold(sum(pseudo, &out[start..]));
        put16(&mut out, start + 16, checksum);
        deliver(&mut out);
    }
    true
}

/// The input of the receive hash: addresses, and ports if the transport is TCP and `types` asks
/// for them. `None` if the frame is of no kind that `types` names.
pub fn hash_input(frame: &[u8], types: rss::Types) -> Option<rss::Input> {
    let found = headers(frame)?;
    let at = found.network_offset;
    let (addresses, with_addresses, with_ports) = match found.network {
        Network::V4 => (&frame[at + 12..at + 20], types.ipv4, types.tcp_ipv4),
        Network::V6 => (&frame[at + 8..at + 40], types.ipv6, types.tcp_ipv6),
    };
    match found.transport {
        Some((Transport::Tcp, start)) if with_ports => {
            Some(rss::Input::new(addresses, &frame[start..start + 4]))
        }
        _ if with_addresses => Some(rss::Input::new(addresses, &[])),
        _ => None,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A frame of TCP (IPv4 or IPv6) with the given payload, all checksums right.
    pub(crate) fn tcp_frame(network: Network, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0x02, 0, 0, 0, 0, 1, 0x02, 0, 0, 0, 0, 2];
        let tcp_length = 20 + payload.len();
        match network {
            Network::V4 => {
                frame.extend([0x08, 0x00, 0x45, 0]);
                frame.extend(((20 + tcp_length) as u16).to_be_bytes());
                frame.extend([0x12, 0x34, 0x40, 0, 64, 6, 0, 0]);
                frame.extend([10, 0, 0, 1, 10, 0, 0, 2]);
            }
            Network::V6 => {
                frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
                frame.extend((tcp_length as u16).to_be_bytes());
                frame.extend([6, 64]);
                frame.extend([0x20; 16]);
                frame.extend([0x21; 16]);
            }
        }
        let start = frame.len();
        frame.extend([
            0x12, 0x34, 0, 80, 0xff, 0xff, 0xff, 0x00, 0, 0, 0, 1, 0x50, flags,
        ]);
        frame.extend([1, 0, 0, 0, 0, 0]);
        frame.extend(payload);
        if network == Network::V4 {
            set_ipv4_checksum(&mut frame, 14);
        }
        let found = headers(&frame).unwrap();
        let pseudo = pseudo_header(&frame, &found, Transport::Tcp, tcp_length);
        put16(&mut frame, start + 16, fold(pseudo));
        assert!(complete_checksum(&mut frame, start, 16));
        frame
    }

    const RIGHT_TCP: Option<(Transport, bool)> = Some((Transport::Tcp, true));

    #[test]
    fn sums_of_all_lengths() {
        let data: Vec<u8> = (0..=255).cycle().take(70).map(|b: u8| b ^ 0x5a).collect();
        for length in 0..data.len() {
            let mut expected = 0u64;
            for pair in data[..length].chunks(2) {
                expected += (u64::from(pair[0]) << 8) | u64::from(*pair.get(1).unwrap_or(&0));
            }
            assert_eq!(fold(sum(0, &data[..length])), fold(expected), "{length}");
        }
    }

    #[test]
    fn checksums_verify() {
        for network in [Network::V4, Network::V6] {
            let ipv4 = (network == Network::V4).then_some(true);
            for length in [0, 1, 2, 3, 1000, 1001] {
                let mut frame = tcp_frame(network, TCP_ACK, &vec![7; length]);
                let state = verify_checksums(&frame, false);
                assert_eq!((state.ipv4, state.transport), (ipv4, RIGHT_TCP));
                let last = frame.len() - 1;
                frame[last] ^= 1;
                let state = verify_checksums(&frame, false);
                assert_ne!(state.transport, RIGHT_TCP);
                assert_eq!(verify_checksums(&frame, true).transport, RIGHT_TCP);
            }
        }
        assert_eq!(verify_checksums(&[0; 60], false), ChecksumState::default());
    }

    #[test]
    fn padding_does_not_count() {
        let mut frame = tcp_frame(Network::V4, TCP_ACK, &[]);
        frame.resize(60, 0xee);
        assert_eq!(verify_checksums(&frame, false).transport, RIGHT_TCP);
        let offload = TxOffload {
            checksum: true,
            ..TxOffload::default()
        };
        let header = prepare_transmit(&mut frame, &offload).unwrap();
        assert!(complete_checksum(
            &mut frame,
            header.checksum_start.into(),
            header.checksum_offset.into()
        ));
        assert_eq!(verify_checksums(&frame, false).transport, RIGHT_TCP);
    }

    #[test]
    fn large_send_and_segmentation_agree() {
        for network in [Network::V4, Network::V6] {
            let payload: Vec<u8> = (0..10_000u32).map(|i| i as u8).collect();
            let whole = tcp_frame(network, TCP_ACK | TCP_PSH | TCP_CWR, &payload);
            let mut frame = whole.clone();
            // As the driver leaves it: no lengths, no checksums.
            let at = ETHERNET_HEADER;
            let start = match network {
                Network::V4 => {
                    frame[at + 2..at + 4].fill(0);
                    frame[at + 10..at + 12].fill(0);
                    at + 20
                }
                Network::V6 => {
                    frame[at + 4..at + 6].fill(0);
                    at + 40
                }
            };
            frame[start + 16..start + 18].fill(0);
            let offload = TxOffload {
                lso_mss: Some(1448),
                ..TxOffload::default()
            };
            let header = prepare_transmit(&mut frame, &offload).unwrap();
            assert!(header.is_gso());
            assert_eq!(usize::from(header.header_length), start + 20);
            assert_eq!(header.gso_type & VnetHeader::GSO_ECN, VnetHeader::GSO_ECN);
            assert!(complete_checksum(&mut frame, start, 16));
            assert_eq!(frame, whole);

            let mut rebuilt = Vec::new();
            let mut flags = Vec::new();
            assert!(segment(&frame, 1448, |part| {
                let state = verify_checksums(part, false);
                assert_eq!(state.transport, RIGHT_TCP);
                assert_ne!(state.ipv4, Some(false));
                let sequence = u32::from_be_bytes(part[start + 4..start + 8].try_into().unwrap());
                assert_eq!(sequence, 0xffff_ff00u32.wrapping_add(rebuilt.len() as u32));
                rebuilt.extend_from_slice(&part[start + 20..]);
                flags.push(part[start + 13]);
            }));
            assert_eq!(rebuilt, payload);
            assert_eq!(flags.len(), 7);
            assert_eq!(flags[0], TCP_ACK | TCP_CWR);
            assert!(flags[1..6].iter().all(|&f| f == TCP_ACK));
            assert_eq!(flags[6], TCP_ACK | TCP_PSH);
        }
    }

    #[test]
    fn large_send_of_one_segment_is_no_gso() {
        let mut frame = tcp_frame(Network::V4, TCP_ACK, &[1; 100]);
        let offload = TxOffload {
            lso_mss: Some(100),
            ..TxOffload::default()
        };
        let header = prepare_transmit(&mut frame, &offload).unwrap();
        assert!(!header.is_gso());
        assert_eq!(header.flags, VnetHeader::NEEDS_CHECKSUM);
    }

    #[test]
    fn impossible_offloads_are_refused() {
        let lso = |mss| TxOffload {
            lso_mss: Some(mss),
            ..TxOffload::default()
        };
        let frame = tcp_frame(Network::V4, TCP_ACK, &[1; 100]);
        assert_eq!(
            prepare_transmit(&mut frame.clone(), &lso(0)),
            Err(OffloadError::BadLength)
        );
        assert_eq!(
            prepare_transmit(&mut [0; 60], &lso(100)),
            Err(OffloadError::NotTcp)
        );
        let mut long_header = frame.clone();
        long_header.truncate(60);
        long_header[14 + 20 + 12] = 0xf0;
        assert_eq!(
            prepare_transmit(&mut long_header, &lso(100)),
            Err(OffloadError::BadLength)
        );
        // Every cut of a frame is handled without panic.
        for length in 0..frame.len() {
            let mut cut = frame[..length].to_vec();
            let _ = prepare_transmit(&mut cut, &lso(10));
            let _ = is_tcp_syn(&frame[..length]);
            let _ = verify_checksums(&frame[..length], false);
            let _ = segment(&frame[..length], 10, |_| ());
        }
    }

    #[test]
    fn connection_requests() {
        for (flags, syn) in [
            (TCP_SYN, true),
            (TCP_SYN | TCP_ACK, false),
            (TCP_ACK, false),
            (TCP_SYN | TCP_CWR, true),
        ] {
            assert_eq!(is_tcp_syn(&tcp_frame(Network::V4, flags, &[])), syn);
            assert_eq!(is_tcp_syn(&tcp_frame(Network::V6, flags, &[])), syn);
        }
        let mut tagged = tcp_frame(Network::V4, TCP_SYN, &[]);
        tagged.splice(12..12, vlan_tag(5));
        assert!(is_tcp_syn(&tagged));
        assert_eq!(vlan_tci(&tagged), Some(5));
    }

    #[test]
    fn vnet_header_round_trip() {
        let header = VnetHeader {
            flags: 1,
            gso_type: 4,
            header_length: 74,
            gso_size: 1440,
            checksum_start: 54,
            checksum_offset: 16,
        };
        assert_eq!(VnetHeader::from_bytes(header.to_bytes()), header);
        let shifted = header.shifted(4);
        assert_eq!((shifted.header_length, shifted.checksum_start), (78, 58));
    }
}
