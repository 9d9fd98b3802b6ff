// SPDX-License-Identifier: GPL-2.0

//! The hypercalls that a virtual PCI bus needs, beside the VMBus.

use hyperv_bindings as bindings;
use hyperv_wire::hypercall::{
    code,
    Control,
    Retarget, //
};
use kernel::prelude::*;

use crate::arch;

/// Whether Linux is the host's administrative system, whose interrupts work in another way.
pub fn is_root_partition() -> bool {
    // SAFETY: The variable is set at boot and does not change.
    unsafe {
        bindings::hv_curr_partition_type == bindings::hv_partition_type_HV_PARTITION_TYPE_ROOT
    }
}

/// Bytes of a CPU's page for hypercall inputs; the C code puts outputs behind the input.
const INPUT_PAGE: usize = vmbus::HV_PAGE_SIZE;

/// A hypercall that did not work: its result, whose low 16 bits say why
/// ([`status`](hyperv_wire::hypercall::status)). All bits are set if it could not be made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Failed(pub u64);

/// Makes a hypercall, whose output replaces `output`.
fn call(control: Control, input: &[u8], output: &mut [u8]) -> Result<(), Failed> {
    // Bytes that the hypervisor wants aligned to eight.
    let output_at = input.len().next_multiple_of(8);
    if output_at + output.len() > INPUT_PAGE {
        return Err(Failed(u64::MAX));
    }
    let mut flags = 0;
    // SAFETY: Interrupts are restored below, on the same CPU.
    unsafe { bindings::local_irq_save(&mut flags) };
    // SAFETY: With interrupts off, this CPU's page is ours; both copies are inside of it, and the
    // hypervisor reads and writes only there.
    let result = unsafe {
        let page: *mut u8 = bindings::hv_pcpu_input_page().cast();
        core::ptr::copy_nonoverlapping(input.as_ptr(), page, input.len());
        let out = if output.is_empty() {
            core::ptr::null_mut()
        } else {
            page.add(output_at)
        };
        let result = bindings::hyperv_do_hypercall(control.0, page.cast(), out.cast());
        if !output.is_empty() {
            core::ptr::copy_nonoverlapping(out, output.as_mut_ptr(), output.len());
        }
        result
    };
    // SAFETY: The flags are those of above.
    unsafe { bindings::local_irq_restore(flags) };
    match result & 0xffff {
        0 => Ok(()),
        _ => Err(Failed(result)),
    }
}

/// Sends an MSI that was set up before to other processors.
pub fn retarget_interrupt(retarget: &Retarget<'_>) -> Result<(), Failed> {
    let mut input = [0; Retarget::MAX];
    let control = retarget.write(&mut input).map_err(|_| Failed(u64::MAX))?;
    call(control, &input, &mut [])
}

/// The bit of the hypervisor's hints (CPUID 0x40000004, EAX) for MMIO accesses by hypercall.
const HINT_MMIO_HYPERCALLS: u32 = 1 << 21;

/// Whether the hypervisor wants MMIO accesses to the configuration window as hypercalls.
pub fn mmio_by_hypercall() -> bool {
    // SAFETY: The variable is set at boot and does not change.
    arch::MMIO_HYPERCALLS && unsafe { bindings::ms_hyperv.hints & HINT_MMIO_HYPERCALLS != 0 }
}

/// Largest access to MMIO space by hypercall.
const MMIO_DATA_MAX: usize = 64;

/// Reads `data.len()` bytes, at most 64, at the guest-physical address `address`.
pub fn mmio_read(address: u64, data: &mut [u8]) -> Result<(), Failed> {
    let mut input = [0; 16];
    input[..8].copy_from_slice(&address.to_le_bytes());
    input[8..12].copy_from_slice(&(data.len() as u32).to_le_bytes());
    let mut output = [0; MMIO_DATA_MAX];
    let read = output.get(..data.len()).ok_or(Failed(u64::MAX))?.len();
    call(Control::new(code::MMIO_READ, 0), &input, &mut output)?;
    data.copy_from_slice(&output[..read]);
    Ok(())
}

/// Writes `data`, at most 64 bytes, to the guest-physical address `address`.
pub fn mmio_write(address: u64, data: &[u8]) -> Result<(), Failed> {
    let mut input = [0; 16 + MMIO_DATA_MAX];
    input[..8].copy_from_slice(&address.to_le_bytes());
    input[8..12].copy_from_slice(&(data.len() as u32).to_le_bytes());
    input
        .get_mut(16..16 + data.len())
        .ok_or(Failed(u64::MAX))?
        .copy_from_slice(data);
    call(Control::new(code::MMIO_WRITE, 0), &input, &mut [])
}

/// The hypervisor's number of the processor that Linux calls `cpu`.
pub fn vp_index(cpu: u32) -> Option<u32> {
    // SAFETY: The function bounds-checks nothing, so do it here: the table has an entry for each
    // possible CPU.
    let vp = unsafe {
        if cpu >= bindings::nr_cpu_ids {
            return None;
        }
        bindings::hv_cpu_number_to_vp_number(cpu as c_int) as u32
    };
    (vp != u32::MAX).then_some(vp)
}
