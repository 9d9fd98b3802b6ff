// SPDX-License-Identifier: GPL-2.0

//! What `ethtool` shows and sets.
//!
//! All callbacks run under the RTNL: the core only leaves it out for devices which ask for that.
//!
//! C header: [`include/linux/ethtool.h`](srctree/include/linux/ethtool.h)

use core::{
    fmt::Write,
    marker::PhantomData, //
};

use hyperv_bindings as bindings;
use kernel::{
    error::{
        from_result,
        to_result, //
    },
    fmt,
    prelude::*, //
};

use crate::{
    device::Device,
    eopnotsupp,
    rtnl::Rtnl,
    Driver,
    MessageLevel,
    NetDevice,
    L4, //
};

/// Length of a name of a counter, with the final zero.
const GSTRING: usize = bindings::ETH_GSTRING_LEN as usize;

/// The hash function of Toeplitz, `ETH_RSS_HASH_TOP`.
const HASH_TOEPLITZ: u8 = 1 << bindings::ETH_RSS_HASH_TOP_BIT;

/// Number of channels.
#[derive(Clone, Copy, Default)]
pub struct Channels {
    /// Most that are possible.
    pub max: u32,
    /// In use.
    pub count: u32,
}

/// Sizes of the rings.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct RingSizes {
    /// Entries to receive.
    pub rx: u32,
    /// Most of them.
    pub rx_max: u32,
    /// Entries to transmit.
    pub tx: u32,
    /// Most of them.
    pub tx_max: u32,
}

/// Which parts of a packet are hashed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum RxfhFields {
    /// The addresses.
    Addresses,
    /// Addresses and ports.
    AddressesAndPorts,
}

/// The hash of received packets: its function, key and indirection table.
///
/// # Invariants
///
/// The inner pointer is valid, and its tables are null or have the sizes that the driver told.
pub struct Rxfh<'a> {
    param: *mut bindings::ethtool_rxfh_param,
    indir_size: usize,
    key_size: usize,
    _param: PhantomData<&'a mut bindings::ethtool_rxfh_param>,
}

impl Rxfh<'_> {
    /// Whether another hash function than Toeplitz's is asked for.
    pub fn wants_other_function(&self) -> bool {
        // SAFETY: By the type invariants.
        let function = unsafe { (*self.param).hfunc };
        function != bindings::ETH_RSS_HASH_NO_CHANGE as u8 && function != HASH_TOEPLITZ
    }

    /// The indirection table, if it is to be read or set.
    pub fn table(&mut self) -> Option<&mut [u32]> {
        // SAFETY: By the type invariants the table is null or has this size.
        unsafe {
            let table = (*self.param).indir;
            (!table.is_null()).then(|| core::slice::from_raw_parts_mut(table, self.indir_size))
        }
    }

    /// The key, if it is to be read or set.
    pub fn key(&mut self) -> Option<&mut [u8]> {
        // SAFETY: By the type invariants the key is null or has this size.
        unsafe {
            let key = (*self.param).key;
            (!key.is_null()).then(|| core::slice::from_raw_parts_mut(key, self.key_size))
        }
    }
}

/// Settings of the link, of this device or to be passed on to another one.
///
/// # Invariants
///
/// The inner pointer is valid.
pub struct LinkSettings<'a>(
    *mut bindings::ethtool_link_ksettings,
    PhantomData<&'a mut ()>,
);

impl LinkSettings<'_> {
    /// Tells the speed in Mbit/s and the duplex, on a port of no particular kind.
    pub fn set(&mut self, speed: u32, duplex: u8) {
        // SAFETY: By the type invariants.
        unsafe {
            (*self.0).base.speed = speed;
            (*self.0).base.duplex = duplex;
            (*self.0).base.port = bindings::PORT_OTHER as u8;
        }
    }

    /// Tells the settings of `dev`.
    pub fn get_from(&mut self, dev: &NetDevice, _rtnl: &Rtnl) -> Result {
        // SAFETY: The device and the pointer are valid, and the RTNL is held.
        to_result(unsafe { bindings::__ethtool_get_link_ksettings(dev.as_raw(), self.0) })
    }

    /// Applies the settings to `dev`.
    pub fn apply_to(&self, dev: &NetDevice, _rtnl: &Rtnl) -> Result {
        // SAFETY: The device and the pointer are valid, the RTNL is held, and a device always has
        // a table of operations.
        unsafe {
            let set = (*(*dev.as_raw()).ethtool_ops).set_link_ksettings;
            to_result(set.ok_or_else(eopnotsupp)?(dev.as_raw(), self.0))
        }
    }

    /// Checks the settings for a virtual device, and takes speed and duplex out of them.
    pub fn apply_virtual(&self, dev: &NetDevice, speed: &mut u32, duplex: &mut u8) -> Result {
        // SAFETY: The device and the pointer are valid.
        to_result(unsafe {
            bindings::ethtool_virtdev_set_link_ksettings(dev.as_raw(), self.0, speed, duplex)
        })
    }
}

