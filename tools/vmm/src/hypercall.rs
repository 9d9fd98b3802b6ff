// SPDX-License-Identifier: GPL-2.0
//! Hypercalls: the calling convention, the calls that the VMBus and the virtual PCI bus need, and the one by which an
//! isolated guest shares memory.
//!
//! KVM would answer them itself, and most of them wrongly for us, if it knew that the guest has enabled
//! hypercalls. So the two MSRs that enable them come to us (MSR filter), and the hypercall page holds an
//! `out` to a port of ours: each hypercall is one port exit with its parameters in the registers.

use hyperv_wire::hypercall::{code, status, Control, Retarget};
use hyperv_wire::vmbus::MAX_MESSAGE_LEN;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

use crate::isolation::Isolation;
use crate::layout::HYPERCALL_PORT;
use crate::mmio::MmioBus;

/// Who does what the guest asks for. Each call gives a hypercall status, zero for success.
///
/// Called on a virtual processor's thread: be short, hand work on.
pub trait Hypercalls: Send + Sync {
    /// `HvPostMessage`: a message to a connection.
    fn post_message(&self, connection: u32, message_type: u32, payload: &[u8]) -> u16;
    /// `HvSignalEvent`: an event flag of a connection.
    fn signal_event(&self, connection: u32, flag: u16) -> u16;
    /// `HvRetargetDeviceInterrupt`: its input, with the variable header.
    fn retarget_device_interrupt(&self, input: &[u8]) -> u16;
    /// MMIO was accessed by `HvMemoryMappedIoRead` or `HvMemoryMappedIoWrite`.
    fn mmio_accessed(&self);
    /// `HvRetargetDeviceInterrupt` is answered with this status, and has not been carried out.
    fn retarget_refused(&self, status: u16);
}

/// What the hypercall page begins with: `endbr64; out imm8, al; ret`.
pub const PAGE_BODY: [u8; 7] = [0xf3, 0x0f, 0x1e, 0xfa, 0xe6, HYPERCALL_PORT, 0xc3];

/// `HvPostMessage` input before the payload: connection, reserved, type, size.
const POST_MESSAGE_HEADER: usize = 16;
/// Input of a change of visibility before the page numbers: partition, visibility, reserved.
const VISIBILITY_HEADER: usize = 16;
/// Host visibility: none, and read and write. Only reading, the one between, is not offered.
const NOT_VISIBLE: u32 = 0;
const VISIBLE_READ_WRITE: u32 = 3;
/// Input of an access to MMIO before the data: address, size, reserved.
const MMIO_HEADER: usize = 16;
/// Bytes of data there.
const MMIO_DATA: usize = 64;
/// Input never crosses a page.
const PAGE: u64 = 4096;

/// The registers of a hypercall in long mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Registers {
    /// RCX: call code, flags, sizes.
    pub control: u64,
    /// RDX: address of the input, or the first input of a fast call.
    pub input: u64,
    /// R8: address of the output, or the second input of a fast call.
    pub output: u64,
}

impl Registers {
    fn control(self) -> Control {
        Control(self.control)
    }

    /// Bytes of variable header.
    fn variable_header(self) -> usize {
        usize::from(self.control().variable_header()) * 8
    }

    fn rep_count(self) -> u16 {
        ((self.control >> 32) & 0xfff) as u16
    }

    fn rep_start(self) -> u16 {
        ((self.control >> 48) & 0xfff) as u16
    }
}

