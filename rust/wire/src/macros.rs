// SPDX-License-Identifier: GPL-2.0

//! Declarations that several modules of this crate make.

/// Declares numbers with named values. Every other value is possible as well.
macro_rules! open_numbers {
    ($($(#[$attr:meta])* $name:ident($int:ty) {
        $($(#[$value_attr:meta])* $value:ident = $number:expr,)*
    })*) => {$(
        $(#[$attr])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $int);

        impl $name {
            $($(#[$value_attr])* pub const $value: Self = Self($number);)*

            /// Name of a known value.
            pub const fn name(self) -> Option<&'static str> {
                match self {
                    $(Self::$value => Some(stringify!($value)),)*
                    _ => None,
                }
            }
        }

        /// The name, or the number if it has none.
        impl core::fmt::Display for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                match self.name() {
                    Some(name) => f.write_str(name),
                    None => write!(f, "{:#x}", self.0),
                }
            }
        }

        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                core::fmt::Display::fmt(self, f)
            }
        }
    )*};
}

/// Declares sets of bits.
macro_rules! bit_sets {
    ($($(#[$attr:meta])* $name:ident($int:ty) {
        $($(#[$bit_attr:meta])* $bit:ident = $number:expr,)*
    })*) => {$(
        $(#[$attr])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $name(pub $int);

        impl $name {
            $($(#[$bit_attr])* pub const $bit: Self = Self($number);)*

            /// Whether all bits of `other` are set.
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// These bits and those of `other`.
            pub const fn with(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }
        }
    )*};
}

/// Declares layouts of little-endian integers without alignment. By default all is zero.
macro_rules! layouts {
    ($($(#[$attr:meta])* $name:ident {
        $($(#[$field_attr:meta])* $field:ident: $type:ty,)*
    })*) => {$(
        $(#[$attr])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[derive(
            zerocopy_derive::FromBytes,
            zerocopy_derive::IntoBytes,
            zerocopy_derive::KnownLayout,
            zerocopy_derive::Immutable,
            zerocopy_derive::Unaligned,
        )]
        #[repr(C)]
        pub struct $name {
            $($(#[$field_attr])* pub $field: $type,)*
        }

        impl Default for $name {
            fn default() -> Self {
                zerocopy::FromZeros::new_zeroed()
            }
        }
    )*};
}
