// SPDX-License-Identifier: GPL-2.0
//! The part of QEMU's plugin interface that is used here, version 4 (QEMU 9.2 and 10.0).
#![allow(unsafe_code)]

use std::ffi::{c_int, c_uint, c_void};

/// The interface's version that this plugin speaks.
pub const VERSION: c_int = 4;

/// A plugin, for QEMU.
pub type Id = u64;

/// A block of instructions while it is translated.
#[repr(C)]
pub struct Block {
    _opaque: [u8; 0],
}

/// An instruction of a block.
#[repr(C)]
pub struct Insn {
    _opaque: [u8; 0],
}

/// An array with one element for each processor.
#[repr(C)]
pub struct Scoreboard {
    _opaque: [u8; 0],
}

/// A number within each element of a scoreboard.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Entry {
    /// The scoreboard.
    pub score: *mut Scoreboard,
    /// Where in the element, in bytes.
    pub offset: usize,
}

/// Adds a number to an entry.
pub const ADD: c_int = 0;
/// Sets an entry.
pub const STORE: c_int = 1;
/// A callback that does not ask for registers.
pub const NO_REGS: c_int = 0;

/// Called for each block that is translated.
pub type BlockCallback = extern "C" fn(Id, *mut Block);
/// Called for a processor.
pub type CpuCallback = extern "C" fn(Id, c_uint);
/// Called when an instruction is executed.
pub type InsnCallback = extern "C" fn(c_uint, *mut c_void);

extern "C" {
    pub fn qemu_plugin_register_vcpu_init_cb(id: Id, callback: CpuCallback);
    pub fn qemu_plugin_register_vcpu_tb_trans_cb(id: Id, callback: BlockCallback);
    pub fn qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(
        block: *mut Block,
        op: c_int,
        entry: Entry,
        value: u64,
    );
    pub fn qemu_plugin_register_vcpu_insn_exec_inline_per_vcpu(
        insn: *mut Insn,
        op: c_int,
        entry: Entry,
        value: u64,
    );
    pub fn qemu_plugin_register_vcpu_insn_exec_cb(
        insn: *mut Insn,
        callback: InsnCallback,
        flags: c_int,
        data: *mut c_void,
    );
    pub fn qemu_plugin_tb_n_insns(block: *const Block) -> usize;
    pub fn qemu_plugin_tb_vaddr(block: *const Block) -> u64;
    pub fn qemu_plugin_tb_get_insn(block: *const Block, index: usize) -> *mut Insn;
    pub fn qemu_plugin_insn_data(insn: *const Insn, to: *mut c_void, len: usize) -> usize;
    pub fn qemu_plugin_insn_vaddr(insn: *const Insn) -> u64;
    pub fn qemu_plugin_scoreboard_new(element_size: usize) -> *mut Scoreboard;
    pub fn qemu_plugin_scoreboard_find(score: *mut Scoreboard, cpu: c_uint) -> *mut c_void;
    pub fn qemu_plugin_num_vcpus() -> c_int;
}
