// SPDX-License-Identifier: GPL-2.0

//! RNDIS control messages: the objects that the guest's driver reads and writes.

use hyperv_wire::ndis::{
    self, ChecksumOffload, LargeSendV2Offload, ObjectHeader, Offload, OffloadParameters, Oid,
    PacketFilter, RssCapabilities, RssParameters, ENCAPSULATION_8023,
};
use hyperv_wire::nvsp::{Capabilities, Version};
use hyperv_wire::rndis::{self, ConfigParameter, Message, MessageType, Status};
use vmbus_host::Direction;
use zerocopy::little_endian::{U16, U32};
use zerocopy::IntoBytes;

use crate::config::FaultPoint;
use crate::device::lock;
use crate::frame::ETHERNET_HEADER;
use crate::receive::RxOffloads;
use crate::rss::Distribution;
use crate::worker::{Answer, Worker};

/// Most packets in one NVSP message.
const MAX_PACKETS: u32 = 8;

/// Alignment of packets in one NVSP message, as a power of two.
const ALIGNMENT: u32 = 3;

/// Longest message from the guest.
const MAX_TRANSFER: u32 = 0xefff_ffff;

/// Largest packet for large send offload, as hosts on Azure have it.
const MAX_LARGE_SEND: u32 = 62_780;

/// Entries of the RSS indirection table.
const RSS_TABLE: u16 = 128;

/// A link speed in the unit of NDIS.
pub(crate) fn link_speed_units(mbps: u32) -> u32 {
    mbps.saturating_mul(1_000_000 / ndis::LINK_SPEED_UNIT)
}

impl Worker {
    /// Handles a control message.
    pub(crate) fn control(&mut self, bytes: &[u8]) -> Result<(), rndis::Error> {
        let message = Message::parse(bytes)?;
        let name = format!("RNDIS_{}", message.message_type);
        self.postpone_vf();
        match message.message_type {
            MessageType::INITIALIZE => {
                let request: rndis::Initialize = message.body_as("initialize request")?;
                self.record_message(
                    Direction::GuestToHost,
                    &name,
                    format_args!(
                        "version={}.{} max_transfer={:#x}",
                        request.major_version.get(),
                        request.minor_version.get(),
                        request.max_transfer_size.get()
                    ),
                    bytes,
                );
                self.initialize(&request);
            }
            MessageType::HALT => {
                self.record_message(Direction::GuestToHost, &name, "", bytes);
                self.shared.stop();
            }
            MessageType::QUERY | MessageType::SET => {
                let request = message.object_request()?;
                let (set, oid) = (message.message_type == MessageType::SET, request.oid);
                self.record_message(
                    Direction::GuestToHost,
                    &name,
                    format_args!("oid={oid} length={}", request.info.len()),
                    bytes,
                );
                let outcome = if set && self.refuses(FaultPoint::Rndis(MessageType::SET)) {
                    Err(Status::FAILURE)
                } else if set {
                    self.set(oid, request.info).map(|()| Vec::new())
                } else {
                    self.query(oid, request.info)
                };
                let (status, info) = match outcome {
                    Ok(info) => (Status::SUCCESS, info),
                    Err(status) => (status, Vec::new()),
                };
                let points = [
                    FaultPoint::Rndis(message.message_type),
                    FaultPoint::Object(oid),
                ];
                let mut buffer = vec![0; 64 + info.len()];
                let (name, length) = if set {
                    let body = rndis::SetComplete {
                        request_id: U32::new(request.request_id),
                        status: U32::new(status.0),
                    };
                    (
                        "RNDIS_SET_COMPLETE",
                        rndis::encode(MessageType::SET_COMPLETE, &body, &[], &mut buffer)?,
                    )
                } else {
                    (
                        "RNDIS_QUERY_COMPLETE",
                        rndis::encode_query_complete(
                            request.request_id,
                            status,
                            &info,
                            &mut buffer,
                        )?,
                    )
                };
                self.record(
                    Direction::HostToGuest,
                    name,
                    format_args!("oid={oid} status={:#x} length={}", status.0, info.len()),
                );
                buffer.truncate(length);
                self.answer(&points, Answer::Control(buffer));
            }
            MessageType::RESET => {
                self.record_message(Direction::GuestToHost, &name, "", bytes);
                let body = rndis::ResetComplete {
                    status: U32::new(Status::SUCCESS.0),
                    addressing_reset: U32::ZERO,
                };
                self.answer_with(MessageType::RESET, MessageType::RESET_COMPLETE, &body)?;
            }
            MessageType::KEEPALIVE => {
                self.record_message(Direction::GuestToHost, &name, "", bytes);
                let body = rndis::KeepaliveComplete {
                    request_id: U32::new(message.request_id()?),
                    status: U32::new(Status::SUCCESS.0),
                };
                self.answer_with(
                    MessageType::KEEPALIVE,
                    MessageType::KEEPALIVE_COMPLETE,
                    &body,
                )?;
            }
            other => return Err(rndis::Error::UnexpectedType(other)),
        }
        Ok(())
    }