/// Takes the names of counters, one after the other.
pub struct Strings<'a> {
    rest: &'a mut [u8],
}

impl Strings<'_> {
    /// Appends a name. What is too long is cut off, and what is too much is left out.
    pub fn push(&mut self, name: fmt::Arguments<'_>) {
        let rest = core::mem::take(&mut self.rest);
        if rest.len() < GSTRING {
            return;
        }
        let (slot, rest) = rest.split_at_mut(GSTRING);
        self.rest = rest;
        slot.fill(0);
        let mut writer = SlotWriter(&mut slot[..GSTRING - 1]);
        // It fails when the slot is full, and then the name is cut off.
        let _ = writer.write_fmt(name);
    }
}

struct SlotWriter<'a>(&'a mut [u8]);

impl Write for SlotWriter<'_> {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        let slot = core::mem::take(&mut self.0);
        if s.len() > slot.len() {
            return Err(fmt::Error);
        }
        let (to, rest) = slot.split_at_mut(s.len());
        to.copy_from_slice(s.as_bytes());
        self.0 = rest;
        Ok(())
    }
}

/// The operations.
pub trait Ethtool: Sized {
    /// Name of the driver.
    const NAME: &'static CStr;

    /// Version and number of the 32-bit registers that are dumped.
    const REGISTERS: (u32, usize);

    /// Size of the key of the receive hash, in bytes.
    const KEY_SIZE: usize;

    /// The registers.
    fn registers(dev: &Device<Self>, to: &mut [u32]);

    /// What goes to the log.
    fn message_level(dev: &Device<Self>) -> MessageLevel;

    /// Sets what goes to the log.
    fn set_message_level(dev: &Device<Self>, level: MessageLevel);

    /// Number of counters.
    fn num_stats(dev: &Device<Self>, rtnl: &Rtnl) -> Result<usize>;

