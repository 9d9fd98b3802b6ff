// SPDX-License-Identifier: GPL-2.0

//! The device: probing and removing, going up and down, and changes for which the connection to
//! the host is made anew.
//!
//! Lock order: RTNL, then [`Netvsc::connection`] or [`Netvsc::rss`], then the locks of a
//! connection.

use core::pin::Pin;

use hyperv_wire::{
    ndis,
    ndis::PacketFilter,
    nvsp::{
        Version,
        SEND_TABLE_SIZE, //
    }, //
};
use kernel::{
    device::Core,
    new_mutex,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{
            Atomic,
            Relaxed, //
        },
        rcu,
        Arc,
        Mutex, //
    },
    time::Delta, //
};
use net::{
    netdev_err,
    netdev_warn,
    rtnl,
    AddressLock,
    Device,
    DeviceList,
    Driver,
    Features,
    MessageLevel,
    RcuSlot,
    Registration,
    Rtnl,
    SkBuff,
    TxQueue,
    UnregisteredDevice,
    WorkItem,
    Xmit, //
};

use vmbus::{
    new_spinlock_irq,
    sync::SpinLockIrq, //
};

use crate::{
    config,
    config::Config,
    connection::{
        Connection,
        Shared, //
    },
    link,
    link::Link,
    offload,
    rndis,
    stats::{
        self,
        Statistics, //
    },
    status::{
        self,
        Files,
        History, //
    },
    subchannel,
    tx,
    vf,
    vf::Bond,
    watchdog,
    watchdog::Recovery,
    xdp, //
};

/// Smallest MTU.
const MTU_MIN: u32 = 68;
/// Largest MTU of old hosts.
const MTU_LEGACY: u32 = 1500;
/// Largest frame.
const FRAME_MAX: u32 = 65535;

/// All devices of this driver.
pub(crate) static DEVICES: DeviceList<Netvsc> = DeviceList::new();

/// Numbers of the work items.
pub(crate) mod work {
    /// The link has changed.
    pub(crate) const LINK: u64 = 0;
    /// The VF is to be set up as a slave.
    pub(crate) const TAKEOVER: u64 = 1;
    /// The VF is to follow the device into its namespace.
    pub(crate) const NAMESPACE: u64 = 2;
    /// Subchannels are to be opened.
    pub(crate) const SUBCHANNELS: u64 = 3;
    /// The packet filter is to be set.
    pub(crate) const RX_MODE: u64 = 4;
    /// A queue cannot transmit any more.
    pub(crate) const RECOVER: u64 = 5;
}

/// How received packets are spread over the channels.
pub(crate) struct Rss {
    /// The hash key.
    pub(crate) key: [u8; ndis::HASH_KEY_SIZE],
    /// The indirection table; empty if the host has none.
    pub(crate) table: KVec<u16>,
}

/// The private data of a network device.
#[pin_data]
pub(crate) struct Netvsc {
    // The work items come first: they are cancelled before anything else goes.
    #[pin]
    link_work: net::DelayedWork<Self, { work::LINK }>,
    #[pin]
    takeover_work: net::DelayedWork<Self, { work::TAKEOVER }>,
    #[pin]
    namespace_work: net::DelayedWork<Self, { work::NAMESPACE }>,
    #[pin]
    subchannel_work: net::DelayedWork<Self, { work::SUBCHANNELS }>,
    #[pin]
    rx_mode_work: net::DelayedWork<Self, { work::RX_MODE }>,
    #[pin]
    recover_work: net::DelayedWork<Self, { work::RECOVER }>,

    /// The device on the bus.
    pub(crate) hv: ARef<vmbus::Device>,
    /// The owner of the connection to the host, if there is one. Changes under the RTNL.
    #[pin]
    connection: Mutex<Option<Connection>>,
    /// Settings of the connection that there was when the machine was suspended.
    #[pin]
    suspended: Mutex<Option<Config>>,
    /// The connection, for those who use it.
    pub(crate) shared: RcuSlot<Arc<Shared>>,
    /// The VF.
    #[pin]
    pub(crate) bond: Bond,
    /// The link.
    #[pin]
    pub(crate) link: Link,
    /// What has happened.
    #[pin]
    pub(crate) history: SpinLockIrq<History>,
    /// What is done about queues that are stuck.
    #[pin]
    pub(crate) recovery: SpinLockIrq<Recovery>,
    /// Counters.
    pub(crate) statistics: Statistics,
    /// The XDP program. Changes under the RTNL.
    pub(crate) program: RcuSlot<ARef<net::xdp::Program>>,
    /// How received packets are spread.
    #[pin]
    pub(crate) rss: Mutex<Rss>,
    /// The channel for each value of the hash to transmit; may be too large.
    pub(crate) tx_table: [Atomic<u32>; SEND_TABLE_SIZE],
    /// Checksums that the host computes, by [`tx::checksum_bit`].
    pub(crate) tx_checksums: Atomic<u32>,
    /// Protocols whose ports are hashed to transmit, by [`tx::checksum_bit`].
    pub(crate) hashed_ports: Atomic<u32>,
    /// What goes to the log.
    pub(crate) message_level: Atomic<u32>,
}

