// SPDX-License-Identifier: GPL-2.0
//! Which memory of an isolated guest the host may access.
//!
//! The guest's memory is there twice, below and above the [shared bit](crate::layout::SHARED_BIT). What it shares with
//! the host it accesses above. On the hardware that this stands for the host cannot read the rest; here it could, so
//! the bus asks for each page.

use std::collections::HashSet;
use std::sync::{PoisonError, RwLock};

use crate::layout::SHARED_BIT;

/// How much of the memory the host may access.
#[derive(Debug)]
pub(crate) enum Isolation {
    /// All.
    None,
    /// Pages by their numbers.
    Shared(RwLock<HashSet<u64>>),
}

impl Isolation {
    pub(crate) fn new(isolated: bool) -> Self {
        if isolated {
            Self::Shared(RwLock::default())
        } else {
            Self::None
        }
    }

    /// Whether there is any.
    pub(crate) fn is_active(&self) -> bool {
        matches!(self, Self::Shared(_))
    }

    /// Whether the host may access a page.
    pub(crate) fn is_shared(&self, pfn: u64) -> bool {
        match self {
            Self::None => true,
            Self::Shared(pages) => pages
                .read()
                .unwrap_or_else(PoisonError::into_inner)
                .contains(&pfn),
        }
    }

    /// Shares a page or hides it. Says whether it can.
    pub(crate) fn set_shared(&self, pfn: u64, shared: bool) -> bool {
        let Self::Shared(pages) = self else {
            return false;
        };
        let mut pages = pages.write().unwrap_or_else(PoisonError::into_inner);
        if shared {
            pages.insert(pfn);
        } else {
            pages.remove(&pfn);
        }
        true
    }

    /// The address of a device's register, by whichever way the guest has accessed it.
    pub(crate) fn device_address(&self, address: u64) -> u64 {
        match self {
            Self::None => address,
            Self::Shared(_) => address & !(1 << SHARED_BIT),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_hidden_until_shared() {
        let isolation = Isolation::new(true);
        assert!(!isolation.is_shared(7));
        assert!(isolation.set_shared(7, true));
        assert!(isolation.is_shared(7) && !isolation.is_shared(8));
        assert!(isolation.set_shared(7, false));
        assert!(!isolation.is_shared(7));
        assert_eq!(isolation.device_address(0x80_e000_0004), 0xe000_0004);
    }

    #[test]
    fn others_share_everything() {
        let none = Isolation::new(false);
        assert!(none.is_shared(7) && !none.set_shared(7, false));
        assert_eq!(none.device_address(0x80_e000_0004), 0x80_e000_0004);
    }
}
