// SPDX-License-Identifier: GPL-2.0

//! Network devices of a driver: allocation, registration, callbacks.
//!
//! C header: [`include/linux/netdevice.h`](srctree/include/linux/netdevice.h)

use core::{
    cell::UnsafeCell,
    marker::PhantomData,
    mem::{
        align_of,
        offset_of,
        size_of,
        MaybeUninit, //
    },
    ops::Deref,
    ptr::NonNull, //
};

use hyperv_bindings as bindings;
use kernel::{
    device,
    error::{
        from_result,
        to_result, //
    },
    prelude::*,
    sync::{
        rcu,
        Arc,
        ArcBorrow, //
    },
    time::Delta, //
};

use crate::{
    ethtool::{
        Ethtool,
        EthtoolOps, //
    },
    netdev::ETH_ALEN,
    rtnl,
    rtnl::Rtnl,
    xdp::{
        self,
        XdpOps, //
    },
    Features,
    NetDevice,
    SkBuff,
    Xdp, //
};

/// What became of a packet to transmit.
pub enum Xmit {
    /// It was taken.
    Done,
    /// There is no room now; the core shall try again when the queue is woken.
    Busy(SkBuff),
    /// Another device got it, see [`Xmit::on`].
    Forwarded(c_int),
}

impl Xmit {
    /// Transmits `skb` on `dev`, and tells whether it was taken there.
    pub fn on(dev: &NetDevice, skb: SkBuff) -> (Self, bool) {
        let verdict = skb.transmit_on(dev);
        let taken = matches!(
            u32::try_from(verdict),
            Ok(bindings::NET_XMIT_SUCCESS | bindings::NET_XMIT_CN)
        );
        (Self::Forwarded(verdict), taken)
    }
}

/// Counters of a device, to be added to what the core counts itself.
#[derive(Clone, Copy, Default)]
pub struct Stats {
    /// Packets received.
    pub rx_packets: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets transmitted.
    pub tx_packets: u64,
    /// Bytes transmitted.
    pub tx_bytes: u64,
    /// Packets that could not be transmitted.
    pub tx_dropped: u64,
    /// Multicast packets received.
    pub multicast: u64,
}

/// What a receive queue has counted.
#[derive(Clone, Copy, Default)]
pub struct RxQueueStats {
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
    /// Packets lost for want of memory.
    pub alloc_fail: u64,
}

/// What a transmit queue has counted.
#[derive(Clone, Copy, Default)]
pub struct TxQueueStats {
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
    /// How often the driver stopped the queue.
    pub stop: u64,
    /// How often it woke it.
    pub wake: u64,
}

/// A driver of network devices, implemented by the private data of a device.
///
/// Callbacks with a [`Rtnl`] run under the RTNL and may sleep.
pub trait Driver: Ethtool + Xdp + Sized + Send + Sync + 'static {
    /// Brings the device up.
    fn open(dev: &Device<Self>, rtnl: &Rtnl) -> Result;

    /// Takes the device down.
    fn stop(dev: &Device<Self>, rtnl: &Rtnl) -> Result;

    /// Transmits a packet. Runs with bottom halves off and the lock of `queue` held.
    fn start_xmit(
        dev: &Device<Self>,
        queue: &mut TxQueue<'_>,
        skb: SkBuff,
        guard: &rcu::Guard,
    ) -> Xmit;

    /// Selects the transmit queue of a packet. Runs with bottom halves off.
    fn select_queue(dev: &Device<Self>, skb: &mut SkBuff) -> u16;

    /// `promiscuous` or `allmulti` has changed.
    fn change_rx_flags(dev: &Device<Self>, promiscuous: bool, allmulti: bool, rtnl: &Rtnl);

    /// What is to be received has changed. Runs under the device's address lock: may not sleep.
    fn set_rx_mode(dev: &Device<Self>, addresses: &AddressLock<'_>);

    /// Takes out features that the device cannot have at present.
    fn fix_features(dev: &Device<Self>, features: Features, rtnl: &Rtnl) -> Features;

    /// Features have changed. Fails if the device keeps the old ones, after setting those it has.
    fn set_features(dev: &Device<Self>, features: Features, rtnl: &Rtnl) -> Result;

    /// Changes the MTU, which must be set by [`Device::set_mtu`].
    fn change_mtu(dev: &Device<Self>, mtu: u32, rtnl: &Rtnl) -> Result;

    /// Changes the Ethernet address; `address` is valid, and is set when this returns success.
    fn set_address(dev: &Device<Self>, address: &[u8; ETH_ALEN], rtnl: &Rtnl) -> Result;

    /// The device's counters. Must not sleep.
    fn stats(dev: &Device<Self>) -> Stats;

    /// A transmit queue was stopped for too long ([`Device::set_watchdog`]) while there was a carrier
    /// and the device was present. Must not sleep.
    fn tx_timeout(dev: &Device<Self>, queue: u32);

    /// The counters of a receive queue that is in use. The RTNL or the device's lock is held.
    fn rx_queue_stats(dev: &Device<Self>, queue: u32) -> RxQueueStats;

    /// The counters of a transmit queue that is in use. The RTNL or the device's lock is held.
    fn tx_queue_stats(dev: &Device<Self>, queue: u32) -> TxQueueStats;

    /// What has to be added to the counters of all queues in use to get those of the device. The
    /// same lock is held as for the queues, which are asked next.
    fn base_stats(dev: &Device<Self>) -> (RxQueueStats, TxQueueStats);

    /// The device is about to be unregistered; the same [`Rtnl`] is held until that is done.
    fn unregistering(dev: &Device<Self>, rtnl: &Rtnl);

    /// A slave that joined the device ([`Joined`](crate::Joined)) received a packet of `len` bytes,
    /// which now is this device's. Runs with bottom halves off.
    fn slave_received(dev: &Device<Self>, len: u32);
}