    fn answer_with<B: IntoBytes + zerocopy::Immutable>(
        &mut self,
        request: MessageType,
        answer: MessageType,
        body: &B,
    ) -> Result<(), rndis::Error> {
        let mut buffer = vec![0; 64];
        let length = rndis::encode(answer, body, &[], &mut buffer)?;
        buffer.truncate(length);
        self.answer(&[FaultPoint::Rndis(request)], Answer::Control(buffer));
        Ok(())
    }

    fn initialize(&mut self, request: &rndis::Initialize) {
        let status = if request.major_version.get() == rndis::MAJOR_VERSION {
            self.shared.receive().start();
            self.postpone_vf();
            Status::SUCCESS
        } else {
            Status::BAD_VERSION
        };
        let settings = self.shared.settings();
        let body = rndis::InitializeComplete {
            request_id: request.request_id,
            status: U32::new(status.0),
            major_version: U32::new(rndis::MAJOR_VERSION),
            minor_version: U32::new(rndis::MINOR_VERSION),
            device_flags: U32::new(1),
            max_packets_per_message: U32::new(settings.packets_per_message.unwrap_or(MAX_PACKETS)),
            max_transfer_size: U32::new(MAX_TRANSFER),
            packet_alignment_factor: U32::new(settings.packet_alignment.unwrap_or(ALIGNMENT)),
            ..rndis::InitializeComplete::default()
        };
        self.record(
            Direction::HostToGuest,
            "RNDIS_INITIALIZE_COMPLETE",
            format_args!("status={:#x}", status.0),
        );
        // The buffer is long enough.
        let _ = self.answer_with(
            MessageType::INITIALIZE,
            MessageType::INITIALIZE_COMPLETE,
            &body,
        );
    }

    fn negotiated(&self) -> (Version, u32, Capabilities) {
        self.session
            .as_ref()
            .map_or((Version::V1, 1514, Capabilities::default()), |session| {
                (session.version, session.max_frame, session.capabilities)
            })
    }

    /// Reads an object.
    fn query(&self, oid: Oid, info: &[u8]) -> Result<Vec<u8>, Status> {
        let (version, max_frame, capabilities) = self.negotiated();
        let config = &self.shared.config;
        let word = |value: u32| Ok(value.to_le_bytes().to_vec());
        match oid {
            Oid::GEN_SUPPORTED_LIST => Ok(SUPPORTED
                .iter()
                .flat_map(|oid| oid.0.to_le_bytes())
                .collect()),
            // Ready, and Ethernet.
            Oid::GEN_HARDWARE_STATUS
            | Oid::GEN_MEDIA_SUPPORTED
            | Oid::GEN_MEDIA_IN_USE
            | Oid::GEN_PHYSICAL_MEDIUM => word(0),
            Oid::GEN_MAXIMUM_FRAME_SIZE => word(max_frame - ETHERNET_HEADER as u32),
            Oid::GEN_MAXIMUM_TOTAL_SIZE => word(max_frame),
            Oid::GEN_LINK_SPEED => word(link_speed_units(lock(&self.shared.wanted).link_speed)),
            Oid::GEN_MEDIA_CONNECT_STATUS => word(if lock(&self.shared.wanted).link {
                ndis::MEDIA_CONNECTED
            } else {
                ndis::MEDIA_DISCONNECTED
            }),
            Oid::GEN_CURRENT_PACKET_FILTER => word(self.shared.receive().filter().0),
            // The prefix of the vendor's addresses.
            Oid::GEN_VENDOR_ID => word(0x0000_5d15),
            Oid::GEN_VENDOR_DESCRIPTION => Ok(b"Microsoft Hyper-V Network Adapter\0".to_vec()),
            Oid::PERMANENT_ADDRESS => Ok(config.mac.to_vec()),
            Oid::CURRENT_ADDRESS => Ok(self.shared.port.mac().to_vec()),
            Oid::MAXIMUM_LIST_SIZE => word(32),
            // With its end: drivers read up to that.
            Oid::GEN_FRIENDLY_NAME => Ok(config
                .friendly_name
                .encode_utf16()
                .take(255)
                .chain([0])
                .flat_map(u16::to_le_bytes)
                .collect()),
            Oid::TCP_OFFLOAD_HARDWARE_CAPABILITIES | Oid::TCP_OFFLOAD_CURRENT_CONFIG => {
                Ok(self.offload(version, capabilities, info))
            }
            Oid::GEN_RECEIVE_SCALE_CAPABILITIES if version >= Version::V5 => {
                let entries = self.shared.settings().rss_entries;
                let entries = entries.unwrap_or(RSS_TABLE.into());
                let caps = RssCapabilities {
                    flags: U32::new(
                        RssCapabilities::HASH_TOEPLITZ
                            | RssCapabilities::HASH_TCP_IPV4
                            | RssCapabilities::HASH_TCP_IPV6,
                    ),
                    num_interrupts: U32::new(config.max_channels.into()),
                    num_queues: U32::new(config.max_channels.into()),
                    num_table_entries: U16::new(entries as u16),
                    ..RssCapabilities::request()
                };
                Ok(caps.as_bytes().to_vec())
            }
            _ => Err(Status::NOT_SUPPORTED),
        }
    }