net::impl_has_delayed_work! {
    Netvsc.link_work: work::LINK,
    Netvsc.takeover_work: work::TAKEOVER,
    Netvsc.namespace_work: work::NAMESPACE,
    Netvsc.subchannel_work: work::SUBCHANNELS,
    Netvsc.rx_mode_work: work::RX_MODE,
    Netvsc.recover_work: work::RECOVER,
}

impl Netvsc {
    fn new(hv: ARef<vmbus::Device>) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            link_work <- net::DelayedWork::new(),
            takeover_work <- net::DelayedWork::new(),
            namespace_work <- net::DelayedWork::new(),
            subchannel_work <- net::DelayedWork::new(),
            rx_mode_work <- net::DelayedWork::new(),
            recover_work <- net::DelayedWork::new(),
            hv,
            connection <- new_mutex!(None, "hv_netvsc::connection"),
            suspended <- new_mutex!(None, "hv_netvsc::suspended"),
            shared: RcuSlot::new(),
            bond <- Bond::new(),
            link <- Link::new(),
            history <- new_spinlock_irq!(History::default(), "hv_netvsc::history"),
            recovery <- new_spinlock_irq!(Recovery::new(), "hv_netvsc::recovery"),
            statistics: Statistics::new()?,
            program: RcuSlot::new(),
            rss <- new_mutex!(
                Rss {
                    key: config::HASH_KEY,
                    table: KVec::new(),
                },
                "hv_netvsc::rss"
            ),
            tx_table: [const { Atomic::new(0) }; SEND_TABLE_SIZE],
            tx_checksums: Atomic::new(0),
            hashed_ports: Atomic::new(0xf),
            message_level: Atomic::new(config::message_level().0),
        }? Error)
    }

    /// Whether messages of a level go to the log.
    pub(crate) fn logs(&self, level: MessageLevel) -> bool {
        MessageLevel(self.message_level.load(Relaxed)).intersects(level)
    }

    /// The connection, or `ENODEV`.
    pub(crate) fn connected(&self) -> Result<Arc<Shared>> {
        self.shared.get().ok_or(ENODEV)
    }

    /// Makes a connection the one that is used.
    fn adopt(&self, connection: Connection) {
        let shared = connection.shared.clone();
        *self.connection.lock() = Some(connection);
        self.shared.replace(Some(shared));
    }

    /// Ends the connection. Nobody uses it any more when it is closed.
    fn disconnect(&self) {
        self.shared.replace(None);
        let connection = self.connection.lock().take();
        drop(connection);
    }
}

/// Enables transmitting.
pub(crate) fn enable_tx(dev: &Device<Netvsc>, shared: &Shared) {
    shared.tx_disabled.store(false, Relaxed);
    vmbus::sync::smp_mb();
    dev.wake_all_queues();
}

/// Disables transmitting.
pub(crate) fn disable_tx(dev: &Device<Netvsc>, shared: Option<&Shared>) {
    if let Some(shared) = shared {
        shared.tx_disabled.store(true, Relaxed);
        vmbus::sync::smp_mb();
    }
    dev.stop_all_queues();
}

/// Lets the host send packets.
fn open_filter(dev: &Device<Netvsc>, shared: &Shared) -> Result {
    if dev.is_promiscuous() {
        // This filter leaves out what is for others.
        dev.schedule::<{ work::RX_MODE }>(Delta::ZERO);
    }
    rndis::set_packet_filter(
        shared,
        PacketFilter::BROADCAST
            .with(PacketFilter::ALL_MULTICAST)
            .with(PacketFilter::DIRECTED),
    )
}

