// SPDX-License-Identifier: GPL-2.0

//! Physical slots: `/sys/bus/pci/slots`.

use core::ptr::NonNull;

use hyperv_bindings as bindings;

/// A slot in sysfs. Dropping it removes the entry.
///
/// # Invariants
///
/// `slot` is a slot that this object holds a reference to.
pub struct Slot {
    slot: NonNull<bindings::pci_slot>,
}

// SAFETY: A slot may be destroyed from any thread.
unsafe impl Send for Slot {}

// SAFETY: There is nothing to do with a shared reference.
unsafe impl Sync for Slot {}

impl Slot {
    /// # Safety
    ///
    /// `slot` must have been created by `pci_create_slot()`, and the reference is handed over.
    pub(crate) unsafe fn from_raw(slot: NonNull<bindings::pci_slot>) -> Self {
        // INVARIANT: By the safety requirements.
        Self { slot }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // SAFETY: By the type invariants we hold a reference, which in turn holds the bus.
        unsafe { bindings::pci_destroy_slot(self.slot.as_ptr()) };
    }
}
