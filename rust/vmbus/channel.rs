// SPDX-License-Identifier: GPL-2.0

//! Channels: opening, closing, and who may use one when.
//!
//! The owner of an open primary channel is [`Channel`]; dropping it closes the channel together
//! with its subchannels. Everybody else has a [`ChannelHandle`], which stays valid memory for ever
//! and gives access to the rings ([`ChannelHandle::ring`]) only as long as the channel is open.
//! An access holds an RCU read lock, and closing waits for a grace period before it lets the bus
//! driver free the rings.

use core::ptr::NonNull;

use hyperv_bindings as bindings;
use kernel::{
    device,
    error::to_result,
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
        Mutex, //
    },
    types::Opaque, //
};

use crate::{
    ring::Ring,
    Device, //
};

/// The largest packet a channel takes unless told otherwise.
const DEFAULT_MAX_PACKET_SIZE: u32 = bindings::VMBUS_DEFAULT_MAX_PKT_SIZE;

/// A channel as the host offered it, open or not.
///
/// # Invariants
///
/// An [`Offer`] instance represents a valid `struct vmbus_channel`.
#[repr(transparent)]
pub struct Offer(Opaque<bindings::vmbus_channel>);

impl Offer {
    /// Makes a reference of the C pointer.
    ///
    /// # Safety
    ///
    /// `ptr` must point to a `struct vmbus_channel` that is valid for `'a`.
    pub(crate) unsafe fn from_raw<'a>(ptr: *mut bindings::vmbus_channel) -> &'a Self {
        // SAFETY: By the safety requirements the pointer is valid; the type is transparent.
        unsafe { &*ptr.cast() }
    }

    pub(crate) fn as_raw(&self) -> *mut bindings::vmbus_channel {
        self.0.get()
    }

    /// Number of the channel on the bus.
    pub fn relid(&self) -> u32 {
        // SAFETY: By the type invariants the channel is valid; the field does not change.
        unsafe { (*self.as_raw()).offermsg.child_relid }
    }

    /// Number among the channels of its device, 0 for the primary one.
    pub fn subchannel_index(&self) -> u16 {
        // SAFETY: By the type invariants the channel is valid; the field does not change.
        unsafe { (*self.as_raw()).offermsg.offer.sub_channel_index }
    }

    /// CPU to which the host sends the channel's interrupts.
    pub fn target_cpu(&self) -> u32 {
        // SAFETY: By the type invariants the channel is valid. The field may change at any time,
        // which C readers accept as well.
        unsafe { (&raw const (*self.as_raw()).target_cpu).read_volatile() }
    }

    /// Megabytes of MMIO space the device wants, as the host says.
    pub fn mmio_megabytes(&self) -> u16 {
        // SAFETY: By the type invariants the channel is valid; the field does not change.
        unsafe { (*self.as_raw()).offermsg.offer.mmio_megabytes }
    }

    /// Whether the host took the offer back.
    pub fn is_rescinded(&self) -> bool {
        // SAFETY: By the type invariants the channel is valid. The field may change at any time,
        // from false to true.
        unsafe { (&raw const (*self.as_raw()).rescind).read_volatile() }
    }
}

/// Where the callback of a channel runs and who masks the host's interrupts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum ReadMode {
    /// In a tasklet, which runs until the ring is empty; interrupts are masked meanwhile.
    Batched,
    /// In a tasklet, interrupts stay on.
    Direct,
    /// In the interrupt. The driver masks and unmasks ([`Ring::begin_read`], [`Ring::end_read`]).
    Isr,
}

impl ReadMode {
    const fn to_raw(self) -> bindings::vmbus_channel_hv_callback_mode {
        match self {
            Self::Batched => bindings::vmbus_channel_hv_callback_mode_HV_CALL_BATCHED,
            Self::Direct => bindings::vmbus_channel_hv_callback_mode_HV_CALL_DIRECT,
            Self::Isr => bindings::vmbus_channel_hv_callback_mode_HV_CALL_ISR,
        }
    }
}

/// How to open a channel.
#[derive(Clone, Copy)]
pub struct OpenParams {
    /// Bytes of the ring to the host, header included, a multiple of the page size.
    pub send_ring: usize,
    /// Bytes of the ring from the host, likewise. See [`ring_size`].
    pub recv_ring: usize,
    /// Where the callback runs.
    pub read_mode: ReadMode,
    /// Largest packet from the host in bytes; 0 for the bus's default of 4 KiB.
    pub max_packet_size: u32,
}

