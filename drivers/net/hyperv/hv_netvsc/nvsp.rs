// SPDX-License-Identifier: GPL-2.0

//! NVSP: the conversation with the host about the adapter as a whole.
//!
//! One request is under way at a time. The answer is the completion of its packet; it is matched by
//! the transaction id, so that an answer that comes too late is not taken for that of a later one.

use hyperv_wire::{
    nvsp,
    nvsp::{
        Capabilities,
        DataPath,
        MessageType,
        SubchannelOperation,
        Version, //
    }, //
};
use kernel::{
    new_mutex,
    prelude::*,
    sync::Mutex,
    time::{
        delay::fsleep,
        Delta,
        Instant,
        Monotonic, //
    }, //
};
use net::{
    netdev_err,
    netdev_info, //
};
use vmbus::{
    new_spinlock_irq,
    sync::SpinLockIrq,
    Completion,
    Gpadl,
    Reply, //
};
use zerocopy::little_endian::{
    U16,
    U32,
    U64, //
};

use crate::{
    buffers::{
        RecvBuffer,
        SendBuffer, //
    },
    config::Config,
    connection::{
        Shared,
        Transaction, //
    }, //
};

/// How long the host may take to answer.
pub(crate) const TIMEOUT: Delta = Delta::from_secs(10);

/// How long to try to get a packet into a full ring.
const SEND_TIMEOUT: Delta = Delta::from_secs(1);

/// Largest answer that is of interest.
const ANSWER_SIZE: usize = nvsp::MESSAGE_SIZE;

/// An answer, or a place for one.
struct Answer {
    /// Number of the request.
    sequence: u32,
    /// The message and its length, when it has come.
    message: Option<([u8; ANSWER_SIZE], usize)>,
}

/// The state of the conversation.
#[pin_data]
pub(crate) struct Control {
    /// Number of the last request; held while one is under way.
    #[pin]
    sequence: Mutex<u32>,
    #[pin]
    answer: SpinLockIrq<Answer>,
    #[pin]
    answered: Completion,
}

impl Control {
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            sequence <- new_mutex!(0, "hv_netvsc::nvsp"),
            answer <- new_spinlock_irq!(
                Answer { sequence: 0, message: None },
                "hv_netvsc::nvsp_answer"
            ),
            answered <- Completion::new(),
        })
    }

    /// The host has completed request `sequence`, with a message or without.
    pub(crate) fn complete(&self, sequence: u32, message: &[u8]) {
        let mut answer = self.answer.lock();
        if answer.sequence != sequence || answer.message.is_some() {
            // Nobody waits for it (any more).
            return;
        }
        let mut copy = [0; ANSWER_SIZE];
        let len = message.len().min(ANSWER_SIZE);
        copy[..len].copy_from_slice(&message[..len]);
        answer.message = Some((copy, len));
        drop(answer);
        self.answered.complete();
    }
}

