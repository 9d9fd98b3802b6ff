// SPDX-License-Identifier: GPL-2.0

//! The interrupt remapping table of a bus.
//!
//! The guest asks for an interrupt and gets an address and data to program into its device. They do
//! not encode the target, as they would on bare metal, but name an entry here; so the target can move
//! (by the retarget hypercall) without touching the device.

use std::sync::{Arc, Mutex, MutexGuard};

use hyperv_wire::vpci::{InterruptRequest, SlotNumber, TranslatedInterrupt};
use vmbus_host::{Counter, Counters};

/// Raises a message-signalled interrupt of the machine: address and data as the local APIC has them.
pub type SignalMsi = Arc<dyn Fn(u64, u32) + Send + Sync>;

/// Address of all remapped interrupts. Bit 4 says "remappable" on Intel hardware too.
const ADDRESS: u64 = 0xfee0_0010;
/// Entries of the table. The index must fit into the 16 data bits of MSI.
const ENTRIES: usize = 4096;
/// Largest block of an MSI function.
const BLOCK_MAX: u16 = 32;
/// Vectors below belong to exceptions.
const FIRST_VECTOR: u32 = 0x10;
/// Only the low byte of a vector reaches an x86 processor.
const LAST_VECTOR: u32 = 0xff;

/// Why an interrupt could not be made or moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// Not a power of two from 1 to 32.
    VectorCount(u16),
    /// Not a vector of an x86 processor.
    Vector(u32),
    /// No processor given, or none that exists.
    NoProcessor,
    /// The table is full.
    Full,
    /// No such interrupt.
    Unknown,
}

#[derive(Clone, Copy, Debug)]
struct Target {
    vp: u32,
    vector: u32,
    delivery_mode: u8,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    slot: u32,
    /// First entry of its block.
    base: u16,
    /// Number of entries in its block.
    count: u16,
    target: Target,
}

/// What has happened in the table.
#[derive(Clone, Debug, Default)]
pub struct InterruptCounters {
    /// Interrupts that exist now.
    pub live: Counter,
    /// Interrupts made.
    pub created: Counter,
    /// Interrupts the guest gave back.
    pub deleted: Counter,
    /// Interrupts taken back because the guest had not given them back when it left the bus.
    pub reclaimed: Counter,
    /// Moves by hypercall.
    pub retargeted: Counter,
    /// Interrupts raised.
    pub raised: Counter,
    /// Messages of a device which named no interrupt.
    pub stray: Counter,
}

impl InterruptCounters {
    /// The counters `NAME.interrupts.*`.
    pub fn new(counters: &Counters, name: &str) -> Self {
        let counter = |what| counters.counter(&format!("{name}.interrupts.{what}"));
        Self {
            live: counter("live"),
            created: counter("created"),
            deleted: counter("deleted"),
            reclaimed: counter("reclaimed"),
            retargeted: counter("retargeted"),
            raised: counter("raised"),
            stray: counter("stray"),
        }
    }
}

struct Entries {
    all: Vec<Option<Entry>>,
    /// Where to look for free ones: a message that was given back is not soon another's.
    next: usize,
}

/// The table.
pub struct InterruptTable {
    entries: Mutex<Entries>,
    signal: SignalMsi,
    processors: u32,
    counters: InterruptCounters,
}

