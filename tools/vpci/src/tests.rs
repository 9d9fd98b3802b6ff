// SPDX-License-Identifier: GPL-2.0

//! The bus, driven by a guest in memory.

use std::{
    sync::{
        atomic::{AtomicU64, Ordering},
        Arc, Mutex, OnceLock,
    },
    time::Duration,
};

use hyperv_wire::{
    hypercall::{device_id, status, Retarget, Target, PARTITION_SELF},
    vpci::{
        config_window, CreateInterruptReply, Event, Function, InterruptRequest, Processors,
        ProtocolVersion, ReadBlock, Request, ResourceRequirementsReply, SlotNumber, Status,
    },
    Guid,
};
use vmbus_host::Counters;
use vmm::MmioBus;
use zerocopy::little_endian::U64;

use crate::{
    Bar, Bus, BusCounters, BusOptions, Description, InterruptSender, MsixLayout, Outgoing,
    PciFunction, RetargetRouter,
};

const WINDOW: u64 = 0x10_0000_0000;
const BAR: u64 = 0xf800_0000;

/// A function with one BAR that is plain memory of eight bytes.
#[derive(Default)]
struct Memory {
    value: AtomicU64,
    block: Mutex<Vec<u8>>,
    interrupts: OnceLock<InterruptSender>,
    resets: AtomicU64,
}

impl PciFunction for Memory {
    fn description(&self) -> Description {
        let bar = |size| {
            Some(Bar {
                size,
                wide: false,
                prefetchable: false,
            })
        };
        Description {
            vendor: 0x1234,
            device: 0x5678,
            revision: 2,
            class: [5, 0x80, 1],
            subsystem_vendor: 0x1111,
            subsystem: 0x2222,
            bars: [bar(0x1000), bar(0x2000), None, None, None, None],
            msix: Some(MsixLayout {
                vectors: 2,
                bar: 1,
                table: 0,
                pending: 0x1000,
            }),
            rom: None,
            msi: None,
        }
    }

    fn attach(&self, interrupts: InterruptSender) {
        assert!(self.interrupts.set(interrupts).is_ok());
    }

    fn bar_read(&self, bar: usize, _offset: u64, data: &mut [u8]) {
        assert_eq!(bar, 0);
        let value = self.value.load(Ordering::Relaxed).to_le_bytes();
        data.copy_from_slice(&value[..data.len()]);
    }

    fn bar_write(&self, bar: usize, _offset: u64, data: &[u8]) {
        assert_eq!(bar, 0);
        let mut value = [0; 8];
        value[..data.len()].copy_from_slice(data);
        self.value
            .store(u64::from_le_bytes(value), Ordering::Relaxed);
    }

    fn reset(&self) {
        self.resets.fetch_add(1, Ordering::Relaxed);
    }

    fn read_block(&self, block: u32, _length: usize) -> Option<Vec<u8>> {
        (block == 1).then(|| self.block.lock().unwrap().clone())
    }

    fn write_block(&self, block: u32, data: &[u8]) -> bool {
        *self.block.lock().unwrap() = data.to_vec();
        block == 1
    }
}

struct Guest {
    bus: Arc<Bus>,
    mmio: Arc<MmioBus>,
    counters: Arc<Counters>,
    raised: Arc<Mutex<Vec<(u64, u32)>>>,
}

fn slot(device: u8) -> SlotNumber {
    SlotNumber::new(device, 0)
}

impl Guest {
    fn new(newest_version: ProtocolVersion) -> Self {
        let mmio = Arc::new(MmioBus::new());
        let counters = Counters::new();
        let raised = Arc::new(Mutex::new(Vec::new()));
        let sink = raised.clone();
        let bus = Bus::new(
            BusOptions {
                instance: Guid::ZERO,
                newest_version,
                processors: 4,
            },
            mmio.clone(),
            Arc::new(move |address, data| sink.lock().unwrap().push((address, data))),
            BusCounters::new(&counters, "bus"),
        );
        Self {
            bus,
            mmio,
            counters,
            raised,
        }
    }

