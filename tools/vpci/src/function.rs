// SPDX-License-Identifier: GPL-2.0

//! What a device model has to be, to be a function of a virtual PCI bus.

use crate::msi::InterruptSender;

/// A memory BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Size, a power of two of at least a page.
    pub size: u64,
    /// Whether it is 64 bits wide and so takes two registers.
    pub wide: bool,
    /// Whether it is prefetchable.
    pub prefetchable: bool,
}

/// Where the MSI-X table and the pending bits are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixLayout {
    /// Number of vectors.
    pub vectors: u16,
    /// BAR that holds both.
    pub bar: u8,
    /// Offset of the table, a multiple of 8.
    pub table: u32,
    /// Offset of the pending bits, a multiple of 8.
    pub pending: u32,
}

/// What a function shows of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Class: base class, subclass, programming interface.
    pub class: [u8; 3],
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
    /// The BARs; what follows a wide one must be `None`.
    pub bars: [Option<Bar>; 6],
    /// Size of the ROM, if there is one; the bus has no way to tell the guest of it.
    pub rom: Option<u32>,
    /// MSI-X, if the function has it.
    pub msix: Option<MsixLayout>,
    /// Most MSI vectors (a power of two up to 32), if the function has MSI.
    pub msi: Option<u8>,
}

/// A device model.
///
/// All methods but `attach` are called on a virtual processor's or a channel's thread. They must not
/// block; work belongs on a thread of the model.
pub trait PciFunction: Send + Sync {
    /// What the function shows of itself. Constant.
    fn description(&self) -> Description;

    /// The function is put on a bus: from now on it interrupts through `interrupts`.
    fn attach(&self, interrupts: InterruptSender);

    /// The guest reads a BAR. The MSI-X table and pending bits never come here.
    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]);

    /// The guest writes a BAR.
    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]);

    /// Function-level reset, power-down of the bus, or loss of its channel.
    ///
    /// On return the model touches guest memory no more until the guest sets it up again.
    fn reset(&self);

    /// Reads configuration block `block`, at most `length` bytes of it.
    fn read_block(&self, block: u32, length: usize) -> Option<Vec<u8>> {
        let _ = (block, length);
        None
    }

    /// Writes configuration block `block`. Says whether there is such a block.
    fn write_block(&self, block: u32, data: &[u8]) -> bool {
        let _ = (block, data);
        false
    }
}
