// SPDX-License-Identifier: GPL-2.0

//! The VF: the PCI function by which most packets go when it is there.
//!
//! The VF's own driver registers a network device for it. When that matches one of ours it becomes
//! its slave: its packets are received as ours, and ours are transmitted on it as long as the *data
//! path* is the VF's. The host is told about every change of the data path, and answers when it
//! has made it.
//!
//! | event of the VF         | what follows                                              |
//! |-------------------------|-----------------------------------------------------------|
//! | being registered        | marked as a slave before user space hears of it           |
//! | registered              | joins, and 100 ms later gets MTU, flags and addresses      |
//! | up                      | data path to the VF, after the host's association message |
//! | going down, down        | data path to the synthetic device                         |
//! | unregistered            | leaves                                                    |

use hyperv_wire::nvsp::DataPath;
use kernel::{
    new_mutex,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{
            Atomic,
            Relaxed, //
        },
        Mutex, //
    },
    time::Delta, //
};
use net::{
    netdev_err,
    netdev_info,
    netdev_notice,
    netdev_warn,
    rtnl,
    Device,
    DeviceRef,
    Event,
    Joined,
    NetDevice,
    Notifier,
    RcuSlot,
    Reaction,
    Rtnl, //
};
use vmbus::Completion;

use crate::{
    device::{
        work,
        Netvsc,
        DEVICES, //
    },
    nvsp,
    status,
    tx,
    xdp, //
};

/// How long after joining a VF is set up: its driver and user space have their say first.
const TAKEOVER_DELAY: Delta = Delta::from_millis(100);

/// What a device knows of its VF.
#[pin_data]
pub(crate) struct Bond {
    /// The VF, when it has joined.
    pub(crate) vf: RcuSlot<ARef<NetDevice>>,
    /// What makes it a slave.
    #[pin]
    joined: Mutex<Option<Joined<Netvsc>>>,
    /// A VF that was registered in another namespace, until it has been fetched.
    #[pin]
    elsewhere: Mutex<Option<ARef<NetDevice>>>,
    /// The host has associated a VF with the device.
    allocated: Atomic<bool>,
    /// Serial number of that VF.
    serial: Atomic<u32>,
    /// The association was announced.
    #[pin]
    associated: Completion,
    /// The data path is the VF's.
    pub(crate) data_path_is_vf: Atomic<bool>,
}

impl Bond {
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            vf: RcuSlot::new(),
            joined <- new_mutex!(None, "hv_netvsc::joined"),
            elsewhere <- new_mutex!(None, "hv_netvsc::elsewhere"),
            allocated: Atomic::new(false),
            serial: Atomic::new(0),
            associated <- Completion::new(),
            data_path_is_vf: Atomic::new(false),
        })
    }
}

impl Bond {
    /// Serial number of the VF that the host has associated with the device.
    pub(crate) fn association(&self) -> Option<u32> {
        self.allocated
            .load(Relaxed)
            .then(|| self.serial.load(Relaxed))
    }
}

/// The host says that a VF belongs to the device, or does not any more.
pub(crate) fn associated(dev: &Device<Netvsc>, allocated: bool, serial: u32) {
    let bond = &dev.data().bond;
    bond.allocated.store(allocated, Relaxed);
    bond.serial.store(serial, Relaxed);
    if allocated {
        bond.associated.complete();
    }
    netdev_info!(
        dev,
        "VF slot {} {}\n",
        serial,
        if allocated { "added" } else { "removed" }
    );
}

/// Whether a device may be a VF: an Ethernet device that is neither ours nor made of others.
fn may_be_vf(dev: &NetDevice, rtnl: &Rtnl) -> bool {
    dev.is_ethernet() && !dev.is_vlan() && !dev.is_bond_master() && find(dev, rtnl).is_none()
}

/// Finds out whether a device is ours.
fn find(dev: &NetDevice, rtnl: &Rtnl) -> Option<DeviceRef<Netvsc>> {
    DEVICES.find(rtnl, |own| own.is(dev))
}

