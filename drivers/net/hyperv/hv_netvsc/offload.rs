// SPDX-License-Identifier: GPL-2.0

//! What the adapter can do, and what of it is switched on.

use core::iter::repeat_n;

use hyperv_wire::{
    ndis::{
        self,
        ChecksumOffload,
        LargeSendV2Offload,
        Offload,
        OffloadParameters,
        Oid,
        RssCapabilities, //
    },
    nvsp::Version, //
};
use kernel::{
    prelude::*,
    sync::atomic::Relaxed, //
};
use net::{
    netdev_err,
    netdev_warn,
    Device,
    Features,
    Rtnl,
    L4, //
};
use zerocopy::IntoBytes;

use crate::{
    config,
    connection::Shared,
    device::Netvsc,
    rndis,
    tx::checksum_bit, //
};

/// Largest TCP packet that the driver has segmented.
const GSO_MAX: u32 = 65536;

/// The name that the host gives to adapters without a name.
const GENERIC_NAME: &[u8] = b"Network Adapter";

/// Entries of the indirection table, if the host does not say.
const TABLE_SIZE: usize = 128;

/// All features that depend on the host.
const HOST_FEATURES: Features = Features::SG
    .with(Features::RXCSUM)
    .with(Features::RXHASH)
    .with(Features::IP_CSUM)
    .with(Features::IPV6_CSUM)
    .with(Features::TSO)
    .with(Features::TSO6)
    .with(Features::LRO);

/// Finds out about the adapter, and switches on what is used. Returns its permanent address.
pub(crate) fn set_up(
    dev: &Device<Netvsc>,
    shared: &Shared,
    rtnl: &Rtnl,
) -> Result<[u8; net::ETH_ALEN]> {
    if let Ok(mtu) = rndis::query_u32(shared, Oid::GEN_MAXIMUM_FRAME_SIZE) {
        if mtu < dev.mtu() {
            dev.set_mtu(mtu, rtnl);
        }
    }
    let address = rndis::query(shared, Oid::PERMANENT_ADDRESS, &[], |info| {
        info.first_chunk().copied().ok_or_else(net::eproto)
    })?;
    if !dev.has_alias(rtnl) {
        // A host without names is none the worse.
        let _ = set_alias(dev, shared, rtnl);
    }
    set_up_offloads(dev, shared, rtnl)?;
    if let Ok(status) = rndis::query_u32(shared, Oid::GEN_MEDIA_CONNECT_STATUS) {
        shared
            .link_down
            .store(status != ndis::MEDIA_CONNECTED, Relaxed);
    }

    let mut table_size = 0;
    if shared.version() >= Version::V5 {
        if let Ok(speed) = rndis::query_u32(shared, Oid::GEN_LINK_SPEED) {
            dev.data().link.set_speed(speed);
        }
        let request = RssCapabilities::request();
        let capabilities = rndis::query(
            shared,
            Oid::GEN_RECEIVE_SCALE_CAPABILITIES,
            request.as_bytes(),
            |info| RssCapabilities::read(info).map_err(|_| net::eproto()),
        );
        if let Ok(capabilities) = capabilities {
            let queues = capabilities.num_queues.get();
            if queues >= 2 {
                let possible = queues.min(net::online_cpus()).min(config::CHANNELS_MAX);
                shared.max_queues.store(possible, Relaxed);
                table_size = match usize::from(capabilities.num_table_entries.get()) {
                    size @ 1..=ndis::MAX_TABLE_ENTRIES => size,
                    _ => TABLE_SIZE,
                };
            }
        }
    }
    let mut rss = dev.data().rss.lock();
    if rss.table.len() != table_size {
        rss.table.clear();
        rss.table.reserve(table_size, GFP_KERNEL)?;
        for entry in repeat_n(0, table_size) {
            rss.table.push(entry, GFP_KERNEL)?;
        }
    }
    Ok(address)
}

/// Makes the name that the host's administrator gave to the adapter the alias of the device.
fn set_alias(dev: &Device<Netvsc>, shared: &Shared, rtnl: &Rtnl) -> Result {
    let mut alias = KVec::new();
    rndis::query(shared, Oid::GEN_FRIENDLY_NAME, &[], |info| {
        let units = info
            .chunks_exact(2)
            .map(|unit| u16::from_le_bytes([unit[0], unit[1]]))
            .take_while(|&unit| unit != 0);
        for char in char::decode_utf16(units) {
            let char = char.unwrap_or(char::REPLACEMENT_CHARACTER);
            let mut bytes = [0; 4];
            alias.extend_from_slice(char.encode_utf8(&mut bytes).as_bytes(), GFP_KERNEL)?;
        }
        Ok(())
    })?;
    if !alias.is_empty() && &alias[..] != GENERIC_NAME {
        dev.set_default_alias(&alias, rtnl);
    }
    Ok(())
}

/// Sends offload parameters.
fn set_parameters(
    dev: &Device<Netvsc>,
    shared: &Shared,
    mut parameters: OffloadParameters,
) -> Result {
    let version = shared.version();
    if version <= Version::V4 {
        parameters.udp_ipv4_checksum = 0;
        parameters.udp_ipv6_checksum = 0;
    }
    let len = parameters.finish(version);
    let bytes = parameters.as_bytes().get(..len).ok_or(EINVAL)?;
    let status = rndis::set(shared, Oid::TCP_OFFLOAD_PARAMETERS, bytes)?;
    if status != 0 {
        netdev_err!(dev, "Fail to set offload on host side:{:#x}\n", status);
        return Err(EINVAL);
    }
    Ok(())
}