/// Evidence that the address lock of a device is held, in [`Driver::set_rx_mode`].
pub struct AddressLock<'a>(&'a NetDevice);

impl AddressLock<'_> {
    /// Has `slave` listen to the addresses of the device as well.
    pub fn sync_to(&self, slave: &NetDevice) {
        slave.sync_addresses_locked(self.0);
    }
}

/// The private area of the C allocation.
#[repr(C)]
struct Private<T> {
    owner: *const Owner<T>,
    data: T,
}

/// What owns the C allocation.
///
/// # Invariants
///
/// `dev` is a device whose private area is an initialised `Private<T>`; it is not registered when
/// this is dropped.
struct Owner<T> {
    dev: NonNull<bindings::net_device>,
    _data: PhantomData<T>,
}

// SAFETY: The device and its data can be used and freed by any thread.
unsafe impl<T: Send + Sync> Send for Owner<T> {}

// SAFETY: See above.
unsafe impl<T: Send + Sync> Sync for Owner<T> {}

impl<T> Drop for Owner<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the private area is initialised, and nobody else refers to
        // it: this was the last reference.
        unsafe {
            let private = bindings::netdev_priv(self.dev.as_ptr()).cast::<Private<T>>();
            core::ptr::drop_in_place(&raw mut (*private).data);
            bindings::free_netdev(self.dev.as_ptr());
        }
    }
}

/// A device of the driver `T`, with the driver's data.
///
/// # Invariants
///
/// The device is valid, its private area is an initialised `Private<T>`, and its [`Owner`] is alive
/// as long as a reference exists.
#[repr(transparent)]
pub struct Device<T> {
    dev: NetDevice,
    _data: PhantomData<T>,
}

impl<T> Deref for Device<T> {
    type Target = NetDevice;

    fn deref(&self) -> &NetDevice {
        &self.dev
    }
}

impl<T> Device<T> {
    /// # Safety
    ///
    /// `ptr` must be a device for which the type invariants hold for `'a`.
    pub(crate) unsafe fn from_raw<'a>(ptr: *mut bindings::net_device) -> &'a Self {
        // SAFETY: By the safety requirements; the wrapper is transparent.
        unsafe { &*ptr.cast() }
    }

    /// # Safety
    ///
    /// `data` must point to the private data of a device, for which the type invariants hold for
    /// `'a`.
    pub(crate) unsafe fn from_data<'a>(data: *mut T) -> &'a Self {
        // SAFETY: By the safety requirements the data lies in a `Private<T>`, and that is the
        // private area at the end of a `struct net_device`.
        unsafe {
            Self::from_raw(
                data.byte_sub(offset_of!(Private<T>, data))
                    .byte_sub(offset_of!(bindings::net_device, priv_))
                    .cast(),
            )
        }
    }

    fn private(&self) -> &Private<T> {
        // SAFETY: By the type invariants the private area is initialised.
        unsafe { &*bindings::netdev_priv(self.as_raw()).cast() }
    }

    /// The driver's data.
    pub fn data(&self) -> &T {
        &self.private().data
    }

    /// A reference that keeps the device's memory.
    pub fn to_ref(&self) -> DeviceRef<T> {
        // SAFETY: By the type invariants the owner is alive, and lies in an `Arc`.
        let owner = unsafe { ArcBorrow::from_raw(self.private().owner) };
        DeviceRef(owner.into())
    }

    /// The device to which the network device belongs.
    ///
    /// `None` unless the network device is registered: only then the driver is known to be bound.
    pub fn parent<'a>(&'a self, _rtnl: &'a Rtnl) -> Option<&'a device::Device<device::Bound>> {
        if !self.is_registered() {
            return None;
        }
        // SAFETY: The parent was set to a bound device before registration, and the registration
        // ends before the device is unbound. It cannot end while the RTNL is held.
        Some(unsafe { device::Device::from_raw((*self.as_raw()).dev.parent) })
    }

    /// Sets the MTU.
    pub fn set_mtu(&self, mtu: u32, _rtnl: &Rtnl) {
        // SAFETY: The device is valid; the field changes under the RTNL and is read without.
        unsafe { (&raw mut (*self.as_raw()).mtu).write_volatile(mtu) };
    }

    /// Sets the smallest and the largest possible MTU.
    pub fn set_mtu_range(&self, min: u32, max: u32, _rtnl: &Rtnl) {
        // SAFETY: The device is valid; the fields are used under the RTNL.
        unsafe {
            (*self.as_raw()).min_mtu = min;
            (*self.as_raw()).max_mtu = max;
        }
    }