/// Has the host stop sending packets, and waits for those on their way.
fn close_filter(dev: &Device<Netvsc>, shared: &Shared) -> Result {
    // It must not open the filter again.
    dev.cancel::<{ work::RX_MODE }>();
    match rndis::set_packet_filter(shared, PacketFilter(0)) {
        // A device that was taken back sends nothing.
        Err(e) if e != ENODEV => {
            netdev_err!(dev, "unable to close device (ret {}).\n", e.to_errno());
            return Err(e);
        }
        _ => {}
    }
    match shared.wait_until_empty() {
        Err(e) if e != ENODEV => {
            netdev_err!(dev, "Ring buffer not empty after closing rndis\n");
            Err(e)
        }
        _ => Ok(()),
    }
}

/// The settings of the present connection, to make another one like it.
pub(crate) fn present_config(shared: &Shared) -> Result<Config> {
    let guard = rcu::read_lock();
    let recv = shared.recv.borrow(&guard).ok_or(ENODEV)?;
    let send = shared.send.borrow(&guard).ok_or(ENODEV)?;
    Ok(Config {
        // As many as were asked for. If the host gave fewer, it may give more the next time.
        channels: shared.queues.len() as u32,
        recv_sections: recv.sections,
        recv_section_size: recv.section_size,
        send_sections: send.sections,
        send_section_size: send.section_size,
    })
}

/// Stops everything and ends the connection. If that fails all is as before.
fn detach(dev: &Device<Netvsc>, shared: Arc<Shared>, rtnl: &Rtnl) -> Result {
    let subchannels_pending = dev.cancel::<{ work::SUBCHANNELS }>();
    if dev.is_running() {
        disable_tx(dev, Some(&shared));
        // The watchdog looks at present devices only.
        dev.set_present(false, rtnl);
        if let Err(e) = close_filter(dev, &shared) {
            // A host that does not answer may still have heard it.
            let _ = open_filter(dev, &shared);
            dev.set_present(true, rtnl);
            if !shared.link_down.load(Relaxed) {
                enable_tx(dev, &shared);
            }
            if subchannels_pending {
                dev.schedule::<{ work::SUBCHANNELS }>(Delta::ZERO);
            }
            return Err(e);
        }
    }
    dev.set_present(false, rtnl);
    drop(shared);
    dev.data().disconnect();
    Ok(())
}

/// The same when the host does not take what is sent: nothing is waited for.
pub(crate) fn detach_stuck(dev: &Device<Netvsc>, shared: Arc<Shared>, rtnl: &Rtnl) {
    dev.cancel::<{ work::SUBCHANNELS }>();
    dev.cancel::<{ work::RX_MODE }>();
    shared.stuck.store(true, Relaxed);
    disable_tx(dev, Some(&shared));
    dev.set_present(false, rtnl);
    drop(shared);
    dev.data().disconnect();
}

/// Makes a connection and starts everything again.
pub(crate) fn attach(dev: &Device<Netvsc>, config: &Config, rtnl: &Rtnl) -> Result {
    let data = dev.data();
    let hv = dev
        .parent(rtnl)
        .and_then(|parent| data.hv.as_bound(parent))
        .ok_or(ENODEV)?;
    let (connection, _) = Connection::new(dev, hv, config, rtnl)?;
    let shared = connection.shared.clone();
    data.adopt(connection);
    // Fewer queues than wanted have to do.
    let _ = subchannel::set_up(dev, &shared, rtnl);

    shared.tx_disabled.store(false, Relaxed);
    dev.set_present(true, rtnl);
    dev.set_carrier(false);
    if dev.is_running() {
        if let Err(e) = open_filter(dev, &shared) {
            dev.set_present(false, rtnl);
            drop(shared);
            data.disconnect();
            return Err(e);
        }
        if !shared.link_down.load(Relaxed) {
            dev.set_carrier(true);
        }
    }
    vf::restore_data_path(dev);
    Ok(())
}

/// Makes the connection anew with other settings, and another MTU if one is given. If that fails
/// the old ones are restored; `what` is how to call them.
pub(crate) fn reconnect(
    dev: &Device<Netvsc>,
    shared: Arc<Shared>,
    old: &Config,
    new: &Config,
    mtu: Option<u32>,
    what: &'static str,
    rtnl: &Rtnl,
) -> Result {
    status::reconnecting(dev, what, || {
        reconnect_unnoted(dev, shared, old, new, mtu, what, rtnl)
    })
}

