// SPDX-License-Identifier: GPL-2.0

//! A PCI function for tests.
//!
//! It has BARs of any kind and size, MSI or MSI-X, and configuration blocks. A BAR is memory, of which only the pages
//! that were written exist, but BAR 0 begins with [registers](register), by which the guest has vectors sent. The
//! guest acknowledges each interrupt, and none is sent again before that, so that the guest sees each one: what
//! was sent and what was received have to be equal, whatever was done to the vectors meanwhile.

#![forbid(unsafe_code)]

mod memory;
mod options;
mod shots;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use vmbus_host::Counters;
use vpci::{
    Bar,
    Description,
    InterruptSender,
    MsixLayout,
    PciFunction, //
};

use memory::Sparse;
pub use options::Options;
use shots::{Order, Shots};

/// Vendor id: Microsoft's.
pub const VENDOR: u16 = 0x1414;
/// Device id, which no driver of Linux claims.
pub const DEVICE: u16 = 0xfe57;
/// BAR 0 has the registers; memory begins after them.
pub const REGISTERS_LEN: u64 = 0x1_0000;
/// Size of the ROM, which the bus does not show.
pub const ROM_LEN: u32 = 0x1_0000;
/// Most MSI-X vectors.
pub const MSIX_MAX: u16 = 2048;
/// Configuration blocks are numbered from 1 to this.
pub const BLOCKS: u32 = 16;
/// Bytes of a configuration block.
pub const BLOCK_LEN: usize = 128;

/// The registers of BAR 0, 32 bits each.
pub mod register {
    /// Reads as [`MAGIC`].
    pub const ID: u64 = 0x00;
    /// What [`ID`] reads as.
    pub const MAGIC: u32 = 0x7e57_f00d;
    /// First vector of what is ordered.
    pub const FIRST: u64 = 0x08;
    /// Number of vectors of what is ordered.
    pub const COUNT: u64 = 0x0c;
    /// Orders so many rounds: each sends all vectors of the range once, as soon as the interrupt before was acknowledged.
    pub const ROUNDS: u64 = 0x10;
    /// Orders so many rounds in a second, which leave out what is not acknowledged, until another order; 0 ends it.
    pub const RATE: u64 = 0x14;
    /// 1 while an order is carried out or an interrupt of it is not acknowledged, otherwise 0.
    pub const BUSY: u64 = 0x18;
    /// Interrupts that were not acknowledged in time.
    pub const LOST: u64 = 0x1c;
    /// Acknowledges the vector written.
    pub const ACKNOWLEDGE: u64 = 0x20;
    /// Any write ends all orders and clears what was counted.
    pub const CLEAR: u64 = 0x24;
    /// How often each vector was sent.
    pub const SENT: u64 = 0x4000;
}

/// Pending bits of MSI-X in BAR 0.
const PENDING: u32 = 0x2000;
/// Table of MSI-X in BAR 0.
const TABLE: u32 = 0x8000;

/// BAR 0 if nothing else is said.
const BAR0: Bar = Bar {
    size: REGISTERS_LEN,
    wide: false,
    prefetchable: false,
};

/// Configuration blocks that were written.
type Blocks = BTreeMap<u32, Vec<u8>>;

/// The function.
pub struct TestFunction {
    options: Options,
    bars: [Sparse; 6],
    shots: Shots,
    /// The range of vectors for the next order.
    range: Mutex<(u32, u32)>,
    blocks: Mutex<Blocks>,
}

impl TestFunction {
    /// A function as the options have it, with the counter `NAME.sent`.
    pub fn new(options: &Options, name: &str, counters: &Counters) -> std::io::Result<Arc<Self>> {
        let vectors = options.msix.unwrap_or(0);
        let vectors = vectors.max(options.msi.unwrap_or(0).into());
        Ok(Arc::new(Self {
            options: options.clone(),
            bars: Default::default(),
            shots: Shots::new(vectors, name, counters)?,
            range: Mutex::default(),
            blocks: Mutex::default(),
        }))
    }

    fn range(&self) -> MutexGuard<'_, (u32, u32)> {
        self.range.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn blocks(&self) -> MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn register(&self, offset: u64) -> u32 {
        match offset {
            register::ID => register::MAGIC,
            register::FIRST => self.range().0,
            register::COUNT => self.range().1,
            register::BUSY => self.shots.is_busy().into(),
            register::LOST => self.shots.lost(),
            _ => offset
                .checked_sub(register::SENT)
                .map_or(0, |at| self.shots.sent((at / 4) as usize)),
        }
    }

    fn set_register(&self, offset: u64, value: u32) {
        let order = |order| {
            let (first, count) = *self.range();
            self.shots.order(first, count, order);
        };
        match offset {
            register::FIRST => self.range().0 = value,
            register::COUNT => self.range().1 = value,
            register::ROUNDS => order(Order::Rounds(value)),
            register::RATE => order(Order::Rate(value)),
            register::ACKNOWLEDGE => self.shots.acknowledge(value as usize),
            register::CLEAR => self.shots.clear(),
            _ => {}
        }
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
            rom: Some(ROM_LEN),
            msix,
            msi: self.options.msi,
        }
    }

    fn attach(&self, interrupts: InterruptSender) {
        self.shots.attach(interrupts);
    }

    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]) {
        if bar != 0 || offset >= REGISTERS_LEN {
            self.bars[bar].read(offset, data);
        } else if data.len() == 4 {
            data.copy_from_slice(&self.register(offset).to_le_bytes());
        } else {
            data.fill(0);
        }
    }

    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]) {
        if bar != 0 || offset >= REGISTERS_LEN {
            self.bars[bar].write(offset, data);
        } else if let Ok(value) = data.try_into() {
            self.set_register(offset, u32::from_le_bytes(value));
        }
    }

    fn reset(&self) {
        self.bars.iter().for_each(Sparse::clear);
        self.shots.clear();
        self.blocks().clear();
    }

    fn read_block(&self, block: u32, _length: usize) -> Option<Vec<u8>> {
        // What nobody has written holds the block's number.
        let untouched = || vec![block as u8; BLOCK_LEN];
        (1..=BLOCKS)
            .contains(&block)
            .then(|| self.blocks().get(&block).cloned().unwrap_or_else(untouched))
    }

    fn write_block(&self, block: u32, data: &[u8]) -> bool {
        let there = (1..=BLOCKS).contains(&block);
        if there {
            self.blocks().insert(block, data.to_vec());
        }
        there
    }
}
