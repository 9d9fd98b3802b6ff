// SPDX-License-Identifier: GPL-2.0

//! A virtual PCI bus.
//!
//! Lock order: `Bus::state`, then the PCI core's rescan lock, then a child's slot. The spinlocks
//! come last and are not nested: `Bus::children`, `Bus::events`, `Bus::channel`, the configuration
//! window's, those of the requests.

use hyperv_wire::vpci::{
    CreateInterruptReply,
    DeleteInterrupt,
    Event,
    Function,
    ProtocolVersion,
    SlotNumber,
    BARS, //
};
use kernel::{
    device, new_mutex,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        Mutex,
        SetOnce, //
    },
    time::{
        delay::fsleep,
        Delta,
        Instant,
        Monotonic, //
    },
    workqueue::{
        impl_has_work,
        new_work,
        Work,
        WorkItem, //
    },
};
use pci_host::{
    Invalidate,
    OrderedQueue,
    RootBus,
    Slot, //
};
use vmbus::{
    new_spinlock_irq,
    sync::SpinLockIrq,
    ChannelHandle,
    ChannelHandler,
    Completion,
    PacketKind,
    Reply,
    Ring, //
};
use zerocopy::IntoBytes;

use crate::{
    bars::Space,
    config::ConfigWindow,
    protocol::eproto,
    relations::is_same,
    requests::{
        Requests,
        Response,
        Taker, //
    },
};

/// How often to look for room in a full ring.
const RING_POLL: Delta = Delta::from_millis(1);

/// A function on the bus, as the host described it.
#[pin_data]
pub(crate) struct Child {
    pub(crate) function: Function,
    /// What the BARs read as after all ones were written to them.
    pub(crate) bars: [u32; BARS],
    /// The host was told that the function has its resources.
    pub(crate) assigned: Atomic<bool>,
    /// The host wants the function back.
    ejecting: Atomic<bool>,
    /// The host has taken the function away.
    pub(crate) gone: Atomic<bool>,
    /// The entry in `/sys/bus/pci/slots`.
    #[pin]
    pub(crate) slot: Mutex<Option<Slot>>,
    /// Whom to tell of configuration blocks that have changed.
    #[pin]
    pub(crate) invalidate: SpinLockIrq<Option<Invalidate>>,
}

impl Child {
    /// Makes a function that is not on the bus yet.
    pub(crate) fn new(function: Function, bars: [u32; BARS]) -> Result<Arc<Self>> {
        Arc::pin_init(
            try_pin_init!(Self {
                function,
                bars,
                assigned: Atomic::new(false),
                ejecting: Atomic::new(false),
                gone: Atomic::new(false),
                slot <- new_mutex!(None),
                invalidate <- new_spinlock_irq!(None),
            }),
            GFP_KERNEL,
        )
    }
}

/// How far the PCI core knows the bus.
pub(crate) enum State {
    /// Not yet: it is being probed.
    Probing,
    /// It is registered, with windows of MMIO space that start there.
    Installed(RootBus<Bus>, Space),
    /// The same, and the machine is suspended.
    Suspended(RootBus<Bus>, Space),
    /// Not any more.
    Removed,
}

/// What the host has said and nobody has acted on yet.
struct Events {
    /// Where the work is done, `None` when nothing is accepted any more.
    queue: Option<OrderedQueue>,
    /// The functions that are on the bus, where only the last word counts.
    relations: Option<KVec<Function>>,
    /// Functions that the host wants back.
    ejects: KVec<Arc<Child>>,
}

/// A virtual PCI bus.
#[pin_data]
pub(crate) struct Bus {
    pub(crate) dev: ARef<vmbus::Device>,
    pub(crate) domain: u16,
    pub(crate) version: SetOnce<ProtocolVersion>,
    pub(crate) config: SetOnce<Pin<KBox<ConfigWindow>>>,
    pub(crate) requests: Requests,
    #[pin]
    pub(crate) state: Mutex<State>,
    #[pin]
    pub(crate) children: SpinLockIrq<KVec<Arc<Child>>>,
    #[pin]
    events: SpinLockIrq<Events>,
    /// The open channel; another one after the machine was suspended.
    #[pin]
    channel: SpinLockIrq<Option<ChannelHandle>>,
    #[pin]
    work: Work<Bus>,
    /// The first bus relations have been looked at.
    #[pin]
    pub(crate) surveyed: Completion,
    removing: Atomic<bool>,
    gone: Atomic<bool>,
}

impl_has_work! {
    impl HasWork<Self> for Bus { self.work }
}

