// SPDX-License-Identifier: GPL-2.0

//! Packets.
//!
//! C header: [`include/linux/skbuff.h`](srctree/include/linux/skbuff.h)

use core::{
    mem::{
        size_of,
        ManuallyDrop, //
    },
    ptr::{
        null_mut,
        NonNull, //
    }, //
};

use hyperv_bindings as bindings;
use kernel::{
    error::to_result,
    prelude::*,
    sync::atomic::{
        Atomic,
        Full, //
    }, //
};
use vmbus::SharedBytes;

use crate::{
    NetDevice, //
};

const _: () = {
    assert!(size_of::<bindings::sk_buff>() <= 256);
    assert!(core::mem::offset_of!(bindings::sk_buff, cb) % 8 == 0);
};

/// EtherType of IPv4.
const ETH_P_IP: u16 = 0x0800;
/// EtherType of IPv6.
const ETH_P_IPV6: u16 = 0x86dd;
/// EtherType of 802.1Q.
const ETH_P_8021Q: u16 = 0x8100;

const IPPROTO_TCP: u8 = 6;
const IPPROTO_UDP: u8 = 17;

/// A transport protocol over a network protocol.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum L4 {
    /// TCP over IPv4.
    Tcp4,
    /// UDP over IPv4.
    Udp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP over IPv6.
    Udp6,
}

impl L4 {
    fn new(ethertype: u16, protocol: u8) -> Option<Self> {
        Some(match (ethertype, protocol) {
            (ETH_P_IP, IPPROTO_TCP) => Self::Tcp4,
            (ETH_P_IP, IPPROTO_UDP) => Self::Udp4,
            (ETH_P_IPV6, IPPROTO_TCP) => Self::Tcp6,
            (ETH_P_IPV6, IPPROTO_UDP) => Self::Udp6,
            _ => return None,
        })
    }

    /// Whether the network protocol is IPv6.
    pub fn is_ipv6(self) -> bool {
        matches!(self, Self::Tcp6 | Self::Udp6)
    }

    /// Whether the transport protocol is TCP.
    pub fn is_tcp(self) -> bool {
        matches!(self, Self::Tcp4 | Self::Tcp6)
    }
}

/// What is left to do about the checksum of a packet to transmit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Checksum {
    /// Nothing.
    Done,
    /// The packet is to be cut into TCP segments of this much payload each.
    Segment {
        /// Payload of a segment.
        size: u16,
    },
    /// The checksum of the transport protocol is to be computed, if it is one the device may know.
    Partial(Option<L4>),
}

/// What the hardware knows about a received packet.
#[derive(Clone, Copy, Default)]
pub struct RxInfo {
    /// Its checksums are right.
    pub checksum_ok: bool,
    /// The checksum of the IPv4 header was not filled in.
    pub compute_ip_checksum: bool,
    /// Its hash over addresses and ports.
    pub hash: Option<u32>,
    /// The tag that was taken out.
    pub vlan_tci: Option<u16>,
    /// The queue it came by.
    pub queue: u16,
}

/// Kind of destination address of a received packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Destination {
    /// One host.
    Unicast,
    /// All hosts.
    Broadcast,
    /// A group of hosts.
    Multicast,
}

/// A packet, with its data.
///
/// Whoever has the value owns the packet; dropping it frees the packet as one that was lost.
///
/// # Invariants
///
/// `skb` points to a valid packet, which is ours.
#[repr(transparent)]
pub struct SkBuff {
    skb: NonNull<bindings::sk_buff>,
}

// SAFETY: A packet can be used and freed by any thread.
unsafe impl Send for SkBuff {}

// SAFETY: Methods with a shared reference only read.
unsafe impl Sync for SkBuff {}

impl SkBuff {
    /// # Safety
    ///
    /// `skb` must point to a valid packet, which becomes ours.
    #[inline]
    pub(crate) unsafe fn from_raw(skb: NonNull<bindings::sk_buff>) -> Self {
        // INVARIANT: By the safety requirements.
        Self { skb }
    }

