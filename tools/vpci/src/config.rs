// SPDX-License-Identifier: GPL-2.0

//! Configuration space of a function.

use std::sync::Arc;

use hyperv_wire::vpci::{
    config_window::CONFIG_SPACE_SIZE,
    BARS, //
};

use crate::{
    function::Description,
    msi::MessageSignals, //
};

const SIZE: usize = CONFIG_SPACE_SIZE as usize;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const ROM: usize = 0x30;
const CAPABILITY_POINTER: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;

const COMMAND_MEMORY: u16 = 2;
/// Bits of the command register that can be set: I/O, memory, master, parity, SERR, INTx disable.
const COMMAND_WRITABLE: u16 = 0x0547;
const STATUS_CAPABILITIES: u16 = 0x10;

const CAPABILITY_MSI: u8 = 0x05;
const CAPABILITY_EXPRESS: u8 = 0x10;
const CAPABILITY_MSIX: u8 = 0x11;

const ROM_ENABLE: u32 = 1;
const BAR_WIDE: u32 = 4;
const BAR_PREFETCHABLE: u32 = 8;

/// Initiate function-level reset, in the device control register.
const DEVICE_CONTROL_RESET: u16 = 1 << 15;
/// Function-level reset supported, in the device capabilities register.
const DEVICE_CAPABILITIES_RESET: u32 = 1 << 28;

const MSIX_ENABLE: u16 = 1 << 15;
const MSIX_MASK: u16 = 1 << 14;
const MSI_ENABLE: u16 = 1;

/// What a write changed outside of configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Effects {
    /// Memory decode was switched, or a BAR moved: the mappings may have to change.
    pub decode: bool,
    /// The guest asked for a function-level reset.
    pub reset: bool,
}

/// Configuration space of a function.
pub struct ConfigSpace {
    data: Box<[u8; SIZE]>,
    writable: Box<[u8; SIZE]>,
    sizes: [Option<u64>; BARS],
    msi: Option<usize>,
    msix: Option<usize>,
    express: usize,
    signals: Arc<MessageSignals>,
}

impl ConfigSpace {
    /// Configuration space as it is after reset.
    pub fn new(description: &Description, signals: Arc<MessageSignals>) -> Self {
        let mut space = Self {
            data: Box::new([0; SIZE]),
            writable: Box::new([0; SIZE]),
            sizes: [None; BARS],
            msi: None,
            msix: None,
            express: 0,
            signals,
        };
        space.set16(0x00, description.vendor);
        space.set16(0x02, description.device);
        space.allow16(COMMAND, COMMAND_WRITABLE);
        space.data[0x08] = description.revision;
        space.data[0x09] = description.class[2];
        space.data[0x0a] = description.class[1];
        space.data[0x0b] = description.class[0];
        // Cache line size is a scratch register.
        space.writable[0x0c] = 0xff;
        space.set16(0x2c, description.subsystem_vendor);
        space.set16(0x2e, description.subsystem);
        // The interrupt line is one as well.
        space.writable[0x3c] = 0xff;
        for (n, bar) in description.bars.iter().enumerate() {
            let Some(bar) = bar else { continue };
            let at = BAR0 + 4 * n;
            let mut flags = 0;
            if bar.wide {
                flags |= BAR_WIDE;
            }
            if bar.prefetchable {
                flags |= BAR_PREFETCHABLE;
            }
            let mask = !(bar.size - 1);
            space.set32(at, flags);
            space.allow32(at, mask as u32);
            if bar.wide {
                space.allow32(at + 4, (mask >> 32) as u32);
            }
            space.sizes[n] = Some(bar.size);
        }
        if let Some(size) = description.rom {
            space.allow32(ROM, !(size - 1) | ROM_ENABLE);
        }
        space.add_capabilities(description);
        space
    }

