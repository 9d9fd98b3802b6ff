// SPDX-License-Identifier: GPL-2.0

//! RNDIS control messages: what can be asked of and set in the adapter.
//!
//! A request lies in a page of guest memory, which the host reads. One request is under way at a
//! time. It ends twice: the packet that refers to the page is completed, and the answer comes as a
//! message of its own, matched by the request's id.

use hyperv_wire::{
    ndis,
    ndis::{
        Oid,
        PacketFilter, //
    },
    nvsp,
    nvsp::ChannelType,
    rndis,
    rndis::MessageType, //
};
use kernel::{
    new_mutex,
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Relaxed,
            Release, //
        },
        Mutex, //
    }, //
};
use net::netvsc::{
    trace_nvsp_send_pkt,
    trace_rndis_send,
    RndisMessage,
    SentPacket, //
};
use vmbus::{
    new_spinlock_irq,
    sync::SpinLockIrq,
    Bounce,
    Completion,
    GpaRanges,
    RequestPage, //
};
use zerocopy::little_endian::U32;

use crate::{
    connection::{
        Shared,
        Transaction, //
    },
    nvsp::{
        send_patiently,
        TIMEOUT, //
    }, //
};

/// Largest control message from the host.
pub(crate) const MESSAGE_MAX: usize = 4096 + 64;

/// Largest transfer that the driver announces; the host makes no use of it.
const MAX_TRANSFER: u32 = 0x4000;

/// What a request needs.
struct Requests {
    page: RequestPage,
    /// What the host reads instead of the page, in an isolated virtual machine.
    bounce: Option<Bounce>,
    last_id: u32,
    /// The packet filter that is set; unknown while the host has not answered.
    filter: Option<PacketFilter>,
}

/// An answer, or a place for one.
struct Answer {
    /// The request's id; 0 if nobody waits.
    id: u32,
    message: KVec<u8>,
    complete: bool,
}

/// The state of the conversation.
#[pin_data]
pub(crate) struct Rndis {
    #[pin]
    requests: Mutex<Requests>,
    #[pin]
    answer: SpinLockIrq<Answer>,
    #[pin]
    answered: Completion,
    /// The host may be reading the page.
    page_busy: Atomic<bool>,
    /// It is not any more.
    #[pin]
    page_done: Completion,
    /// Most packets that may be sent in one message.
    pub(crate) max_packets: Atomic<u32>,
    /// Alignment of packets in one message.
    pub(crate) alignment: Atomic<u32>,
    /// The device was initialised and must be halted.
    initialised: Atomic<bool>,
}

impl Rndis {
    pub(crate) fn new() -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            requests <- new_mutex!(
                Requests {
                    page: RequestPage::new()?,
                    bounce: None,
                    last_id: 0,
                    filter: Some(PacketFilter(0)),
                },
                "hv_netvsc::rndis"
            ),
            answer <- new_spinlock_irq!(
                Answer {
                    id: 0,
                    message: KVec::with_capacity(MESSAGE_MAX, GFP_KERNEL)?,
                    complete: false,
                },
                "hv_netvsc::rndis_answer"
            ),
            answered <- Completion::new(),
            page_busy: Atomic::new(false),
            page_done <- Completion::new(),
            max_packets: Atomic::new(8),
            alignment: Atomic::new(8),
            initialised: Atomic::new(false),
        }? Error)
    }

    /// The host has read a request.
    pub(crate) fn page_read(&self) {
        self.page_busy.store(false, Release);
        self.page_done.complete();
    }

    /// An answer has come: a private copy of the message.
    pub(crate) fn answer(&self, message: &rndis::Message<'_>, bytes: &[u8]) -> Result {
        let id = message.request_id().map_err(|_| net::eproto())?;
        let mut answer = self.answer.lock();
        if id == 0 || answer.id != id || answer.complete {
            return Err(ENOENT);
        }
        answer.message.clear();
        for &byte in bytes {
            // The capacity is that of the largest message.
            if answer.message.push_within_capacity(byte).is_err() {
                return Err(EMSGSIZE);
            }
        }
        answer.complete = true;
        drop(answer);
        self.answered.complete();
        Ok(())
    }
}

/// What tracepoints record of a message, from its first bytes.
pub(crate) fn traced(bytes: &[u8]) -> RndisMessage {
    let word = |at: usize| {
        bytes
            .get(at..)
            .and_then(|bytes| bytes.first_chunk())
            .map_or(0, |word| u32::from_le_bytes(*word))
    };
    RndisMessage {
        kind: word(0),
        len: word(4),
        request_id: word(8),
    }
}

