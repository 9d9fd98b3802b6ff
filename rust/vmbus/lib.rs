// SPDX-License-Identifier: GPL-2.0

//! Abstractions for the VMBus, the bus of Hyper-V's synthetic devices.
//!
//! A device is *offered* by the host as a channel: a pair of ring buffers in guest memory plus a
//! way to signal each other. A driver opens the channel of its device ([`Channel`]), and may be
//! offered further ones for the same device, its subchannels. Bulk memory is shared with the host
//! as a GPADL ([`Gpadl`]).
//!
//! C header: [`include/linux/hyperv.h`](srctree/include/linux/hyperv.h)

use core::{
    marker::PhantomData,
    mem::offset_of,
    ptr::NonNull, //
};
use hyperv_bindings as bindings;
pub use hyperv_wire::{
    vmbus::Version,
    Guid, //
};
use kernel::{
    device,
    device_id::{
        RawDeviceId,
        RawDeviceIdIndex, //
    },
    driver,
    error::{
        from_result,
        to_result,
        VTABLE_DEFAULT_ERROR, //
    },
    prelude::*,
    sync::aref::AlwaysRefCounted,
    time::{
        Delta,
        Instant,
        Monotonic, //
    },
    types::Opaque,
    ThisModule, //
};

mod bounce;
mod channel;
mod completion;
mod gpa;
mod gpadl;
mod mmio;
mod packet;
mod ring;
pub mod sync;

pub use self::bounce::{
    AtomicBounce,
    Bounce, //
};
pub use self::channel::{
    ring_size,
    Channel,
    ChannelHandle,
    ChannelHandler,
    Offer,
    OpenParams,
    ReadMode,
    SubchannelOffer, //
};
pub use self::completion::Completion;
pub use self::gpa::{
    GpaRanges,
    RequestPage, //
};
pub use self::gpadl::{
    Gpadl,
    SharedBytes, //
};
pub use self::mmio::MmioRange;
pub use self::packet::{
    Packet,
    PacketKind,
    TransferPages, //
};
pub use self::ring::{
    Reader,
    Reply,
    Ring,
    PAGE_BUFFERS_MAX, //
};

/// Size of a page as Hyper-V counts them, whatever the kernel's is.
pub const HV_PAGE_SIZE: usize = 4096;

/// How often a wait looks whether the device was rescinded meanwhile.
const RESCIND_POLL: Delta = Delta::from_millis(100);

/// Whether the kernel runs on Hyper-V and its VMBus driver found a bus.
pub fn exists() -> bool {
    // SAFETY: The function only reads a variable of the bus driver.
    unsafe { bindings::hv_vmbus_exists() }
}

/// Whether the memory of the virtual machine is hidden from the host.
pub fn is_isolated() -> bool {
    // SAFETY: No requirements.
    unsafe { bindings::hv_is_isolation_supported() }
}

/// The negotiated version of the VMBus protocol.
pub fn protocol_version() -> Version {
    // SAFETY: The variable is set once, before any device or driver can exist.
    Version(unsafe { bindings::vmbus_proto_version })
}

/// An adapter for the registration of VMBus drivers, by a [`driver::Registration`].
pub struct Adapter<T: Driver>(T);

// SAFETY:
// - `bindings::hv_driver` is a C type declared as `repr(C)`.
// - `T::Data` is the type of the driver's device private data.
// - `struct hv_driver` embeds a `struct device_driver`.
// - `DEVICE_DRIVER_OFFSET` is the byte offset of that member.
unsafe impl<T: Driver> driver::DriverLayout for Adapter<T> {
    type DriverType = bindings::hv_driver;
    type DriverData<'bound> = T::Data<'bound>;
    const DEVICE_DRIVER_OFFSET: usize = offset_of!(Self::DriverType, driver);
}