    /// Sets for how long a transmit queue may be stopped, see [`Driver::tx_timeout`].
    pub fn set_watchdog(&self, timeout: Delta, _rtnl: &Rtnl) {
        let millis = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
        let jiffies = kernel::time::msecs_to_jiffies(millis);
        // SAFETY: The device is valid and the RTNL is held.
        unsafe { (*self.as_raw()).watchdog_timeo = c_int::try_from(jiffies).unwrap_or(c_int::MAX) };
    }

    /// Sets the room needed before a packet, in bytes.
    pub fn set_needed_headroom(&self, len: u16, _rtnl: &Rtnl) {
        // SAFETY: The device is valid; the field changes under the RTNL and is read without.
        unsafe { (&raw mut (*self.as_raw()).needed_headroom).write_volatile(len) };
    }

    /// Sets the Ethernet address.
    pub fn set_hw_address(&self, address: &[u8; ETH_ALEN], _rtnl: &Rtnl) {
        // SAFETY: The device is valid and the RTNL is held.
        unsafe { bindings::eth_hw_addr_set(self.as_raw(), address.as_ptr()) };
    }

    /// Features that the user can change.
    pub fn hw_features(&self, _rtnl: &Rtnl) -> Features {
        // SAFETY: The device is valid and the RTNL is held.
        Features(unsafe { (*self.as_raw()).hw_features })
    }

    /// Sets the features that the user can change.
    pub fn set_hw_features(&self, features: Features, _rtnl: &Rtnl) {
        // SAFETY: The device is valid and the RTNL is held.
        unsafe { (*self.as_raw()).hw_features = features.0 };
    }

    /// Sets the active features, without asking the driver.
    pub fn set_active_features(&self, features: Features, _rtnl: &Rtnl) {
        // SAFETY: The device is valid; the field changes under the RTNL and is read without.
        unsafe { (&raw mut (*self.as_raw()).features).write_volatile(features.0) };
    }

    /// Sets the features of VLAN devices on this one.
    pub fn set_vlan_features(&self, features: Features, _rtnl: &Rtnl) {
        // SAFETY: The device is valid and the RTNL is held.
        unsafe { (*self.as_raw()).vlan_features = features.0 };
    }

    /// Sets the largest TCP packet that the device can segment, in bytes.
    pub fn set_tso_max_size(&self, size: u32, _rtnl: &Rtnl) {
        // SAFETY: The device is valid and the RTNL is held.
        unsafe { bindings::netif_set_tso_max_size(self.as_raw(), size) };
    }

    /// Sets the number of transmit queues, and of receive queues, in use.
    pub fn set_num_queues(&self, count: u32, _rtnl: &Rtnl) -> Result {
        // SAFETY: The device is valid and the RTNL is held.
        unsafe {
            to_result(bindings::netif_set_real_num_tx_queues(self.as_raw(), count))?;
            to_result(bindings::netif_set_real_num_rx_queues(self.as_raw(), count))
        }
    }

    /// Whether the user has set the indirection table.
    pub fn is_rxfh_configured(&self, _rtnl: &Rtnl) -> bool {
        // SAFETY: The device is valid.
        unsafe { bindings::netif_is_rxfh_configured(self.as_raw()) }
    }

    /// Sets the alias, unless there is one.
    pub fn set_default_alias(&self, alias: &[u8], _rtnl: &Rtnl) {
        // SAFETY: The device is valid and the RTNL is held. The function copies the bytes; it fails
        // if they are too many or there is no memory, and then there is no alias.
        unsafe {
            if (*self.as_raw()).ifalias.is_null() {
                bindings::dev_set_alias(self.as_raw(), alias.as_ptr().cast(), alias.len());
            }
        }
    }

    /// Whether there is an alias.
    pub fn has_alias(&self, _rtnl: &Rtnl) -> bool {
        // SAFETY: The device is valid and the RTNL is held.
        !unsafe { (*self.as_raw()).ifalias }.is_null()
    }

    /// Turns the carrier on or off.
    pub fn set_carrier(&self, on: bool) {
        // SAFETY: The device is valid.
        unsafe {
            if on {
                bindings::netif_carrier_on(self.as_raw());
            } else {
                bindings::netif_carrier_off(self.as_raw());
            }
        }
    }

    /// Marks the device as present or absent; absent, it is not called to transmit.
    pub fn set_present(&self, present: bool, _rtnl: &Rtnl) {
        // SAFETY: The device is valid and the RTNL is held.
        unsafe {
            if present {
                bindings::netif_device_attach(self.as_raw());
            } else {
                bindings::netif_device_detach(self.as_raw());
            }
        }
    }

    /// Has neighbours told where this device's addresses are.
    pub fn notify_peers(&self, _rtnl: &Rtnl) {
        // SAFETY: The device is valid and the RTNL is held.
        unsafe { bindings::__netdev_notify_peers(self.as_raw()) };
    }

    /// Stops all transmit queues, and waits for those who are transmitting. Does not sleep.
    pub fn stop_all_queues(&self) {
        // SAFETY: The device is valid.
        unsafe { bindings::netif_tx_disable(self.as_raw()) };
    }

