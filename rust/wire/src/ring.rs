// SPDX-License-Identifier: GPL-2.0

//! The VMBus ring buffer.
//!
//! A ring is one page of control words and a data area. The writer appends packets, each followed
//! by an 8-byte trailer, and then moves the write index; the reader moves the read index. One byte
//! more than the writer needs must be free, since equal indices mean an empty ring.
//!
//! [`Reader`] and [`Writer`] are the two ends, over any [`RingMemory`]. The other end is not
//! trusted: an index or a length from it is loaded once, checked, and then only the copy is used.
//! Each end keeps its own index in private memory and never reads it back.
//!
//! Signalling is left to the caller, who is told when it is due:
//! - the writer signals when it appends to an empty ring and the reader has not masked signals;
//! - the reader signals when it frees the space which the writer has said it is waiting for.

use core::fmt;

use zerocopy::IntoBytes;

use crate::vmbus::{
    PacketDescriptor,
    PacketType, //
};

/// Size of the page of control words.
pub const HEADER_LEN: u32 = 4096;

/// Bytes behind each packet.
pub const TRAILER_LEN: u32 = 8;

/// Size of a packet descriptor.
pub const DESCRIPTOR_LEN: u32 = size_of::<PacketDescriptor>() as u32;

/// Feature bit: the writer of the ring uses the pending send size.
pub const FEATURE_PENDING_SEND_SIZE: u32 = 1;

/// The control words of a ring; the value is the offset in the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ControlWord {
    /// Where the writer appends next.
    WriteIndex = 0,
    /// Where the reader reads next.
    ReadIndex = 4,
    /// Not zero: the reader needs no signal.
    InterruptMask = 8,
    /// Free bytes that the writer waits for; zero if it does not.
    PendingSendSize = 12,
    /// [`FEATURE_PENDING_SEND_SIZE`].
    FeatureBits = 64,
}

impl ControlWord {
    /// Offset in the control page.
    pub const fn offset(self) -> u32 {
        self as u32
    }
}

/// Memory of a ring that the other end can change at any time.
///
/// The algorithm asks for no byte outside of `0..data_len()`; a request never wraps.
pub trait RingMemory {
    /// Size of the data area.
    fn data_len(&self) -> u32;

    /// Loads a control word; no later access may be done before it (acquire).
    fn load(&self, word: ControlWord) -> u32;

    /// Stores a control word; no earlier access may be done after it (release).
    fn store(&self, word: ControlWord, value: u32);

    /// Full memory barrier.
    fn fence(&self);

    /// Copies bytes out of the data area.
    fn read(&self, offset: u32, to: &mut [u8]);

    /// Copies bytes into the data area.
    fn write(&self, offset: u32, from: &[u8]);
}

impl<M: RingMemory + ?Sized> RingMemory for &M {
    fn data_len(&self) -> u32 {
        (**self).data_len()
    }

    fn load(&self, word: ControlWord) -> u32 {
        (**self).load(word)
    }

    fn store(&self, word: ControlWord, value: u32) {
        (**self).store(word, value)
    }

    fn fence(&self) {
        (**self).fence()
    }

    fn read(&self, offset: u32, to: &mut [u8]) {
        (**self).read(offset, to)
    }

    fn write(&self, offset: u32, from: &[u8]) {
        (**self).write(offset, from)
    }
}

/// The other end broke the ring. Nothing that follows in it has a meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Corrupt {
    /// The data area is empty or no multiple of 8 bytes.
    DataLength(u32),
    /// The write index is outside of the ring or not aligned.
    WriteIndex(u32),
    /// The read index is outside of the ring or not aligned.
    ReadIndex(u32),
    /// There are bytes in the ring, but too few for a packet.
    ShortPacket(u32),
    /// A packet's length is less than its descriptor, or more than the ring holds.
    PacketLength {
        /// Bytes that the descriptor claims.
        claimed: u32,
        /// Bytes in the ring.
        available: u32,
    },
    /// A packet's payload begins inside its descriptor or behind its end.
    PayloadOffset {
        /// Offset that the descriptor claims.
        claimed: u32,
        /// Length of the packet.
        length: u32,
    },
}