/// The device to which a VF belongs: the one with the serial number by which the VF's slot is named
/// and the same address, or else one with the same address.
fn matching(vf: &NetDevice, rtnl: &Rtnl) -> Option<DeviceRef<Netvsc>> {
    let Some(slot) = vf.pci_slot(rtnl)? else {
        netdev_notice!(vf, "no PCI slot information\n");
        return None;
    };
    let serial = slot.to_str().ok().and_then(|slot| slot.parse::<u32>().ok());
    let Some(serial) = serial else {
        netdev_notice!(vf, "Invalid vf serial:{}\n", slot);
        return None;
    };
    let permanent = vf.permanent_address();
    let by_serial = DEVICES.find(rtnl, |dev| {
        let bond = &dev.data().bond;
        bond.allocated.load(Relaxed)
            && bond.serial.load(Relaxed) == serial
            && dev.permanent_address() == permanent
    });
    if by_serial.is_some() {
        return by_serial;
    }
    // While the VF is being registered its permanent address is not known yet, but its present one
    // is. No two adapters of a virtual machine have the same address.
    let address = vf.address();
    let by_address = DEVICES.find(rtnl, |dev| {
        let own = dev.permanent_address();
        own == permanent || own == address
    });
    if by_address.is_none() {
        netdev_notice!(vf, "no netdev found for vf serial:{}\n", serial);
    }
    by_address
}

/// Marks a device that is being registered as a slave, if it will be one.
fn prepare(vf: &NetDevice, rtnl: &Rtnl) {
    if matching(vf, rtnl).is_some() {
        vf.mark_slave(rtnl);
    }
}

/// A device was registered: if it is a VF of ours it joins. Tells whether it did.
fn register(vf: &NetDevice, rtnl: &Rtnl) -> Option<DeviceRef<Netvsc>> {
    let dev = matching(vf, rtnl)?;
    let data = dev.data();
    if data.shared.is_empty() || !data.bond.vf.is_empty() {
        return None;
    }
    if !dev.same_namespace(vf, rtnl) {
        // Moving it takes its lock, which whoever registers it may hold.
        *data.bond.elsewhere.lock() = Some(vf.into());
        dev.schedule::<{ work::NAMESPACE }>(Delta::ZERO);
        return None;
    }
    netdev_info!(dev, "VF registering: {}\n", vf.name());
    let joined = Joined::new(vf, &dev, rtnl).ok()?;
    joined.announce(rtnl);
    netdev_info!(vf, "joined to {}\n", dev.name());
    *data.bond.joined.lock() = Some(joined);
    data.bond.vf.replace(Some(vf.into()));
    if dev.needed_headroom() < vf.needed_headroom() {
        dev.set_needed_headroom(vf.needed_headroom(), rtnl);
    }
    vf.want_features(dev.features(), rtnl);
    xdp::vf_joined(&dev, vf, rtnl);
    Some(dev)
}

/// Sets a VF up as a slave.
fn take_over(dev: &Device<Netvsc>, vf: &NetDevice, rtnl: &Rtnl) {
    if vf.change_mtu(dev.mtu(), rtnl).is_err() {
        netdev_warn!(vf, "unable to change mtu to {}\n", dev.mtu());
    }
    // The flags are a wish; the VF's driver has the last word.
    let _ = vf.follow_flags(dev, rtnl);
    vf.sync_addresses(dev, rtnl);
    if dev.is_running() {
        if let Err(e) = vf.bring_up(rtnl) {
            netdev_warn!(vf, "unable to open: {}\n", e.to_errno());
        }
    }
}

/// Sets the VF up, some time after it has joined.
pub(crate) fn takeover_work(dev: &Device<Netvsc>) {
    // Whoever cancels this work may hold the RTNL.
    let Some(rtnl) = rtnl::try_lock() else {
        dev.schedule::<{ work::TAKEOVER }>(Delta::from_millis(10));
        return;
    };
    if let Some(vf) = dev.data().bond.vf.get() {
        take_over(dev, &vf, &rtnl);
    }
}

