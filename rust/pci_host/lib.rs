// SPDX-License-Identifier: GPL-2.0

//! Abstractions for drivers of PCI host bridges that are not described by firmware.
//!
//! A driver reserves a domain number ([`Domain`]), allocates a [`HostBridge`] with its
//! configuration space ([`ConfigOps`]), gives it windows of MMIO space and an interrupt domain
//! ([`MsiDomain`]), and scans it, which makes it a [`RootBus`]. Drivers of functions reach their
//! configuration blocks by way of the [`BlockInterface`].
//!
//! C header: [`include/linux/pci.h`](srctree/include/linux/pci.h)

use hyperv_bindings as bindings;

// What differs between architectures: one set of functions, with the same names.
#[cfg_attr(CONFIG_X86_64, path = "arch/x86.rs")]
#[cfg_attr(CONFIG_ARM64, path = "arch/arm64.rs")]
mod arch;
mod block;
mod bridge;
mod config_window;
pub mod hypercall;
mod msi;
mod queue;
mod slot;

pub use self::block::{
    BlockInterface,
    BlockOps,
    Invalidate, //
};
pub use self::bridge::{
    ConfigOps,
    Domain,
    HostBridge,
    RescanLock,
    RootBus,
    Width, //
};
pub use self::config_window::MappedRange;
pub use self::msi::{
    next_online_cpu,
    Interrupt,
    MsiController,
    MsiDomain,
    MsiKind,
    MsiMessage, //
};
pub use self::queue::OrderedQueue;
pub use self::slot::Slot;

/// The C pointer of a device, which the `kernel` crate keeps to itself.
fn raw_device<Ctx: kernel::device::DeviceContext>(
    dev: &kernel::device::Device<Ctx>,
) -> *mut bindings::device {
    // CAST: `Device` is a transparent wrapper of an `Opaque<bindings::device>`.
    core::ptr::from_ref(dev).cast_mut().cast()
}
