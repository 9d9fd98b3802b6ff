// SPDX-License-Identifier: GPL-2.0

//! Counters.
//!
//! They belong to the device and not to its connection to the host, so they go on when the
//! connection is made anew.

use kernel::{
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    }, //
};
use net::PerCpuCounters;

use crate::config::CHANNELS_MAX;

/// A counter with one writer at a time.
///
/// Several writers are no danger but may lose a count, as those of C's driver do.
pub(crate) struct Counter(Atomic<u64>);

impl Default for Counter {
    fn default() -> Self {
        Self::new()
    }
}

impl Counter {
    /// Zero.
    pub(crate) const fn new() -> Self {
        Self(Atomic::new(0))
    }

    /// Adds `n`.
    pub(crate) fn add(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }

    /// Sets the value.
    pub(crate) fn set(&self, value: u64) {
        self.0.store(value, Relaxed);
    }

    /// The count.
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// What happens rarely, in the order of `ethtool -S`.
macro_rules! events {
    ($($name:ident),* $(,)?) => {
        /// Counters of what happens rarely.
        #[derive(Default)]
        pub(crate) struct Events {
            $(pub(crate) $name: Counter,)*
        }

        impl Events {
            /// Names of the counters.
            pub(crate) const NAMES: &'static [&'static str] = &[$(stringify!($name),)*];

            /// The counters, in the order of the names.
            pub(crate) fn values(&self) -> impl Iterator<Item = u64> {
                [$(self.$name.get(),)*].into_iter()
            }
        }
    };
}

events! {
    tx_scattered,
    tx_no_memory,
    tx_no_space,
    tx_too_big,
    tx_busy,
    tx_send_full,
    rx_comp_busy,
    rx_no_memory,
    stop_queue,
    wake_queue,
    vlan_error,
}

/// Counters of a queue.
#[derive(Default)]
pub(crate) struct QueueStats {
    /// Packets transmitted.
    pub(crate) tx_packets: Counter,
    /// Bytes transmitted.
    pub(crate) tx_bytes: Counter,
    /// Packets received.
    pub(crate) rx_packets: Counter,
    /// Bytes received.
    pub(crate) rx_bytes: Counter,
    /// Broadcast and multicast packets received.
    pub(crate) rx_multicast: Counter,
    /// Received frames that an XDP program dropped.
    pub(crate) xdp_drop: Counter,
    /// Received frames that it redirected.
    pub(crate) xdp_redirect: Counter,
    /// Received frames that it sent back.
    pub(crate) xdp_tx: Counter,
    /// Frames transmitted that were redirected to the device.
    pub(crate) xdp_xmit: Counter,
    /// Received packets lost for want of memory.
    pub(crate) rx_no_memory: Counter,
    /// How often transmitting was stopped.
    pub(crate) stop: Counter,
    /// How often it was started again.
    pub(crate) wake: Counter,
    /// CPU of the queue's channel.
    pub(crate) cpu: Counter,
}

impl QueueStats {
    /// What the receive queue has counted.
    pub(crate) fn rx(&self) -> net::RxQueueStats {
        net::RxQueueStats {
            packets: self.rx_packets.get(),
            bytes: self.rx_bytes.get(),
            alloc_fail: self.rx_no_memory.get(),
        }
    }

    /// What the transmit queue has counted.
    pub(crate) fn tx(&self) -> net::TxQueueStats {
        net::TxQueueStats {
            packets: self.tx_packets.get(),
            bytes: self.tx_bytes.get(),
            stop: self.stop.get(),
            wake: self.wake.get(),
        }
    }
}

/// Indices of the counters of the VF.
pub(crate) mod vf {
    pub(crate) const RX_PACKETS: usize = 0;
    pub(crate) const RX_BYTES: usize = 1;
    pub(crate) const TX_PACKETS: usize = 2;
    pub(crate) const TX_BYTES: usize = 3;
    pub(crate) const TX_DROPPED: usize = 4;
    pub(crate) const COUNT: usize = 5;

    /// Names of the counters.
    pub(crate) const NAMES: [&str; COUNT] = [
        "vf_rx_packets",
        "vf_rx_bytes",
        "vf_tx_packets",
        "vf_tx_bytes",
        "vf_tx_dropped",
    ];
}

/// All counters of a device.
pub(crate) struct Statistics {
    /// What happens rarely.
    pub(crate) events: Events,
    /// Of each queue.
    pub(crate) queues: KVec<QueueStats>,
    /// Of the VF, on each CPU.
    pub(crate) vf: PerCpuCounters<{ vf::COUNT }>,
    /// Packets that could not be transmitted.
    pub(crate) tx_dropped: Counter,
}

impl Statistics {
    /// All zero.
    pub(crate) fn new() -> Result<Self> {
        let mut queues = KVec::with_capacity(CHANNELS_MAX as usize, GFP_KERNEL)?;
        for _ in 0..CHANNELS_MAX {
            queues.push(QueueStats::default(), GFP_KERNEL)?;
        }
        Ok(Self {
            events: Events::default(),
            queues,
            vf: PerCpuCounters::new()?,
            tx_dropped: Counter::new(),
        })
    }

    /// What the device has counted beside its first `rx` receive and `tx` transmit queues: the VF's
    /// packets, and those of queues that are not in use any more.
    pub(crate) fn base(&self, rx: u32, tx: u32) -> (net::RxQueueStats, net::TxQueueStats) {
        let vf = self.vf.sum();
        let mut base_rx = net::RxQueueStats {
            packets: vf[vf::RX_PACKETS],
            bytes: vf[vf::RX_BYTES],
            alloc_fail: 0,
        };
        let mut base_tx = net::TxQueueStats {
            packets: vf[vf::TX_PACKETS],
            bytes: vf[vf::TX_BYTES],
            stop: 0,
            wake: 0,
        };
        for queue in self.queues.iter().skip(rx as usize) {
            let stats = queue.rx();
            base_rx.packets += stats.packets;
            base_rx.bytes += stats.bytes;
            base_rx.alloc_fail += stats.alloc_fail;
        }
        for queue in self.queues.iter().skip(tx as usize) {
            let stats = queue.tx();
            base_tx.packets += stats.packets;
            base_tx.bytes += stats.bytes;
            base_tx.stop += stats.stop;
            base_tx.wake += stats.wake;
        }
        (base_rx, base_tx)
    }

    /// The sums for `ip -s link`.
    pub(crate) fn sum(&self) -> net::Stats {
        let vf = self.vf.sum();
        let mut sum = net::Stats {
            rx_packets: vf[vf::RX_PACKETS],
            rx_bytes: vf[vf::RX_BYTES],
            tx_packets: vf[vf::TX_PACKETS],
            tx_bytes: vf[vf::TX_BYTES],
            tx_dropped: vf[vf::TX_DROPPED] + self.tx_dropped.get(),
            multicast: 0,
        };
        for queue in &self.queues {
            sum.rx_packets += queue.rx_packets.get();
            sum.rx_bytes += queue.rx_bytes.get();
            sum.tx_packets += queue.tx_packets.get();
            sum.tx_bytes += queue.tx_bytes.get();
            sum.multicast += queue.rx_multicast.get();
        }
        sum
    }
}