impl InterruptTable {
    /// An empty table for a machine with `processors` virtual processors.
    pub fn new(processors: u32, signal: SignalMsi, counters: InterruptCounters) -> Self {
        Self {
            entries: Mutex::new(Entries {
                all: vec![None; ENTRIES],
                next: 0,
            }),
            signal,
            processors,
            counters,
        }
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Makes the interrupt that the function in `slot` asked for.
    pub fn create(
        &self,
        slot: u32,
        request: &InterruptRequest,
    ) -> Result<TranslatedInterrupt, Error> {
        let count = request.vector_count;
        if !count.is_power_of_two() || count > BLOCK_MAX {
            return Err(Error::VectorCount(count));
        }
        let last = request.vector.saturating_add(u32::from(count) - 1);
        if request.vector < FIRST_VECTOR || last > LAST_VECTOR {
            return Err(Error::Vector(request.vector));
        }
        let vp = request
            .processors
            .first()
            .filter(|vp| *vp < self.processors)
            .ok_or(Error::NoProcessor)?;
        let mut entries = self.entries();
        let size = usize::from(count);
        // Multi-message MSI changes the low bits of the data, so blocks are aligned.
        let first = entries.next.next_multiple_of(size);
        let base = (0..ENTRIES)
            .step_by(size)
            .map(|offset| (first + offset) % ENTRIES)
            .find(|&base| entries.all[base..][..size].iter().all(Option::is_none))
            .ok_or(Error::Full)?;
        entries.next = base + size;
        for n in 0..count {
            entries.all[base + usize::from(n)] = Some(Entry {
                slot,
                base: base as u16,
                count,
                target: Target {
                    vp,
                    vector: request.vector + u32::from(n),
                    delivery_mode: request.delivery_mode,
                },
            });
        }
        self.counters.created.inc();
        self.counters.live.inc();
        Ok(TranslatedInterrupt::new(count, ADDRESS, base as u32))
    }

    /// The guest gives an interrupt of `slot` back.
    pub fn delete(&self, slot: u32, interrupt: &TranslatedInterrupt) -> Result<(), Error> {
        let mut entries = self.entries();
        let base = interrupt.data() as usize;
        let entry = match entries.all.get(base) {
            Some(Some(e)) if interrupt.address() == ADDRESS => *e,
            _ => return Err(Error::Unknown),
        };
        if entry.slot != slot
            || usize::from(entry.base) != base
            || entry.count != interrupt.vector_count()
        {
            return Err(Error::Unknown);
        }
        entries.all[base..base + usize::from(entry.count)].fill(None);
        self.counters.deleted.inc();
        self.counters.live.sub(1);
        Ok(())
    }

    /// Takes back what the functions that `keep` does not name still have, and says how many
    /// interrupts that were. With `lost` they count as reclaimed: the guest should have given them
    /// back.
    pub fn release(&self, lost: bool, mut keep: impl FnMut(u32) -> bool) -> u64 {
        let mut blocks = 0;
        for (n, entry) in self.entries().all.iter_mut().enumerate() {
            if let Some(e) = entry {
                if !keep(e.slot) {
                    blocks += u64::from(usize::from(e.base) == n);
                    *entry = None;
                }
            }
        }
        let counters = &self.counters;
        let counter = if lost {
            &counters.reclaimed
        } else {
            &counters.deleted
        };
        counter.add(blocks);
        counters.live.sub(blocks);
        blocks
    }

    /// Sends the interrupt with this address (low half) and data to another processor and vector. `function` is the function
    /// number of the slot whose it is.
    pub fn retarget(
        &self,
        function: u8,
        address: u32,
        data: u32,
        vp: u32,
        vector: u32,
    ) -> Result<(), Error> {
        if !(FIRST_VECTOR..=LAST_VECTOR).contains(&vector) {
            return Err(Error::Vector(vector));
        }
        if vp >= self.processors {
            return Err(Error::NoProcessor);
        }
        let mut entries = self.entries();
        match entries.all.get_mut(data as usize) {
            Some(Some(entry))
                if u64::from(address) == ADDRESS
                    && SlotNumber::from_raw(entry.slot).function() == function =>
            {
                entry.target.vp = vp;
                entry.target.vector = vector;
            }
            _ => return Err(Error::Unknown),
        }
        self.counters.retargeted.inc();
        Ok(())
    }

    /// A device writes `data` to `address`.
    pub fn raise(&self, address: u64, data: u32) {
        let target = match self.entries().all.get(data as usize) {
            Some(Some(entry)) if address == ADDRESS => entry.target,
            _ => {
                self.counters.stray.inc();
                return;
            }
        };
        self.counters.raised.inc();
        // Physical destination, edge; the local APIC ids are the processor indexes.
        (self.signal)(
            0xfee0_0000 | (u64::from(target.vp) << 12),
            target.vector | (u32::from(target.delivery_mode & 7) << 8),
        );
    }

    #[cfg(test)]
    fn counters(&self) -> &InterruptCounters {
        &self.counters
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyperv_wire::vpci::Processors;

    type Raised = Arc<Mutex<Vec<(u64, u32)>>>;

    fn table() -> (InterruptTable, Raised) {
        let raised = Arc::new(Mutex::new(Vec::new()));
        let sink = raised.clone();
        let signal: SignalMsi = Arc::new(move |a, d| sink.lock().unwrap().push((a, d)));
        (
            InterruptTable::new(2, signal, InterruptCounters::default()),
            raised,
        )
    }

    fn request(vector: u32, vector_count: u16, mask: u64) -> InterruptRequest {
        InterruptRequest {
            vector,
            delivery_mode: 0,
            vector_count,
            processors: Processors::Mask(mask),
        }
    }

    #[test]
    fn an_interrupt_reaches_its_target_and_moves() {
        let (table, raised) = table();
        let i = table.create(0, &request(0x31, 1, !0)).unwrap();
        table.raise(i.address(), i.data());
        table
            .retarget(0, i.address() as u32, i.data(), 1, 0x52)
            .unwrap();
        table.raise(i.address(), i.data());
        assert_eq!(
            *raised.lock().unwrap(),
            [(0xfee0_0000, 0x31), (0xfee0_1000, 0x52)]
        );
        table.delete(0, &i).unwrap();
        table.raise(i.address(), i.data());
        assert_eq!(table.delete(0, &i), Err(Error::Unknown));
        let counters = table.counters();
        assert_eq!(
            (
                counters.live.get(),
                counters.raised.get(),
                counters.stray.get()
            ),
            (0, 2, 1)
        );
    }

    #[test]
    fn blocks_are_aligned_and_move_one_by_one() {
        let (table, raised) = table();
        let single = table.create(0, &request(0x31, 1, 1)).unwrap();
        let block = table.create(8, &request(32, 32, 1)).unwrap();
        assert_eq!(block.data() % 32, 0);
        assert_ne!(block.data(), single.data());
        table
            .retarget(0, block.address() as u32, block.data() + 31, 1, 0x99)
            .unwrap();
        table.raise(block.address(), block.data() + 31);
        table.raise(block.address(), block.data() + 30);
        assert_eq!(
            *raised.lock().unwrap(),
            [(0xfee0_1000, 0x99), (0xfee0_0000, 62)]
        );
        assert_eq!(table.counters().live.get(), 2);
        // A part of a block, or another function's, cannot be given back.
        let part = TranslatedInterrupt::new(1, block.address(), block.data() + 1);
        assert_eq!(table.delete(8, &part), Err(Error::Unknown));
        assert_eq!(table.delete(0, &block), Err(Error::Unknown));
        assert_eq!(table.release(true, |slot| slot == 0), 1);
        let counters = table.counters();
        assert_eq!((counters.live.get(), counters.reclaimed.get()), (1, 1));
    }

    #[test]
    fn limits() {
        let (table, _) = table();
        for (request, error) in [
            (request(0x31, 0, 1), Error::VectorCount(0)),
            (request(0x31, 3, 1), Error::VectorCount(3)),
            (request(0x31, 64, 1), Error::VectorCount(64)),
            (request(0xf, 1, 1), Error::Vector(0xf)),
            (request(0x100, 1, 1), Error::Vector(0x100)),
            (request(0xff, 2, 1), Error::Vector(0xff)),
            (request(u32::MAX, 2, 1), Error::Vector(u32::MAX)),
            (request(0x31, 1, 0), Error::NoProcessor),
            (request(0x31, 1, 4), Error::NoProcessor),
        ] {
            assert_eq!(table.create(0, &request), Err(error));
        }
        for _ in 0..ENTRIES / 32 {
            table.create(0, &request(32, 32, 1)).unwrap();
        }
        assert_eq!(table.create(0, &request(32, 1, 1)), Err(Error::Full));
        let address = ADDRESS as u32;
        assert_eq!(
            table.retarget(0, address, 0, 2, 0x31),
            Err(Error::NoProcessor)
        );
        assert_eq!(
            table.retarget(0, address, 0, 0, 0x100),
            Err(Error::Vector(0x100))
        );
        assert_eq!(
            table.retarget(0, address, ENTRIES as u32, 0, 0x31),
            Err(Error::Unknown)
        );
        assert_eq!(table.retarget(1, address, 0, 0, 0x31), Err(Error::Unknown));
        assert_eq!(
            table.retarget(0, 0xfee0_0000, 0, 0, 0x31),
            Err(Error::Unknown)
        );
    }
}
