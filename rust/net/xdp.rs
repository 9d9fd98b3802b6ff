// SPDX-License-Identifier: GPL-2.0

//! XDP: a BPF program that sees received frames before the stack, and says what becomes of them.
//!
//! A driver keeps the [`Program`] that its [`Xdp::set_program`] gets. For each received frame it
//! takes memory from [`PollContext::frame`](crate::PollContext::frame), fills it, and runs the
//! program on it. That consumes the [`Frame`]; the [`Verdict`] has what is left of it. What other
//! devices redirect to this one comes to [`Xdp::xmit_frames`].
//!
//! C header: [`include/net/xdp.h`](srctree/include/net/xdp.h)

use core::{
    cell::Cell,
    marker::PhantomData,
    mem::ManuallyDrop,
    ptr::NonNull, //
};

use hyperv_bindings as bindings;
use kernel::{
    error::{
        from_result,
        to_result, //
    },
    prelude::*,
    sync::{
        aref::AlwaysRefCounted,
        rcu, //
    },
    types::Opaque, //
};
use vmbus::SharedBytes;

use crate::{
    device::Device,
    page_pool::{
        Page,
        PagePool, //
    },
    rtnl::Rtnl,
    Driver,
    NetDevice,
    SkBuff, //
};

/// Room before a frame, for headers that the program puts there.
const HEADROOM: u32 = bindings::XDP_PACKET_HEADROOM;
/// Room behind a frame, for what a packet of the stack has there.
const TAILROOM: u32 = bindings::HYPERV_CONST_SKB_TAILROOM;

/// Largest frame that fits.
pub const FRAME_MAX: u32 = Page::SIZE - HEADROOM - TAILROOM;

/// Bytes of the buffer that a frame of `len` bytes needs, and those of the largest buffer.
pub const fn buffer_size(len: u32) -> (u32, u32) {
    let aligned = len.next_multiple_of(bindings::HYPERV_CONST_SKB_ALIGN);
    (HEADROOM + aligned + TAILROOM, Page::SIZE)
}

/// What the devices of this crate's drivers can do, in the words of user space.
pub(crate) const FEATURES: u32 = bindings::netdev_xdp_act_NETDEV_XDP_ACT_BASIC
    | bindings::netdev_xdp_act_NETDEV_XDP_ACT_REDIRECT
    | bindings::netdev_xdp_act_NETDEV_XDP_ACT_NDO_XMIT;

/// A loaded BPF program for XDP.
///
/// # Invariants
///
/// The structure is a valid `struct bpf_prog` of that type as long as a reference exists.
#[repr(transparent)]
pub struct Program(Opaque<bindings::bpf_prog>);

// SAFETY: A program can be used and released from any thread.
unsafe impl Send for Program {}

// SAFETY: It does not change.
unsafe impl Sync for Program {}

// SAFETY: `struct bpf_prog` is reference-counted.
unsafe impl AlwaysRefCounted for Program {
    fn inc_ref(&self) {
        // SAFETY: The program is valid.
        unsafe { bindings::bpf_prog_inc(self.as_raw()) };
    }

    unsafe fn dec_ref(obj: NonNull<Self>) {
        // SAFETY: By the safety requirements the program is valid and the reference is ours.
        unsafe { bindings::bpf_prog_put(obj.as_ptr().cast()) };
    }
}

impl Program {
    /// # Safety
    ///
    /// `ptr` must point to a valid program of type XDP for `'a`.
    unsafe fn from_raw<'a>(ptr: NonNull<bindings::bpf_prog>) -> &'a Self {
        // SAFETY: By the safety requirements; the wrapper is transparent.
        unsafe { ptr.cast().as_ref() }
    }

    fn as_raw(&self) -> *mut bindings::bpf_prog {
        self.0.get()
    }
}

/// Where a callback can say to user space why it failed.
pub struct ExtAck<'a> {
    ack: *mut bindings::netlink_ext_ack,
    _lifetime: PhantomData<&'a mut ()>,
}

impl ExtAck<'_> {
    /// Sets the message. It begins with the name of the driver, by custom.
    pub fn set(&mut self, message: &'static CStr) {
        if !self.ack.is_null() {
            // SAFETY: Whoever made this value had a valid pointer or null.
            unsafe { (*self.ack)._msg = message.as_char_ptr() };
        }
    }
}

/// What a driver does about XDP.
pub trait Xdp: Sized {
    /// Sets the program for received frames, or none. On failure the former one stays.
    ///
    /// Setting none succeeds even while the device is being unregistered.
    fn set_program(
        dev: &Device<Self>,
        program: Option<&Program>,
        extack: &mut ExtAck<'_>,
        rtnl: &Rtnl,
    ) -> Result;

