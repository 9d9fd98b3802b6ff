// SPDX-License-Identifier: GPL-2.0
//! Loads a bzImage and prepares the boot processor by the 64-bit boot protocol.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::bootparam::boot_params;
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::KernelLoader;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

use crate::{acpi, layout};

/// Why a kernel cannot be booted.
#[derive(Debug, Error)]
pub enum BootError {
    /// A file cannot be read.
    #[error("{path}: {source}")]
    File {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The kernel is not a bzImage with a 64-bit entry.
    #[error("{path}: not a bootable 64-bit bzImage: {reason}")]
    Kernel {
        /// Which one.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// It does not fit into memory.
    #[error("{what} ({len} bytes) does not fit into the guest's memory")]
    TooBig {
        /// Kernel or initrd.
        what: &'static str,
        /// Its size.
        len: u64,
    },
    /// Too long a command line.
    #[error("the kernel command line is {len} bytes long, more than {max}")]
    CommandLine {
        /// Its length.
        len: usize,
        /// The most that fits.
        max: usize,
    },
    /// A write to guest memory failed.
    #[error("guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// `xloadflags`: the kernel has an entry point at 0x200 of its 64-bit part.
const XLF_KERNEL_64: u16 = 1;
/// Offset of that entry point.
const ENTRY_64: u64 = 0x200;
/// A boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// `loadflags`: the heap end is set.
const CAN_USE_HEAP: u8 = 1 << 7;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const E820_PMEM: u32 = 7;

/// RAM as (base, length).
pub fn ram_ranges(bytes: u64) -> Vec<(GuestAddress, usize)> {
    let low = bytes.min(layout::PCI_HOLE);
    let mut ranges = vec![(GuestAddress(0), low as usize)];
    if bytes > low {
        ranges.push((GuestAddress(layout::RAM_ABOVE_4G), (bytes - low) as usize));
    }
    ranges
}

/// What the firmware would report: (base, length, type).
fn e820(memory: &GuestMemoryMmap) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, layout::LOW_RAM_END, E820_RAM),
        (layout::ACPI, layout::ACPI_LEN, E820_RESERVED),
    ];
    for region in memory.iter() {
        let start = region.start_addr().0.max(layout::HIGH_RAM);
        let end = region.start_addr().0 + region.len();
        let kind = match region.file_offset() {
            Some(_) => E820_PMEM,
            None => E820_RAM,
        };
        if start < end {
            map.push((start, end - start, kind));
        }
    }
    map
}

fn read(path: &Path) -> Result<Vec<u8>, BootError> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|mut file| file.read_to_end(&mut bytes))
        .map_err(|source| BootError::File {
            path: path.to_owned(),
            source,
        })?;
    Ok(bytes)
}

/// The initrds one after the other, as the kernel unpacks them; each begins at a multiple of four.
fn read_initrds(paths: &[PathBuf]) -> Result<Vec<u8>, BootError> {
    let mut all = Vec::new();
    for path in paths {
        all.resize(all.len().next_multiple_of(4), 0);
        all.extend(read(path)?);
    }
    Ok(all)
}

