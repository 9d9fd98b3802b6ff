// SPDX-License-Identifier: GPL-2.0

//! Slaves: devices whose packets another device receives and which it may transmit on.
//!
//! C header: [`include/linux/netdevice.h`](srctree/include/linux/netdevice.h)

use hyperv_bindings as bindings;
use kernel::{
    error::to_result,
    prelude::*,
    sync::aref::ARef, //
};

use crate::{
    device::{
        Device,
        DeviceRef, //
    },
    netdev_err,
    rtnl::Rtnl,
    Driver,
    NetDevice, //
};

/// The bond between a slave and its master.
///
/// It must be cut with [`Joined::part`]; if it is dropped otherwise, both devices stay for ever.
///
/// # Invariants
///
/// The slave's packets go to the receive handler with `master` as its data, and `master` is its
/// upper device.
pub struct Joined<T: Driver> {
    slave: Option<ARef<NetDevice>>,
    master: DeviceRef<T>,
}

impl<T: Driver> Joined<T> {
    /// Makes `master` the upper device of `slave` and the receiver of its packets.
    pub fn new(slave: &NetDevice, master: &Device<T>, _rtnl: &Rtnl) -> Result<Self> {
        let reference = master.to_ref();
        // SAFETY: Both devices are valid and the RTNL is held. The handler's data stays valid until
        // it is unregistered, which `reference` ensures.
        to_result(unsafe {
            bindings::netdev_rx_handler_register(
                slave.as_raw(),
                Some(Self::receive),
                master.as_raw().cast(),
            )
        })
        .inspect_err(|e| {
            netdev_err!(
                slave,
                "can not register netvsc VF receive handler (err = {})\n",
                e.to_errno()
            );
        })?;
        // SAFETY: Both devices are valid and the RTNL is held.
        let linked = to_result(unsafe {
            bindings::netdev_master_upper_dev_link(
                slave.as_raw(),
                master.as_raw(),
                core::ptr::null_mut(),
                core::ptr::null_mut(),
                core::ptr::null_mut(),
            )
        });
        if let Err(e) = linked {
            netdev_err!(
                slave,
                "can not set master device {} (err = {})\n",
                master.name(),
                e.to_errno()
            );
            // SAFETY: The handler was registered above.
            unsafe { bindings::netdev_rx_handler_unregister(slave.as_raw()) };
            return Err(e);
        }
        // INVARIANT: Both were established.
        Ok(Self {
            slave: Some(slave.into()),
            master: reference,
        })
    }

    /// Tells everybody that the slave has joined.
    pub fn announce(&self, _rtnl: &Rtnl) {
        if let Some(slave) = &self.slave {
            // SAFETY: The device is valid and the RTNL is held.
            unsafe {
                bindings::call_netdevice_notifiers(
                    bindings::netdev_cmd_NETDEV_JOIN as c_ulong,
                    slave.as_raw(),
                )
            };
        }
    }

    /// Cuts the bond. No packet of the slave is on its way to the master when this returns.
    pub fn part(mut self, _rtnl: &Rtnl) {
        if let Some(slave) = self.slave.take() {
            // SAFETY: By the type invariants both were established; the RTNL is held.
            unsafe {
                bindings::netdev_rx_handler_unregister(slave.as_raw());
                bindings::netdev_upper_dev_unlink(slave.as_raw(), self.master.as_raw());
            }
        }
    }

    /// # Safety
    ///
    /// Only the core calls this, to `receive` a packet of a device whose handler this is.
    unsafe extern "C" fn receive(
        skb: *mut *mut bindings::sk_buff,
    ) -> bindings::rx_handler_result_t {
        // SAFETY: The core calls this with a valid packet, in a read-side critical section, in
        // which the handler's data is the master: unregistering waits for it.
        unsafe {
            let dev = bindings::skb_rx_handler_data(*skb);
            let own = bindings::skb_share_check(*skb);
            if own.is_null() {
                return bindings::rx_handler_result_RX_HANDLER_CONSUMED;
            }
            *skb = own;
            bindings::skb_set_dev(own, dev);
            T::slave_received(Device::from_raw(dev), (*own).len);
        }
        bindings::rx_handler_result_RX_HANDLER_ANOTHER
    }
}

impl<T: Driver> Drop for Joined<T> {
    fn drop(&mut self) {
        if self.slave.is_some() {
            // The receive handler may still come: its data must stay.
            core::mem::forget(self.master.clone());
        }
    }
}