// SAFETY: `unregister` may be called for an instance that was registered successfully: it undoes
// exactly what `register` did.
unsafe impl<T: Driver> driver::RegistrationOps for Adapter<T> {
    unsafe fn register(
        hdrv: &Opaque<Self::DriverType>,
        name: &'static CStr,
        module: &'static ThisModule,
    ) -> Result {
        // SAFETY: `hdrv` is not registered yet, so nobody else looks at its fields.
        unsafe {
            (*hdrv.get()).name = name.as_char_ptr();
            (*hdrv.get()).probe = Some(Self::probe_callback);
            (*hdrv.get()).remove = Some(Self::remove_callback);
            // The bus refuses to suspend the machine when there is a driver without these.
            if T::HAS_SUSPEND && T::HAS_RESUME {
                (*hdrv.get()).suspend = Some(Self::suspend_callback);
                (*hdrv.get()).resume = Some(Self::resume_callback);
            }
            (*hdrv.get()).id_table = T::ID_TABLE.as_ptr();
            (*hdrv.get()).driver.probe_type = T::PROBE_TYPE.to_raw();
        }

        // SAFETY: `hdrv` is a valid `struct hv_driver` that stays pinned until `unregister`.
        to_result(unsafe {
            bindings::__vmbus_driver_register(hdrv.get(), module.as_ptr(), name.as_char_ptr())
        })
    }

    unsafe fn unregister(hdrv: &Opaque<Self::DriverType>) {
        // SAFETY: By the safety requirements of this function `hdrv` was registered.
        unsafe { bindings::vmbus_driver_unregister(hdrv.get()) };
    }
}