    /// Transmits frames that were redirected to the device. Those that it leaves are freed. Runs
    /// with bottom halves off.
    fn xmit_frames(dev: &Device<Self>, frames: &mut Frames<'_>) -> Result;
}

/// Frames that were redirected to a device.
///
/// # Invariants
///
/// The frames from `taken` on are valid and belong to the caller of `ndo_xdp_xmit`.
pub struct Frames<'a> {
    frames: &'a [*mut bindings::xdp_frame],
    taken: usize,
    flags: u32,
}

impl Frames<'_> {
    /// Takes the next frame as a packet of `dev`, received by nobody yet: without its Ethernet
    /// header. `None` if there are no more, or no memory.
    pub fn take(&mut self, dev: &NetDevice) -> Option<SkBuff> {
        let frame = *self.frames.get(self.taken)?;
        // SAFETY: By the type invariants the frame is valid; it stays so if this fails.
        let skb = NonNull::new(unsafe { bindings::xdp_build_skb_from_frame(frame, dev.as_raw()) })?;
        // INVARIANT: The frame belongs to the packet now.
        self.taken += 1;
        // SAFETY: The packet is new.
        Some(unsafe { SkBuff::from_raw(skb) })
    }

    /// How many frames are left.
    pub fn left(&self) -> usize {
        self.frames.len() - self.taken
    }

    /// How many frames were taken.
    pub fn taken(&self) -> usize {
        self.taken
    }

    /// Has another device transmit what is left. `EOPNOTSUPP` if it cannot, and nothing is done.
    pub fn transmit_on(&mut self, dev: &NetDevice, _guard: &rcu::Guard) -> Result {
        let left = self.frames.get(self.taken..).unwrap_or(&[]);
        // SAFETY: The device and the frames are valid. It is called as the core calls it for us.
        let sent = to_result_count(unsafe {
            bindings::netdev_xdp_xmit(
                dev.as_raw(),
                left.len() as c_int,
                left.as_ptr().cast_mut(),
                self.flags,
            )
        })?;
        // INVARIANT: The device has taken so many.
        self.taken += sent.min(left.len());
        Ok(())
    }
}

/// A count, or an error if it is negative.
fn to_result_count(value: c_int) -> Result<usize> {
    usize::try_from(value).map_err(|_| Error::from_errno(value))
}

impl NetDevice {
    /// Whether the driver of the device knows XDP programs.
    pub fn has_xdp(&self) -> bool {
        // SAFETY: The device is valid, and so are its operations.
        unsafe { (*(*self.as_raw()).netdev_ops).ndo_bpf }.is_some()
    }

    /// Sets the XDP program of another driver's device, or none. It sees frames before the program
    /// that user space may have set there.
    ///
    /// The caller holds the device's own lock ([`NetDevice::with_ops_lock`]) if it has one.
    /// `EOPNOTSUPP` if the driver knows no XDP.
    pub fn set_xdp_program(&self, program: Option<&Program>, _rtnl: &Rtnl) -> Result {
        // SAFETY: All-zeroes is a valid value of this C structure.
        let mut bpf: bindings::netdev_bpf = unsafe { core::mem::zeroed() };
        bpf.command = bindings::bpf_netdev_command_XDP_SETUP_PROG;
        let reference = program.map(kernel::sync::aref::ARef::from);
        // SAFETY: It is the member of the union for this command.
        unsafe {
            bpf.__bindgen_anon_1.__bindgen_anon_1.as_mut().prog =
                program.map_or(core::ptr::null_mut(), Program::as_raw);
        }
        // SAFETY: The device is valid and the RTNL is held.
        to_result(unsafe { bindings::netif_xdp_propagate(self.as_raw(), &mut bpf) })?;
        // It is the device's now.
        let _ = ManuallyDrop::new(reference);
        Ok(())
    }
}

/// A receive queue as XDP knows it, and the memory for its frames.
#[pin_data(PinnedDrop)]
pub(crate) struct RxQueue {
    #[pin]
    info: Opaque<bindings::xdp_rxq_info>,
    pool: PagePool,
}

// SAFETY: It can be dropped by any thread.
unsafe impl Send for RxQueue {}

// SAFETY: What is there does not change.
unsafe impl Sync for RxQueue {}