/// Sends a packet on the primary channel, waiting a little if the ring is full.
pub(crate) fn send_patiently(
    shared: &Shared,
    mut send: impl FnMut(&vmbus::Ring<'_>) -> Result,
) -> Result {
    let start = Instant::<Monotonic>::now();
    loop {
        // The ring must be gone before we sleep.
        let sent = shared.primary()?.ring().and_then(|ring| send(&ring));
        match sent {
            Err(e) if e == EAGAIN && start.elapsed() < SEND_TIMEOUT => {
                fsleep(Delta::from_millis(5));
            }
            other => return other,
        }
    }
}

/// Sends a message that has no answer.
fn notify<B: nvsp::Body>(shared: &Shared, body: &B) -> Result {
    let message = nvsp::encode(body);
    net::netvsc::trace_nvsp_send(&shared.dev, B::TYPE.0);
    send_patiently(shared, |ring| {
        ring.send_inband(&message, Transaction::Notice.id(), Reply::None)
    })
}

/// Sends a request and waits for the answer: the message and its length.
fn request<B: nvsp::Body>(shared: &Shared, body: &B) -> Result<([u8; ANSWER_SIZE], usize)> {
    let control = &shared.control;
    let mut sequence = control.sequence.lock();
    *sequence = sequence.wrapping_add(1);
    *control.answer.lock() = Answer {
        sequence: *sequence,
        message: None,
    };
    control.answered.reinit();

    let message = nvsp::encode(body);
    let id = Transaction::Nvsp(*sequence).id();
    net::netvsc::trace_nvsp_send(&shared.dev, B::TYPE.0);
    send_patiently(shared, |ring| ring.send_inband(&message, id, Reply::Wanted))?;
    shared.hv.wait_for(&control.answered, TIMEOUT)?;
    let answer = control.answer.lock().message.take();
    answer.ok_or_else(net::eproto)
}

/// Sends a request whose answer is a message of the given kind.
fn call<B: nvsp::Body, A: nvsp::Body>(shared: &Shared, body: &B) -> Result<A> {
    let (message, len) = request(shared, body)?;
    nvsp::decode(&message[..len]).map_err(|error| {
        match error {
            nvsp::Error::UnexpectedType { found, .. } => netdev_err!(
                shared.dev,
                "Unknown send completion type {} received!!\n",
                found.0
            ),
            _ => {
                let what = match A::TYPE {
                    MessageType::INIT_COMPLETE => "nvsp_msg",
                    MessageType::SUBCHANNEL => "nvsp_msg5",
                    _ => "nvsp_msg1",
                };
                netdev_err!(shared.dev, "{} length too small: {}\n", what, len);
            }
        }
        net::eproto()
    })
}

/// Proposes a version, and tells whether the host accepts it.
fn propose(shared: &Shared, version: Version) -> Result<bool> {
    let answer: nvsp::InitComplete = call(
        shared,
        &nvsp::Init {
            min_version: U32::new(version.0),
            max_version: U32::new(version.0),
        },
    )?;
    Ok(answer.status.get() == nvsp::Status::SUCCESS.0)
}

/// What the driver can do with a version.
fn capabilities(version: Version, is_isolated: bool) -> Capabilities {
    let mut capabilities = Capabilities::IEEE8021Q;
    if version >= Version::V5 {
        // A VF can access memory that the host cannot be trusted with.
        if !is_isolated {
            capabilities = capabilities.with(Capabilities::SRIOV);
        }
        // With "teaming" the host tells about changes of the link speed.
        capabilities = capabilities.with(Capabilities::TEAMING);
    }
    if version >= Version::V61 {
        capabilities = capabilities.with(Capabilities::RSC);
    }
    capabilities
}

/// Finds the newest version that both sides know, and tells the host about the driver.
pub(crate) fn negotiate(shared: &Shared, mtu: u32) -> Result<Version> {
    let mut accepted = None;
    for version in Version::ALL {
        if propose(shared, version)? {
            accepted = Some(version);
            break;
        }
    }
    let version = accepted.ok_or_else(net::eproto)?;
    if version > Version::V1 {
        if version >= Version::V5 && shared.is_isolated {
            netdev_info!(
                shared.dev,
                "SR-IOV not advertised by guests on the host supporting isolation\n"
            );
        }
        notify(
            shared,
            &nvsp::NdisConfig {
                max_frame: U32::new(mtu + net::ETH_HLEN),
                reserved: U32::ZERO,
                capabilities: U64::new(capabilities(version, shared.is_isolated).0),
            },
        )?;
    }
    if shared.is_isolated && version < Version::V61 {
        netdev_err!(
            shared.dev,
            "Invalid NVSP version {:#x} (expected >= {:#x}) from the host supporting isolation\n",
            version.0,
            Version::V61.0
        );
        return Err(net::eproto());
    }
    let (major, minor) = version.ndis_version();
    notify(
        shared,
        &nvsp::SendNdisVersion {
            major: U32::new(major),
            minor: U32::new(minor),
        },
    )?;
    Ok(version)
}

/// Largest receive buffer with a version.
pub(crate) fn max_recv_buffer(version: Version) -> u32 {
    if version <= Version::V2 {
        nvsp::MAX_RECEIVE_BUFFER_LEGACY
    } else {
        nvsp::MAX_RECEIVE_BUFFER
    }
}

/// Shares a receive buffer with the host.
pub(crate) fn share_recv_buffer(
    shared: &Shared,
    hv: &vmbus::Device<kernel::device::Bound>,
    version: Version,
    config: &Config,
) -> Result<RecvBuffer> {
    let size = config
        .recv_sections
        .checked_mul(config.recv_section_size)
        .ok_or(EINVAL)?
        .min(max_recv_buffer(version));
    let gpadl = Gpadl::new(hv, size as usize)
        .inspect_err(|_| netdev_err!(shared.dev, "unable to establish receive buffer's gpadl\n"))?;
    let answer: nvsp::SendReceiveBufferComplete = call(
        shared,
        &nvsp::SendReceiveBuffer {
            gpadl: U32::new(gpadl.handle()),
            id: U16::new(nvsp::RECEIVE_BUFFER_ID),
        },
    )?;
    if answer.status.get() != nvsp::Status::SUCCESS.0 {
        netdev_err!(
            shared.dev,
            "Unable to complete receive buffer initialization with NetVsp - status {}\n",
            answer.status.get()
        );
        return Err(EINVAL);
    }
    RecvBuffer::new(&shared.dev, gpadl, &answer).inspect_err(|_| {
        // The host has accepted the buffer.
        let _ = revoke_recv_buffer(shared);
    })
}

/// Shares a send buffer with the host.
pub(crate) fn share_send_buffer(
    shared: &Shared,
    hv: &vmbus::Device<kernel::device::Bound>,
    config: &Config,
) -> Result<SendBuffer> {
    let size = config
        .send_sections
        .checked_mul(config.send_section_size)
        .ok_or(EINVAL)?;
    let gpadl = Gpadl::new(hv, size as usize)
        .inspect_err(|_| netdev_err!(shared.dev, "unable to establish send buffer's gpadl\n"))?;
    let answer: nvsp::SendSendBufferComplete = call(
        shared,
        &nvsp::SendSendBuffer {
            gpadl: U32::new(gpadl.handle()),
            id: U16::new(nvsp::SEND_BUFFER_ID),
        },
    )?;
    if answer.status.get() != nvsp::Status::SUCCESS.0 {
        netdev_err!(
            shared.dev,
            "Unable to complete send buffer initialization with NetVsp - status {}\n",
            answer.status.get()
        );
        return Err(EINVAL);
    }
    SendBuffer::new(gpadl, &answer).inspect_err(|_| {
        netdev_err!(
            shared.dev,
            "invalid send_section_size {}\n",
            answer.section_size.get()
        );
        let _ = revoke_send_buffer(shared);
    })
}

/// Takes the receive buffer back. The host uses it no more when it has seen the channel closed.
pub(crate) fn revoke_recv_buffer(shared: &Shared) -> Result {
    notify(
        shared,
        &nvsp::RevokeReceiveBuffer {
            id: U16::new(nvsp::RECEIVE_BUFFER_ID),
        },
    )
    .inspect_err(|e| {
        // A device that was taken back needs none.
        if *e != ENODEV {
            netdev_err!(
                shared.dev,
                "unable to send revoke receive buffer to netvsp\n"
            );
        }
    })
}

/// Takes the send buffer back, likewise.
pub(crate) fn revoke_send_buffer(shared: &Shared) -> Result {
    notify(
        shared,
        &nvsp::RevokeSendBuffer {
            id: U16::new(nvsp::SEND_BUFFER_ID),
        },
    )
    .inspect_err(|e| {
        // A device that was taken back needs none.
        if *e != ENODEV {
            netdev_err!(shared.dev, "unable to send revoke send buffer to netvsp\n");
        }
    })
}

/// Asks for subchannels; returns how many the host will offer.
pub(crate) fn request_subchannels(shared: &Shared, count: u32) -> Result<u32> {
    let answer: nvsp::SubchannelComplete = call(
        shared,
        &nvsp::SubchannelRequest {
            operation: U32::new(SubchannelOperation::ALLOCATE.0),
            num_subchannels: U32::new(count),
        },
    )
    .inspect_err(|e| {
        let error = e.to_errno();
        netdev_err!(shared.dev, "sub channel allocate send failed: {}\n", error);
    })?;
    if answer.status.get() != nvsp::Status::SUCCESS.0 {
        netdev_err!(shared.dev, "sub channel request failed\n");
        return Err(EIO);
    }
    let granted = answer.num_subchannels.get();
    if granted > count {
        netdev_err!(shared.dev, "invalid number of allocated sub channel\n");
        return Err(EINVAL);
    }
    Ok(granted)
}

/// Tells the host by which path packets shall come. It has done so when this returns.
pub(crate) fn switch_data_path(shared: &Shared, path: DataPath) -> Result {
    // The completion has no message.
    request(
        shared,
        &nvsp::SwitchDataPath {
            active: U32::new(path.0),
        },
    )
    .map(|_| ())
}
