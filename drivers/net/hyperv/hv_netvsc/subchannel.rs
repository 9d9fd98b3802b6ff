// SPDX-License-Identifier: GPL-2.0

//! Subchannels: one more channel for each further queue.
//!
//! The driver asks for a number of them and the host grants as many or fewer; the bus then offers
//! them one by one. When all were offered the queues are spread over those that are open. A queue
//! without a channel of its own transmits on the primary one and receives nothing.

use kernel::{
    prelude::*,
    sync::{
        atomic::Relaxed,
        Arc, //
    },
    time::{
        Delta,
        Instant,
        Monotonic, //
    }, //
};
use net::{
    netdev_err,
    netdev_notice,
    rtnl,
    Device,
    Rtnl, //
};
use vmbus::{
    ChannelHandle,
    ChannelHandler,
    SubchannelOffer, //
};

use crate::{
    connection::{
        open_params,
        Receiver,
        Shared, //
    },
    device::{
        work,
        Netvsc, //
    },
    nvsp,
    rndis, //
};

/// How long the offers may take.
const OFFER_TIMEOUT: Delta = Delta::from_secs(10);

/// The handler of a subchannel.
struct Subchannel(Arc<Receiver>);

impl ChannelHandler for Subchannel {
    fn on_event(&self, channel: &ChannelHandle) {
        self.0.notify(channel);
    }
}

/// The bus offers a subchannel.
pub(crate) fn offered(shared: &Arc<Shared>, dev: &Device<Netvsc>, offer: SubchannelOffer<'_>) {
    let index = offer.offer().subchannel_index();
    let Some(queue) = shared.queues.get(usize::from(index)) else {
        return;
    };
    if index == 0 || queue.channel().is_some() || !shared.wants_subchannels.load(Relaxed) {
        return;
    }
    let opened =
        Arc::pin_init(Receiver::new(dev, shared, index), GFP_KERNEL).and_then(|receiver| {
            // Room for it first: once open, the channel stays.
            shared.subchannels.lock().reserve(1, GFP_KERNEL)?;
            let channel = offer.open(&open_params(), Ok(Subchannel(receiver.clone())))?;
            queue.set_channel(&channel);
            shared.subchannels.lock().push(receiver, GFP_KERNEL)?;
            Ok(())
        });
    if let Err(e) = opened {
        netdev_notice!(dev, "sub channel open failed: {}\n", e.to_errno());
        shared.subchannels_failed.fetch_add(1, Relaxed);
    }
    shared.subchannel_event.complete();
}

/// Waits until `count` subchannels were offered, and opened or given up.
fn wait_for_offers(dev: &Device<Netvsc>, shared: &Shared, count: u32) {
    let start = Instant::<Monotonic>::now();
    loop {
        let failed = shared.subchannels_failed.load(Relaxed);
        if shared.subchannels.lock().len() as u32 + failed >= count {
            return;
        }
        if start.elapsed() >= OFFER_TIMEOUT {
            netdev_err!(dev, "not all of {} sub channels were offered\n", count);
            return;
        }
        match shared
            .hv
            .wait_for(&shared.subchannel_event, Delta::from_secs(1))
        {
            Err(e) if e != ETIMEDOUT => return,
            _ => {}
        }
    }
}

/// Opens the subchannels that the connection can have, and uses them.
///
/// Fails only if the kernel cannot have that many queues.
pub(crate) fn set_up(dev: &Device<Netvsc>, shared: &Shared, rtnl: &Rtnl) -> Result {
    let wanted = shared
        .max_queues
        .load(Relaxed)
        .min(shared.queues.len() as u32);
    if wanted > 1 {
        shared.wants_subchannels.store(true, Relaxed);
        if let Ok(granted) = nvsp::request_subchannels(shared, wanted - 1) {
            wait_for_offers(dev, shared, granted);
        }
        shared.wants_subchannels.store(false, Relaxed);
    }
    let last = shared
        .queues
        .iter()
        .rposition(|queue| queue.channel().is_some());
    let queues = last.unwrap_or(0) as u32 + 1;
    shared.num_queues.store(queues, Relaxed);
    for receiver in shared.subchannels.lock().iter() {
        receiver.bind(rtnl);
    }
    for (queue, stats) in shared.queues.iter().zip(&dev.data().statistics.queues) {
        if let Some(Ok(ring)) = queue.channel().map(|channel| channel.ring()) {
            stats.cpu.set(ring.target_cpu().into());
        }
    }
    // A table that the host has sent is better than ours.
    if !shared.has_send_table.load(Relaxed) {
        for (channel, entry) in dev.data().tx_table.iter().enumerate() {
            entry.store(channel as u32 % queues, Relaxed);
        }
    }
    spread(dev, shared, rtnl);
    dev.set_num_queues(queues, rtnl)
}

/// Fills the indirection table, unless the user has set it, and tells the host.
fn spread(dev: &Device<Netvsc>, shared: &Shared, rtnl: &Rtnl) {
    let queues = shared.num_queues() as u16;
    let keep = dev.is_rxfh_configured(rtnl);
    let mut rss = dev.data().rss.lock();
    if !keep {
        for (i, entry) in rss.table.iter_mut().enumerate() {
            *entry = (i % usize::from(queues)) as u16;
        }
    }
    if queues > 1 && !rss.table.is_empty() {
        // Without it there still are the channels.
        let _ = set_rss(dev, shared, &rss.table, &rss.key);
    }
}

/// The channel that stands in for `wanted`, which the user may have set when there were more.
///
/// The user's table is kept as it is: it counts again when the channels are there again.
pub(crate) fn substitute(shared: &Shared, wanted: u16) -> u16 {
    let is_open = |index: u16| {
        let queue = shared.queues.get(usize::from(index));
        queue.is_some_and(|queue| queue.channel().is_some())
    };
    if is_open(wanted) {
        return wanted;
    }
    let open = (0..shared.num_queues() as u16).filter(|&index| is_open(index));
    let count = open.clone().count();
    open.clone()
        .nth(usize::from(wanted).checked_rem(count).unwrap_or(0))
        .unwrap_or(0)
}

/// Tells the host how to spread received packets.
pub(crate) fn set_rss(
    dev: &Device<Netvsc>,
    shared: &Shared,
    table: &[u16],
    key: &[u8; hyperv_wire::ndis::HASH_KEY_SIZE],
) -> Result {
    let mut channels = KVec::with_capacity(table.len(), GFP_KERNEL)?;
    for entry in table {
        channels.push(substitute(shared, *entry), GFP_KERNEL)?;
    }
    let status = rndis::set_rss(shared, &channels, key)?;
    if status != 0 {
        netdev_err!(dev, "Fail to set RSS parameters:{:#x}\n", status);
        return Err(EINVAL);
    }
    Ok(())
}

/// Opens the subchannels after the probe.
pub(crate) fn work(dev: &Device<Netvsc>) {
    // Whoever cancels this work may hold the RTNL.
    let Some(rtnl) = rtnl::try_lock() else {
        dev.schedule::<{ work::SUBCHANNELS }>(Delta::from_millis(10));
        return;
    };
    if let Some(shared) = dev.data().shared.get() {
        let _ = set_up(dev, &shared, &rtnl);
    }
}
