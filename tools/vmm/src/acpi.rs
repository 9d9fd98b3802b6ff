// SPDX-License-Identifier: GPL-2.0
//! ACPI tables: RSDP, XSDT, FADT with DSDT and FACS, MADT, and NFIT for persistent memory.
//!
//! The DSDT holds what a guest needs to find the VMBus, persistent memory and a PCI bus, and to switch itself off,
//! nothing more.

use crate::layout;

const OEM_ID: &[u8; 6] = b"HVLAB ";
const OEM_TABLE_ID: &[u8; 8] = b"HVLABVMM";
const CREATOR_ID: &[u8; 4] = b"HVLB";
/// Length of the header every table begins with.
const HEADER: usize = 36;

/// A range of addresses, such as an MMIO window of the VMBus device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// First address.
    pub base: u64,
    /// Length in bytes.
    pub len: u64,
}

/// What the tables depend on.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    /// Virtual processors; their APIC ids are 0, 1, ….
    pub cpus: u32,
    /// Bytes of RAM.
    pub memory: u64,
    /// NUMA nodes, among which processors and memory are divided.
    pub nodes: u32,
    /// MMIO window below 4 GiB.
    pub low_mmio: Window,
    /// MMIO window above 4 GiB.
    pub high_mmio: Window,
    /// Persistent memory.
    pub pmem: Option<Window>,
    /// Segment of a PCI bus that has nothing on it.
    pub pci_segment: Option<u16>,
}

/// The tables as one block, to be placed at a given address.
pub struct Tables {
    /// Bytes of the block.
    pub bytes: Vec<u8>,
    /// Address of the RSDP.
    pub rsdp: u64,
}

fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, &byte| sum.wrapping_add(byte))
        .wrapping_neg()
}