impl fmt::Display for Corrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DataLength(length) => write!(f, "ring data length {length} is unusable"),
            Self::WriteIndex(index) => write!(f, "write index {index} is invalid"),
            Self::ReadIndex(index) => write!(f, "read index {index} is invalid"),
            Self::ShortPacket(length) => write!(f, "{length} bytes in the ring are no packet"),
            Self::PacketLength { claimed, available } => {
                write!(
                    f,
                    "packet claims {claimed} bytes, the ring holds {available}"
                )
            }
            Self::PayloadOffset { claimed, length } => {
                write!(f, "payload offset {claimed} in a packet of {length} bytes")
            }
        }
    }
}

/// Checks the length of a data area.
fn check_data_len(length: u32) -> Result<u32, Corrupt> {
    // Packets and trailers are multiples of 8 bytes; with this no trailer is ever split.
    if length == 0 || length % 8 != 0 {
        return Err(Corrupt::DataLength(length));
    }
    Ok(length)
}

/// Whether an index is one that a sound peer can have.
fn index_is_valid(index: u32, data_len: u32) -> bool {
    index < data_len && index % 8 == 0
}

/// Bytes between the read and the write index, both valid.
fn used(read: u32, write: u32, data_len: u32) -> u32 {
    if write >= read {
        write - read
    } else {
        data_len - read + write
    }
}

/// Moves a valid index on by at most the length of the ring.
fn moved(index: u32, by: u32, data_len: u32) -> u32 {
    let left = data_len - index;
    if by >= left {
        by - left
    } else {
        index + by
    }
}

/// Length of a packet of the ring, with its trailer, for a given length of payload and of extended
/// header (a multiple of 8). `None` if no descriptor can express it.
pub const fn packet_len(header: usize, payload: usize) -> Option<u32> {
    let Some(length) = header.checked_add(payload) else {
        return None;
    };
    let Some(length) = length.checked_add(DESCRIPTOR_LEN as usize + 7) else {
        return None;
    };
    let length8 = length / 8;
    if length8 > u16::MAX as usize || header % 8 != 0 {
        return None;
    }
    Some(length8 as u32 * 8 + TRAILER_LEN)
}

/// A packet that has been found in the ring: a checked copy of its descriptor and its place.
#[derive(Clone, Copy, Debug)]
pub struct Incoming {
    descriptor: PacketDescriptor,
    start: u32,
    length: u32,
    payload_offset: u32,
}

impl Incoming {
    /// What the packet is.
    pub fn packet_type(&self) -> PacketType {
        PacketType(self.descriptor.packet_type.get())
    }

    /// Flags of the descriptor.
    pub fn flags(&self) -> u16 {
        self.descriptor.flags.get()
    }

    /// Transaction id of the descriptor.
    pub fn transaction_id(&self) -> u64 {
        self.descriptor.transaction_id.get()
    }

    /// Bytes between descriptor and payload.
    pub fn header_len(&self) -> usize {
        (self.payload_offset - DESCRIPTOR_LEN) as usize
    }

    /// Bytes of payload, with the padding to a multiple of 8.
    pub fn payload_len(&self) -> usize {
        (self.length - self.payload_offset) as usize
    }
}

/// The reading end of a ring.
#[derive(Debug)]
pub struct Reader<M> {
    memory: M,
    data_len: u32,
    /// Where the next packet begins; may be ahead of what the writer has been told.
    next: u32,
    /// What the writer has been told.
    published: u32,
}

impl<M: RingMemory> Reader<M> {
    /// Takes over the reading end where its read index stands.
    pub fn new(memory: M) -> Result<Self, Corrupt> {
        let data_len = check_data_len(memory.data_len())?;
        let next = memory.load(ControlWord::ReadIndex);
        if !index_is_valid(next, data_len) {
            return Err(Corrupt::ReadIndex(next));
        }
        Ok(Self {
            memory,
            data_len,
            next,
            published: next,
        })
    }

    /// The memory of the ring.
    pub fn memory(&self) -> &M {
        &self.memory
    }

    /// Bytes that wait to be read.
    pub fn available(&self) -> Result<u32, Corrupt> {
        let write = self.memory.load(ControlWord::WriteIndex);
        if !index_is_valid(write, self.data_len) {
            return Err(Corrupt::WriteIndex(write));
        }
        Ok(used(self.next, write, self.data_len))
    }

