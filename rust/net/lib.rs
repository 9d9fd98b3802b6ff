// SPDX-License-Identifier: GPL-2.0

//! Abstractions for network devices.
//!
//! A driver implements [`Driver`] (what C calls `net_device_ops`) and [`Ethtool`] for the private
//! data of its devices, allocates a device with that data inside the C allocation
//! ([`UnregisteredDevice`]) and registers it ([`Registration`]). Packets are [`SkBuff`]s, which
//! move: whoever has one owns it. Receiving is driven by [`Napi`]. BPF programs see frames by
//! [`xdp`].
//!
//! Where a function may be called is part of its signature as far as possible: [`Rtnl`] is evidence
//! of the RTNL, [`TxQueue`] of a transmit queue's lock, [`PollContext`] of running in NAPI's poll.
//!
//! C header: [`include/linux/netdevice.h`](srctree/include/linux/netdevice.h)

use kernel::error::Error;

pub mod debugfs;
mod device;
mod ethtool;
mod features;
mod list;
mod lower;
mod napi;
mod netdev;
pub mod netvsc;
mod notifier;
mod page_pool;
mod percpu;
mod rcu;
pub mod rtnl;
mod skb;
mod work;
pub mod xdp;

// The bindings must have these in full: the types are embedded or their fields used.
const _: () = {
    assert!(core::mem::size_of::<hyperv_bindings::napi_struct>() > 256);
    assert!(core::mem::size_of::<hyperv_bindings::net_device>() > 1024);
    assert!(core::mem::size_of::<hyperv_bindings::sk_buff>() > 128);
};

/// The error "operation not supported by the device", which the `kernel` crate has no name for.
pub fn eopnotsupp() -> Error {
    Error::from_errno(-(hyperv_bindings::EOPNOTSUPP as i32))
}

/// The error "protocol error", likewise.
pub fn eproto() -> Error {
    Error::from_errno(-(hyperv_bindings::EPROTO as i32))
}

/// Shows in the log what only `core` can display.
pub struct Shown<T>(pub T);

impl<T: core::fmt::Display> kernel::fmt::Display for Shown<T> {
    fn fmt(&self, f: &mut kernel::fmt::Formatter<'_>) -> kernel::fmt::Result {
        core::fmt::Display::fmt(&self.0, f)
    }
}

pub use self::device::{
    AddressLock,
    Device,
    DeviceRef,
    Driver,
    Registration,
    RxQueueStats,
    Stats,
    TxControl,
    TxLocked,
    TxQueue,
    TxQueueStats,
    UnregisteredDevice,
    Xmit, //
};
pub use self::ethtool::{
    Channels,
    Ethtool,
    LinkSettings,
    RingSizes,
    Rxfh,
    RxfhFields,
    Strings, //
};
pub use self::features::{
    Features,
    MessageLevel, //
};
pub use self::list::DeviceList;
pub use self::lower::Joined;
pub use self::napi::{
    Napi,
    Poll,
    PollContext,
    Polled, //
};
pub use self::netdev::{
    net_ratelimit,
    num_default_rss_queues,
    NetDevice,
    ETH_ALEN,
    ETH_HLEN, //
};
pub use self::notifier::{
    Event,
    Notifier,
    NotifierRegistration,
    Reaction, //
};
pub use self::percpu::{
    online_cpus,
    possible_cpus,
    present_cpus,
    PerCpuCounters, //
};
pub use self::rcu::{
    Counted,
    RcuSlot, //
};
pub use self::rtnl::Rtnl;
pub use self::skb::{
    AtomicSkBuff,
    Checksum,
    Destination,
    FlowKeys,
    RxInfo,
    SkBuff, //
    L4,
};
pub use self::work::{
    DelayedWork,
    HasDelayedWork,
    WorkItem, //
};
pub use self::xdp::{
    ExtAck,
    Xdp, //
};
