// SPDX-License-Identifier: GPL-2.0
//! What the lab runs on both ends of its connections.
//!
//! In the guest, [`serve`] takes commands over the second serial port; the
//! other end is [`client`], used by the scenario runner.  The traffic tools
//! ([`frames`], [`udp`], [`tcp`]) run in the guest and in the network
//! namespace of its peer; each prints one JSON report when it ends.

pub mod client;
pub mod count;
pub mod counters;
pub mod flood;
pub mod frames;
pub mod gap;
pub mod module;
pub mod netdev;
pub mod netns;
pub mod packet;
pub mod pattern;
pub mod protocol;
pub mod rr;
pub mod serve;
pub mod tcp;
pub mod udp;
