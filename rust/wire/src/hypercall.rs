// SPDX-License-Identifier: GPL-2.0

//! Hypercall control word and the inputs that the virtual PCI bus needs.

use zerocopy::{
    little_endian::{
        U32,
        U64, //
    },
    FromBytes,
    IntoBytes, //
};
use zerocopy_derive::{
    FromBytes,
    Immutable,
    IntoBytes,
    KnownLayout,
    Unaligned, //
};

/// Partition id that names the caller's own partition.
pub const PARTITION_SELF: u64 = !0;

/// Hypercall codes.
pub mod code {
    /// `HvPostMessage`.
    pub const POST_MESSAGE: u16 = 0x5c;
    /// `HvSignalEvent`.
    pub const SIGNAL_EVENT: u16 = 0x5d;
    /// `HvRetargetDeviceInterrupt`.
    pub const RETARGET_INTERRUPT: u16 = 0x7e;
    /// `HvModifySparseGpaPageHostVisibility`, a rep call.
    pub const MODIFY_SPARSE_GPA_PAGE_HOST_VISIBILITY: u16 = 0xdb;
    /// Reads memory-mapped I/O space.
    pub const MMIO_READ: u16 = 0x106;
    /// Writes to memory-mapped I/O space.
    pub const MMIO_WRITE: u16 = 0x107;
}

/// Hypercall status codes, the low 16 bits of the result.
pub mod status {
    /// Done.
    pub const SUCCESS: u16 = 0;
    /// The call code is not known.
    pub const INVALID_HYPERCALL_CODE: u16 = 2;
    /// The input does not have the right form.
    pub const INVALID_HYPERCALL_INPUT: u16 = 3;
    /// The input is not aligned or crosses a page.
    pub const INVALID_ALIGNMENT: u16 = 4;
    /// A parameter is wrong.
    pub const INVALID_PARAMETER: u16 = 5;
    /// The partition id is wrong.
    pub const INVALID_PARTITION_ID: u16 = 0xd;
    /// No such virtual processor.
    pub const INVALID_VP_INDEX: u16 = 0xe;
    /// No such connection.
    pub const INVALID_CONNECTION_ID: u16 = 0x12;
    /// Nothing left to queue the message in.
    pub const INSUFFICIENT_BUFFERS: u16 = 0x13;
}

/// The control word of a hypercall.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Control(pub u64);

impl Control {
    /// Control word of a call whose variable header has `variable_header` 8-byte words.
    pub fn new(code: u16, variable_header: u16) -> Self {
        Self(u64::from(code) | (u64::from(variable_header & 0x3ff) << 17))
    }

    /// Which call it is.
    pub fn code(self) -> u16 {
        self.0 as u16
    }

    /// Whether the input is in registers.
    pub fn is_fast(self) -> bool {
        self.0 & (1 << 16) != 0
    }

    /// Size of the variable header in 8-byte words.
    pub fn variable_header(self) -> u16 {
        ((self.0 >> 17) & 0x3ff) as u16
    }
}

/// Why a hypercall input was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The input ends before the structure does.
    Truncated,
    /// The interrupt is not an MSI.
    NotMsi(u32),
    /// Format of the processor set is not known.
    SetFormat(u64),
    /// The processor set has another number of banks than its mask says.
    BankCount,
    /// There is a variable header, and nothing to be in it.
    VariableHeader(u16),
    /// A reserved field is not zero.
    Reserved,
    /// A flag is not known.
    Flags(u32),
    /// The caller's buffer is too small.
    NoSpace,
}

impl Error {
    /// The status with which a hypervisor answers such an input.
    pub fn status(self) -> u16 {
        match self {
            Self::Truncated | Self::BankCount | Self::VariableHeader(_) | Self::NoSpace => {
                status::INVALID_HYPERCALL_INPUT
            }
            Self::NotMsi(_) | Self::SetFormat(_) | Self::Reserved | Self::Flags(_) => {
                status::INVALID_PARAMETER
            }
        }
    }
}

