// SPDX-License-Identifier: GPL-2.0

//! A bus comes and goes.

use hyperv_wire::{
    vmbus::class,
    vpci::{
        config_window,
        ProtocolVersion, //
    }, //
};
use kernel::{
    device::{
        Bound,
        Core, //
    },
    new_mutex,
    prelude::*,
    str::CString,
    sync::{
        aref::ARef,
        Arc,
        Mutex, //
    },
};
use pci_host::{
    Domain,
    HostBridge,
    MappedRange,
    MsiDomain,
    OrderedQueue,
    RescanLock, //
};
use vmbus::{
    Channel,
    OpenParams,
    ReadMode, //
};

use crate::{
    bars::{
        window_alignment,
        Space, //
    },
    bus::{
        Bus,
        Receiver,
        State, //
    },
    config::ConfigWindow,
    msi::Controller,
};

/// Bytes of the channel's rings, without their headers.
const RING_PAYLOAD: usize = 16 << 10;

/// First address that does not fit in 32 bits.
const FOUR_GIB: u64 = 1 << 32;

vmbus::vmbus_device_table!(
    ID_TABLE,
    MODULE_ID_TABLE,
    <HvPci as vmbus::Driver>::IdInfo,
    [(vmbus::DeviceId::new(class::PCI), ())]
);

/// The driver.
pub(crate) struct HvPci;

#[vtable]
impl vmbus::Driver for HvPci {
    type IdInfo = ();
    type Data<'bound> = Data;
    const ID_TABLE: vmbus::IdTable<Self::IdInfo> = &ID_TABLE;

    fn probe<'bound>(
        dev: &'bound vmbus::Device<Core<'_>>,
        _info: Option<&'bound Self::IdInfo>,
    ) -> impl PinInit<Data, Error> + 'bound {
        Data::new(dev)
    }

    fn unbind<'bound>(_dev: &'bound vmbus::Device<Core<'_>>, this: Pin<&Data>) {
        this.connection.remove();
    }

    fn suspend<'bound>(
        _dev: &'bound vmbus::Device<Core<'_>>,
        this: Pin<&Self::Data<'bound>>,
    ) -> Result {
        this.connection.suspend()
    }

    fn resume<'bound>(
        dev: &'bound vmbus::Device<Core<'_>>,
        this: Pin<&Self::Data<'bound>>,
    ) -> Result {
        this.connection.resume(dev, &this.msi)
    }
}

/// What belongs to a bus while it is bound.
///
/// The fields are dropped from first to last.
pub(crate) struct Data {
    connection: Connection,
    msi: Arc<MsiDomain<Controller>>,
}

/// The open channel, and what has to be said before it is closed.
struct Connection {
    bus: Arc<Bus>,
    /// There is none while the machine is suspended.
    channel: Pin<KBox<Mutex<Option<Channel<Receiver>>>>>,
}

/// Opens the channel of a bus.
fn open_channel(dev: &vmbus::Device<Bound>, bus: &Arc<Bus>) -> Result<Channel<Receiver>> {
    let params = OpenParams {
        send_ring: vmbus::ring_size(RING_PAYLOAD),
        recv_ring: vmbus::ring_size(RING_PAYLOAD),
        read_mode: ReadMode::Batched,
        max_packet_size: 0,
    };
    let channel = Channel::open(dev, &params, Ok(Receiver(bus.clone())))?;
    bus.set_channel(channel.handle());
    Ok(channel)
}

/// Where the events of a bus are looked at.
fn queue(domain: u16) -> Result<OrderedQueue> {
    OrderedQueue::new(c"hv_pci_", domain.into())
}

impl Connection {
    fn open(dev: &vmbus::Device<Bound>, bus: Arc<Bus>) -> Result<Self> {
        let channel = open_channel(dev, &bus)?;
        Ok(Self {
            bus,
            channel: KBox::pin_init(new_mutex!(Some(channel)), GFP_KERNEL)?,
        })
    }

    /// Leaves the host before the machine is suspended. The PCI core keeps the functions.
    fn suspend(&self) -> Result {
        let bus = &self.bus;
        if !matches!(*bus.state.lock(), State::Installed(..)) {
            return Err(EINVAL);
        }
        bus.quiesce();
        if let Err(e) = bus.exit_d0() {
            // The machine goes on, and so does the bus.
            bus.accept(queue(bus.domain)?);
            return Err(e);
        }
        let mut state = bus.state.lock();
        *state = match core::mem::replace(&mut *state, State::Removed) {
            State::Installed(root, start) => State::Suspended(root, start),
            state => state,
        };
        drop(state);
        let channel = self.channel.lock().take();
        drop(channel);
        Ok(())
    }

    /// Makes contact with the host again, maybe with another one, and gives the functions back what
    /// they had.
    fn resume(&self, dev: &vmbus::Device<Bound>, msi: &MsiDomain<Controller>) -> Result {
        let bus = &self.bus;
        let channel = open_channel(dev, bus)?;
        self.enter_again(msi).inspect_err(|_| bus.quiesce())?;
        *self.channel.lock() = Some(channel);
        Ok(())
    }

    fn enter_again(&self, msi: &MsiDomain<Controller>) -> Result {
        let bus = &self.bus;
        // The functions were set up with this version.
        bus.negotiate(&[bus.version()])?;
        bus.accept(queue(bus.domain)?);
        bus.surveyed.reinit();
        bus.query_relations()?;

        let mut state = bus.state.lock();
        bus.enter_d0()?;
        let mut children = bus.all_children()?;
        children.retain(|child| bus.lists(child));
        for child in &children {
            bus.report_assigned(child)?;
        }
        *state = match core::mem::replace(&mut *state, State::Removed) {
            State::Suspended(root, start) => {
                bus.place_bars(&children, start);
                root.compose_messages(msi);
                State::Installed(root, start)
            }
            state => state,
        };
        drop(state);
        // Functions may have come and gone meanwhile.
        bus.look_again();
        Ok(())
    }