/// Size of a ring with room for `payload` bytes, with the header and in whole pages.
///
/// A ring much larger than the header loses the header's page, a smaller one grows by it.
pub const fn ring_size(payload: usize) -> usize {
    const HEADER: usize = core::mem::size_of::<bindings::hv_ring_buffer>();
    let header = if payload >= 8 * HEADER { 0 } else { HEADER };
    (payload + header + kernel::page::PAGE_SIZE - 1) & kernel::page::PAGE_MASK
}

/// The driver's side of an open channel.
pub trait ChannelHandler: Send + Sync + 'static {
    /// The host has put something into the ring, or has taken what the driver waited for.
    ///
    /// Runs in a tasklet, or in the interrupt ([`ReadMode::Isr`]).
    fn on_event(&self, channel: &ChannelHandle);

    /// The host offers a subchannel. Runs in process context, and only for a primary channel with
    /// [`Channel::accept_subchannels`].
    fn on_subchannel(&self, offer: SubchannelOffer<'_>) {
        let _ = offer;
    }
}

/// What all users of a channel share.
///
/// # Invariants
///
/// While `open` is true, and for an RCU grace period longer, `raw` points to a valid channel with
/// valid rings.
pub(crate) struct Shared {
    pub(crate) raw: NonNull<bindings::vmbus_channel>,
    open: Atomic<bool>,
    /// Somebody reads the inbound ring.
    pub(crate) reading: Atomic<bool>,
    relid: u32,
    subchannel_index: u16,
}

// SAFETY: The channel may be used from any thread, the C functions do their own locking; the
// inbound ring, which has no lock, is guarded by `reading`.
unsafe impl Send for Shared {}

// SAFETY: See above.
unsafe impl Sync for Shared {}

/// What C gets as the context of a channel's callback.
#[pin_data]
struct Context<H> {
    handle: ChannelHandle,
    /// An event came before the channel was marked open.
    missed: Atomic<bool>,
    subchannels: Arc<Subchannels>,
    #[pin]
    handler: H,
}

/// Something that keeps a subchannel's context alive.
trait Keep: Send + Sync {
    fn shared(&self) -> &Shared;
}

impl<H: ChannelHandler> Keep for Context<H> {
    fn shared(&self) -> &Shared {
        &self.handle.0
    }
}

/// The subchannels that were opened, `None` when no more may be.
#[pin_data]
struct Subchannels {
    #[pin]
    list: Mutex<Option<KVec<Arc<dyn Keep>>>>,
}

impl Subchannels {
    fn new(list: Option<KVec<Arc<dyn Keep>>>) -> Result<Arc<Self>> {
        Arc::pin_init(
            try_pin_init!(Self {
                list <- new_mutex!(list, "vmbus::Subchannels"),
            }),
            GFP_KERNEL,
        )
    }
}

