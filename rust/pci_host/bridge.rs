// SPDX-License-Identifier: GPL-2.0

//! Host bridges and their root buses.

use core::{
    marker::PhantomData,
    ptr::NonNull, //
};

use hyperv_bindings as bindings;
use kernel::{
    device,
    error::{
        from_err_ptr,
        to_result, //
    },
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{
            Acquire,
            Atomic,
            Release, //
        },
        Arc, //
    },
    types::NotThreadSafe, //
};
use vmbus::MmioRange;

use crate::{
    arch,
    raw_device,
    MsiController,
    MsiDomain,
    Slot, //
};

/// A PCI domain number, reserved.
///
/// # Invariants
///
/// The number was reserved with `pci_bus_find_emul_domain_nr()` and not released since.
pub struct Domain(u16);

impl Domain {
    /// Reserves `wanted`, or if it is 0 or in use, the next free number, from 1 on after the last.
    ///
    /// Numbers in use are those that were reserved, and those of buses that firmware describes.
    pub fn reserve(wanted: u16) -> Result<Self> {
        let mut first = u32::from(wanted);
        let mut again = true;
        loop {
            // SAFETY: No requirements.
            let number =
                unsafe { bindings::pci_bus_find_emul_domain_nr(first, 1, u16::MAX.into()) };
            match u16::try_from(number) {
                Ok(number) => {
                    // INVARIANT: The number was just reserved.
                    let domain = Self(number);
                    // SAFETY: No requirements. What is found is not used.
                    if unsafe { bindings::pci_find_bus(number.into(), 0) }.is_null() {
                        return Ok(domain);
                    }
                    first = u32::from(number) + 1;
                }
                Err(_) if core::mem::take(&mut again) => first = 1,
                Err(_) => return Err(ENOSPC),
            }
        }
    }

    /// The number.
    pub fn number(&self) -> u16 {
        self.0
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the number is reserved.
        unsafe { bindings::pci_bus_release_emul_domain_nr(self.0.into()) };
    }
}

/// Size of an access to configuration space.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Width {
    /// One byte.
    U8,
    /// Two bytes.
    U16,
    /// Four bytes.
    U32,
}

impl Width {
    fn from_bytes(bytes: c_int) -> Option<Self> {
        match bytes {
            1 => Some(Self::U8),
            2 => Some(Self::U16),
            4 => Some(Self::U32),
            _ => None,
        }
    }

    /// Number of bytes.
    pub fn bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::U16 => 2,
            Self::U32 => 4,
        }
    }
}

/// Configuration space of the functions on a bus.
///
/// The methods are called in any context, maybe with interrupts off: they must not sleep.
pub trait ConfigOps: Send + Sync + 'static {
    /// Reads from the function `devfn`. `None` if there is none.
    fn read(&self, devfn: u8, offset: u16, width: Width) -> Option<u32>;

    /// Writes to the function `devfn`. `None` if there is none.
    fn write(&self, devfn: u8, offset: u16, width: Width, value: u32) -> Option<()>;
}

/// What lies behind the C bridge, in the same allocation.
#[repr(C)]
struct Private<T> {
    /// First, because the C code finds it by the bus's `sysdata`.
    sysdata: arch::Sysdata,
    /// The driver's object, null when it is gone.
    ops: Atomic<*mut T>,
}

/// A host bridge that is not registered yet.
///
/// # Invariants
///
/// `bridge` is a valid bridge of which this object holds a reference, with a [`Private<T>`] that is
/// initialised. Its `ops` is null or the pointer of `_ops`.
pub struct HostBridge<T: ConfigOps> {
    bridge: NonNull<bindings::pci_host_bridge>,
    _ops: Arc<T>,
    // What the bridge's lists and the bus point to, released after the bridge.
    windows: KVec<MmioRange>,
    msi_domain: Option<Arc<dyn Send + Sync>>,
    _parent: ARef<device::Device>,
}

// SAFETY: A bridge may be used and released from any thread.
unsafe impl<T: ConfigOps> Send for HostBridge<T> {}

// SAFETY: There is nothing to do with a shared reference.
unsafe impl<T: ConfigOps> Sync for HostBridge<T> {}

impl<T: ConfigOps> HostBridge<T> {
    const OPS: bindings::pci_ops = bindings::pci_ops {
        read: Some(Self::read_callback),
        write: Some(Self::write_callback),
        ..pin_init::zeroed()
    };

