// SPDX-License-Identifier: GPL-2.0

//! What the adapter counts.

use netvsp::frame;
use vmbus_host::{Counter, Counters};
use zerocopy::{little_endian::U64, FromZeros};

use crate::wire::{PhyStatisticsResponse, StatisticsResponse};

/// Packets and bytes of one kind.
#[derive(Debug, Default)]
struct Kind {
    packets: Counter,
    bytes: Counter,
}

impl Kind {
    fn new(counters: &Counters, prefix: &str) -> Self {
        Self {
            packets: counters.counter(&format!("{prefix}_packets")),
            bytes: counters.counter(&format!("{prefix}_bytes")),
        }
    }

    fn pair(&self) -> [U64; 2] {
        [value(&self.packets), value(&self.bytes)]
    }
}

/// Packets and bytes of one direction.
#[derive(Debug, Default)]
struct Traffic {
    unicast: Kind,
    broadcast: Kind,
    multicast: Kind,
}

impl Traffic {
    fn new(counters: &Counters, prefix: &str) -> Self {
        let kind = |what| Kind::new(counters, &format!("{prefix}_{what}"));
        Self {
            unicast: kind("unicast"),
            broadcast: kind("broadcast"),
            multicast: kind("multicast"),
        }
    }

    fn count(&self, data: &[u8]) {
        let Some(destination) = frame::destination(data) else {
            return;
        };
        let kind = if frame::is_broadcast(&destination) {
            &self.broadcast
        } else if frame::is_group(&destination) {
            &self.multicast
        } else {
            &self.unicast
        };
        kind.packets.inc();
        kind.bytes.add(data.len() as u64);
    }

    fn kinds(&self) -> [&Kind; 3] {
        [&self.unicast, &self.broadcast, &self.multicast]
    }

    fn packets(&self) -> u64 {
        self.kinds().iter().map(|kind| kind.packets.get()).sum()
    }

    fn bytes(&self) -> u64 {
        self.kinds().iter().map(|kind| kind.bytes.get()).sum()
    }
}

fn value(counter: &Counter) -> U64 {
    U64::new(counter.get())
}

/// What the adapter counts.
#[derive(Debug, Default)]
pub struct Statistics {
    rx: Traffic,
    tx: Traffic,
    /// Packets dropped because the driver had posted no buffer.
    pub rx_no_wqe: Counter,
    /// Packets dropped because receiving is off.
    pub rx_disabled: Counter,
    /// Packets dropped because they are longer than the buffer.
    pub rx_too_long: Counter,
    /// Packets not sent because of wrong out-of-band data.
    pub tx_invalid_oob: Counter,
    /// Packets not sent because of a wrong virtual port.
    pub tx_wrong_vport: Counter,
    /// Packets not sent because the link is down or the adapter is being reset.
    pub tx_disabled: Counter,
    /// Queues and requests that made no sense.
    pub faults: Counter,
}

impl Statistics {
    /// The counters `NAME.*`.
    pub fn new(counters: &Counters, name: &str) -> Self {
        let counter = |what| counters.counter(&format!("{name}.{what}"));
        Self {
            rx: Traffic::new(counters, &format!("{name}.rx")),
            tx: Traffic::new(counters, &format!("{name}.tx")),
            rx_no_wqe: counter("rx_no_wqe"),
            rx_disabled: counter("rx_disabled"),
            rx_too_long: counter("rx_too_long"),
            tx_invalid_oob: counter("tx_invalid_oob"),
            tx_wrong_vport: counter("tx_wrong_vport"),
            tx_disabled: counter("tx_disabled"),
            faults: counter("faults"),
        }
    }

    /// A packet was received.
    pub fn received(&self, data: &[u8]) {
        self.rx.count(data);
    }

    /// A packet was sent.
    pub fn sent(&self, data: &[u8]) {
        self.tx.count(data);
    }

    /// Answer to the driver's query, which names what it wants.
    pub fn response(&self, wanted: u64) -> StatisticsResponse {
        let mut response = StatisticsResponse::new_zeroed();
        response.reported = U64::new(wanted);
        response.rx_discards_no_wqe = value(&self.rx_no_wqe);
        response.rx_err_vport_disabled = value(&self.rx_disabled);
        response.rx_bytes = U64::new(self.rx.bytes());
        response.rx_unicast = self.rx.unicast.pair();
        response.rx_broadcast = self.rx.broadcast.pair();
        response.rx_multicast = self.rx.multicast.pair();
        response.tx_err_vport_disabled = value(&self.tx_disabled);
        response.tx_err_vport_offset = value(&self.tx_wrong_vport);
        response.tx_err_oob = value(&self.tx_invalid_oob);
        response.tx_bytes = U64::new(self.tx.bytes());
        response.tx_unicast = self.tx.unicast.pair();
        response.tx_broadcast = self.tx.broadcast.pair();
        response.tx_multicast = self.tx.multicast.pair();
        response.tx_err_gdma = value(&self.faults);
        response
    }

    /// Answer to the driver's query about the physical port: all traffic is of class 0.
    pub fn phy_response(&self) -> PhyStatisticsResponse {
        let mut response = PhyStatisticsResponse::new_zeroed();
        response.rx_drops = U64::new(self.rx_no_wqe.get() + self.rx_too_long.get());
        response.tx_drops = value(&self.tx_disabled);
        response.packets[0] = [U64::new(self.rx.packets()), U64::new(self.tx.packets())];
        response.bytes[0] = [U64::new(self.rx.bytes()), U64::new(self.tx.bytes())];
        response
    }
}
