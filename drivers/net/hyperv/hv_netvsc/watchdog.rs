// SPDX-License-Identifier: GPL-2.0

//! What happens when a queue cannot transmit any more.
//!
//! A queue is stopped when its ring is full or too much is on its way, and the host's completions
//! start it again. When they do not come, because the host has lost one or has stopped reading the
//! ring, the core's watchdog finds the queue stopped for [`TIMEOUT`]. The connection is then made
//! anew, which gives both sides empty rings.
//!
//! A host that is only slow must not be reset over and over: each further attempt waits twice as
//! long, and there are [`ATTEMPTS_MAX`] of them until something is completed again.

use kernel::{
    prelude::*,
    time::{
        Delta,
        Instant,
        Monotonic, //
    }, //
};
use net::{
    netdev_err,
    netdev_info,
    netdev_warn,
    rtnl,
    Device,
    Rtnl, //
};

use crate::{
    config::Config,
    device::{
        attach,
        detach_stuck,
        present_config,
        work,
        Netvsc, //
    },
    status, //
};

/// How long a queue may be stopped: longer than any answer of the host may take.
pub(crate) const TIMEOUT: Delta = Delta::from_secs(15);

/// Attempts without success.
const ATTEMPTS_MAX: u32 = 8;

/// Time between the first and the second attempt, in seconds.
const BACKOFF: i64 = 10;

/// The state of recovering.
pub(crate) struct Recovery {
    /// The queue that is stuck.
    queue: u32,
    /// How often the core has found a stuck queue.
    pub(crate) timeouts: u64,
    /// How often a connection was made anew for that.
    pub(crate) recovered: u64,
    /// Attempts since something was completed.
    attempts: u32,
    /// When the last one was.
    last: Option<Instant<Monotonic>>,
    /// Packets that had been completed then.
    completed: u64,
    /// The settings of a connection that could not be made again.
    lost: Option<Config>,
}

impl Recovery {
    pub(crate) const fn new() -> Self {
        Self {
            queue: 0,
            timeouts: 0,
            recovered: 0,
            attempts: 0,
            last: None,
            completed: 0,
            lost: None,
        }
    }

    /// Milliseconds until the next attempt, `None` if there shall be no more.
    fn wait(&self) -> Option<i64> {
        let Some(last) = self.last.filter(|_| self.attempts > 0) else {
            return Some(0);
        };
        if self.attempts >= ATTEMPTS_MAX {
            return None;
        }
        let pause = (BACKOFF << (self.attempts - 1)) * 1000;
        Some((pause - last.elapsed().as_millis()).max(0))
    }
}

/// The core has found a queue that was stopped for too long. Does not sleep.
pub(crate) fn timed_out(dev: &Device<Netvsc>, queue: u32) {
    let mut recovery = dev.data().recovery.lock();
    recovery.timeouts += 1;
    recovery.queue = queue;
    drop(recovery);
    dev.schedule::<{ work::RECOVER }>(Delta::ZERO);
}

/// Makes the connection anew, if that is still called for.
pub(crate) fn work(dev: &Device<Netvsc>) {
    // Whoever cancels this work may hold the RTNL.
    let Some(rtnl) = rtnl::try_lock() else {
        dev.schedule::<{ work::RECOVER }>(Delta::from_millis(10));
        return;
    };
    if !dev.is_registered() {
        return;
    }
    let queues = &dev.data().statistics.queues;
    let completed = queues.iter().map(|queue| queue.tx_packets.get()).sum();
    let mut recovery = dev.data().recovery.lock();
    if recovery.completed != completed {
        recovery.attempts = 0;
    }
    let lost = recovery.lost.clone();
    let queue = recovery.queue;
    drop(recovery);
    if lost.is_none() && !is_stuck(dev, queue as u16) {
        return;
    }
    let mut recovery = dev.data().recovery.lock();
    match recovery.wait() {
        Some(0) => {}
        Some(millis) => {
            drop(recovery);
            dev.schedule::<{ work::RECOVER }>(Delta::from_millis(millis));
            return;
        }
        None => {
            // Said once: afterwards the numbers of attempts differ.
            if recovery.attempts == ATTEMPTS_MAX {
                recovery.attempts += 1;
                netdev_err!(dev, "transmitting could not be recovered\n");
            }
            return;
        }
    }
    recovery.attempts += 1;
    recovery.last = Some(Instant::now());
    recovery.completed = completed;
    let attempt = recovery.attempts;
    drop(recovery);

    let config = match lost {
        Some(config) => Ok(config),
        None => give_up(dev, queue as u16, attempt, &rtnl),
    };
    let result = config.and_then(|config| {
        let attached = status::reconnecting(dev, "stuck queue", || attach(dev, &config, &rtnl));
        dev.data().recovery.lock().lost = attached.is_err().then_some(config);
        attached
    });
    match result {
        Ok(()) => {
            dev.data().recovery.lock().recovered += 1;
            netdev_info!(dev, "connection made anew\n");
        }
        Err(e) => {
            netdev_err!(dev, "connection could not be made anew: {}\n", e.to_errno());
            dev.schedule::<{ work::RECOVER }>(Delta::from_secs(1));
        }
    }
}

/// Whether a queue waits for something that does not come.
fn is_stuck(dev: &Device<Netvsc>, queue: u16) -> bool {
    use kernel::sync::atomic::Relaxed;
    let Some(shared) = dev.data().shared.get() else {
        return false;
    };
    // Without a link, or while something is being changed, queues are stopped on purpose.
    dev.is_running()
        && dev.has_carrier()
        && !shared.tx_disabled.load(Relaxed)
        && dev.is_queue_blocked(queue)
        && shared
            .queues
            .get(usize::from(queue))
            .is_some_and(|queue| queue.tx.in_flight() > 0)
}

/// Ends the connection that does not work, and returns its settings.
fn give_up(dev: &Device<Netvsc>, queue: u16, attempt: u32, rtnl: &Rtnl) -> Result<Config> {
    let shared = dev.data().connected()?;
    let config = present_config(&shared)?;
    let state = shared.queues.get(usize::from(queue)).ok_or(EINVAL)?;
    let free = state
        .channel()
        .and_then(|channel| channel.ring().ok())
        .map_or(0, |ring| ring.write_space_percent());
    netdev_warn!(
        dev,
        "transmit queue {} is stuck: {} messages in flight, {} % of the ring free; \
         making the connection anew, attempt {}\n",
        queue,
        state.tx.in_flight(),
        free,
        attempt
    );
    detach_stuck(dev, shared, rtnl);
    Ok(config)
}