    /// Finds the next packet. `None` if the ring is empty.
    pub fn peek(&self) -> Result<Option<Incoming>, Corrupt> {
        let available = self.available()?;
        if available == 0 {
            return Ok(None);
        }
        if available < DESCRIPTOR_LEN + TRAILER_LEN {
            return Err(Corrupt::ShortPacket(available));
        }

        let mut descriptor = PacketDescriptor::default();
        self.copy(self.next, descriptor.as_mut_bytes());

        // At most 512 KiB each: no overflow below.
        let length = u32::from(descriptor.len8.get()) * 8;
        let payload_offset = u32::from(descriptor.offset8.get()) * 8;
        if length < DESCRIPTOR_LEN || length + TRAILER_LEN > available {
            return Err(Corrupt::PacketLength {
                claimed: length,
                available,
            });
        }
        if payload_offset < DESCRIPTOR_LEN || payload_offset > length {
            return Err(Corrupt::PayloadOffset {
                claimed: payload_offset,
                length,
            });
        }
        Ok(Some(Incoming {
            descriptor,
            start: self.next,
            length,
            payload_offset,
        }))
    }

    /// Copies the bytes between descriptor and payload; as many as `to` takes and there are.
    /// Returns how many.
    pub fn read_header(&self, packet: &Incoming, to: &mut [u8]) -> usize {
        self.read_part(packet, DESCRIPTOR_LEN, packet.header_len(), to)
    }

    /// Copies payload; as many bytes as `to` takes and there are. Returns how many.
    pub fn read_payload(&self, packet: &Incoming, to: &mut [u8]) -> usize {
        self.read_part(packet, packet.payload_offset, packet.payload_len(), to)
    }

    /// Copies from a part of a packet.
    fn read_part(&self, packet: &Incoming, offset: u32, length: usize, to: &mut [u8]) -> usize {
        let length = length.min(to.len());
        let start = moved(packet.start, offset, self.data_len);
        self.copy(start, &mut to[..length]);
        length
    }

    /// Copies bytes that may wrap; not more than the ring holds.
    fn copy(&self, start: u32, to: &mut [u8]) {
        let left = (self.data_len - start) as usize;
        if to.len() <= left {
            self.memory.read(start, to);
        } else {
            let (head, tail) = to.split_at_mut(left);
            self.memory.read(start, head);
            self.memory.read(0, tail);
        }
    }

    /// Goes to the packet behind `packet`, which must be the one that [`Self::peek`] found last.
    pub fn advance(&mut self, packet: Incoming) {
        self.next = moved(packet.start, packet.length + TRAILER_LEN, self.data_len);
    }

    /// Gives the space of all packets passed so far back to the writer. Whether the writer wants to
    /// be signalled is the result.
    pub fn publish(&mut self) -> bool {
        if self.next == self.published {
            return false;
        }
        let freed = used(self.published, self.next, self.data_len);
        self.memory.store(ControlWord::ReadIndex, self.next);
        self.published = self.next;

        if self.memory.load(ControlWord::FeatureBits) & FEATURE_PENDING_SEND_SIZE == 0 {
            return false;
        }
        // The writer stores its pending size and then looks at the read index; here it is the
        // other way round. With both barriers one of the two sees the other.
        self.memory.fence();
        let pending = self.memory.load(ControlWord::PendingSendSize);
        if pending == 0 {
            return false;
        }
        let Ok(available) = self.available() else {
            // A broken index is reported by the next look into the ring.
            return false;
        };
        let free = self.data_len - available;
        // Only the step from too little space to enough is worth a signal.
        free > pending && free.saturating_sub(freed) <= pending
    }

    /// Tells the writer that signals are not needed until [`Self::unmask`].
    pub fn mask(&self) {
        self.memory.store(ControlWord::InterruptMask, 1);
    }

    /// Asks for signals again. If the result is not zero, packets have come meanwhile, which the
    /// writer may not signal any more.
    pub fn unmask(&self) -> Result<u32, Corrupt> {
        self.memory.store(ControlWord::InterruptMask, 0);
        self.memory.fence();
        self.available()
    }
}