fn reconnect_unnoted(
    dev: &Device<Netvsc>,
    shared: Arc<Shared>,
    old: &Config,
    new: &Config,
    mtu: Option<u32>,
    what: &str,
    rtnl: &Rtnl,
) -> Result {
    let old_mtu = dev.mtu();
    detach(dev, shared, rtnl)?;
    if let Some(mtu) = mtu {
        dev.set_mtu(mtu, rtnl);
    }
    let result = attach(dev, new, rtnl);
    if result.is_err() {
        dev.set_mtu(old_mtu, rtnl);
        if attach(dev, old, rtnl).is_err() {
            netdev_err!(dev, "restoring {} failed\n", what);
        }
    }
    result
}

impl Driver for Netvsc {
    fn open(dev: &Device<Self>, rtnl: &Rtnl) -> Result {
        let shared = dev.data().connected()?;
        dev.set_carrier(false);
        open_filter(dev, &shared).inspect_err(|e| {
            netdev_err!(dev, "unable to open device (ret {}).\n", e.to_errno());
        })?;
        if !shared.link_down.load(Relaxed) {
            dev.set_carrier(true);
            enable_tx(dev, &shared);
        }
        if let Some(vf) = dev.data().bond.vf.get() {
            // If that fails the VF is not used.
            if let Err(e) = vf.bring_up(rtnl) {
                netdev_warn!(
                    dev,
                    "unable to open slave: {}: {}\n",
                    vf.name(),
                    e.to_errno()
                );
            }
        }
        Ok(())
    }

    fn stop(dev: &Device<Self>, rtnl: &Rtnl) -> Result {
        let shared = dev.data().shared.get();
        disable_tx(dev, shared.as_deref());
        // Without a connection there is nothing to close.
        let Some(shared) = shared else {
            return Ok(());
        };
        let closed = close_filter(dev, &shared);
        if let Some(vf) = dev.data().bond.vf.get() {
            vf.take_down(rtnl);
        }
        closed
    }

    fn start_xmit(
        dev: &Device<Self>,
        queue: &mut TxQueue<'_>,
        skb: SkBuff,
        guard: &rcu::Guard,
    ) -> Xmit {
        xmit(dev, queue, skb, guard)
    }

    fn select_queue(dev: &Device<Self>, skb: &mut SkBuff) -> u16 {
        let guard = rcu::read_lock();
        let queue = if let Some(vf) = dev.data().bond.vf.borrow(&guard) {
            // The VF may have more queues than this device: its choice is kept with the packet.
            let queue = vf.select_queue(skb, &guard);
            skb.set_slave_queue(queue);
            queue
        } else {
            pick_queue(dev, skb)
        };
        let queues = dev.num_tx_queues();
        u32::from(queue).checked_rem(queues).unwrap_or(0) as u16
    }

    fn change_rx_flags(dev: &Device<Self>, promiscuous: bool, allmulti: bool, rtnl: &Rtnl) {
        if let Some(vf) = dev.data().bond.vf.get() {
            if promiscuous {
                vf.count_promiscuous(dev.is_promiscuous(), rtnl);
            }
            if allmulti {
                vf.count_allmulti(dev.is_allmulti(), rtnl);
            }
        }
    }

    fn set_rx_mode(dev: &Device<Self>, addresses: &AddressLock<'_>) {
        let guard = rcu::read_lock();
        if let Some(vf) = dev.data().bond.vf.borrow(&guard) {
            addresses.sync_to(vf);
        }
        if dev.data().shared.borrow(&guard).is_some() {
            dev.schedule::<{ work::RX_MODE }>(Delta::ZERO);
        }
    }

    fn fix_features(dev: &Device<Self>, features: Features, _rtnl: &Rtnl) -> Features {
        xdp::fix_features(dev, features)
    }

    fn set_features(dev: &Device<Self>, features: Features, rtnl: &Rtnl) -> Result {
        let shared = dev.data().connected()?;
        let mut features = features;
        let mut result = Ok(());
        if (features ^ dev.features()).intersects(Features::LRO) {
            result = offload::set_coalescing(dev, &shared, features.contains(Features::LRO));
            if result.is_err() {
                features = features ^ Features::LRO;
                dev.set_active_features(features, rtnl);
            }
        }
        if let Some(vf) = dev.data().bond.vf.get() {
            vf.want_features(features, rtnl);
        }
        result
    }

