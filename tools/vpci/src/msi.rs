// SPDX-License-Identifier: GPL-2.0

//! The MSI and MSI-X state of a function.

use std::sync::{Arc, Mutex, MutexGuard};

use crate::{
    function::MsixLayout,
    interrupts::InterruptTable, //
};

/// Bytes of an MSI-X table entry.
const ENTRY: usize = 16;
/// Offset of the vector control word in an entry.
const VECTOR_CONTROL: usize = 12;

#[derive(Clone, Copy, Default)]
struct Msi {
    enabled: bool,
    /// log2 of the number of vectors enabled.
    log2: u8,
    address: u64,
    data: u16,
}

struct State {
    msix_enabled: bool,
    msix_masked: bool,
    table: Vec<u8>,
    pending: Vec<u8>,
    msi: Msi,
}

impl State {
    fn word(&self, vector: usize, offset: usize) -> u32 {
        let at = vector * ENTRY + offset;
        let mut word = [0; 4];
        word.copy_from_slice(&self.table[at..at + 4]);
        u32::from_le_bytes(word)
    }

    fn masked(&self, vector: usize) -> bool {
        self.msix_masked || self.word(vector, VECTOR_CONTROL) & 1 != 0
    }

    fn message(&self, vector: usize) -> (u64, u32) {
        let address = u64::from(self.word(vector, 0)) | (u64::from(self.word(vector, 4)) << 32);
        (address, self.word(vector, 8))
    }

    fn set_pending(&mut self, vector: usize, pending: bool) {
        let bit = 1 << (vector % 8);
        if pending {
            self.pending[vector / 8] |= bit;
        } else {
            self.pending[vector / 8] &= !bit;
        }
    }

    /// Takes the messages that were held back and no longer are.
    fn take_unmasked(&mut self) -> Vec<(u64, u32)> {
        if !self.msix_enabled || self.pending.iter().all(|b| *b == 0) {
            return Vec::new();
        }
        let mut messages = Vec::new();
        for vector in 0..self.table.len() / ENTRY {
            let pending = self.pending[vector / 8] & (1 << (vector % 8)) != 0;
            if pending && !self.masked(vector) {
                self.set_pending(vector, false);
                messages.push(self.message(vector));
            }
        }
        messages
    }
}

/// MSI and MSI-X of one function.
pub struct MessageSignals {
    layout: Option<MsixLayout>,
    state: Mutex<State>,
    interrupts: Arc<InterruptTable>,
}

impl MessageSignals {
    /// All off, all masked.
    pub fn new(layout: Option<MsixLayout>, interrupts: Arc<InterruptTable>) -> Self {
        let vectors = layout.map_or(0, |l| usize::from(l.vectors));
        let signals = Self {
            layout,
            state: Mutex::new(State {
                msix_enabled: false,
                msix_masked: false,
                table: vec![0; vectors * ENTRY],
                pending: vec![0; vectors.div_ceil(64) * 8],
                msi: Msi::default(),
            }),
            interrupts,
        };
        signals.reset();
        signals
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Function-level reset.
    pub fn reset(&self) {
        let mut state = self.state();
        state.msix_enabled = false;
        state.msix_masked = false;
        state.msi = Msi::default();
        state.pending.fill(0);
        state.table.fill(0);
        for entry in state.table.chunks_exact_mut(ENTRY) {
            entry[VECTOR_CONTROL] = 1;
        }
    }

    /// The guest has written the MSI-X control word.
    pub fn set_msix(&self, enabled: bool, masked: bool) {
        let mut state = self.state();
        state.msix_enabled = enabled;
        state.msix_masked = masked;
        let messages = state.take_unmasked();
        drop(state);
        self.raise_all(messages);
    }

    /// The guest has written the MSI registers.
    pub fn set_msi(&self, enabled: bool, log2: u8, address: u64, data: u16) {
        self.state().msi = Msi {
            enabled,
            log2,
            address,
            data,
        };
    }

    fn raise_all(&self, messages: Vec<(u64, u32)>) {
        for (address, data) in messages {
            self.interrupts.raise(address, data);
        }
    }

    /// Which of the table and the pending bits an access hits, and where.
    fn locate(&self, bar: usize, offset: u64, len: usize) -> Option<(bool, usize)> {
        let layout = self.layout.filter(|l| usize::from(l.bar) == bar)?;
        let within = |start: u32, size: usize| {
            let at = offset.checked_sub(start.into())? as usize;
            (at.checked_add(len)? <= size).then_some(at)
        };
        let vectors = usize::from(layout.vectors);
        if let Some(at) = within(layout.table, vectors * ENTRY) {
            return Some((true, at));
        }
        within(layout.pending, vectors.div_ceil(64) * 8).map(|at| (false, at))
    }

    /// The guest reads a BAR. Says whether it was the table or the pending bits.
    pub fn read(&self, bar: usize, offset: u64, data: &mut [u8]) -> bool {
        let Some((table, at)) = self.locate(bar, offset, data.len()) else {
            return false;
        };
        let state = self.state();
        let source = if table { &state.table } else { &state.pending };
        data.copy_from_slice(&source[at..at + data.len()]);
        true
    }

    /// The guest writes a BAR. Says whether it was the table or the pending bits.
    pub fn write(&self, bar: usize, offset: u64, data: &[u8]) -> bool {
        let Some((table, at)) = self.locate(bar, offset, data.len()) else {
            return false;
        };
        if table {
            let mut state = self.state();
            state.table[at..at + data.len()].copy_from_slice(data);
            let messages = state.take_unmasked();
            drop(state);
            self.raise_all(messages);
        }
        true
    }

    fn fire(&self, vector: u16) {
        let mut state = self.state();
        let message = if state.msix_enabled {
            let vector = usize::from(vector);
            if vector >= state.table.len() / ENTRY {
                return;
            }
            if state.masked(vector) {
                state.set_pending(vector, true);
                return;
            }
            state.message(vector)
        } else if state.msi.enabled {
            // Vectors beyond those enabled share the last.
            let last = (1_u16 << state.msi.log2) - 1;
            let data = state.msi.data & !last | vector.min(last);
            (state.msi.address, data.into())
        } else {
            return;
        };
        drop(state);
        self.interrupts.raise(message.0, message.1);
    }
}

/// Through this a device model interrupts the guest.
#[derive(Clone)]
pub struct InterruptSender(Arc<MessageSignals>);

impl InterruptSender {
    pub(crate) fn new(signals: Arc<MessageSignals>) -> Self {
        Self(signals)
    }

    /// Sends the message of `vector`. Does nothing if the guest has not enabled messages.
    pub fn fire(&self, vector: u16) {
        self.0.fire(vector);
    }
}