    /// The offload capabilities, in the revision that the guest asks for.
    fn offload(&self, version: Version, capabilities: Capabilities, info: &[u8]) -> Vec<u8> {
        let config = &self.shared.config;
        let mut offload = match Offload::read(info) {
            Ok(request) => Offload {
                header: request.header,
                ..Offload::default()
            },
            Err(_) => Offload::request(version),
        };
        let (_, largest) = Offload::revision(Version::V61);
        let size = usize::from(offload.header.size.get()).min(largest);
        let settings = self.shared.settings();
        let encapsulation = U32::new(ENCAPSULATION_8023);
        if config.checksum {
            let transport = ChecksumOffload::TCP | ChecksumOffload::UDP;
            let options = ChecksumOffload::IP_OPTIONS | ChecksumOffload::TCP_OPTIONS;
            let ipv4 = transport | options | ChecksumOffload::IP_HEADER;
            let ipv4 = U32::new(settings.checksum_v4.unwrap_or(ipv4));
            let ipv6 = transport | options;
            let ipv6 = U32::new(settings.checksum_v6.unwrap_or(ipv6));
            offload.checksum = ChecksumOffload {
                ipv4_tx_encapsulation: encapsulation,
                ipv4_tx: ipv4,
                ipv4_rx_encapsulation: encapsulation,
                ipv4_rx: ipv4,
                ipv6_tx_encapsulation: encapsulation,
                ipv6_tx: ipv6,
                ipv6_rx_encapsulation: encapsulation,
                ipv6_rx: ipv6,
            };
        }
        if config.large_send {
            let v4 = settings.large_send_v4.unwrap_or(MAX_LARGE_SEND);
            let v6 = settings.large_send_v6.unwrap_or(MAX_LARGE_SEND);
            let options =
                LargeSendV2Offload::IPV6_EXTENSION_HEADERS | LargeSendV2Offload::IPV6_TCP_OPTIONS;
            offload.large_send_v2 = LargeSendV2Offload {
                ipv4_encapsulation: if v4 > 0 { encapsulation } else { U32::ZERO },
                ipv4_max_size: U32::new(v4),
                ipv4_min_segments: U32::new(2),
                ipv6_encapsulation: if v6 > 0 { encapsulation } else { U32::ZERO },
                ipv6_max_size: U32::new(v6),
                ipv6_min_segments: U32::new(2),
                ipv6_options: U32::new(settings.large_send_v6_options.unwrap_or(options)),
            };
        }
        if self.offers_rsc(version, capabilities) {
            let families = settings.rsc.unwrap_or(3);
            offload.rsc.ipv4 = (families & 1) as u8;
            offload.rsc.ipv6 = ((families >> 1) & 1) as u8;
        }
        offload.as_bytes()[..size].to_vec()
    }

    fn offers_rsc(&self, version: Version, capabilities: Capabilities) -> bool {
        self.shared.config.rsc
            && version >= Version::V61
            && capabilities.contains(Capabilities::RSC)
    }

    /// Writes an object.
    fn set(&mut self, oid: Oid, info: &[u8]) -> Result<(), Status> {
        match oid {
            Oid::GEN_CURRENT_PACKET_FILTER => {
                let bytes = info.first_chunk().ok_or(Status::INVALID_LENGTH)?;
                let filter = PacketFilter(u32::from_le_bytes(*bytes));
                self.record(
                    Direction::Host,
                    "PACKET_FILTER",
                    format_args!("filter={:#x}", filter.0),
                );
                self.shared.set_filter(filter);
                if filter != PacketFilter::default() {
                    self.vf_ready_now();
                }
                Ok(())
            }
            Oid::TCP_OFFLOAD_PARAMETERS => self.set_offloads(info),
            Oid::GEN_RECEIVE_SCALE_PARAMETERS => self.set_rss(info),
            Oid::GEN_RNDIS_CONFIG_PARAMETER => {
                match ConfigParameter::parse_mac(info) {
                    Ok(Some(mac)) if mac[0] & 1 == 0 && mac != [0; 6] => {
                        let text = mac.map(|byte| format!("{byte:02x}")).join(":");
                        self.record(Direction::Host, "ADDRESS", format_args!("mac={text}"));
                        self.shared.set_mac(mac);
                        Ok(())
                    }
                    Ok(Some(_)) => Err(Status::INVALID_DATA),
                    // A parameter that this device does not have changes nothing.
                    Ok(None) => Ok(()),
                    Err(_) => Err(Status::INVALID_LENGTH),
                }
            }
            // The filter lets all multicast packets pass.
            Oid::MULTICAST_LIST if info.len() % 6 == 0 => Ok(()),
            Oid::MULTICAST_LIST => Err(Status::INVALID_LENGTH),
            _ => Err(Status::NOT_SUPPORTED),
        }
    }

