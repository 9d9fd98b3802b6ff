// SPDX-License-Identifier: GPL-2.0

//! A network device of whatever driver.
//!
//! C header: [`include/linux/netdevice.h`](srctree/include/linux/netdevice.h)

use core::{
    fmt::Write,
    ptr::NonNull, //
};

use hyperv_bindings as bindings;
use kernel::{
    error::to_result,
    fmt,
    prelude::*,
    sync::{
        aref::{
            ARef,
            AlwaysRefCounted, //
        },
        rcu, //
    },
    types::Opaque, //
};

use crate::{
    rtnl::Rtnl,
    Features, //
};

/// Length of an Ethernet address.
pub const ETH_ALEN: usize = bindings::ETH_ALEN as usize;

/// Length of an Ethernet header.
pub const ETH_HLEN: u32 = bindings::ETH_HLEN;

/// A network device.
///
/// # Invariants
///
/// The structure is a valid `struct net_device` as long as a reference exists.
#[repr(transparent)]
pub struct NetDevice(Opaque<bindings::net_device>);

// SAFETY: A network device can be used and released from any thread.
unsafe impl Send for NetDevice {}

// SAFETY: The methods are safe to call concurrently, or ask for the lock they need.
unsafe impl Sync for NetDevice {}

// SAFETY: `struct net_device` is reference-counted, once it is registered. Before that there is one
// owner, who does not give out an `ARef`.
unsafe impl AlwaysRefCounted for NetDevice {
    fn inc_ref(&self) {
        // SAFETY: The device is valid.
        unsafe { bindings::dev_hold(self.as_raw()) };
    }

    unsafe fn dec_ref(obj: NonNull<Self>) {
        // SAFETY: By the safety requirements the device is valid and the reference is ours.
        unsafe { bindings::dev_put(obj.as_ptr().cast()) };
    }
}

/// Displays the name of a device.
pub struct Name([u8; bindings::IFNAMSIZ as usize]);

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0
            .iter()
            .take_while(|&&byte| byte != 0)
            .try_for_each(|&byte| f.write_char(byte.into()))
    }
}

impl NetDevice {
    /// # Safety
    ///
    /// `ptr` must point to a valid device for `'a`.
    pub(crate) unsafe fn from_raw<'a>(ptr: *mut bindings::net_device) -> &'a Self {
        // SAFETY: By the safety requirements; the wrapper is transparent.
        unsafe { &*ptr.cast() }
    }

    pub(crate) fn as_raw(&self) -> *mut bindings::net_device {
        self.0.get()
    }

    /// Reads a field that somebody may be writing.
    ///
    /// # Safety
    ///
    /// `field` must point into this device.
    unsafe fn read<F: Copy>(&self, field: *const F) -> F {
        // SAFETY: By the safety requirements.
        unsafe { field.read_volatile() }
    }

    /// Name of the device, for log messages.
    pub fn name(&self) -> Name {
        let mut name = [0; bindings::IFNAMSIZ as usize];
        // SAFETY: The device is valid; a renaming at the same time gives a mixture, which is still
        // in the array.
        let source = unsafe { &raw const (*self.as_raw()).name };
        for (i, to) in name.iter_mut().enumerate() {
            // SAFETY: `i` is inside the array.
            *to = unsafe { source.cast::<u8>().add(i).read_volatile() };
        }
        Name(name)
    }

    /// Whether this is the same device as `other`.
    pub fn is(&self, other: &NetDevice) -> bool {
        core::ptr::eq(self, other)
    }

    /// Largest payload of a frame, in bytes.
    pub fn mtu(&self) -> u32 {
        // SAFETY: The field is in this device.
        unsafe { self.read(&raw const (*self.as_raw()).mtu) }
    }

    /// Flags, `IFF_*`.
    pub fn flags(&self) -> u32 {
        // SAFETY: The field is in this device.
        unsafe { self.read(&raw const (*self.as_raw()).flags) }
    }

    /// Whether all packets are wanted.
    pub fn is_promiscuous(&self) -> bool {
        self.flags() & bindings::net_device_flags_IFF_PROMISC != 0
    }

    /// Whether all multicast packets are wanted.
    pub fn is_allmulti(&self) -> bool {
        self.flags() & bindings::net_device_flags_IFF_ALLMULTI != 0
    }

    /// Whether the device does broadcasts.
    pub fn is_broadcast(&self) -> bool {
        self.flags() & bindings::net_device_flags_IFF_BROADCAST != 0
    }

    /// Active features.
    #[inline]
    pub fn features(&self) -> Features {
        // SAFETY: The field is in this device.
        Features(unsafe { self.read(&raw const (*self.as_raw()).features) })
    }

    /// Largest TCP packet that the device can segment, in bytes.
    pub fn tso_max_size(&self) -> u32 {
        // SAFETY: The field is in this device.
        unsafe { self.read(&raw const (*self.as_raw()).tso_max_size) }
    }