/// Receive segment coalescing, on or off.
fn coalescing(on: bool) -> u8 {
    if on {
        OffloadParameters::RSC_ENABLED
    } else {
        OffloadParameters::RSC_DISABLED
    }
}

/// Switches receive segment coalescing.
pub(crate) fn set_coalescing(dev: &Device<Netvsc>, shared: &Shared, on: bool) -> Result {
    set_parameters(
        dev,
        shared,
        OffloadParameters {
            rsc_ipv4: coalescing(on),
            rsc_ipv6: coalescing(on),
            ..OffloadParameters::default()
        },
    )
}

fn contains(capabilities: u32, wanted: u32) -> bool {
    capabilities & wanted == wanted
}

/// Switches on what host and driver can do both.
fn set_up_offloads(dev: &Device<Netvsc>, shared: &Shared, rtnl: &Rtnl) -> Result {
    let request = Offload::request(shared.version());
    let len = usize::from(request.header.size.get());
    let info = request.as_bytes().get(..len).ok_or(EINVAL)?;
    let capabilities = rndis::query(
        shared,
        Oid::TCP_OFFLOAD_HARDWARE_CAPABILITIES,
        info,
        |answer| {
            Offload::read(answer).map_err(|e| {
                netdev_warn!(dev, "{}\n", net::Shown(e));
                EINVAL
            })
        },
    )?;

    let mut features = Features::SG | Features::RXCSUM | Features::RXHASH;
    let mut checksums = 0;
    let mut gso_max = GSO_MAX;
    let mut parameters = OffloadParameters {
        // The kernel computes the checksum of the IPv4 header itself.
        ipv4_checksum: OffloadParameters::CHECKSUM_DISABLED,
        ..OffloadParameters::default()
    };

    let ipv4 = capabilities.checksum.ipv4_tx.get();
    let segment = &capabilities.large_send_v2;
    if contains(ipv4, ChecksumOffload::TCP | ChecksumOffload::TCP_OPTIONS) {
        features = features | Features::IP_CSUM;
        checksums |= checksum_bit(L4::Tcp4);
        parameters.tcp_ipv4_checksum = OffloadParameters::CHECKSUM_TX_RX;
        if contains(segment.ipv4_encapsulation.get(), ndis::ENCAPSULATION_8023) {
            features = features | Features::TSO;
            parameters.large_send_v2_ipv4 = OffloadParameters::LARGE_SEND_ENABLED;
            gso_max = gso_max.min(segment.ipv4_max_size.get());
        }
        if contains(ipv4, ChecksumOffload::UDP) {
            checksums |= checksum_bit(L4::Udp4);
            parameters.udp_ipv4_checksum = OffloadParameters::CHECKSUM_TX_RX;
        }
    }

    let ipv6 = capabilities.checksum.ipv6_tx.get();
    let needed = ChecksumOffload::TCP | ChecksumOffload::TCP_OPTIONS | ChecksumOffload::IP_OPTIONS;
    if contains(ipv6, needed) {
        features = features | Features::IPV6_CSUM;
        checksums |= checksum_bit(L4::Tcp6);
        parameters.tcp_ipv6_checksum = OffloadParameters::CHECKSUM_TX_RX;
        let options =
            LargeSendV2Offload::IPV6_EXTENSION_HEADERS | LargeSendV2Offload::IPV6_TCP_OPTIONS;
        if contains(segment.ipv6_encapsulation.get(), ndis::ENCAPSULATION_8023)
            && contains(segment.ipv6_options.get(), options)
        {
            features = features | Features::TSO6;
            parameters.large_send_v2_ipv6 = OffloadParameters::LARGE_SEND_ENABLED;
            gso_max = gso_max.min(segment.ipv6_max_size.get());
        }
        if contains(ipv6, ChecksumOffload::UDP) {
            checksums |= checksum_bit(L4::Udp6);
            parameters.udp_ipv6_checksum = OffloadParameters::CHECKSUM_TX_RX;
        }
    }

    if capabilities.rsc.ipv4 != 0 && capabilities.rsc.ipv6 != 0 {
        features = features | Features::LRO;
        let on = coalescing(dev.features().contains(Features::LRO));
        parameters.rsc_ipv4 = on;
        parameters.rsc_ipv6 = on;
    }
    if shared.version() <= Version::V4 {
        // Those hosts do not compute checksums of UDP.
        checksums &= !(checksum_bit(L4::Udp4) | checksum_bit(L4::Udp6));
    }

    let others = dev.hw_features(rtnl) & !HOST_FEATURES;
    dev.set_hw_features(others | features, rtnl);
    // What the host cannot do any more is off.
    dev.set_active_features(dev.features() & (!HOST_FEATURES | features), rtnl);
    dev.data().tx_checksums.store(checksums, Relaxed);
    shared.gso_max.store(gso_max, Relaxed);
    dev.set_tso_max_size(gso_max, rtnl);
    set_parameters(dev, shared, parameters)
}
