// SPDX-License-Identifier: GPL-2.0

//! Network driver for Hyper-V and Azure virtual machines.
//!
//! The host offers a network adapter twice: as a synthetic device on the VMBus, which is always
//! there, and, with SR-IOV, as a PCI virtual function (VF) that can come and go at any time. This
//! driver is for the synthetic one. It makes the VF its slave, so that user space sees one device
//! that keeps its name, addresses and connections.

#![forbid(unsafe_code)]

use hyperv_wire::vmbus::class;
use kernel::{
    driver,
    prelude::*,
    InPlaceModule, //
};
use net::NotifierRegistration;

use crate::{
    device::NetvscDriver,
    status::FolderInUse,
    vf::Bonding, //
};

#[path = "hv_netvsc/buffers.rs"]
mod buffers;
#[path = "hv_netvsc/config.rs"]
mod config;
#[path = "hv_netvsc/connection.rs"]
mod connection;
#[path = "hv_netvsc/device.rs"]
mod device;
#[path = "hv_netvsc/ethtool.rs"]
mod ethtool;
#[path = "hv_netvsc/link.rs"]
mod link;
#[path = "hv_netvsc/nvsp.rs"]
mod nvsp;
#[path = "hv_netvsc/offload.rs"]
mod offload;
#[path = "hv_netvsc/rndis.rs"]
mod rndis;
#[path = "hv_netvsc/rx.rs"]
mod rx;
#[path = "hv_netvsc/stats.rs"]
mod stats;
#[path = "hv_netvsc/status.rs"]
mod status;
#[path = "hv_netvsc/subchannel.rs"]
mod subchannel;
#[path = "hv_netvsc/tx.rs"]
mod tx;
#[path = "hv_netvsc/vf.rs"]
mod vf;
#[path = "hv_netvsc/watchdog.rs"]
mod watchdog;
#[path = "hv_netvsc/xdp.rs"]
mod xdp;

module! {
    type: HvNetvsc,
    name: "hv_netvsc",
    description: "Microsoft Hyper-V network driver",
    license: "GPL",
}

/// The module: what it has registered, in the order in which it is to be unregistered.
#[pin_data]
struct HvNetvsc {
    // Registered before the driver, so that VFs that are there already are seen, too. On removal
    // it replays that they go, while the devices are still there.
    _notifier: NotifierRegistration<Bonding>,
    #[pin]
    _driver: driver::Registration<vmbus::Adapter<NetvscDriver>>,
    _debugfs: FolderInUse,
}

impl InPlaceModule for HvNetvsc {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        config::init(net::netvsc::ring_size(), net::netvsc::debug());
        // It is there before the devices, and goes after them.
        let debugfs = FolderInUse::new();
        try_pin_init!(Self {
            _notifier: NotifierRegistration::new()?,
            _driver <- driver::Registration::new(c"hv_netvsc", module),
            _debugfs: debugfs,
        })
    }
}

vmbus::vmbus_device_table!(
    ID_TABLE,
    MODULE_ID_TABLE,
    <NetvscDriver as vmbus::Driver>::IdInfo,
    [(vmbus::DeviceId::new(class::NETWORK), ())]
);
