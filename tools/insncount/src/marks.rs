// SPDX-License-Identifier: GPL-2.0
//! The marks: instructions that do nothing, in a form that no compiler makes.
//!
//! Each is `nopl DISPLACEMENT(%rax)`, so its last four bytes tell which one it is.

/// What comes before the displacement.
#[allow(dead_code)]
pub const OPCODE: [u8; 3] = [0x0f, 0x1f, 0x80];

/// Counting starts.
pub const START: u32 = 0x4c41_4231;

/// Counting ends, and the report is written.
pub const STOP: u32 = 0x4c41_4232;