/// Runs one hypercall and gives what goes back in RAX.
pub(crate) fn dispatch(
    registers: Registers,
    memory: &GuestMemoryMmap,
    isolation: &Isolation,
    mmio: Option<&MmioBus>,
    handler: &dyn Hypercalls,
) -> u64 {
    let result = match registers.control().code() {
        // The guests of others have nothing to share, and no right to do it.
        code::MODIFY_SPARSE_GPA_PAGE_HOST_VISIBILITY if isolation.is_active() => {
            return modify_visibility(registers, memory, isolation)
        }
        // None of these is a rep call.
        code::POST_MESSAGE
        | code::SIGNAL_EVENT
        | code::RETARGET_INTERRUPT
        | code::MMIO_READ
        | code::MMIO_WRITE
            if registers.rep_count() != 0 =>
        {
            status::INVALID_HYPERCALL_INPUT
        }
        code::POST_MESSAGE => post_message(registers, memory, handler),
        code::SIGNAL_EVENT => signal_event(registers, memory, handler),
        code::RETARGET_INTERRUPT => retarget(registers, memory, handler),
        code::MMIO_READ | code::MMIO_WRITE => match mmio {
            Some(mmio) => {
                handler.mmio_accessed();
                access_mmio(registers, memory, mmio)
                    .err()
                    .unwrap_or(status::SUCCESS)
            }
            None => status::INVALID_HYPERCALL_CODE,
        },
        _ => status::INVALID_HYPERCALL_CODE,
    };
    if registers.control().code() == code::RETARGET_INTERRUPT && result != status::SUCCESS {
        handler.retarget_refused(result);
    }
    result.into()
}