/// Puts the common header in front of a body.
fn table(signature: &[u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut table = Vec::with_capacity(HEADER + body.len());
    table.extend(signature);
    table.extend(((HEADER + body.len()) as u32).to_le_bytes());
    table.push(revision);
    table.push(0);
    table.extend(OEM_ID);
    table.extend(OEM_TABLE_ID);
    table.extend(1u32.to_le_bytes());
    table.extend(CREATOR_ID);
    table.extend(1u32.to_le_bytes());
    table.extend(body);
    table[9] = checksum(&table);
    table
}

/// AML, as far as the DSDT needs it.
mod aml {
    /// `PkgLength` and the bytes it counts; the length includes itself.
    fn package_length(body: &[u8]) -> Vec<u8> {
        let len = body.len();
        let mut out = Vec::with_capacity(len + 4);
        if len + 1 < 1 << 6 {
            out.push((len + 1) as u8);
        } else {
            // The first byte has the count of further bytes and the lowest four bits.
            let extra = (1..=3usize)
                .find(|extra| len + extra + 1 < 1 << (4 + 8 * extra))
                .expect("no DSDT of ours is that long");
            let total = len + extra + 1;
            out.push(((extra << 6) | total & 0xf) as u8);
            out.extend((0..extra).map(|i| (total >> (4 + 8 * i)) as u8));
        }
        out.extend(body);
        out
    }

    fn with_package_length(op: &[u8], body: &[u8]) -> Vec<u8> {
        [op, &package_length(body)].concat()
    }

    /// An integer constant.
    fn integer(value: u32) -> Vec<u8> {
        match value {
            0 | 1 => vec![value as u8],
            2..=0xff => vec![0x0a, value as u8],
            0x100..=0xffff => [&[0x0b], &(value as u16).to_le_bytes()[..]].concat(),
            _ => [&[0x0c], &value.to_le_bytes()[..]].concat(),
        }
    }

    fn string(text: &str) -> Vec<u8> {
        [b"\x0d", text.as_bytes(), b"\0"].concat()
    }

    pub fn scope(path: &[u8], body: &[u8]) -> Vec<u8> {
        with_package_length(b"\x10", &[path, body].concat())
    }

    pub fn device(name: &[u8; 4], body: &[u8]) -> Vec<u8> {
        with_package_length(b"\x5b\x82", &[name, body].concat())
    }

    pub fn name(name: &[u8; 4], value: &[u8]) -> Vec<u8> {
        [b"\x08", &name[..], value].concat()
    }

    pub fn name_string(of: &[u8; 4], text: &str) -> Vec<u8> {
        name(of, &string(text))
    }

    pub fn name_integer(of: &[u8; 4], value: u32) -> Vec<u8> {
        name(of, &integer(value))
    }

    /// A package of small integers.
    pub fn package(values: &[u8]) -> Vec<u8> {
        let mut body = vec![values.len() as u8];
        values
            .iter()
            .for_each(|&value| body.extend(integer(value.into())));
        with_package_length(b"\x12", &body)
    }

    /// A resource template.
    pub fn resources(descriptors: &[u8]) -> Vec<u8> {
        // End tag; a zero checksum counts as correct.
        let bytes = [descriptors, &[0x79, 0]].concat();
        let len = bytes.len();
        assert!(len < 0x100, "one byte holds the length");
        with_package_length(b"\x11", &[&[0x0a, len as u8], &bytes[..]].concat())
    }

    /// A window of addresses that a bus hands out: producer, fixed, cacheability left open, read-write.
    pub fn memory_window(window: super::Window) -> Vec<u8> {
        let super::Window { base, len } = window;
        let mut out = vec![0x8a, 0x2b, 0];
        out.extend([0, 0x0c, 0x01]);
        for value in [0, base, base + len - 1, 0, len] {
            out.extend(value.to_le_bytes());
        }
        out
    }

    /// The same with 32-bit fields.
    pub fn memory_window32(window: super::Window) -> Vec<u8> {
        let super::Window { base, len } = window;
        let mut out = vec![0x87, 0x17, 0];
        out.extend([0, 0x0c, 0x01]);
        for value in [0, base, base + len - 1, 0, len] {
            out.extend((value as u32).to_le_bytes());
        }
        out
    }

    /// Bus 0 alone: producer, fixed.
    pub fn first_bus() -> Vec<u8> {
        let mut out = vec![0x88, 0x0d, 0];
        out.extend([2, 0x0c, 0]);
        for value in [0u16, 0, 0, 0, 1] {
            out.extend(value.to_le_bytes());
        }
        out
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn integers() {
            assert_eq!(integer(1), [1]);
            assert_eq!(integer(2), [0x0a, 2]);
            assert_eq!(integer(0x1234), [0x0b, 0x34, 0x12]);
            assert_eq!(integer(0x1234_5678), [0x0c, 0x78, 0x56, 0x34, 0x12]);
        }

        #[test]
        fn package_lengths() {
            for (len, head) in [
                (0usize, vec![1u8]),
                (62, vec![63]),
                (63, vec![0x41, 4]),
                (4093, vec![0x4f, 0xff]),
                (4094, vec![0x81, 0x00, 0x01]),
            ] {
                let out = package_length(&vec![0xaa; len]);
                assert_eq!(out[..head.len()], head[..], "length {len}");
                assert_eq!(out.len(), len + head.len());
            }
        }
    }
}

/// A PCI root bus, and the device by which its configuration space is reserved.
fn pci_root(segment: u16) -> Vec<u8> {
    let config_space = Window {
        base: layout::PCI_CONFIG,
        len: layout::PCI_CONFIG_LEN,
    };
    let root = [
        aml::name_string(b"_HID", "PNP0A08"),
        aml::name_string(b"_CID", "PNP0A03"),
        aml::name_integer(b"_UID", 0),
        aml::name_integer(b"_SEG", segment.into()),
        aml::name_integer(b"_BBN", 0),
        aml::name_integer(b"_CBA", config_space.base as u32),
        aml::name(b"_CRS", &aml::resources(&aml::first_bus())),
    ]
    .concat();
    let reserved = [
        aml::name_string(b"_HID", "PNP0C02"),
        aml::name_integer(b"_UID", 0),
        aml::name(
            b"_CRS",
            &aml::resources(&aml::memory_window32(config_space)),
        ),
    ]
    .concat();
    [aml::device(b"PCIR", &root), aml::device(b"PCIC", &reserved)].concat()
}

fn dsdt(config: &Config) -> Vec<u8> {
    let mut windows = Vec::new();
    if config.low_mmio.len > 0 {
        windows.extend(aml::memory_window32(config.low_mmio));
    }
    if config.high_mmio.len > 0 {
        windows.extend(aml::memory_window(config.high_mmio));
    }
    let vmbus = [
        aml::name_string(b"_HID", "VMBUS"),
        aml::name_integer(b"_UID", 0),
        aml::name_integer(b"_STA", 0x0f),
        // The bus driver gives up its MMIO windows, silently, if this is missing.
        aml::name(b"_CRS", &aml::resources(&[])),
    ]
    .concat();
    // The windows belong to a module device above the bus, as on Hyper-V.
    let module = [
        aml::name_string(b"_HID", "ACPI0004"),
        aml::name_integer(b"_UID", 0),
        aml::name(b"_CRS", &aml::resources(&windows)),
        aml::device(b"VMBS", &vmbus),
    ]
    .concat();
    let mut devices = aml::device(b"VMOD", &module);
    if config.pmem.is_some() {
        // What is there is in the NFIT.
        devices.extend(aml::device(b"NVDR", &aml::name_string(b"_HID", "ACPI0012")));
    }
    if let Some(segment) = config.pci_segment {
        devices.extend(pci_root(segment));
    }
    let body = [
        aml::scope(b"\\_SB_", &devices),
        aml::name(
            b"_S5_",
            &aml::package(&[SLEEP_TYPE_OFF, SLEEP_TYPE_OFF, 0, 0]),
        ),
    ]
    .concat();
    table(b"DSDT", 2, &body)
}

/// Sleep type of the soft-off state, as the PM1 control register wants it.
pub const SLEEP_TYPE_OFF: u8 = 5;

/// Fills in the FADT at the specification's offsets.
fn fadt(facs: u64, dsdt: u64) -> Vec<u8> {
    const LEN: usize = 276;
    let mut body = vec![0; LEN - HEADER];
    let mut put = |offset: usize, bytes: &[u8]| {
        body[offset - HEADER..][..bytes.len()].copy_from_slice(bytes);
    };
    // A generic address: system I/O, width in bits, byte or word access.
    let io = |port: u16, bits: u8| {
        let mut address = vec![1, bits, 0, if bits == 8 { 1 } else { 2 }];
        address.extend(u64::from(port).to_le_bytes());
        address
    };
    put(36, &(facs as u32).to_le_bytes());
    put(40, &(dsdt as u32).to_le_bytes());
    // SCI_INT.
    put(46, &9u16.to_le_bytes());
    put(56, &u32::from(layout::PM1A_EVENT).to_le_bytes());
    put(64, &u32::from(layout::PM1A_CONTROL).to_le_bytes());
    put(88, &[4]);
    put(89, &[2]);
    // P_LVL2_LAT and P_LVL3_LAT: no such states.
    put(96, &101u16.to_le_bytes());
    put(98, &1001u16.to_le_bytes());
    // Century byte of the CMOS clock.
    put(108, &[0x32]);
    // IAPC_BOOT_ARCH: legacy devices, no VGA.
    put(109, &(1u16 | (1 << 2)).to_le_bytes());
    // WBINVD works, C1 works, sleep and power buttons are control methods, RTC wakes nothing, reset register works.
    put(
        112,
        &(1u32 | (1 << 2) | (1 << 4) | (1 << 5) | (1 << 6) | (1 << 10)).to_le_bytes(),
    );
    put(116, &io(layout::RESET, 8));
    put(128, &[layout::RESET_VALUE]);
    put(132, &facs.to_le_bytes());
    put(140, &dsdt.to_le_bytes());
    put(148, &io(layout::PM1A_EVENT, 32));
    put(172, &io(layout::PM1A_CONTROL, 16));
    table(b"FACP", 6, &body)
}

fn facs() -> Vec<u8> {
    let mut facs = vec![0; 64];
    facs[..4].copy_from_slice(b"FACS");
    facs[4..8].copy_from_slice(&64u32.to_le_bytes());
    facs[32] = 2;
    facs
}

fn madt(cpus: u32) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend(layout::LAPIC.to_le_bytes());
    // PCAT_COMPAT: there are two 8259s.
    body.extend(1u32.to_le_bytes());
    for cpu in 0..cpus as u8 {
        // Local APIC: processor UID, APIC id, enabled.
        body.extend([0, 8, cpu, cpu]);
        body.extend(1u32.to_le_bytes());
    }
    // I/O APIC, id after the processors', GSIs from 0.
    body.extend([1, 12, cpus as u8, 0]);
    body.extend(layout::IOAPIC.to_le_bytes());
    body.extend(0u32.to_le_bytes());
    // The SCI is level-triggered and active high.
    body.extend([2, 10, 0, 9]);
    body.extend(9u32.to_le_bytes());
    body.extend(0x000du16.to_le_bytes());
    table(b"APIC", 4, &body)
}