    /// Gives the packet away, to C.
    #[inline]
    pub(crate) fn into_raw(self) -> *mut bindings::sk_buff {
        ManuallyDrop::new(self).skb.as_ptr()
    }

    #[inline]
    pub(crate) fn as_raw(&self) -> *mut bindings::sk_buff {
        self.skb.as_ptr()
    }

    #[inline]
    fn get(&self) -> &bindings::sk_buff {
        // SAFETY: By the type invariants the packet is valid, and nobody else writes to it.
        unsafe { self.skb.as_ref() }
    }

    /// Number of bytes.
    #[expect(clippy::len_without_is_empty, reason = "a packet is never empty")]
    #[inline]
    pub fn len(&self) -> u32 {
        self.get().len
    }

    /// Number of bytes in the linear part.
    #[inline]
    pub fn head_len(&self) -> u32 {
        self.get().len - self.get().data_len
    }

    /// Whether all data lies in the linear part.
    #[inline]
    pub fn is_linear(&self) -> bool {
        self.get().data_len == 0
    }

    /// The queue selected for it.
    #[inline]
    pub fn queue_mapping(&self) -> u16 {
        self.get().queue_mapping
    }

    #[inline]
    fn shared_info(&self) -> &bindings::skb_shared_info {
        // SAFETY: By the type invariants the packet is valid, and so is its shared info.
        unsafe { &*bindings::skb_shinfo(self.as_raw()) }
    }

    #[inline]
    fn fragments(&self) -> &[bindings::skb_frag_t] {
        let info = self.shared_info();
        info.frags.get(..info.nr_frags.into()).unwrap_or(&[])
    }

    /// The number of Hyper-V's pages that the data lies in.
    #[inline]
    pub fn pages(&self) -> usize {
        let page = vmbus::HV_PAGE_SIZE as u32;
        let spanned = |offset: u32, len: u32| ((offset & (page - 1)) + len).div_ceil(page) as usize;
        let head = spanned(self.get().data as usize as u32, self.head_len());
        self.fragments().iter().fold(head, |pages, frag| {
            // SAFETY: The fragment is valid.
            let (offset, len) =
                unsafe { (bindings::skb_frag_off(frag), bindings::skb_frag_size(frag)) };
            pages + spanned(offset, len)
        })
    }

    /// Calls `f` for each piece of the data with its first page, the offset in that page and its
    /// length. A piece is contiguous in memory, but can be more than a page.
    #[inline]
    pub fn for_each_piece(&self, mut f: impl FnMut(u64, u32, u32) -> Result) -> Result {
        let page = vmbus::HV_PAGE_SIZE as u32;
        let data = self.get().data;
        // SAFETY: The linear data lies in the kernel's direct mapping.
        let pfn = unsafe { bindings::virt_to_hvpfn(data.cast()) } as u64;
        f(pfn, data as usize as u32 & (page - 1), self.head_len())?;
        for frag in self.fragments() {
            // SAFETY: The fragment is valid.
            let (pfn, offset, len) = unsafe {
                (
                    bindings::skb_frag_hvpfn(frag) as u64,
                    bindings::skb_frag_off(frag),
                    bindings::skb_frag_size(frag),
                )
            };
            f(pfn, offset & (page - 1), len)?;
        }
        Ok(())
    }

    /// Copies all data to the beginning of `to`.
    #[inline]
    pub fn copy_to_shared(&self, to: &SharedBytes<'_>) -> Result {
        if to.len() < self.len() as usize {
            return Err(EMSGSIZE);
        }
        if self.is_linear() {
            // SAFETY: All `len` bytes are linear data; the destination has room for them, and is
            // accessed by nobody but the host.
            unsafe {
                core::ptr::copy_nonoverlapping(self.get().data, to.as_ptr(), self.len() as usize)
            };
            return Ok(());
        }
        // SAFETY: By the type invariants the packet is valid; the destination has room for all of
        // its data, and is accessed by nobody but the host.
        to_result(unsafe {
            bindings::skb_copy_bits(self.as_raw(), 0, to.as_ptr().cast(), self.len() as c_int)
        })
    }

