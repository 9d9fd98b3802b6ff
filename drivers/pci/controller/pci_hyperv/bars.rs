// SPDX-License-Identifier: GPL-2.0

//! Base address registers.
//!
//! The host tells of each BAR which bits can be changed, from which its size follows. The bus gets
//! a window of MMIO space below 4 GiB for the 32-bit BARs and another above for the 64-bit ones,
//! and the BARs get addresses in them before the PCI core looks.

use hyperv_wire::vpci::{
    bars,
    BadBar,
    Bar, //
};
use kernel::{
    page::PAGE_SIZE,
    prelude::*,
    sync::Arc, //
};
use pci_host::Width;

use crate::{
    bus::{
        Bus,
        Child, //
    },
    config::{
        BASE_ADDRESS_0,
        COMMAND, //
    },
};

/// Memory decoding is on, in the command register.
const COMMAND_MEMORY: u32 = 2;

/// MMIO space that a BAR takes, in bytes: the hypervisor maps whole pages, and the BAR is at the
/// start of one.
fn footprint(bar: &Bar) -> u64 {
    bar.size.max(PAGE_SIZE as u64)
}

/// Bytes of MMIO space that functions need.
#[derive(Clone, Copy, Default)]
pub(crate) struct Space {
    /// Below 4 GiB.
    pub(crate) low: u64,
    /// Above.
    pub(crate) high: u64,
}

/// Alignment of a window of `size` bytes: that of the largest BAR it can hold.
pub(crate) fn window_alignment(size: u64) -> u64 {
    match size {
        0 => 1,
        size => 1 << size.ilog2(),
    }
}

impl Bus {
    /// Adds up what the functions need.
    ///
    /// All sizes are powers of two, and they will be placed in descending order: there are no gaps.
    pub(crate) fn survey(&self, children: &[Arc<Child>]) -> Result<Space> {
        let mut space = Space::default();
        for child in children {
            for bar in bars(&child.bars) {
                let bar = match bar {
                    Ok(bar) => bar,
                    Err(BadBar::Io) => {
                        dev_err!(self.log(), "There's an I/O BAR in this list!\n");
                        continue;
                    }
                    Err(BadBar::Malformed) => {
                        dev_err!(self.log(), "malformed BARs: {:x?}\n", child.bars);
                        continue;
                    }
                };
                let total = if bar.is_64bit {
                    &mut space.high
                } else {
                    &mut space.low
                };
                *total = total.checked_add(footprint(&bar)).ok_or(ENOSPC)?;
            }
        }
        Ok(space)
    }

    /// Gives the BARs addresses, from the starts of the windows on.
    ///
    /// Decoding is off meanwhile, and stays so until a driver wants it: the host ignores changes
    /// of BARs in use, and each change of a BAR in use would cost it a remapping.
    pub(crate) fn place_bars(&self, children: &[Arc<Child>], start: Space) {
        for child in children {
            let command = self.read_config(child, COMMAND, Width::U16);
            self.write_config(child, COMMAND, Width::U16, command & !COMMAND_MEMORY);
        }

        // From the largest to the smallest, so that all are aligned.
        let mut next = start;
        for size in (0..u64::BITS).rev().map(|bit| 1 << bit) {
            for child in children {
                for bar in bars(&child.bars)
                    .flatten()
                    .filter(|bar| footprint(bar) == size)
                {
                    let at = if bar.is_64bit {
                        &mut next.high
                    } else {
                        &mut next.low
                    };
                    self.set_bar(child, bar, *at);
                    *at += size;
                }
            }
        }
    }

    fn set_bar(&self, child: &Child, bar: Bar, address: u64) {
        let register = BASE_ADDRESS_0 + 4 * bar.index as u16;
        self.write_config(child, register, Width::U32, address as u32);
        if bar.is_64bit {
            self.write_config(child, register + 4, Width::U32, (address >> 32) as u32);
        }
    }
}