    /// Wakes all transmit queues.
    pub fn wake_all_queues(&self) {
        // SAFETY: The device is valid.
        unsafe { bindings::netif_tx_wake_all_queues(self.as_raw()) };
    }

    fn queue(&self, index: u16) -> Option<NonNull<bindings::netdev_queue>> {
        // SAFETY: The device is valid; the number of queues is that of the allocation.
        unsafe {
            if u32::from(index) >= (*self.as_raw()).num_tx_queues {
                return None;
            }
            NonNull::new(bindings::netdev_get_tx_queue(self.as_raw(), index.into()))
        }
    }

    /// Whether the driver has stopped a transmit queue.
    pub fn is_queue_stopped(&self, index: u16) -> bool {
        let Some(queue) = self.queue(index) else {
            return false;
        };
        // SAFETY: A queue of the device is valid as long as the device is.
        unsafe { bindings::netif_tx_queue_stopped(queue.as_ptr()) }
    }

    /// Calls `f` with a transmit queue whose lock is taken for that. `None` if there is no such
    /// queue.
    ///
    /// Not to be called in a hard interrupt or with interrupts off, or where the lock of a transmit
    /// queue is held already.
    pub fn with_tx_queue<R>(
        &self,
        index: u16,
        f: impl for<'q> FnOnce(&mut TxQueue<'q>) -> R,
    ) -> Option<R> {
        let queue = self.queue(index)?;
        // SAFETY: A queue of the device is valid as long as the device is.
        unsafe { bindings::netif_tx_lock_queue(queue.as_ptr()) };
        // INVARIANT: The lock was just taken. As the lifetime is any that the caller may think of,
        // `f` cannot exchange the value for another one.
        let mut locked = TxQueue {
            control: TxControl {
                queue,
                index,
                more: false,
            },
            _lock: PhantomData,
        };
        let result = f(&mut locked);
        // SAFETY: The lock was taken above.
        unsafe { bindings::netif_tx_unlock_queue(queue.as_ptr()) };
        Some(result)
    }

    /// Forgets what was sent by a transmit queue ([`TxQueue::sent`]) and not completed.
    ///
    /// Nothing may be sent by the queue meanwhile, or completed.
    pub fn reset_queue(&self, index: u16) {
        if let Some(queue) = self.queue(index) {
            // SAFETY: A queue of the device is valid as long as the device is.
            unsafe { bindings::netdev_tx_reset_queue(queue.as_ptr()) };
        }
    }

    /// Notes that packets of a transmit queue are out.
    ///
    /// # Safety
    ///
    /// Nobody else may call this for the same queue at the same time.
    pub(crate) unsafe fn complete_queue(&self, index: u16, packets: u32, bytes: u32) {
        if let Some(queue) = self.queue(index) {
            // SAFETY: A queue of the device is valid as long as the device is. By the safety
            // requirements there is one caller at a time.
            unsafe { bindings::netdev_tx_completed_queue(queue.as_ptr(), packets, bytes) };
        }
    }

    /// Whether a transmit queue is stopped, by the driver or because too much was sent
    /// ([`TxQueue::sent`]).
    pub fn is_queue_blocked(&self, index: u16) -> bool {
        let Some(queue) = self.queue(index) else {
            return false;
        };
        // SAFETY: A queue of the device is valid as long as the device is.
        unsafe { bindings::netif_xmit_stopped(queue.as_ptr()) }
    }

    /// Wakes a transmit queue.
    pub fn wake_queue(&self, index: u16) {
        if let Some(queue) = self.queue(index) {
            // SAFETY: A queue of the device is valid as long as the device is.
            unsafe { bindings::netif_tx_wake_queue(queue.as_ptr()) };
        }
    }
}

/// A transmit queue whose lock is held.
///
/// There is one value for a queue, which gives access to the data that the lock protects
/// ([`TxLocked`]). While that is borrowed, the queue is still there as [`TxControl`].
pub struct TxQueue<'a> {
    control: TxControl,
    _lock: PhantomData<&'a mut ()>,
}

impl TxQueue<'_> {
    /// Says whether another packet will follow at once, where it is not the core that knows.
    pub fn set_more(&mut self, more: bool) {
        self.control.more = more;
    }
}

impl Deref for TxQueue<'_> {
    type Target = TxControl;

    #[inline]
    fn deref(&self) -> &TxControl {
        &self.control
    }
}

/// What can be done with a transmit queue whose lock is held.
///
/// # Invariants
///
/// `queue` is valid, and its transmit lock is held as long as the value exists.
pub struct TxControl {
    queue: NonNull<bindings::netdev_queue>,
    index: u16,
    more: bool,
}

impl TxControl {
    /// Number of the queue.
    #[inline]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Stops the queue: no more packets until it is woken.
    #[inline]
    pub fn stop(&self) {
        // SAFETY: By the type invariants the queue is valid.
        unsafe { bindings::netif_tx_stop_queue(self.queue.as_ptr()) };
    }

    /// Whether the driver has stopped the queue.
    #[inline]
    pub fn is_stopped(&self) -> bool {
        // SAFETY: By the type invariants the queue is valid.
        unsafe { bindings::netif_tx_queue_stopped(self.queue.as_ptr()) }
    }