    fn set_offloads(&mut self, info: &[u8]) -> Result<(), Status> {
        let (version, _, capabilities) = self.negotiated();
        let parameters = OffloadParameters::read(info).map_err(|_| Status::INVALID_DATA)?;
        let checksum = |value, now: bool| match value {
            0 => Ok(now),
            OffloadParameters::CHECKSUM_DISABLED | OffloadParameters::CHECKSUM_TX => Ok(false),
            OffloadParameters::CHECKSUM_RX | OffloadParameters::CHECKSUM_TX_RX => Ok(true),
            _ => Err(Status::INVALID_DATA),
        };
        let rsc = |value, now: bool| match value {
            0 => Ok(now),
            OffloadParameters::RSC_DISABLED => Ok(false),
            OffloadParameters::RSC_ENABLED => Ok(self.offers_rsc(version, capabilities)),
            _ => Err(Status::INVALID_DATA),
        };
        let now = self.shared.receive().offloads;
        let offloads = RxOffloads {
            tcp_v4: checksum(parameters.tcp_ipv4_checksum, now.tcp_v4)?,
            tcp_v6: checksum(parameters.tcp_ipv6_checksum, now.tcp_v6)?,
            udp_v4: checksum(parameters.udp_ipv4_checksum, now.udp_v4)?,
            udp_v6: checksum(parameters.udp_ipv6_checksum, now.udp_v6)?,
            rsc_v4: rsc(parameters.rsc_ipv4, now.rsc_v4)?,
            rsc_v6: rsc(parameters.rsc_ipv6, now.rsc_v6)?,
        };
        self.record(Direction::Host, "OFFLOADS", format_args!("{offloads:?}"));
        self.shared.receive().offloads = offloads;
        Ok(())
    }

    fn set_rss(&mut self, info: &[u8]) -> Result<(), Status> {
        let parameters = RssParameters::read(info).map_err(|_| Status::INVALID_DATA)?;
        let mut receive = self.shared.receive();
        let channels = receive.num_open() as u32;
        let updated = Distribution::update(receive.rss.as_ref(), &parameters, channels);
        match updated {
            Ok(rss) => {
                let text = rss
                    .as_ref()
                    .map_or("off".to_owned(), Distribution::describe);
                receive.rss = rss;
                drop(receive);
                self.record(Direction::Host, "RSS", text);
                Ok(())
            }
            Err(error) => {
                drop(receive);
                self.record(Direction::Host, "RSS", error);
                Err(Status::INVALID_DATA)
            }
        }
    }
}

/// Objects that can be read or written.
const SUPPORTED: [Oid; 23] = [
    Oid::GEN_SUPPORTED_LIST,
    Oid::GEN_HARDWARE_STATUS,
    Oid::GEN_MEDIA_SUPPORTED,
    Oid::GEN_MEDIA_IN_USE,
    Oid::GEN_MAXIMUM_FRAME_SIZE,
    Oid::GEN_LINK_SPEED,
    Oid::GEN_VENDOR_ID,
    Oid::GEN_VENDOR_DESCRIPTION,
    Oid::GEN_CURRENT_PACKET_FILTER,
    Oid::GEN_MAXIMUM_TOTAL_SIZE,
    Oid::GEN_MEDIA_CONNECT_STATUS,
    Oid::GEN_PHYSICAL_MEDIUM,
    Oid::GEN_RECEIVE_SCALE_CAPABILITIES,
    Oid::GEN_RECEIVE_SCALE_PARAMETERS,
    Oid::GEN_RNDIS_CONFIG_PARAMETER,
    Oid::GEN_FRIENDLY_NAME,
    Oid::PERMANENT_ADDRESS,
    Oid::CURRENT_ADDRESS,
    Oid::MULTICAST_LIST,
    Oid::MAXIMUM_LIST_SIZE,
    Oid::TCP_OFFLOAD_CURRENT_CONFIG,
    Oid::TCP_OFFLOAD_PARAMETERS,
    Oid::TCP_OFFLOAD_HARDWARE_CAPABILITIES,
];

// The least object that a driver takes.
const _: () = assert!(Offload::SIZE_6_0 >= size_of::<ObjectHeader>());
