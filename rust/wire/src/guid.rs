// SPDX-License-Identifier: GPL-2.0

//! GUIDs as Hyper-V puts them on the wire.

use core::{
    fmt,
    str::FromStr, //
};

use zerocopy_derive::{
    FromBytes,
    Immutable,
    IntoBytes,
    KnownLayout,
    Unaligned, //
};

/// A GUID in its wire form: the first three groups little-endian, the rest as written.
#[derive(
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(transparent)]
pub struct Guid([u8; 16]);

/// The text is not a GUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParseGuidError;

impl fmt::Display for ParseGuidError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a GUID is 8-4-4-4-12 hexadecimal digits")
    }
}

/// Place in the wire form of each byte of the text, from left to right.
const TEXT_ORDER: [usize; 16] = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];

/// Length of the text form without braces.
const TEXT_LEN: usize = 36;

impl Guid {
    /// The all-zero GUID.
    pub const ZERO: Self = Self([0; 16]);

    /// Makes a GUID of its wire bytes.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The wire bytes.
    pub const fn to_bytes(self) -> [u8; 16] {
        self.0
    }

    /// Makes a GUID of its fields as they are written in C (`{data1, data2, data3, {data4}}`).
    pub const fn new(data1: u32, data2: u16, data3: u16, data4: [u8; 8]) -> Self {
        let a = data1.to_le_bytes();
        let b = data2.to_le_bytes();
        let c = data3.to_le_bytes();
        let d = data4;
        Self([
            a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5],
            d[6], d[7],
        ])
    }

    /// Parses `xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx`, with or without braces around it.
    pub const fn parse(text: &str) -> Result<Self, ParseGuidError> {
        let text = text.as_bytes();
        let start = match text.len() {
            TEXT_LEN => 0,
            38 if text[0] == b'{' && text[37] == b'}' => 1,
            _ => return Err(ParseGuidError),
        };

        let mut bytes = [0; 16];
        let mut at = start;
        let mut n = 0;
        while n < bytes.len() {
            if matches!(n, 4 | 6 | 8 | 10) {
                if text[at] != b'-' {
                    return Err(ParseGuidError);
                }
                at += 1;
            }
            let (Some(high), Some(low)) = (hex_digit(text[at]), hex_digit(text[at + 1])) else {
                return Err(ParseGuidError);
            };
            bytes[TEXT_ORDER[n]] = (high << 4) | low;
            at += 2;
            n += 1;
        }
        Ok(Self(bytes))
    }
}

/// Value of one hexadecimal digit.
const fn hex_digit(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        b'A'..=b'F' => Some(digit - b'A' + 10),
        _ => None,
    }
}

impl FromStr for Guid {
    type Err = ParseGuidError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, &place) in TEXT_ORDER.iter().enumerate() {
            if matches!(n, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{:02x}", self.0[place])?;
        }
        Ok(())
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::ToString;

    const NET: Guid = Guid::new(
        0xf8615163,
        0xdf3e,
        0x46c5,
        [0x91, 0x3f, 0xf2, 0xd2, 0xf9, 0x65, 0xed, 0x0e],
    );

    #[test]
    fn text_and_wire_forms_agree() {
        let text = "f8615163-df3e-46c5-913f-f2d2f965ed0e";
        assert_eq!(NET.to_string(), text);
        assert_eq!(text.parse(), Ok(NET));
        assert_eq!("{F8615163-DF3E-46C5-913F-F2D2F965ED0E}".parse(), Ok(NET));
        assert_eq!(
            NET.to_bytes()[..8],
            [0x63, 0x51, 0x61, 0xf8, 0x3e, 0xdf, 0xc5, 0x46]
        );
        assert_eq!(Guid::from_bytes(NET.to_bytes()), NET);
    }

    #[test]
    fn malformed_text_is_refused() {
        for text in [
            "",
            "f8615163",
            "f8615163-df3e-46c5-913f-f2d2f965ed0",
            "f8615163-df3e-46c5-913f-f2d2f965ed0e0",
            "f8615163-df3e-46c5-913ff-2d2f965ed0e",
            "g8615163-df3e-46c5-913f-f2d2f965ed0e",
            "(f8615163-df3e-46c5-913f-f2d2f965ed0e)",
            "f8615163-df3e-46c5-913f-f2d2f965ed0\u{e9}",
        ] {
            assert_eq!(Guid::parse(text), Err(ParseGuidError), "{text}");
        }
    }
}
