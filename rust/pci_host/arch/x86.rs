// SPDX-License-Identifier: GPL-2.0

//! x86: an interrupt is a vector of a CPU's local APIC. The domain of all vectors is the parent of a
//! bus's domain, and the hypervisor is told by hypercall where a message leads.

use hyperv_bindings as bindings;
use kernel::prelude::*;

/// What the architecture's PCI code finds by a bus's `sysdata`.
pub(crate) type Sysdata = bindings::pci_sysdata;

/// Fills in the data of a bus with the given domain number.
///
/// # Safety
///
/// `sysdata` must be valid and zeroed.
pub(crate) unsafe fn init_sysdata(sysdata: *mut Sysdata, domain: u16) {
    // SAFETY: By the safety requirements.
    unsafe { (*sysdata).domain = domain.into() };
}

/// Whether the hypervisor has hypercalls for MMIO accesses.
pub(crate) const MMIO_HYPERCALLS: bool = true;

/// Whether the hypervisor is told where an interrupt goes when it gets unmasked.
pub(crate) const HAS_RETARGET: bool = true;

/// How the chips of the devices' domains end an interrupt.
pub(crate) const CHIP_FLAGS: u32 = bindings::MSI_CHIP_FLAG_SET_ACK;

/// Prepares an interrupt that is about to get active: nothing is to be done.
///
/// # Safety
///
/// None, here.
pub(crate) unsafe fn prepare_activation(_data: *mut bindings::irq_data) {}

/// The domain that a bus's is made on.
pub(crate) fn parent_domain() -> *mut bindings::irq_domain {
    // SAFETY: The variable is set at boot and does not change.
    unsafe { bindings::x86_vector_domain }
}

/// Allocates the parent's part of `count` interrupts from `virq` on. Gives 0 or a negative error.
///
/// # Safety
///
/// The arguments must be those of a call of `irq_domain_ops.alloc` for a bus's domain.
pub(crate) unsafe fn alloc_parent(
    domain: *mut bindings::irq_domain,
    virq: c_uint,
    count: c_uint,
    arg: *mut c_void,
) -> c_int {
    // SAFETY: By the safety requirements.
    unsafe { bindings::irq_domain_alloc_irqs_parent(domain, virq, count, arg) }
}

/// Sets what the interrupt core does when the interrupt comes.
///
/// # Safety
///
/// The interrupt must be valid and not be in use yet.
pub(crate) unsafe fn set_handler(virq: c_uint) {
    // SAFETY: By the safety requirements; the handler is for any interrupt and the name is static.
    unsafe {
        bindings::__irq_set_handler(
            virq,
            Some(bindings::handle_edge_irq),
            0,
            c"edge".as_char_ptr(),
        )
    };
}

/// Adapts the domain of one device, after [`msi_lib_init_dev_msi_info()`].
///
/// # Safety
///
/// `info` must be valid and be about a domain that does not exist yet.
pub(crate) unsafe fn adapt_device_domain(info: *mut bindings::msi_domain_info) {
    // SAFETY: By the safety requirements. Operations and chip are the device's own.
    unsafe {
        (*(*info).ops).msi_prepare = Some(bindings::pci_msi_prepare);
        (*(*info).chip).flags |= bindings::IRQCHIP_MOVE_DEFERRED as kernel::ffi::c_ulong;
    }
}

/// The CPU's vector that an interrupt has at present.
///
/// # Safety
///
/// `data` must be valid and belong to a bus's domain.
pub(crate) unsafe fn vector(data: *mut bindings::irq_data) -> u32 {
    // SAFETY: By the safety requirements the parent is the vector domain, where the configuration
    // lives as long as the interrupt.
    unsafe {
        match bindings::irqd_cfg(data)
            .cast::<bindings::irq_cfg>()
            .as_ref()
        {
            Some(cfg) => cfg.vector,
            None => 0,
        }
    }
}

/// Whether the vector is that which all interrupts share before they are requested.
pub(crate) fn is_shared(vector: u32) -> bool {
    vector == bindings::MANAGED_IRQ_SHUTDOWN_VECTOR
}

/// The vector that the host is told for several MSIs at once.
///
/// Any would do, as the retarget gives each its own. It must be a multiple of their number, and not
/// zero.
///
/// # Safety
///
/// None, here.
pub(crate) unsafe fn multi_vector(_first: *mut bindings::irq_data) -> u32 {
    32
}
