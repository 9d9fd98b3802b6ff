// SPDX-License-Identifier: GPL-2.0

//! The connection to the host: an open channel with its protocol state, buffers and queues.
//!
//! A device makes a new connection when something changes that is negotiated at the beginning: the
//! MTU, the number of channels, the size of the buffers.
//!
//! [`Shared`] is what the data path and the control path use, concurrently; [`Connection`] is the
//! owner, who opens and closes.

use hyperv_wire::nvsp::{
    self,
    Version, //
};
use kernel::{
    device::Bound,
    new_mutex,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{
            Atomic,
            Relaxed, //
        },
        rcu,
        Arc,
        Mutex,
        SetOnce, //
    },
    time::{
        delay::fsleep,
        Delta,
        Instant,
        Monotonic, //
    }, //
};
use net::{
    netdev_err,
    Device,
    DeviceRef,
    Napi,
    RcuSlot,
    Rtnl, //
};
use vmbus::{
    Channel,
    ChannelHandle,
    ChannelHandler,
    Completion,
    OpenParams,
    ReadMode,
    SubchannelOffer, //
};

use crate::{
    buffers::{
        RecvBuffer,
        SendBuffer, //
    },
    config,
    config::Config,
    device::Netvsc,
    nvsp as control,
    nvsp::Control,
    offload,
    rndis,
    rndis::Rndis,
    rx::{
        RxPoll,
        RxShared, //
    },
    subchannel,
    tx::TxState, //
};

/// Largest packet from the host: transfer pages with the most ranges, and a message.
const MAX_PACKET: u32 = (24 + 8 * nvsp::MAX_TRANSFER_RANGES + nvsp::MAX_MESSAGE_SIZE) as u32;

/// What a packet to the host is, as its transaction id tells when it is completed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Transaction {
    /// Nothing is completed.
    Notice,
    /// Packet data in flight, by queue and slot.
    Data {
        /// The transmit queue.
        queue: u16,
        /// The slot in the queue's table.
        slot: u32,
    },
    /// An NVSP request.
    Nvsp(u32),
    /// An RNDIS control message.
    Rndis(u32),
}

impl Transaction {
    const KIND_SHIFT: u32 = 48;

    /// The id. It is never 0, which the host would not complete.
    pub(crate) fn id(self) -> u64 {
        let (kind, value) = match self {
            Self::Notice => (1u64, 0),
            Self::Data { queue, slot } => (2, (u64::from(queue) << 32) | u64::from(slot)),
            Self::Nvsp(sequence) => (3, sequence.into()),
            Self::Rndis(id) => (4, id.into()),
        };
        (kind << Self::KIND_SHIFT) | value
    }

    /// What the id of a completion stands for, if it is one of ours.
    pub(crate) fn from_id(id: u64) -> Option<Self> {
        let (high, low) = ((id >> 32) as u16, id as u32);
        Some(match id >> Self::KIND_SHIFT {
            2 => Self::Data {
                queue: high,
                slot: low,
            },
            3 if high == 0 => Self::Nvsp(low),
            4 if high == 0 => Self::Rndis(low),
            _ => return None,
        })
    }
}

/// A queue: a channel and what goes over it.
#[pin_data]
pub(crate) struct Queue {
    /// The channel, once it is open. Until then the queue transmits on the primary one.
    handle: SetOnce<ChannelHandle>,
    /// The transmitting side.
    #[pin]
    pub(crate) tx: TxState,
    /// Completions of received packets that are still owed to the host.
    pub(crate) owed: Atomic<u32>,
}

impl Queue {
    fn new(dev: &Device<Netvsc>, index: u16) -> Result<Pin<KBox<Self>>> {
        KBox::try_pin_init(
            try_pin_init!(Self {
                handle: SetOnce::new(),
                tx <- TxState::new(dev, index),
                owed: Atomic::new(0),
            }? Error),
            GFP_KERNEL,
        )
    }

    /// Notes the channel, which is open now.
    pub(crate) fn set_channel(&self, channel: &ChannelHandle) {
        if self.handle.as_ref().is_none() {
            self.handle.populate(channel.clone());
        }
    }

    /// The channel, if it is open.
    pub(crate) fn channel(&self) -> Option<&ChannelHandle> {
        self.handle.as_ref()
    }
}