    /// Makes all data linear. The packet is still ours if that fails.
    pub fn linearize(&mut self) -> Result {
        // SAFETY: By the type invariants the packet is valid and ours.
        to_result(unsafe { bindings::skb_linearize(self.as_raw()) })
    }

    /// Gets at least `len` bytes of private room before the data, and makes the headers writable.
    #[inline]
    pub fn reserve_head(&mut self, len: u32) -> Result {
        // SAFETY: By the type invariants the packet is valid and ours.
        match unsafe { bindings::skb_cow_head(self.as_raw(), len) } {
            // Without a call, mostly.
            0 => Ok(()),
            e => to_result(e),
        }
    }

    /// Writes `bytes` into the room before the data, as far ahead of the data as possible.
    ///
    /// Returns first page, offset in that page and length of what was written. It stays until the
    /// packet is freed or something else is put before the data.
    #[inline]
    pub fn write_head(&mut self, bytes: &[u8]) -> Result<(u64, u32, u32)> {
        let len = u32::try_from(bytes.len())?;
        self.reserve_head(len)?;
        let head = self.get().head;
        // SAFETY: There are `len` bytes of room between head and data, which belong to this packet
        // alone since `reserve_head` succeeded.
        unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), head, bytes.len()) };
        // SAFETY: The head lies in the kernel's direct mapping.
        let pfn = unsafe { bindings::virt_to_hvpfn(head.cast()) } as u64;
        Ok((
            pfn,
            head as usize as u32 & (vmbus::HV_PAGE_SIZE as u32 - 1),
            len,
        ))
    }

    /// The linear data, to write to.
    fn head_mut(&mut self) -> Result<&mut [u8]> {
        self.reserve_head(0)?;
        let len = self.head_len() as usize;
        // SAFETY: `len` bytes from data on are the linear data. They are not shared with another
        // packet since `reserve_head` succeeded, and `self` is borrowed as long as the slice is.
        Ok(unsafe { core::slice::from_raw_parts_mut(self.get().data, len) })
    }

    /// EtherType of the packet.
    #[inline]
    fn protocol(&self) -> u16 {
        // SAFETY: By the type invariants the packet is valid.
        unsafe { bindings::skb_protocol_host(self.as_raw()) }
    }

    /// Offset of the network header from the data.
    #[inline]
    fn network_offset(&self) -> Option<usize> {
        // SAFETY: By the type invariants the packet is valid.
        usize::try_from(unsafe { bindings::skb_network_offset(self.as_raw()) }).ok()
    }

    /// Offset of the transport header from the data.
    #[inline]
    pub fn transport_offset(&self) -> u32 {
        // SAFETY: By the type invariants the packet is valid.
        u32::try_from(unsafe { bindings::skb_transport_offset(self.as_raw()) }).unwrap_or(u32::MAX)
    }

    /// The linear data, to look at.
    #[inline]
    fn head(&self) -> &[u8] {
        let len = self.head_len() as usize;
        // SAFETY: `len` bytes from data on are the linear data, and nobody writes to them while
        // `self` is borrowed.
        unsafe { core::slice::from_raw_parts(self.get().data, len) }
    }

    /// The transport protocol, as far as the first headers tell.
    #[inline]
    fn l4(&self) -> Option<L4> {
        let ip = self.head().get(self.network_offset()?..)?;
        match self.protocol() {
            ETH_P_IP => L4::new(ETH_P_IP, *ip.get(9)?),
            ETH_P_IPV6 => L4::new(ETH_P_IPV6, *ip.get(6)?),
            _ => None,
        }
    }

    /// What is to be done about the packet's checksum.
    #[inline]
    pub fn checksum(&self) -> Checksum {
        let size = self.shared_info().gso_size;
        if size != 0 {
            return Checksum::Segment { size };
        }
        // SAFETY: By the type invariants the packet is valid.
        if unsafe { bindings::skb_csum_partial(self.as_raw()) } {
            Checksum::Partial(self.l4())
        } else {
            Checksum::Done
        }
    }

    /// Computes the checksum that was left to the device.
    pub fn compute_checksum(&mut self) -> Result {
        // SAFETY: By the type invariants the packet is valid and ours.
        to_result(unsafe { bindings::skb_checksum_help(self.as_raw()) })
    }

    /// Prepares the headers of a packet for large send offload: the fields that differ between the
    /// segments become zero, and TCP's checksum that of its pseudo header without a length.
    ///
    /// Tells whether the packet is IPv6.
    pub fn prepare_large_send(&mut self) -> Result<bool> {
        let ip = self.network_offset().ok_or(EINVAL)?;
        let tcp = self.transport_offset() as usize;
        let is_ipv6 = match self.protocol() {
            ETH_P_IP => false,
            ETH_P_IPV6 => true,
            _ => return Err(EINVAL),
        };
        let head = self.head_mut()?;
        let addresses = if is_ipv6 {
            ip + 8..ip + 40
        } else {
            ip + 12..ip + 20
        };
        let sum = head
            .get(addresses)
            .ok_or(EINVAL)?
            .chunks_exact(2)
            .fold(u32::from(IPPROTO_TCP), |sum, word| {
                sum + u32::from(u16::from_be_bytes([word[0], word[1]]))
            });
        let sum = (sum & 0xffff) + (sum >> 16);
        let sum = (sum & 0xffff) + (sum >> 16);
        if is_ipv6 {
            head.get_mut(ip + 4..ip + 6).ok_or(EINVAL)?.fill(0);
        } else {
            head.get_mut(ip + 2..ip + 4).ok_or(EINVAL)?.fill(0);
            head.get_mut(ip + 10..ip + 12).ok_or(EINVAL)?.fill(0);
        }
        head.get_mut(tcp + 16..tcp + 18)
            .ok_or(EINVAL)?
            .copy_from_slice(&(sum as u16).to_be_bytes());
        Ok(is_ipv6)
    }

    /// If the packet's data begins with a frame with an 802.1Q tag, takes the tag out.
    #[inline]
    pub fn take_vlan_tag(&mut self) -> Result {
        if self.protocol() != ETH_P_8021Q {
            return Ok(());
        }
        // SAFETY: By the type invariants the packet is valid and ours.
        to_result(unsafe { bindings::skb_untag(self.as_raw()) })
    }

    /// The 802.1Q tag to be inserted.
    #[inline]
    pub fn vlan_tci(&self) -> Option<u16> {
        // SAFETY: By the type invariants the packet is valid.
        unsafe {
            bindings::skb_vlan_tag_present(self.as_raw())
                .then(|| bindings::skb_vlan_tag_get(self.as_raw()))
        }
    }

    /// The hash, if it was computed already; 0 otherwise.
    #[inline]
    pub fn raw_hash(&self) -> u32 {
        // SAFETY: By the type invariants the packet is valid.
        unsafe { bindings::skb_get_hash_raw(self.as_raw()) }
    }

    /// Takes the software timestamp of transmission, if somebody wants it.
    #[inline]
    pub fn tx_timestamp(&mut self) {
        // SAFETY: By the type invariants the packet is valid and ours.
        unsafe { bindings::skb_tx_timestamp(self.as_raw()) };
    }

    /// Frees the packet as one that was transmitted.
    #[inline]
    pub fn consume(self) {
        // SAFETY: By the type invariants the packet is valid and ours.
        unsafe { bindings::dev_consume_skb_any(self.into_raw()) };
    }

    /// Transmits the packet on another device, on the queue recorded for that. Returns
    /// `NET_XMIT_*`; the packet is gone in any case.
    pub(crate) fn transmit_on(self, dev: &NetDevice) -> c_int {
        // SAFETY: The packet is valid and ours, and so is the device.
        unsafe {
            let queue = *bindings::skb_slave_queue_mapping(self.as_raw());
            bindings::skb_set_dev(self.as_raw(), dev.as_raw());
            bindings::skb_record_rx_queue(self.as_raw(), queue);
            bindings::dev_queue_xmit(self.into_raw())
        }
    }

    /// Records the queue of the slave device for [`Xmit::on`](crate::Xmit::on).
    pub fn set_slave_queue(&mut self, queue: u16) {
        // SAFETY: By the type invariants the packet is valid and ours.
        unsafe { *bindings::skb_slave_queue_mapping(self.as_raw()) = queue };
    }

    /// The queue that the packet's socket transmits on, if it has one and need not change it.
    pub fn socket_queue(&self) -> Option<u16> {
        // SAFETY: By the type invariants the packet is valid.
        u16::try_from(unsafe { bindings::sk_tx_queue_get(self.as_raw()) }).ok()
    }

    /// Remembers a transmit queue for the packet's socket.
    pub fn remember_socket_queue(&self, queue: u16) {
        // SAFETY: By the type invariants the packet is valid.
        unsafe { bindings::sk_tx_queue_remember(self.as_raw(), queue.into()) };
    }

    /// Whether this packet may overtake earlier ones of its socket.
    pub fn may_reorder(&self) -> bool {
        // SAFETY: By the type invariants the packet is valid.
        unsafe { bindings::skb_ooo_okay(self.as_raw()) }
    }

    /// The queue a forwarded packet was received by.
    pub fn rx_queue(&self) -> Option<u16> {
        // SAFETY: By the type invariants the packet is valid.
        unsafe {
            bindings::skb_rx_queue_recorded(self.as_raw())
                .then(|| bindings::skb_get_rx_queue(self.as_raw()))
        }
    }

    /// Dissects the packet's headers.
    pub fn flow_keys(&self) -> Option<FlowKeys> {
        // SAFETY: All-zeroes is a valid value of this C structure.
        let mut keys: bindings::flow_keys = unsafe { core::mem::zeroed() };
        // SAFETY: By the type invariants the packet is valid.
        unsafe { bindings::skb_flow_dissect_flow_keys(self.as_raw(), &mut keys) }
            .then_some(FlowKeys(keys))
    }

    /// The hash over addresses and ports, computed if it is not known.
    pub fn hash(&mut self) -> u32 {
        // SAFETY: By the type invariants the packet is valid and ours.
        unsafe { bindings::skb_get_hash(self.as_raw()) }
    }

    /// Sets a hash over addresses that software computed.
    pub fn set_address_hash(&mut self, hash: u32) {
        // SAFETY: By the type invariants the packet is valid and ours.
        unsafe { bindings::skb_set_sw_hash(self.as_raw(), hash, false) };
    }

    /// Appends bytes of a buffer shared with the host.
    #[inline]
    pub fn append(&mut self, bytes: &SharedBytes<'_>) -> Result {
        // SAFETY: By the type invariants the packet is valid.
        if (unsafe { bindings::skb_tailroom(self.as_raw()) } as usize) < bytes.len() {
            return Err(EMSGSIZE);
        }
        // SAFETY: There is room for the bytes, as was checked, in private memory of the packet. The
        // source is valid, and whatever the host makes of it meanwhile is some bytes.
        unsafe {
            let to = bindings::skb_put_bytes(self.as_raw(), bytes.len() as c_uint);
            core::ptr::copy_nonoverlapping(
                bytes.as_ptr().cast_const(),
                to.cast::<u8>(),
                bytes.len(),
            );
        }
        Ok(())
    }

    /// Turns the data of a received frame into a packet for the stack: takes the Ethernet header
    /// off and notes what the hardware knows. Tells what kind of address it was sent to.
    #[inline]
    pub fn received(&mut self, dev: &NetDevice, info: &RxInfo) -> Result<Destination> {
        if self.head_len() < bindings::ETH_HLEN {
            return Err(EMSGSIZE);
        }
        // SAFETY: By the type invariants the packet is valid and ours; it has an Ethernet header.
        // The device is valid.
        unsafe {
            let protocol = bindings::eth_type_trans(self.as_raw(), dev.as_raw());
            bindings::skb_set_protocol(self.as_raw(), protocol);
        }
        if info.compute_ip_checksum && self.protocol() == ETH_P_IP {
            // SAFETY: By the type invariants the packet is valid and ours, with the IP header in
            // front now; the length is checked.
            if !unsafe { bindings::skb_fix_ip_checksum(self.as_raw()) } {
                return Err(EMSGSIZE);
            }
        }
        // SAFETY: By the type invariants the packet is valid and ours.
        unsafe {
            if info.checksum_ok {
                bindings::skb_set_csum_unnecessary(self.as_raw());
            }
            if let Some(hash) = info.hash {
                bindings::skb_set_l4_hash(self.as_raw(), hash);
            }
            if let Some(tci) = info.vlan_tci {
                bindings::vlan_hwaccel_put_ctag(self.as_raw(), tci);
            }
            bindings::skb_record_rx_queue(self.as_raw(), info.queue);
            Ok(match bindings::skb_pkt_class(self.as_raw()) {
                1 => Destination::Broadcast,
                2 => Destination::Multicast,
                _ => Destination::Unicast,
            })
        }
    }

    /// Turns a received packet, whose Ethernet header was taken off, into one to transmit on
    /// `queue`.
    pub fn turn_round(&mut self, queue: u16) -> Result {
        // SAFETY: By the type invariants the packet is valid and ours.
        if !unsafe { bindings::skb_restore_eth_header(self.as_raw()) } {
            return Err(EINVAL);
        }
        // SAFETY: As above.
        unsafe { (*self.as_raw()).queue_mapping = queue };
        Ok(())
    }
}