    /// Wakes the queue.
    #[inline]
    pub fn wake(&self) {
        // SAFETY: By the type invariants the queue is valid.
        unsafe { bindings::netif_tx_wake_queue(self.queue.as_ptr()) };
    }

    /// Notes that `bytes` are about to be sent: no more than the queue's limit (BQL) shall be on
    /// their way. The poll of the queue says when they are out, see
    /// [`PollContext::completed`](crate::PollContext::completed).
    #[inline]
    pub fn sent(&self, bytes: u32) {
        // SAFETY: By the type invariants the queue is valid and locked.
        unsafe { bindings::netdev_tx_sent_queue(self.queue.as_ptr(), bytes) };
    }

    /// Takes [`TxControl::sent`] back: they could not be sent.
    pub fn not_sent(&self, bytes: u32) {
        // SAFETY: By the type invariants the queue is valid and locked.
        unsafe { bindings::netdev_tx_unsend_queue(self.queue.as_ptr(), bytes) };
    }

    /// Whether another packet will follow at once. Not if the queue is stopped.
    #[inline]
    pub fn more(&self) -> bool {
        // SAFETY: By the type invariants the queue is valid.
        self.more && !unsafe { bindings::netif_xmit_stopped(self.queue.as_ptr()) }
    }
}

/// Data that is protected by the lock of a transmit queue.
///
/// # Invariants
///
/// `data` is accessed only with the transmit lock of `queue`, or an exclusive reference.
pub struct TxLocked<T> {
    queue: NonNull<bindings::netdev_queue>,
    data: UnsafeCell<T>,
}

// SAFETY: The data moves with the value; the pointer is only compared.
unsafe impl<T: Send> Send for TxLocked<T> {}

// SAFETY: By the type invariants only one thread at a time accesses the data.
unsafe impl<T: Send> Sync for TxLocked<T> {}

impl<T> TxLocked<T> {
    /// Data for the transmit queue `index` of `dev`. `EINVAL` if there is no such queue.
    pub fn new<D>(dev: &Device<D>, index: u16, data: T) -> Result<Self> {
        Ok(Self {
            queue: dev.queue(index).ok_or(EINVAL)?,
            data: UnsafeCell::new(data),
        })
    }

    /// The data, if `queue` is the queue whose lock protects it, and what else can be done with the
    /// queue meanwhile.
    #[inline]
    pub fn get<'a>(&'a self, queue: &'a mut TxQueue<'_>) -> Option<(&'a mut T, &'a TxControl)> {
        if queue.queue != self.queue {
            return None;
        }
        // SAFETY: The lock is held by the invariants of `TxControl`, and there is only one
        // `TxQueue` while it is, which is borrowed exclusively as long as the data is.
        Some((unsafe { &mut *self.data.get() }, &queue.control))
    }
}

/// A counted reference to a device of the driver `T`.
///
/// It keeps the device's memory and data, whether or not the device is registered. A device whose
/// data holds such a reference to itself must give that up in [`Driver::unregistering`].
pub struct DeviceRef<T>(Arc<Owner<T>>);

// SAFETY: A device is only made for a `T: Driver`, which can be used and dropped by any thread. A
// bound would not do: data with a reference to its own device would need itself.
unsafe impl<T> Send for DeviceRef<T> {}

// SAFETY: See above.
unsafe impl<T> Sync for DeviceRef<T> {}

impl<T> Clone for DeviceRef<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Deref for DeviceRef<T> {
    type Target = Device<T>;

    fn deref(&self) -> &Device<T> {
        // SAFETY: By the invariants of `Owner` the device is valid and initialised.
        unsafe { Device::from_raw(self.0.dev.as_ptr()) }
    }
}

/// A device that is not registered.
pub struct UnregisteredDevice<'bound, T: Driver> {
    dev: DeviceRef<T>,
    _parent: PhantomData<&'bound device::Device<device::Bound>>,
}

