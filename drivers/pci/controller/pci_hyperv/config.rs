// SPDX-License-Identifier: GPL-2.0

//! Configuration space.
//!
//! The host maps the configuration space of one function at a time into the second page of a
//! window. A write to the first page chooses the function. The ids come from the description of the
//! function instead, and what cannot work (ROM, interrupt lines) reads as zero.

use hyperv_wire::vpci::{
    config_window,
    Function,
    SlotNumber, //
};
use kernel::{
    device,
    io::Io,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::Relaxed,
        Arc, //
    }, //
};
use pci_host::{
    hypercall,
    ConfigOps,
    MappedRange,
    Width, //
};
use vmbus::{
    new_spinlock_irq,
    sync::SpinLockIrq, //
};

use crate::bus::{
    Bus,
    Child, //
};

/// Offset of the command register.
pub(crate) const COMMAND: u16 = 0x04;
const REVISION: u16 = 0x08;
const CACHE_LINE_SIZE: u16 = 0x0c;
/// Offset of the first base address register.
pub(crate) const BASE_ADDRESS_0: u16 = 0x10;
const SUBSYSTEM: u16 = 0x2c;
const ROM_ADDRESS: u16 = 0x30;
const CAPABILITY_LIST: u16 = 0x34;
const INTERRUPT_LINE: u16 = 0x3c;
const INTERRUPT_PIN: u16 = 0x3d;
const MIN_GRANT: u16 = 0x3e;

/// Where an access goes.
enum Place {
    /// Four bytes that are known, and the offset in them.
    Known([u8; 4], u16),
    /// Nothing is there.
    Zero,
    /// The window.
    Window,
    /// Nowhere: it is too high.
    Beyond,
}

/// Where a read from a function goes.
fn place(function: &Function, offset: u16, width: Width) -> Place {
    // Offset and width are those of an access to 4 KiB at most.
    let end = offset.saturating_add(width.bytes() as u16);
    let within = |from: u16, to: u16| offset >= from && end <= to;

    if within(0, COMMAND) {
        let [a, b] = function.vendor.to_le_bytes();
        let [c, d] = function.device.to_le_bytes();
        Place::Known([a, b, c, d], offset)
    } else if within(REVISION, CACHE_LINE_SIZE) {
        let bytes = [
            function.revision,
            function.programming_interface,
            function.subclass,
            function.base_class,
        ];
        Place::Known(bytes, offset - REVISION)
    } else if within(SUBSYSTEM, ROM_ADDRESS) {
        Place::Known(function.subsystem.to_le_bytes(), offset - SUBSYSTEM)
    } else if within(ROM_ADDRESS, CAPABILITY_LIST)
        || within(INTERRUPT_LINE, INTERRUPT_PIN)
        || within(INTERRUPT_PIN, MIN_GRANT)
    {
        Place::Zero
    } else if u64::from(end) <= config_window::CONFIG_SPACE_SIZE {
        Place::Window
    } else {
        Place::Beyond
    }
}

/// Where a write to a function goes.
fn place_of_write(offset: u16, width: Width) -> Place {
    let end = offset.saturating_add(width.bytes() as u16);
    if offset >= SUBSYSTEM && end <= CAPABILITY_LIST {
        // Read only.
        Place::Zero
    } else if offset >= COMMAND && u64::from(end) <= config_window::CONFIG_SPACE_SIZE {
        Place::Window
    } else {
        Place::Beyond
    }
}

/// The window through which the functions' configuration spaces are seen.
#[pin_data]
pub(crate) struct ConfigWindow {
    dev: ARef<device::Device>,
    io: MappedRange,
    by_hypercall: bool,
    /// From choosing the function until the access.
    #[pin]
    lock: SpinLockIrq<()>,
}

impl ConfigWindow {
    /// Makes `io` the window.
    pub(crate) fn new(
        dev: ARef<device::Device>,
        io: MappedRange,
    ) -> Result<Pin<KBox<ConfigWindow>>> {
        KBox::pin_init(
            pin_init!(Self {
                dev,
                io,
                by_hypercall: hypercall::mmio_by_hypercall(),
                lock <- new_spinlock_irq!(()),
            }),
            GFP_KERNEL,
        )
    }

    /// Guest-physical address, which the host has to know.
    pub(crate) fn start(&self) -> u64 {
        self.io.start()
    }

    /// Reads from the configuration space of the function in `slot`.
    fn read(&self, slot: SlotNumber, offset: u16, width: Width) -> u32 {
        let _guard = self.lock.lock();
        self.store(config_window::SLOT, Width::U32, slot.raw());
        self.load(config_window::CONFIG_SPACE + u64::from(offset), width)
    }

