// SPDX-License-Identifier: GPL-2.0

//! What the adapter and its driver say to each other.
//!
//! "GDMA" is the queue engine, "MANA" the network adapter on top of it, "HWC" the hardware channel: a
//! pair of GDMA queues for requests to the adapter.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::FromBytes as _;
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Page size of the adapter.
pub const PAGE: u64 = 4096;

/// Registers in BAR 0.
pub mod register {
    /// Offset of the doorbell pages, 64 bits.
    pub const DOORBELL_OFFSET: u64 = 0x08;
    /// Size of a doorbell page, 32 bits.
    pub const DOORBELL_PAGE_SIZE: u64 = 0x10;
    /// Offset of the shared memory, 64 bits.
    pub const SHARED_MEMORY_OFFSET: u64 = 0x18;
}

/// Offsets in a doorbell page.
pub mod doorbell {
    /// Send queues.
    pub const SEND: u64 = 0;
    /// Receive queues.
    pub const RECEIVE: u64 = 0x400;
    /// Completion queues.
    pub const COMPLETION: u64 = 0x800;
    /// Event queues.
    pub const EVENT: u64 = 0xff8;
}

/// Length of the shared memory.
pub const SHARED_MEMORY: usize = 32;

/// The header in the last word of the shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedHeader(pub u32);

impl SharedHeader {
    /// Sets up the hardware channel.
    pub const ESTABLISH: u8 = 1;
    /// Takes it down.
    pub const DESTROY: u8 = 2;
    /// The adapter owns the shared memory.
    pub const OWNED_BY_ADAPTER: u32 = 1 << 31;
    const RESPONSE: u32 = 1 << 7;

    /// What is asked for.
    pub fn message_type(self) -> u8 {
        (self.0 & 7) as u8
    }

    /// Answer with a status; 0 is success.
    pub fn response(self, status: u8) -> Self {
        Self(u32::from(self.message_type()) | Self::RESPONSE | (u32::from(status) << 8))
    }
}

/// What the driver puts into the shared memory to set the hardware channel up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Establish {
    /// Page addresses of event, completion, receive and send queue.
    pub queues: [u64; 4],
    /// MSI-X vector of the event queue.
    pub vector: u16,
}

impl Establish {
    /// Unpacks four 52-bit frame numbers: first the low 48 bits of each, then the high 4 bits.
    pub fn parse(memory: &[u8; SHARED_MEMORY]) -> Self {
        let high = u16::from_le_bytes([memory[24], memory[25]]);
        let queues = std::array::from_fn(|n| {
            let mut frame = [0; 8];
            frame[..6].copy_from_slice(&memory[6 * n..6 * n + 6]);
            let high = u64::from((high >> (4 * n)) & 0xf) << 48;
            (u64::from_le_bytes(frame) | high) * PAGE
        });
        Self {
            queues,
            vector: u16::from_le_bytes([memory[26], memory[27]]),
        }
    }
}

/// Types of events.
pub mod event {
    /// A completion queue has entries.
    pub const COMPLETION: u8 = 3;
    /// Asked for by the driver.
    pub const TEST: u8 = 64;
    /// Number of the HWC's event queue and doorbell page.
    pub const HWC_INIT_EQ_ID_DB: u8 = 129;
    /// A number about the HWC.
    pub const HWC_INIT_DATA: u8 = 130;
    /// All has been said about the HWC.
    pub const HWC_INIT_DONE: u8 = 131;
    /// A setting has changed.
    pub const HWC_RECONFIG_DATA: u8 = 133;
    /// The driver shall take the adapter down and set it up again.
    pub const HWC_RESET_REQUEST: u8 = 135;
}