/// Puts a message into the request page and sends it.
fn send(
    shared: &Shared,
    requests: &mut Requests,
    build: impl FnOnce(u32, &mut [u8]) -> Result<usize, rndis::Error>,
) -> Result<u32> {
    // The answer can come before the packet is completed; until that the host may read the page.
    if shared.rndis.page_busy.load(Acquire) {
        shared.hv.wait_for(&shared.rndis.page_done, TIMEOUT)?;
    }
    requests.last_id = requests.last_id.wrapping_add(1).max(1);
    let id = requests.last_id;
    let len = build(id, requests.page.bytes_mut()).map_err(|_| EINVAL)?;

    let mut answer = shared.rndis.answer.lock();
    answer.id = id;
    answer.complete = false;
    drop(answer);
    shared.rndis.answered.reinit();

    let mut ranges = GpaRanges::new();
    ranges.push(requests.page.pfn(), 0, len as u32)?;
    trace_rndis_send(&shared.dev, 0, || traced(requests.page.bytes_mut()));
    trace_nvsp_send_pkt(&shared.dev, || SentPacket {
        channel: 0,
        kind: ChannelType::CONTROL.0,
        section: nvsp::INVALID_SECTION,
        len: 0,
    });
    // The one of the request before is not needed any more.
    requests.bounce = None;
    if shared.is_isolated {
        requests.bounce = Some(ranges.bounce(&shared.hv)?);
    }
    let message = nvsp::encode(&nvsp::SendRndisPacket {
        channel_type: U32::new(ChannelType::CONTROL.0),
        section_index: U32::new(nvsp::INVALID_SECTION),
        section_size: U32::ZERO,
    });
    shared.rndis.page_done.reinit();
    shared.rndis.page_busy.store(true, Relaxed);
    send_patiently(shared, |ring| {
        ring.send_ranges(&mut ranges, &message, Transaction::Rndis(id).id())
    })
    .inspect_err(|_| shared.rndis.page_busy.store(false, Relaxed))?;
    Ok(id)
}