    fn change_mtu(dev: &Device<Self>, mtu: u32, rtnl: &Rtnl) -> Result {
        let data = dev.data();
        let shared = data.connected()?;
        xdp::check_new_mtu(dev, mtu)?;
        let config = present_config(&shared)?;
        let old = dev.mtu();
        let vf = data.bond.vf.get();
        // The VF is asked first: it is the one that is likely to refuse.
        if let Some(vf) = &vf {
            vf.change_mtu(mtu, rtnl)?;
        }
        let result = reconnect(dev, shared, &config, &config, Some(mtu), "mtu", rtnl);
        if result.is_err() {
            if let Some(vf) = &vf {
                let _ = vf.change_mtu(old, rtnl);
            }
        }
        result
    }

    fn set_address(dev: &Device<Self>, address: &[u8; net::ETH_ALEN], rtnl: &Rtnl) -> Result {
        let shared = dev.data().connected()?;
        let vf = dev.data().bond.vf.get();
        if let Some(vf) = &vf {
            vf.change_address(address, rtnl)?;
        }
        rndis::set_address(&shared, address).inspect_err(|_| {
            if let Some(vf) = &vf {
                let _ = vf.change_address(&dev.address(), rtnl);
            }
        })
    }

    fn stats(dev: &Device<Self>) -> net::Stats {
        dev.data().statistics.sum()
    }

    fn tx_timeout(dev: &Device<Self>, queue: u32) {
        watchdog::timed_out(dev, queue);
    }

    fn rx_queue_stats(dev: &Device<Self>, queue: u32) -> net::RxQueueStats {
        let queues = &dev.data().statistics.queues;
        queues
            .get(queue as usize)
            .map(|q| q.rx())
            .unwrap_or_default()
    }

    fn tx_queue_stats(dev: &Device<Self>, queue: u32) -> net::TxQueueStats {
        let queues = &dev.data().statistics.queues;
        queues
            .get(queue as usize)
            .map(|q| q.tx())
            .unwrap_or_default()
    }

    fn base_stats(dev: &Device<Self>) -> (net::RxQueueStats, net::TxQueueStats) {
        let statistics = &dev.data().statistics;
        // There are as many receive queues in use as transmit queues.
        statistics.base(dev.num_tx_queues(), dev.num_tx_queues())
    }

    fn unregistering(dev: &Device<Self>, rtnl: &Rtnl) {
        // None of this work waits for the RTNL.
        dev.cancel::<{ work::LINK }>();
        dev.cancel::<{ work::NAMESPACE }>();
        dev.cancel::<{ work::RECOVER }>();
        dev.cancel::<{ work::SUBCHANNELS }>();
        vf::release(dev, rtnl);
        dev.cancel::<{ work::RX_MODE }>();
        disable_tx(dev, dev.data().shared.get().as_deref());
        dev.data().disconnect();
        DEVICES.remove(dev, rtnl);
    }

    fn slave_received(dev: &Device<Self>, len: u32) {
        let counters = &dev.data().statistics.vf;
        counters.add::<{ stats::vf::RX_PACKETS }>(1);
        counters.add::<{ stats::vf::RX_BYTES }>(len.into());
    }
}

/// The VF, if packets are to be transmitted on it.
pub(crate) fn vf_in_use<'a>(
    dev: &'a Device<Netvsc>,
    guard: &'a rcu::Guard,
) -> Option<&'a net::NetDevice> {
    let bond = &dev.data().bond;
    if !bond.data_path_is_vf.load(Relaxed) {
        return None;
    }
    bond.vf
        .borrow(guard)
        .filter(|vf| vf.is_running() && vf.has_carrier() && !dev.is_netpoll_transmitting())
}

/// Transmits a packet by the path in use.
#[inline]
pub(crate) fn xmit(
    dev: &Device<Netvsc>,
    queue: &mut TxQueue<'_>,
    skb: SkBuff,
    guard: &rcu::Guard,
) -> Xmit {
    let data = dev.data();
    if let Some(vf) = vf_in_use(dev, guard) {
        let len = skb.len();
        let (verdict, taken) = Xmit::on(vf, skb);
        let counters = &data.statistics.vf;
        if taken {
            counters.add::<{ stats::vf::TX_PACKETS }>(1);
            counters.add::<{ stats::vf::TX_BYTES }>(len.into());
        } else {
            counters.add::<{ stats::vf::TX_DROPPED }>(1);
        }
        return verdict;
    }
    match data.shared.borrow(guard) {
        Some(shared) => tx::transmit(dev, shared, queue, skb, guard),
        None => {
            data.statistics.tx_dropped.add(1);
            Xmit::Done
        }
    }
}

