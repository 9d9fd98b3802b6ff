// SPDX-License-Identifier: GPL-2.0
//! Hypercalls: the calling convention and the three calls the VMBus and the virtual PCI bus need.
//!
//! KVM would answer them itself, and most of them wrongly for us, if it knew that the guest has enabled
//! hypercalls. So the two MSRs that enable them come to us (MSR filter), and the hypercall page holds an
//! `out` to a port of ours: each hypercall is one port exit with its parameters in the registers.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::layout::HYPERCALL_PORT;

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
}

/// What the hypercall page begins with: `endbr64; out imm8, al; ret`.
pub const PAGE_BODY: [u8; 7] = [0xf3, 0x0f, 0x1e, 0xfa, 0xe6, HYPERCALL_PORT, 0xc3];

const HVCALL_POST_MESSAGE: u16 = 0x5c;
const HVCALL_SIGNAL_EVENT: u16 = 0x5d;
const HVCALL_RETARGET_INTERRUPT: u16 = 0x7e;

const STATUS_INVALID_CODE: u16 = 2;
const STATUS_INVALID_INPUT: u16 = 3;
const STATUS_INVALID_ALIGNMENT: u16 = 4;
const STATUS_INVALID_PARAMETER: u16 = 5;

/// Payload bytes a message can carry.
const MESSAGE_PAYLOAD: usize = 240;
/// `HvPostMessage` input before the payload: connection, reserved, type, size.
const POST_MESSAGE_HEADER: usize = 16;
/// `HvRetargetDeviceInterrupt` input up to where its variable header begins.
const RETARGET_FIXED: usize = 56;
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
    fn code(self) -> u16 {
        self.control as u16
    }

    fn fast(self) -> bool {
        self.control & (1 << 16) != 0
    }

    /// Bytes of variable header.
    fn variable_header(self) -> usize {
        ((self.control >> 17) & 0x3ff) as usize * 8
    }

    fn rep_count(self) -> u16 {
        ((self.control >> 32) & 0xfff) as u16
    }
}

/// Runs one hypercall and gives what goes back in RAX.
pub fn dispatch(registers: Registers, memory: &GuestMemoryMmap, handler: &dyn Hypercalls) -> u64 {
    let status = match registers.code() {
        // None of the three is a rep call.
        HVCALL_POST_MESSAGE | HVCALL_SIGNAL_EVENT | HVCALL_RETARGET_INTERRUPT
            if registers.rep_count() != 0 =>
        {
            STATUS_INVALID_INPUT
        }
        HVCALL_POST_MESSAGE => post_message(registers, memory, handler),
        HVCALL_SIGNAL_EVENT => signal_event(registers, memory, handler),
        HVCALL_RETARGET_INTERRUPT => retarget(registers, memory, handler),
        _ => STATUS_INVALID_CODE,
    };
    status.into()
}

/// Copies `len` bytes of input, once.
fn read_input(registers: Registers, memory: &GuestMemoryMmap, buf: &mut [u8]) -> Result<(), u16> {
    if registers.input % 8 != 0 {
        return Err(STATUS_INVALID_ALIGNMENT);
    }
    if registers.input % PAGE + buf.len() as u64 > PAGE {
        return Err(STATUS_INVALID_INPUT);
    }
    memory
        .read_slice(buf, GuestAddress(registers.input))
        .map_err(|_| STATUS_INVALID_INPUT)
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn post_message(registers: Registers, memory: &GuestMemoryMmap, handler: &dyn Hypercalls) -> u16 {
    if registers.fast() || registers.variable_header() != 0 {
        return STATUS_INVALID_INPUT;
    }
    let mut input = [0; POST_MESSAGE_HEADER + MESSAGE_PAYLOAD];
    // The guest may give no more than what it fills, at the end of a page: header first.
    if let Err(status) = read_input(registers, memory, &mut input[..POST_MESSAGE_HEADER]) {
        return status;
    }
    let connection = le32(&input, 0);
    let message_type = le32(&input, 8);
    let size = le32(&input, 12) as usize;
    if size > MESSAGE_PAYLOAD {
        return STATUS_INVALID_PARAMETER;
    }
    let payload = Registers {
        input: registers.input + POST_MESSAGE_HEADER as u64,
        ..registers
    };
    if size > 0 {
        if registers.input % PAGE + (POST_MESSAGE_HEADER + size) as u64 > PAGE {
            return STATUS_INVALID_INPUT;
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

fn signal_event(registers: Registers, memory: &GuestMemoryMmap, handler: &dyn Hypercalls) -> u16 {
    if registers.variable_header() != 0 {
        return STATUS_INVALID_INPUT;
    }
    let input = if registers.fast() {
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

fn retarget(registers: Registers, memory: &GuestMemoryMmap, handler: &dyn Hypercalls) -> u16 {
    if registers.fast() {
        return STATUS_INVALID_INPUT;
    }
    let mut input = vec![0; RETARGET_FIXED + registers.variable_header()];
    match read_input(registers, memory, &mut input) {
        Ok(()) => handler.retarget_device_interrupt(&input),
        Err(status) => status,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Debug, PartialEq, Eq)]
    enum Call {
        Post(u32, u32, Vec<u8>),
        Signal(u32, u16),
        Retarget(Vec<u8>),
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
    }

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap()
    }

    fn run(control: u64, input: u64, memory: &GuestMemoryMmap) -> (u64, Vec<Call>) {
        let handler = Recorder::default();
        let registers = Registers {
            control,
            input,
            output: 0,
        };
        let rax = dispatch(registers, memory, &handler);
        (rax, handler.0.into_inner().unwrap())
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
                [Call::Retarget(vec![0; RETARGET_FIXED + words as usize * 8])]
            );
        }
        // The longest header the field can express does not fit into a page.
        assert_eq!(run(0x7e | (0x3ff << 17), 0x1000, &memory).0, 3);
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