/// Which node each processor and each piece of memory belongs to.
fn srat(config: &Config) -> Vec<u8> {
    let nodes = u64::from(config.nodes);
    // Revision 1, and what is reserved.
    let mut body = vec![1, 0, 0, 0];
    body.extend([0; 8]);
    for cpu in 0..config.cpus {
        let node = cpu / crate::node_size(config.cpus, config.nodes);
        // Local APIC, enabled; the node's other bytes are zero.
        body.extend([0, 16, node as u8, cpu as u8]);
        body.extend(1u32.to_le_bytes());
        body.extend([0; 8]);
    }
    // Where a node's part of all RAM ends.
    let end = |node: u64| (config.memory / nodes * (node + 1)) & !((1 << 20) - 1);
    let mut before = 0;
    for (base, len) in crate::boot::ram_ranges(config.memory) {
        let len = len as u64;
        let mut from = before;
        for node in 0..nodes {
            let last = node + 1 == nodes;
            let to = if last { u64::MAX } else { end(node) }.min(before + len);
            if from < to {
                body.extend([1, 40]);
                body.extend((node as u32).to_le_bytes());
                body.extend([0; 2]);
                body.extend((base.0 + from - before).to_le_bytes());
                body.extend((to - from).to_le_bytes());
                body.extend([0; 4]);
                body.extend(1u32.to_le_bytes());
                body.extend([0; 8]);
                from = to;
            }
        }
        before += len;
    }
    table(b"SRAT", 3, &body)
}