/// Types of data in [`event::HWC_INIT_DATA`]; in the top byte of the word.
pub mod init_data {
    /// Completion queue.
    pub const CQ_ID: u8 = 1;
    /// Receive queue.
    pub const RQ_ID: u8 = 2;
    /// Send queue.
    pub const SQ_ID: u8 = 3;
    /// Messages in flight.
    pub const QUEUE_DEPTH: u8 = 4;
    /// Longest request.
    pub const MAX_REQUEST: u8 = 5;
    /// Longest response.
    pub const MAX_RESPONSE: u8 = 6;
    /// Completion queue numbers are below this.
    pub const MAX_CQS: u8 = 7;
    /// Protection domain.
    pub const PD_ID: u8 = 8;
    /// Memory key of guest-physical memory.
    pub const GPA_MKEY: u8 = 9;
}

/// Types of data in [`event::HWC_RECONFIG_DATA`].
pub mod reconfig_data {
    /// The link is up.
    pub const LINK_CONNECT: u8 = 2;
    /// The link is down.
    pub const LINK_DISCONNECT: u8 = 3;
}

/// Puts a 24-bit value and its type into a word.
pub fn typed_data(data_type: u8, value: u32) -> u32 {
    (value & 0xff_ffff) | (u32::from(data_type) << 24)
}

/// Status codes in responses.
pub mod status {
    /// Done.
    pub const SUCCESS: u32 = 0;
    /// Not an NTSTATUS that the driver looks at, just a failure.
    pub const INVALID_PARAMETER: u32 = 0xc000_000d;
    /// There are no more of these.
    pub const INSUFFICIENT_RESOURCES: u32 = 0xc000_009a;
    /// The request is not known.
    pub const UNSUPPORTED: u32 = 0xffff_ffff;
}

/// Request codes.
pub mod request {
    pub const VERIFY_VF_DRIVER_VERSION: u32 = 1;
    pub const QUERY_MAX_RESOURCES: u32 = 2;
    pub const LIST_DEVICES: u32 = 3;
    pub const REGISTER_DEVICE: u32 = 4;
    pub const DEREGISTER_DEVICE: u32 = 5;
    pub const GENERATE_TEST_EQE: u32 = 10;
    pub const CREATE_QUEUE: u32 = 12;
    pub const DISABLE_QUEUE: u32 = 13;
    pub const CREATE_DMA_REGION: u32 = 25;
    pub const DMA_REGION_ADD_PAGES: u32 = 26;
    pub const DESTROY_DMA_REGION: u32 = 27;
    pub const QUERY_HWC_TIMEOUT: u32 = 84;

    pub const MANA_QUERY_DEV_CONFIG: u32 = 0x20001;
    pub const MANA_QUERY_GF_STAT: u32 = 0x20002;
    pub const MANA_CONFIG_VPORT_TX: u32 = 0x20003;
    pub const MANA_CREATE_WQ_OBJ: u32 = 0x20004;
    pub const MANA_DESTROY_WQ_OBJ: u32 = 0x20005;
    pub const MANA_FENCE_RQ: u32 = 0x20006;
    pub const MANA_CONFIG_VPORT_RX: u32 = 0x20007;
    pub const MANA_QUERY_VPORT_CONFIG: u32 = 0x20008;
    pub const MANA_QUERY_LINK_CONFIG: u32 = 0x2000a;
    pub const MANA_QUERY_PHY_STAT: u32 = 0x2000c;