/// Fetches a VF that was registered in another namespace.
fn fetch(dev: &Device<Netvsc>, vf: &NetDevice, rtnl: &Rtnl) {
    // The device may have been moved there in the meantime.
    if dev.same_namespace(vf, rtnl) {
        if vf.with_ops_lock(rtnl, || register(vf, rtnl)).is_some() {
            dev.schedule::<{ work::TAKEOVER }>(TAKEOVER_DELAY);
        }
        return;
    }
    // It will be registered here, and join then.
    match vf.move_to_namespace_of(dev, rtnl) {
        Ok(()) => netdev_info!(vf, "VF moved to namespace with: {}\n", dev.name()),
        Err(e) => netdev_err!(
            vf,
            "could not move to same namespace as {}: {}\n",
            dev.name(),
            e.to_errno()
        ),
    }
}

/// Has the VF follow the device into its namespace.
pub(crate) fn namespace_work(dev: &Device<Netvsc>) {
    let Some(rtnl) = rtnl::try_lock() else {
        dev.schedule::<{ work::NAMESPACE }>(Delta::from_millis(10));
        return;
    };
    let elsewhere = dev.data().bond.elsewhere.lock().take();
    if let Some(vf) = elsewhere {
        fetch(dev, &vf, &rtnl);
    }
    let Some(vf) = dev.data().bond.vf.get() else {
        return;
    };
    if dev.same_namespace(&vf, &rtnl) {
        return;
    }
    match vf.move_to_namespace_of(dev, &rtnl) {
        Ok(()) => netdev_info!(vf, "Moved VF to namespace with: {}\n", dev.name()),
        Err(e) => netdev_err!(
            vf,
            "Cannot move to same namespace as {}: {}\n",
            dev.name(),
            e.to_errno()
        ),
    }
}

/// At the end of a probe: bonds with the VF that is there already, whose registration was replayed
/// when this device was not there yet.
pub(crate) fn adopt_present(dev: &Device<Netvsc>, rtnl: &Rtnl) {
    let vf = dev.find_in_namespace(rtnl, |other| {
        may_be_vf(other, rtnl) && matching(other, rtnl).is_some_and(|own| own.is(dev))
    });
    let Some(vf) = vf else {
        return;
    };
    vf.mark_slave(rtnl);
    if vf.with_ops_lock(rtnl, || register(&vf, rtnl)).is_some() {
        // User space saw it without the mark, and may have plans for it.
        vf.announce_change(rtnl);
        take_over(dev, &vf, rtnl);
    }
}

/// Switches the data path, for the given cause.
fn switch(dev: &Device<Netvsc>, to_vf: bool, cause: &'static str) -> Result {
    status::switching(dev, to_vf, cause, || switch_unnoted(dev, to_vf))
}

fn switch_unnoted(dev: &Device<Netvsc>, to_vf: bool) -> Result {
    let data = dev.data();
    let shared = data.connected()?;
    if to_vf {
        nvsp::switch_data_path(&shared, DataPath::VF)?;
        data.bond.data_path_is_vf.store(true, Relaxed);
        Ok(())
    } else {
        // Nothing more on the VF, which may be about to go.
        data.bond.data_path_is_vf.store(false, Relaxed);
        nvsp::switch_data_path(&shared, DataPath::SYNTHETIC)
    }
}

/// After the connection was made anew: tells the host of the data path that is in use.
pub(crate) fn restore_data_path(dev: &Device<Netvsc>) {
    let bond = &dev.data().bond;
    if bond.data_path_is_vf.load(Relaxed) {
        if let Err(e) = switch(dev, true, "new connection") {
            // The next event of the VF is another chance.
            bond.data_path_is_vf.store(false, Relaxed);
            netdev_err!(
                dev,
                "Data path failed to switch to VF, err: {}\n",
                e.to_errno()
            );
        }
    }
}