fn nfit(pmem: Window) -> Vec<u8> {
    /// 66f0d379-b4f3-4074-ac43-0d3318b78cdb: byte-addressable persistent memory.
    const PERSISTENT: [u8; 16] = [
        0x79, 0xd3, 0xf0, 0x66, 0xf3, 0xb4, 0x74, 0x40, 0xac, 0x43, 0x0d, 0x33, 0x18, 0xb7, 0x8c,
        0xdb,
    ];
    /// Write-back cached, non-volatile.
    const ATTRIBUTES: u64 = (1 << 3) | (1 << 15);
    let mut body = vec![0; 4];
    // A range of system physical addresses, number 1, of no proximity domain.
    for field in [0u16, 56, 1, 0] {
        body.extend(field.to_le_bytes());
    }
    body.extend([0; 8]);
    body.extend(PERSISTENT);
    for field in [pmem.base, pmem.len, ATTRIBUTES] {
        body.extend(field.to_le_bytes());
    }
    table(b"NFIT", 1, &body)
}

/// Builds all tables for a block at `base`.
pub fn build(base: u64, config: &Config) -> Tables {
    let mut bytes = Vec::new();
    let mut place = |table: Vec<u8>| {
        // The FACS wants 64.
        bytes.resize(bytes.len().next_multiple_of(64), 0);
        let address = base + bytes.len() as u64;
        bytes.extend(table);
        address
    };
    let dsdt = place(dsdt(config));
    let facs = place(facs());
    let fadt = place(fadt(facs, dsdt));
    let madt = place(madt(config.cpus));
    let mut list = vec![fadt, madt];
    if config.nodes > 1 {
        list.push(place(srat(config)));
    }
    list.extend(config.pmem.map(|pmem| place(nfit(pmem))));
    let list: Vec<_> = list.into_iter().flat_map(u64::to_le_bytes).collect();
    let xsdt = place(table(b"XSDT", 1, &list));
    let mut rsdp = Vec::new();
    rsdp.extend(b"RSD PTR ");
    rsdp.push(0);
    rsdp.extend(OEM_ID);
    rsdp.push(2);
    // No RSDT.
    rsdp.extend(0u32.to_le_bytes());
    rsdp[8] = checksum(&rsdp);
    rsdp.extend(36u32.to_le_bytes());
    rsdp.extend(xsdt.to_le_bytes());
    rsdp.extend([0; 4]);
    rsdp[32] = checksum(&rsdp);
    let rsdp = place(rsdp);
    Tables { bytes, rsdp }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: Config = Config {
        cpus: 3,
        memory: 64 << 20,
        nodes: 1,
        low_mmio: Window {
            base: 0xe000_0000,
            len: 0x1000_0000,
        },
        high_mmio: Window {
            base: 0x10_0000_0000,
            len: 0x40_0000_0000,
        },
        pmem: None,
        pci_segment: None,
    };
    const BASE: u64 = 0xe0000;

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, &byte| sum.wrapping_add(byte))
    }

    /// The table at a guest address, by its own length.
    fn at(tables: &Tables, address: u64) -> &[u8] {
        let bytes = &tables.bytes[(address - BASE) as usize..];
        &bytes[..u32_at(bytes, 4) as usize]
    }

    #[test]
    fn tables_are_linked_and_sum_to_zero() {
        let tables = build(BASE, &CONFIG);
        let rsdp = &tables.bytes[(tables.rsdp - BASE) as usize..][..36];
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!(tables.rsdp % 16, 0);
        assert_eq!(sum(&rsdp[..20]), 0);
        assert_eq!(sum(rsdp), 0);
        let xsdt = at(&tables, u64_at(rsdp, 24));
        assert_eq!((&xsdt[..4], sum(xsdt)), (&b"XSDT"[..], 0));
        let fadt = at(&tables, u64_at(xsdt, 36));
        assert_eq!((&fadt[..4], sum(fadt)), (&b"FACP"[..], 0));
        let madt = at(&tables, u64_at(xsdt, 44));
        assert_eq!((&madt[..4], sum(madt)), (&b"APIC"[..], 0));
        let dsdt = at(&tables, u64_at(fadt, 140));
        assert_eq!((&dsdt[..4], sum(dsdt)), (&b"DSDT"[..], 0));
        let facs = at(&tables, u64_at(fadt, 132));
        assert_eq!((&facs[..4], facs.len()), (&b"FACS"[..], 64));
        assert!(tables.bytes.len() < layout::ACPI_LEN as usize);
    }

    #[test]
    fn persistent_memory_has_a_table_and_a_device() {
        let pmem = Window {
            base: 0x8_0000_0000,
            len: 2 << 20,
        };
        let tables = build(
            BASE,
            &Config {
                pmem: Some(pmem),
                ..CONFIG
            },
        );
        let rsdp = &tables.bytes[(tables.rsdp - BASE) as usize..][..36];
        let xsdt = at(&tables, u64_at(rsdp, 24));
        let nfit = at(&tables, u64_at(xsdt, 52));
        assert_eq!((&nfit[..4], sum(nfit), nfit.len()), (&b"NFIT"[..], 0, 96));
        assert_eq!((u64_at(nfit, 72), u64_at(nfit, 80)), (pmem.base, pmem.len));
        let has_device = |bytes: &[u8]| bytes.windows(8).any(|part| part == b"ACPI0012");
        assert!(has_device(&tables.bytes));
        assert!(!has_device(&build(BASE, &CONFIG).bytes));
    }

    #[test]
    fn pci_bus_has_its_segment() {
        let bytes = dsdt(&Config {
            pci_segment: Some(0x7b20),
            ..CONFIG
        });
        for part in [
            &b"PNP0A08\0"[..],
            b"_SEG\x0b\x20\x7b",
            b"_CBA\x0c\0\0\0\xd0",
        ] {
            assert!(bytes.windows(part.len()).any(|bytes| bytes == part));
        }
    }

    #[test]
    fn madt_lists_the_processors() {
        let madt = madt(3);
        let mut at = 44;
        let mut apics = Vec::new();
        while at < madt.len() {
            if madt[at] == 0 {
                apics.push(madt[at + 3]);
            }
            at += madt[at + 1] as usize;
        }
        assert_eq!((at, apics), (madt.len(), vec![0, 1, 2]));
    }

    #[test]
    fn srat_divides_processors_and_memory() {
        const GIB: u64 = 1 << 30;
        let srat = srat(&Config {
            memory: 8 * GIB,
            nodes: 2,
            ..CONFIG
        });
        assert_eq!((&srat[..4], sum(&srat)), (&b"SRAT"[..], 0));
        let (mut cpus, mut memory) = (Vec::new(), Vec::new());
        let mut at = 48;
        while at < srat.len() {
            match srat[at] {
                0 => cpus.push((srat[at + 3], srat[at + 2])),
                _ => memory.push((
                    u32_at(&srat, at + 2),
                    u64_at(&srat, at + 8),
                    u64_at(&srat, at + 16),
                )),
            }
            at += srat[at + 1] as usize;
        }
        assert_eq!(cpus, [(0, 0), (1, 0), (2, 1)]);
        // There is a gap from 3 to 4 GiB.
        let pieces = [(0, 0, 3), (0, 4, 1), (1, 5, 4)];
        assert_eq!(
            memory,
            pieces.map(|(n, from, len)| (n, from * GIB, len * GIB))
        );
    }

    #[test]
    fn dsdt_has_the_windows() {
        let find = |dsdt: &[u8], what: &[u8]| dsdt.windows(what.len()).any(|part| part == what);
        let bytes = dsdt(&CONFIG);
        assert!(find(&bytes, b"\x08_HID\x0dVMBUS\0"));
        assert!(find(&bytes, &aml::memory_window32(CONFIG.low_mmio)));
        assert!(find(&bytes, &aml::memory_window(CONFIG.high_mmio)));
        assert!(!find(&bytes, b"PNP0A08"));
        let none = Window { base: 0, len: 0 };
        let bytes = dsdt(&Config {
            high_mmio: none,
            ..CONFIG
        });
        assert!(!find(&bytes, b"\x8a\x2b\0"));
    }
}