    /// Name for the message log.
    pub fn name(code: u32) -> &'static str {
        match code {
            VERIFY_VF_DRIVER_VERSION => "VERIFY_VF_DRIVER_VERSION",
            QUERY_MAX_RESOURCES => "QUERY_MAX_RESOURCES",
            LIST_DEVICES => "LIST_DEVICES",
            REGISTER_DEVICE => "REGISTER_DEVICE",
            DEREGISTER_DEVICE => "DEREGISTER_DEVICE",
            GENERATE_TEST_EQE => "GENERATE_TEST_EQE",
            CREATE_QUEUE => "CREATE_QUEUE",
            DISABLE_QUEUE => "DISABLE_QUEUE",
            CREATE_DMA_REGION => "CREATE_DMA_REGION",
            DMA_REGION_ADD_PAGES => "DMA_REGION_ADD_PAGES",
            DESTROY_DMA_REGION => "DESTROY_DMA_REGION",
            QUERY_HWC_TIMEOUT => "QUERY_HWC_TIMEOUT",
            MANA_QUERY_DEV_CONFIG => "MANA_QUERY_DEV_CONFIG",
            MANA_QUERY_GF_STAT => "MANA_QUERY_GF_STAT",
            MANA_CONFIG_VPORT_TX => "MANA_CONFIG_VPORT_TX",
            MANA_CREATE_WQ_OBJ => "MANA_CREATE_WQ_OBJ",
            MANA_DESTROY_WQ_OBJ => "MANA_DESTROY_WQ_OBJ",
            MANA_FENCE_RQ => "MANA_FENCE_RQ",
            MANA_CONFIG_VPORT_RX => "MANA_CONFIG_VPORT_RX",
            MANA_QUERY_VPORT_CONFIG => "MANA_QUERY_VPORT_CONFIG",
            MANA_QUERY_LINK_CONFIG => "MANA_QUERY_LINK_CONFIG",
            MANA_QUERY_PHY_STAT => "MANA_QUERY_PHY_STAT",
            _ => "UNKNOWN_REQUEST",
        }
    }
}

/// Types of work queues and other queues.
pub mod queue_type {
    /// Send queue.
    pub const SEND: u32 = 1;
    /// Receive queue.
    pub const RECEIVE: u32 = 2;
    /// Event queue.
    pub const EVENT: u32 = 4;
}

/// The device number of the HWC.
pub const DEVICE_HWC: u16 = 1;
/// The device number of the network adapter.
pub const DEVICE_MANA: u16 = 2;

/// The PF answers [`request::QUERY_HWC_TIMEOUT`].
pub const CAP_HWC_TIMEOUT: u64 = 1 << 3;
/// The PF tells of link changes.
pub const CAP_LINK_AWARE: u64 = 1 << 6;