impl<H: ChannelHandler> Context<H> {
    /// Allocates the context of the channel `offer` and opens the channel.
    ///
    /// If opening fails the context is returned with the error: the caller has to keep it until the
    /// channel's callback is reset, because the bus driver has set it already.
    fn open(
        offer: &Offer,
        params: &OpenParams,
        subchannels: Arc<Subchannels>,
        handler: impl PinInit<H, Error>,
    ) -> Result<(Arc<Self>, Result)> {
        let raw = offer.as_raw();
        let max_packet_size = match params.max_packet_size {
            0 => DEFAULT_MAX_PACKET_SIZE,
            size => size,
        };
        // The bus driver copies up to this much from any place of the ring, which is mapped twice
        // in a row: it must not be longer than the ring.
        if params.recv_ring < ring_size(0) + max_packet_size as usize {
            return Err(EINVAL);
        }
        let send_ring = u32::try_from(params.send_ring)?;
        let recv_ring = u32::try_from(params.recv_ring)?;

        let shared = Arc::new(
            // INVARIANT: `open` is false.
            Shared {
                raw: NonNull::new(raw).ok_or(EINVAL)?,
                open: Atomic::new(false),
                reading: Atomic::new(false),
                relid: offer.relid(),
                subchannel_index: offer.subchannel_index(),
            },
            GFP_KERNEL,
        )?;
        let context = Arc::pin_init(
            try_pin_init!(Self {
                handle: ChannelHandle(shared),
                missed: Atomic::new(false),
                subchannels,
                handler <- handler,
            }),
            GFP_KERNEL,
        )?;

        // SAFETY: The channel is valid. Nobody else uses these fields, since only the driver of
        // the device opens its channels and this one is not open.
        unsafe {
            (*raw).callback_mode = params.read_mode.to_raw();
            (*raw).max_pkt_size = max_packet_size;
            // The host gets the ids given at sending, none of the bus driver's.
            (*raw).rqstor_size = 0;
            (*raw).next_request_id_callback = None;
            (*raw).request_addr_callback = None;
            // An earlier user's table was freed when it closed the channel, but closing it again
            // would free it again.
            (*raw).requestor.req_arr = core::ptr::null_mut();
            (*raw).requestor.req_bitmap = core::ptr::null_mut();
        }

        // SAFETY: The channel is valid and not open. The callback's context stays valid until the
        // channel was closed (or, on failure, until its callback was reset): the callers keep it.
        let opened = to_result(unsafe {
            bindings::vmbus_open(
                raw,
                send_ring,
                recv_ring,
                core::ptr::null_mut(),
                0,
                Some(Self::callback),
                Arc::as_ptr(&context).cast_mut().cast(),
            )
        });
        if opened.is_ok() {
            // INVARIANT: The channel is open.
            context.handle.0.open.store(true, Relaxed);
            crate::sync::smp_mb();
            if context.missed.load(Relaxed) {
                // SAFETY: The channel is valid and open.
                unsafe { bindings::hyperv_channel_kick(raw) };
            }
        }
        Ok((context, opened))
    }

    extern "C" fn callback(context: *mut c_void) {
        // SAFETY: `context` is what `open` gave, and is valid as long as the callback is set.
        let context = unsafe { &*context.cast::<Self>() };
        if context.handle.0.open.load(Relaxed) {
            context.handler.on_event(&context.handle);
            return;
        }
        context.missed.store(true, Relaxed);
        crate::sync::smp_mb();
        // The channel may have been marked open in between, by somebody who did not see `missed`.
        if context.handle.0.open.load(Relaxed) {
            context.handler.on_event(&context.handle);
        }
    }

    extern "C" fn subchannel_callback(new: *mut bindings::vmbus_channel) {
        let (context, subchannels) = {
            let _guard = rcu::read_lock();
            // SAFETY: The bus driver calls this with a valid subchannel of a valid primary channel.
            let primary = unsafe { (*new).primary_channel };
            // SAFETY: See above. The field may change concurrently, to null.
            let set = unsafe { (&raw const (*primary).sc_creation_callback).read_volatile() };
            if set.is_none() {
                return;
            }
            // SAFETY: See above. The callback is ours, so the context is what `open` gave.
            let context = unsafe { (*primary).channel_callback_context.cast::<Self>() };
            // SAFETY: The callback is reset before the grace period after which the context may be
            // freed, and was set inside this read-side critical section: the context is valid. It
            // was made by `open` of the same `H`, which `accept_subchannels` ensures.
            (context, unsafe { (*context).subchannels.clone() })
        };

        let mut list = subchannels.list.lock();
        if let Some(list) = &mut *list {
            // SAFETY: The list has not been taken yet, so the context is valid until it is; that
            // needs the lock we have.
            let context = unsafe { &*context };
            // SAFETY: The bus driver calls this with a valid subchannel.
            let offer = unsafe { Offer::from_raw(new) };
            context
                .handler
                .on_subchannel(SubchannelOffer { offer, list });
        }
    }
}

/// A subchannel that the host offers.
pub struct SubchannelOffer<'a> {
    offer: &'a Offer,
    list: &'a mut KVec<Arc<dyn Keep>>,
}

impl SubchannelOffer<'_> {
    /// The offer itself.
    pub fn offer(&self) -> &Offer {
        self.offer
    }

    /// Opens the subchannel. It belongs to its primary [`Channel`] and is closed with it. Sleeps.
    pub fn open<H: ChannelHandler>(
        self,
        params: &OpenParams,
        handler: impl PinInit<H, Error>,
    ) -> Result<ChannelHandle> {
        // Room for the context first, since it must be kept in any case.
        self.list.reserve(1, GFP_KERNEL)?;
        let none = Subchannels::new(None)?;
        let (context, opened) = Context::<H>::open(self.offer, params, none, handler)?;
        let handle = context.handle.clone();
        self.list.push(context, GFP_KERNEL)?;
        opened?;
        Ok(handle)
    }
}