    /// Room that the device needs before a packet, in bytes.
    pub fn needed_headroom(&self) -> u16 {
        // SAFETY: The field is in this device.
        unsafe { self.read(&raw const (*self.as_raw()).needed_headroom) }
    }

    /// Number of transmit queues in use.
    #[inline]
    pub fn num_tx_queues(&self) -> u32 {
        // SAFETY: The field is in this device.
        unsafe { self.read(&raw const (*self.as_raw()).real_num_tx_queues) }
    }

    /// Whether this is an Ethernet device with addresses of the usual length.
    pub fn is_ethernet(&self) -> bool {
        // SAFETY: The fields are in this device and do not change.
        unsafe {
            u32::from((*self.as_raw()).type_) == bindings::ARPHRD_ETHER
                && usize::from((*self.as_raw()).addr_len) == ETH_ALEN
        }
    }

    /// The address given at manufacture; zeros if that is not known yet.
    pub fn permanent_address(&self) -> [u8; ETH_ALEN] {
        let mut address = [0; ETH_ALEN];
        // SAFETY: The field is in this device and longer than an Ethernet address.
        let source = unsafe { &raw const (*self.as_raw()).perm_addr }.cast::<[u8; ETH_ALEN]>();
        // SAFETY: See above.
        address.copy_from_slice(&unsafe { self.read(source) });
        address
    }

    /// The address in use.
    pub fn address(&self) -> [u8; ETH_ALEN] {
        // SAFETY: The field is in this device and points to at least `ETH_ALEN` bytes, whatever the
        // device's type is (`MAX_ADDR_LEN` are allocated).
        unsafe { self.read((*self.as_raw()).dev_addr.cast::<[u8; ETH_ALEN]>()) }
    }

    /// Whether the device is up.
    #[inline]
    pub fn is_running(&self) -> bool {
        // SAFETY: The device is valid.
        unsafe { bindings::netif_running(self.as_raw()) }
    }

    /// Whether the device has a carrier.
    #[inline]
    pub fn has_carrier(&self) -> bool {
        // SAFETY: The device is valid.
        unsafe { bindings::netif_carrier_ok(self.as_raw()) }
    }

    /// Whether the device is registered, and not being unregistered.
    #[inline]
    pub fn is_registered(&self) -> bool {
        // SAFETY: The device is valid.
        unsafe { bindings::netif_registered(self.as_raw()) }
    }

    /// Whether this is a VLAN device.
    pub fn is_vlan(&self) -> bool {
        // SAFETY: The device is valid.
        unsafe { bindings::is_vlan_dev(self.as_raw()) }
    }

    /// Whether this is the master of a bond.
    pub fn is_bond_master(&self) -> bool {
        // SAFETY: The device is valid.
        unsafe { bindings::netif_is_bond_master(self.as_raw()) }
    }

    /// Whether netpoll is transmitting on the device.
    #[inline]
    pub fn is_netpoll_transmitting(&self) -> bool {
        // SAFETY: The device is valid.
        unsafe { bindings::netpoll_tx_running(self.as_raw()) }
    }

    /// Whether no multicast addresses are set.
    pub fn has_no_multicast(&self) -> bool {
        // SAFETY: The device is valid; the count is read once.
        unsafe { bindings::netdev_mc_empty(self.as_raw()) }
    }

    /// The name of the slot of the PCI device to which this network device belongs.
    ///
    /// `None` if it is not a PCI device, and `Some(None)` if it has no slot.
    pub fn pci_slot(&self, _rtnl: &Rtnl) -> Option<Option<&CStr>> {
        let mut is_pci = false;
        // SAFETY: The device is valid. Its parent stays as long as the device is registered, which
        // nobody can end while the RTNL is held, and the slot as long as the parent does.
        let name = unsafe { bindings::netdev_pci_slot_name(self.as_raw(), &mut is_pci) };
        if !is_pci {
            return None;
        }
        if name.is_null() {
            return Some(None);
        }
        // SAFETY: See above; a slot's name is a C string.
        Some(Some(unsafe { CStr::from_char_ptr(name) }))
    }

    /// The device that is master of this one.
    pub fn master<'a>(&'a self, _rtnl: &'a Rtnl) -> Option<&'a NetDevice> {
        // SAFETY: The device is valid, and the RTNL is held.
        let master = unsafe { bindings::netdev_master_upper_dev_get(self.as_raw()) };
        // SAFETY: The link between the two cannot be cut while the RTNL is held, and keeps the
        // master.
        NonNull::new(master).map(|master| unsafe { Self::from_raw(master.as_ptr()) })
    }