impl<'bound, T: Driver> UnregisteredDevice<'bound, T> {
    /// Allocates an Ethernet device with `queues` transmit and as many receive queues, of which one
    /// is in use, and without carrier.
    pub fn new(
        parent: &'bound device::Device<device::Bound>,
        queues: u32,
        data: impl PinInit<T, Error>,
    ) -> Result<Self> {
        const { assert!(align_of::<Private<T>>() <= 32) };
        let size = i32::try_from(size_of::<Private<T>>())?;
        // SAFETY: No requirements.
        let raw = unsafe { bindings::alloc_etherdev_mqs(size, queues, queues) };
        let raw = NonNull::new(raw).ok_or(ENOMEM)?;
        // SAFETY: The allocation has a private area of the right size and alignment, to which there
        // is no other reference, and nobody keeps this one.
        let slot: &'static mut MaybeUninit<T> = unsafe {
            let private = bindings::netdev_priv(raw.as_ptr()).cast::<Private<T>>();
            &mut *(&raw mut (*private).data).cast()
        };
        if let Err(e) = slot.write_pin_init(data) {
            // SAFETY: The device is ours and not registered.
            unsafe { bindings::free_netdev(raw.as_ptr()) };
            return Err(e);
        }
        // INVARIANT: The data is initialised. If the allocation fails, dropping the owner
        // frees all.
        let owner = Arc::new(
            Owner {
                dev: raw,
                _data: PhantomData,
            },
            GFP_KERNEL,
        )?;
        // SAFETY: The device is ours. The owner's address does not change.
        unsafe {
            let private = bindings::netdev_priv(raw.as_ptr()).cast::<Private<T>>();
            (*private).owner = Arc::as_ptr(&owner);
            (*raw.as_ptr()).dev.parent = parent.as_raw_device();
            (*raw.as_ptr()).netdev_ops = &Ops::<T>::NETDEV;
            (*raw.as_ptr()).ethtool_ops = &EthtoolOps::<T>::OPS;
            (*raw.as_ptr()).xdp_features = xdp::FEATURES;
            (*raw.as_ptr()).stat_ops = &Ops::<T>::STAT;
            bindings::netif_carrier_off(raw.as_ptr());
            bindings::netif_set_real_num_tx_queues(raw.as_ptr(), 1);
            bindings::netif_set_real_num_rx_queues(raw.as_ptr(), 1);
        }
        Ok(Self {
            dev: DeviceRef(owner),
            _parent: PhantomData,
        })
    }

    /// Registers the device. Callbacks can come before this returns.
    pub fn register(self, _rtnl: &Rtnl) -> Result<Registration<'bound, T>> {
        // SAFETY: The device is not registered, and the RTNL is held.
        to_result(unsafe { bindings::register_netdevice(self.dev.as_raw()) })?;
        Ok(Registration {
            dev: self.dev,
            _parent: PhantomData,
        })
    }
}

impl<T: Driver> Deref for UnregisteredDevice<'_, T> {
    type Target = Device<T>;

    fn deref(&self) -> &Device<T> {
        &self.dev
    }
}

/// The registration of a device.
///
/// Dropping it takes the RTNL and unregisters the device.
pub struct Registration<'bound, T: Driver> {
    dev: DeviceRef<T>,
    _parent: PhantomData<&'bound device::Device<device::Bound>>,
}

impl<T: Driver> Deref for Registration<'_, T> {
    type Target = Device<T>;

    fn deref(&self) -> &Device<T> {
        &self.dev
    }
}

impl<T: Driver> Drop for Registration<'_, T> {
    fn drop(&mut self) {
        let rtnl = rtnl::lock();
        T::unregistering(&self.dev, &rtnl);
        // SAFETY: The device is registered and the RTNL is held.
        unsafe { bindings::unregister_netdevice_queue(self.dev.as_raw(), core::ptr::null_mut()) };
        // This waits until nobody has a reference to the device any more; only then `dev` may go.
        drop(rtnl);
    }
}

/// Access to the pointer in a generic device, which the `kernel` crate keeps to itself.
trait AsRawDevice {
    fn as_raw_device(&self) -> *mut bindings::device;
}

impl<Ctx: device::DeviceContext> AsRawDevice for device::Device<Ctx> {
    fn as_raw_device(&self) -> *mut bindings::device {
        // CAST: `device::Device` is a transparent wrapper of `Opaque<bindings::device>`.
        (&raw const *self).cast_mut().cast()
    }
}

/// The table of callbacks.
struct Ops<T>(PhantomData<T>);

impl<T: Driver> Ops<T> {
    const NETDEV: bindings::net_device_ops = bindings::net_device_ops {
        ndo_open: Some(Self::open),
        ndo_stop: Some(Self::stop),
        ndo_start_xmit: Some(Self::start_xmit),
        ndo_select_queue: Some(Self::select_queue),
        ndo_change_rx_flags: Some(Self::change_rx_flags),
        ndo_set_rx_mode: Some(Self::set_rx_mode),
        ndo_fix_features: Some(Self::fix_features),
        ndo_set_features: Some(Self::set_features),
        ndo_change_mtu: Some(Self::change_mtu),
        ndo_validate_addr: Some(bindings::eth_validate_addr),
        ndo_set_mac_address: Some(Self::set_mac_address),
        ndo_get_stats64: Some(Self::get_stats64),
        ndo_tx_timeout: Some(Self::tx_timeout),
        ndo_bpf: Some(XdpOps::<T>::bpf),
        ndo_xdp_xmit: Some(XdpOps::<T>::xmit),
        ..pin_init::zeroed()
    };

    const STAT: bindings::netdev_stat_ops = bindings::netdev_stat_ops {
        get_queue_stats_rx: Some(Self::get_queue_stats_rx),
        get_queue_stats_tx: Some(Self::get_queue_stats_tx),
        get_base_stats: Some(Self::get_base_stats),
    };

    /// # Safety
    ///
    /// Only to be called in a callback of the device `dev`, by which its registration is alive.
    unsafe fn device<'a>(dev: *mut bindings::net_device) -> &'a Device<T> {
        // SAFETY: The callbacks are set for devices of `UnregisteredDevice<T>` only; the
        // registration, which keeps the owner, ends after the last callback.
        unsafe { Device::from_raw(dev) }
    }

    /// # Safety
    ///
    /// Only the core calls this, as `ndo_open` of a registered device of the driver `T`.
    unsafe extern "C" fn open(dev: *mut bindings::net_device) -> c_int {
        // SAFETY: The core calls this with a registered device and the RTNL held.
        let (dev, rtnl) = unsafe { (Self::device(dev), Rtnl::assume()) };
        from_result(|| T::open(dev, &rtnl).map(|()| 0))
    }