/// Selects a queue of the synthetic path: the one that the socket uses, the one that a forwarded
/// packet came by, or one from the host's table.
fn pick_queue(dev: &Device<Netvsc>, skb: &mut SkBuff) -> u16 {
    let old = skb.socket_queue();
    if let Some(queue) = old {
        if !skb.may_reorder() && u32::from(queue) < dev.num_tx_queues() {
            return queue;
        }
    }
    if let Some(queue) = skb.rx_queue() {
        return queue;
    }
    let data = dev.data();
    let hash = tx_hash(data, skb);
    let entry = hash as usize % SEND_TABLE_SIZE;
    let channel = data
        .tx_table
        .get(entry)
        .map_or(0, |entry| entry.load(Relaxed));
    // The host may say anything.
    let queue = channel.checked_rem(dev.num_tx_queues()).unwrap_or(0) as u16;
    if old != Some(queue) {
        skb.remember_socket_queue(queue);
    }
    queue
}

/// The hash that selects the queue. It stays with the packet.
pub(crate) fn tx_hash(data: &Netvsc, skb: &mut SkBuff) -> u32 {
    let Some(keys) = skb.flow_keys() else {
        return 0;
    };
    let with_ports = keys
        .l4()
        .is_some_and(|l4| data.hashed_ports.load(Relaxed) & tx::checksum_bit(l4) != 0);
    if with_ports {
        return skb.hash();
    }
    if !keys.is_ip() {
        return 0;
    }
    let hash = keys.address_hash();
    skb.set_address_hash(hash);
    hash
}

impl WorkItem<{ work::RX_MODE }> for Netvsc {
    fn run(dev: &Device<Self>) {
        let Some(shared) = dev.data().shared.get() else {
            return;
        };
        if !dev.is_running() {
            return;
        }
        let filter = if dev.is_promiscuous() {
            PacketFilter::PROMISCUOUS
        } else {
            let mut filter = PacketFilter::DIRECTED;
            if dev.is_allmulti() || !dev.has_no_multicast() {
                filter = filter.with(PacketFilter::ALL_MULTICAST);
            }
            if dev.is_broadcast() {
                filter = filter.with(PacketFilter::BROADCAST);
            }
            filter
        };
        // It will be set again when something changes.
        let _ = rndis::set_packet_filter(&shared, filter);
    }
}

impl WorkItem<{ work::RECOVER }> for Netvsc {
    fn run(dev: &Device<Self>) {
        watchdog::work(dev);
    }
}

impl WorkItem<{ work::LINK }> for Netvsc {
    fn run(dev: &Device<Self>) {
        link::work(dev);
    }
}

impl WorkItem<{ work::TAKEOVER }> for Netvsc {
    fn run(dev: &Device<Self>) {
        vf::takeover_work(dev);
    }
}

impl WorkItem<{ work::NAMESPACE }> for Netvsc {
    fn run(dev: &Device<Self>) {
        vf::namespace_work(dev);
    }
}

impl WorkItem<{ work::SUBCHANNELS }> for Netvsc {
    fn run(dev: &Device<Self>) {
        subchannel::work(dev);
    }
}

/// The driver on the VMBus.
pub(crate) struct NetvscDriver;

/// What belongs to a device as long as it is bound.
pub(crate) struct Bound<'bound> {
    // Goes before the device.
    _files: Option<Files>,
    registration: Registration<'bound, Netvsc>,
}

#[vtable]
impl vmbus::Driver for NetvscDriver {
    type IdInfo = ();
    type Data<'bound> = Bound<'bound>;
    const ID_TABLE: vmbus::IdTable<Self::IdInfo> = &crate::ID_TABLE;
    // Names follow the order of the offers.
    const PROBE_TYPE: vmbus::ProbeType = vmbus::ProbeType::Synchronous;