    fn with_function(newest_version: ProtocolVersion) -> (Self, Arc<Memory>) {
        let guest = Self::new(newest_version);
        let function = Arc::new(Memory::default());
        let event = guest
            .bus
            .add_function(slot(2), 42, Some(1), function.clone());
        assert_eq!(event, Some(None));
        (guest, function)
    }

    fn count(&self, name: &str) -> u64 {
        self.counters.snapshot()[name]
    }

    fn request(&self, request: Request<'_>) -> Vec<u8> {
        let replies = self.bus.handle(&request);
        assert_eq!(replies.len(), 1, "{request:?}");
        replies[0].payload.clone()
    }

    fn status(&self, request: Request<'_>) -> Status {
        Status::parse(&self.request(request)).unwrap()
    }

    fn enter_d0(&self, version: ProtocolVersion) {
        for request in [
            Request::QueryProtocolVersion(version),
            Request::D0Entry { mmio_base: WINDOW },
        ] {
            assert_eq!(self.status(request), Status::SUCCESS);
        }
    }

    fn write32(&self, address: u64, value: u32) {
        assert!(self.mmio.write(address, &value.to_le_bytes()));
    }

    fn read32(&self, address: u64) -> u32 {
        let mut data = [0; 4];
        self.mmio.read(address, &mut data);
        u32::from_le_bytes(data)
    }

    fn config(&self, device: u8, offset: u64) -> u64 {
        self.write32(WINDOW, slot(device).raw());
        WINDOW + config_window::CONFIG_SPACE + offset
    }
}

fn interrupt(processors: Processors) -> InterruptRequest {
    InterruptRequest {
        vector: 0x33,
        delivery_mode: 0,
        vector_count: 1,
        processors,
    }
}