/// Sends a request and waits for the answer, which is given to `read`.
fn request<R>(
    shared: &Shared,
    requests: &mut Requests,
    build: impl FnOnce(u32, &mut [u8]) -> Result<usize, rndis::Error>,
    read: impl FnOnce(&rndis::Message<'_>) -> Result<R>,
) -> Result<R> {
    send(shared, requests, build)?;
    let waited = shared
        .hv
        .wait_for(&shared.rndis.answered, TIMEOUT)
        .inspect_err(|e| {
            if *e == ETIMEDOUT {
                let kind = requests.page.bytes_mut().first_chunk().copied();
                let kind = MessageType(u32::from_le_bytes(kind.unwrap_or_default()));
                dev_err!(
                    (*shared.hv).as_ref(),
                    "no answer to RNDIS {}\n",
                    format_args!("{kind}")
                );
            }
        });

    // The message is moved out, so that it can be read without the lock.
    let mut answer = shared.rndis.answer.lock();
    answer.id = 0;
    let message = core::mem::take(&mut answer.message);
    drop(answer);

    let result = waited.and_then(|()| {
        let message = rndis::Message::parse(&message).map_err(|_| net::eproto())?;
        read(&message)
    });
    shared.rndis.answer.lock().message = message;
    result
}

/// Fails unless the host reports success.
fn check(status: U32) -> Result {
    if status.get() == rndis::Status::SUCCESS.0 {
        Ok(())
    } else {
        Err(EIO)
    }
}

/// Initialises the device behind the protocol.
pub(crate) fn initialise(shared: &Shared) -> Result {
    let mut requests = shared.rndis.requests.lock();
    let answer = request(
        shared,
        &mut requests,
        |id, page| {
            rndis::encode(
                MessageType::INITIALIZE,
                &rndis::Initialize {
                    request_id: U32::new(id),
                    major_version: U32::new(rndis::MAJOR_VERSION),
                    minor_version: U32::new(rndis::MINOR_VERSION),
                    max_transfer_size: U32::new(MAX_TRANSFER),
                },
                &[],
                page,
            )
        },
        |message| {
            message
                .body_as::<rndis::InitializeComplete>("initialize answer")
                .map_err(|_| net::eproto())
        },
    )?;
    check(answer.status).map_err(|_| EINVAL)?;
    shared.rndis.initialised.store(true, Relaxed);
    // The host's numbers are used with a limit that makes sense.
    let packets = answer.max_packets_per_message.get().clamp(1, 64);
    let alignment = 1u32 << answer.packet_alignment_factor.get().min(7);
    shared.rndis.max_packets.store(packets, Relaxed);
    shared.rndis.alignment.store(alignment, Relaxed);
    Ok(())
}

/// Halts the device; there is no answer.
pub(crate) fn halt(shared: &Shared) {
    if !shared
        .rndis
        .initialised
        .xchg(false, kernel::sync::atomic::Full)
    {
        return;
    }
    let mut requests = shared.rndis.requests.lock();
    let sent = send(shared, &mut requests, |id, page| {
        rndis::encode(
            MessageType::HALT,
            &rndis::Halt {
                request_id: U32::new(id),
            },
            &[],
            page,
        )
    });
    // If it fails, closing the channel has to do. Otherwise the host reads it before that.
    if sent.is_ok() {
        let _ = shared.hv.wait_for(&shared.rndis.page_done, TIMEOUT);
    }
}

/// Queries an object. `read` gets the host's information.
pub(crate) fn query<R>(
    shared: &Shared,
    oid: Oid,
    info: &[u8],
    read: impl FnOnce(&[u8]) -> Result<R>,
) -> Result<R> {
    let mut requests = shared.rndis.requests.lock();
    request(
        shared,
        &mut requests,
        |id, page| rndis::encode_request(MessageType::QUERY, id, oid, info, page),
        |message| {
            let answer = message.query_complete().map_err(|_| net::eproto())?;
            if answer.status != rndis::Status::SUCCESS {
                return Err(EIO);
            }
            read(answer.info)
        },
    )
}

/// Queries an object that is a number.
pub(crate) fn query_u32(shared: &Shared, oid: Oid) -> Result<u32> {
    query(shared, oid, &[], |info| {
        let bytes = info.first_chunk::<4>().ok_or_else(net::eproto)?;
        Ok(u32::from_le_bytes(*bytes))
    })
}

fn set_locked(shared: &Shared, requests: &mut Requests, oid: Oid, info: &[u8]) -> Result<u32> {
    request(
        shared,
        requests,
        |id, page| rndis::encode_request(MessageType::SET, id, oid, info, page),
        |message| {
            message
                .body_as::<rndis::SetComplete>("set answer")
                .map(|answer| answer.status.get())
                .map_err(|_| net::eproto())
        },
    )
}

/// Sets an object, and returns the host's status.
pub(crate) fn set(shared: &Shared, oid: Oid, info: &[u8]) -> Result<u32> {
    let mut requests = shared.rndis.requests.lock();
    set_locked(shared, &mut requests, oid, info)
}

/// Sets which packets are to be received, unless that is set already.
pub(crate) fn set_packet_filter(shared: &Shared, filter: PacketFilter) -> Result {
    let mut requests = shared.rndis.requests.lock();
    if requests.filter == Some(filter) {
        return Ok(());
    }
    requests.filter = None;
    set_locked(
        shared,
        &mut requests,
        Oid::GEN_CURRENT_PACKET_FILTER,
        &filter.0.to_le_bytes(),
    )?;
    requests.filter = Some(filter);
    Ok(())
}

/// Sets the Ethernet address.
pub(crate) fn set_address(shared: &Shared, address: &[u8; net::ETH_ALEN]) -> Result {
    let mut info = [0; rndis::ConfigParameter::MAC_INFO_SIZE];
    let len = rndis::ConfigParameter::encode_mac(address, &mut info).map_err(|_| EINVAL)?;
    check(U32::new(set(
        shared,
        Oid::GEN_RNDIS_CONFIG_PARAMETER,
        &info[..len],
    )?))
}

/// Sets how received packets are spread over the channels.
pub(crate) fn set_rss(
    shared: &Shared,
    table: &[u16],
    key: &[u8; ndis::HASH_KEY_SIZE],
) -> Result<u32> {
    const SIZE: usize =
        size_of::<ndis::RssParameters>() + 4 * ndis::MAX_TABLE_ENTRIES + ndis::HASH_KEY_SIZE;
    let types = ndis::HashTypes::TOEPLITZ
        .with(ndis::HashTypes::IPV4)
        .with(ndis::HashTypes::TCP_IPV4)
        .with(ndis::HashTypes::IPV6)
        .with(ndis::HashTypes::TCP_IPV6);
    let mut info = KVec::from_elem(0u8, SIZE, GFP_KERNEL)?;
    let mut status = 0;
    // It has to be off to be changed; whether it was does not matter.
    for flags in [ndis::RssParameters::DISABLE, 0] {
        let len =
            ndis::RssParameters::encode(flags, types, table, key, &mut info).map_err(|_| EINVAL)?;
        status = set(
            shared,
            Oid::GEN_RECEIVE_SCALE_PARAMETERS,
            info.get(..len).ok_or(EINVAL)?,
        )?;
    }
    Ok(status)
}