    /// Undoes all that the PCI core and the host know of the bus.
    fn remove(&self) {
        let bus = &self.bus;
        bus.quiesce();

        let state = core::mem::replace(&mut *bus.state.lock(), State::Removed);
        let entered_d0 = match state {
            State::Installed(mut root, _) => {
                root.stop();
                bus.remove_slots();
                drop(root);
                true
            }
            // The host was left before.
            State::Suspended(mut root, _) => {
                root.stop();
                bus.remove_slots();
                false
            }
            // An attempt to probe undoes its D0 entry itself.
            State::Probing | State::Removed => false,
        };
        if entered_d0 {
            exit_d0(bus);
        }
        let children = core::mem::replace(&mut *bus.children.lock(), KVec::new());
        drop(children);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Nothing is left to be done if the driver was unbound; this is for a probe that failed.
        self.remove();
    }
}

fn exit_d0(bus: &Bus) {
    if let Err(e) = bus.exit_d0() {
        dev_err!(bus.log(), "D0 exit failed: {}\n", e.to_errno());
    }
}

impl Data {
    fn new(dev: &vmbus::Device<Bound>) -> Result<Self> {
        let domain = reserve_domain(dev)?;
        let bus = Bus::new(dev.into(), domain.number(), queue(domain.number())?)?;

        let connection = Connection::open(dev, bus.clone())?;
        bus.negotiate(&ProtocolVersion::ALL)?;

        let window = dev.allocate_mmio(0, u64::MAX, config_window::LENGTH, 0x1000)?;
        let window = MappedRange::new(window).inspect_err(|_| {
            dev_err!(
                bus.log(),
                "Unable to map a virtual address for config space\n"
            );
        })?;
        let log: ARef<kernel::device::Device> = bus.log().into();
        bus.config.populate(ConfigWindow::new(log, window)?);

        let name = CString::try_from_fmt(fmt!("{}", format_args!("{}", dev.instance())))?;
        let msi = Arc::new(
            MsiDomain::new(&name, Controller::new(bus.clone())?).inspect_err(|_| {
                dev_err!(bus.log(), "Failed to build an MSI IRQ domain\n");
            })?,
            GFP_KERNEL,
        )?;

        bus.query_relations()?;

        {
            let mut state = bus.state.lock();
            bus.enter_d0()?;
            match install(dev, &bus, domain, msi.clone()) {
                Ok(installed) => *state = installed,
                Err(e) => {
                    exit_d0(&bus);
                    return Err(e);
                }
            }
        }
        Ok(Self { connection, msi })
    }
}

/// Reserves the domain number that the instance GUID asks for, or another one if that is taken.
///
/// Bytes 4 and 5 of the GUID are what users know the bus by: the names of network interfaces are
/// made of it.
fn reserve_domain(dev: &vmbus::Device<Bound>) -> Result<Domain> {
    let guid = dev.instance().to_bytes();
    let wanted = u16::from_le_bytes([guid[4], guid[5]]);
    let log: &kernel::device::Device<Bound> = dev.as_ref();
    let domain = Domain::reserve(wanted).map_err(|_| {
        dev_err!(log, "Unable to use dom# {:#x} or other numbers\n", wanted);
        EINVAL
    })?;
    if domain.number() != wanted {
        dev_info!(
            log,
            "PCI dom# {:#x} has collision, using {:#x}\n",
            wanted,
            domain.number()
        );
    }
    Ok(domain)
}

/// Gives the functions their resources and shows the bus to the PCI core.
fn install(
    dev: &vmbus::Device<Bound>,
    bus: &Arc<Bus>,
    domain: Domain,
    msi: Arc<MsiDomain<Controller>>,
) -> Result<State> {
    let log: &kernel::device::Device = bus.log();
    let mut bridge = HostBridge::new(log, domain, bus.clone())?;
    bridge.set_msi_domain(msi);

    let children = bus.all_children()?;
    let start = add_windows(dev, bus, &mut bridge, bus.survey(&children)?)?;
    for child in &children {
        bus.report_assigned(child)?;
    }
    bus.place_bars(&children, start);

    let root = bridge.scan()?;
    let lock = RescanLock::new();
    bus.set_numa_nodes(&root, &lock);
    root.assign_resources(&lock);
    bus.create_slots(&root);
    root.add_devices(&lock);
    drop(lock);
    Ok(State::Installed(root, start))
}

/// Gets the bus its windows of MMIO space, and tells where they start.
fn add_windows(
    dev: &vmbus::Device<Bound>,
    bus: &Bus,
    bridge: &mut HostBridge<Bus>,
    need: Space,
) -> Result<Space> {
    let mut window = |size: u64, min, max, name: &str| -> Result<u64> {
        if size == 0 {
            return Ok(0);
        }
        let range = dev
            .allocate_mmio(min, max, size, window_alignment(size))
            .inspect_err(|_| {
                dev_err!(
                    bus.log(),
                    "Need {:#x} of {} MMIO space. Consider reconfiguring the VM.\n",
                    size,
                    name
                );
            })?;
        let start = range.start();
        bridge.add_window(range)?;
        Ok(start)
    };
    Ok(Space {
        low: window(need.low, 0, FOUR_GIB - 1, "low")?,
        high: window(need.high, FOUR_GIB, u64::MAX, "high")?,
    })
}