/// The VF went up or down, or changed.
fn changed(vf: &NetDevice, event: Event, rtnl: &Rtnl) -> Reaction {
    let Some(dev) = vf.master(rtnl).and_then(|master| find(master, rtnl)) else {
        return Reaction::Ignored;
    };
    let data = dev.data();
    let Some(shared) = data.shared.get() else {
        return Reaction::Ignored;
    };
    let is_up = event != Event::GoingDown && vf.is_running();
    if data.bond.data_path_is_vf.load(Relaxed) == is_up {
        return Reaction::Handled;
    }
    let wait = if is_up && !data.bond.allocated.load(Relaxed) {
        netdev_info!(dev, "Waiting for the VF association from host\n");
        data.hv.wait_for(&data.bond.associated, nvsp::TIMEOUT)
    } else {
        Ok(())
    };
    let direction = if is_up { "to" } else { "from" };
    let cause = match event {
        Event::GoingDown => "VF going down",
        Event::Down => "VF down",
        Event::Up => "VF up",
        _ => "VF changed",
    };
    match wait.and_then(|()| switch(&dev, is_up, cause)) {
        Ok(()) => {
            netdev_info!(dev, "Data path switched {} VF: {}\n", direction, vf.name());
            // As large packets as the device in use can take.
            let size = if is_up {
                vf.tso_max_size()
            } else {
                shared.gso_max.load(Relaxed)
            };
            dev.set_tso_max_size(size, rtnl);
            Reaction::Handled
        }
        Err(e) => {
            netdev_err!(
                dev,
                "Data path failed to switch {} VF: {}, err: {}\n",
                direction,
                vf.name(),
                e.to_errno()
            );
            Reaction::Ignored
        }
    }
}

/// A device goes: if it is a VF of ours it leaves.
fn unregister(vf: &NetDevice, rtnl: &Rtnl) -> Reaction {
    // One that was still to be fetched must not be kept.
    DEVICES.find(rtnl, |dev| {
        let mut elsewhere = dev.data().bond.elsewhere.lock();
        elsewhere.take_if(|waiting| waiting.is(vf)).is_some()
    });
    match vf.master(rtnl).and_then(|master| find(master, rtnl)) {
        Some(dev) => {
            release(&dev, rtnl);
            Reaction::Handled
        }
        None => Reaction::Ignored,
    }
}

/// Lets the VF go, if there is one.
pub(crate) fn release(dev: &Device<Netvsc>, rtnl: &Rtnl) {
    let bond = &dev.data().bond;
    *bond.elsewhere.lock() = None;
    let Some(vf) = bond.vf.get() else {
        return;
    };
    dev.cancel::<{ work::TAKEOVER }>();
    netdev_info!(dev, "VF unregistering: {}\n", vf.name());
    // A device that is unregistered goes down first. When this device goes instead, the VF is still
    // up, and the host is to be told.
    if bond.data_path_is_vf.load(Relaxed) {
        match switch(dev, false, "VF leaves") {
            // A device that was taken back has no data path.
            Err(e) if e != ENODEV => netdev_err!(
                dev,
                "Data path failed to switch from VF: {}, err: {}\n",
                vf.name(),
                e.to_errno()
            ),
            _ => {}
        }
    }
    xdp::vf_leaves(dev, &vf, rtnl);
    bond.associated.reinit();
    let joined = bond.joined.lock().take();
    if let Some(joined) = joined {
        joined.part(rtnl);
    }
    bond.vf.replace(None);
    dev.set_needed_headroom(tx::HEADROOM, rtnl);
}

/// The listener to the events of all network devices.
pub(crate) struct Bonding;

impl Notifier for Bonding {
    fn event(event: Event, dev: &NetDevice, rtnl: &Rtnl) -> Reaction {
        if let Some(own) = find(dev, rtnl) {
            if event == Event::Register {
                // It was moved to another namespace, and the VF has to follow; not from in here.
                own.schedule::<{ work::NAMESPACE }>(Delta::ZERO);
            }
            return Reaction::Ignored;
        }
        if !may_be_vf(dev, rtnl) {
            return Reaction::Ignored;
        }
        match event {
            Event::PostInit => {
                prepare(dev, rtnl);
                Reaction::Ignored
            }
            Event::Register => match register(dev, rtnl) {
                Some(own) => {
                    own.schedule::<{ work::TAKEOVER }>(TAKEOVER_DELAY);
                    Reaction::Handled
                }
                None => Reaction::Ignored,
            },
            Event::Unregister => unregister(dev, rtnl),
            Event::Up | Event::Down | Event::Change | Event::GoingDown => changed(dev, event, rtnl),
            Event::Other(_) => Reaction::Ignored,
        }
    }
}