impl Bus {
    /// Makes a bus of which nothing is known yet.
    pub(crate) fn new(
        dev: ARef<vmbus::Device>,
        domain: u16,
        queue: OrderedQueue,
    ) -> Result<Arc<Self>> {
        Arc::pin_init(
            try_pin_init!(Self {
                dev,
                domain,
                version: SetOnce::new(),
                config: SetOnce::new(),
                requests: Requests::new()?,
                state <- new_mutex!(State::Probing),
                children <- new_spinlock_irq!(KVec::new()),
                events <- new_spinlock_irq!(Events {
                    queue: Some(queue),
                    relations: None,
                    ejects: KVec::new(),
                }),
                channel <- new_spinlock_irq!(None),
                work <- new_work!("hv_pci::Bus::work"),
                surveyed <- Completion::new(),
                removing: Atomic::new(false),
                gone: Atomic::new(false),
            }),
            GFP_KERNEL,
        )
    }

    /// The device, for messages to the log.
    pub(crate) fn log(&self) -> &device::Device {
        (*self.dev).as_ref()
    }

    /// The negotiated version of the protocol.
    pub(crate) fn version(&self) -> ProtocolVersion {
        self.version.copy().unwrap_or(ProtocolVersion::V1_1)
    }

    /// Whether the bus is on its way out.
    pub(crate) fn is_removing(&self) -> bool {
        self.removing.load(Relaxed)
    }

    /// The channel, to which a [`Ring`] gives access if it is open.
    pub(crate) fn channel(&self) -> Result<ChannelHandle> {
        self.channel.lock().clone().ok_or(ENODEV)
    }

    /// From now on this is the channel.
    pub(crate) fn set_channel(&self, channel: &ChannelHandle) {
        let old = self.channel.lock().replace(channel.clone());
        drop(old);
    }

    /// The function in a slot.
    pub(crate) fn child(&self, slot: SlotNumber) -> Option<Arc<Child>> {
        let children = self.children.lock();
        children.iter().find(|c| c.function.slot == slot).cloned()
    }

    /// All functions. Must not be called in atomic context.
    pub(crate) fn all_children(&self) -> Result<KVec<Arc<Child>>> {
        loop {
            let count = self.children.lock().len();
            let mut all = KVec::with_capacity(count, GFP_KERNEL)?;
            let children = self.children.lock();
            if children.len() > count {
                continue;
            }
            for child in children.iter() {
                all.push_within_capacity(child.clone())
                    .map_err(|_| ENOMEM)?;
            }
            return Ok(all);
        }
    }

    /// Sends a message that is not answered.
    pub(crate) fn send(&self, message: &[u8]) -> Result {
        self.channel()?.ring()?.send_inband(message, 0, Reply::None)
    }

    /// Sends a request and waits for the answer.
    pub(crate) fn request(&self, message: &[u8], timeout: Delta) -> Result<Response> {
        let request = self.requests.begin()?;
        let start = Instant::<Monotonic>::now();
        loop {
            let sent = self
                .channel()?
                .ring()?
                .send_inband(message, request.id(), Reply::Wanted);
            match sent {
                // The ring is full: let the host read.
                Err(e) if e == EAGAIN && start.elapsed() < timeout => fsleep(RING_POLL),
                sent => {
                    sent?;
                    break;
                }
            }
        }
        self.wait_for(request.done(), timeout)?;
        request.response().ok_or(eproto())
    }

    /// Waits for something that the host has to do first.
    pub(crate) fn wait_for(&self, event: &Completion, timeout: Delta) -> Result {
        self.dev.wait_for(event, timeout).inspect_err(|e| {
            if *e == ENODEV && !self.gone.xchg(true, Relaxed) {
                dev_warn!(self.log(), "The device is gone.\n");
            }
        })
    }

    /// Accepts what the host says again, after [`Self::quiesce`].
    pub(crate) fn accept(&self, queue: OrderedQueue) {
        self.events.lock().queue = Some(queue);
        self.removing.store(false, Relaxed);
    }

    /// Accepts nothing from the host any more, and waits for what was accepted.
    pub(crate) fn quiesce(&self) {
        self.removing.store(true, Relaxed);
        let queue = self.events.lock().queue.take();
        // Runs what is queued.
        drop(queue);
        let mut events = self.events.lock();
        let relations = events.relations.take();
        let ejects = core::mem::replace(&mut events.ejects, KVec::new());
        drop(events);
        drop((relations, ejects));
    }

    /// Takes the last relations and the ejects that came since the last call.
    pub(crate) fn take_events(&self) -> (Option<KVec<Function>>, KVec<Arc<Child>>) {
        let mut events = self.events.lock();
        let ejects = core::mem::replace(&mut events.ejects, KVec::new());
        (events.relations.take(), ejects)
    }

    /// Leaves what [`Self::take_events`] gave for later, unless newer relations have come.
    pub(crate) fn put_back(&self, relations: Option<KVec<Function>>, ejects: KVec<Arc<Child>>) {
        let mut events = self.events.lock();
        if events.relations.is_none() {
            events.relations = relations;
        }
        for child in ejects {
            // Without memory for it the host ejects it by force.
            let _ = events.ejects.push(child, GFP_ATOMIC);
        }
    }

