// SPDX-License-Identifier: GPL-2.0
//! Hypercalls: the calling convention and the three calls the VMBus and the virtual PCI bus need.
//!
//! KVM would answer them itself, and most of them wrongly for us, if it knew that the guest has enabled
//! hypercalls. So the two MSRs that enable them come to us (MSR filter), and the hypercall page holds an
//! `out` to a port of ours: each hypercall is one port exit with its parameters in the registers.

use hyperv_wire::hypercall::{code, status, Control, Retarget};
use hyperv_wire::vmbus::MAX_MESSAGE_LEN;
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

/// `HvPostMessage` input before the payload: connection, reserved, type, size.
const POST_MESSAGE_HEADER: usize = 16;
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
}

/// Runs one hypercall and gives what goes back in RAX.
pub fn dispatch(registers: Registers, memory: &GuestMemoryMmap, handler: &dyn Hypercalls) -> u64 {
    let result = match registers.control().code() {
        // None of the three is a rep call.
        code::POST_MESSAGE | code::SIGNAL_EVENT | code::RETARGET_INTERRUPT
            if registers.rep_count() != 0 =>
        {
            status::INVALID_HYPERCALL_INPUT
        }
        code::POST_MESSAGE => post_message(registers, memory, handler),
        code::SIGNAL_EVENT => signal_event(registers, memory, handler),
        code::RETARGET_INTERRUPT => retarget(registers, memory, handler),
        _ => status::INVALID_HYPERCALL_CODE,
    };
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
                [Call::Retarget(vec![
                    0;
                    Retarget::FIXED + words as usize * 8
                ])]
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