/// Loads all that is needed and gives the 64-bit entry point.
pub fn load(
    memory: &GuestMemoryMmap,
    kernel: &Path,
    initrds: &[PathBuf],
    cmdline: &str,
    tables: &acpi::Config,
) -> Result<u64, BootError> {
    let mut file = File::open(kernel).map_err(|source| BootError::File {
        path: kernel.to_owned(),
        source,
    })?;
    let bad_kernel = |reason: String| BootError::Kernel {
        path: kernel.to_owned(),
        reason,
    };
    let loaded = BzImage::load(
        memory,
        None,
        &mut file,
        Some(GuestAddress(layout::HIGH_RAM)),
    )
    .map_err(|error| bad_kernel(error.to_string()))?;
    let mut header = loaded
        .setup_header
        .ok_or_else(|| bad_kernel("no setup header".into()))?;
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(bad_kernel("no 64-bit entry point".into()));
    }

    if cmdline.len() >= layout::CMDLINE_MAX {
        return Err(BootError::CommandLine {
            len: cmdline.len(),
            max: layout::CMDLINE_MAX - 1,
        });
    }
    memory.write_slice(cmdline.as_bytes(), GuestAddress(layout::CMDLINE))?;
    memory.write_obj(0u8, GuestAddress(layout::CMDLINE + cmdline.len() as u64))?;

    let initrd = read_initrds(initrds)?;
    if !initrd.is_empty() {
        // As high as it goes below the hole, out of the way of the decompressing kernel.
        let top = memory
            .iter()
            .map(|region| region.start_addr().0 + region.len())
            .filter(|&end| end <= layout::PCI_HOLE)
            .max()
            .unwrap_or(0)
            .min(u64::from(header.initrd_addr_max) + 1);
        let kernel_end = loaded.kernel_load.0 + u64::from(header.init_size);
        let start = top
            .checked_sub(initrd.len() as u64)
            .map(|start| start & !0xfff)
            .filter(|&start| start >= kernel_end)
            .ok_or(BootError::TooBig {
                what: "the initrd",
                len: initrd.len() as u64,
            })?;
        memory.write_slice(&initrd, GuestAddress(start))?;
        header.ramdisk_image = start as u32;
        header.ramdisk_size = initrd.len() as u32;
    }

    header.type_of_loader = LOADER_UNDEFINED;
    header.loadflags |= CAN_USE_HEAP;
    header.cmd_line_ptr = layout::CMDLINE as u32;

    let tables = acpi::build(layout::ACPI, tables);
    memory.write_slice(&tables.bytes, GuestAddress(layout::ACPI))?;

    let mut params = boot_params {
        hdr: header,
        ..Default::default()
    };
    params.acpi_rsdp_addr = tables.rsdp;
    let map = e820(memory);
    params.e820_entries = map.len() as u8;
    for (entry, (addr, size, type_)) in params.e820_table.iter_mut().zip(map) {
        entry.addr = addr;
        entry.size = size;
        entry.type_ = type_;
    }
    memory.write_obj(params, GuestAddress(layout::ZERO_PAGE))?;
    Ok(loaded.kernel_load.0 + ENTRY_64)
}

/// A flat GDT entry in its 64 bits.
fn gdt_entry(segment: &kvm_segment) -> u64 {
    let limit = u64::from(segment.limit) >> 12;
    let access = u64::from(segment.type_)
        | (u64::from(segment.s) << 4)
        | (u64::from(segment.dpl) << 5)
        | (u64::from(segment.present) << 7);
    let flags = u64::from(segment.avl)
        | (u64::from(segment.l) << 1)
        | (u64::from(segment.db) << 2)
        | (u64::from(segment.g) << 3);
    limit & 0xffff | (access << 40) | (((limit >> 16) & 0xf) << 48) | (flags << 52)
}