/// A place for a packet that several threads can put packets into and take out of.
///
/// # Invariants
///
/// The pointer is null, or points to a valid packet, which is ours.
pub struct AtomicSkBuff(Atomic<*mut bindings::sk_buff>);

impl AtomicSkBuff {
    /// Nothing.
    pub const fn new() -> Self {
        // INVARIANT: The pointer is null.
        Self(Atomic::new(null_mut()))
    }

    /// Puts a packet, or nothing, there and returns what was there.
    #[inline]
    pub fn swap(&self, skb: Option<SkBuff>) -> Option<SkBuff> {
        // INVARIANT: The pointer is null or that of a packet, which is not its former owner's now.
        let old = self.0.xchg(skb.map_or(null_mut(), SkBuff::into_raw), Full);
        // SAFETY: By the type invariants the packet is valid, and has no other owner now.
        NonNull::new(old).map(|skb| unsafe { SkBuff::from_raw(skb) })
    }

    /// Takes the packet out.
    #[inline]
    pub fn take(&self) -> Option<SkBuff> {
        self.swap(None)
    }
}

impl Default for AtomicSkBuff {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for AtomicSkBuff {
    fn drop(&mut self) {
        self.take();
    }
}

impl Drop for SkBuff {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the packet is valid and ours.
        unsafe { bindings::dev_kfree_skb_any(self.as_raw()) };
    }
}

/// The dissected headers of a packet.
pub struct FlowKeys(bindings::flow_keys);

impl FlowKeys {
    /// The transport protocol, if it is one of the four that have a name here.
    #[inline]
    pub fn l4(&self) -> Option<L4> {
        L4::new(u16::from_be(self.0.basic.n_proto), self.0.basic.ip_proto)
    }

    /// A hash over the addresses, 0 if the packet is not IP.
    pub fn address_hash(&self) -> u32 {
        // SAFETY: The keys are valid.
        unsafe { bindings::flow_addrs_hash(&self.0) }
    }

    /// Whether this is IPv4 or IPv6.
    pub fn is_ip(&self) -> bool {
        matches!(u16::from_be(self.0.basic.n_proto), ETH_P_IP | ETH_P_IPV6)
    }
}
