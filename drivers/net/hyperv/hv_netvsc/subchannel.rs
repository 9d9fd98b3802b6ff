// SPDX-License-Identifier: GPL-2.0

//! Subchannels: one more channel for each further queue.
//!
//! The driver asks for a number of them and the host grants as many or fewer; the bus then offers
//! them one by one. When all are open the queues are spread over them. If anything goes wrong the
//! device goes on with its primary channel alone.

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

/// Waits until `count` subchannels were offered.
fn wait_for_offers(shared: &Shared, count: u32) -> Result {
    let start = Instant::<Monotonic>::now();
    loop {
        let failed = shared.subchannels_failed.load(Relaxed);
        if failed != 0 {
            return Err(EIO);
        }
        if shared.subchannels.lock().len() as u32 >= count {
            return Ok(());
        }
        if start.elapsed() >= OFFER_TIMEOUT {
            return Err(ETIMEDOUT);
        }
        match shared
            .hv
            .wait_for(&shared.subchannel_event, Delta::from_secs(1))
        {
            Err(e) if e == ETIMEDOUT => {}
            other => other?,
        }
    }
}

/// Opens the subchannels that the connection can have, and uses them.
pub(crate) fn set_up(dev: &Device<Netvsc>, shared: &Shared, rtnl: &Rtnl) -> Result {
    let wanted = shared
        .max_queues
        .load(Relaxed)
        .min(shared.queues.len() as u32);
    let result = if wanted > 1 {
        shared.wants_subchannels.store(true, Relaxed);
        let granted = nvsp::request_subchannels(shared, wanted - 1)
            .inspect_err(|_| netdev_err!(dev, "sub channel request failed\n"))
            .and_then(|granted| wait_for_offers(shared, granted).map(|()| granted));
        shared.wants_subchannels.store(false, Relaxed);
        granted
    } else {
        Ok(0)
    };
    let queues = match result {
        Ok(granted) => granted + 1,
        Err(_) => {
            shared.max_queues.store(1, Relaxed);
            1
        }
    };
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
    dev.set_num_queues(queues, rtnl)?;
    result.map(|_| ())
}

/// Fills the indirection table, unless the user has set it, and tells the host.
fn spread(dev: &Device<Netvsc>, shared: &Shared, rtnl: &Rtnl) {
    let queues = shared.num_queues() as u16;
    let keep = dev.is_rxfh_configured(rtnl);
    let mut rss = dev.data().rss.lock();
    for (i, entry) in rss.table.iter_mut().enumerate() {
        if !keep {
            *entry = (i % usize::from(queues)) as u16;
        } else if *entry >= queues {
            // What the user wanted is not there any more.
            *entry %= queues;
        }
    }
    if queues > 1 && !rss.table.is_empty() {
        // Without it there still are the channels.
        let _ = set_rss(dev, shared, &rss.table, &rss.key);
    }
}

/// Tells the host how to spread received packets.
pub(crate) fn set_rss(
    dev: &Device<Netvsc>,
    shared: &Shared,
    table: &[u16],
    key: &[u8; hyperv_wire::ndis::HASH_KEY_SIZE],
) -> Result {
    let status = rndis::set_rss(shared, table, key)?;
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
