// SPDX-License-Identifier: GPL-2.0

//! What `ethtool` shows and sets.

use hyperv_wire::{
    ndis,
    nvsp::{
        Version,
        MAX_SEND_BUFFER,
        SEND_TABLE_SIZE, //
    }, //
};
use kernel::{
    prelude::*,
    sync::atomic::Relaxed, //
};
use net::{
    eopnotsupp,
    Channels,
    Device,
    Ethtool,
    LinkSettings,
    MessageLevel,
    RingSizes,
    Rtnl,
    Rxfh,
    RxfhFields,
    Strings,
    L4, //
};

use crate::{
    config::SECTIONS_MIN,
    connection::Shared,
    device::{
        present_config,
        reconnect,
        Netvsc, //
    },
    nvsp::max_recv_buffer,
    stats::{
        self,
        Events, //
    },
    subchannel,
    tx::checksum_bit, //
};

/// Counters of a queue.
const QUEUE_STATS: usize = 8;

/// Counters of a CPU.
const CPU_STATS: [&str; 8] = [
    "rx_packets",
    "rx_bytes",
    "tx_packets",
    "tx_bytes",
    "vf_rx_packets",
    "vf_rx_bytes",
    "vf_tx_packets",
    "vf_tx_bytes",
];

/// Sizes of the buffers, in sections.
fn sizes(shared: &Shared) -> Option<RingSizes> {
    let config = present_config(shared).ok()?;
    Some(RingSizes {
        rx: config.recv_sections,
        rx_max: max_recv_buffer(shared.version()).checked_div(config.recv_section_size)?,
        tx: config.send_sections,
        tx_max: MAX_SEND_BUFFER.checked_div(config.send_section_size)?,
    })
}

impl Ethtool for Netvsc {
    const NAME: &'static CStr = c"hv_netvsc";
    const REGISTERS: (u32, usize) = (1, SEND_TABLE_SIZE);
    const KEY_SIZE: usize = ndis::HASH_KEY_SIZE;

    fn registers(dev: &Device<Self>, to: &mut [u32]) {
        for (to, entry) in to.iter_mut().zip(&dev.data().tx_table) {
            *to = entry.load(Relaxed);
        }
    }

    fn message_level(dev: &Device<Self>) -> MessageLevel {
        MessageLevel(dev.data().message_level.load(Relaxed))
    }

    fn set_message_level(dev: &Device<Self>, level: MessageLevel) {
        dev.data().message_level.store(level.0, Relaxed);
    }

    fn num_stats(dev: &Device<Self>, _rtnl: &Rtnl) -> Result<usize> {
        let queues = dev.data().connected()?.num_queues() as usize;
        Ok(Events::NAMES.len()
            + stats::vf::COUNT
            + queues * QUEUE_STATS
            + net::present_cpus().count() * CPU_STATS.len())
    }

    fn stat_names(dev: &Device<Self>, to: &mut Strings<'_>, _rtnl: &Rtnl) {
        let Ok(shared) = dev.data().connected() else {
            return;
        };
        for name in Iterator::chain(Events::NAMES.iter(), &stats::vf::NAMES) {
            to.push(fmt!("{name}"));
        }
        for i in 0..shared.num_queues() {
            for name in ["packets", "bytes", "xdp_xmit"] {
                to.push(fmt!("tx_queue_{i}_{name}"));
            }
            for name in ["packets", "bytes", "xdp_drop", "xdp_redirect", "xdp_tx"] {
                to.push(fmt!("rx_queue_{i}_{name}"));
            }
        }
        for cpu in net::present_cpus() {
            for name in CPU_STATS {
                to.push(fmt!("cpu{cpu}_{name}"));
            }
        }
    }

    fn stat_values(dev: &Device<Self>, to: &mut [u64], _rtnl: &Rtnl) {
        let Ok(shared) = dev.data().connected() else {
            return;
        };
        let statistics = &dev.data().statistics;
        let queues = || statistics.queues.iter().take(shared.num_queues() as usize);
        let per_queue = queues().flat_map(|queue| {
            [
                queue.tx_packets.get(),
                queue.tx_bytes.get(),
                queue.xdp_xmit.get(),
                queue.rx_packets.get(),
                queue.rx_bytes.get(),
                queue.xdp_drop.get(),
                queue.xdp_redirect.get(),
                queue.xdp_tx.get(),
            ]
        });
        let per_cpu = net::present_cpus().flat_map(|cpu| {
            let vf = statistics.vf.of_cpu(cpu);
            let [rx_packets, rx_bytes, tx_packets, tx_bytes, _] = vf;
            let mut all = [
                rx_packets, rx_bytes, tx_packets, tx_bytes, rx_packets, rx_bytes, tx_packets,
                tx_bytes,
            ];
            // The synthetic path is counted for the CPU that serves the channel.
            for queue in queues().filter(|queue| queue.cpu.get() == u64::from(cpu)) {
                all[0] += queue.rx_packets.get();
                all[1] += queue.rx_bytes.get();
                all[2] += queue.tx_packets.get();
                all[3] += queue.tx_bytes.get();
            }
            all
        });
        let values = Iterator::chain(statistics.events.values(), statistics.vf.sum());
        let values = Iterator::chain(Iterator::chain(values, per_queue), per_cpu);
        for (to, value) in to.iter_mut().zip(values) {
            *to = value;
        }
    }