impl<T: Driver> Adapter<T> {
    extern "C" fn probe_callback(
        hdev: *mut bindings::hv_device,
        id: *const bindings::hv_vmbus_device_id,
    ) -> c_int {
        // SAFETY: The bus calls this with a valid `struct hv_device`.
        //
        // INVARIANT: `hdev` is valid for the duration of `probe_callback()`.
        let hdev = unsafe { &*hdev.cast::<Device<device::CoreInternal<'_>>>() };
        bounce::prepare(hdev);

        from_result(|| {
            let data = T::probe(hdev, Self::id_info(id));

            let dev: &device::Device<device::CoreInternal<'_>> = hdev.as_ref();
            dev.set_drvdata(data)?;
            Ok(0)
        })
    }

    extern "C" fn remove_callback(hdev: *mut bindings::hv_device) {
        // SAFETY: The bus calls this with a valid `struct hv_device`.
        //
        // INVARIANT: `hdev` is valid for the duration of `remove_callback()`.
        let hdev = unsafe { &*hdev.cast::<Device<device::CoreInternal<'_>>>() };

        let dev: &device::Device<device::CoreInternal<'_>> = hdev.as_ref();

        // SAFETY: The bus only removes a device that was probed successfully, hence
        // `Device::set_drvdata()` was called with a `Pin<KBox<T::Data<'_>>>`.
        let data = unsafe { dev.drvdata_borrow::<T::Data<'_>>() };

        T::unbind(hdev, data);
    }

    extern "C" fn suspend_callback(hdev: *mut bindings::hv_device) -> c_int {
        // SAFETY: The bus calls this with a valid `struct hv_device`, to which this driver is
        // bound.
        let (hdev, data) = unsafe { Self::bound(&hdev) };

        from_result(|| T::suspend(hdev, data).map(|()| 0))
    }

    extern "C" fn resume_callback(hdev: *mut bindings::hv_device) -> c_int {
        // SAFETY: As for suspending.
        let (hdev, data) = unsafe { Self::bound(&hdev) };

        from_result(|| T::resume(hdev, data).map(|()| 0))
    }

    /// The device and the driver's data, in a callback for a bound device.
    ///
    /// # Safety
    ///
    /// `hdev` must be a valid device that this driver has probed successfully. The device must stay
    /// bound, and its lock held, as long as `hdev` is borrowed.
    unsafe fn bound(
        hdev: &*mut bindings::hv_device,
    ) -> (&Device<device::CoreInternal<'_>>, Pin<&T::Data<'_>>) {
        // SAFETY: By the safety requirements the device is valid.
        let hdev = unsafe { &*(*hdev).cast::<Device<device::CoreInternal<'_>>>() };
        let dev: &device::Device<device::CoreInternal<'_>> = hdev.as_ref();

        // SAFETY: The device was probed successfully, hence `Device::set_drvdata()` was called with
        // a `Pin<KBox<T::Data<'_>>>`.
        (hdev, unsafe { dev.drvdata_borrow::<T::Data<'_>>() })
    }

    /// The driver's information about the table entry at `id`.
    ///
    /// User space can bind a device by an id of its own (`new_id`, `driver_override`); such an id
    /// is not in the table and has no information.
    #[cfg(kernel_7_3)]
    fn id_info(id: *const bindings::hv_vmbus_device_id) -> Option<&'static T::IdInfo> {
        // CAST: `DeviceId` is a transparent wrapper of `hv_vmbus_device_id`.
        //
        // SAFETY: `id` is valid for the duration of `probe_callback()`. It is an entry of
        // `T::ID_TABLE`, or one of the bus that has 0 as `driver_data`.
        unsafe { (*id.cast::<DeviceId>()).info_unchecked_opt() }
    }

    /// The same before 7.3, when `driver_data` is an index, of which 0 is one.
    #[cfg(not(kernel_7_3))]
    fn id_info(id: *const bindings::hv_vmbus_device_id) -> Option<&'static T::IdInfo> {
        let mut entry = T::ID_TABLE.as_ptr();
        let mut index = 0;
        // SAFETY: The table ends with an all-zero entry, and the loop with it.
        while unsafe { (*entry).guid.b } != [0; 16] {
            if core::ptr::eq(entry, id) {
                return Some(T::ID_TABLE.info(index));
            }
            // SAFETY: `entry` is not the last one.
            entry = unsafe { entry.add(1) };
            index += 1;
        }
        None
    }
}

/// Abstraction for `struct hv_vmbus_device_id`.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct DeviceId(bindings::hv_vmbus_device_id);

impl DeviceId {
    /// Creates an id that matches devices of the class `guid`.
    pub const fn new(guid: Guid) -> Self {
        Self(bindings::hv_vmbus_device_id {
            guid: bindings::guid_t { b: guid.to_bytes() },
            driver_data: 0,
        })
    }
}

// SAFETY: `DeviceId` is a `#[repr(transparent)]` wrapper of `hv_vmbus_device_id` without additional
// invariants.
unsafe impl RawDeviceId for DeviceId {
    type RawType = bindings::hv_vmbus_device_id;
}

// SAFETY: `DRIVER_DATA_OFFSET` is the offset of the `driver_data` field, an unsigned long.
unsafe impl RawDeviceIdIndex for DeviceId {
    const DRIVER_DATA_OFFSET: usize = offset_of!(bindings::hv_vmbus_device_id, driver_data);

    #[cfg(not(kernel_7_3))]
    fn index(&self) -> usize {
        self.0.driver_data
    }
}

/// [`IdTable`](kernel::device_id::IdTable) type for VMBus.
pub type IdTable<T> = &'static dyn kernel::device_id::IdTable<DeviceId, T>;

/// Creates a VMBus `IdTable` with its alias for modpost.
#[cfg(kernel_7_3)]
#[macro_export]
macro_rules! vmbus_device_table {
    ($table_name:ident, $module_table_name:ident, $id_info_type:ty, $table_data:tt) => {
        ::kernel::module_device_table!(
            "vmbus",
            $crate::DeviceId,
            $table_name,
            $id_info_type,
            $table_data
        );
    };
}

/// The same before 7.3, when the alias is made apart from the table.
#[cfg(not(kernel_7_3))]
#[macro_export]
macro_rules! vmbus_device_table {
    ($table_name:ident, $module_table_name:ident, $id_info_type:ty, $table_data:expr) => {
        const $table_name: ::kernel::device_id::IdArray<
            $crate::DeviceId,
            $id_info_type,
            { $table_data.len() },
        > = ::kernel::device_id::IdArray::new($table_data);

        ::kernel::module_device_table!("vmbus", $module_table_name, $table_name);
    };
}

/// Whether devices are probed one after the other or in parallel.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum ProbeType {
    /// As the kernel likes.
    Default,
    /// Asynchronously, so that a slow device does not hold up others.
    Asynchronous,
    /// In the order of their appearance.
    Synchronous,
}

impl ProbeType {
    const fn to_raw(self) -> bindings::probe_type {
        match self {
            Self::Default => bindings::probe_type_PROBE_DEFAULT_STRATEGY,
            Self::Asynchronous => bindings::probe_type_PROBE_PREFER_ASYNCHRONOUS,
            Self::Synchronous => bindings::probe_type_PROBE_FORCE_SYNCHRONOUS,
        }
    }
}

/// The VMBus driver trait.
///
/// A driver that implements [`suspend`](Self::suspend) implements [`resume`](Self::resume), too.
#[vtable]
pub trait Driver {
    /// The type holding information about each device id supported by the driver.
    type IdInfo: 'static;

    /// The type of the driver's bus device private data.
    type Data<'bound>: Send + 'bound;

    /// The table of device ids supported by the driver.
    const ID_TABLE: IdTable<Self::IdInfo>;

    /// How devices are probed.
    const PROBE_TYPE: ProbeType = ProbeType::Default;

    /// VMBus driver probe.
    ///
    /// Called when a device matches the driver. `id_info` is `None` if the match was made by user
    /// space with an id that is not in [`Self::ID_TABLE`].
    fn probe<'bound>(
        dev: &'bound Device<device::Core<'_>>,
        id_info: Option<&'bound Self::IdInfo>,
    ) -> impl PinInit<Self::Data<'bound>, Error> + 'bound;

    /// VMBus driver unbind.
    ///
    /// Called when the driver is unbound from a device, and when the host rescinds the device. What
    /// does not need the device belongs into `Drop` of the private data.
    fn unbind<'bound>(dev: &'bound Device<device::Core<'_>>, this: Pin<&Self::Data<'bound>>) {
        let _ = (dev, this);
    }

    /// VMBus driver suspend.
    ///
    /// Called before the memory of the machine is saved, before the machine is switched off after
    /// that, and before a saved memory is restored: the device shall not use its channels until
    /// [`Self::resume`]. The bus breaks its contact with the host afterwards. Runs late, when user
    /// space and device interrupts are stopped already; those of the bus still come. An error keeps
    /// the machine from being suspended.
    ///
    /// No driver with devices must be without this if the machine is to be suspended.
    fn suspend<'bound>(
        dev: &'bound Device<device::Core<'_>>,
        this: Pin<&Self::Data<'bound>>,
    ) -> Result {
        let _ = (dev, this);
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// VMBus driver resume.
    ///
    /// Called when the bus has made contact again and the host has offered its devices, maybe
    /// another host than before. After an error the device stays bound and suspended.
    fn resume<'bound>(
        dev: &'bound Device<device::Core<'_>>,
        this: Pin<&Self::Data<'bound>>,
    ) -> Result {
        let _ = (dev, this);
        build_error!(VTABLE_DEFAULT_ERROR)
    }
}