/// Banks of 64 processors that a sparse set can have.
pub const BANKS_MAX: usize = 64;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RetargetHeader {
    partition: U64,
    device: U64,
    source: U32,
    reserved1: U32,
    msi_address: U32,
    msi_data: U32,
    reserved2: U64,
    vector: U32,
    flags: U32,
    mask_or_format: U64,
}

/// The interrupt entry is an MSI.
const SOURCE_MSI: u32 = 1;
/// The interrupt goes to all of the processors.
const FLAG_MULTICAST: u32 = 1;
/// The target is a processor set and not a mask.
const FLAG_PROCESSOR_SET: u32 = 2;
/// Set format: the banks named by a mask.
const SET_SPARSE: u64 = 0;
/// Set format: all processors.
const SET_ALL: u64 = 1;

/// The processors a retarget names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target<'a> {
    /// One bit for each of the first 64 processors.
    Mask(u64),
    /// All processors.
    All,
    /// Banks of 64 processors.
    Sparse {
        /// One bit for each bank that is present.
        valid_banks: u64,
        /// The banks that are present, in ascending order.
        banks: &'a [U64],
    },
}

impl Target<'_> {
    /// Whether the processor with this index is in the set.
    pub fn contains(&self, vp: u32) -> bool {
        match *self {
            Self::Mask(mask) => vp < 64 && (mask >> vp) & 1 != 0,
            Self::All => true,
            Self::Sparse { valid_banks, banks } => {
                let bank = vp / 64;
                if bank >= 64 || (valid_banks >> bank) & 1 == 0 {
                    return false;
                }
                let before = (valid_banks & ((1 << bank) - 1)).count_ones() as usize;
                banks
                    .get(before)
                    .is_some_and(|b| (b.get() >> (vp % 64)) & 1 != 0)
            }
        }
    }

    /// Whether all processors of the set have indexes below `count`.
    pub fn is_within(&self, count: u32) -> bool {
        // The bits of a bank for processors that exist.
        let mask = |bank: u32| match count.saturating_sub(bank * 64) {
            0 => 0,
            left if left >= 64 => !0,
            left => (1 << left) - 1,
        };
        match *self {
            Self::Mask(bits) => bits & !mask(0) == 0,
            Self::All => true,
            Self::Sparse { valid_banks, banks } => {
                let present = (0..64).filter(|bank| (valid_banks >> bank) & 1 != 0);
                present
                    .zip(banks)
                    .all(|(bank, contents)| contents.get() & !mask(bank) == 0)
            }
        }
    }

    /// Lowest numbered processor of the set.
    pub fn first(&self) -> Option<u32> {
        match *self {
            Self::Mask(0) => None,
            Self::Mask(mask) => Some(mask.trailing_zeros()),
            Self::All => Some(0),
            Self::Sparse { valid_banks, banks } => {
                let present = (0..64).filter(|bank| (valid_banks >> bank) & 1 != 0);
                present
                    .zip(banks)
                    .find(|(_, contents)| contents.get() != 0)
                    .map(|(bank, contents)| bank * 64 + contents.get().trailing_zeros())
            }
        }
    }
}

/// Input of `HvRetargetDeviceInterrupt`: sends an MSI that is set up to other processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retarget<'a> {
    /// Partition, usually [`PARTITION_SELF`].
    pub partition: u64,
    /// Logical device id, see [`device_id`].
    pub device: u64,
    /// Low half of the address which the device writes to.
    pub msi_address: u32,
    /// What the device writes.
    pub msi_data: u32,
    /// New vector.
    pub vector: u32,
    /// New processors.
    pub target: Target<'a>,
}

impl<'a> Retarget<'a> {
    /// Size of the input without its variable header.
    pub const FIXED: usize = size_of::<RetargetHeader>();

    /// Size of the largest input.
    pub const MAX: usize = Self::FIXED + 8 + 8 * BANKS_MAX;

