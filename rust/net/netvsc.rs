// SPDX-License-Identifier: GPL-2.0

//! What belongs to the driver hv_netvsc alone, but can only be defined in C: the module parameters
//! and the tracepoints of the trace system `netvsc`.
//!
//! A tracepoint that is off costs a jump over nothing: what would be recorded is computed only when
//! it is on. They may be hit in any context.

use hyperv_bindings as bindings;

use crate::NetDevice;

/// The parameter `ring_size`: pages of a ring.
pub fn ring_size() -> u32 {
    // SAFETY: The variable is set before the module's initialisation only.
    unsafe { bindings::hyperv_netvsc_ring_size }
}

/// The parameter `debug`: the message level, or -1.
pub fn debug() -> i32 {
    // SAFETY: The variable is set before the module's initialisation only.
    unsafe { bindings::hyperv_netvsc_debug }
}

/// Whether a tracepoint is on.
macro_rules! is_on {
    ($tracepoint:ident) => {
        // SAFETY: The key is that of a tracepoint defined in C.
        unsafe {
            kernel::jump_label::static_branch_unlikely!(
                bindings::$tracepoint,
                kernel::bindings::tracepoint,
                key
            )
        }
    };
}

/// What is recorded of an RNDIS message.
#[derive(Clone, Copy, Default)]
pub struct RndisMessage {
    /// The request's id; of messages that are no requests, what is in its place.
    pub request_id: u32,
    /// Kind of the message.
    pub kind: u32,
    /// Length that the message gives.
    pub len: u32,
}

/// What is recorded of an NVSP message that announces a packet to the host.
#[derive(Clone, Copy)]
pub struct SentPacket {
    /// Number of the channel.
    pub channel: u16,
    /// 0 for data, 1 for control messages.
    pub kind: u32,
    /// The section of the send buffer, or `u32::MAX`.
    pub section: u32,
    /// Bytes in the section.
    pub len: u32,
}

/// An RNDIS request is sent.
#[inline(always)]
pub fn trace_rndis_send(dev: &NetDevice, queue: u16, message: impl FnOnce() -> RndisMessage) {
    if is_on!(__tracepoint_rndis_send) {
        let RndisMessage {
            request_id,
            kind,
            len,
        } = message();
        // SAFETY: The device is valid.
        unsafe { bindings::rust_do_trace_rndis_send(dev.as_raw(), queue, request_id, kind, len) };
    }
}

/// An RNDIS message was received.
#[inline(always)]
pub fn trace_rndis_recv(dev: &NetDevice, queue: u16, message: impl FnOnce() -> RndisMessage) {
    if is_on!(__tracepoint_rndis_recv) {
        let RndisMessage {
            request_id,
            kind,
            len,
        } = message();
        // SAFETY: The device is valid.
        unsafe { bindings::rust_do_trace_rndis_recv(dev.as_raw(), queue, request_id, kind, len) };
    }
}

/// An NVSP message is sent, other than one that announces a packet.
#[inline(always)]
pub fn trace_nvsp_send(dev: &NetDevice, kind: u32) {
    if is_on!(__tracepoint_nvsp_send) {
        // SAFETY: The device is valid.
        unsafe { bindings::rust_do_trace_nvsp_send(dev.as_raw(), kind) };
    }
}

/// An NVSP message that announces a packet is sent.
#[inline(always)]
pub fn trace_nvsp_send_pkt(dev: &NetDevice, packet: impl FnOnce() -> SentPacket) {
    if is_on!(__tracepoint_nvsp_send_pkt) {
        let SentPacket {
            channel,
            kind,
            section,
            len,
        } = packet();
        // SAFETY: The device is valid.
        unsafe {
            bindings::rust_do_trace_nvsp_send_pkt(dev.as_raw(), channel, kind, section, len);
        }
    }
}

/// An NVSP message was received by a channel; the closure gives its kind.
#[inline(always)]
pub fn trace_nvsp_recv(dev: &NetDevice, channel: u16, kind: impl FnOnce() -> u32) {
    if is_on!(__tracepoint_nvsp_recv) {
        // SAFETY: The device is valid.
        unsafe { bindings::rust_do_trace_nvsp_recv(dev.as_raw(), channel, kind()) };
    }
}