/// Writes GDT and page tables and sets the special registers for 64-bit mode.
pub fn long_mode(memory: &GuestMemoryMmap, sregs: &mut kvm_sregs) -> Result<(), BootError> {
    let flat = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    // The selectors the boot protocol asks for.
    let code = kvm_segment {
        selector: 0x10,
        type_: 0xb,
        l: 1,
        ..flat
    };
    let data = kvm_segment {
        selector: 0x18,
        type_: 0x3,
        db: 1,
        ..flat
    };
    let task = kvm_segment {
        selector: 0x20,
        type_: 0xb,
        present: 1,
        limit: 0x67,
        ..Default::default()
    };
    let gdt = [
        0,
        0,
        gdt_entry(&code),
        gdt_entry(&data),
        gdt_entry(&task),
        0,
    ];
    for (index, entry) in (0u64..).zip(gdt) {
        memory.write_obj(entry, GuestAddress(layout::GDT + index * 8))?;
    }
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = (gdt.len() * 8 - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cs = code;
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = data;
    }
    sregs.tr = task;

    // The first four GiB one to one, in 2 MiB pages.
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    memory.write_obj(layout::PDPT | PRESENT_WRITABLE, GuestAddress(layout::PML4))?;
    for gib in 0..4 {
        let directory = layout::PD + gib * 0x1000;
        memory.write_obj(
            directory | PRESENT_WRITABLE,
            GuestAddress(layout::PDPT + gib * 8),
        )?;
        for entry in 0..512 {
            let address = (gib << 30) | (entry << 21);
            memory.write_obj(
                address | PRESENT_WRITABLE | LARGE,
                GuestAddress(directory + entry * 8),
            )?;
        }
    }
    const CR0_PE: u64 = 1;
    const CR0_PG: u64 = 1 << 31;
    const CR4_PAE: u64 = 1 << 5;
    const EFER_LME_LMA: u64 = (1 << 8) | (1 << 10);
    sregs.cr3 = layout::PML4;
    sregs.cr4 |= CR4_PAE;
    sregs.cr0 |= CR0_PE | CR0_PG;
    sregs.efer |= EFER_LME_LMA;
    Ok(())
}

/// General registers at the entry point.
pub fn registers(entry: u64) -> kvm_regs {
    kvm_regs {
        rip: entry,
        rsi: layout::ZERO_PAGE,
        rsp: layout::BOOT_STACK,
        rbp: layout::BOOT_STACK,
        // Bit 1 is always set.
        rflags: 2,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::FileOffset;

    #[test]
    fn ram_around_the_hole() {
        assert_eq!(ram_ranges(1 << 30), [(GuestAddress(0), 1 << 30)]);
        assert_eq!(ram_ranges(3 << 30), [(GuestAddress(0), 3 << 30)]);
        assert_eq!(
            ram_ranges(4 << 30),
            [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 1 << 30)]
        );
    }

    #[test]
    fn e820_leaves_out_the_legacy_area() {
        let memory = GuestMemoryMmap::from_ranges(&ram_ranges(64 << 20)).unwrap();
        assert_eq!(
            e820(&memory),
            [
                (0, 0x9fc00, E820_RAM),
                (0xe0000, 0x20000, E820_RESERVED),
                (0x100000, 63 << 20, E820_RAM)
            ]
        );
    }

    #[test]
    fn a_file_is_persistent_memory() {
        let path = std::env::temp_dir().join(format!("vmm-pmem-{}", std::process::id()));
        let file = File::create_new(&path).unwrap();
        file.set_len(2 << 20).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let pmem = (GuestAddress(layout::PMEM), 2 << 20);
        let memory = GuestMemoryMmap::from_ranges_with_files([
            (GuestAddress(0), 2 << 20, None),
            (pmem.0, pmem.1, Some(FileOffset::new(file, 0))),
        ])
        .unwrap();
        assert_eq!(
            e820(&memory)[2..],
            [
                (0x100000, 1 << 20, E820_RAM),
                (layout::PMEM, 2 << 20, E820_PMEM)
            ]
        );
    }

    #[test]
    fn gdt_entries() {
        let memory = GuestMemoryMmap::from_ranges(&ram_ranges(1 << 20)).unwrap();
        let mut sregs = kvm_sregs::default();
        long_mode(&memory, &mut sregs).unwrap();
        let entry = |index: u64| -> u64 {
            memory
                .read_obj(GuestAddress(layout::GDT + index * 8))
                .unwrap()
        };
        assert_eq!(entry(2), 0x00af_9b00_0000_ffff);
        assert_eq!(entry(3), 0x00cf_9300_0000_ffff);
    }

    #[test]
    fn initrds_are_aligned() {
        let dir = std::env::temp_dir().join(format!("vmm-initrd-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (a, b) = (dir.join("a"), dir.join("b"));
        std::fs::write(&a, b"abcde").unwrap();
        std::fs::write(&b, b"xyz").unwrap();
        assert_eq!(read_initrds(&[a, b]).unwrap(), b"abcde\0\0\0xyz");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