    /// Writes to the configuration space of the function in `slot`.
    fn write(&self, slot: SlotNumber, offset: u16, width: Width, value: u32) {
        let _guard = self.lock.lock();
        self.store(config_window::SLOT, Width::U32, slot.raw());
        self.store(
            config_window::CONFIG_SPACE + u64::from(offset),
            width,
            value,
        );
    }

    /// Reads from the window. The accessors of MMIO space keep the order of accesses.
    fn load(&self, at: u64, width: Width) -> u32 {
        if self.by_hypercall {
            let mut bytes = [0; 4];
            let gpa = self.io.start() + at;
            if let Err(e) = hypercall::mmio_read(gpa, &mut bytes[..width.bytes()]) {
                dev_err!(
                    self.dev,
                    "MMIO read hypercall error {:x} addr {:x} size {}\n",
                    e.0,
                    gpa,
                    width.bytes()
                );
                return u32::MAX;
            }
            return u32::from_le_bytes(bytes);
        }
        // The offset is inside the window, `place` has seen to it.
        let at = at as usize;
        let read = match width {
            Width::U8 => self.io.try_read8(at).map(u32::from),
            Width::U16 => self.io.try_read16(at).map(u32::from),
            Width::U32 => self.io.try_read32(at),
        };
        read.unwrap_or(u32::MAX)
    }

    /// Writes to the window.
    fn store(&self, at: u64, width: Width, value: u32) {
        if self.by_hypercall {
            let gpa = self.io.start() + at;
            if let Err(e) = hypercall::mmio_write(gpa, &value.to_le_bytes()[..width.bytes()]) {
                dev_err!(
                    self.dev,
                    "MMIO write hypercall error {:x} addr {:x} size {}\n",
                    e.0,
                    gpa,
                    width.bytes()
                );
            }
            return;
        }
        let at = at as usize;
        // The offset is inside the window, `place_of_write` has seen to it.
        let _ = match width {
            Width::U8 => self.io.try_write8(value as u8, at),
            Width::U16 => self.io.try_write16(value as u16, at),
            Width::U32 => self.io.try_write32(value, at),
        };
    }
}

impl Bus {
    /// Reads from the configuration space of a function.
    pub(crate) fn read_config(&self, child: &Child, offset: u16, width: Width) -> u32 {
        match place(&child.function, offset, width) {
            Place::Known(bytes, at) => {
                let at = usize::from(at);
                let mut value = [0; 4];
                value[..width.bytes()].copy_from_slice(&bytes[at..at + width.bytes()]);
                u32::from_le_bytes(value)
            }
            Place::Zero => 0,
            Place::Window => match self.config.as_ref() {
                Some(window) => window.read(child.function.slot, offset, width),
                None => u32::MAX,
            },
            Place::Beyond => {
                dev_err!(
                    self.log(),
                    "Attempt to read beyond a function's config space.\n"
                );
                u32::MAX
            }
        }
    }

    /// Writes to the configuration space of a function.
    pub(crate) fn write_config(&self, child: &Child, offset: u16, width: Width, value: u32) {
        match place_of_write(offset, width) {
            Place::Window => {
                if let Some(window) = self.config.as_ref() {
                    window.write(child.function.slot, offset, width, value);
                }
            }
            Place::Beyond => dev_err!(
                self.log(),
                "Attempt to write beyond a function's config space.\n"
            ),
            _ => {}
        }
    }

    /// The function, unless the host has taken it away. Its driver may still have it, and has to
    /// see at once that it is gone, also from the ids, which the host would not be asked for.
    fn reachable(&self, devfn: u8) -> Option<Arc<Child>> {
        let child = self.child(SlotNumber::from_devfn(devfn))?;
        (!child.gone.load(Relaxed) && !self.dev.is_rescinded()).then_some(child)
    }

    /// Whether the host still shows the function. It does not show one that it took away.
    pub(crate) fn is_present(&self, child: &Child) -> bool {
        const NO_VENDOR: u32 = 0xffff;
        match self.config.as_ref() {
            Some(window) => window.read(child.function.slot, 0, Width::U16) != NO_VENDOR,
            None => false,
        }
    }
}

impl ConfigOps for Bus {
    fn read(&self, devfn: u8, offset: u16, width: Width) -> Option<u32> {
        let child = self.reachable(devfn)?;
        Some(self.read_config(&child, offset, width))
    }

    fn write(&self, devfn: u8, offset: u16, width: Width, value: u32) -> Option<()> {
        let child = self.reachable(devfn)?;
        self.write_config(&child, offset, width, value);
        Some(())
    }
}
