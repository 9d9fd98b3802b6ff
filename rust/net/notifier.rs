// SPDX-License-Identifier: GPL-2.0

//! Events of all network devices.
//!
//! C header: [`include/linux/netdevice.h`](srctree/include/linux/netdevice.h), `NETDEV_*`

use core::marker::PhantomData;

use hyperv_bindings as bindings;
use kernel::{
    error::to_result,
    prelude::*,
    types::Opaque, //
};

use crate::{
    rtnl::Rtnl,
    NetDevice, //
};

/// What happens to a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// It is being registered; user space has not heard of it.
    PostInit,
    /// It was registered.
    Register,
    /// It is being unregistered.
    Unregister,
    /// It went up.
    Up,
    /// It is about to go down.
    GoingDown,
    /// It went down.
    Down,
    /// Its state changed, such as its carrier.
    Change,
    /// Something else, `NETDEV_*`.
    Other(u32),
}

impl Event {
    fn from_raw(event: c_ulong) -> Self {
        let event = event as bindings::netdev_cmd;
        match event {
            bindings::netdev_cmd_NETDEV_POST_INIT => Self::PostInit,
            bindings::netdev_cmd_NETDEV_REGISTER => Self::Register,
            bindings::netdev_cmd_NETDEV_UNREGISTER => Self::Unregister,
            bindings::netdev_cmd_NETDEV_UP => Self::Up,
            bindings::netdev_cmd_NETDEV_GOING_DOWN => Self::GoingDown,
            bindings::netdev_cmd_NETDEV_DOWN => Self::Down,
            bindings::netdev_cmd_NETDEV_CHANGE => Self::Change,
            other => Self::Other(other),
        }
    }
}

/// What the listener made of an event.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reaction {
    /// It was not interested.
    Ignored,
    /// It acted.
    Handled,
}

/// A listener.
pub trait Notifier {
    /// Something happened to `dev`.
    fn event(event: Event, dev: &NetDevice, rtnl: &Rtnl) -> Reaction;
}

/// The registration of a listener.
///
/// Registering replays the events of the devices there are, and so does unregistering.
pub struct NotifierRegistration<N> {
    block: Pin<KBox<Opaque<bindings::notifier_block>>>,
    _notifier: PhantomData<N>,
}

// SAFETY: The registration can be ended by any thread.
unsafe impl<N> Send for NotifierRegistration<N> {}

// SAFETY: There is nothing to do with a shared reference.
unsafe impl<N> Sync for NotifierRegistration<N> {}

impl<N: Notifier> NotifierRegistration<N> {
    /// Registers the listener. Takes the RTNL.
    pub fn new() -> Result<Self> {
        let block = KBox::pin(
            Opaque::new(bindings::notifier_block {
                notifier_call: Some(Self::callback),
                ..pin_init::zeroed()
            }),
            GFP_KERNEL,
        )?;
        // SAFETY: The block stays pinned until it is unregistered.
        to_result(unsafe { bindings::register_netdevice_notifier(block.get()) })?;
        Ok(Self {
            block,
            _notifier: PhantomData,
        })
    }

    extern "C" fn callback(
        _block: *mut bindings::notifier_block,
        event: c_ulong,
        info: *mut c_void,
    ) -> c_int {
        // SAFETY: The chain of network devices is called with this structure.
        let dev = unsafe { bindings::netdev_notifier_info_to_dev(info.cast()) };
        // SAFETY: The device is valid during the call.
        let dev = unsafe { NetDevice::from_raw(dev) };
        // SAFETY: The chain is called with the RTNL held.
        let rtnl = unsafe { Rtnl::assume() };
        match N::event(Event::from_raw(event), dev, &rtnl) {
            Reaction::Ignored => bindings::NOTIFY_DONE as c_int,
            Reaction::Handled => bindings::NOTIFY_OK as c_int,
        }
    }
}

impl<N> Drop for NotifierRegistration<N> {
    fn drop(&mut self) {
        // SAFETY: The block was registered. It cannot fail for a registered block.
        unsafe { bindings::unregister_netdevice_notifier(self.block.get()) };
    }
}