impl RxQueue {
    /// Registers the receive queue `index` of `dev`. Sleeps.
    ///
    /// # Safety
    ///
    /// `napi` must stay valid as long as the result exists, and be disabled when that is dropped.
    pub(crate) unsafe fn new(
        dev: &NetDevice,
        index: u16,
        napi: *mut bindings::napi_struct,
    ) -> Result<Pin<KBox<Self>>> {
        // SAFETY: By the safety requirements.
        let pool = unsafe { PagePool::new(dev, index, napi) }?;
        let (dev, raw) = (dev.as_raw(), pool.as_raw());
        KBox::try_pin_init(
            try_pin_init!(Self {
                info <- Opaque::try_ffi_init(move |info: *mut bindings::xdp_rxq_info| {
                    // SAFETY: The structure, which is new and stays where it is, and the pool are
                    // valid.
                    unsafe {
                        info.write_bytes(0, 1);
                        to_result(bindings::__xdp_rxq_info_reg(info, dev, index.into(), 0, 0))?;
                        to_result(bindings::xdp_rxq_info_reg_mem_model(
                            info,
                            bindings::xdp_mem_type_MEM_TYPE_PAGE_POOL,
                            raw.cast(),
                        ))
                        .inspect_err(|_| bindings::xdp_rxq_info_unreg(info))
                    }
                }),
                pool,
            }? Error),
            GFP_KERNEL,
        )
    }

    /// Memory for a frame of `dev`, the device of the queue. `redirected` is set when a frame is
    /// redirected.
    ///
    /// # Safety
    ///
    /// The caller must run in the poll of the queue's NAPI instance, in a softirq, as long as the
    /// frame exists, and call `xdp_do_flush` at the end of that if `redirected` is set.
    pub(crate) unsafe fn frame<'a>(
        &'a self,
        dev: &'a NetDevice,
        redirected: &'a Cell<bool>,
    ) -> Option<Frame<'a>> {
        // SAFETY: By the safety requirements.
        let page = unsafe { self.pool.page() }?;
        // SAFETY: All-zeroes is a valid value of this C structure.
        let mut xdp: bindings::xdp_buff = unsafe { core::mem::zeroed() };
        // SAFETY: The queue is registered, and the headroom lies inside the page.
        unsafe {
            bindings::xdp_prepare_empty(
                &mut xdp,
                self.info.get(),
                page.address().as_ptr().cast(),
                Page::SIZE,
                HEADROOM,
            );
        }
        // INVARIANT: The buffer is the page, with an empty frame.
        Some(Frame {
            xdp,
            page,
            dev,
            redirected,
        })
    }
}

#[pinned_drop]
impl PinnedDrop for RxQueue {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: It was registered.
        unsafe { bindings::xdp_rxq_info_unreg(self.info.get()) };
    }
}

/// A received frame, for a program.
///
/// # Invariants
///
/// `xdp` describes a frame inside of `page`, with at least [`TAILROOM`] bytes behind it. We are in
/// the poll of a NAPI instance, at the end of which redirected frames are sent.
pub struct Frame<'a> {
    xdp: bindings::xdp_buff,
    page: Page<'a>,
    dev: &'a NetDevice,
    redirected: &'a Cell<bool>,
}

/// What a program decided about a frame.
pub enum Verdict<'a> {
    /// The stack gets it.
    Pass(Processed<'a>),
    /// It is to be transmitted where it came from.
    Transmit(Processed<'a>),
    /// Another device, another CPU or a socket gets it.
    Redirected,
    /// It is gone. If the program failed, those who look for that have been told.
    Dropped,
}

/// A frame that a program has seen, and may have changed.
pub struct Processed<'a>(Frame<'a>);

impl<'a> Frame<'a> {
    /// Appends bytes of a buffer shared with the host. `EMSGSIZE` if they do not fit.
    pub fn append(&mut self, bytes: &SharedBytes<'_>) -> Result {
        let end = self.xdp.data_end as usize;
        let limit = self.page.address().as_ptr() as usize + (Page::SIZE - TAILROOM) as usize;
        if limit - end < bytes.len() {
            return Err(EMSGSIZE);
        }
        // SAFETY: There is room for the bytes, as was checked, in memory that is ours alone. The
        // source is valid, and whatever the host makes of it meanwhile is some bytes.
        // INVARIANT: The frame still is inside of the page.
        unsafe {
            core::ptr::copy_nonoverlapping(
                bytes.as_ptr().cast_const(),
                self.xdp.data_end.cast::<u8>(),
                bytes.len(),
            );
            self.xdp.data_end = self.xdp.data_end.byte_add(bytes.len());
        }
        Ok(())
    }