    fn add_capabilities(&mut self, description: &Description) {
        self.set16(STATUS, STATUS_CAPABILITIES);
        let mut link = CAPABILITY_POINTER;
        let mut at = FIRST_CAPABILITY;
        let mut add = |space: &mut Self, id: u8, len: usize| {
            let here = at;
            space.data[link] = here as u8;
            space.data[here] = id;
            link = here + 1;
            at = (here + len).next_multiple_of(4);
            here
        };

        let express = add(self, CAPABILITY_EXPRESS, 0x3c);
        // Version 2, endpoint.
        self.set16(express + 2, 0x0002);
        self.set32(express + 4, DEVICE_CAPABILITIES_RESET);
        self.allow16(express + 8, 0x7fff);
        self.express = express;

        if let Some(layout) = description.msix {
            let msix = add(self, CAPABILITY_MSIX, 12);
            self.set16(msix + 2, layout.vectors.saturating_sub(1) & 0x7ff);
            self.allow16(msix + 2, MSIX_ENABLE | MSIX_MASK);
            self.set32(msix + 4, layout.table & !7 | u32::from(layout.bar));
            self.set32(msix + 8, layout.pending & !7 | u32::from(layout.bar));
            self.msix = Some(msix);
        }
        if let Some(vectors) = description.msi {
            let msi = add(self, CAPABILITY_MSI, 14);
            let log2 = u16::from(vectors.next_power_of_two().min(32).trailing_zeros() as u8);
            // 64-bit address, no mask bits.
            self.set16(msi + 2, (1 << 7) | (log2 << 1));
            self.allow16(msi + 2, MSI_ENABLE | (7 << 4));
            self.allow32(msi + 4, !3);
            self.allow32(msi + 8, !0);
            self.allow16(msi + 12, !0);
            self.msi = Some(msi);
        }
    }