/// What everybody uses who has to do with the connection.
#[pin_data]
pub(crate) struct Shared {
    /// The device on the bus.
    pub(crate) hv: ARef<vmbus::Device>,
    /// The network device. It refers to this object until it is unregistered.
    pub(crate) dev: DeviceRef<Netvsc>,
    /// The host can access only what is shared with it.
    pub(crate) is_isolated: bool,
    /// The version of the protocol, 0 until it is negotiated.
    version: Atomic<u32>,
    /// NVSP requests.
    #[pin]
    pub(crate) control: Control,
    /// RNDIS requests.
    #[pin]
    pub(crate) rndis: Rndis,
    /// Where received packets are.
    pub(crate) recv: RcuSlot<Arc<RecvBuffer>>,
    /// Where packets are copied to be sent.
    pub(crate) send: RcuSlot<Arc<SendBuffer>>,
    /// The queues that there may be.
    pub(crate) queues: KVec<Pin<KBox<Queue>>>,
    /// Number of queues in use.
    pub(crate) num_queues: Atomic<u32>,
    /// Most queues that the host would give.
    pub(crate) max_queues: Atomic<u32>,
    /// The host does not take what is sent: it is not waited for.
    pub(crate) stuck: Atomic<bool>,
    /// Queues must not be woken.
    pub(crate) tx_disabled: Atomic<bool>,
    /// Largest TCP packet that the host segments.
    pub(crate) gso_max: Atomic<u32>,
    /// There is no link.
    pub(crate) link_down: Atomic<bool>,
    /// The host has sent a table of channels to transmit on.
    pub(crate) has_send_table: Atomic<bool>,
    /// Subchannels are welcome.
    pub(crate) wants_subchannels: Atomic<bool>,
    /// A subchannel was offered and opened, or failed to.
    #[pin]
    pub(crate) subchannel_event: Completion,
    /// The subchannels' receivers. They refer to this object, so the owner must clear the list.
    #[pin]
    pub(crate) subchannels: Mutex<KVec<Arc<Receiver>>>,
    /// Subchannels that could not be opened.
    pub(crate) subchannels_failed: Atomic<u32>,
}

impl Shared {
    fn new(dev: &Device<Netvsc>, hv: &vmbus::Device<Bound>, queues: u32) -> Result<Arc<Self>> {
        let mut list = KVec::with_capacity(queues as usize, GFP_KERNEL)?;
        for index in 0..queues {
            list.push(Queue::new(dev, index as u16)?, GFP_KERNEL)?;
        }
        Arc::pin_init(
            try_pin_init!(Self {
                hv: (&**hv).into(),
                dev: dev.to_ref(),
                is_isolated: vmbus::is_isolated(),
                version: Atomic::new(0),
                control <- Control::new(),
                rndis <- Rndis::new(),
                recv: RcuSlot::new(),
                send: RcuSlot::new(),
                queues: list,
                num_queues: Atomic::new(1),
                max_queues: Atomic::new(1),
                stuck: Atomic::new(false),
                tx_disabled: Atomic::new(true),
                gso_max: Atomic::new(0),
                link_down: Atomic::new(false),
                has_send_table: Atomic::new(false),
                wants_subchannels: Atomic::new(false),
                subchannel_event <- Completion::new(),
                subchannels <- new_mutex!(KVec::new(), "hv_netvsc::subchannels"),
                subchannels_failed: Atomic::new(0),
            }? Error),
            GFP_KERNEL,
        )
    }

    /// The negotiated version.
    pub(crate) fn version(&self) -> Version {
        Version(self.version.load(Relaxed))
    }

    /// The primary channel.
    pub(crate) fn primary(&self) -> Result<&ChannelHandle> {
        self.queues
            .first()
            .and_then(|queue| queue.channel())
            .ok_or(ENODEV)
    }

    /// The channel by which a queue transmits.
    pub(crate) fn channel(&self, queue: u16) -> Result<&ChannelHandle> {
        self.queues
            .get(usize::from(queue))
            .and_then(|queue| queue.channel())
            .map_or_else(|| self.primary(), Ok)
    }

    /// Number of queues in use.
    pub(crate) fn num_queues(&self) -> u32 {
        self.num_queues.load(Relaxed)
    }

    /// Whether nothing is under way to or from the host.
    fn is_idle(&self) -> bool {
        self.queues
            .iter()
            .all(|queue| queue.tx.in_flight() == 0 && queue.owed.load(Relaxed) == 0)
    }

    /// Whether the host has read everything and there is nothing to read.
    fn is_empty(&self) -> bool {
        self.queues.iter().all(|queue| {
            queue
                .channel()
                .and_then(|channel| channel.ring().ok())
                .is_none_or(|ring| ring.bytes_to_read() == 0)
        })
    }

    /// Waits until nothing is under way.
    fn drain(&self, mut done: impl FnMut(&Self) -> bool) -> Result {
        let start = Instant::<Monotonic>::now();
        while !done(self) {
            if self.hv.is_rescinded() {
                // The host completes nothing any more.
                return Err(ENODEV);
            }
            if start.elapsed() >= control::TIMEOUT {
                return Err(ETIMEDOUT);
            }
            fsleep(Delta::from_millis(2));
        }
        Ok(())
    }

    /// After the packet filter was cleared: waits until the last packets are through.
    pub(crate) fn wait_until_empty(&self) -> Result {
        self.drain(|this| this.is_empty() && this.is_idle())
    }
}

/// The handler of a channel.
#[pin_data]
pub(crate) struct Receiver {
    #[pin]
    napi: Napi<RxPoll>,
}