    /// Runs a program on the frame, and does what is done at once.
    pub fn run(mut self, program: &Program, _guard: &rcu::Guard) -> Verdict<'a> {
        let (dev, raw) = (self.dev.as_raw(), program.as_raw());
        // SAFETY: The program and, by the type invariants, the frame are valid. We are in a
        // softirq and a read-side critical section.
        // INVARIANT: Programs keep frames inside of their buffer.
        let action = unsafe { bindings::bpf_prog_run_xdp(raw, &mut self.xdp) };
        match action {
            bindings::xdp_action_XDP_PASS => return Verdict::Pass(Processed(self)),
            bindings::xdp_action_XDP_TX => return Verdict::Transmit(Processed(self)),
            bindings::xdp_action_XDP_DROP => {}
            bindings::xdp_action_XDP_REDIRECT => {
                // SAFETY: As above. The frame stays ours if this fails.
                if unsafe { bindings::xdp_do_redirect(dev, &mut self.xdp, raw) } == 0 {
                    self.redirected.set(true);
                    self.page.forget();
                    return Verdict::Redirected;
                }
                // SAFETY: The device and the program are valid.
                unsafe { bindings::trace_xdp_exception(dev, raw, action) };
            }
            // SAFETY: As above.
            bindings::xdp_action_XDP_ABORTED => unsafe {
                bindings::trace_xdp_exception(dev, raw, action);
            },
            // SAFETY: As above.
            _ => unsafe { bindings::bpf_warn_invalid_xdp_action(dev, raw, action) },
        }
        Verdict::Dropped
    }
}

impl Processed<'_> {
    /// Makes a packet of the frame, in the same memory. `None` if there is no memory for the rest.
    pub fn into_skb(mut self) -> Option<SkBuff> {
        // SAFETY: By the type invariants the frame is valid, and has the room that a packet needs.
        let skb = NonNull::new(unsafe { bindings::xdp_buff_build_skb(&mut self.0.xdp) })?;
        self.0.page.forget();
        // SAFETY: The packet is new. The page belongs to it now.
        Some(unsafe { SkBuff::from_raw(skb) })
    }
}

/// The callbacks.
pub(crate) struct XdpOps<T>(PhantomData<T>);

impl<T: Driver> XdpOps<T> {
    /// # Safety
    ///
    /// Only the core calls this, as `ndo_bpf` of a device of the driver `T`.
    pub(crate) unsafe extern "C" fn bpf(
        dev: *mut bindings::net_device,
        bpf: *mut bindings::netdev_bpf,
    ) -> c_int {
        from_result(|| {
            // SAFETY: The core calls this with a valid command.
            if unsafe { (*bpf).command } != bindings::bpf_netdev_command_XDP_SETUP_PROG {
                return Err(EINVAL);
            }
            // SAFETY: It is the member of the union for this command.
            let setup = unsafe { (*bpf).__bindgen_anon_1.__bindgen_anon_1.as_ref() };
            // SAFETY: If there is a program it is valid during the call.
            let program = unsafe { NonNull::new(setup.prog).map(|ptr| Program::from_raw(ptr)) };
            let mut extack = ExtAck {
                ack: setup.extack,
                _lifetime: PhantomData,
            };
            // SAFETY: The core calls this with a device that is registered, or being
            // unregistered, and the RTNL held.
            let (dev, rtnl) = unsafe { (Device::<T>::from_raw(dev), Rtnl::assume()) };
            T::set_program(dev, program, &mut extack, &rtnl)?;
            if !setup.prog.is_null() {
                // The caller's reference is ours now; the driver has one of its own.
                // SAFETY: As was said.
                unsafe { bindings::bpf_prog_put(setup.prog) };
            }
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// Only the core calls this, as `ndo_xdp_xmit` of a registered device of the driver `T`.
    pub(crate) unsafe extern "C" fn xmit(
        dev: *mut bindings::net_device,
        count: c_int,
        frames: *mut *mut bindings::xdp_frame,
        flags: u32,
    ) -> c_int {
        if flags & !bindings::XDP_XMIT_FLAGS_MASK != 0 {
            return EINVAL.to_errno();
        }
        let Ok(count) = usize::try_from(count) else {
            return EINVAL.to_errno();
        };
        // SAFETY: The core calls this with a registered device and an array of so many frames.
        let (dev, frames) = unsafe {
            (
                Device::<T>::from_raw(dev),
                core::slice::from_raw_parts(frames, count),
            )
        };
        // INVARIANT: The frames are the caller's, as many as are not taken.
        let mut frames = Frames {
            frames,
            taken: 0,
            flags,
        };
        match T::xmit_frames(dev, &mut frames) {
            // What was taken is gone, whatever happened to the rest.
            Err(e) if frames.taken == 0 => e.to_errno(),
            _ => frames.taken as c_int,
        }
    }
}