    fn probe<'bound>(
        hv: &'bound vmbus::Device<Core<'_>>,
        _info: Option<&'bound Self::IdInfo>,
    ) -> impl PinInit<Self::Data<'bound>, Error> + 'bound {
        probe(hv)
    }

    fn unbind<'bound>(_hv: &'bound vmbus::Device<Core<'_>>, _this: Pin<&Self::Data<'bound>>) {
        // Dropping the registration does all.
    }

    fn suspend<'bound>(
        _hv: &'bound vmbus::Device<Core<'_>>,
        this: Pin<&Self::Data<'bound>>,
    ) -> Result {
        suspend(&this.registration)
    }

    fn resume<'bound>(
        _hv: &'bound vmbus::Device<Core<'_>>,
        this: Pin<&Self::Data<'bound>>,
    ) -> Result {
        resume(&this.registration)
    }
}

/// Ends the connection before the machine is suspended.
fn suspend(dev: &Device<Netvsc>) -> Result {
    // The host tells of the link again when there is a new connection.
    dev.cancel::<{ work::LINK }>();
    dev.cancel::<{ work::RECOVER }>();
    let rtnl = rtnl::lock();
    dev.cancel::<{ work::NAMESPACE }>();
    let data = dev.data();
    let shared = data.connected()?;
    let config = present_config(&shared)?;
    detach(dev, shared, &rtnl)?;
    *data.suspended.lock() = Some(config);
    Ok(())
}

/// Makes a connection with the settings that there were.
fn resume(dev: &Device<Netvsc>) -> Result {
    let rtnl = rtnl::lock();
    let data = dev.data();
    // Every new connection begins so. The next event of the VF, which is resumed later, changes it.
    data.bond.data_path_is_vf.store(false, Relaxed);
    let config = data.suspended.lock().take().ok_or(ENODEV)?;
    attach(dev, &config, &rtnl)
}

fn probe<'bound>(hv: &'bound vmbus::Device<Core<'_>>) -> Result<Bound<'bound>> {
    let own: &vmbus::Device = hv;
    let device =
        UnregisteredDevice::new(hv.as_ref(), config::CHANNELS_MAX, Netvsc::new(own.into()))?;

    // The RTNL is held until the device is registered, for two reasons. The host offers the VF as
    // soon as it knows that this driver can use one, and the VF must not be registered first. And
    // the work that opens subchannels, which needs the RTNL, must not begin before the probe ends:
    // subchannels are not offered while it goes on.
    let rtnl = rtnl::lock();
    device.set_watchdog(watchdog::TIMEOUT, &rtnl);
    device.set_needed_headroom(tx::HEADROOM, &rtnl);
    device.set_active_features(Features::LRO, &rtnl);
    let (connection, address) = Connection::new(&device, hv, &Config::default(), &rtnl)
        .inspect_err(|e| {
            netdev_err!(
                device,
                "unable to add netvsc device (ret {})\n",
                e.to_errno()
            );
        })?;
    let shared = connection.shared.clone();
    device.data().adopt(connection);
    device.set_hw_address(&address, &rtnl);

    // Whatever the user can switch is on at first.
    let features = device.hw_features(&rtnl)
        | Features::HIGHDMA
        | Features::VLAN_CTAG_TX
        | Features::VLAN_CTAG_RX;
    device.set_active_features(features, &rtnl);
    device.set_vlan_features(features, &rtnl);
    let mtu_max = if shared.version() >= Version::V2 {
        FRAME_MAX - net::ETH_HLEN
    } else {
        MTU_LEGACY
    };
    device.set_mtu_range(MTU_MIN, mtu_max, &rtnl);
    shared.tx_disabled.store(false, Relaxed);
    if shared.max_queues.load(Relaxed) > 1 {
        device.schedule::<{ work::SUBCHANNELS }>(Delta::ZERO);
    }
    drop(shared);

    let reference = device.to_ref();
    let registered = DEVICES
        .add(reference.clone(), &rtnl)
        .and_then(|()| device.register(&rtnl));
    let registration = registered.inspect_err(|_| {
        pr_err!("Unable to register netdev.\n");
        reference.cancel::<{ work::SUBCHANNELS }>();
        reference.data().disconnect();
        DEVICES.remove(&reference, &rtnl);
    })?;
    vf::adopt_present(&registration, &rtnl);
    drop(rtnl);
    Ok(Bound {
        // Without them the device works as well.
        _files: Files::new(&registration).ok(),
        registration,
    })
}