macro_rules! wire {
    ($( $(#[$meta:meta])* $name:ident { $( $field:ident: $ty:ty, )* } )*) => { $(
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
        #[repr(C)]
        pub struct $name { $( pub $field: $ty, )* }
    )* };
}

wire! {
    /// One half of a message's header.
    MessageHeader {
        header_type: U32,
        message_type: U32,
        version: U16,
        id: U16,
        size: U32,
    }
    /// Header of a request.
    RequestHeader {
        request: MessageHeader,
        response: MessageHeader,
        device_type: U16,
        device_instance: U16,
        activity: U32,
    }
    /// Header of a response.
    ResponseHeader {
        response: MessageHeader,
        device_type: U16,
        device_instance: U16,
        activity: U32,
        status: U32,
        reserved: U32,
    }
    VerifyVersionRequest {
        version_min: U64,
        version_max: U64,
        driver_caps: [U64; 4],
    }
    VerifyVersionResponse {
        version: U64,
        caps: [U64; 4],
    }
    MaxResourcesResponse {
        status: U32,
        max_sq: U32,
        max_rq: U32,
        max_cq: U32,
        max_eq: U32,
        max_db: U32,
        max_mst: U32,
        max_cq_mod_ctx: U32,
        max_mod_cq: U32,
        max_msix: U32,
    }
    DeviceId {
        device_type: U16,
        instance: U16,
    }
    ListDevicesResponse {
        count: U32,
        reserved: U32,
        devices: [DeviceId; 64],
    }
    RegisterDeviceResponse {
        pd: U32,
        gpa_mkey: U32,
        doorbell: U32,
    }
    TestEventRequest {
        queue: U32,
    }
    CreateQueueRequest {
        queue_type: U32,
        reserved1: U32,
        pd: U32,
        doorbell: U32,
        region: U64,
        reserved2: U32,
        size: U32,
        log2_throttle: U32,
        vector: U32,
        cq_moderation: U32,
        cq_parent: U32,
        rq_flags: [u8; 4],
        reserved3: U32,
    }
    CreateQueueResponse {
        queue: U32,
    }
    DisableQueueRequest {
        queue_type: U32,
        queue: U32,
        alloc_on_creation: U32,
    }
    CreateDmaRegionRequest {
        length: U64,
        offset_in_page: U32,
        page_type: U32,
        page_count: U32,
        list_length: U32,
    }
    RegionHandle {
        handle: U64,
    }
    AddPagesRequest {
        handle: U64,
        list_length: U32,
        reserved: U32,
    }
    HwcTimeout {
        timeout_ms: U32,
        reserved: U32,
    }
    DevConfigRequest {
        caps: [U64; 4],
        major: U32,
        minor: U32,
        micro: U32,
        reserved: U32,
    }
    DevConfigResponse {
        caps: [U64; 4],
        max_vports: U16,
        host_mode: u8,
        reserved: u8,
        max_eqs: U32,
        mtu: U16,
        reserved2: U16,
        reserved3: U32,
    }
    VportConfigRequest {
        index: U32,
    }
    VportConfigResponse {
        max_sq: U32,
        max_rq: U32,
        indirection_entries: U32,
        reserved1: U32,
        mac: [u8; 6],
        reserved2: U16,
        vport: U64,
    }
    ConfigVportTxRequest {
        vport: U64,
        pd: U32,
        doorbell: U32,
    }
    ConfigVportTxResponse {
        vport_offset: U16,
        short_form: u8,
        reserved: u8,
    }
    CreateWqRequest {
        vport: U64,
        wq_type: U32,
        reserved: U32,
        wq_region: U64,
        cq_region: U64,
        wq_size: U32,
        cq_size: U32,
        cq_moderation: U32,
        cq_parent: U32,
    }
    CreateWqResponse {
        wq: U32,
        cq: U32,
        object: U64,
        moderation_completions: U16,
        moderation_time: U16,
        moderated: u8,
        reserved: [u8; 3],
    }
    DestroyWqRequest {
        wq_type: U32,
        reserved: U32,
        object: U64,
    }
    FenceRequest {
        object: U64,
    }
    ConfigVportRxRequest {
        vport: U64,
        entries: U16,
        table_offset: U16,
        rx_enable: U32,
        rss_enable: U32,
        update_default: u8,
        update_key: u8,
        update_table: u8,
        reserved: u8,
        default_object: U64,
        key: [u8; 40],
        coalescing: u8,
        reserved2: [u8; 7],
    }
    ConfigVportRxResponse {
        coalescing_timeout_ns: U32,
        reserved: U32,
    }
    StatisticsRequest {
        wanted: U64,
    }
    /// Receive discards and errors, receive bytes, then packets and bytes of each kind; the same for
    /// transmit.
    StatisticsResponse {
        reported: U64,
        rx_discards_no_wqe: U64,
        rx_err_vport_disabled: U64,
        rx_bytes: U64,
        rx_unicast: [U64; 2],
        rx_broadcast: [U64; 2],
        rx_multicast: [U64; 2],
        tx_err_gf_disabled: U64,
        tx_err_vport_disabled: U64,
        tx_err_vport_offset: U64,
        tx_err_vlan: U64,
        tx_err_ethertype: U64,
        tx_err_source_address: U64,
        tx_err_sq_pd: U64,
        tx_err_cq_pd: U64,
        tx_err_mtu: U64,
        tx_err_oob: U64,
        tx_bytes: U64,
        tx_unicast: [U64; 2],
        tx_broadcast: [U64; 2],
        tx_multicast: [U64; 2],
        tx_err_gdma: U64,
    }
    /// Drops, then packets and bytes of eight traffic classes (receive, transmit), then pauses.
    PhyStatisticsResponse {
        reported: U64,
        rx_drops: U64,
        tx_drops: U64,
        packets: [[U64; 2]; 8],
        bytes: [[U64; 2]; 8],
        pauses: [[U64; 2]; 8],
    }
    LinkConfigRequest {
        vport: U64,
    }
    LinkConfigResponse {
        qos_speed_mbps: U32,
        qos_unconfigured: u8,
        reserved1: [u8; 3],
        link_speed_mbps: U32,
        reserved2: U32,
    }
    /// A piece of guest memory in a work queue entry.
    ScatterEntry {
        address: U64,
        mkey: U32,
        size: U32,
    }
    /// Event queue entry.
    EventEntry {
        details: [U32; 3],
        info: U32,
    }
}

/// Unit of work queues.
pub const WQE_UNIT: u32 = 32;
/// Length of an event.
pub const EQE: usize = 16;
/// Length of a completion.
pub const CQE: usize = 64;
/// Data in a completion.
pub const CQE_DATA: usize = 60;
/// Longest entry of a send queue.
pub const SQE_MAX: usize = 512;
/// Longest entry of a receive queue.
pub const RQE_MAX: usize = 256;

/// Header of a work queue entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WqeHeader {
    /// Number of scatter entries.
    pub sges: usize,
    /// Bytes of out-of-band data behind the header.
    pub oob: usize,
    /// Meaning depends on the client; the segment size of a large send.
    pub data_unit: u16,
    /// The first scatter entry holds headers.
    pub oob_in_sgl: bool,
}