    /// # Safety
    ///
    /// Only the core calls this, as `ndo_stop` of a registered device of the driver `T`.
    unsafe extern "C" fn stop(dev: *mut bindings::net_device) -> c_int {
        // SAFETY: The core calls this with a registered device and the RTNL held.
        let (dev, rtnl) = unsafe { (Self::device(dev), Rtnl::assume()) };
        from_result(|| T::stop(dev, &rtnl).map(|()| 0))
    }

    /// # Safety
    ///
    /// Only the core calls this, as `ndo_start_xmit` of a registered device of the driver `T`.
    unsafe extern "C" fn start_xmit(
        skb: *mut bindings::sk_buff,
        dev: *mut bindings::net_device,
    ) -> bindings::netdev_tx_t {
        // SAFETY: The core calls this with a registered device, and with a packet that becomes ours
        // unless we say that we are busy.
        let (dev, skb) = unsafe {
            (
                Self::device(dev),
                SkBuff::from_raw(NonNull::new_unchecked(skb)),
            )
        };
        let index = skb.queue_mapping();
        let Some(queue) = dev.queue(index) else {
            return bindings::netdev_tx_NETDEV_TX_OK;
        };
        // INVARIANT: The core holds the lock of the queue that the packet is mapped to.
        let mut queue = TxQueue {
            control: TxControl {
                queue,
                index,
                // SAFETY: We are transmitting on this CPU.
                more: unsafe { bindings::netdev_xmit_more() },
            },
            _lock: PhantomData,
        };
        // SAFETY: The core transmits with bottom halves disabled, which delays a grace period, too.
        let guard = unsafe { crate::rcu::assume_read_locked() };
        match T::start_xmit(dev, &mut queue, skb, &guard) {
            Xmit::Done => bindings::netdev_tx_NETDEV_TX_OK,
            Xmit::Busy(skb) => {
                // It goes back to the core.
                skb.into_raw();
                bindings::netdev_tx_NETDEV_TX_BUSY
            }
            Xmit::Forwarded(verdict) => verdict,
        }
    }

    /// # Safety
    ///
    /// Only the core calls this, as `ndo_select_queue` of a registered device of the driver `T`.
    unsafe extern "C" fn select_queue(
        dev: *mut bindings::net_device,
        skb: *mut bindings::sk_buff,
        _sb_dev: *mut bindings::net_device,
    ) -> u16 {
        // SAFETY: The core calls this with a registered device and a packet that nobody else uses;
        // it stays the core's.
        let (dev, mut skb) = unsafe {
            (
                Self::device(dev),
                core::mem::ManuallyDrop::new(SkBuff::from_raw(NonNull::new_unchecked(skb))),
            )
        };
        T::select_queue(dev, &mut skb)
    }

    /// # Safety
    ///
    /// Only the core calls this, as `ndo_change_rx_flags` of a registered device of the driver `T`.
    unsafe extern "C" fn change_rx_flags(dev: *mut bindings::net_device, change: c_int) {
        // SAFETY: The core calls this with a registered device and the RTNL held.
        let (dev, rtnl) = unsafe { (Self::device(dev), Rtnl::assume()) };
        let change = change as u32;
        T::change_rx_flags(
            dev,
            change & bindings::net_device_flags_IFF_PROMISC != 0,
            change & bindings::net_device_flags_IFF_ALLMULTI != 0,
            &rtnl,
        );
    }

    /// # Safety
    ///
    /// Only the core calls this, as `ndo_set_rx_mode` of a registered device of the driver `T`.
    unsafe extern "C" fn set_rx_mode(dev: *mut bindings::net_device) {
        // SAFETY: The core calls this with a registered device.
        let dev: &Device<T> = unsafe { Self::device(dev) };
        // The core holds the address lock.
        T::set_rx_mode(dev, &AddressLock(dev));
    }

    /// # Safety
    ///
    /// Only the core calls this, as `ndo_fix_features` of a device of the driver `T`.
    unsafe extern "C" fn fix_features(
        dev: *mut bindings::net_device,
        features: bindings::netdev_features_t,
    ) -> bindings::netdev_features_t {
        // SAFETY: The core calls this with a device that is registered, or being registered, and
        // the RTNL held.
        let (dev, rtnl) = unsafe { (Self::device(dev), Rtnl::assume()) };
        T::fix_features(dev, Features(features), &rtnl).0
    }

    /// # Safety
    ///
    /// Only the core calls this, as `ndo_set_features` of a registered device of the driver `T`.
    unsafe extern "C" fn set_features(
        dev: *mut bindings::net_device,
        features: bindings::netdev_features_t,
    ) -> c_int {
        // SAFETY: The core calls this with a registered device and the RTNL held.
        let (dev, rtnl) = unsafe { (Self::device(dev), Rtnl::assume()) };
        from_result(|| T::set_features(dev, Features(features), &rtnl).map(|()| 0))
    }

