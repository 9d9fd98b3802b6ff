// SPDX-License-Identifier: GPL-2.0
//! A virtual processor's thread.

use std::io;

use kvm_bindings::{
    kvm_enable_cap, kvm_msr_entry, kvm_regs, Msrs, KVM_CAP_HYPERV_SYNIC2, KVM_EXIT_HYPERV_SYNIC,
    KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN,
};
use kvm_ioctls::{SyncReg, VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::hypercall::{self, Registers};
use crate::{boot, layout, ExitReason, Guest, VmError};

const MSR_GUEST_OS_ID: u32 = 0x4000_0000;
const MSR_HYPERCALL: u32 = 0x4000_0001;
const MSR_CRASH_P0: u32 = 0x4000_0100;
/// Parameters of a crash.
pub const CRASH_PARAMETERS: usize = 5;
/// The two MSRs that come to us instead of KVM.
pub const FILTERED_MSRS: std::ops::RangeInclusive<u32> = MSR_GUEST_OS_ID..=MSR_HYPERCALL;
/// KVM_INTERNAL_ERROR_DELIVERY_EV: an access to a device's memory while an exception is being delivered.
///
/// It is the processor's EXITINTINFO that tells KVM so, and KVM looks at the type in it without the valid bit. QEMU's
/// emulated processor leaves the type of the exception before behind, so in a nested machine the first access to a
/// device after one may end in this error, with nothing executed yet. The next exit clears what was left.
const INTERNAL_ERROR_DELIVERY: u32 = 3;
/// How often that may come in a row before it is what it says.
const DELIVERY_ERRORS: u32 = 20;
/// Bit 0 of the hypercall MSR.
const HYPERCALL_ENABLE: u64 = 1;
/// Bit 1: no more changes until reset.
const HYPERCALL_LOCKED: u64 = 2;

/// Partition-wide state of the two MSRs.
#[derive(Debug, Default)]
pub struct HypercallMsrs {
    guest_os_id: u64,
    hypercall: u64,
}

impl HypercallMsrs {
    /// A read by the guest.
    fn read(&self, index: u32) -> Option<u64> {
        match index {
            MSR_GUEST_OS_ID => Some(self.guest_os_id),
            MSR_HYPERCALL => Some(self.hypercall),
            _ => None,
        }
    }

    /// A write by the guest. Gives the address of the hypercall page if it has to be filled.
    fn write(&mut self, index: u32, value: u64) -> Option<u64> {
        match index {
            MSR_GUEST_OS_ID => {
                self.guest_os_id = value;
                if value == 0 {
                    self.hypercall &= !HYPERCALL_ENABLE;
                }
                None
            }
            MSR_HYPERCALL if self.hypercall & HYPERCALL_LOCKED != 0 => None,
            MSR_HYPERCALL => {
                self.hypercall = value;
                // A guest without a name has no hypercalls.
                if self.guest_os_id == 0 {
                    self.hypercall &= !HYPERCALL_ENABLE;
                }
                self.enabled().then_some(value & !0xfff)
            }
            _ => None,
        }
    }

    fn enabled(&self) -> bool {
        self.hypercall & HYPERCALL_ENABLE != 0
    }
}

/// Sets up a new virtual processor. `entry` is where the boot processor starts; the others wait for it.
pub fn set_up(
    memory: &GuestMemoryMmap,
    fd: &mut VcpuFd,
    cpuid: &kvm_bindings::CpuId,
    entry: Option<u64>,
) -> Result<(), VmError> {
    let kvm = |what: &'static str| move |error| VmError::Kvm { what, error };
    fd.enable_cap(&kvm_enable_cap {
        cap: KVM_CAP_HYPERV_SYNIC2,
        ..Default::default()
    })
    .map_err(kvm("KVM_CAP_HYPERV_SYNIC2"))?;
    fd.set_cpuid2(cpuid).map_err(kvm("KVM_SET_CPUID2"))?;
    if let Some(entry) = entry {
        let mut sregs = fd.get_sregs().map_err(kvm("KVM_GET_SREGS"))?;
        boot::long_mode(memory, &mut sregs)?;
        fd.set_sregs(&sregs).map_err(kvm("KVM_SET_SREGS"))?;
        fd.set_regs(&boot::registers(entry))
            .map_err(kvm("KVM_SET_REGS"))?;
    }
    // A hypercall's registers come and go with its exit, at no further system call.
    fd.set_sync_valid_reg(SyncReg::Register);
    Ok(())
}

/// What is left to do after an exit has been taken apart.
enum Next {
    Run,
    Hypercall,
    Synic,
    Crash,
    End(ExitReason),
}

/// Runs the processor until the machine ends.
pub fn run(guest: &Guest, vp: u32, mut fd: VcpuFd) {
    let mut delivery_errors = 0;
    while !guest.machine.stop.is_set() {
        let next = match fd.run() {
            Ok(VcpuExit::InternalError) => {
                let (suberror, data) = internal_error(&mut fd);
                delivery_errors += 1;
                if suberror == INTERNAL_ERROR_DELIVERY && delivery_errors < DELIVERY_ERRORS {
                    continue;
                }
                Next::End(ExitReason::Error(format!(
                    "virtual processor {vp}: KVM internal error {suberror}, data {data:x?}"
                )))
            }
            Ok(exit) => {
                delivery_errors = 0;
                handle(guest, exit)
            }
            Err(error) => match io::Error::from_raw_os_error(error.errno()).kind() {
                io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => Next::Run,
                _ => Next::End(ExitReason::Error(format!(
                    "virtual processor {vp}: KVM_RUN: {error}"
                ))),
            },
        };
        match next {
            Next::Run => {}
            Next::Hypercall => hypercall(guest, &mut fd),
            Next::Synic => synic(guest, vp, &mut fd),
            Next::Crash => guest.crashed(crash_parameters(&fd)),
            Next::End(mut reason) => {
                if let ExitReason::Error(text) = &mut reason {
                    let regs: kvm_regs = fd.sync_regs().regs;
                    text.push_str(&format!(" at rip {:#x}", regs.rip));
                }
                guest.end(reason);
            }
        }
    }
}

fn handle(guest: &Guest, exit: VcpuExit<'_>) -> Next {
    match exit {
        VcpuExit::IoOut(port, _)
            if port == u16::from(layout::HYPERCALL_PORT)
                && guest.hypercall_msrs.lock().unwrap().enabled() =>
        {
            return Next::Hypercall
        }
        VcpuExit::IoOut(port, data) => {
            if let Some(reason) = guest.machine.ports.write(port, data) {
                return Next::End(reason);
            }
        }
        VcpuExit::IoIn(port, data) => guest.machine.ports.read(port, data),
        VcpuExit::MmioRead(address, data) => {
            let address = guest.machine.isolation.device_address(address);
            guest.machine.mmio.read(address, data);
        }
        VcpuExit::MmioWrite(address, data) => {
            let address = guest.machine.isolation.device_address(address);
            guest.machine.mmio.write(address, data);
        }
        VcpuExit::X86Rdmsr(exit) => match guest.hypercall_msrs.lock().unwrap().read(exit.index) {
            Some(value) => *exit.data = value,
            None => *exit.error = 1,
        },
        VcpuExit::X86Wrmsr(exit) => {
            let page = guest
                .hypercall_msrs
                .lock()
                .unwrap()
                .write(exit.index, exit.data);
            if let Some(page) = page {
                let body = &hypercall::PAGE_BODY;
                if guest
                    .machine
                    .memory
                    .write_slice(body, GuestAddress(page))
                    .is_err()
                {
                    // Like any other write of a bad value.
                    *exit.error = 1;
                }
            }
        }
        VcpuExit::Hyperv => return Next::Synic,
        VcpuExit::SystemEvent(event, data) => match event {
            KVM_SYSTEM_EVENT_SHUTDOWN => return Next::End(ExitReason::PowerOff),
            KVM_SYSTEM_EVENT_RESET => return Next::End(ExitReason::Reset),
            KVM_SYSTEM_EVENT_CRASH => return Next::Crash,
            _ => {
                return Next::End(ExitReason::Error(format!(
                    "unknown system event {event} {data:x?}"
                )))
            }
        },
        VcpuExit::Shutdown => return Next::End(ExitReason::TripleFault),
        VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IrqWindowOpen | VcpuExit::IoapicEoi(_) => {}
        other => return Next::End(ExitReason::Error(format!("unexpected exit {other:x?}"))),
    }
    Next::Run
}

fn hypercall(guest: &Guest, fd: &mut VcpuFd) {
    let regs = fd.sync_regs().regs;
    let rax = hypercall::dispatch(
        Registers {
            control: regs.rcx,
            input: regs.rdx,
            output: regs.r8,
        },
        &guest.machine.memory,
        &guest.machine.isolation,
        guest
            .machine
            .mmio_hypercalls
            .then_some(&*guest.machine.mmio),
        &*guest.hypercalls,
    );
    fd.sync_regs_mut().regs.rax = rax;
    fd.set_sync_dirty_reg(SyncReg::Register);
}

/// What KVM says about an instruction that it could not execute: the kind of error, and data for the log.
fn internal_error(fd: &mut VcpuFd) -> (u32, Vec<u64>) {
    // SAFETY: the exit reason says that this member of the union was filled in by the kernel, and it consists of plain
    // integers.
    #[expect(unsafe_code)]
    let error = unsafe { fd.get_kvm_run().__bindgen_anon_1.internal };
    let count = error.data.len().min(error.ndata as usize);
    (error.suberror, error.data[..count].to_vec())
}

/// What the guest says about its crash: on Linux error code, rip, rax, …, or the address of its last words.
fn crash_parameters(fd: &VcpuFd) -> [u64; CRASH_PARAMETERS] {
    let mut parameters = [0; CRASH_PARAMETERS];
    let entries: Vec<_> = (MSR_CRASH_P0..)
        .take(CRASH_PARAMETERS)
        .map(|index| kvm_msr_entry {
            index,
            ..Default::default()
        })
        .collect();
    // They only inform: what cannot be read stays zero.
    if let Ok(mut msrs) = Msrs::from_entries(&entries) {
        if fd.get_msrs(&mut msrs).is_ok() {
            for (parameter, entry) in parameters.iter_mut().zip(msrs.as_slice()) {
                *parameter = entry.data;
            }
        }
    }
    parameters
}

/// The guest has written SCONTROL, SIEFP or SIMP.
fn synic(guest: &Guest, vp: u32, fd: &mut VcpuFd) {
    // SAFETY: the exit reason says that this member of the union was filled in by the kernel, and all its
    // variants are plain integers.
    #[expect(unsafe_code)]
    let exit = unsafe { fd.get_kvm_run().__bindgen_anon_1.hyperv };
    if exit.type_ == KVM_EXIT_HYPERV_SYNIC {
        // SAFETY: the type says which variant is valid; all are plain integers.
        #[expect(unsafe_code)]
        let synic = unsafe { exit.u.synic };
        guest
            .machine
            .synic
            .update(vp, synic.control, synic.evt_page, synic.msg_page);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hypercall_page_needs_a_guest_id() {
        let mut msrs = HypercallMsrs::default();
        assert_eq!(msrs.write(MSR_HYPERCALL, 0x5001), None);
        assert!(!msrs.enabled());
        assert_eq!(msrs.write(MSR_GUEST_OS_ID, 0x8100_0000), None);
        assert_eq!(msrs.write(MSR_HYPERCALL, 0x5001), Some(0x5000));
        assert_eq!(msrs.read(MSR_HYPERCALL), Some(0x5001));
        assert!(msrs.enabled());
        msrs.write(MSR_GUEST_OS_ID, 0);
        assert!(!msrs.enabled());
    }

    #[test]
    fn locked_until_reset() {
        let mut msrs = HypercallMsrs::default();
        msrs.write(MSR_GUEST_OS_ID, 1);
        msrs.write(MSR_HYPERCALL, 0x5003);
        assert_eq!(msrs.write(MSR_HYPERCALL, 0x7001), None);
        assert_eq!(msrs.read(MSR_HYPERCALL), Some(0x5003));
    }
}
