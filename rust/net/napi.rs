// SPDX-License-Identifier: GPL-2.0

//! NAPI: receiving in a softirq, with a budget.
//!
//! C header: [`include/linux/netdevice.h`](srctree/include/linux/netdevice.h)

use core::{
    cell::{
        Cell,
        UnsafeCell, //
    },
    marker::{
        PhantomData,
        PhantomPinned, //
    },
    ptr::NonNull, //
};

use hyperv_bindings as bindings;
use kernel::{
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        SetOnce, //
    },
    types::Opaque, //
};

use crate::{
    device::{
        Device,
        DeviceRef, //
    },
    rtnl::Rtnl,
    xdp,
    Driver,
    SkBuff, //
};

/// What a poll did.
pub struct Polled {
    /// How much of the budget was used. All of it means that there is more to do.
    pub work: i32,
    /// Something else is left to do: poll again in any case.
    pub again: bool,
}

/// The receiving side of a queue.
pub trait Poll: Send {
    /// The driver of the device.
    type Driver: Driver;

    /// What may be used at any time, beside the polling.
    type Shared: Send + Sync;

    /// Receives at most `budget` packets. Runs in a softirq; there is only one poll at a time.
    fn poll(
        &mut self,
        shared: &Self::Shared,
        context: &PollContext<'_, Self::Driver>,
        budget: i32,
    ) -> Polled;

    /// Asks the device to signal again. Tells whether something has come meanwhile.
    fn unmask(shared: &Self::Shared) -> bool;

    /// Asks the device not to signal: polling begins.
    fn mask(shared: &Self::Shared);
}

/// Evidence of running in [`Poll::poll`], and what can be done there.
///
/// # Invariants
///
/// `napi` is valid, belongs to `dev`, and is being polled by this CPU with `budget`.
pub struct PollContext<'a, D> {
    napi: NonNull<bindings::napi_struct>,
    dev: &'a Device<D>,
    xdp: Option<&'a xdp::RxQueue>,
    redirected: Cell<bool>,
    budget: i32,
    /// As in [`Napi`].
    queue: u32,
    _not_send: PhantomData<*mut ()>,
}

impl<'a, D> PollContext<'a, D> {
    /// The device.
    pub fn device(&self) -> &'a Device<D> {
        self.dev
    }

    /// Allocates a packet with room for `len` bytes.
    pub fn alloc_skb(&self, len: u32) -> Option<SkBuff> {
        // SAFETY: By the type invariants we are in the poll of this NAPI.
        let skb = unsafe { bindings::napi_alloc_skb(self.napi.as_ptr(), len) };
        // SAFETY: The packet is new.
        NonNull::new(skb).map(|skb| unsafe { SkBuff::from_raw(skb) })
    }

    /// Memory for a received frame that a program is to see. `None` if there is no memory, or no
    /// budget: then only completions are wanted, maybe with interrupts off.
    pub fn frame(&self) -> Option<xdp::Frame<'_>> {
        if self.budget == 0 {
            return None;
        }
        // SAFETY: By the type invariants we are in the poll of this NAPI, and if there is a budget
        // in a softirq. The frame borrows `self`, and what is redirected is sent after the poll.
        unsafe { self.xdp?.frame(self.dev, &self.redirected) }
    }

    /// Passes a packet to the stack.
    pub fn receive(&self, skb: SkBuff) {
        // SAFETY: By the type invariants we are in the poll of this NAPI, and the packet is ours.
        unsafe { bindings::napi_gro_receive(self.napi.as_ptr(), skb.into_raw()) };
    }

    /// Notes that packets of the transmit queue that this NAPI serves ([`Napi::bind_queue`]), which
    /// was told of them by [`TxQueue::sent`](crate::TxQueue::sent), are out.
    pub fn completed(&self, packets: u32, bytes: u32) {
        if let Some(index) = self.queue.checked_sub(1) {
            // SAFETY: By the type invariants we are in the poll of the one NAPI that serves the
            // queue.
            unsafe { self.dev.complete_queue(index as u16, packets, bytes) };
        }
    }

    /// Frees a packet that was transmitted.
    pub fn consume(&self, skb: SkBuff) {
        // SAFETY: The packet is ours, and by the type invariants the budget is that of this poll.
        unsafe { bindings::napi_consume_skb(skb.into_raw(), self.budget) };
    }
}

/// A NAPI instance, enabled.
///
/// Dropping it disables it and waits for the poll to end; this sleeps. While the device is
/// registered, one that is bound to a queue ([`Napi::bind_queue`]) is dropped under the RTNL only.
///
/// # Invariants
///
/// `napi` is initialised, added to the device and enabled. `poller` is only accessed by the poll.
#[pin_data(PinnedDrop)]
pub struct Napi<P: Poll> {
    #[pin]
    napi: Opaque<bindings::napi_struct>,
    poller: UnsafeCell<P>,
    shared: P::Shared,
    /// The receive queue.
    xdp: SetOnce<Pin<KBox<xdp::RxQueue>>>,
    /// Number of the queues that refer to it, plus one; 0 if none do.
    queue: Atomic<u32>,
    dev: DeviceRef<P::Driver>,
    #[pin]
    _pin: PhantomPinned,
}

// SAFETY: It can be dropped by any thread.
unsafe impl<P: Poll> Send for Napi<P> {}

// SAFETY: `poller` is accessed by one poll at a time, everything else may be used concurrently.
unsafe impl<P: Poll> Sync for Napi<P> {}

