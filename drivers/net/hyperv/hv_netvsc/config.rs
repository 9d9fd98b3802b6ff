// SPDX-License-Identifier: GPL-2.0

//! Module parameters, and the settings of a connection to the host.

use hyperv_wire::{
    ndis,
    nvsp, //
};
use kernel::{
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    }, //
};
use net::MessageLevel;

/// Fewest pages of a ring.
const RING_SIZE_MIN: u32 = 64;

/// Most channels of a device.
pub(crate) const CHANNELS_MAX: u32 = nvsp::MAX_CHANNELS as u32;
/// Channels that are asked for unless there are more CPUs to use.
const CHANNELS_DEFAULT: u32 = 16;

/// Bytes of a receive section by default.
const RECV_SECTION_SIZE: u32 = 1728;
/// Bytes of a send section by default.
const SEND_SECTION_SIZE: u32 = 6144;
/// Bytes of the receive buffer by default.
const RECV_BUFFER: u32 = 16 << 20;
/// Bytes of the send buffer by default.
const SEND_BUFFER: u32 = 1 << 20;

/// Fewest sections of a buffer.
pub(crate) const SECTIONS_MIN: u32 = 10;

static RING_BYTES: Atomic<usize> = Atomic::new(0);
static DEBUG: Atomic<i32> = Atomic::new(-1);

/// Takes the module parameters over.
pub(crate) fn init(ring_size: u32, debug: i32) {
    let ring_size = if ring_size < RING_SIZE_MIN {
        pr_info!("Increased ring_size to {} (min allowed)\n", RING_SIZE_MIN);
        RING_SIZE_MIN
    } else {
        ring_size
    };
    let payload = (ring_size as usize).saturating_mul(vmbus::HV_PAGE_SIZE);
    RING_BYTES.store(vmbus::ring_size(payload), Relaxed);
    DEBUG.store(debug, Relaxed);
}

/// Bytes of a ring.
pub(crate) fn ring_bytes() -> usize {
    RING_BYTES.load(Relaxed)
}

/// What goes to the log at first.
pub(crate) fn message_level() -> MessageLevel {
    const DEFAULT: MessageLevel = MessageLevel::DRV
        .with(MessageLevel::PROBE)
        .with(MessageLevel::LINK)
        .with(MessageLevel::IFUP)
        .with(MessageLevel::IFDOWN)
        .with(MessageLevel::RX_ERR)
        .with(MessageLevel::TX_ERR);
    MessageLevel::from_parameter(DEBUG.load(Relaxed), DEFAULT)
}

/// How to connect to the host.
#[derive(Clone)]
pub(crate) struct Config {
    /// Channels to use, if the host has that many.
    pub(crate) channels: u32,
    /// Number of receive sections.
    pub(crate) recv_sections: u32,
    /// Bytes of a receive section.
    pub(crate) recv_section_size: u32,
    /// Number of send sections.
    pub(crate) send_sections: u32,
    /// Bytes of a send section.
    pub(crate) send_section_size: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            channels: CHANNELS_DEFAULT.max(net::num_default_rss_queues()),
            recv_sections: RECV_BUFFER / RECV_SECTION_SIZE,
            recv_section_size: RECV_SECTION_SIZE,
            send_sections: SEND_BUFFER / SEND_SECTION_SIZE,
            send_section_size: SEND_SECTION_SIZE,
        }
    }
}

/// The key of the receive hash until the user sets another one: the one that all hosts use.
pub(crate) const HASH_KEY: [u8; ndis::HASH_KEY_SIZE] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0,
    0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c,
    0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
];
