// SPDX-License-Identifier: GPL-2.0

//! An interrupt domain for the message-signalled interrupts of one PCI bus.
//!
//! It lies between the domain of each PCI device, which the PCI core makes, and the CPUs' vector
//! domain, or on arm64 the GIC's. The [`MsiController`] says which message raises an interrupt and
//! is told when the interrupt goes to another CPU.
//!
//! C header: [`include/linux/msi.h`](srctree/include/linux/msi.h)

use core::{
    marker::PhantomData,
    mem::{
        offset_of,
        MaybeUninit, //
    },
    ptr::NonNull, //
};

use hyperv_bindings as bindings;
use kernel::{
    prelude::*,
    sync::Arc, //
};

use crate::arch;

/// Name of the chip in `/proc/interrupts` and elsewhere.
const CHIP_NAME: &CStr = c"Hyper-V PCIe MSI";

/// What the names of the devices' own chips get in front.
const PREFIX: &CStr = c"HV-";

/// What a device writes where to raise an interrupt.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct MsiMessage {
    /// Guest-physical address.
    pub address: u64,
    /// Data.
    pub data: u32,
}

/// How an interrupt relates to others of its device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MsiKind {
    /// An interrupt with a message of its own, which is masked before it is requested.
    MsiX,
    /// The only MSI.
    Single,
    /// One of several MSIs, whose messages have the same address and consecutive data.
    Multi {
        /// Which one, from 0 on.
        index: u32,
        /// How many there are.
        count: u16,
    },
}

/// One interrupt, as a callback of [`MsiController`] sees it.
///
/// # Invariants
///
/// `data` is valid, belongs to an [`MsiDomain`], and has the MSI descriptor `desc` of a PCI device.
pub struct Interrupt<'a> {
    data: NonNull<bindings::irq_data>,
    desc: NonNull<bindings::msi_desc>,
    _callback: PhantomData<&'a ()>,
}

impl Interrupt<'_> {
    /// # Safety
    ///
    /// `data` must be valid for the life of the result and belong to an interrupt domain of a PCI
    /// bus.
    unsafe fn from_raw(data: *mut bindings::irq_data) -> Option<Self> {
        // SAFETY: By the safety requirements `data` is valid.
        let desc = unsafe { bindings::irq_data_get_msi_desc(data) };
        // INVARIANT: The domain is only given to PCI devices.
        Some(Self {
            data: NonNull::new(data)?,
            desc: NonNull::new(desc.cast())?,
            _callback: PhantomData,
        })
    }

    /// Linux's number of the interrupt.
    pub fn irq(&self) -> u32 {
        // SAFETY: By the type invariants `data` is valid.
        unsafe { (*self.data.as_ptr()).irq }
    }

    /// Which function it belongs to.
    pub fn devfn(&self) -> u8 {
        // SAFETY: By the type invariants the descriptor is that of a PCI device, whose `dev` is
        // embedded in a `struct pci_dev`.
        unsafe {
            let dev = (*self.desc.as_ptr()).dev;
            let pdev = dev
                .byte_sub(offset_of!(bindings::pci_dev, dev))
                .cast::<bindings::pci_dev>();
            (*pdev).devfn as u8
        }
    }

    /// Whether there are others that share its message.
    pub fn kind(&self) -> MsiKind {
        // SAFETY: By the type invariants the descriptor is valid.
        let (is_msix, count, base) = unsafe {
            (
                bindings::msi_desc_is_msix(self.desc.as_ptr().cast()),
                (*self.desc.as_ptr()).nvec_used,
                (*self.desc.as_ptr()).irq,
            )
        };
        match u16::try_from(count) {
            Ok(count) if count > 1 && !is_msix => MsiKind::Multi {
                index: self.irq().wrapping_sub(base),
                count,
            },
            _ if is_msix => MsiKind::MsiX,
            _ => MsiKind::Single,
        }
    }

    /// The message of the first of several interrupts, as it was composed before.
    pub fn first_message(&self) -> MsiMessage {
        // SAFETY: By the type invariants the descriptor is valid, and any bits are a valid message:
        // it is three unions of a number and its parts.
        unsafe {
            let msg = &raw const (*self.desc.as_ptr()).msg;
            let low = *(&raw const (*msg).__bindgen_anon_1).cast::<u32>();
            let high = *(&raw const (*msg).__bindgen_anon_2).cast::<u32>();
            MsiMessage {
                address: u64::from(high) << 32 | u64::from(low),
                data: *(&raw const (*msg).__bindgen_anon_3).cast(),
            }
        }
    }

    /// Whether the interrupt has a vector of its own. On x86 it has none before a driver requests
    /// it, but one that all such interrupts share.
    pub fn is_requested(&self) -> bool {
        !arch::is_shared(self.vector())
    }

    /// The CPU's vector that the interrupt has at present; on arm64 the number of its SPI.
    pub fn vector(&self) -> u32 {
        // SAFETY: By the type invariants `data` is valid and belongs to a bus's domain.
        unsafe { arch::vector(self.data.as_ptr()) }
    }

    /// The vector to create several MSIs with that share a message, of which this is the first.
    pub fn multi_vector(&self) -> u32 {
        // SAFETY: By the type invariants `data` is valid and belongs to a bus's domain.
        unsafe { arch::multi_vector(self.data.as_ptr()) }
    }

    /// The online CPUs it goes to at present.
    pub fn cpus(&self) -> impl Iterator<Item = u32> + '_ {
        let mut next = 0;
        core::iter::from_fn(move || {
            // SAFETY: By the type invariants `data` is valid.
            let cpu = unsafe { bindings::irq_data_next_online_cpu(self.data.as_ptr(), next) };
            next = cpu.saturating_add(1);
            // SAFETY: The variable does not change after boot.
            (cpu < unsafe { bindings::nr_cpu_ids }).then_some(cpu)
        })
    }
}