    /// Has what was put back looked at.
    pub(crate) fn look_again(self: &Arc<Self>) {
        self.enqueue(|_| {});
    }

    /// Whether the bus relations that nobody has acted on yet list a function, or there are none.
    pub(crate) fn lists(&self, child: &Child) -> bool {
        match &self.events.lock().relations {
            Some(functions) => functions.iter().any(|f| is_same(f, &child.function)),
            None => true,
        }
    }

    /// Reads all packets there are. Called by the channel, and by somebody who waits for an answer
    /// with interrupts off.
    pub(crate) fn receive(self: &Arc<Self>, ring: &Ring<'_>) {
        let Some(mut reader) = ring.reader() else {
            return;
        };
        while let Some(packet) = reader.next() {
            let (id, payload) = (packet.transaction_id(), packet.payload());
            match packet.kind() {
                PacketKind::Completion => match self.requests.complete(id, payload) {
                    Taker::Waiting => {}
                    Taker::Late(slot) => self.give_back(slot, payload),
                    Taker::Nobody => dev_err!(self.log(), "Invalid transaction ID {:x}\n", id),
                },
                PacketKind::Inband => self.on_message(payload),
                kind => dev_err!(
                    self.log(),
                    "unhandled packet type {:?}, tid {:x} len {}\n",
                    kind,
                    id,
                    packet.bytes().len()
                ),
            }
        }
    }

    /// Gives an interrupt back that has come too late.
    fn give_back(&self, slot: SlotNumber, answer: &[u8]) {
        if let Ok(Ok(interrupt)) = CreateInterruptReply::parse(answer) {
            // A host that does not take it back has it until the function is released.
            let _ = self.send(DeleteInterrupt::new(slot, interrupt).as_bytes());
        }
    }

    fn on_message(self: &Arc<Self>, payload: &[u8]) {
        match Event::parse(payload) {
            Ok(Event::BusRelations(relations)) => {
                let mut functions = KVec::new();
                for function in relations.iter() {
                    if functions.push(function, GFP_ATOMIC).is_err() {
                        dev_err!(self.log(), "no memory for bus relations\n");
                        return;
                    }
                }
                if !self.enqueue(|events| drop(events.relations.replace(functions))) {
                    dev_info!(self.log(), "PCI VMBus BUS_RELATIONS: ignored\n");
                }
            }
            Ok(Event::Eject(slot)) => self.on_eject(slot),
            Ok(Event::InvalidateBlock { slot, block_mask }) => {
                if let Some(child) = self.child(slot) {
                    // Under the lock, so that nobody withdraws it meanwhile.
                    if let Some(invalidate) = &*child.invalidate.lock() {
                        invalidate.call(block_mask);
                    }
                }
            }
            Ok(Event::Unknown(kind)) => {
                dev_warn!(self.log(), "Unimplemented protocol message {:x}\n", kind.0);
            }
            Err(e) => dev_err!(self.log(), "{}\n", format_args!("{e}")),
        }
    }

    fn on_eject(self: &Arc<Self>, slot: SlotNumber) {
        let Some(child) = self.child(slot) else {
            return;
        };
        // Once is enough, whatever the host says.
        if child.ejecting.xchg(true, Relaxed) {
            return;
        }
        let mut stored = Ok(());
        let accepted = self.enqueue(|events| {
            stored = events.ejects.push(child.clone(), GFP_ATOMIC);
        });
        if stored.is_err() {
            dev_err!(self.log(), "no memory for an eject\n");
            child.ejecting.store(false, Relaxed);
        } else if !accepted {
            dev_info!(self.log(), "PCI VMBus EJECT: ignored\n");
        }
    }

    /// Notes an event and has all looked at. Tells whether events are accepted.
    fn enqueue(self: &Arc<Self>, note: impl FnOnce(&mut Events)) -> bool {
        let mut events = self.events.lock();
        if events.queue.is_none() {
            return false;
        }
        note(&mut events);
        if let Some(queue) = &events.queue {
            // It may be queued already, then it will see this event, too.
            let _ = queue.enqueue(self.clone());
        }
        true
    }
}

impl WorkItem for Bus {
    type Pointer = Arc<Bus>;

    fn run(this: Arc<Bus>) {
        this.handle_events();
    }
}

/// The driver's side of the channel.
pub(crate) struct Receiver(pub(crate) Arc<Bus>);

impl ChannelHandler for Receiver {
    fn on_event(&self, channel: &ChannelHandle) {
        if let Ok(ring) = channel.ring() {
            self.0.receive(&ring);
        }
    }
}
