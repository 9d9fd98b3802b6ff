// SPDX-License-Identifier: GPL-2.0

//! Bit sets of network devices: offload features and message levels.
//!
//! C headers: [`include/linux/netdev_features.h`](srctree/include/linux/netdev_features.h),
//! [`include/linux/netdevice.h`](srctree/include/linux/netdevice.h)

use core::ops::{
    BitAnd,
    BitOr,
    BitXor,
    Not, //
};

use hyperv_bindings as bindings;

/// Declares what both bit sets can do.
macro_rules! bits {
    ($name:ident($ty:ty)) => {
        impl $name {
            /// Whether all bits of `other` are set.
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// Whether a bit of `other` is set.
            pub const fn intersects(self, other: Self) -> bool {
                self.0 & other.0 != 0
            }

            /// These bits and those of `other`.
            pub const fn with(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }
        }

        impl BitOr for $name {
            type Output = Self;

            fn bitor(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }
        }

        impl BitAnd for $name {
            type Output = Self;

            fn bitand(self, other: Self) -> Self {
                Self(self.0 & other.0)
            }
        }

        impl BitXor for $name {
            type Output = Self;

            fn bitxor(self, other: Self) -> Self {
                Self(self.0 ^ other.0)
            }
        }

        impl Not for $name {
            type Output = Self;

            fn not(self) -> Self {
                Self(!self.0)
            }
        }
    };
}

/// Offload features of a device, `netdev_features_t`.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Features(pub u64);

bits!(Features(u64));

impl Features {
    /// Scatter and gather.
    pub const SG: Self = Self(1 << bindings::NETIF_F_SG_BIT);
    /// Checksums of TCP and UDP over IPv4 on transmit.
    pub const IP_CSUM: Self = Self(1 << bindings::NETIF_F_IP_CSUM_BIT);
    /// Checksums of TCP and UDP over IPv6 on transmit.
    pub const IPV6_CSUM: Self = Self(1 << bindings::NETIF_F_IPV6_CSUM_BIT);
    /// Memory at any address.
    pub const HIGHDMA: Self = Self(1 << bindings::NETIF_F_HIGHDMA_BIT);
    /// 802.1Q tags are inserted on transmit.
    pub const VLAN_CTAG_TX: Self = Self(1 << bindings::NETIF_F_HW_VLAN_CTAG_TX_BIT);
    /// 802.1Q tags are taken out on receive.
    pub const VLAN_CTAG_RX: Self = Self(1 << bindings::NETIF_F_HW_VLAN_CTAG_RX_BIT);
    /// Segmentation of TCP over IPv4.
    pub const TSO: Self = Self(1 << bindings::NETIF_F_TSO_BIT);
    /// Segmentation of TCP over IPv6.
    pub const TSO6: Self = Self(1 << bindings::NETIF_F_TSO6_BIT);
    /// Large receive offload.
    pub const LRO: Self = Self(1 << bindings::NETIF_F_LRO_BIT);
    /// Hash of received packets.
    pub const RXHASH: Self = Self(1 << bindings::NETIF_F_RXHASH_BIT);
    /// Checksums on receive.
    pub const RXCSUM: Self = Self(1 << bindings::NETIF_F_RXCSUM_BIT);
}

/// What a driver writes to the log, `NETIF_MSG_*`.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct MessageLevel(pub u32);

bits!(MessageLevel(u32));

impl MessageLevel {
    /// The driver as such.
    pub const DRV: Self = Self(1 << bindings::NETIF_MSG_DRV_BIT);
    /// Probing.
    pub const PROBE: Self = Self(1 << bindings::NETIF_MSG_PROBE_BIT);
    /// The link.
    pub const LINK: Self = Self(1 << bindings::NETIF_MSG_LINK_BIT);
    /// Going down.
    pub const IFDOWN: Self = Self(1 << bindings::NETIF_MSG_IFDOWN_BIT);
    /// Coming up.
    pub const IFUP: Self = Self(1 << bindings::NETIF_MSG_IFUP_BIT);
    /// Errors of receiving.
    pub const RX_ERR: Self = Self(1 << bindings::NETIF_MSG_RX_ERR_BIT);
    /// Errors of transmitting.
    pub const TX_ERR: Self = Self(1 << bindings::NETIF_MSG_TX_ERR_BIT);

    /// The levels of a `debug` module parameter: the lowest `debug` bits, or `default` if that is
    /// not a number of bits (C: `netif_msg_init`).
    pub const fn from_parameter(debug: i32, default: Self) -> Self {
        match debug {
            0 => Self(0),
            1..=31 => Self((1 << debug) - 1),
            _ => default,
        }
    }
}