/// A packet to be written.
#[derive(Clone, Copy, Debug)]
pub struct Outgoing<'a> {
    /// What the packet is.
    pub packet_type: PacketType,
    /// Flags of the descriptor.
    pub flags: u16,
    /// Transaction id of the descriptor.
    pub transaction_id: u64,
    /// What is between descriptor and payload, a multiple of 8 bytes.
    pub header: &'a [u8],
    /// The payload; padded to a multiple of 8 bytes.
    pub payload: &'a [u8],
}

/// Why a packet was not written. The ring is unchanged then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteError {
    /// There is no space now. [`Writer::wait_for_space`] has not been called.
    Full {
        /// What the packet needs, with its trailer.
        needed: u32,
    },
    /// The packet never fits into this ring, or no descriptor can express its length.
    TooLarge,
    /// The reader broke the ring.
    Corrupt(Corrupt),
}

impl From<Corrupt> for WriteError {
    fn from(corrupt: Corrupt) -> Self {
        Self::Corrupt(corrupt)
    }
}

impl fmt::Display for WriteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full { needed } => write!(f, "no room for {needed} bytes"),
            Self::TooLarge => f.write_str("packet is larger than the ring"),
            Self::Corrupt(corrupt) => corrupt.fmt(f),
        }
    }
}

/// The writing end of a ring.
#[derive(Debug)]
pub struct Writer<M> {
    memory: M,
    data_len: u32,
    next: u32,
}

impl<M: RingMemory> Writer<M> {
    /// Takes over the writing end where its write index stands.
    pub fn new(memory: M) -> Result<Self, Corrupt> {
        let data_len = check_data_len(memory.data_len())?;
        let next = memory.load(ControlWord::WriteIndex);
        if !index_is_valid(next, data_len) {
            return Err(Corrupt::WriteIndex(next));
        }
        Ok(Self {
            memory,
            data_len,
            next,
        })
    }

    /// The memory of the ring.
    pub fn memory(&self) -> &M {
        &self.memory
    }

    /// Tells the reader that this end uses the pending send size.
    pub fn announce_pending_send_size(&self) {
        let features = self.memory.load(ControlWord::FeatureBits);
        self.memory.store(
            ControlWord::FeatureBits,
            features | FEATURE_PENDING_SEND_SIZE,
        );
    }

    /// Free bytes; a packet must be smaller.
    pub fn free(&self) -> Result<u32, Corrupt> {
        let read = self.memory.load(ControlWord::ReadIndex);
        if !index_is_valid(read, self.data_len) {
            return Err(Corrupt::ReadIndex(read));
        }
        Ok(self.data_len - used(read, self.next, self.data_len))
    }

    /// Appends a packet. Whether the reader must be signalled is the result.
    pub fn write(&mut self, packet: &Outgoing<'_>) -> Result<bool, WriteError> {
        let needed = packet_len(packet.header.len(), packet.payload.len())
            .filter(|&needed| needed < self.data_len)
            .ok_or(WriteError::TooLarge)?;
        if self.free()? <= needed {
            return Err(WriteError::Full { needed });
        }

        // Both fit: packet_len() has checked the sum.
        let length8 = ((needed - TRAILER_LEN) / 8) as u16;
        let offset8 = ((DESCRIPTOR_LEN as usize + packet.header.len()) / 8) as u16;
        let descriptor = PacketDescriptor {
            packet_type: packet.packet_type.0.into(),
            offset8: offset8.into(),
            len8: length8.into(),
            flags: packet.flags.into(),
            transaction_id: packet.transaction_id.into(),
        };
        let start = self.next;
        let padding = packet.payload.len().next_multiple_of(8) - packet.payload.len();
        let trailer = u64::from(start) << 32;

        let mut at = start;
        for part in [
            descriptor.as_bytes(),
            packet.header,
            packet.payload,
            &[0; 8][..padding],
            &trailer.to_le_bytes(),
        ] {
            at = self.copy(at, part);
        }
        self.next = at;
        self.memory.store(ControlWord::WriteIndex, at);

        // The reader clears its mask and then looks at the write index; here it is the other way
        // round. With both barriers one of the two sees the other.
        self.memory.fence();
        if self.memory.load(ControlWord::InterruptMask) != 0 {
            return Ok(false);
        }
        Ok(self.memory.load(ControlWord::ReadIndex) == start)
    }