impl Receiver {
    pub(crate) fn new<'a>(
        dev: &'a Device<Netvsc>,
        shared: &Arc<Shared>,
        index: u16,
    ) -> impl PinInit<Self, Error> + 'a {
        let shared = RxShared {
            connection: shared.clone(),
            index,
        };
        try_pin_init!(Self {
            napi <- Napi::new(dev, index, RxPoll::new()?, shared),
        }? Error)
    }

    /// Tells user space which queue this serves.
    pub(crate) fn bind(&self, rtnl: &Rtnl) {
        self.napi.bind_queue(self.napi.shared().index, rtnl);
    }

    /// Begins to poll: something has come by `channel`.
    pub(crate) fn notify(&self, channel: &ChannelHandle) {
        if let Some(queue) = self.napi.shared().queue() {
            queue.set_channel(channel);
        }
        self.napi.schedule();
    }
}

impl ChannelHandler for Receiver {
    fn on_event(&self, channel: &ChannelHandle) {
        self.notify(channel);
    }

    fn on_subchannel(&self, offer: SubchannelOffer<'_>) {
        subchannel::offered(&self.napi.shared().connection, self.napi.device(), offer);
    }
}

/// How to open the channels.
pub(crate) fn open_params() -> OpenParams {
    OpenParams {
        send_ring: config::ring_bytes(),
        recv_ring: config::ring_bytes(),
        read_mode: ReadMode::Isr,
        max_packet_size: MAX_PACKET,
    }
}

/// The owner of a connection. Dropping it ends the connection.
pub(crate) struct Connection {
    /// Open as long as the connection lasts; taken out when it is dropped.
    channel: Option<Channel<Receiver>>,
    /// What everybody uses.
    pub(crate) shared: Arc<Shared>,
}

impl Connection {
    /// Connects to the host: opens the channel, negotiates, shares the buffers, initialises the
    /// device and finds out what it can do. Subchannels come later.
    ///
    /// Returns the connection and the permanent address of the adapter.
    pub(crate) fn new(
        dev: &Device<Netvsc>,
        hv: &vmbus::Device<Bound>,
        config: &Config,
        rtnl: &Rtnl,
    ) -> Result<(Self, [u8; net::ETH_ALEN])> {
        let queues = config
            .channels
            .min(net::online_cpus())
            .clamp(1, config::CHANNELS_MAX);
        let shared = Shared::new(dev, hv, queues)?;
        let channel = Channel::open(hv, &open_params(), Receiver::new(dev, &shared, 0))
            .inspect_err(|e| netdev_err!(dev, "unable to open channel: {}\n", e.to_errno()))?;
        // From here on dropping the connection unwinds whatever has been done.
        let connection = Self {
            channel: Some(channel),
            shared,
        };
        let shared = &connection.shared;
        if let Some(channel) = &connection.channel {
            if let Some(queue) = shared.queues.first() {
                queue.set_channel(channel.handle());
            }
            channel.handler().bind(rtnl);
        }
        Self::connect(shared, hv, dev.mtu(), config).inspect_err(|e| {
            netdev_err!(dev, "unable to connect to NetVSP - {}\n", e.to_errno());
        })?;
        rndis::initialise(shared)?;
        let address = offload::set_up(dev, shared, rtnl)?;
        if queues > 1 {
            // They are opened when they were asked for, and ignored until then.
            if let Some(channel) = &connection.channel {
                channel.accept_subchannels();
            }
        }
        Ok((connection, address))
    }

    /// The NVSP part.
    fn connect(shared: &Shared, hv: &vmbus::Device<Bound>, mtu: u32, config: &Config) -> Result {
        let version = control::negotiate(shared, mtu)?;
        shared.version.store(version.0, Relaxed);
        let recv = control::share_recv_buffer(shared, hv, version, config)?;
        shared.recv.replace(Some(Arc::new(recv, GFP_KERNEL)?));
        let send = control::share_send_buffer(shared, hv, config)?;
        shared.send.replace(Some(Arc::new(send, GFP_KERNEL)?));
        Ok(())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let shared = &self.shared;
        shared.wants_subchannels.store(false, Relaxed);
        rndis::halt(shared);
        // What is left after the deadline is freed when the channel is closed.
        if !shared.stuck.load(Relaxed) {
            let _ = shared.drain(Shared::is_idle);
        }

        // On the older buses the buffers go before the channel, on the newer ones after it.
        let early = vmbus::protocol_version() < vmbus::Version::V4_0;
        let guard = rcu::read_lock();
        let has_recv = shared.recv.borrow(&guard).is_some();
        let has_send = shared.send.borrow(&guard).is_some();
        drop(guard);
        if has_recv {
            // It can only fail if the channel is gone, and then the buffer is ours anyway.
            let _ = control::revoke_recv_buffer(shared);
            if early {
                shared.recv.replace(None);
            }
        }
        if has_send {
            let _ = control::revoke_send_buffer(shared);
            if early {
                shared.send.replace(None);
            }
        }
        drop(self.channel.take());
        shared.recv.replace(None);
        shared.send.replace(None);
        // The packets that the host did not complete.
        for (index, queue) in shared.queues.iter().enumerate() {
            queue.tx.abandon();
            shared.dev.reset_queue(index as u16);
        }
        let subchannels = core::mem::take(&mut *shared.subchannels.lock());
        drop(subchannels);
    }
}