    /// Whether both devices are in the same network namespace.
    pub fn same_namespace(&self, other: &NetDevice, _rtnl: &Rtnl) -> bool {
        // SAFETY: The devices are valid; namespaces change under the RTNL.
        unsafe { bindings::dev_net(self.as_raw()) == bindings::dev_net(other.as_raw()) }
    }

    /// Moves the device into the namespace of `other`. If its name is taken there it becomes the
    /// next free one of `eth%d`.
    pub fn move_to_namespace_of(&self, other: &NetDevice, _rtnl: &Rtnl) -> Result {
        // SAFETY: The devices are valid and the RTNL is held, under which the namespace of `other`
        // stays.
        to_result(unsafe {
            bindings::dev_change_net_namespace(
                self.as_raw(),
                bindings::dev_net(other.as_raw()),
                c"eth%d".as_char_ptr(),
            )
        })
    }

    /// Finds a device in the network namespace of this one.
    pub fn find_in_namespace(
        &self,
        _rtnl: &Rtnl,
        mut wanted: impl FnMut(&NetDevice) -> bool,
    ) -> Option<ARef<NetDevice>> {
        // SAFETY: The device is valid.
        let net = unsafe { bindings::dev_net(self.as_raw()) };
        let mut dev = core::ptr::null_mut();
        loop {
            // SAFETY: `net` is valid, `dev` is in its list or null, and the RTNL keeps the list.
            dev = unsafe { bindings::netdev_next(net, dev) };
            if dev.is_null() {
                return None;
            }
            // SAFETY: Devices in the list are valid.
            let found = unsafe { Self::from_raw(dev) };
            if wanted(found) {
                return Some(found.into());
            }
        }
    }

    /// Marks the device as a slave on which no IPv6 address is to be configured.
    ///
    /// To be called while the device is being registered, before user space hears of it.
    pub fn mark_slave(&self, _rtnl: &Rtnl) {
        // SAFETY: The device is valid, and flags change under the RTNL.
        unsafe {
            (*self.as_raw()).flags |= bindings::net_device_flags_IFF_SLAVE;
            bindings::netdev_set_no_addrconf(self.as_raw());
        }
    }

    /// Tells user space by a uevent that the device has changed.
    pub fn announce_change(&self, _rtnl: &Rtnl) {
        // SAFETY: The device is valid. For one that is not registered nothing is sent.
        // Nobody is told if there is no memory: an event is never certain.
        unsafe {
            bindings::kobject_uevent(
                &raw mut (*self.as_raw()).dev.kobj,
                bindings::kobject_action_KOBJ_CHANGE,
            )
        };
    }

    /// Brings the device up. May call notifiers.
    pub fn bring_up(&self, _rtnl: &Rtnl) -> Result {
        // SAFETY: The device is valid and the RTNL is held.
        to_result(unsafe { bindings::dev_open(self.as_raw(), core::ptr::null_mut()) })
    }

    /// Takes the device down. May call notifiers.
    pub fn take_down(&self, _rtnl: &Rtnl) {
        // SAFETY: The device is valid and the RTNL is held.
        unsafe { bindings::dev_close(self.as_raw()) };
    }

    /// Changes the MTU. May call notifiers.
    pub fn change_mtu(&self, mtu: u32, _rtnl: &Rtnl) -> Result {
        let mtu = i32::try_from(mtu)?;
        // SAFETY: The device is valid and the RTNL is held.
        to_result(unsafe { bindings::dev_set_mtu(self.as_raw(), mtu) })
    }

    /// Sets the flags of `master` and the one of a slave. May call notifiers.
    pub fn follow_flags(&self, master: &NetDevice, _rtnl: &Rtnl) -> Result {
        let flags = master.flags() | bindings::net_device_flags_IFF_SLAVE;
        // SAFETY: The device is valid and the RTNL is held.
        to_result(unsafe {
            bindings::dev_change_flags(self.as_raw(), flags, core::ptr::null_mut())
        })
    }

    /// Takes over the addresses to listen to from `master`, under its address lock.
    pub fn sync_addresses(&self, master: &NetDevice, _rtnl: &Rtnl) {
        // SAFETY: The devices are valid, and the address list of `master` is locked.
        unsafe {
            bindings::netif_addr_lock_bh(master.as_raw());
            bindings::dev_uc_sync(self.as_raw(), master.as_raw());
            bindings::dev_mc_sync(self.as_raw(), master.as_raw());
            bindings::netif_addr_unlock_bh(master.as_raw());
        }
    }

    /// Likewise in the `set_rx_mode` callback of `master`, where its addresses are locked already.
    pub(crate) fn sync_addresses_locked(&self, master: &NetDevice) {
        // SAFETY: The devices are valid, and the caller holds the address lock of `master`.
        unsafe {
            bindings::dev_uc_sync(self.as_raw(), master.as_raw());
            bindings::dev_mc_sync(self.as_raw(), master.as_raw());
        }
    }