/// A device on the VMBus.
///
/// # Invariants
///
/// A [`Device`] instance represents a valid `struct hv_device` created by the C portion of the
/// kernel. Its primary channel exists as long as the device does.
#[repr(transparent)]
pub struct Device<Ctx: device::DeviceContext = device::Normal>(
    Opaque<bindings::hv_device>,
    PhantomData<Ctx>,
);

impl<Ctx: device::DeviceContext> Device<Ctx> {
    fn as_raw(&self) -> *mut bindings::hv_device {
        self.0.get()
    }

    /// Class of the device.
    pub fn class(&self) -> Guid {
        // SAFETY: `self.as_raw()` is valid, and the field does not change.
        Guid::from_bytes(unsafe { (*self.as_raw()).dev_type.b })
    }

    /// The GUID that names this very device; the host keeps it when it takes the device away and
    /// gives it back.
    pub fn instance(&self) -> Guid {
        // SAFETY: `self.as_raw()` is valid, and the field does not change.
        Guid::from_bytes(unsafe { (*self.as_raw()).dev_instance.b })
    }

    /// The primary channel.
    pub fn offer(&self) -> &Offer {
        // SAFETY: By the type invariants the primary channel is valid as long as the device is,
        // that is, for the lifetime of `self`.
        unsafe { Offer::from_raw((*self.as_raw()).channel) }
    }

