// SPDX-License-Identifier: GPL-2.0

//! The link, as the host indicates it.
//!
//! Indications are handled in order, and at most one in two seconds: the kernel tells others about
//! the state of a link once a second, so a faster change would be lost.

use hyperv_wire::rndis::{
    Indication,
    Status, //
};
use kernel::{
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    },
    time::{
        Delta,
        Instant,
        Monotonic, //
    }, //
};
use net::{
    net_ratelimit,
    netdev_err,
    rtnl,
    Device,
    Rtnl, //
};
use vmbus::{
    new_spinlock_irq,
    sync::SpinLockIrq, //
};

use crate::{
    connection::Shared,
    device::{
        disable_tx,
        enable_tx,
        work,
        Netvsc, //
    }, //
};

/// Shortest time between two changes.
const INTERVAL: Delta = Delta::from_secs(2);

/// Changes that can wait. A host that indicates more of them within seconds makes no sense.
const WAITING_MAX: usize = 16;

/// The host gives the speed in units of 100 bit/s, the kernel has Mbit/s.
const SPEED_UNIT: u32 = 10_000;

/// The speed is not known (`SPEED_UNKNOWN`).
const SPEED_UNKNOWN: u32 = u32::MAX;

/// Full duplex (`DUPLEX_FULL`).
const DUPLEX_FULL: u32 = 1;

/// A change of the link.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Change {
    Connected,
    Disconnected,
    /// To be shown as a disconnection and a connection.
    Network,
}

struct Changes {
    waiting: [Option<Change>; WAITING_MAX],
    last: Option<Instant<Monotonic>>,
}

impl Changes {
    fn push(&mut self, change: Change) {
        if let Some(place) = self.waiting.iter_mut().find(|place| place.is_none()) {
            *place = Some(change);
        }
    }

    fn push_first(&mut self, change: Change) {
        self.waiting.rotate_right(1);
        self.waiting[0] = Some(change);
    }

    fn pop(&mut self) -> Option<Change> {
        let first = self.waiting[0].take();
        self.waiting.rotate_left(1);
        first
    }

    fn is_empty(&self) -> bool {
        self.waiting[0].is_none()
    }
}

/// The state of the link.
#[pin_data]
pub(crate) struct Link {
    #[pin]
    changes: SpinLockIrq<Changes>,
    /// In Mbit/s.
    pub(crate) speed: Atomic<u32>,
    /// `DUPLEX_*`.
    pub(crate) duplex: Atomic<u32>,
}

impl Link {
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            changes <- new_spinlock_irq!(
                Changes {
                    waiting: [None; WAITING_MAX],
                    last: None,
                },
                "hv_netvsc::link"
            ),
            speed: Atomic::new(SPEED_UNKNOWN),
            duplex: Atomic::new(DUPLEX_FULL),
        })
    }

    /// Sets the speed, in the host's unit.
    pub(crate) fn set_speed(&self, speed: u32) {
        self.speed.store(speed / SPEED_UNIT, Relaxed);
    }
}

/// The host indicates something.
pub(crate) fn indicated(dev: &Device<Netvsc>, indication: &Indication<'_>) {
    let link = &dev.data().link;
    let change = match indication.status {
        Status::LINK_SPEED_CHANGE => {
            match indication.buffer.first_chunk() {
                Some(speed) => link.set_speed(u32::from_le_bytes(*speed)),
                None if net_ratelimit() => {
                    netdev_err!(dev, "invalid rndis_indicate_status packet\n");
                }
                None => {}
            }
            return;
        }
        Status::MEDIA_CONNECT => Change::Connected,
        Status::MEDIA_DISCONNECT => Change::Disconnected,
        Status::NETWORK_CHANGE => Change::Network,
        _ => return,
    };
    if !dev.is_registered() {
        return;
    }
    link.changes.lock().push(change);
    dev.schedule::<{ work::LINK }>(Delta::ZERO);
}

/// Handles the next change.
pub(crate) fn work(dev: &Device<Netvsc>) {
    // Whoever has the RTNL is changing things.
    let Some(rtnl) = rtnl::try_lock() else {
        dev.schedule::<{ work::LINK }>(INTERVAL);
        return;
    };
    let Some(shared) = dev.data().shared.get() else {
        return;
    };
    let mut changes = dev.data().link.changes.lock();
    if let Some(last) = changes.last {
        let elapsed = last.elapsed();
        if elapsed < INTERVAL {
            drop(changes);
            let left = INTERVAL.as_millis() - elapsed.as_millis();
            dev.schedule::<{ work::LINK }>(Delta::from_millis(left + 1));
            return;
        }
    }
    changes.last = Some(Instant::now());
    let change = changes.pop();
    drop(changes);

    let again = change.and_then(|change| apply(dev, &shared, change, &rtnl));
    let mut changes = dev.data().link.changes.lock();
    if let Some(again) = again {
        changes.push_first(again);
    }
    let more = !changes.is_empty();
    drop(changes);
    drop(rtnl);
    if more {
        dev.schedule::<{ work::LINK }>(INTERVAL);
    }
}

fn set_down(dev: &Device<Netvsc>, shared: &Shared) {
    shared.link_down.store(true, Relaxed);
    dev.set_carrier(false);
    disable_tx(dev, Some(shared));
}

/// Applies a change, and returns what is to follow it.
fn apply(dev: &Device<Netvsc>, shared: &Shared, change: Change, rtnl: &Rtnl) -> Option<Change> {
    let was_down = shared.link_down.load(Relaxed);
    match change {
        Change::Connected if was_down => {
            shared.link_down.store(false, Relaxed);
            dev.set_carrier(true);
            enable_tx(dev, shared);
        }
        // It may be another network: switches have to learn the address.
        Change::Connected => dev.notify_peers(rtnl),
        Change::Disconnected if !was_down => set_down(dev, shared),
        Change::Network if !was_down => {
            set_down(dev, shared);
            return Some(Change::Connected);
        }
        Change::Disconnected | Change::Network => {}
    }
    None
}