    /// Allocates a bridge below `parent`.
    pub fn new(parent: &device::Device, domain: Domain, ops: Arc<T>) -> Result<Self> {
        // SAFETY: No requirements. The private data is zeroed.
        let bridge = unsafe { bindings::pci_alloc_host_bridge(core::mem::size_of::<Private<T>>()) };
        let bridge = NonNull::new(bridge).ok_or(ENOMEM)?;
        let raw = bridge.as_ptr();

        // SAFETY: The bridge is valid and nobody else knows it.
        unsafe {
            (*raw).dev.parent = raw_device(parent);
            // The bridge releases it from now on.
            (*raw).domain_nr = domain.number().into();
        }
        let number = domain.number();
        core::mem::forget(domain);

        // SAFETY: The private data is large enough, aligned to a cache line, and zeroed, which is
        // a valid value of all of it.
        unsafe {
            let private = Self::private(raw);
            arch::init_sysdata(&raw mut (*private).sysdata, number);
            (*private).ops.store(Arc::as_ptr(&ops).cast_mut(), Release);
            (*raw).sysdata = private.cast();
            (*raw).ops = (&raw const *Self::ops_table()).cast_mut();
        }
        // INVARIANT: The bridge is valid and its private data initialised.
        Ok(Self {
            bridge,
            _ops: ops,
            windows: KVec::new(),
            msi_domain: None,
            _parent: parent.into(),
        })
    }

    fn ops_table() -> &'static bindings::pci_ops {
        &Self::OPS
    }

    /// # Safety
    ///
    /// `bridge` must be valid and have a `Private<T>`.
    unsafe fn private(bridge: *mut bindings::pci_host_bridge) -> *mut Private<T> {
        // SAFETY: By the safety requirements.
        unsafe { (&raw mut (*bridge).private).cast() }
    }

    /// The driver's object of a bus.
    ///
    /// # Safety
    ///
    /// `bus` must be the root bus of a bridge of this type, and the caller a callback of the PCI
    /// core, which makes none after the bus was removed.
    unsafe fn ops_of<'a>(bus: *mut bindings::pci_bus) -> Option<&'a T> {
        // SAFETY: By the safety requirements `sysdata` is a `Private<T>`. It lives as long as the
        // bridge, and the bus holds the bridge.
        let ops = unsafe { (*(*bus).sysdata.cast::<Private<T>>()).ops.load(Acquire) };
        // SAFETY: The object lives until the bus was removed, and the PCI core waits for accesses
        // to a function before it removes it.
        unsafe { ops.as_ref() }
    }

    /// The driver's object of a bus, if it is one of a bridge of this type.
    ///
    /// # Safety
    ///
    /// `bus` must be a valid bus, and the caller the driver of a function on it.
    pub(crate) unsafe fn ops_if_own<'a>(bus: *mut bindings::pci_bus) -> Option<&'a T> {
        // SAFETY: By the safety requirements the bus is valid. One with our operations is the root
        // bus of a bridge of this type, and it is not removed while a function on it has a driver.
        unsafe {
            core::ptr::eq((*bus).ops, Self::ops_table())
                .then(|| Self::ops_of(bus))
                .flatten()
        }
    }

    extern "C" fn read_callback(
        bus: *mut bindings::pci_bus,
        devfn: c_uint,
        offset: c_int,
        size: c_int,
        value: *mut u32,
    ) -> c_int {
        let read = || {
            // SAFETY: This is a callback of the PCI core for a bus with our operations.
            let ops = unsafe { Self::ops_of(bus) }?;
            let devfn = u8::try_from(devfn).ok()?;
            let offset = u16::try_from(offset).ok()?;
            ops.read(devfn, offset, Width::from_bytes(size)?)
        };
        let (result, read) = match read() {
            Some(read) => (bindings::PCIBIOS_SUCCESSFUL, read),
            None => (bindings::PCIBIOS_DEVICE_NOT_FOUND, u32::MAX),
        };
        // SAFETY: The PCI core passes a valid pointer.
        unsafe { *value = read };
        result as c_int
    }

    extern "C" fn write_callback(
        bus: *mut bindings::pci_bus,
        devfn: c_uint,
        offset: c_int,
        size: c_int,
        value: u32,
    ) -> c_int {
        let write = || {
            // SAFETY: This is a callback of the PCI core for a bus with our operations.
            let ops = unsafe { Self::ops_of(bus) }?;
            let devfn = u8::try_from(devfn).ok()?;
            let offset = u16::try_from(offset).ok()?;
            ops.write(devfn, offset, Width::from_bytes(size)?, value)
        };
        match write() {
            Some(()) => bindings::PCIBIOS_SUCCESSFUL as c_int,
            None => bindings::PCIBIOS_DEVICE_NOT_FOUND as c_int,
        }
    }

    /// Makes `range` a window through which the bus's functions appear in MMIO space.
    pub fn add_window(&mut self, range: MmioRange) -> Result {
        let res = range.as_raw();
        self.windows.push(range, GFP_KERNEL)?;
        // SAFETY: The resource is valid, and `windows` keeps it for as long as the bridge is
        // registered. A window may be claimed by functions, so it must not be busy.
        unsafe {
            (*res).flags |= bindings::IORESOURCE_WINDOW as kernel::ffi::c_ulong;
            (*res).flags &= !(bindings::IORESOURCE_BUSY as kernel::ffi::c_ulong);
            bindings::pci_add_resource(&raw mut (*self.bridge.as_ptr()).windows, res);
        }
        Ok(())
    }

    /// Lets the bus's functions take their interrupts from `domain`.
    pub fn set_msi_domain<C: MsiController>(&mut self, domain: Arc<MsiDomain<C>>) {
        // SAFETY: Both are valid; `msi_domain` keeps the interrupt domain for as long as the bridge
        // is registered.
        unsafe {
            bindings::dev_set_msi_domain(&raw mut (*self.bridge.as_ptr()).dev, domain.as_raw())
        };
        self.msi_domain = Some(domain);
    }

    /// Registers the bridge and finds the functions on its bus.
    ///
    /// The functions are not handed to drivers yet, see [`RootBus::add_devices`].
    pub fn scan(self) -> Result<RootBus<T>> {
        // SAFETY: The bridge is valid and not registered.
        to_result(unsafe { bindings::pci_scan_root_bus_bridge(self.bridge.as_ptr()) })?;
        // SAFETY: The bridge is registered, so it has a bus.
        let bus = unsafe { (*self.bridge.as_ptr()).bus };
        // INVARIANT: The bridge is registered with this bus.
        Ok(RootBus {
            bus: NonNull::new(bus).ok_or(ENODEV)?,
            stopped: false,
            _bridge: self,
        })
    }
}