    /// # Safety
    ///
    /// Only the core calls this, as `ndo_change_mtu` of a registered device of the driver `T`.
    unsafe extern "C" fn change_mtu(dev: *mut bindings::net_device, mtu: c_int) -> c_int {
        // SAFETY: The core calls this with a registered device and the RTNL held.
        let (dev, rtnl) = unsafe { (Self::device(dev), Rtnl::assume()) };
        from_result(|| T::change_mtu(dev, u32::try_from(mtu)?, &rtnl).map(|()| 0))
    }

    /// # Safety
    ///
    /// Only the core calls this, as `ndo_set_mac_address` of a registered device of the driver `T`.
    unsafe extern "C" fn set_mac_address(
        dev: *mut bindings::net_device,
        sockaddr: *mut c_void,
    ) -> c_int {
        from_result(|| {
            // SAFETY: The core calls this with a valid device and a `struct sockaddr`.
            to_result(unsafe { bindings::eth_prepare_mac_addr_change(dev, sockaddr) })?;
            let mut address = [0; ETH_ALEN];
            // SAFETY: The address follows the 16-bit family.
            unsafe {
                core::ptr::copy_nonoverlapping(
                    sockaddr.cast::<u8>().add(2),
                    address.as_mut_ptr(),
                    ETH_ALEN,
                );
            }
            // SAFETY: The core calls this with a registered device and the RTNL held.
            let (typed, rtnl) = unsafe { (Self::device(dev), Rtnl::assume()) };
            T::set_address(typed, &address, &rtnl)?;
            // SAFETY: As above.
            unsafe { bindings::eth_commit_mac_addr_change(dev, sockaddr) };
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// Only the core calls this, as `ndo_get_stats64` of a registered device of the driver `T`.
    unsafe extern "C" fn get_stats64(
        dev: *mut bindings::net_device,
        to: *mut bindings::rtnl_link_stats64,
    ) {
        // SAFETY: The core calls this with a registered device.
        let stats = T::stats(unsafe { Self::device(dev) });
        // SAFETY: `to` is valid for writes, and so is the device.
        unsafe {
            bindings::netdev_stats_to_stats64(to, &raw const (*dev).stats);
            (*to).rx_packets += stats.rx_packets;
            (*to).rx_bytes += stats.rx_bytes;
            (*to).tx_packets += stats.tx_packets;
            (*to).tx_bytes += stats.tx_bytes;
            (*to).tx_dropped += stats.tx_dropped;
            (*to).multicast += stats.multicast;
        }
    }

    /// # Safety
    ///
    /// Only the core calls this, as `ndo_tx_timeout` of a registered device of the driver `T`.
    unsafe extern "C" fn tx_timeout(dev: *mut bindings::net_device, queue: c_uint) {
        // SAFETY: The core calls this with a registered device.
        T::tx_timeout(unsafe { Self::device(dev) }, queue);
    }

    /// # Safety
    ///
    /// `to` must be valid for writes.
    unsafe fn put_rx(stats: RxQueueStats, to: *mut bindings::netdev_queue_stats_rx) {
        // SAFETY: By the safety requirements. What is not counted is left alone.
        unsafe {
            (*to).packets = stats.packets;
            (*to).bytes = stats.bytes;
            (*to).alloc_fail = stats.alloc_fail;
        }
    }

    /// # Safety
    ///
    /// `to` must be valid for writes.
    unsafe fn put_tx(stats: TxQueueStats, to: *mut bindings::netdev_queue_stats_tx) {
        // SAFETY: By the safety requirements. What is not counted is left alone.
        unsafe {
            (*to).packets = stats.packets;
            (*to).bytes = stats.bytes;
            (*to).stop = stats.stop;
            (*to).wake = stats.wake;
        }
    }

    /// # Safety
    ///
    /// Only the core calls this, as `get_queue_stats_rx` of a registered device of the driver `T`.
    unsafe extern "C" fn get_queue_stats_rx(
        dev: *mut bindings::net_device,
        queue: c_int,
        to: *mut bindings::netdev_queue_stats_rx,
    ) {
        // SAFETY: The core calls this with a registered device, and `to` is valid for writes.
        unsafe { Self::put_rx(T::rx_queue_stats(Self::device(dev), queue as u32), to) };
    }

    /// # Safety
    ///
    /// Only the core calls this, as `get_queue_stats_tx` of a registered device of the driver `T`.
    unsafe extern "C" fn get_queue_stats_tx(
        dev: *mut bindings::net_device,
        queue: c_int,
        to: *mut bindings::netdev_queue_stats_tx,
    ) {
        // SAFETY: The core calls this with a registered device, and `to` is valid for writes.
        unsafe { Self::put_tx(T::tx_queue_stats(Self::device(dev), queue as u32), to) };
    }

    /// # Safety
    ///
    /// Only the core calls this, as `get_base_stats` of a registered device of the driver `T`.
    unsafe extern "C" fn get_base_stats(
        dev: *mut bindings::net_device,
        rx: *mut bindings::netdev_queue_stats_rx,
        tx: *mut bindings::netdev_queue_stats_tx,
    ) {
        // SAFETY: The core calls this with a registered device, and both are valid for writes.
        unsafe {
            let (from_rx, from_tx) = T::base_stats(Self::device(dev));
            Self::put_rx(from_rx, rx);
            Self::put_tx(from_tx, tx);
        }
    }
}