/// Copies `len` bytes of input, once.
fn read_input(registers: Registers, memory: &GuestMemoryMmap, buf: &mut [u8]) -> Result<(), u16> {
    if registers.input % 8 != 0 {
        return Err(status::INVALID_ALIGNMENT);
    }
    if registers.input % PAGE + buf.len() as u64 > PAGE {
        return Err(status::INVALID_HYPERCALL_INPUT);
    }
    memory
        .read_slice(buf, GuestAddress(registers.input))
        .map_err(|_| status::INVALID_HYPERCALL_INPUT)
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn post_message(registers: Registers, memory: &GuestMemoryMmap, handler: &dyn Hypercalls) -> u16 {
    if registers.control().is_fast() || registers.variable_header() != 0 {
        return status::INVALID_HYPERCALL_INPUT;
    }
    let mut input = [0; POST_MESSAGE_HEADER + MAX_MESSAGE_LEN];
    // The guest may give no more than what it fills, at the end of a page: header first.
    if let Err(error) = read_input(registers, memory, &mut input[..POST_MESSAGE_HEADER]) {
        return error;
    }
    let connection = le32(&input, 0);
    let message_type = le32(&input, 8);
    let size = le32(&input, 12) as usize;
    if size > MAX_MESSAGE_LEN {
        return status::INVALID_PARAMETER;
    }
    let payload = Registers {
        input: registers.input + POST_MESSAGE_HEADER as u64,
        ..registers
    };
    if size > 0 {
        if registers.input % PAGE + (POST_MESSAGE_HEADER + size) as u64 > PAGE {
            return status::INVALID_HYPERCALL_INPUT;
        }
        if let Err(status) = read_input(payload, memory, &mut input[POST_MESSAGE_HEADER..][..size])
        {
            return status;
        }
    }
    handler.post_message(
        connection,
        message_type,
        &input[POST_MESSAGE_HEADER..][..size],
    )
}

/// A rep call: the result says how many pages are done.
fn modify_visibility(registers: Registers, memory: &GuestMemoryMmap, isolation: &Isolation) -> u64 {
    let done = |status: u16, reps: u16| u64::from(status) | (u64::from(reps) << 32);
    let (start, count) = (registers.rep_start(), registers.rep_count());
    let mut input = vec![0; VISIBILITY_HEADER + 8 * usize::from(count)];
    if registers.control().is_fast() || registers.variable_header() != 0 || start >= count {
        return done(status::INVALID_HYPERCALL_INPUT, 0);
    }
    if let Err(error) = read_input(registers, memory, &mut input) {
        return done(error, 0);
    }
    let shared = match le32(&input, 8) {
        NOT_VISIBLE => false,
        VISIBLE_READ_WRITE => true,
        _ => return done(status::INVALID_PARAMETER, 0),
    };
    for rep in start..count {
        let at = VISIBILITY_HEADER + 8 * usize::from(rep);
        let pfn = u64::from(le32(&input, at)) | (u64::from(le32(&input, at + 4)) << 32);
        let address = pfn.checked_mul(PAGE).map(GuestAddress);
        if !address.is_some_and(|address| memory.address_in_range(address))
            || !isolation.set_shared(pfn, shared)
        {
            return done(status::INVALID_PARAMETER, rep);
        }
    }
    done(status::SUCCESS, count)
}

fn signal_event(registers: Registers, memory: &GuestMemoryMmap, handler: &dyn Hypercalls) -> u16 {
    if registers.variable_header() != 0 {
        return status::INVALID_HYPERCALL_INPUT;
    }
    let input = if registers.control().is_fast() {
        registers.input.to_le_bytes()
    } else {
        let mut input = [0; 8];
        if let Err(status) = read_input(registers, memory, &mut input) {
            return status;
        }
        input
    };
    let flag = u16::from_le_bytes([input[4], input[5]]);
    handler.signal_event(le32(&input, 0), flag)
}

fn access_mmio(registers: Registers, memory: &GuestMemoryMmap, mmio: &MmioBus) -> Result<(), u16> {
    let write = registers.control().code() == code::MMIO_WRITE;
    if registers.control().is_fast() || registers.variable_header() != 0 {
        return Err(status::INVALID_HYPERCALL_INPUT);
    }
    let mut input = [0; MMIO_HEADER + MMIO_DATA];
    let len = MMIO_HEADER + if write { MMIO_DATA } else { 0 };
    read_input(registers, memory, &mut input[..len])?;
    let address = u64::from(le32(&input, 0)) | (u64::from(le32(&input, 4)) << 32);
    let size = le32(&input, 8) as usize;
    // The kernel's own driver leaves in the reserved word what was there.
    if !matches!(size, 1 | 2 | 4 | 8) {
        return Err(status::INVALID_PARAMETER);
    }
    let data = &mut input[MMIO_HEADER..][..size];
    if write {
        mmio.write(address, data);
        return Ok(());
    }
    if registers.output % 8 != 0 {
        return Err(status::INVALID_ALIGNMENT);
    }
    mmio.read(address, data);
    memory
        .write_slice(data, GuestAddress(registers.output))
        .map_err(|_| status::INVALID_HYPERCALL_INPUT)
}

fn retarget(registers: Registers, memory: &GuestMemoryMmap, handler: &dyn Hypercalls) -> u16 {
    if registers.control().is_fast() {
        return status::INVALID_HYPERCALL_INPUT;
    }
    let mut input = vec![0; Retarget::FIXED + registers.variable_header()];
    match read_input(registers, memory, &mut input) {
        Ok(()) => handler.retarget_device_interrupt(&input),
        Err(error) => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Debug, PartialEq, Eq)]
    enum Call {
        Post(u32, u32, Vec<u8>),
        Signal(u32, u16),
        Retarget(Vec<u8>),
        Refused(u16),
        Mmio,
    }

    #[derive(Default)]
    struct Recorder(Mutex<Vec<Call>>);

    impl Recorder {
        fn record(&self, call: Call) -> u16 {
            self.0.lock().unwrap().push(call);
            0
        }
    }

    impl Hypercalls for Recorder {
        fn post_message(&self, connection: u32, message_type: u32, payload: &[u8]) -> u16 {
            self.record(Call::Post(connection, message_type, payload.to_vec()))
        }
        fn signal_event(&self, connection: u32, flag: u16) -> u16 {
            self.record(Call::Signal(connection, flag))
        }
        fn retarget_device_interrupt(&self, input: &[u8]) -> u16 {
            self.record(Call::Retarget(input.to_vec()))
        }
        fn mmio_accessed(&self) {
            self.record(Call::Mmio);
        }
        fn retarget_refused(&self, status: u16) {
            self.record(Call::Refused(status));
        }
    }

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap()
    }

    #[test]
    fn pages_are_shared_and_hidden() {
        let memory = memory();
        let isolation = Isolation::new(true);
        let change = |visibility: u32, pfns: &[u64], control: u64| {
            let mut input = u64::MAX.to_le_bytes().to_vec();
            input.extend(u64::from(visibility).to_le_bytes());
            input.extend(pfns.iter().flat_map(|pfn| pfn.to_le_bytes()));
            memory.write_slice(&input, GuestAddress(0x1000)).unwrap();
            let registers = Registers {
                control: 0xdb | control,
                input: 0x1000,
                output: 0,
            };
            dispatch(registers, &memory, &isolation, None, &Recorder::default())
        };
        let reps = |start: u64, count: u64| (start << 48) | (count << 32);
        assert_eq!(change(3, &[1, 2, 3], reps(0, 3)), 3 << 32);
        assert_eq!(change(0, &[1, 2, 3], reps(1, 3)), 3 << 32);
        // The guest does not have the page 4.
        assert_eq!(change(3, &[2, 4], reps(0, 2)), (1 << 32) | 5);
        assert_eq!(change(1, &[3], reps(0, 1)), 5);
        assert_eq!(change(3, &[3], reps(1, 1)), 3);
        assert_eq!(change(3, &[3], reps(0, 0)), 3);
        let shared: Vec<u64> = (0..5).filter(|&pfn| isolation.is_shared(pfn)).collect();
        assert_eq!(shared, [1, 2]);
        assert_eq!(run(0xdb | reps(0, 1), 0x1000, &memory).0, 2);
    }

    fn run(control: u64, input: u64, memory: &GuestMemoryMmap) -> (u64, Vec<Call>) {
        let handler = Recorder::default();
        let registers = Registers {
            control,
            input,
            output: 0,
        };
        let rax = dispatch(registers, memory, &Isolation::new(false), None, &handler);
        (rax, handler.0.into_inner().unwrap())
    }

    #[test]
    fn mmio_is_accessed_where_that_is_offered() {
        struct Register(Mutex<u32>);
        impl crate::mmio::MmioDevice for Register {
            fn read(&self, offset: u64, data: &mut [u8]) {
                let value = self.0.lock().unwrap().to_le_bytes();
                data.copy_from_slice(&value[offset as usize..][..data.len()]);
            }
            fn write(&self, _: u64, data: &[u8]) {
                *self.0.lock().unwrap() = u32::from_le_bytes(data.try_into().unwrap());
            }
        }
        let memory = memory();
        let mmio = MmioBus::new();
        mmio.insert(0xf000_0000, 4, Arc::new(Register(Mutex::new(0))))
            .unwrap();
        let access = |code: u16, address: u64, size: u32, data: u32, mmio: Option<&MmioBus>| {
            let mut input = address.to_le_bytes().to_vec();
            input.extend(size.to_le_bytes());
            input.extend([0; 4]);
            input.extend(data.to_le_bytes());
            memory.write_slice(&input, GuestAddress(0x1000)).unwrap();
            let registers = Registers {
                control: code.into(),
                input: 0x1000,
                output: 0x2000,
            };
            let handler = Recorder::default();
            let rax = dispatch(registers, &memory, &Isolation::new(false), mmio, &handler);
            let calls = handler.0.into_inner().unwrap();
            let read: u32 = memory.read_obj(GuestAddress(0x2000)).unwrap();
            (rax, read, calls)
        };
        let mmio = Some(&mmio);
        let called = || vec![Call::Mmio];
        let write = access(code::MMIO_WRITE, 0xf000_0000, 4, 0x1234_5678, mmio);
        assert_eq!((write.0, write.2), (0, called()));
        let read = access(code::MMIO_READ, 0xf000_0002, 2, 0, mmio);
        assert_eq!(read, (0, 0x1234, called()));
        // Nobody is there.
        let read = access(code::MMIO_READ, 0xe000_0000, 4, 0, mmio);
        assert_eq!(read, (0, u32::MAX, called()));
        for size in [0, 3, 16, u32::MAX] {
            let (rax, ..) = access(code::MMIO_READ, 0xf000_0000, size, 0, mmio);
            assert_eq!(rax, u64::from(status::INVALID_PARAMETER));
        }
        let (rax, _, calls) = access(code::MMIO_READ, 0xf000_0000, 4, 0, None);
        assert_eq!(rax, u64::from(status::INVALID_HYPERCALL_CODE));
        assert!(calls.is_empty());
    }

    fn message(size: u32) -> Vec<u8> {
        let mut input = Vec::new();
        for word in [4u32, 0, 1, size] {
            input.extend(word.to_le_bytes());
        }
        input.extend((0..240).map(|i| i as u8));
        input
    }

    #[test]
    fn post_message_sizes() {
        let memory = memory();
        for (size, status) in [(0, 0), (1, 0), (240, 0), (241, 5), (u32::MAX, 5)] {
            memory
                .write_slice(&message(size), GuestAddress(0x1000))
                .unwrap();
            let (rax, calls) = run(0x5c, 0x1000, &memory);
            assert_eq!(rax, status, "size {size}");
            if status == 0 {
                let payload = (0..size).map(|i| i as u8).collect();
                assert_eq!(calls, [Call::Post(4, 1, payload)]);
            } else {
                assert!(calls.is_empty());
            }
        }
    }

    #[test]
    fn post_message_at_a_page_end() {
        let memory = memory();
        // Header and sixteen bytes just fit.
        memory
            .write_slice(&message(16), GuestAddress(0x1fe0))
            .unwrap();
        assert_eq!(run(0x5c, 0x1fe0, &memory).0, 0);
        memory
            .write_slice(&message(17), GuestAddress(0x1fe0))
            .unwrap();
        assert_eq!(run(0x5c, 0x1fe0, &memory).0, 3);
    }

    #[test]
    fn input_address() {
        let memory = memory();
        assert_eq!(run(0x5c, 0x1001, &memory).0, 4);
        assert_eq!(run(0x5c, 0x1ff8, &memory).0, 3);
        assert_eq!(run(0x5c, 0x4000, &memory).0, 3);
        assert_eq!(run(0x5c, 0xffff_ffff_ffff_fff8, &memory).0, 3);
    }

    #[test]
    fn signal_event_both_ways() {
        let memory = memory();
        let fast = 1 << 16;
        let (rax, calls) = run(0x5d | fast, 0x7_0001_0013, &memory);
        assert_eq!((rax, calls), (0, vec![Call::Signal(0x1_0013, 7)]));
        memory
            .write_obj(0x0005_0000_0009u64, GuestAddress(0x2000))
            .unwrap();
        let (rax, calls) = run(0x5d, 0x2000, &memory);
        assert_eq!((rax, calls), (0, vec![Call::Signal(9, 5)]));
    }

    #[test]
    fn retarget_variable_header() {
        let memory = memory();
        for words in [0u64, 1, 2, 64] {
            let (rax, calls) = run(0x7e | (words << 17), 0x1000, &memory);
            assert_eq!(rax, 0);
            assert_eq!(
                calls,
                [Call::Retarget(vec![
                    0;
                    Retarget::FIXED + words as usize * 8
                ])]
            );
        }
        // The longest header the field can express does not fit into a page.
        let refused = (3, vec![Call::Refused(3)]);
        assert_eq!(run(0x7e | (0x3ff << 17), 0x1000, &memory), refused);
        // Neither a fast call nor a rep call.
        assert_eq!(run(0x7e | (1 << 16), 0x1000, &memory), refused);
        assert_eq!(run(0x7e | (1 << 32), 0x1000, &memory), refused);
    }

    #[test]
    fn unknown_code_and_flags() {
        let memory = memory();
        assert_eq!(run(0x13, 0x1000, &memory).0, 2);
        assert_eq!(run(0x8001, 0x1000, &memory).0, 2);
        assert_eq!(run(0x5c | (1 << 16), 0x1000, &memory).0, 3);
        assert_eq!(run(0x5c | (1 << 32), 0x1000, &memory).0, 3);
    }
}