impl WqeHeader {
    /// Unpacks the first eight bytes of an entry.
    pub fn parse(bytes: [u8; 8]) -> Self {
        let flags = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
        Self {
            sges: (flags & 0xff) as usize,
            oob: ((flags >> 8) & 7) as usize * 4,
            oob_in_sgl: flags & (1 << 11) != 0,
            data_unit: ((flags >> 16) & 0x3fff) as u16,
        }
    }

    /// Length of the whole entry.
    pub fn length(&self) -> usize {
        (8 + self.oob + self.sges * size_of::<ScatterEntry>()).next_multiple_of(WQE_UNIT as usize)
    }
}

/// Out-of-band data of a packet that is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TxOob {
    /// IPv4 packet (only said if a checksum is wanted).
    pub ipv4: bool,
    /// IPv6 packet (only said if a checksum is wanted).
    pub ipv6: bool,
    /// Compute the checksum of the IPv4 header.
    pub ip_checksum: bool,
    /// Compute the TCP checksum.
    pub tcp_checksum: bool,
    /// Compute the UDP checksum.
    pub udp_checksum: bool,
    /// No completion wanted.
    pub suppress_completion: bool,
    /// Number of the virtual port.
    pub vport_offset: u16,
    /// VLAN tag to insert.
    pub vlan: Option<u16>,
}

impl TxOob {
    /// Unpacks the short (8 bytes) or long (24 bytes) form. `None` if the data is too short for its
    /// form, or the form is unknown.
    pub fn parse(oob: &[u8]) -> Option<Self> {
        let word = |n: usize| {
            let (word, _) = U32::read_from_prefix(oob.get(4 * n..)?).ok()?;
            Some(word.get())
        };
        let (first, second) = (word(0)?, word(1)?);
        let bit = |n: u32| first & (1 << n) != 0;
        let mut this = Self {
            ipv4: bit(2),
            ipv6: bit(3),
            ip_checksum: bit(4),
            tcp_checksum: bit(5),
            udp_checksum: bit(6),
            suppress_completion: bit(7),
            vport_offset: (second >> 24) as u16,
            vlan: None,
        };
        match first & 3 {
            0 => {}
            1 => {
                let (third, fourth) = (word(2)?, word(3)?);
                if third & (1 << 3) != 0 {
                    let priority = (third >> 16) & 7;
                    let drop_eligible = (third >> 19) & 1;
                    let id = (third >> 20) & 0xfff;
                    this.vlan = Some(((priority << 13) | (drop_eligible << 12) | id) as u16);
                }
                let long_offset = (fourth >> 16) as u16 & 0xfff;
                if long_offset != 0 {
                    this.vport_offset = long_offset;
                }
            }
            _ => return None,
        }
        Some(this)
    }
}