    /// Whether the host has taken the device back.
    ///
    /// It does not answer any more then, and nothing can be sent to it.
    pub fn is_rescinded(&self) -> bool {
        self.offer().is_rescinded()
    }

    /// The device as a bound one, if `bound` is the very same device.
    pub fn as_bound<'a>(
        &'a self,
        bound: &'a device::Device<device::Bound>,
    ) -> Option<&'a Device<device::Bound>> {
        // SAFETY: `self.as_raw()` is valid.
        let own = unsafe { &raw const (*self.as_raw()).device };
        // CAST: A generic device is a transparent wrapper of `struct device`.
        if !core::ptr::eq(own, (&raw const *bound).cast()) {
            return None;
        }
        // SAFETY: It is the same device, and `bound` is evidence that it stays bound for `'a`. The
        // type-state does not change the layout.
        Some(unsafe { &*(&raw const *self).cast() })
    }

    /// Waits until `event` is complete.
    ///
    /// Fails with `ENODEV` when the host takes the device back, and with `ETIMEDOUT` when `timeout`
    /// has passed: there is no wait for the host without an end. Sleeps.
    pub fn wait_for(&self, event: &Completion, timeout: Delta) -> Result {
        let start = Instant::<Monotonic>::now();
        loop {
            if event.wait_timeout(RESCIND_POLL) {
                return Ok(());
            }
            if self.is_rescinded() {
                return Err(ENODEV);
            }
            if start.elapsed() >= timeout {
                return Err(ETIMEDOUT);
            }
        }
    }
}

// SAFETY: `Device` is a transparent wrapper of `struct hv_device`, and the offset is that of its
// embedded device.
unsafe impl<Ctx: device::DeviceContext> device::AsBusDevice<Ctx> for Device<Ctx> {
    const OFFSET: usize = offset_of!(bindings::hv_device, device);
}

// SAFETY: `Device` is a transparent wrapper of a type that doesn't depend on `Device`'s generic
// argument.
kernel::impl_device_context_deref!(unsafe { Device });
kernel::impl_device_context_into_aref!(Device);

impl<Ctx: device::DeviceContext> AsRef<device::Device<Ctx>> for Device<Ctx> {
    fn as_ref(&self) -> &device::Device<Ctx> {
        // SAFETY: By the type invariant of `Self`, `self.as_raw()` is a pointer to a valid
        // `struct hv_device`.
        let dev = unsafe { &raw mut (*self.as_raw()).device };

        // SAFETY: `dev` points to a valid `struct device`.
        unsafe { device::Device::from_raw(dev) }
    }
}

// SAFETY: Instances of `Device` are always reference-counted.
unsafe impl AlwaysRefCounted for Device {
    fn inc_ref(&self) {
        // SAFETY: The existence of a shared reference guarantees that the refcount is non-zero.
        unsafe { bindings::get_device(&raw mut (*self.as_raw()).device) };
    }

    unsafe fn dec_ref(obj: NonNull<Self>) {
        // CAST: `Device` is a transparent wrapper of `bindings::hv_device`.
        let hdev = obj.cast::<bindings::hv_device>().as_ptr();

        // SAFETY: The safety requirements guarantee that the refcount is non-zero.
        unsafe { bindings::put_device(&raw mut (*hdev).device) };
    }
}

// SAFETY: A `Device` is always reference-counted and can be released from any thread.
unsafe impl Send for Device {}

// SAFETY: `Device` can be shared among threads because all methods of `Device` (i.e.
// `Device<Normal>`) are thread safe.
unsafe impl Sync for Device {}

// SAFETY: Same as `Device<Normal>`: the underlying `struct hv_device` is the same; `Bound` is a
// zero-sized type-state marker that does not affect thread safety.
unsafe impl Sync for Device<device::Bound> {}

// bindgen and the compiler of the kernel have to agree about these, or nothing here is right.
const _: () = {
    assert!(core::mem::size_of::<bindings::hv_ring_buffer>() == kernel::page::PAGE_SIZE);
    assert!(core::mem::size_of::<bindings::vmpacket_descriptor>() == 16);
    assert!(core::mem::size_of::<bindings::guid_t>() == 16);
};