    /// Parses an input whose variable header has `variable_header` 8-byte words.
    pub fn parse(input: &'a [u8], variable_header: u16) -> Result<Self, Error> {
        let (header, rest) =
            RetargetHeader::read_from_prefix(input).map_err(|_| Error::Truncated)?;
        if header.source.get() != SOURCE_MSI {
            return Err(Error::NotMsi(header.source.get()));
        }
        if header.reserved1.get() != 0 || header.reserved2.get() != 0 {
            return Err(Error::Reserved);
        }
        let flags = header.flags.get();
        if flags & !(FLAG_MULTICAST | FLAG_PROCESSOR_SET) != 0 {
            return Err(Error::Flags(flags));
        }
        // Only the banks of a sparse set go there.
        let nothing_more = match variable_header {
            0 => Ok(()),
            words => Err(Error::VariableHeader(words)),
        };
        let target = if flags & FLAG_PROCESSOR_SET == 0 {
            nothing_more?;
            Target::Mask(header.mask_or_format.get())
        } else {
            match header.mask_or_format.get() {
                SET_ALL => {
                    nothing_more?;
                    Target::All
                }
                SET_SPARSE => {
                    let words = usize::from(variable_header);
                    let (words, _) = <[U64]>::ref_from_prefix_with_elems(rest, words)
                        .map_err(|_| Error::Truncated)?;
                    let (valid_banks, banks) = words.split_first().ok_or(Error::BankCount)?;
                    let valid_banks = valid_banks.get();
                    if valid_banks.count_ones() as usize != banks.len() {
                        return Err(Error::BankCount);
                    }
                    Target::Sparse { valid_banks, banks }
                }
                other => return Err(Error::SetFormat(other)),
            }
        };
        Ok(Self {
            partition: header.partition.get(),
            device: header.device.get(),
            msi_address: header.msi_address.get(),
            msi_data: header.msi_data.get(),
            vector: header.vector.get(),
            target,
        })
    }

    /// Builds the input in `out` and gives the control word that goes with it.
    pub fn write(&self, out: &mut [u8]) -> Result<Control, Error> {
        let (flags, mask_or_format) = match self.target {
            Target::Mask(mask) => (0, mask),
            Target::All => (FLAG_PROCESSOR_SET, SET_ALL),
            Target::Sparse { .. } => (FLAG_PROCESSOR_SET, SET_SPARSE),
        };
        let header = RetargetHeader {
            partition: U64::new(self.partition),
            device: U64::new(self.device),
            source: U32::new(SOURCE_MSI),
            reserved1: U32::ZERO,
            msi_address: U32::new(self.msi_address),
            msi_data: U32::new(self.msi_data),
            reserved2: U64::ZERO,
            vector: U32::new(self.vector),
            flags: U32::new(flags),
            mask_or_format: U64::new(mask_or_format),
        };
        header.write_to_prefix(out).map_err(|_| Error::NoSpace)?;
        let rest = &mut out[size_of::<RetargetHeader>()..];
        let Target::Sparse { valid_banks, banks } = self.target else {
            return Ok(Control::new(code::RETARGET_INTERRUPT, 0));
        };
        if valid_banks.count_ones() as usize != banks.len() {
            return Err(Error::BankCount);
        }
        U64::new(valid_banks)
            .write_to_prefix(rest)
            .map_err(|_| Error::NoSpace)?;
        banks
            .write_to_prefix(&mut rest[8..])
            .map_err(|_| Error::NoSpace)?;
        // At most 65, since a mask has 64 bits.
        let variable_header = 1 + banks.len() as u16;
        Ok(Control::new(code::RETARGET_INTERRUPT, variable_header))
    }
}