/// Completion types.
pub mod completion {
    /// A packet was received.
    pub const RX_OKAY: u8 = 1;
    /// What was received before a fence is all completed.
    pub const RX_FENCE: u8 = 3;
    /// A packet was sent.
    pub const TX_OKAY: u8 = 32;
    /// A packet was not sent: its out-of-band data is wrong.
    pub const TX_INVALID_OOB: u8 = 35;
    /// A packet was not sent: wrong virtual port.
    pub const TX_VPORT_OUT_OF_RANGE: u8 = 39;
}

/// First word of a completion's data.
fn completion_header(completion_type: u8) -> u32 {
    // The client type says "completion".
    u32::from(completion_type) | (1 << 6)
}

/// What to say of a received packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RxOob {
    /// VLAN tag that was taken out.
    pub vlan: Option<u16>,
    /// The IP header's checksum was found right or wrong; IPv6, which has none, is right.
    pub ip_checksum: Option<bool>,
    /// The TCP checksum was found right or wrong.
    pub tcp_checksum: Option<bool>,
    /// The UDP checksum was found right or wrong.
    pub udp_checksum: Option<bool>,
    /// Hash type, as NDIS has them, and hash.
    pub hash: Option<(u16, u32)>,
    /// Length of the packet.
    pub length: u16,
    /// Offset of the entry in the receive queue.
    pub wqe_offset: u32,
}

impl RxOob {
    /// Hash over IPv4 addresses.
    pub const HASH_IPV4: u16 = 1;
    /// Hash over IPv4 addresses and TCP ports.
    pub const HASH_TCP_IPV4: u16 = 2;
    /// Hash over IPv6 addresses.
    pub const HASH_IPV6: u16 = 8;
    /// Hash over IPv6 addresses and TCP ports.
    pub const HASH_TCP_IPV6: u16 = 16;

