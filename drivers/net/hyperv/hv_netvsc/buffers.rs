// SPDX-License-Identifier: GPL-2.0

//! The receive buffer and the send buffer: memory shared with the host, cut into sections.

use hyperv_wire::nvsp;
use kernel::{
    prelude::*,
    sync::atomic::{
        Atomic,
        Full,
        Relaxed, //
    }, //
};
use net::{
    netdev_err,
    Device, //
};
use vmbus::{
    Gpadl,
    SharedBytes, //
};

use crate::device::Netvsc;

/// The buffer into which the host puts received packets. The host manages its sections.
pub(crate) struct RecvBuffer {
    gpadl: Gpadl,
    /// Bytes of a section: the largest message.
    pub(crate) section_size: u32,
    /// Number of sections.
    pub(crate) sections: u32,
}

impl RecvBuffer {
    /// Checks what the host made of the buffer.
    pub(crate) fn new(
        dev: &Device<Netvsc>,
        gpadl: Gpadl,
        answer: &nvsp::SendReceiveBufferComplete,
    ) -> Result<Self> {
        let section = &answer.section;
        // The whole buffer is to be one array of sections.
        let section_size = section.suballocation_size.get();
        let sections = section.num_suballocations.get();
        if answer.num_sections.get() != 1 || section.offset.get() != 0 || sections == 0 {
            return Err(EINVAL);
        }
        if section_size < nvsp::MIN_SECTION_SIZE
            || u64::from(section_size) * u64::from(sections) > gpadl.size() as u64
        {
            netdev_err!(dev, "invalid recv_section_size {}\n", section_size);
            return Err(EINVAL);
        }
        Ok(Self {
            gpadl,
            section_size,
            sections,
        })
    }

    /// A message in the buffer.
    pub(crate) fn message(&self, offset: u32, len: u32) -> Result<SharedBytes<'_>> {
        if len > self.section_size {
            return Err(EMSGSIZE);
        }
        self.gpadl.bytes(offset as usize, len as usize)
    }
}

/// The buffer into which packets are copied to be sent. The driver manages its sections.
pub(crate) struct SendBuffer {
    gpadl: Gpadl,
    /// Bytes of a section.
    pub(crate) section_size: u32,
    /// Number of sections.
    pub(crate) sections: u32,
    /// A bit for each section in use.
    used: KVec<Atomic<u64>>,
}

impl SendBuffer {
    /// Checks what the host made of the buffer.
    pub(crate) fn new(gpadl: Gpadl, answer: &nvsp::SendSendBufferComplete) -> Result<Self> {
        let section_size = answer.section_size.get();
        if section_size < nvsp::MIN_SECTION_SIZE {
            return Err(EINVAL);
        }
        let sections = u32::try_from(gpadl.size())? / section_size;
        if sections == 0 {
            return Err(EINVAL);
        }
        let words = sections.div_ceil(u64::BITS);
        let mut used = KVec::with_capacity(words as usize, GFP_KERNEL)?;
        for word in 0..words {
            // What is behind the last section counts as used.
            let left = sections - word * u64::BITS;
            let mask = if left >= u64::BITS { 0 } else { !0 << left };
            used.push(Atomic::new(mask), GFP_KERNEL)?;
        }
        Ok(Self {
            gpadl,
            section_size,
            sections,
            used,
        })
    }

    /// Number of sections in use.
    pub(crate) fn in_use(&self) -> u32 {
        let used: u32 = self
            .used
            .iter()
            .map(|word| word.load(Relaxed).count_ones())
            .sum();
        // What is behind the last section does not count.
        used - (self.used.len() as u32 * u64::BITS - self.sections)
    }

    /// Takes a free section.
    pub(crate) fn take(&self) -> Option<u32> {
        let mut first = 0;
        for word in &self.used {
            let mut old = word.load(Relaxed);
            while old != u64::MAX {
                let bit = old.trailing_ones();
                match word.cmpxchg(old, old | (1 << bit), Full) {
                    Ok(_) => return Some(first + bit),
                    Err(now) => old = now,
                }
            }
            first += u64::BITS;
        }
        None
    }

    /// Gives a section back.
    pub(crate) fn put(&self, section: u32) {
        let Some(word) = self.used.get((section / u64::BITS) as usize) else {
            return;
        };
        let mask = !(1 << (section % u64::BITS));
        let mut old = word.load(Relaxed);
        while let Err(now) = word.cmpxchg(old, old & mask, Full) {
            old = now;
        }
    }

    /// The bytes of a section from `offset` on, `len` of them.
    pub(crate) fn bytes(&self, section: u32, offset: u32, len: u32) -> Result<SharedBytes<'_>> {
        if section >= self.sections
            || offset
                .checked_add(len)
                .is_none_or(|end| end > self.section_size)
        {
            return Err(ERANGE);
        }
        let start = section as usize * self.section_size as usize + offset as usize;
        self.gpadl.bytes(start, len as usize)
    }
}