/// The first online CPU from `first` on, or else from the start.
pub fn next_online_cpu(first: u32) -> u32 {
    // SAFETY: No requirements.
    unsafe { bindings::cpumask_next_online_wrap(first) }
}

/// The driver's side of an [`MsiDomain`].
pub trait MsiController: Send + Sync + 'static {
    /// What is kept for each interrupt, from its allocation to its end.
    type Data: Default + Send + 'static;

    /// Prepares an interrupt for use. An error is that of whoever requests it.
    ///
    /// Called before [`Self::compose`], and not when another CPU or vector is chosen. Interrupts may
    /// be off.
    fn activate(&self, irq: &Interrupt<'_>, data: &mut Self::Data) -> Result;

    /// Says which message raises the interrupt.
    ///
    /// Called with interrupts off, maybe several times for an interrupt: the last message counts.
    /// An all-zero message means that it did not work.
    fn compose(&self, irq: &Interrupt<'_>, data: &mut Self::Data) -> MsiMessage;

    /// The interrupt gets enabled, maybe with a new CPU or vector, or is one of several MSIs and was
    /// composed anew while it is enabled. Must not sleep. Only called on x86: on arm64 CPUs are
    /// chosen by the GIC, not the host.
    fn unmask(&self, irq: &Interrupt<'_>, data: &mut Self::Data);

    /// The interrupt is not needed any more.
    fn free(&self, irq: &Interrupt<'_>, data: &mut Self::Data);
}

/// An interrupt domain. Dropping it removes the domain, which no device may use any more.
///
/// # Invariants
///
/// `domain` and `_fwnode` are valid and owned by this object; the domain's `host_data` is the
/// pointer of `_controller`.
pub struct MsiDomain<C: MsiController> {
    domain: NonNull<bindings::irq_domain>,
    _fwnode: FwNode,
    _controller: Arc<C>,
}

// SAFETY: A domain may be used and removed from any thread.
unsafe impl<C: MsiController> Send for MsiDomain<C> {}

// SAFETY: There is nothing to do with a shared reference but passing the pointer on.
unsafe impl<C: MsiController> Sync for MsiDomain<C> {}

/// A named firmware node, which interrupt domains are known by.
///
/// # Invariants
///
/// The node is valid and owned by this object.
struct FwNode(NonNull<bindings::fwnode_handle>);

impl FwNode {
    fn new(name: &CStr) -> Result<Self> {
        // SAFETY: The name is copied.
        let node = unsafe { bindings::irq_domain_alloc_named_fwnode(name.as_char_ptr()) };
        // INVARIANT: The node was just allocated.
        Ok(Self(NonNull::new(node).ok_or(ENOMEM)?))
    }
}

impl Drop for FwNode {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the node is ours.
        unsafe { bindings::irq_domain_free_fwnode(self.0.as_ptr()) };
    }
}

impl<C: MsiController> MsiDomain<C> {
    const CHIP: bindings::irq_chip = bindings::irq_chip {
        name: CHIP_NAME.to_bytes_with_nul().as_ptr(),
        irq_compose_msi_msg: Some(Self::compose_callback),
        irq_set_affinity: Some(bindings::irq_chip_set_affinity_parent),
        irq_ack: Some(bindings::irq_chip_ack_parent),
        irq_eoi: Some(bindings::irq_chip_eoi_parent),
        irq_mask: Some(Self::mask_callback),
        irq_unmask: Some(Self::unmask_callback),
        ..pin_init::zeroed()
    };

    const DOMAIN_OPS: bindings::irq_domain_ops = bindings::irq_domain_ops {
        alloc: Some(Self::alloc_callback),
        free: Some(Self::free_callback),
        activate: Some(Self::activate_callback),
        ..pin_init::zeroed()
    };

    const PARENT_OPS: bindings::msi_parent_ops = bindings::msi_parent_ops {
        required_flags: bindings::MSI_FLAG_USE_DEF_DOM_OPS
            | bindings::MSI_FLAG_USE_DEF_CHIP_OPS
            | bindings::MSI_FLAG_PCI_MSI_MASK_PARENT,
        supported_flags: bindings::MSI_FLAG_MULTI_PCI_MSI
            | bindings::MSI_FLAG_PCI_MSIX
            | bindings::MSI_FLAG_PCI_MSIX_ALLOC_DYN
            | bindings::MSI_GENERIC_FLAGS_MASK,
        chip_flags: arch::CHIP_FLAGS,
        bus_select_token: bindings::irq_domain_bus_token_DOMAIN_BUS_PCI_MSI,
        bus_select_mask: 0,
        prefix: PREFIX.to_bytes_with_nul().as_ptr(),
        init_dev_msi_info: Some(init_dev_msi_info),
    };

    fn chip() -> &'static bindings::irq_chip {
        &Self::CHIP
    }

    fn domain_ops() -> &'static bindings::irq_domain_ops {
        &Self::DOMAIN_OPS
    }

    fn parent_ops() -> &'static bindings::msi_parent_ops {
        &Self::PARENT_OPS
    }

    /// Creates a domain that is known as `name`.
    ///
    /// Fails with `ENODEV` if the machine has no domain to make it on.
    pub fn new(name: &CStr, controller: Arc<C>) -> Result<Self> {
        let parent = NonNull::new(arch::parent_domain()).ok_or(ENODEV)?;
        let fwnode = FwNode::new(name)?;
        let mut info = bindings::irq_domain_info {
            fwnode: fwnode.0.as_ptr(),
            ops: Self::domain_ops(),
            host_data: Arc::as_ptr(&controller).cast_mut().cast(),
            parent: parent.as_ptr(),
            ..pin_init::zeroed()
        };
        // SAFETY: All of `info` is valid; the tables are constant.
        let domain = unsafe {
            bindings::msi_create_parent_irq_domain(
                &mut info,
                core::ptr::from_ref(Self::parent_ops()).cast(),
            )
        };
        // INVARIANT: The domain was just created, with the pointer of `controller`.
        Ok(Self {
            domain: NonNull::new(domain).ok_or(ENODEV)?,
            _fwnode: fwnode,
            _controller: controller,
        })
    }

    pub(crate) fn as_raw(&self) -> *mut bindings::irq_domain {
        self.domain.as_ptr()
    }

    /// The controller and the interrupt's data.
    ///
    /// # Safety
    ///
    /// `data` must be valid, belong to a domain of this type, and not be used by others meanwhile.
    unsafe fn of<'a>(data: *mut bindings::irq_data) -> Option<(&'a C, &'a mut C::Data)> {
        // SAFETY: By the safety requirements `data` belongs to a domain of this type: its
        // `host_data` is a `C`, which lives as long as the domain, and its `chip_data` was set by
        // `alloc_callback`.
        unsafe {
            let controller = (*(*data).domain).host_data.cast::<C>().as_ref()?;
            let own = (*data).chip_data.cast::<C::Data>().as_mut()?;
            Some((controller, own))
        }
    }

    extern "C" fn activate_callback(
        _domain: *mut bindings::irq_domain,
        data: *mut bindings::irq_data,
        _reserve: bool,
    ) -> c_int {
        // SAFETY: The interrupt core calls this for a valid interrupt of ours, which is not
        // composed, unmasked, moved or freed at the same time.
        let callee = unsafe {
            arch::prepare_activation(data);
            (Interrupt::from_raw(data), Self::of(data))
        };
        let (Some(irq), Some((controller, own))) = callee else {
            return ENODEV.to_errno();
        };
        controller
            .activate(&irq, own)
            .map_or_else(|e| e.to_errno(), |()| 0)
    }

    extern "C" fn compose_callback(
        data: *mut bindings::irq_data,
        msg: *mut kernel::bindings::msi_msg,
    ) {
        // SAFETY: The interrupt core calls this for a valid interrupt with our chip; an interrupt
        // is not composed, unmasked or freed at the same time.
        let message = unsafe { (Interrupt::from_raw(data), Self::of(data)) };
        let message = match message {
            (Some(irq), Some((controller, own))) => controller.compose(&irq, own),
            _ => MsiMessage::default(),
        };
        // SAFETY: The interrupt core passes a valid pointer, and this is the structure's layout:
        // three unions of a number and its parts.
        unsafe {
            let msg = msg.cast::<bindings::msi_msg>();
            *(&raw mut (*msg).__bindgen_anon_1).cast() = message.address as u32;
            *(&raw mut (*msg).__bindgen_anon_2).cast() = (message.address >> 32) as u32;
            *(&raw mut (*msg).__bindgen_anon_3).cast() = message.data;
        }
    }

    /// Has all messages of a device composed anew, which writes them nowhere yet.
    ///
    /// # Safety
    ///
    /// `dev` must be a valid PCI device whose interrupts, if it has any, are in this domain and are
    /// not set up, changed or freed meanwhile but with its MSI descriptors locked.
    pub(crate) unsafe fn compose_again(&self, dev: *mut bindings::device) {
        let id = bindings::msi_domain_ids_MSI_DEFAULT_DOMAIN;
        let filter = bindings::msi_desc_filter_MSI_DESC_ASSOCIATED;
        // SAFETY: By the safety requirements the device is valid.
        unsafe { bindings::__msi_lock_descs(dev) };
        // SAFETY: The descriptors are locked.
        let mut desc = unsafe { bindings::msi_domain_first_desc(dev, id, filter) };
        while !desc.is_null() {
            let desc_of_type = desc.cast::<bindings::msi_desc>();
            // SAFETY: The descriptor is valid while they are locked.
            let (first, count) = unsafe { ((*desc_of_type).irq, (*desc_of_type).nvec_used) };
            for i in 0..count {
                // The others are known by the first one's message.
                let mut other = MaybeUninit::<bindings::msi_msg>::uninit();
                // SAFETY: The domain is valid. An interrupt of a descriptor that has any is valid.
                unsafe {
                    let data =
                        bindings::irq_domain_get_irq_data(self.as_raw(), first.wrapping_add(i));
                    let Some((_, own)) = data.as_mut().and_then(|data| Self::of(data)) else {
                        continue;
                    };
                    // Who was to know about them has forgotten.
                    *own = C::Data::default();
                    let msg = match i {
                        0 => &raw mut (*desc_of_type).msg,
                        _ => other.as_mut_ptr(),
                    };
                    Self::compose_callback(data, msg.cast());
                    // Where several MSIs go is not in their message, and nobody unmasks them now.
                    if let (Some(irq), Some((controller, own))) =
                        (Interrupt::from_raw(data), Self::of(data))
                    {
                        let is_multi = matches!(irq.kind(), MsiKind::Multi { .. });
                        if arch::HAS_RETARGET && is_multi && irq.is_requested() {
                            controller.unmask(&irq, own);
                        }
                    }
                }
            }
            // SAFETY: The descriptors are still locked.
            desc = unsafe { bindings::msi_next_desc(dev, id, filter) };
        }
        // SAFETY: They were locked above.
        unsafe { bindings::__msi_unlock_descs(dev) };
    }

    extern "C" fn mask_callback(data: *mut bindings::irq_data) {
        // SAFETY: The interrupt core calls this for a valid interrupt of ours, which has a parent.
        unsafe {
            if (*(*(*data).parent_data).chip).irq_mask.is_some() {
                bindings::irq_chip_mask_parent(data);
            }
        }
    }

    extern "C" fn unmask_callback(data: *mut bindings::irq_data) {
        if arch::HAS_RETARGET {
            // SAFETY: The interrupt core calls this for a valid interrupt with our chip, holding
            // the interrupt's lock.
            let callee = unsafe { (Interrupt::from_raw(data), Self::of(data)) };
            if let (Some(irq), Some((controller, own))) = callee {
                controller.unmask(&irq, own);
            }
        }
        // SAFETY: The interrupt has a parent.
        unsafe {
            if (*(*(*data).parent_data).chip).irq_unmask.is_some() {
                bindings::irq_chip_unmask_parent(data);
            }
        }
    }

    extern "C" fn alloc_callback(
        domain: *mut bindings::irq_domain,
        virq: c_uint,
        count: c_uint,
        arg: *mut c_void,
    ) -> c_int {
        // SAFETY: The interrupt core calls this with a valid domain and unused interrupts.
        let result = unsafe { arch::alloc_parent(domain, virq, count, arg) };
        if result < 0 {
            return result;
        }
        for i in 0..count {
            let Ok(own) = KBox::new(C::Data::default(), GFP_KERNEL) else {
                // SAFETY: The first `i` interrupts have their data, and the parent has all.
                unsafe {
                    Self::drop_data(domain, virq, i);
                    bindings::irq_domain_free_irqs_parent(domain, virq, count);
                }
                return ENOMEM.to_errno();
            };
            // SAFETY: The interrupt is valid, was not used before, and gets ownership of the data.
            unsafe {
                bindings::irq_domain_set_hwirq_and_chip(
                    domain,
                    virq + i,
                    0,
                    Self::chip(),
                    KBox::into_raw(own).cast(),
                );
                arch::set_handler(virq + i);
            }
        }
        0
    }

    /// Frees what `alloc_callback` allocated.
    ///
    /// # Safety
    ///
    /// The interrupts must have been set up by `alloc_callback` and not be in use any more.
    unsafe fn drop_data(domain: *mut bindings::irq_domain, virq: c_uint, count: c_uint) {
        for i in 0..count {
            // SAFETY: By the safety requirements the interrupt's data is a `KBox` of ours, or null.
            unsafe {
                let data = bindings::irq_domain_get_irq_data(domain, virq + i);
                if data.is_null() {
                    continue;
                }
                let own = (*data).chip_data.cast::<C::Data>();
                (*data).chip_data = core::ptr::null_mut();
                if !own.is_null() {
                    drop(KBox::from_raw(own));
                }
            }
        }
    }

    extern "C" fn free_callback(domain: *mut bindings::irq_domain, virq: c_uint, count: c_uint) {
        for i in 0..count {
            // SAFETY: The interrupt core calls this with interrupts of this domain that are not in
            // use any more.
            unsafe {
                let data = bindings::irq_domain_get_irq_data(domain, virq + i);
                if data.is_null() {
                    continue;
                }
                if let (Some(irq), Some((controller, own))) =
                    (Interrupt::from_raw(data), Self::of(data))
                {
                    controller.free(&irq, own);
                }
            }
        }
        // SAFETY: See above.
        unsafe {
            Self::drop_data(domain, virq, count);
            bindings::irq_domain_free_irqs_top(domain, virq, count);
        }
    }
}

impl<C: MsiController> Drop for MsiDomain<C> {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the domain is ours. The bridge kept it as long as devices
        // could use it.
        unsafe { bindings::irq_domain_remove(self.domain.as_ptr()) };
    }
}

/// Adapts the domain that the PCI core makes for one device.
extern "C" fn init_dev_msi_info(
    dev: *mut bindings::device,
    domain: *mut bindings::irq_domain,
    real_parent: *mut bindings::irq_domain,
    info: *mut bindings::msi_domain_info,
) -> bool {
    // SAFETY: The MSI core passes valid pointers.
    unsafe {
        if !bindings::msi_lib_init_dev_msi_info(dev, domain, real_parent, info) {
            return false;
        }
        let chip = (*info).chip;
        (*chip).irq_set_affinity = Some(bindings::irq_chip_set_affinity_parent);
        (*chip).irq_retrigger = Some(bindings::irq_chip_retrigger_hierarchy);
        arch::adapt_device_domain(info);
    }
    true
}