/// An open primary channel.
///
/// Dropping it closes the channel and its subchannels; this sleeps. When it returns, no callback
/// runs any more and all [`Ring`]s are gone.
///
/// # Invariants
///
/// `context` is that of the primary channel of `_device`, which is valid as long as the device is.
pub struct Channel<H: ChannelHandler> {
    context: Arc<Context<H>>,
    _device: ARef<Device>,
}

impl<H: ChannelHandler> Channel<H> {
    /// Opens the primary channel of `dev`. Sleeps.
    ///
    /// Fails with `EINVAL` if the ring from the host is too small for the largest packet.
    pub fn open(
        dev: &Device<device::Bound>,
        params: &OpenParams,
        handler: impl PinInit<H, Error>,
    ) -> Result<Self> {
        let subchannels = Subchannels::new(Some(KVec::new()))?;
        let (context, opened) = Context::open(dev.offer(), params, subchannels, handler)?;
        // INVARIANT: The context was made for the primary channel.
        // Dropping it resets the callback even if the channel did not open.
        let channel = Self {
            context,
            _device: (&**dev).into(),
        };
        opened?;
        Ok(channel)
    }

    /// The handler given at opening.
    pub fn handler(&self) -> &H {
        &self.context.handler
    }

    /// What everybody but the owner uses.
    pub fn handle(&self) -> &ChannelHandle {
        &self.context.handle
    }

    /// From now on [`ChannelHandler::on_subchannel`] is called for each subchannel that is offered.
    pub fn accept_subchannels(&self) {
        // SAFETY: By the type invariants the channel is valid, and its callback context is a
        // `Context<H>`.
        unsafe {
            bindings::vmbus_set_sc_create_callback(
                self.context.handle.0.raw.as_ptr(),
                Some(Context::<H>::subchannel_callback),
            )
        };
    }
}

impl<H: ChannelHandler> Drop for Channel<H> {
    fn drop(&mut self) {
        let shared = &self.context.handle.0;

        // No new subchannels; this waits for one that is just being opened.
        let subchannels = self.context.subchannels.list.lock().take();

        // No new accesses to the rings, and wait for those there are.
        shared.open.store(false, Relaxed);
        for sub in subchannels.iter().flatten() {
            sub.shared().open.store(false, Relaxed);
        }
        // SAFETY: No requirements; we may sleep.
        unsafe { bindings::synchronize_rcu() };

        // SAFETY: By the type invariants the channel is valid. If it is not open, this resets the
        // callback and that is all. No callback of it or its subchannels runs when the function
        // returns.
        unsafe { bindings::vmbus_close(shared.raw.as_ptr()) };

        // `subchannel_callback` may have seen its callback set before that was reset.
        // SAFETY: No requirements; we may sleep.
        unsafe { bindings::synchronize_rcu() };

        // Now nobody uses the contexts of the subchannels.
        drop(subchannels);
    }
}

/// A reference to a channel that may be closed at any time by its owner.
#[derive(Clone)]
pub struct ChannelHandle(pub(crate) Arc<Shared>);

impl ChannelHandle {
    /// Number of the channel on the bus.
    pub fn relid(&self) -> u32 {
        self.0.relid
    }

    /// Number among the channels of its device, 0 for the primary one.
    pub fn subchannel_index(&self) -> u16 {
        self.0.subchannel_index
    }

    /// Access to the rings, or `ENODEV` when the channel is not open.
    ///
    /// The caller must not sleep while it has the [`Ring`].
    #[inline]
    pub fn ring(&self) -> Result<Ring<'_>> {
        let guard = rcu::read_lock();
        if !self.0.open.load(Relaxed) {
            return Err(ENODEV);
        }
        // The channel is open, and closing it waits for `guard`.
        Ok(Ring::new(&self.0, Some(guard)))
    }

    /// The same as [`Self::ring`] for a caller who has an RCU read lock anyway.
    #[inline]
    pub fn ring_under<'a>(&'a self, _guard: &'a rcu::Guard) -> Result<Ring<'a>> {
        if !self.0.open.load(Relaxed) {
            return Err(ENODEV);
        }
        // The channel is open, and closing it waits for `_guard`.
        Ok(Ring::new(&self.0, None))
    }
}