impl<T: ConfigOps> Drop for HostBridge<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the bridge is valid and has a `Private<T>`. It is not
        // registered (any more), so the PCI core does not use it.
        unsafe {
            (*Self::private(self.bridge.as_ptr()))
                .ops
                .store(core::ptr::null_mut(), Release);
            bindings::pci_free_host_bridge(self.bridge.as_ptr());
        }
        for window in &self.windows {
            // SAFETY: The resource is valid. It was handed out busy, and only then it can be freed.
            unsafe {
                (*window.as_raw()).flags |= bindings::IORESOURCE_BUSY as kernel::ffi::c_ulong
            };
        }
    }
}

/// Proof that no one else adds or removes PCI devices.
pub struct RescanLock(NotThreadSafe);

impl RescanLock {
    /// Takes the lock, which sleeps.
    pub fn new() -> Self {
        // SAFETY: No requirements; it is released by `drop`, on the same thread.
        unsafe { bindings::pci_lock_rescan_remove() };
        Self(PhantomData)
    }
}

impl Default for RescanLock {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for RescanLock {
    fn drop(&mut self) {
        // SAFETY: The lock was taken by `new`, on the same thread.
        unsafe { bindings::pci_unlock_rescan_remove() };
    }
}

/// The root bus of a registered host bridge. Dropping it removes the bus with all its devices.
///
/// # Invariants
///
/// The bridge is registered, with `bus`.
pub struct RootBus<T: ConfigOps> {
    bus: NonNull<bindings::pci_bus>,
    stopped: bool,
    _bridge: HostBridge<T>,
}

// SAFETY: A bus may be used and removed from any thread.
unsafe impl<T: ConfigOps> Send for RootBus<T> {}

// SAFETY: All methods that change something take the rescan lock.
unsafe impl<T: ConfigOps> Sync for RootBus<T> {}

impl<T: ConfigOps> RootBus<T> {
    /// Finds new functions on the bus.
    pub fn rescan(&self, _lock: &RescanLock) {
        // SAFETY: By the type invariants the bus is valid; the lock is held.
        unsafe { bindings::pci_scan_child_bus(self.bus.as_ptr()) };
    }

    /// Gives addresses to the BARs that have none.
    pub fn assign_resources(&self, _lock: &RescanLock) {
        // SAFETY: By the type invariants the bus is valid; the lock is held.
        unsafe { bindings::pci_bus_assign_resources(self.bus.as_ptr()) };
    }

