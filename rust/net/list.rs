// SPDX-License-Identifier: GPL-2.0

//! A driver's list of its devices.

use core::cell::UnsafeCell;

use kernel::prelude::*;

use crate::{
    device::DeviceRef,
    rtnl::Rtnl,
    NetDevice, //
};

/// The devices of a driver, in a static variable.
///
/// # Invariants
///
/// The vector is only accessed with the RTNL held, and no reference to it outlives a method.
pub struct DeviceList<T>(UnsafeCell<KVec<DeviceRef<T>>>);

// SAFETY: By the type invariants only one thread at a time accesses the vector.
unsafe impl<T: Send + Sync> Sync for DeviceList<T> {}

impl<T> DeviceList<T> {
    /// An empty list.
    pub const fn new() -> Self {
        Self(UnsafeCell::new(KVec::new()))
    }

    /// Adds a device.
    pub fn add(&self, dev: DeviceRef<T>, _rtnl: &Rtnl) -> Result {
        // SAFETY: The RTNL is held, and nothing in here calls back.
        unsafe { &mut *self.0.get() }.push(dev, GFP_KERNEL)?;
        Ok(())
    }

    /// Removes a device, if it is in the list.
    pub fn remove(&self, dev: &NetDevice, _rtnl: &Rtnl) {
        let removed = {
            // SAFETY: The RTNL is held, and nothing in here calls back.
            let list = unsafe { &mut *self.0.get() };
            let index = list.iter().position(|entry| entry.is(dev));
            index.and_then(|index| list.remove(index).ok())
        };
        // It may be the last reference, and dropping that runs code of the driver.
        drop(removed);
    }

    fn get(&self, index: usize, _rtnl: &Rtnl) -> Option<DeviceRef<T>> {
        // SAFETY: The RTNL is held, and nothing in here calls back.
        unsafe { &*self.0.get() }.get(index).cloned()
    }

    /// Finds a device.
    pub fn find(
        &self,
        rtnl: &Rtnl,
        mut wanted: impl FnMut(&DeviceRef<T>) -> bool,
    ) -> Option<DeviceRef<T>> {
        let mut index = 0;
        while let Some(dev) = self.get(index, rtnl) {
            if wanted(&dev) {
                return Some(dev);
            }
            index += 1;
        }
        None
    }
}

impl<T> Default for DeviceList<T> {
    fn default() -> Self {
        Self::new()
    }
}
