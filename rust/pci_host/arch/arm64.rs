// SPDX-License-Identifier: GPL-2.0

//! arm64: an interrupt is an SPI of the GIC. The GIC's domain is the parent of a bus's domain. The
//! host is told the SPI with the request for a message; where the SPI goes is between Linux and the
//! GIC, so that the hypervisor need not be told.
//!
//! Which SPIs are in use the GIC's domain knows: nothing else is kept, so that buses, other drivers
//! and the firmware's devices cannot get at the same one.

use core::ptr::null_mut;

use hyperv_bindings as bindings;
use hyperv_wire::spi;
use kernel::prelude::*;

/// What the architecture's PCI code finds by a bus's `sysdata`.
pub(crate) type Sysdata = bindings::pci_config_window;

/// Fills in the data of a bus.
///
/// With ACPI the VMBus itself becomes the bus's companion, and what is said there about the
/// coherence of DMA goes for the functions.
///
/// # Safety
///
/// `sysdata` must be valid and zeroed.
pub(crate) unsafe fn init_sysdata(sysdata: *mut Sysdata, _domain: u16) {
    // SAFETY: By the safety requirements. With ACPI the VMBus's device is embedded in that of ACPI,
    // as the PCI core expects; otherwise it does not look at it.
    unsafe { (*sysdata).parent = bindings::hv_get_vmbus_root_device() };
}

/// Whether the hypervisor has hypercalls for MMIO accesses.
pub(crate) const MMIO_HYPERCALLS: bool = false;

/// Whether the hypervisor is told where an interrupt goes when it gets unmasked.
pub(crate) const HAS_RETARGET: bool = false;

/// How the chips of the devices' domains end an interrupt.
pub(crate) const CHIP_FLAGS: u32 = bindings::MSI_CHIP_FLAG_SET_EOI;

/// Prepares an interrupt that is about to get active: chooses a CPU. The GIC gets its own when the
/// interrupt is started, but the host wants one with the request for a message, which comes before.
///
/// # Safety
///
/// `data` must be valid, and nobody else may activate or move the interrupt meanwhile.
pub(crate) unsafe fn prepare_activation(data: *mut bindings::irq_data) {
    // SAFETY: By the safety requirements.
    unsafe { bindings::irq_data_choose_cpu(data) };
}

/// The domain that a bus's is made on, null if the firmware tells of none.
pub(crate) fn parent_domain() -> *mut bindings::irq_domain {
    // SAFETY: No requirements.
    unsafe { bindings::hv_gic_domain() }
}

/// Allocates the GIC's part of `count` interrupts from `virq` on: consecutive SPIs, whose first is
/// a multiple of the next power of two. Gives 0 or a negative error.
///
/// # Safety
///
/// The arguments must be those of a call of `irq_domain_ops.alloc` for a bus's domain.
pub(crate) unsafe fn alloc_parent(
    domain: *mut bindings::irq_domain,
    virq: c_uint,
    count: c_uint,
    _arg: *mut c_void,
) -> c_int {
    // Until this allocation is complete, all others on the GIC wait for it.
    let is_used = |spi: u32| {
        // SAFETY: The domain is valid, and so is its parent.
        unsafe {
            let gic = (*domain).parent;
            !bindings::__irq_resolve_mapping(gic, spi as usize, null_mut()).is_null()
        }
    };
    let Some(first) = spi::find_unused(count, is_used) else {
        return ENOSPC.to_errno();
    };
    for i in 0..count {
        // SAFETY: The interrupts are those to be allocated, and the first `i` have been.
        unsafe {
            let result = alloc_spi(domain, virq + i, first + i);
            if result < 0 {
                bindings::irq_domain_free_irqs_parent(domain, virq, i);
                return result;
            }
        }
    }
    0
}

/// Makes the GIC's part of the interrupt `virq` that SPI, which is triggered by an edge.
///
/// # Safety
///
/// As for [`alloc_parent`]; the interrupt has no such part yet.
unsafe fn alloc_spi(domain: *mut bindings::irq_domain, virq: c_uint, spi: u32) -> c_int {
    let edge = bindings::IRQ_TYPE_EDGE_RISING;
    // SAFETY: By the safety requirements the domain is valid, and the GIC's is its parent.
    let (gic, fwnode) = unsafe { ((*domain).parent, (*(*domain).parent).fwnode) };
    let mut spec = bindings::irq_fwspec {
        fwnode,
        ..pin_init::zeroed()
    };
    // SAFETY: The node is null or valid.
    if unsafe { bindings::is_of_node(fwnode) } {
        // A device tree numbers SPIs by themselves, that is what 0 stands for.
        spec.param[..3].copy_from_slice(&[0, spi - spi::GIC_FIRST, edge]);
        spec.param_count = 3;
    } else {
        spec.param[..2].copy_from_slice(&[spi, edge]);
        spec.param_count = 2;
    }
    // SAFETY: By the safety requirements; a GIC takes such a specifier, and only during the call.
    let result =
        unsafe { bindings::irq_domain_alloc_irqs_parent(domain, virq, 1, (&raw mut spec).cast()) };
    if result < 0 {
        return result;
    }
    // The GIC does as the specifier says for what the firmware describes only.
    // SAFETY: The interrupt was just allocated, so its data is valid and has a chip.
    let result = unsafe {
        let data = bindings::irq_domain_get_irq_data(gic, virq);
        match (*(*data).chip).irq_set_type {
            Some(set_type) => set_type(data, edge),
            None => EINVAL.to_errno(),
        }
    };
    if result < 0 {
        // SAFETY: The interrupt was just allocated.
        unsafe { bindings::irq_domain_free_irqs_parent(domain, virq, 1) };
    }
    result
}

/// Sets what the interrupt core does when the interrupt comes: the GIC has set it.
///
/// # Safety
///
/// None, here.
pub(crate) unsafe fn set_handler(_virq: c_uint) {}

/// Adapts the domain of one device, after [`msi_lib_init_dev_msi_info()`].
///
/// # Safety
///
/// `info` must be valid and be about a domain that does not exist yet.
pub(crate) unsafe fn adapt_device_domain(info: *mut bindings::msi_domain_info) {
    // SAFETY: By the safety requirements. The operations are the device's own; the MSI core
    // replaces those that are missing.
    unsafe { (*(*info).ops).msi_prepare = None };
}

/// The number of the interrupt's SPI.
///
/// # Safety
///
/// `data` must be valid and belong to a bus's domain.
pub(crate) unsafe fn vector(data: *mut bindings::irq_data) -> u32 {
    // SAFETY: By the safety requirements the parent's data is the GIC's, and valid.
    unsafe { (*(*data).parent_data).hwirq as u32 }
}

/// Whether the vector is one that interrupts share before they are requested: there is none.
pub(crate) fn is_shared(_vector: u32) -> bool {
    false
}

/// The vector that the host is told for several MSIs at once: the first one's, others follow.
///
/// # Safety
///
/// `first` must be valid and belong to a bus's domain.
pub(crate) unsafe fn multi_vector(first: *mut bindings::irq_data) -> u32 {
    // SAFETY: By the safety requirements.
    unsafe { vector(first) }
}