    /// Copies bytes that may wrap; returns where they end.
    fn copy(&self, start: u32, from: &[u8]) -> u32 {
        let left = (self.data_len - start) as usize;
        if from.len() <= left {
            self.memory.write(start, from);
        } else {
            let (head, tail) = from.split_at(left);
            self.memory.write(start, head);
            self.memory.write(0, tail);
        }
        moved(start, from.len() as u32, self.data_len)
    }

    /// Asks the reader for a signal once more than `needed` bytes are free. If the result is true,
    /// they are free already, and the signal may not come.
    pub fn wait_for_space(&self, needed: u32) -> Result<bool, Corrupt> {
        self.memory.store(ControlWord::PendingSendSize, needed);
        self.memory.fence();
        Ok(self.free()? > needed)
    }

    /// Takes the request of [`Self::wait_for_space`] back.
    pub fn stop_waiting(&self) {
        self.memory.store(ControlWord::PendingSendSize, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::cell::{
        Cell,
        RefCell, //
    };
    use std::{
        collections::VecDeque,
        vec,
        vec::Vec, //
    };

    /// A ring in ordinary memory, which a test can spoil.
    struct VecRing {
        words: [Cell<u32>; 17],
        data: RefCell<Vec<u8>>,
    }

    impl VecRing {
        fn new(length: usize) -> Self {
            Self {
                words: Default::default(),
                data: RefCell::new(vec![0xee; length]),
            }
        }

        /// An empty ring whose indices stand at `index`.
        fn at(length: usize, index: u32) -> Self {
            let ring = Self::new(length);
            ring.store(ControlWord::ReadIndex, index);
            ring.store(ControlWord::WriteIndex, index);
            ring
        }
    }

    impl RingMemory for VecRing {
        fn data_len(&self) -> u32 {
            self.data.borrow().len() as u32
        }

        fn load(&self, word: ControlWord) -> u32 {
            self.words[word.offset() as usize / 4].get()
        }

        fn store(&self, word: ControlWord, value: u32) {
            self.words[word.offset() as usize / 4].set(value);
        }

        fn fence(&self) {}

        fn read(&self, offset: u32, to: &mut [u8]) {
            to.copy_from_slice(&self.data.borrow()[offset as usize..][..to.len()]);
        }

        fn write(&self, offset: u32, from: &[u8]) {
            self.data.borrow_mut()[offset as usize..][..from.len()].copy_from_slice(from);
        }
    }

    fn inband(payload: &[u8]) -> Outgoing<'_> {
        Outgoing {
            packet_type: PacketType::DATA_INBAND,
            flags: 1,
            transaction_id: 0x1122_3344_5566_7788,
            header: &[],
            payload,
        }
    }

    /// Bytes that a packet of that many payload bytes takes.
    const fn takes(payload: u32) -> u32 {
        DESCRIPTOR_LEN + payload.next_multiple_of(8) + TRAILER_LEN
    }

    #[test]
    fn packets_come_out_as_they_went_in_at_every_place() {
        for start in (0..96).step_by(8) {
            for header in [0, 8, 16] {
                for payload in 0..=40 {
                    let ring = VecRing::at(96, start);
                    let mut writer = Writer::new(&ring).unwrap();
                    let mut reader = Reader::new(&ring).unwrap();
                    assert!(reader.peek().unwrap().is_none());

                    let header: Vec<u8> = (0..header).map(|n| n as u8).collect();
                    let payload: Vec<u8> = (0..payload).map(|n| 0x80 + n as u8).collect();
                    let packet = Outgoing {
                        packet_type: PacketType::COMPLETION,
                        flags: 3,
                        transaction_id: u64::MAX - 1,
                        header: &header,
                        payload: &payload,
                    };
                    assert_eq!(writer.write(&packet), Ok(true));

                    let found = reader.peek().unwrap().unwrap();
                    assert_eq!(found.packet_type(), PacketType::COMPLETION);
                    assert_eq!(found.flags(), 3);
                    assert_eq!(found.transaction_id(), u64::MAX - 1);
                    assert_eq!(found.header_len(), header.len());
                    assert_eq!(found.payload_len(), payload.len().next_multiple_of(8));
                    let mut copy = vec![0xff; 64];
                    assert_eq!(reader.read_header(&found, &mut copy), header.len());
                    assert_eq!(copy[..header.len()], header);
                    assert_eq!(reader.read_payload(&found, &mut copy), found.payload_len());
                    assert_eq!(copy[..payload.len()], payload);
                    // The padding does not show what was in the ring before.
                    assert!(copy[payload.len()..found.payload_len()]
                        .iter()
                        .all(|&b| b == 0));
                    // A short buffer gets the beginning.
                    let mut two = [0; 2];
                    let got = reader.read_payload(&found, &mut two);
                    assert_eq!(got, two.len().min(found.payload_len()));

                    reader.advance(found);
                    assert!(reader.peek().unwrap().is_none());
                    assert!(!reader.publish());
                    assert_eq!(
                        ring.load(ControlWord::ReadIndex),
                        ring.load(ControlWord::WriteIndex)
                    );
                }
            }
        }
    }

    #[test]
    fn the_trailer_tells_where_the_packet_began() {
        let ring = VecRing::at(64, 48);
        Writer::new(&ring).unwrap().write(&inband(&[])).unwrap();
        // 48..64 is the descriptor, 0..8 the trailer.
        assert_eq!(ring.data.borrow()[..8], (48u64 << 32).to_le_bytes());
        assert_eq!(ring.load(ControlWord::WriteIndex), 8);
    }

    #[test]
    fn full_and_empty_are_told_apart() {
        // A ring of 64 bytes holds packets of up to 56 bytes.
        for (payload, result) in [
            (0, Ok(true)),
            (32, Ok(true)),
            (33, Err(WriteError::TooLarge)),
            (40, Err(WriteError::TooLarge)),
        ] {
            let ring = VecRing::new(64);
            let mut writer = Writer::new(&ring).unwrap();
            assert_eq!(
                writer.write(&inband(&vec![0; payload])),
                result,
                "{payload}"
            );
        }

        let ring = VecRing::new(64);
        let mut writer = Writer::new(&ring).unwrap();
        let mut reader = Reader::new(&ring).unwrap();
        assert_eq!(writer.write(&inband(&[])), Ok(true));
        assert_eq!(writer.free(), Ok(40));
        for payload in [9, 16] {
            assert_eq!(
                writer.write(&inband(&vec![0; payload])),
                Err(WriteError::Full { needed: 40 })
            );
        }
        assert_eq!(writer.write(&inband(&[0; 8])), Ok(false));
        assert_eq!(writer.free(), Ok(8));
        assert_eq!(
            writer.write(&inband(&[])),
            Err(WriteError::Full { needed: 24 })
        );

        for _ in 0..2 {
            let packet = reader.peek().unwrap().unwrap();
            reader.advance(packet);
        }
        assert!(reader.peek().unwrap().is_none());
        assert_eq!(writer.free(), Ok(8));
        reader.publish();
        assert_eq!(writer.free(), Ok(64));
    }

    #[test]
    fn packet_lengths() {
        let most = u16::MAX as usize * 8;
        for (header, payload, length) in [
            (0, 0, Some(24)),
            (0, 1, Some(32)),
            (8, 8, Some(40)),
            (4, 0, None),
            (0, most - 16, Some(most as u32 + 8)),
            (0, most - 15, None),
            (8, most - 24, Some(most as u32 + 8)),
            (usize::MAX, 1, None),
            (usize::MAX - 7, 0, None),
        ] {
            assert_eq!(packet_len(header, payload), length, "{header} {payload}");
        }
    }

    #[test]
    fn unusable_rings_are_refused() {
        for length in [0, 4, 12] {
            let ring = VecRing::new(length);
            let error = Corrupt::DataLength(length as u32);
            assert_eq!(Reader::new(&ring).err(), Some(error));
            assert_eq!(Writer::new(&ring).err(), Some(error));
        }
    }

    /// Indices that no sound end has in a ring of 64 bytes.
    const BAD_INDICES: [u32; 5] = [1, 4, 64, 72, u32::MAX];

    #[test]
    fn bad_indices_are_errors() {
        for bad in BAD_INDICES {
            let ring = VecRing::new(64);
            let mut writer = Writer::new(&ring).unwrap();
            let reader = Reader::new(&ring).unwrap();

            ring.store(ControlWord::WriteIndex, bad);
            assert_eq!(reader.peek().err(), Some(Corrupt::WriteIndex(bad)));
            assert_eq!(reader.unmask(), Err(Corrupt::WriteIndex(bad)));
            assert_eq!(Writer::new(&ring).err(), Some(Corrupt::WriteIndex(bad)));
            // The writer does not read its own index back.
            assert_eq!(writer.write(&inband(&[])), Ok(true));
            assert_eq!(ring.load(ControlWord::WriteIndex), 24);

            ring.store(ControlWord::ReadIndex, bad);
            assert_eq!(Reader::new(&ring).err(), Some(Corrupt::ReadIndex(bad)));
            let error = Corrupt::ReadIndex(bad);
            assert_eq!(writer.write(&inband(&[])), Err(WriteError::Corrupt(error)));
            assert_eq!(writer.wait_for_space(24), Err(error));
            // Neither does the reader.
            assert!(reader.peek().unwrap().is_some());
        }
    }

    #[test]
    fn bad_descriptors_are_errors() {
        // In the ring are 48 bytes: a packet of at most 40 and its trailer.
        let length = |claimed| Corrupt::PacketLength {
            claimed,
            available: 48,
        };
        let offset = |claimed, length| Corrupt::PayloadOffset { claimed, length };
        for (len8, offset8, result) in [
            (0, 2, Some(length(0))),
            (1, 2, Some(length(8))),
            (2, 2, None),
            (5, 2, None),
            (6, 2, Some(length(48))),
            (u16::MAX, 2, Some(length(u16::MAX as u32 * 8))),
            (5, 0, Some(offset(0, 40))),
            (5, 1, Some(offset(8, 40))),
            (5, 5, None),
            (5, 6, Some(offset(48, 40))),
            (2, 3, Some(offset(24, 16))),
            (5, u16::MAX, Some(offset(u16::MAX as u32 * 8, 40))),
        ] {
            let ring = VecRing::new(64);
            Writer::new(&ring)
                .unwrap()
                .write(&inband(&[0; 24]))
                .unwrap();
            ring.write(2, &u16::to_le_bytes(offset8));
            ring.write(4, &u16::to_le_bytes(len8));
            let reader = Reader::new(&ring).unwrap();
            assert_eq!(reader.peek().err(), result, "len8 {len8} offset8 {offset8}");
        }

        // Less than a descriptor and a trailer.
        for bytes in [8, 16] {
            let ring = VecRing::new(64);
            ring.store(ControlWord::WriteIndex, bytes);
            let reader = Reader::new(&ring).unwrap();
            assert_eq!(reader.peek().err(), Some(Corrupt::ShortPacket(bytes)));
        }
    }

    #[test]
    fn a_descriptor_that_changes_later_has_no_effect() {
        let ring = VecRing::new(64);
        Writer::new(&ring).unwrap().write(&inband(&[5; 8])).unwrap();
        let mut reader = Reader::new(&ring).unwrap();
        let packet = reader.peek().unwrap().unwrap();
        ring.write(0, &[0xff; 16]);
        assert_eq!(packet.payload_len(), 8);
        assert_eq!(reader.read_payload(&packet, &mut [0; 64]), 8);
        reader.advance(packet);
        assert!(reader.peek().unwrap().is_none());
    }

    #[test]
    fn the_writer_signals_only_an_empty_unmasked_ring() {
        let ring = VecRing::new(256);
        let mut writer = Writer::new(&ring).unwrap();
        let mut reader = Reader::new(&ring).unwrap();
        assert_eq!(writer.write(&inband(&[])), Ok(true));
        assert_eq!(writer.write(&inband(&[])), Ok(false));

        // Read, but not published: the writer cannot know.
        for _ in 0..2 {
            let packet = reader.peek().unwrap().unwrap();
            reader.advance(packet);
        }
        assert_eq!(writer.write(&inband(&[])), Ok(false));
        let packet = reader.peek().unwrap().unwrap();
        reader.advance(packet);
        reader.publish();

        reader.mask();
        assert_eq!(writer.write(&inband(&[])), Ok(false));
        // The packet that came while signals were masked is not lost.
        assert_eq!(reader.unmask(), Ok(takes(0)));
        let packet = reader.peek().unwrap().unwrap();
        reader.advance(packet);
        reader.publish();
        assert_eq!(reader.unmask(), Ok(0));
        assert_eq!(writer.write(&inband(&[])), Ok(true));
    }

    #[test]
    fn the_reader_signals_when_the_awaited_space_becomes_free() {
        // 8 packets of 24 bytes in a ring of 200: 8 bytes are free.
        for (pending, signal_after) in [
            (0, None),
            (8, Some(1)),
            (31, Some(1)),
            (32, Some(2)),
            (55, Some(2)),
            (56, Some(3)),
            (199, Some(8)),
            // Can never be fulfilled: a packet is always smaller than the ring.
            (200, None),
            (u32::MAX, None),
            // Free before.
            (7, None),
        ] {
            for announced in [true, false] {
                let ring = VecRing::at(200, 96);
                let mut writer = Writer::new(&ring).unwrap();
                let mut reader = Reader::new(&ring).unwrap();
                if announced {
                    writer.announce_pending_send_size();
                }
                for _ in 0..8 {
                    writer.write(&inband(&[])).unwrap();
                }
                assert_eq!(writer.wait_for_space(pending), Ok(8 > pending));

                let mut signalled = None;
                for n in 1..=8 {
                    let packet = reader.peek().unwrap().unwrap();
                    reader.advance(packet);
                    if reader.publish() {
                        assert_eq!(signalled, None, "second signal, pending {pending}");
                        signalled = Some(n);
                    }
                }
                let expected = signal_after.filter(|_| announced);
                assert_eq!(signalled, expected, "pending {pending}");
            }
        }

        // All at once.
        let ring = VecRing::new(200);
        let mut writer = Writer::new(&ring).unwrap();
        let mut reader = Reader::new(&ring).unwrap();
        writer.announce_pending_send_size();
        for _ in 0..8 {
            writer.write(&inband(&[])).unwrap();
        }
        assert_eq!(writer.wait_for_space(100), Ok(false));
        for _ in 0..8 {
            let packet = reader.peek().unwrap().unwrap();
            reader.advance(packet);
        }
        assert!(reader.publish());
        assert!(!reader.publish());
        writer.stop_waiting();
        assert_eq!(ring.load(ControlWord::PendingSendSize), 0);
    }

    #[test]
    fn other_feature_bits_are_kept() {
        let ring = VecRing::new(64);
        ring.store(ControlWord::FeatureBits, 6);
        Writer::new(&ring).unwrap().announce_pending_send_size();
        assert_eq!(ring.load(ControlWord::FeatureBits), 7);
    }

    #[test]
    fn a_long_run_agrees_with_a_queue() {
        let ring = VecRing::new(512);
        let mut writer = Writer::new(&ring).unwrap();
        let mut reader = Reader::new(&ring).unwrap();
        let mut model: VecDeque<(u64, Vec<u8>)> = VecDeque::new();
        let mut used = 0;
        let mut random = 0x2545_f491_4f6c_dd1d_u64;
        for transaction_id in 0..20_000 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            if random & 3 != 0 {
                let payload: Vec<u8> = (0..(random >> 8) & 127)
                    .map(|n| (n ^ random) as u8)
                    .collect();
                let needed = takes(payload.len() as u32);
                let result = writer.write(&Outgoing {
                    transaction_id,
                    ..inband(&payload)
                });
                if 512 - used > needed {
                    assert_eq!(result, Ok(used == 0));
                    used += needed;
                    model.push_back((transaction_id, payload));
                } else {
                    assert_eq!(result, Err(WriteError::Full { needed }));
                }
            }
            if random & 4 != 0 {
                let found = reader.peek().unwrap();
                assert_eq!(found.is_some(), !model.is_empty());
                if let (Some(packet), Some((id, payload))) = (found, model.pop_front()) {
                    let mut copy = vec![0; payload.len()];
                    reader.read_payload(&packet, &mut copy);
                    assert_eq!((packet.transaction_id(), copy), (id, payload.clone()));
                    reader.advance(packet);
                    reader.publish();
                    used -= takes(payload.len() as u32);
                }
            }
        }
    }
}
