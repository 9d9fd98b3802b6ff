// SPDX-License-Identifier: GPL-2.0

//! Physical region pages: where the data of a command is in guest memory.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::wire::{Status, PAGE};

/// Bytes of an entry of a list.
const ENTRY: usize = 8;

/// A piece of guest memory: address and length.
type Piece = (u64, usize);

/// The pieces that the data of a command consists of, and the memory they are in.
#[derive(Debug)]
pub struct Pieces<'a> {
    memory: &'a GuestMemoryMmap,
    pieces: Vec<Piece>,
}

/// The page at `address`, which must be the beginning of one.
fn page(address: u64) -> Result<u64, Status> {
    if address % PAGE == 0 {
        Ok(address)
    } else {
        Err(Status::INVALID_PRP_OFFSET)
    }
}

impl<'a> Pieces<'a> {
    /// The pieces that two PRP entries and the lists behind them name. The caller has limited the
    /// length.
    pub fn new(memory: &'a GuestMemoryMmap, prps: [u64; 2], length: usize) -> Result<Self, Status> {
        let mut all = Self {
            memory,
            pieces: Vec::new(),
        };
        // Only the first piece may begin within a page.
        let [first, second] = prps;
        if first % 4 != 0 {
            return Err(Status::INVALID_PRP_OFFSET);
        }
        let in_page = (PAGE - first % PAGE) as usize;
        all.pieces.push((first, length.min(in_page)));
        let rest = length.saturating_sub(in_page);
        if rest > PAGE as usize {
            all.add_lists(second, rest)?;
        } else if rest > 0 {
            all.pieces.push((page(second)?, rest));
        }
        Ok(all)
    }

    fn add_lists(&mut self, mut list: u64, mut rest: usize) -> Result<(), Status> {
        let page_size = PAGE as usize;
        if list % ENTRY as u64 != 0 {
            return Err(Status::INVALID_PRP_OFFSET);
        }
        while rest > 0 {
            let room = (PAGE - list % PAGE) as usize / ENTRY;
            let wanted = rest.div_ceil(page_size);
            let mut bytes = vec![0; room.min(wanted) * ENTRY];
            self.memory
                .read_slice(&mut bytes, GuestAddress(list))
                .map_err(|_| Status::DATA_TRANSFER_ERROR)?;
            let mut entries = bytes.chunks_exact(ENTRY).map(|bytes| {
                let mut entry = [0; ENTRY];
                entry.copy_from_slice(bytes);
                u64::from_le_bytes(entry)
            });
            // The last entry of a list that does not suffice is the address of the next one. Only the
            // first list can begin elsewhere than at a page, so each of the others has data.
            let next = match wanted > room {
                true => Some(page(entries.next_back().unwrap_or_default())?),
                false => None,
            };
            for entry in entries {
                let now = rest.min(page_size);
                self.pieces.push((page(entry)?, now));
                rest -= now;
            }
            match next {
                Some(next) => list = next,
                None => break,
            }
        }
        Ok(())
    }

    /// Copies the data out of guest memory.
    pub fn gather(&self, to: &mut [u8]) -> Result<(), Status> {
        let mut at = 0;
        for &(address, length) in &self.pieces {
            self.memory
                .read_slice(&mut to[at..at + length], GuestAddress(address))
                .map_err(|_| Status::DATA_TRANSFER_ERROR)?;
            at += length;
        }
        Ok(())
    }

    /// Copies data to guest memory.
    pub fn scatter(&self, from: &[u8]) -> Result<(), Status> {
        let mut at = 0;
        for &(address, length) in &self.pieces {
            self.memory
                .write_slice(&from[at..at + length], GuestAddress(address))
                .map_err(|_| Status::DATA_TRANSFER_ERROR)?;
            at += length;
        }
        Ok(())
    }
}