    /// Names of the counters.
    fn stat_names(dev: &Device<Self>, to: &mut Strings<'_>, rtnl: &Rtnl);

    /// The counters.
    fn stat_values(dev: &Device<Self>, to: &mut [u64], rtnl: &Rtnl);

    /// Number of channels.
    fn channels(dev: &Device<Self>, rtnl: &Rtnl) -> Channels;

    /// Sets the number of channels.
    fn set_channels(dev: &Device<Self>, count: u32, rtnl: &Rtnl) -> Result;

    /// Sizes of the rings, `None` if there are none now.
    fn ring_sizes(dev: &Device<Self>, rtnl: &Rtnl) -> Option<RingSizes>;

    /// Sets the sizes of the rings.
    fn set_ring_sizes(dev: &Device<Self>, rx: u32, tx: u32, rtnl: &Rtnl) -> Result;

    /// Number of entries of the indirection table.
    fn table_size(dev: &Device<Self>, rtnl: &Rtnl) -> usize;

    /// Reads the receive hash; the function is Toeplitz's.
    fn rxfh(dev: &Device<Self>, to: &mut Rxfh<'_>, rtnl: &Rtnl) -> Result;

    /// Sets the receive hash.
    fn set_rxfh(dev: &Device<Self>, from: &mut Rxfh<'_>, rtnl: &Rtnl) -> Result;

    /// What is hashed of packets of a protocol.
    fn rxfh_fields(dev: &Device<Self>, protocol: L4) -> RxfhFields;

    /// Sets what is hashed of packets of a protocol.
    fn set_rxfh_fields(dev: &Device<Self>, protocol: L4, fields: RxfhFields) -> Result;

    /// Settings of the link.
    fn link_settings(dev: &Device<Self>, to: &mut LinkSettings<'_>, rtnl: &Rtnl) -> Result;

    /// Changes settings of the link.
    fn set_link_settings(dev: &Device<Self>, from: &LinkSettings<'_>, rtnl: &Rtnl) -> Result;
}

/// Bits for "source and destination address" of a hash.
const HASH_ADDRESSES: u32 = bindings::RXH_IP_SRC | bindings::RXH_IP_DST;
/// Bits for the ports.
const HASH_PORTS: u32 = bindings::RXH_L4_B_0_1 | bindings::RXH_L4_B_2_3;

/// The transport protocol of a flow type.
fn flow_protocol(flow_type: u32) -> Option<L4> {
    Some(match flow_type {
        bindings::TCP_V4_FLOW => L4::Tcp4,
        bindings::UDP_V4_FLOW => L4::Udp4,
        bindings::TCP_V6_FLOW => L4::Tcp6,
        bindings::UDP_V6_FLOW => L4::Udp6,
        _ => return None,
    })
}

/// The table of operations.
pub(crate) struct EthtoolOps<T>(PhantomData<T>);

impl<T: Driver> EthtoolOps<T> {
    pub(crate) const OPS: bindings::ethtool_ops = bindings::ethtool_ops {
        get_drvinfo: Some(Self::get_drvinfo),
        get_regs_len: Some(Self::get_regs_len),
        get_regs: Some(Self::get_regs),
        get_msglevel: Some(Self::get_msglevel),
        set_msglevel: Some(Self::set_msglevel),
        get_link: Some(bindings::ethtool_op_get_link),
        get_ethtool_stats: Some(Self::get_ethtool_stats),
        get_sset_count: Some(Self::get_sset_count),
        get_strings: Some(Self::get_strings),
        get_channels: Some(Self::get_channels),
        set_channels: Some(Self::set_channels),
        get_ts_info: Some(bindings::ethtool_op_get_ts_info),
        get_rx_ring_count: Some(Self::get_rx_ring_count),
        get_rxfh_key_size: Some(Self::get_rxfh_key_size),
        get_rxfh_indir_size: Some(Self::get_rxfh_indir_size),
        get_rxfh: Some(Self::get_rxfh),
        set_rxfh: Some(Self::set_rxfh),
        get_rxfh_fields: Some(Self::get_rxfh_fields),
        set_rxfh_fields: Some(Self::set_rxfh_fields),
        get_link_ksettings: Some(Self::get_link_ksettings),
        set_link_ksettings: Some(Self::set_link_ksettings),
        get_ringparam: Some(Self::get_ringparam),
        set_ringparam: Some(Self::set_ringparam),
        ..pin_init::zeroed()
    };

    /// # Safety
    ///
    /// Only to be called in an operation of the device `dev`.
    unsafe fn enter<'a>(dev: *mut bindings::net_device) -> (&'a Device<T>, Rtnl) {
        // SAFETY: The operations are those of a device of `UnregisteredDevice<T>`, which is
        // registered, and the core calls them with the RTNL held.
        unsafe { (Device::from_raw(dev), Rtnl::assume()) }
    }

    /// # Safety
    ///
    /// Only the core calls this, as `get_drvinfo` of a registered device of the driver `T`.
    unsafe extern "C" fn get_drvinfo(
        _dev: *mut bindings::net_device,
        info: *mut bindings::ethtool_drvinfo,
    ) {
        // SAFETY: The core gives a zeroed structure.
        let info = unsafe { &mut *info };
        let copy = |to: &mut [c_char], from: &CStr| {
            let room = to.len().saturating_sub(1);
            for (to, from) in to[..room].iter_mut().zip(from.to_bytes()) {
                *to = *from as c_char;
            }
        };
        copy(&mut info.driver, T::NAME);
        copy(&mut info.fw_version, c"N/A");
    }

    /// # Safety
    ///
    /// Only the core calls this, as `get_regs_len` of a registered device of the driver `T`.
    unsafe extern "C" fn get_regs_len(_dev: *mut bindings::net_device) -> c_int {
        (T::REGISTERS.1 * size_of::<u32>()) as c_int
    }

    /// # Safety
    ///
    /// Only the core calls this, as `get_regs` of a registered device of the driver `T`.
    unsafe extern "C" fn get_regs(
        dev: *mut bindings::net_device,
        regs: *mut bindings::ethtool_regs,
        to: *mut c_void,
    ) {
        // SAFETY: The core calls this in the right context. The buffer has the size that was told,
        // and is zeroed.
        unsafe {
            let (dev, _rtnl) = Self::enter(dev);
            (*regs).version = T::REGISTERS.0;
            T::registers(
                dev,
                core::slice::from_raw_parts_mut(to.cast::<u32>(), T::REGISTERS.1),
            );
        }
    }

    /// # Safety
    ///
    /// Only the core calls this, as `get_msglevel` of a registered device of the driver `T`.
    unsafe extern "C" fn get_msglevel(dev: *mut bindings::net_device) -> u32 {
        // SAFETY: The core calls this in the right context.
        let (dev, _rtnl) = unsafe { Self::enter(dev) };
        T::message_level(dev).0
    }

    /// # Safety
    ///
    /// Only the core calls this, as `set_msglevel` of a registered device of the driver `T`.
    unsafe extern "C" fn set_msglevel(dev: *mut bindings::net_device, level: u32) {
        // SAFETY: The core calls this in the right context.
        let (dev, _rtnl) = unsafe { Self::enter(dev) };
        T::set_message_level(dev, MessageLevel(level));
    }

    /// # Safety
    ///
    /// Only the core calls this, as `get_sset_count` of a registered device of the driver `T`.
    unsafe extern "C" fn get_sset_count(dev: *mut bindings::net_device, set: c_int) -> c_int {
        // SAFETY: The core calls this in the right context.
        let (dev, rtnl) = unsafe { Self::enter(dev) };
        from_result(|| {
            let count = T::num_stats(dev, &rtnl)?;
            if set as u32 != bindings::ethtool_stringset_ETH_SS_STATS {
                return Err(EINVAL);
            }
            Ok(c_int::try_from(count)?)
        })
    }

    /// # Safety
    ///
    /// Only the core calls this, as `get_strings` of a registered device of the driver `T`.
    unsafe extern "C" fn get_strings(dev: *mut bindings::net_device, set: u32, to: *mut u8) {
        // SAFETY: The core calls this in the right context.
        let (dev, rtnl) = unsafe { Self::enter(dev) };
        let Ok(count) = T::num_stats(dev, &rtnl) else {
            return;
        };
        if set != bindings::ethtool_stringset_ETH_SS_STATS {
            return;
        }
        // SAFETY: The core has asked for the number of strings under the same RTNL and given a
        // zeroed buffer for them.
        let rest = unsafe { core::slice::from_raw_parts_mut(to, count * GSTRING) };
        T::stat_names(dev, &mut Strings { rest }, &rtnl);
    }

    /// # Safety
    ///
    /// Only the core calls this, as `get_ethtool_stats` of a registered device of the driver `T`.
    unsafe extern "C" fn get_ethtool_stats(
        dev: *mut bindings::net_device,
        stats: *mut bindings::ethtool_stats,
        to: *mut u64,
    ) {
        // SAFETY: The core calls this in the right context, with a buffer for as many counters as
        // the structure says.
        unsafe {
            let (dev, rtnl) = Self::enter(dev);
            let count = (*stats).n_stats as usize;
            if count != 0 {
                T::stat_values(dev, core::slice::from_raw_parts_mut(to, count), &rtnl);
            }
        }
    }

    /// # Safety
    ///
    /// Only the core calls this, as `get_channels` of a registered device of the driver `T`.
    unsafe extern "C" fn get_channels(
        dev: *mut bindings::net_device,
        to: *mut bindings::ethtool_channels,
    ) {
        // SAFETY: The core calls this in the right context.
        let (dev, rtnl) = unsafe { Self::enter(dev) };
        let channels = T::channels(dev, &rtnl);
        // SAFETY: The core gives a valid structure.
        unsafe {
            (*to).max_combined = channels.max;
            (*to).combined_count = channels.count;
        }
    }

    /// # Safety
    ///
    /// Only the core calls this, as `set_channels` of a registered device of the driver `T`.
    unsafe extern "C" fn set_channels(
        dev: *mut bindings::net_device,
        from: *mut bindings::ethtool_channels,
    ) -> c_int {
        // SAFETY: The core calls this in the right context, with a valid structure.
        let ((dev, rtnl), from) = unsafe { (Self::enter(dev), &*from) };
        from_result(|| {
            if from.combined_count == 0
                || from.rx_count != 0
                || from.tx_count != 0
                || from.other_count != 0
            {
                return Err(EINVAL);
            }
            T::set_channels(dev, from.combined_count, &rtnl).map(|()| 0)
        })
    }

    /// # Safety
    ///
    /// Only the core calls this, as `get_rx_ring_count` of a registered device of the driver `T`.
    unsafe extern "C" fn get_rx_ring_count(dev: *mut bindings::net_device) -> u32 {
        // SAFETY: The core calls this in the right context.
        let (dev, rtnl) = unsafe { Self::enter(dev) };
        T::channels(dev, &rtnl).count
    }

    /// # Safety
    ///
    /// Only the core calls this, as `get_rxfh_key_size` of a registered device of the driver `T`.
    unsafe extern "C" fn get_rxfh_key_size(_dev: *mut bindings::net_device) -> u32 {
        T::KEY_SIZE as u32
    }

    /// # Safety
    ///
    /// Only the core calls this, as `get_rxfh_indir_size` of a registered device of the driver `T`.
    unsafe extern "C" fn get_rxfh_indir_size(dev: *mut bindings::net_device) -> u32 {
        // SAFETY: The core calls this in the right context.
        let (dev, rtnl) = unsafe { Self::enter(dev) };
        T::table_size(dev, &rtnl) as u32
    }

    /// # Safety
    ///
    /// `param` must be valid, with tables of the sizes that the driver told under the same RTNL.
    unsafe fn rxfh_param<'a>(
        param: *mut bindings::ethtool_rxfh_param,
        dev: &Device<T>,
        rtnl: &Rtnl,
    ) -> Rxfh<'a> {
        // INVARIANT: By the safety requirements.
        Rxfh {
            param,
            indir_size: T::table_size(dev, rtnl),
            key_size: T::KEY_SIZE,
            _param: PhantomData,
        }
    }

    /// # Safety
    ///
    /// Only the core calls this, as `get_rxfh` of a registered device of the driver `T`.
    unsafe extern "C" fn get_rxfh(
        dev: *mut bindings::net_device,
        param: *mut bindings::ethtool_rxfh_param,
    ) -> c_int {
        // SAFETY: The core calls this in the right context, with tables of the sizes it asked for.
        let (dev, rtnl, mut rxfh) = unsafe {
            (*param).hfunc = HASH_TOEPLITZ;
            let (dev, rtnl) = Self::enter(dev);
            let rxfh = Self::rxfh_param(param, dev, &rtnl);
            (dev, rtnl, rxfh)
        };
        from_result(|| T::rxfh(dev, &mut rxfh, &rtnl).map(|()| 0))
    }

    /// # Safety
    ///
    /// Only the core calls this, as `set_rxfh` of a registered device of the driver `T`.
    unsafe extern "C" fn set_rxfh(
        dev: *mut bindings::net_device,
        param: *mut bindings::ethtool_rxfh_param,
        _extack: *mut bindings::netlink_ext_ack,
    ) -> c_int {
        // SAFETY: The core calls this in the right context, with tables of the sizes it asked for.
        let (dev, rtnl, mut rxfh) = unsafe {
            let (dev, rtnl) = Self::enter(dev);
            let rxfh = Self::rxfh_param(param, dev, &rtnl);
            (dev, rtnl, rxfh)
        };
        from_result(|| T::set_rxfh(dev, &mut rxfh, &rtnl).map(|()| 0))
    }

    /// # Safety
    ///
    /// Only the core calls this, as `get_rxfh_fields` of a registered device of the driver `T`.
    unsafe extern "C" fn get_rxfh_fields(
        dev: *mut bindings::net_device,
        info: *mut bindings::ethtool_rxfh_fields,
    ) -> c_int {
        // SAFETY: The core calls this in the right context, with a valid structure.
        let ((dev, _rtnl), info) = unsafe { (Self::enter(dev), &mut *info) };
        info.data = match (flow_protocol(info.flow_type), info.flow_type) {
            (Some(protocol), _) => match T::rxfh_fields(dev, protocol) {
                RxfhFields::Addresses => HASH_ADDRESSES,
                RxfhFields::AddressesAndPorts => HASH_ADDRESSES | HASH_PORTS,
            },
            (None, bindings::IPV4_FLOW | bindings::IPV6_FLOW) => HASH_ADDRESSES,
            _ => 0,
        };
        0
    }

    /// # Safety
    ///
    /// Only the core calls this, as `set_rxfh_fields` of a registered device of the driver `T`.
    unsafe extern "C" fn set_rxfh_fields(
        dev: *mut bindings::net_device,
        info: *const bindings::ethtool_rxfh_fields,
        _extack: *mut bindings::netlink_ext_ack,
    ) -> c_int {
        // SAFETY: The core calls this in the right context, with a valid structure.
        let ((dev, _rtnl), info) = unsafe { (Self::enter(dev), &*info) };
        from_result(|| {
            let protocol = flow_protocol(info.flow_type).ok_or_else(eopnotsupp)?;
            let fields = if info.data == HASH_ADDRESSES {
                RxfhFields::Addresses
            } else if info.data == HASH_ADDRESSES | HASH_PORTS {
                RxfhFields::AddressesAndPorts
            } else {
                return Err(eopnotsupp());
            };
            T::set_rxfh_fields(dev, protocol, fields).map(|()| 0)
        })
    }

    /// # Safety
    ///
    /// Only the core calls this, as `get_link_ksettings` of a registered device of the driver `T`.
    unsafe extern "C" fn get_link_ksettings(
        dev: *mut bindings::net_device,
        to: *mut bindings::ethtool_link_ksettings,
    ) -> c_int {
        // SAFETY: The core calls this in the right context.
        let (dev, rtnl) = unsafe { Self::enter(dev) };
        from_result(|| T::link_settings(dev, &mut LinkSettings(to, PhantomData), &rtnl).map(|()| 0))
    }

    /// # Safety
    ///
    /// Only the core calls this, as `set_link_ksettings` of a registered device of the driver `T`.
    unsafe extern "C" fn set_link_ksettings(
        dev: *mut bindings::net_device,
        from: *const bindings::ethtool_link_ksettings,
    ) -> c_int {
        // SAFETY: The core calls this in the right context.
        let (dev, rtnl) = unsafe { Self::enter(dev) };
        from_result(|| {
            let from = LinkSettings(from.cast_mut(), PhantomData);
            T::set_link_settings(dev, &from, &rtnl).map(|()| 0)
        })
    }

    /// # Safety
    ///
    /// Only the core calls this, as `get_ringparam` of a registered device of the driver `T`.
    unsafe extern "C" fn get_ringparam(
        dev: *mut bindings::net_device,
        to: *mut bindings::ethtool_ringparam,
        _kernel: *mut bindings::kernel_ethtool_ringparam,
        _extack: *mut bindings::netlink_ext_ack,
    ) {
        // SAFETY: The core calls this in the right context.
        let (dev, rtnl) = unsafe { Self::enter(dev) };
        let Some(sizes) = T::ring_sizes(dev, &rtnl) else {
            return;
        };
        // SAFETY: The core gives a valid structure.
        unsafe {
            (*to).rx_pending = sizes.rx;
            (*to).rx_max_pending = sizes.rx_max;
            (*to).tx_pending = sizes.tx;
            (*to).tx_max_pending = sizes.tx_max;
        }
    }

    /// # Safety
    ///
    /// Only the core calls this, as `set_ringparam` of a registered device of the driver `T`.
    unsafe extern "C" fn set_ringparam(
        dev: *mut bindings::net_device,
        from: *mut bindings::ethtool_ringparam,
        _kernel: *mut bindings::kernel_ethtool_ringparam,
        _extack: *mut bindings::netlink_ext_ack,
    ) -> c_int {
        // SAFETY: The core calls this in the right context, with a valid structure.
        let ((dev, rtnl), from) = unsafe { (Self::enter(dev), &*from) };
        from_result(|| T::set_ring_sizes(dev, from.rx_pending, from.tx_pending, &rtnl).map(|()| 0))
    }
}