    fn get16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.data[at], self.data[at + 1]])
    }

    fn get32(&self, at: usize) -> u32 {
        u32::from(self.get16(at)) | (u32::from(self.get16(at + 2)) << 16)
    }

    fn set16(&mut self, at: usize, value: u16) {
        self.data[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }

    fn set32(&mut self, at: usize, value: u32) {
        self.data[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn allow16(&mut self, at: usize, mask: u16) {
        self.writable[at..at + 2].copy_from_slice(&mask.to_le_bytes());
    }

    fn allow32(&mut self, at: usize, mask: u32) {
        self.writable[at..at + 4].copy_from_slice(&mask.to_le_bytes());
    }

    /// The guest reads. Beyond the end it reads all ones.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        match self.data.get(offset..offset.saturating_add(data.len())) {
            Some(source) => data.copy_from_slice(source),
            None => data.fill(0xff),
        }
    }

    /// The guest writes.
    pub fn write(&mut self, offset: usize, data: &[u8]) -> Effects {
        let end = offset.saturating_add(data.len());
        if end > SIZE {
            return Effects::default();
        }
        let before = self.mapped();
        for (at, new) in (offset..).zip(data) {
            let mask = self.writable[at];
            self.data[at] = self.data[at] & !mask | new & mask;
        }
        let touches = |start: usize, len: usize| offset < start + len && start < end;
        if let Some(msix) = self.msix.filter(|at| touches(*at, 4)) {
            let control = self.get16(msix + 2);
            self.signals
                .set_msix(control & MSIX_ENABLE != 0, control & MSIX_MASK != 0);
        }
        if let Some(msi) = self.msi.filter(|at| touches(*at, 14)) {
            let control = self.get16(msi + 2);
            let address = u64::from(self.get32(msi + 4)) | (u64::from(self.get32(msi + 8)) << 32);
            // No more than the function has.
            let log2 = ((control >> 4) & 7).min((control >> 1) & 7);
            self.signals.set_msi(
                control & MSI_ENABLE != 0,
                log2 as u8,
                address,
                self.get16(msi + 12),
            );
        }
        // The reset bit reads as zero, so it is not kept.
        let reset = (offset..end).zip(data).any(|(at, byte)| {
            at == self.express + 9 && (u16::from(*byte) << 8) & DEVICE_CONTROL_RESET != 0
        });
        Effects {
            decode: before != self.mapped(),
            reset,
        }
    }

    /// Base and size of each BAR that the function decodes now.
    pub fn mapped(&self) -> [Option<(u64, u64)>; BARS] {
        let mut mapped = [None; BARS];
        if self.get16(COMMAND) & COMMAND_MEMORY == 0 {
            return mapped;
        }
        for (n, slot) in mapped.iter_mut().enumerate() {
            let Some(size) = self.sizes[n] else { continue };
            let low = self.get32(BAR0 + 4 * n);
            let mut base = u64::from(low & !0xf);
            if low & BAR_WIDE != 0 {
                base |= u64::from(self.get32(BAR0 + 4 * (n + 1))) << 32;
            }
            if base != 0 {
                *slot = Some((base, size));
            }
        }
        mapped
    }

    /// What each BAR register would read as after all ones were written to it.
    pub fn bar_masks(&self) -> [u32; BARS] {
        std::array::from_fn(|n| {
            let at = BAR0 + 4 * n;
            let mut mask = [0; 4];
            mask.copy_from_slice(&self.writable[at..at + 4]);
            let flags = self.get32(at) & !u32::from_le_bytes(mask);
            u32::from_le_bytes(mask) | flags
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        function::{Bar, MsixLayout},
        interrupts::{InterruptCounters, InterruptTable},
        msi::InterruptSender,
    };
    use hyperv_wire::vpci::{InterruptRequest, Processors};
    use std::sync::Mutex;

    fn description() -> Description {
        let wide = |size| {
            Some(Bar {
                size,
                wide: true,
                prefetchable: true,
            })
        };
        Description {
            vendor: 0x1414,
            device: 0x00ba,
            revision: 1,
            class: [2, 0, 0],
            subsystem_vendor: 0x1414,
            subsystem: 0x1234,
            bars: [
                wide(0x10_0000),
                None,
                Some(Bar {
                    size: 0x1000,
                    wide: false,
                    prefetchable: false,
                }),
                None,
                wide(0x2_0000_0000),
                None,
            ],
            rom: Some(0x1_0000),
            msix: Some(MsixLayout {
                vectors: 9,
                bar: 2,
                table: 0,
                pending: 0x800,
            }),
            msi: Some(4),
        }
    }

    struct Fixture {
        space: ConfigSpace,
        signals: Arc<MessageSignals>,
        interrupts: Arc<InterruptTable>,
        raised: Arc<Mutex<Vec<u32>>>,
    }

    fn fixture() -> Fixture {
        let raised = Arc::new(Mutex::new(Vec::new()));
        let sink = raised.clone();
        let interrupts = Arc::new(InterruptTable::new(
            1,
            Arc::new(move |_, data| sink.lock().unwrap().push(data)),
            InterruptCounters::default(),
        ));
        let signals = Arc::new(MessageSignals::new(description().msix, interrupts.clone()));
        Fixture {
            space: ConfigSpace::new(&description(), signals.clone()),
            signals,
            interrupts,
            raised,
        }
    }

    impl Fixture {
        fn read32(&self, at: usize) -> u32 {
            let mut data = [0; 4];
            self.space.read(at, &mut data);
            u32::from_le_bytes(data)
        }

        fn write32(&mut self, at: usize, value: u32) -> Effects {
            self.space.write(at, &value.to_le_bytes())
        }

        fn capability(&self, id: u8) -> usize {
            let mut at = self.space.data[CAPABILITY_POINTER] as usize;
            while self.space.data[at] != id {
                at = self.space.data[at + 1] as usize;
                assert_ne!(at, 0);
            }
            at
        }
    }

    #[test]
    fn header() {
        let f = fixture();
        assert_eq!(f.read32(0), 0x00ba_1414);
        assert_eq!(f.read32(8), 0x0200_0001);
        assert_eq!(f.read32(0x2c), 0x1234_1414);
        assert_eq!(f.read32(0x100), 0);
        assert_eq!(f.read32(0xffd), !0);
    }

    #[test]
    fn bar_sizing() {
        let mut f = fixture();
        let masks = f.space.bar_masks();
        assert_eq!(
            masks,
            [0xfff0_000c, !0, 0xffff_f000, 0, 0x0000_000c, 0xffff_fffe]
        );
        for (n, mask) in masks.iter().enumerate() {
            assert_eq!(f.write32(BAR0 + 4 * n, !0), Effects::default());
            assert_eq!(f.read32(BAR0 + 4 * n), *mask);
        }
    }

    #[test]
    fn rom_sizing() {
        let mut f = fixture();
        assert_eq!(f.read32(ROM), 0);
        f.write32(ROM, !0);
        assert_eq!(f.read32(ROM), 0xffff_0001);
    }

    #[test]
    fn decode_follows_command_and_bars() {
        let mut f = fixture();
        f.write32(BAR0, 0xe000_0000);
        f.write32(BAR0 + 4, 0xf);
        f.write32(BAR0 + 8, 0xf800_0000);
        assert_eq!(f.space.mapped(), [None; BARS]);
        assert!(f.space.write(COMMAND, &[6, 0]).decode);
        let mut expected = [None; BARS];
        expected[0] = Some((0xf_e000_0000, 0x10_0000));
        expected[2] = Some((0xf800_0000, 0x1000));
        assert_eq!(f.space.mapped(), expected);
        assert!(!f.space.write(COMMAND, &[6, 4]).decode);
        assert!(f.write32(BAR0 + 8, 0xf900_0000).decode);
        assert_eq!(f.space.mapped()[2], Some((0xf900_0000, 0x1000)));
        assert!(f.space.write(COMMAND, &[0]).decode);
        assert_eq!(f.space.mapped(), [None; BARS]);
    }

    #[test]
    fn function_level_reset() {
        let mut f = fixture();
        let express = f.capability(CAPABILITY_EXPRESS);
        assert!(!f.space.write(express + 8, &[0xff, 0x7f]).reset);
        assert!(f.space.write(express + 8, &[0, 0x80]).reset);
        assert!(f.space.write(express + 9, &[0x80]).reset);
        assert_eq!(f.read32(express + 8) & 0xffff, 0);
    }

    fn interrupt(f: &Fixture, vector: u32, vector_count: u16) -> (u64, u32) {
        let request = InterruptRequest {
            vector,
            delivery_mode: 0,
            vector_count,
            processors: Processors::Mask(1),
        };
        let i = f.interrupts.create(0, &request).unwrap();
        (i.address(), i.data())
    }

    #[test]
    fn msix_masks_hold_interrupts_back() {
        let mut f = fixture();
        let sender = InterruptSender::new(f.signals.clone());
        let (address, data) = interrupt(&f, 0x31, 1);
        let entry = 8 * 16;
        f.signals.write(2, entry, &(address as u32).to_le_bytes());
        f.signals.write(2, entry + 4, &0_u32.to_le_bytes());
        f.signals.write(2, entry + 8, &data.to_le_bytes());
        // Off: nothing.
        sender.fire(8);
        let msix = f.capability(CAPABILITY_MSIX);
        assert_eq!(f.read32(msix) >> 16, 8);
        f.space
            .write(msix + 2, &(MSIX_ENABLE | MSIX_MASK).to_le_bytes());
        // Masked twice: pending.
        sender.fire(8);
        sender.fire(9);
        let mut pending = [0; 8];
        assert!(f.signals.read(2, 0x800, &mut pending));
        assert_eq!(pending, [0, 1, 0, 0, 0, 0, 0, 0]);
        f.space.write(msix + 2, &MSIX_ENABLE.to_le_bytes());
        assert!(f.raised.lock().unwrap().is_empty());
        f.signals.write(2, entry + 12, &0_u32.to_le_bytes());
        assert_eq!(*f.raised.lock().unwrap(), [0x31]);
        assert!(f.signals.read(2, 0x800, &mut pending));
        assert_eq!(pending, [0; 8]);
        sender.fire(8);
        assert_eq!(*f.raised.lock().unwrap(), [0x31, 0x31]);
        // Not the table, and not the BAR.
        assert!(!f.signals.write(2, 9 * 16, &[0; 4]));
        assert!(!f.signals.write(0, 0, &[0; 4]));
    }

    #[test]
    fn msi_changes_the_low_bits_of_the_data() {
        let mut f = fixture();
        let sender = InterruptSender::new(f.signals.clone());
        let (address, data) = interrupt(&f, 0x20, 4);
        let msi = f.capability(CAPABILITY_MSI);
        f.write32(msi + 4, address as u32);
        f.write32(msi + 8, (address >> 32) as u32);
        f.space.write(msi + 12, &(data as u16).to_le_bytes());
        sender.fire(0);
        // Eight vectors asked for, four there.
        f.space
            .write(msi + 2, &(MSI_ENABLE | (3 << 4)).to_le_bytes());
        for vector in [0, 3, 4] {
            sender.fire(vector);
        }
        assert_eq!(*f.raised.lock().unwrap(), [0x20, 0x23, 0x23]);
    }
}
