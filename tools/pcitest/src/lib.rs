// SPDX-License-Identifier: GPL-2.0

//! A PCI function for tests.
//!
//! It has BARs of any kind and size, MSI or MSI-X, and nothing to do. A BAR is memory, of which only the pages that
//! were written exist.

#![forbid(unsafe_code)]

mod memory;
mod options;

use std::sync::{Arc, OnceLock};

use vpci::{
    Bar,
    Description,
    InterruptSender,
    MsixLayout,
    PciFunction, //
};

use memory::Sparse;
pub use options::Options;

/// Vendor id: Microsoft's.
pub const VENDOR: u16 = 0x1414;
/// Device id, which no driver of Linux claims.
pub const DEVICE: u16 = 0xfe57;
/// BAR 0 has the registers; memory begins after them.
pub const REGISTERS_LEN: u64 = 0x1_0000;
/// Most MSI-X vectors.
pub const MSIX_MAX: u16 = 2048;

/// Pending bits of MSI-X in BAR 0.
const PENDING: u32 = 0x2000;
/// Table of MSI-X in BAR 0.
const TABLE: u32 = 0x8000;

/// The function.
pub struct TestFunction {
    options: Options,
    interrupts: OnceLock<InterruptSender>,
    bars: [Sparse; 6],
}

impl TestFunction {
    /// A function as the options have it.
    pub fn new(options: &Options) -> Arc<Self> {
        Arc::new(Self {
            options: options.clone(),
            interrupts: OnceLock::new(),
            bars: Default::default(),
        })
    }
}

impl PciFunction for TestFunction {
    fn description(&self) -> Description {
        let msix = self.options.msix.map(|vectors| MsixLayout {
            vectors,
            bar: 0,
            table: TABLE,
            pending: PENDING,
        });
        Description {
            vendor: VENDOR,
            device: DEVICE,
            revision: 1,
            // A device of no class.
            class: [0xff, 0, 0],
            subsystem_vendor: VENDOR,
            subsystem: DEVICE,
            bars: self.options.bars,
            msix,
            msi: self.options.msi,
        }
    }

    fn attach(&self, interrupts: InterruptSender) {
        // A function is put on one bus, once.
        let _ = self.interrupts.set(interrupts);
    }

    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]) {
        if bar == 0 && offset < REGISTERS_LEN {
            data.fill(0);
        } else {
            self.bars[bar].read(offset, data);
        }
    }

    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]) {
        if bar != 0 || offset >= REGISTERS_LEN {
            self.bars[bar].write(offset, data);
        }
    }

    fn reset(&self) {
        self.bars.iter().for_each(Sparse::clear);
    }
}

/// The registers, a BAR of the function's own.
const BAR0: Bar = Bar {
    size: REGISTERS_LEN,
    wide: false,
    prefetchable: false,
};