    /// Hands new functions to their drivers.
    pub fn add_devices(&self, _lock: &RescanLock) {
        // SAFETY: By the type invariants the bus is valid; the lock is held.
        unsafe { bindings::pci_bus_add_devices(self.bus.as_ptr()) };
    }

    /// Sets the NUMA node of each function to what `node` says about it: a node as the host numbers
    /// them, or `None` for the first.
    pub fn set_numa_nodes(&self, _lock: &RescanLock, node: impl Fn(u8) -> Option<u16>) {
        for devfn in 0..=u8::MAX {
            // SAFETY: By the type invariants the bus is valid. The reference is dropped below.
            let dev = unsafe { bindings::pci_get_slot(self.bus.as_ptr(), devfn.into()) };
            if dev.is_null() {
                continue;
            }
            // SAFETY: The device is valid. A node that is possible but not online is mapped to an
            // online one.
            unsafe {
                let node = match node(devfn) {
                    Some(node) if u32::from(node) < bindings::num_possible_nodes() => {
                        bindings::numa_map_to_online_node(node.into())
                    }
                    _ => 0,
                };
                bindings::set_dev_node(&raw mut (*dev).dev, node);
                bindings::pci_dev_put(dev);
            }
        }
    }

    /// Has the messages of all functions' interrupts composed anew by the controller of `domain`,
    /// the domain that the bus takes its interrupts from. For when the host has forgotten them; what
    /// is kept for each interrupt begins anew, too.
    ///
    /// The functions must be suspended: the PCI core writes the messages when it resumes them.
    /// Sleeps.
    pub fn compose_messages<C: MsiController>(&self, domain: &MsiDomain<C>) {
        extern "C" fn compose<C: MsiController>(
            dev: *mut bindings::pci_dev,
            domain: *mut c_void,
        ) -> c_int {
            // SAFETY: The PCI core gives a valid device of the bus, and the pointer given to it.
            // Nobody uses the interrupts of a suspended device.
            unsafe {
                let domain = &*domain.cast::<MsiDomain<C>>();
                domain.compose_again(&raw mut (*dev).dev);
            }
            0
        }
        let domain: *const MsiDomain<C> = domain;
        // SAFETY: By the type invariants the bus is valid. The callback gets what it expects.
        unsafe {
            bindings::pci_walk_bus(
                self.bus.as_ptr(),
                Some(compose::<C>),
                domain.cast_mut().cast(),
            )
        };
    }

    /// Takes the function away from its driver and removes it. Tells whether there was one.
    pub fn remove_device(&self, _lock: &RescanLock, devfn: u8) -> bool {
        // SAFETY: By the type invariants the bus is valid. The reference is dropped below.
        let dev = unsafe { bindings::pci_get_slot(self.bus.as_ptr(), devfn.into()) };
        if dev.is_null() {
            return false;
        }
        // SAFETY: The device is valid and the lock is held.
        unsafe {
            bindings::pci_stop_and_remove_bus_device(dev);
            bindings::pci_dev_put(dev);
        }
        true
    }

    /// Creates the sysfs entry of the physical slot of the device with the given number.
    pub fn create_slot(&self, number: u8, name: &CStr) -> Result<Slot> {
        // SAFETY: By the type invariants the bus is valid. The name is copied.
        let slot = from_err_ptr(unsafe {
            bindings::pci_create_slot(
                self.bus.as_ptr(),
                number.into(),
                name.as_char_ptr(),
                core::ptr::null_mut(),
            )
        })?;
        // SAFETY: The slot was just created.
        Ok(unsafe { Slot::from_raw(NonNull::new(slot).ok_or(ENOMEM)?) })
    }

    /// Takes all functions away from their drivers. They stay visible until the bus is dropped.
    pub fn stop(&mut self) {
        let _lock = RescanLock::new();
        self.stop_locked();
    }

    fn stop_locked(&mut self) {
        if !core::mem::replace(&mut self.stopped, true) {
            // SAFETY: By the type invariants the bus is valid; the lock is held.
            unsafe { bindings::pci_stop_root_bus(self.bus.as_ptr()) };
        }
    }
}

impl<T: ConfigOps> Drop for RootBus<T> {
    fn drop(&mut self) {
        let _lock = RescanLock::new();
        self.stop_locked();
        // SAFETY: By the type invariants the bus is valid; the lock is held. The bridge is
        // unregistered by this and `_bridge` releases it.
        unsafe { bindings::pci_remove_root_bus(self.bus.as_ptr()) };
    }
}