impl<P: Poll> Napi<P> {
    /// Adds a NAPI instance for the receive queue `index` of `dev` and enables it. Sleeps.
    ///
    /// Its id and what user space has set for it are those of the last one with this index, which
    /// must have been dropped.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if the device was made with fewer queues.
    pub fn new<'a>(
        dev: &'a Device<P::Driver>,
        index: u16,
        poller: P,
        shared: P::Shared,
    ) -> impl PinInit<Self, Error> + 'a
    where
        P: 'a,
        P::Shared: 'a,
    {
        let init = try_pin_init!(Self {
            // The structure is zeroed here and initialised below, when the rest is.
            napi: Opaque::zeroed(),
            poller: UnsafeCell::new(poller),
            shared,
            xdp: SetOnce::new(),
            queue: Atomic::new(0),
            dev: Self::device_with(dev, index)?,
            _pin: PhantomPinned,
        }? Error);
        init.pin_chain(move |this| {
            // SAFETY: The device is valid, which `dev` of the new object ensures, and the structure
            // stays pinned until it is deleted. The index was checked.
            unsafe {
                bindings::netif_napi_add_config(
                    this.dev.as_raw(),
                    this.napi.get(),
                    Some(Self::callback),
                    index.into(),
                );
                bindings::napi_enable(this.napi.get());
            }
            // SAFETY: The queue is dropped with the new object, which disables the NAPI first.
            let queue = unsafe { xdp::RxQueue::new(&this.dev, index, this.napi.get()) }?;
            this.xdp.populate(queue);
            Ok(())
        })
    }

    /// A reference to a device that has room for the settings of a NAPI instance `index`.
    fn device_with(dev: &Device<P::Driver>, index: u16) -> Result<DeviceRef<P::Driver>> {
        // SAFETY: The device is valid, and the number does not change.
        let count = unsafe { (*dev.as_raw()).num_napi_configs };
        if u32::from(index) < count {
            Ok(dev.to_ref())
        } else {
            Err(EINVAL)
        }
    }

    /// What is shared with the poll.
    pub fn shared(&self) -> &P::Shared {
        &self.shared
    }

    /// The device.
    pub fn device(&self) -> &Device<P::Driver> {
        &self.dev
    }

    /// Begins to poll, unless that is going on. May be called in an interrupt.
    pub fn schedule(&self) {
        // SAFETY: By the type invariants the structure is initialised.
        if unsafe { bindings::napi_schedule_prep(self.napi.get()) } {
            P::mask(&self.shared);
            // SAFETY: We have got the right to schedule it.
            unsafe { bindings::__napi_schedule(self.napi.get()) };
        }
    }

    /// Tells user space that this instance serves the receive and the transmit queue `index`.
    pub fn bind_queue(&self, index: u16, _rtnl: &Rtnl) {
        self.queue.store(u32::from(index) + 1, Relaxed);
        self.set_queue(index, self.napi.get());
    }

    fn forget_queue(&self) {
        if let Some(index) = self.queue.xchg(0, Relaxed).checked_sub(1) {
            self.set_queue(index as u16, core::ptr::null_mut());
        }
    }

    fn set_queue(&self, index: u16, napi: *mut bindings::napi_struct) {
        // SAFETY: The device is valid. The number of queues of the allocation is checked.
        unsafe {
            let dev = self.dev.as_raw();
            if u32::from(index) < (*dev).num_tx_queues && u32::from(index) < (*dev).num_rx_queues {
                bindings::netif_queue_set_napi(
                    dev,
                    index.into(),
                    bindings::netdev_queue_type_NETDEV_QUEUE_TYPE_RX,
                    napi,
                );
                bindings::netif_queue_set_napi(
                    dev,
                    index.into(),
                    bindings::netdev_queue_type_NETDEV_QUEUE_TYPE_TX,
                    napi,
                );
            }
        }
    }

    /// # Safety
    ///
    /// Only the core calls this, as the poll (callback) of the `napi_struct` in a `Napi<P>`.
    unsafe extern "C" fn callback(napi: *mut bindings::napi_struct, budget: c_int) -> c_int {
        // SAFETY: The structure lies in a `Napi<P>`, which is pinned and alive: dropping it waits
        // for us.
        let this = unsafe {
            &*napi
                .byte_sub(core::mem::offset_of!(Self, napi))
                .cast::<Self>()
        };
        let polled = {
            // SAFETY: By the type invariants only we access it, and there is one poll at a time.
            let poller = unsafe { &mut *this.poller.get() };
            // INVARIANT: The core polls it.
            let context = PollContext {
                // SAFETY: The pointer is valid.
                napi: unsafe { NonNull::new_unchecked(napi) },
                dev: &this.dev,
                xdp: this.xdp.as_ref().map(|queue| &**queue),
                redirected: Cell::new(false),
                budget,
                queue: this.queue.load(Relaxed),
                _not_send: PhantomData,
            };
            let polled = poller.poll(&this.shared, &context, budget);
            if context.redirected.get() {
                // SAFETY: We are in the poll, by which the frames were redirected.
                unsafe { bindings::xdp_do_flush() };
            }
            polled
        };
        if polled.work >= budget {
            return budget;
        }
        // SAFETY: We are in the poll. After this another one can begin.
        if unsafe { bindings::napi_complete_done(napi, polled.work) }
            && (polled.again || P::unmask(&this.shared))
        {
            this.schedule();
        }
        polled.work
    }
}

#[pinned_drop]
impl<P: Poll> PinnedDrop for Napi<P> {
    fn drop(self: Pin<&mut Self>) {
        self.forget_queue();
        // SAFETY: By the type invariants it is enabled and added. We may sleep.
        unsafe {
            bindings::napi_disable(self.napi.get());
            bindings::netif_napi_del(self.napi.get());
        }
    }
}