    fn channels(dev: &Device<Self>, _rtnl: &Rtnl) -> Channels {
        dev.data()
            .connected()
            .map_or(Channels::default(), |shared| Channels {
                max: shared.max_queues.load(Relaxed),
                count: shared.num_queues(),
            })
    }

    fn set_channels(dev: &Device<Self>, count: u32, rtnl: &Rtnl) -> Result {
        let shared = dev.data().connected()?;
        if shared.version() < Version::V5 || count > shared.max_queues.load(Relaxed) {
            return Err(EINVAL);
        }
        let old = present_config(&shared)?;
        let mut new = old.clone();
        new.channels = count;
        reconnect(dev, shared, &old, &new, None, "channel setting", rtnl)
    }

    fn ring_sizes(dev: &Device<Self>, _rtnl: &Rtnl) -> Option<RingSizes> {
        sizes(&*dev.data().shared.get()?)
    }

    fn set_ring_sizes(dev: &Device<Self>, rx: u32, tx: u32, rtnl: &Rtnl) -> Result {
        let shared = dev.data().connected()?;
        let sizes = sizes(&shared).ok_or(ENODEV)?;
        let old = present_config(&shared)?;
        let mut new = old.clone();
        new.send_sections = tx.min(sizes.tx_max).max(SECTIONS_MIN);
        new.recv_sections = rx.min(sizes.rx_max).max(SECTIONS_MIN);
        if new.send_sections == old.send_sections && new.recv_sections == old.recv_sections {
            return Ok(());
        }
        reconnect(dev, shared, &old, &new, None, "ringparam", rtnl)
    }

    fn table_size(dev: &Device<Self>, _rtnl: &Rtnl) -> usize {
        dev.data().rss.lock().table.len()
    }

    fn rxfh(dev: &Device<Self>, to: &mut Rxfh<'_>, _rtnl: &Rtnl) -> Result {
        let shared = dev.data().connected()?;
        let rss = dev.data().rss.lock();
        if let Some(table) = to.table() {
            for (to, entry) in table.iter_mut().zip(&rss.table) {
                *to = u32::from(subchannel::substitute(&shared, *entry));
            }
        }
        if let Some(key) = to.key() {
            for (to, byte) in key.iter_mut().zip(&rss.key) {
                *to = *byte;
            }
        }
        Ok(())
    }

    fn set_rxfh(dev: &Device<Self>, from: &mut Rxfh<'_>, _rtnl: &Rtnl) -> Result {
        let shared = dev.data().connected()?;
        if from.wants_other_function() {
            return Err(eopnotsupp());
        }
        let mut rss = dev.data().rss.lock();
        if rss.table.is_empty() {
            return Err(eopnotsupp());
        }
        let mut changed = false;
        let queues = shared.num_queues();
        let mut table = KVec::with_capacity(rss.table.len(), GFP_KERNEL)?;
        if let Some(wanted) = from.table() {
            if wanted.iter().any(|&entry| entry >= queues) {
                return Err(EINVAL);
            }
            for entry in wanted {
                table.push(*entry as u16, GFP_KERNEL)?;
            }
            changed = true;
        } else {
            table.extend_from_slice(&rss.table, GFP_KERNEL)?;
        }
        let mut key = rss.key;
        if let Some(wanted) = from.key() {
            for (to, byte) in key.iter_mut().zip(wanted) {
                *to = *byte;
            }
            changed = true;
        }
        if !changed {
            return Ok(());
        }
        // What the host refuses is not kept. It may have switched off what there was.
        subchannel::set_rss(dev, &shared, &table, &key).inspect_err(|e| {
            if *e == EINVAL {
                let _ = subchannel::set_rss(dev, &shared, &rss.table, &rss.key);
            }
        })?;
        rss.table = table;
        rss.key = key;
        Ok(())
    }

    fn rxfh_fields(dev: &Device<Self>, protocol: L4) -> RxfhFields {
        if dev.data().hashed_ports.load(Relaxed) & checksum_bit(protocol) != 0 {
            RxfhFields::AddressesAndPorts
        } else {
            RxfhFields::Addresses
        }
    }

    fn set_rxfh_fields(dev: &Device<Self>, protocol: L4, fields: RxfhFields) -> Result {
        let hashed = &dev.data().hashed_ports;
        let bit = checksum_bit(protocol);
        // Under the RTNL there is one writer.
        match fields {
            RxfhFields::AddressesAndPorts => hashed.store(hashed.load(Relaxed) | bit, Relaxed),
            RxfhFields::Addresses => hashed.store(hashed.load(Relaxed) & !bit, Relaxed),
        }
        Ok(())
    }

    fn link_settings(dev: &Device<Self>, to: &mut LinkSettings<'_>, rtnl: &Rtnl) -> Result {
        if let Some(vf) = dev.data().bond.vf.get() {
            return to.get_from(&vf, rtnl);
        }
        let link = &dev.data().link;
        to.set(link.speed.load(Relaxed), link.duplex.load(Relaxed) as u8);
        Ok(())
    }

    fn set_link_settings(dev: &Device<Self>, from: &LinkSettings<'_>, rtnl: &Rtnl) -> Result {
        if let Some(vf) = dev.data().bond.vf.get() {
            return from.apply_to(&vf, rtnl);
        }
        let link = &dev.data().link;
        let mut speed = link.speed.load(Relaxed);
        let mut duplex = link.duplex.load(Relaxed) as u8;
        from.apply_virtual(dev, &mut speed, &mut duplex)?;
        link.speed.store(speed, Relaxed);
        link.duplex.store(duplex.into(), Relaxed);
        Ok(())
    }
}