fn relations(outgoing: &Outgoing) -> Vec<Function> {
    assert!(!outgoing.completion);
    match Event::parse(&outgoing.payload) {
        Ok(Event::BusRelations(relations)) => relations.iter().collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn each_version_falls_back_to_the_newest_accepted() {
    for newest in ProtocolVersion::ALL {
        let (guest, _) = Guest::with_function(newest);
        let agreed = ProtocolVersion::ALL.into_iter().find(|version| {
            match guest.status(Request::QueryProtocolVersion(*version)) {
                Status::SUCCESS => true,
                Status::REVISION_MISMATCH => false,
                other => panic!("{other:?}"),
            }
        });
        assert_eq!(agreed, Some(newest));
        assert_eq!(guest.bus.version(), agreed);

        let replies = guest.bus.handle(&Request::QueryBusRelations);
        let functions = relations(&replies[0]);
        assert_eq!(functions.len(), 1);
        assert_eq!((functions[0].serial, functions[0].slot), (42, slot(2)));
        let node = (newest >= ProtocolVersion::V1_3).then_some(1);
        assert_eq!(functions[0].numa_node, node);

        let entry = Request::D0Entry { mmio_base: WINDOW };
        assert_eq!(guest.status(entry), Status::SUCCESS);
        let processors = Processors::one(newest, 3).unwrap();
        let request = Request::CreateInterrupt(slot(2), interrupt(processors));
        let reply = guest.request(request);
        let made = CreateInterruptReply::parse(&reply).unwrap().unwrap();
        let delete = Request::DeleteInterrupt(slot(2), made);
        assert_eq!(guest.status(delete), Status::SUCCESS);
        assert_eq!(guest.status(delete), Status::INVALID_PARAMETER);
        guest.bus.close(true);
        assert_eq!(guest.count("bus.interrupts.reclaimed"), 0);
    }
}

#[test]
fn requests_out_of_order_are_refused() {
    let (guest, _) = Guest::with_function(ProtocolVersion::V1_4);
    let entry = Request::D0Entry { mmio_base: WINDOW };
    let create = Request::CreateInterrupt(slot(2), interrupt(Processors::Mask(1)));
    let invalid = Status::INVALID_DEVICE_STATE;
    // No version yet.
    for request in [Request::QueryBusRelations, entry, Request::D0Exit, create] {
        assert_eq!(guest.status(request), invalid, "{request:?}");
    }
    let version = Request::QueryProtocolVersion(ProtocolVersion::V1_4);
    assert_eq!(guest.status(version), Status::SUCCESS);
    // Not in D0.
    for request in [create, Request::ResourcesAssigned(slot(2))] {
        assert_eq!(guest.status(request), invalid, "{request:?}");
    }
    assert_eq!(guest.status(entry), Status::SUCCESS);
    // In D0 already.
    assert_eq!(guest.status(entry), invalid);
    assert_eq!(guest.status(version), invalid);
    // Nothing there, nothing asked for, not known.
    for (request, status) in [
        (
            Request::QueryResourceRequirements(slot(3)),
            Status::NO_SUCH_DEVICE,
        ),
        (
            Request::CreateInterrupt(slot(3), interrupt(Processors::Mask(1))),
            Status::NO_SUCH_DEVICE,
        ),
        (
            Request::CreateInterrupt(slot(2), interrupt(Processors::Mask(1 << 4))),
            Status::INVALID_PARAMETER,
        ),
        (
            Request::EjectionComplete {
                slot: slot(2),
                status: Status::SUCCESS,
            },
            invalid,
        ),
        (
            Request::Unknown(hyperv_wire::vpci::MessageType(1)),
            Status::NOT_SUPPORTED,
        ),
    ] {
        assert_eq!(guest.status(request), status, "{request:?}");
    }
    assert_eq!(guest.count("bus.refused"), 13);
}

#[test]
fn the_window_may_not_hide_another_device() {
    let (guest, _) = Guest::with_function(ProtocolVersion::V1_4);
    guest.enter_d0(ProtocolVersion::V1_4);
    assert_eq!(guest.status(Request::D0Exit), Status::SUCCESS);
    assert!(guest
        .mmio
        .insert(WINDOW + 0x1000, 0x1000, Arc::new(Nothing))
        .is_ok());
    let entry = Request::D0Entry { mmio_base: WINDOW };
    assert_eq!(guest.status(entry), Status::INVALID_PARAMETER);
    assert!(guest.mmio.remove(WINDOW + 0x1000));
    assert_eq!(guest.status(entry), Status::SUCCESS);
}

struct Nothing;

impl vmm::MmioDevice for Nothing {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}
    fn write(&self, _offset: u64, _data: &[u8]) {}
}

#[test]
fn bars_move_and_vanish() {
    let (guest, function) = Guest::with_function(ProtocolVersion::V1_4);
    guest.enter_d0(ProtocolVersion::V1_4);
    let reply = guest.request(Request::QueryResourceRequirements(slot(2)));
    let masks = ResourceRequirementsReply::parse(&reply).unwrap().unwrap();
    assert_eq!(masks, [0xffff_f000, 0xffff_e000, 0, 0, 0, 0]);
    assert_eq!(guest.read32(guest.config(2, 0)), 0x5678_1234);
    let config = guest.bus.config(slot(2)).unwrap();
    assert_eq!(
        (config.len(), &config[..4]),
        (4096, &[0x34, 0x12, 0x78, 0x56][..])
    );
    assert_eq!(guest.bus.config(slot(3)), None);
    assert_eq!(guest.read32(guest.config(3, 0)), !0);
    assert_eq!(guest.read32(WINDOW), slot(3).raw());

    guest.write32(guest.config(2, 0x10), BAR as u32);
    guest.write32(guest.config(2, 0x14), BAR as u32 + 0x2000);
    guest.write32(guest.config(2, 4), 2);
    assert_eq!(guest.count("bus.mapped_bars"), 2);
    guest.write32(BAR, 7);
    assert_eq!(guest.read32(BAR), 7);
    // The table is the bus's, not the model's.
    guest.write32(BAR + 0x2000, 9);
    assert_eq!(guest.read32(BAR + 0x2000), 9);

    // Moved while decoded; then on top of the other BAR, which stays.
    guest.write32(guest.config(2, 0x10), BAR as u32 + 0x10_0000);
    assert_eq!(guest.read32(BAR), !0);
    assert_eq!(guest.read32(BAR + 0x10_0000), 7);
    guest.write32(guest.config(2, 0x10), BAR as u32 + 0x2000);
    assert_eq!(guest.count("bus.mapped_bars"), 1);
    assert_eq!(guest.read32(BAR + 0x2000), 9);
    guest.write32(guest.config(2, 0x10), BAR as u32);
    assert_eq!(guest.count("bus.mapped_bars"), 2);

    // Function-level reset, in the Express capability.
    let resets = function.resets.load(Ordering::Relaxed);
    assert!(guest.mmio.write(guest.config(2, 0x48), &[0, 0x80]));
    assert_eq!(function.resets.load(Ordering::Relaxed), resets + 1);
    assert_eq!(guest.count("bus.mapped_bars"), 0);
    assert_eq!(guest.read32(BAR), !0);

    assert_eq!(guest.status(Request::D0Exit), Status::SUCCESS);
    assert_eq!(guest.read32(WINDOW), !0);
}

#[test]
fn functions_come_and_go() {
    let (guest, function) = Guest::with_function(ProtocolVersion::V1_4);
    let second = Arc::new(Memory::default());
    // Nobody to eject from.
    assert_eq!(guest.bus.eject(slot(2)), None);
    guest.enter_d0(ProtocolVersion::V1_4);
    guest.bus.handle(&Request::QueryBusRelations);

    assert_eq!(
        guest.bus.add_function(slot(2), 1, None, second.clone()),
        None
    );
    let event = guest.bus.add_function(slot(3), 43, None, second);
    let event = event.unwrap().unwrap();
    assert_eq!(relations(&event).len(), 2);
    let event = guest.bus.remove_function(slot(3)).unwrap();
    assert_eq!(relations(&event).len(), 1);

    let create = Request::CreateInterrupt(slot(2), interrupt(Processors::Mask(2)));
    guest.request(create);
    assert_eq!(guest.bus.eject(slot(4)), None);
    let event = guest.bus.eject(slot(2)).unwrap();
    assert_eq!(Event::parse(&event.payload), Ok(Event::Eject(slot(2))));
    assert!(!guest.bus.wait_ejected(slot(2), Duration::ZERO));
    let complete = Request::EjectionComplete {
        slot: slot(2),
        status: Status::SUCCESS,
    };
    assert_eq!(guest.status(complete), Status::SUCCESS);
    assert!(guest.bus.wait_ejected(slot(2), Duration::ZERO));
    assert_ne!(function.resets.load(Ordering::Relaxed), 0);
    // It left an interrupt behind.
    assert_eq!(guest.count("bus.interrupts.live"), 0);
    assert_eq!(guest.count("bus.interrupts.reclaimed"), 1);
    assert_eq!(guest.count("bus.functions"), 0);
}

#[test]
fn interrupts_reach_the_processor_asked_for() {
    let (guest, function) = Guest::with_function(ProtocolVersion::V1_2);
    guest.enter_d0(ProtocolVersion::V1_2);
    guest.write32(guest.config(2, 0x14), BAR as u32);
    guest.write32(guest.config(2, 4), 2);
    let processors = Processors::one(ProtocolVersion::V1_2, 3).unwrap();
    let reply = guest.request(Request::CreateInterrupt(slot(2), interrupt(processors)));
    let made = CreateInterruptReply::parse(&reply).unwrap().unwrap();
    guest.write32(BAR, made.address() as u32);
    guest.write32(BAR + 8, made.data());
    guest.write32(BAR + 12, 0);
    let msix = u64::from((guest.read32(guest.config(2, 0x40)) >> 8) & 0xff);
    guest.write32(guest.config(2, msix), 1 << 31);
    function.interrupts.get().unwrap().fire(0);
    assert_eq!(*guest.raised.lock().unwrap(), [(0xfee0_3000, 0x33)]);
    // The guest suspends: released resources end it.
    assert_eq!(
        guest.status(Request::ResourcesReleased(slot(2))),
        Status::SUCCESS
    );
    function.interrupts.get().unwrap().fire(0);
    assert_eq!(guest.raised.lock().unwrap().len(), 1);
    assert_eq!(guest.count("bus.interrupts.reclaimed"), 0);
    assert_eq!(guest.count("bus.interrupts.live"), 0);
}

#[test]
fn each_field_of_a_retarget_is_checked() {
    let (guest, _) = Guest::with_function(ProtocolVersion::V1_4);
    guest.enter_d0(ProtocolVersion::V1_4);
    let router = RetargetRouter::new();
    router.add("bus", &guest.bus);
    let create = Request::CreateInterrupt(slot(2), interrupt(Processors::Mask(1)));
    let reply = guest.request(create);
    let made = CreateInterruptReply::parse(&reply).unwrap().unwrap();
    let banks = [U64::new(1 << 3)];
    let good = Retarget {
        partition: PARTITION_SELF,
        device: device_id(&Guid::ZERO.to_bytes(), 0),
        msi_address: made.address() as u32,
        msi_data: made.data(),
        vector: 0x52,
        target: Target::Sparse {
            valid_banks: 1,
            banks: &banks,
        },
    };
    let retarget = |input: Retarget<'_>| {
        let mut out = [0; Retarget::MAX];
        let control = input.write(&mut out).unwrap();
        let length = Retarget::FIXED + 8 * usize::from(control.variable_header());
        router.retarget(&out[..length])
    };
    assert_eq!(retarget(good), status::SUCCESS);
    assert_eq!(guest.count("bus.interrupts.retargeted"), 1);
    let two = [U64::new(1 << 3), U64::new(1)];
    let mask = |target| Retarget { target, ..good };
    for (input, status) in [
        (
            Retarget {
                partition: 1,
                ..good
            },
            status::INVALID_PARTITION_ID,
        ),
        // Another bus, another function, more than 32 bits.
        (
            Retarget {
                device: 1 << 16,
                ..good
            },
            status::INVALID_PARAMETER,
        ),
        (Retarget { device: 1, ..good }, status::INVALID_PARAMETER),
        (
            Retarget {
                device: 1 << 32,
                ..good
            },
            status::INVALID_PARAMETER,
        ),
        (
            Retarget {
                msi_address: 0xfee0_0000,
                ..good
            },
            status::INVALID_PARAMETER,
        ),
        (
            Retarget {
                msi_data: made.data() + 1,
                ..good
            },
            status::INVALID_PARAMETER,
        ),
        (
            Retarget {
                vector: 0xf,
                ..good
            },
            status::INVALID_PARAMETER,
        ),
        (
            Retarget {
                vector: 0x152,
                ..good
            },
            status::INVALID_PARAMETER,
        ),
        // There are four processors.
        (mask(Target::Mask(0)), status::INVALID_VP_INDEX),
        (mask(Target::Mask(1 << 4)), status::INVALID_VP_INDEX),
        (mask(Target::Mask(1 | (1 << 4))), status::INVALID_VP_INDEX),
        (
            mask(Target::Sparse {
                valid_banks: 3,
                banks: &two,
            }),
            status::INVALID_VP_INDEX,
        ),
        (mask(Target::Mask(2)), status::SUCCESS),
        (mask(Target::All), status::SUCCESS),
    ] {
        assert_eq!(retarget(input), status, "{input:x?}");
    }
    assert_eq!(guest.count("bus.interrupts.retargeted"), 3);
}