/// Logical device id of function `function` on the virtual PCI bus with this instance GUID.
pub fn device_id(instance: &[u8; 16], function: u8) -> u64 {
    u64::from(u32::from_be_bytes([
        instance[5],
        instance[4],
        instance[7],
        (instance[6] & 0xf8) | (function & 7),
    ]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn retarget(target: Target<'_>) -> Retarget<'_> {
        Retarget {
            partition: PARTITION_SELF,
            device: 0x63cf_6644,
            msi_address: 0xfee0_1000,
            msi_data: 0x4031,
            vector: 0x52,
            target,
        }
    }

    #[test]
    fn control_word() {
        let control = Control::new(code::RETARGET_INTERRUPT, 2);
        assert_eq!(control.0, 0x7e | (2 << 17));
        assert_eq!((control.code(), control.variable_header()), (0x7e, 2));
        assert!(!control.is_fast());
        assert!(Control(1 << 16).is_fast());
    }

    #[test]
    fn device_ids() {
        // e9ac9b28-cf63-4466-9ae3-4b849c3ee03b.
        let instance = [
            0x28, 0x9b, 0xac, 0xe9, 0x63, 0xcf, 0x66, 0x44, 0x9a, 0xe3, 0x4b, 0x84, 0x9c, 0x3e,
            0xe0, 0x3b,
        ];
        assert_eq!(device_id(&instance, 0), 0xcf63_4460);
        assert_eq!(device_id(&instance, 7), 0xcf63_4467);
    }

    #[test]
    fn targets_at_the_boundaries() {
        let bank = |n: u64| U64::new(n);
        let two = [bank(0), bank(1 << 63)];
        let last = [bank(1)];
        for (target, first, contained, not) in [
            (Target::Mask(0), None, None, Some(0)),
            (Target::Mask(1 << 63), Some(63), Some(63), Some(64)),
            (Target::All, Some(0), Some(4095), None),
            (
                Target::Sparse {
                    valid_banks: 0,
                    banks: &[],
                },
                None,
                None,
                Some(0),
            ),
            (
                Target::Sparse {
                    valid_banks: 5,
                    banks: &two,
                },
                Some(191),
                Some(191),
                Some(190),
            ),
            (
                Target::Sparse {
                    valid_banks: 1 << 63,
                    banks: &last,
                },
                Some(63 * 64),
                Some(63 * 64),
                Some(64 * 64),
            ),
        ] {
            assert_eq!(target.first(), first, "{target:?}");
            if let Some(vp) = contained {
                assert!(target.contains(vp), "{target:?}");
            }
            if let Some(vp) = not {
                assert!(!target.contains(vp), "{target:?}");
            }
            if let (Some(vp), false) = (contained, target == Target::All) {
                assert!(!target.is_within(vp), "{target:?}");
                assert!(target.is_within(vp + 1), "{target:?}");
            }
            let mut out = [0xaa; Retarget::MAX];
            let control = retarget(target).write(&mut out).unwrap();
            let parsed = Retarget::parse(&out, control.variable_header());
            assert_eq!(parsed, Ok(retarget(target)));
            let size = 56 + 8 * usize::from(control.variable_header());
            for short in 0..size {
                assert_eq!(
                    Retarget::parse(&out[..short], control.variable_header()),
                    Err(Error::Truncated)
                );
            }
            for short in 0..size {
                assert_eq!(
                    retarget(target).write(&mut out[..short]),
                    Err(Error::NoSpace)
                );
            }
        }
    }

    #[test]
    fn refused_inputs() {
        let banks = [U64::new(1)];
        let good = retarget(Target::Sparse {
            valid_banks: 1,
            banks: &banks,
        });
        let mut out = [0; Retarget::MAX];
        good.write(&mut out).unwrap();
        for words in [0, 1, 3] {
            assert_eq!(Retarget::parse(&out, words), Err(Error::BankCount));
        }
        out[48] = 2;
        assert_eq!(Retarget::parse(&out, 2), Err(Error::SetFormat(2)));
        out[16] = 2;
        assert_eq!(Retarget::parse(&out, 2), Err(Error::NotMsi(2)));
        // Reserved fields, unknown flags, words for which there is no place.
        for (at, value, error) in [
            (20, 1, Error::Reserved),
            (39, 1, Error::Reserved),
            (44, 6, Error::Flags(6)),
            (47, 1, Error::Flags(0x0100_0002)),
        ] {
            good.write(&mut out).unwrap();
            out[at] = value;
            assert_eq!(Retarget::parse(&out, 2), Err(error), "byte {at}");
        }
        for target in [Target::Mask(1), Target::All] {
            retarget(target).write(&mut out).unwrap();
            assert!(Retarget::parse(&out, 0).is_ok());
            assert_eq!(Retarget::parse(&out, 1), Err(Error::VariableHeader(1)));
        }
        let bad = retarget(Target::Sparse {
            valid_banks: 3,
            banks: &banks,
        });
        assert_eq!(bad.write(&mut out), Err(Error::BankCount));
    }
}