    /// Packs a completion of the given type.
    pub fn pack(&self, completion_type: u8) -> [u8; CQE_DATA] {
        let mut flags = 0;
        if let Some(tci) = self.vlan {
            flags |= u32::from(tci & 0xfff) | (1 << 12);
        }
        for (checksum, bit) in [
            (self.ip_checksum, 25),
            (self.tcp_checksum, 27),
            (self.udp_checksum, 29),
        ] {
            match checksum {
                Some(true) => flags |= 1 << bit,
                Some(false) => flags |= 1 << (bit + 1),
                None => {}
            }
        }
        let (hash_type, hash) = self.hash.unwrap_or((0, 0));
        flags |= (u32::from(hash_type) & 0x1ff) << 16;
        let mut data = [0; CQE_DATA];
        for (at, word) in [
            (0, completion_header(completion_type)),
            (4, flags),
            (8, self.length.into()),
            (16, hash),
            (56, self.wqe_offset),
        ] {
            data[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        data
    }
}

/// Packs the completion of a packet that was sent.
pub fn pack_tx_completion(completion_type: u8, wqe_offset: u32) -> [u8; CQE_DATA] {
    let mut data = [0; CQE_DATA];
    data[..4].copy_from_slice(&completion_header(completion_type).to_le_bytes());
    data[8..12].copy_from_slice(&(wqe_offset << 5).to_le_bytes());
    data
}

/// Packs the completion of a message on the hardware channel.
pub fn pack_hwc_completion(wqe_offset: u32, message_size: u32) -> [u8; CQE_DATA] {
    let mut data = [0; CQE_DATA];
    data[12..16].copy_from_slice(&wqe_offset.to_le_bytes());
    data[24..28].copy_from_slice(&message_size.to_le_bytes());
    data
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_on_the_wire() {
        assert_eq!(size_of::<RequestHeader>(), 40);
        assert_eq!(size_of::<ResponseHeader>(), 32);
        assert_eq!(size_of::<ListDevicesResponse>(), 264);
        assert_eq!(size_of::<CreateQueueRequest>(), 56);
        assert_eq!(size_of::<DevConfigResponse>(), 48);
        assert_eq!(size_of::<VportConfigResponse>(), 32);
        assert_eq!(size_of::<CreateWqRequest>(), 48);
        assert_eq!(size_of::<CreateWqResponse>(), 24);
        assert_eq!(size_of::<ConfigVportRxRequest>(), 80);
        assert_eq!(size_of::<StatisticsResponse>(), 8 * 28);
        assert_eq!(size_of::<PhyStatisticsResponse>(), 8 * 51);
    }

    #[test]
    fn shared_memory() {
        let mut memory = [0; SHARED_MEMORY];
        memory[..6].copy_from_slice(&[1, 2, 3, 4, 5, 6]);
        memory[18] = 9;
        memory[24..26].copy_from_slice(&0xa00b_u16.to_le_bytes());
        memory[26] = 7;
        let establish = Establish::parse(&memory);
        assert_eq!(
            establish,
            Establish {
                queues: [0x000b_0605_0403_0201 << 12, 0, 0, (0xa << 60) | 0x9000],
                vector: 7
            }
        );
        let header = SharedHeader(0x0100_0001);
        assert_eq!(header.message_type(), SharedHeader::ESTABLISH);
        assert_eq!(header.response(2).0, 0x281);
    }

    #[test]
    fn work_queue_headers() {
        for (bytes, header, length) in [
            (
                [0, 0, 0, 0, 1, 2, 0, 0],
                WqeHeader {
                    sges: 1,
                    oob: 8,
                    data_unit: 0,
                    oob_in_sgl: false,
                },
                32,
            ),
            (
                [0, 0, 0, 54, 3, 0x0e, 0xa8, 0x05],
                WqeHeader {
                    sges: 3,
                    oob: 24,
                    data_unit: 1448,
                    oob_in_sgl: true,
                },
                96,
            ),
        ] {
            assert_eq!(WqeHeader::parse(bytes), header);
            assert_eq!(header.length(), length);
        }
    }

    #[test]
    fn transmit_oob() {
        let mut oob = [0; 24];
        oob[0] = 0x24;
        oob[7] = 5;
        let parsed = TxOob::parse(&oob[..8]).unwrap();
        assert!(parsed.ipv4 && parsed.tcp_checksum && !parsed.udp_checksum);
        assert_eq!((parsed.vport_offset, parsed.vlan), (5, None));
        // Long form needs all of its words.
        oob[0] = 0x25;
        assert_eq!(TxOob::parse(&oob[..8]), None);
        oob[8..12]
            .copy_from_slice(&((1_u32 << 3) | (5 << 16) | (1 << 19) | (0x123 << 20)).to_le_bytes());
        oob[12..16].copy_from_slice(&(0x456_u32 << 16).to_le_bytes());
        let parsed = TxOob::parse(&oob).unwrap();
        assert_eq!((parsed.vport_offset, parsed.vlan), (0x456, Some(0xb123)));
        oob[0] = 0x26;
        assert_eq!(TxOob::parse(&oob), None);
        assert_eq!(TxOob::parse(&oob[..7]), None);
    }

    #[test]
    fn receive_completion() {
        let data = RxOob {
            vlan: Some(0xe123),
            ip_checksum: Some(true),
            tcp_checksum: Some(false),
            udp_checksum: None,
            hash: Some((RxOob::HASH_TCP_IPV4, 0xdead_beef)),
            length: 1514,
            wqe_offset: 64,
        }
        .pack(completion::RX_OKAY);
        let word = |at: usize| u32::from_le_bytes(data[at..at + 4].try_into().unwrap());
        assert_eq!(word(0), 0x41);
        assert_eq!(word(4), 0x1123 | (2 << 16) | (1 << 25) | (1 << 28));
        assert_eq!((word(8), word(16), word(56)), (1514, 0xdead_beef, 64));
    }
}