#[test]
fn blocks() {
    let (guest, _) = Guest::with_function(ProtocolVersion::V1_4);
    assert_eq!(guest.bus.invalidate_blocks(slot(2), 3), None);
    guest.enter_d0(ProtocolVersion::V1_4);
    guest.bus.handle(&Request::QueryBusRelations);
    let write = |block| Request::WriteBlock {
        slot: slot(2),
        block,
        data: &[1, 2, 3],
    };
    let read = |block, length| Request::ReadBlock {
        slot: slot(2),
        block,
        length,
    };
    assert_eq!(guest.status(write(2)), Status::NOT_SUPPORTED);
    assert_eq!(guest.status(write(1)), Status::SUCCESS);
    assert_eq!(guest.status(read(2, 8)), Status::NOT_SUPPORTED);
    for (length, data) in [(2, &[1, 2][..]), (128, &[1, 2, 3])] {
        let reply = guest.request(read(1, length));
        assert_eq!(ReadBlock::parse_reply(&reply), Ok(Ok(data)));
    }
    let event = guest.bus.invalidate_blocks(slot(2), 3).unwrap();
    assert_eq!(
        Event::parse(&event.payload),
        Ok(Event::InvalidateBlock {
            slot: slot(2),
            block_mask: 3
        })
    );
}
