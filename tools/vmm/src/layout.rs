// SPDX-License-Identifier: GPL-2.0
//! Where things are in the guest's physical address space.

/// Long-mode GDT for the boot processor.
pub const GDT: u64 = 0x500;
/// The zero page (`struct boot_params`).
pub const ZERO_PAGE: u64 = 0x7000;
/// Top level of the identity page tables; the next levels follow.
pub const PML4: u64 = 0x9000;
/// Page directory pointers.
pub const PDPT: u64 = 0xa000;
/// Page directories, one page for each of the first four GiB.
pub const PD: u64 = 0xb000;
/// Initial stack; the kernel sets its own at once.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Room for the command line, with its terminator.
pub const CMDLINE_MAX: usize = 4096;
/// End of conventional memory that the guest may use.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// ACPI tables, in what a PC would use for its BIOS.
pub const ACPI: u64 = 0xe_0000;
/// Length of the ACPI area.
pub const ACPI_LEN: u64 = 0x2_0000;
/// First byte above the legacy area.
pub const HIGH_RAM: u64 = 0x10_0000;

/// RAM ends here at the latest, the rest goes above 4 GiB.
pub const PCI_HOLE: u64 = 0xc000_0000;
/// Configuration space of firmware's PCI bus, of which there is one at most.
pub const PCI_CONFIG: u64 = 0xd000_0000;
/// Its length: 4 KiB for each of 256 functions.
pub const PCI_CONFIG_LEN: u64 = 1 << 20;
/// RAM above the hole.
pub const RAM_ABOVE_4G: u64 = 0x1_0000_0000;

/// Persistent memory, between the RAM and the high MMIO window.
pub const PMEM: u64 = 0x8_0000_0000;

/// Low MMIO window of the VMBus.
pub const LOW_MMIO: u64 = 0xe000_0000;
/// Length of the low window: up to the I/O APIC.
pub const LOW_MMIO_LEN: u64 = 0x1ec0_0000;
/// High MMIO window of the VMBus.
pub const HIGH_MMIO: u64 = 0x10_0000_0000;
/// Length of the high window.
pub const HIGH_MMIO_LEN: u64 = 0x40_0000_0000;

/// The bit of an address by which an isolated guest accesses what it shares with the host. It is above all
/// windows, and everything is there once more.
pub const SHARED_BIT: u32 = 39;

/// I/O APIC, where KVM has it.
pub const IOAPIC: u32 = 0xfec0_0000;
/// Local APICs, where KVM has them.
pub const LAPIC: u32 = 0xfee0_0000;
/// Three pages KVM needs for real mode on Intel; and one for its identity map.
pub const TSS: u64 = 0xfffb_d000;
/// KVM's identity map page.
pub const IDENTITY_MAP: u64 = 0xfffb_c000;

/// I/O port of the first serial port (console).
pub const COM1: u16 = 0x3f8;
/// I/O port of the second serial port (agent).
pub const COM2: u16 = 0x2f8;
/// Interrupt line of the first serial port.
pub const COM1_IRQ: u32 = 4;
/// Interrupt line of the second serial port.
pub const COM2_IRQ: u32 = 3;
/// CMOS index and data ports.
pub const CMOS: u16 = 0x70;
/// Keyboard controller command port, of which only the reset line exists.
pub const I8042_COMMAND: u16 = 0x64;
/// ACPI PM1a event block: status and enable.
pub const PM1A_EVENT: u16 = 0x600;
/// ACPI PM1a control block.
pub const PM1A_CONTROL: u16 = 0x604;
/// ACPI reset register.
pub const RESET: u16 = 0x608;
/// Value that resets.
pub const RESET_VALUE: u8 = 1;
/// Port of the hypercall page. Nothing else of a PC answers at it.
pub const HYPERCALL_PORT: u8 = 0xf5;

/// GSIs 0-23 are the I/O APIC's; the SINTs of the virtual processors follow.
pub const FIRST_SINT_GSI: u32 = 24;