    /// Counts one more or one less who wants all packets.
    pub fn count_promiscuous(&self, more: bool, _rtnl: &Rtnl) {
        // SAFETY: The device is valid and the RTNL is held.
        unsafe { bindings::dev_set_promiscuity(self.as_raw(), if more { 1 } else { -1 }) };
    }

    /// Counts one more or one less who wants all multicast packets.
    pub fn count_allmulti(&self, more: bool, _rtnl: &Rtnl) {
        // SAFETY: The device is valid and the RTNL is held.
        unsafe { bindings::dev_set_allmulti(self.as_raw(), if more { 1 } else { -1 }) };
    }

    /// Changes the Ethernet address. May call notifiers.
    pub fn change_address(&self, address: &[u8; ETH_ALEN], _rtnl: &Rtnl) -> Result {
        // SAFETY: All-zeroes is a valid value of this C structure.
        let mut sockaddr: bindings::__kernel_sockaddr_storage = unsafe { core::mem::zeroed() };
        let bytes = (&raw mut sockaddr).cast::<u8>();
        // SAFETY: The structure begins with a 16-bit family and is much longer than an address.
        unsafe {
            bytes
                .cast::<u16>()
                .write_unaligned(bindings::ARPHRD_ETHER as u16);
            core::ptr::copy_nonoverlapping(address.as_ptr(), bytes.add(2), ETH_ALEN);
        }
        // SAFETY: The device is valid and the RTNL is held.
        to_result(unsafe {
            bindings::dev_set_mac_address(self.as_raw(), &mut sockaddr, core::ptr::null_mut())
        })
    }

    /// Asks for features, and has those computed that the device gets. May call notifiers.
    pub fn want_features(&self, wanted: Features, _rtnl: &Rtnl) {
        // SAFETY: The device is valid and the RTNL is held.
        unsafe {
            (*self.as_raw()).wanted_features = wanted.0;
            bindings::netdev_update_features(self.as_raw());
        }
    }

    /// Calls `f` with the device's own lock held, if it has one, as the core does for notifiers.
    pub fn with_ops_lock<R>(&self, _rtnl: &Rtnl, f: impl FnOnce() -> R) -> R {
        // SAFETY: The device is valid.
        unsafe { bindings::netdev_lock_ops(self.as_raw()) };
        let result = f();
        // SAFETY: The lock was taken above.
        unsafe { bindings::netdev_unlock_ops(self.as_raw()) };
        result
    }

    /// The transmit queue that the device would select for `skb`.
    pub fn select_queue(&self, skb: &mut crate::SkBuff, _guard: &rcu::Guard) -> u16 {
        // SAFETY: The device and the packet are valid; the operations are read under RCU.
        unsafe { bindings::netdev_select_queue(self.as_raw(), skb.as_raw(), core::ptr::null_mut()) }
    }

    /// Writes to the log, with the names of the device. `level` is the character of the level.
    #[doc(hidden)]
    pub fn print(&self, level: u8, args: fmt::Arguments<'_>) {
        let level = [1, level, 0];
        // SAFETY: The device is valid, the level is a C string, and `%pA` takes a pointer to
        // `fmt::Arguments`, which is valid during the call.
        unsafe {
            bindings::netdev_printk(
                level.as_ptr().cast(),
                self.as_raw(),
                c"%pA".as_char_ptr(),
                (&raw const args).cast::<c_void>(),
            )
        };
    }
}

/// Whether another message about the network may be written to the log.
pub fn net_ratelimit() -> bool {
    // SAFETY: No requirements.
    unsafe { bindings::net_ratelimit() != 0 }
}

/// Number of queues that a device gets by default.
pub fn num_default_rss_queues() -> u32 {
    // SAFETY: No requirements.
    u32::try_from(unsafe { bindings::netif_get_num_default_rss_queues() }).unwrap_or(1)
}

/// Writes an error about a network device to the log.
#[macro_export]
macro_rules! netdev_err {
    ($dev:expr, $($f:tt)*) => { $dev.print(b'3', ::kernel::prelude::fmt!($($f)*)) };
}

/// Writes a warning about a network device to the log.
#[macro_export]
macro_rules! netdev_warn {
    ($dev:expr, $($f:tt)*) => { $dev.print(b'4', ::kernel::prelude::fmt!($($f)*)) };
}

/// Writes a notice about a network device to the log.
#[macro_export]
macro_rules! netdev_notice {
    ($dev:expr, $($f:tt)*) => { $dev.print(b'5', ::kernel::prelude::fmt!($($f)*)) };
}

/// Writes information about a network device to the log.
#[macro_export]
macro_rules! netdev_info {
    ($dev:expr, $($f:tt)*) => { $dev.print(b'6', ::kernel::prelude::fmt!($($f)*)) };
}
