// SPDX-License-Identifier: GPL-2.0

use std::{
    sync::{
        mpsc::{self, Receiver},
        Arc,
    },
    time::{Duration, Instant},
};

use hyperv_wire::{
    vpci::{
        config_window, CreateInterruptReply, InterruptRequest, Processors, ProtocolVersion,
        Request, SlotNumber,
    },
    Guid,
};
use vmbus_host::Counters;
use vmm::MmioBus;
use vpci::{Bus, BusCounters, BusOptions, PciFunction};

use crate::{register, Options, TestFunction, BLOCK_LEN, TABLE};

const WINDOW: u64 = 0x10_0000_0000;
const BAR: u64 = 0xf800_0000;
const VECTORS: u32 = 3;

struct Guest {
    _bus: Arc<Bus>,
    mmio: Arc<MmioBus>,
    function: Arc<TestFunction>,
    raised: Receiver<u32>,
}

impl Guest {
    /// A guest that has set up three vectors.
    fn new() -> Self {
        let mmio = Arc::new(MmioBus::new());
        let counters = Counters::new();
        let (sender, raised) = mpsc::channel();
        let bus = Bus::new(
            BusOptions {
                instance: Guid::ZERO,
                newest_version: ProtocolVersion::V1_4,
                processors: 1,
            },
            mmio.clone(),
            Arc::new(move |_, data| {
                // Nobody may listen any more.
                let _ = sender.send(data);
            }),
            BusCounters::new(&counters, "bus"),
        );
        let mut options = Options::DEFAULT;
        assert_eq!(options.set("msix", "3"), Some(true));
        let function = TestFunction::new(&options, "test", &counters).unwrap();
        let slot = SlotNumber::new(0, 0);
        bus.add_function(slot, 1, None, function.clone()).unwrap();
        let guest = Self {
            _bus: bus.clone(),
            mmio,
            function,
            raised,
        };
        bus.handle(&Request::QueryProtocolVersion(ProtocolVersion::V1_4));
        bus.handle(&Request::D0Entry { mmio_base: WINDOW });
        guest.write(WINDOW, slot.raw());
        let config = WINDOW + config_window::CONFIG_SPACE;
        guest.write(config + 0x10, BAR as u32);
        guest.write(config + 4, 2);
        for vector in 0..VECTORS {
            let request = InterruptRequest {
                vector: 0x40 + vector,
                delivery_mode: 0,
                vector_count: 1,
                processors: Processors::Mask(1),
            };
            let replies = bus.handle(&Request::CreateInterrupt(slot, request));
            let made = CreateInterruptReply::parse(&replies[0].payload)
                .unwrap()
                .unwrap();
            let entry = BAR + u64::from(TABLE) + 16 * u64::from(vector);
            guest.write(entry, made.address() as u32);
            guest.write(entry + 8, made.data());
            guest.write(entry + 12, 0);
        }
        let msix = config + u64::from((guest.read(config + 0x40) >> 8) & 0xff);
        guest.write(msix, 1 << 31);
        guest
    }

    fn write(&self, address: u64, value: u32) {
        assert!(self.mmio.write(address, &value.to_le_bytes()));
    }

    fn read(&self, address: u64) -> u32 {
        let mut data = [0; 4];
        self.mmio.read(address, &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&self, register: u64, value: u32) {
        self.write(BAR + register, value);
    }

    fn get(&self, register: u64) -> u32 {
        self.read(BAR + register)
    }

    fn next(&self) -> u32 {
        let vector = self.raised.recv_timeout(Duration::from_secs(20)).unwrap();
        vector - 0x40
    }

    fn idle(&self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.get(register::BUSY) != 0 {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn rounds_wait_for_acknowledgements() {
    let guest = Guest::new();
    assert_eq!(guest.get(register::ID), register::MAGIC);
    guest.set(register::FIRST, 1);
    guest.set(register::COUNT, 2);
    guest.set(register::ROUNDS, 2);
    assert_eq!((guest.next(), guest.next()), (1, 2));
    // Both are there once, and neither is acknowledged.
    let early = guest.raised.recv_timeout(Duration::from_millis(50));
    assert!(early.is_err(), "{early:?}");
    guest.set(register::ACKNOWLEDGE, 1);
    assert_eq!(guest.next(), 1);
    guest.set(register::ACKNOWLEDGE, 2);
    assert_eq!(guest.next(), 2);
    assert_eq!(guest.get(register::BUSY), 1);
    guest.set(register::ACKNOWLEDGE, 1);
    guest.set(register::ACKNOWLEDGE, 2);
    guest.idle();
    let sent: Vec<_> = (0..4).map(|v| guest.get(register::SENT + 4 * v)).collect();
    assert_eq!(sent, [0, 2, 2, 0]);
    assert_eq!(guest.get(register::LOST), 0);
    guest.set(register::CLEAR, 0);
    assert_eq!(guest.get(register::SENT + 4), 0);
}

#[test]
fn a_rate_leaves_out_what_is_not_acknowledged() {
    let guest = Guest::new();
    guest.set(register::COUNT, u32::MAX);
    guest.set(register::RATE, 1000);
    assert_eq!((guest.next(), guest.next(), guest.next()), (0, 1, 2));
    for _ in 0..5 {
        guest.set(register::ACKNOWLEDGE, 2);
        assert_eq!(guest.next(), 2);
    }
    guest.set(register::RATE, 0);
    let sent: Vec<_> = (0..3).map(|v| guest.get(register::SENT + 4 * v)).collect();
    assert_eq!(sent, [1, 1, 6]);
    for vector in 0..3 {
        assert_eq!(guest.get(register::BUSY), 1);
        guest.set(register::ACKNOWLEDGE, vector);
    }
    guest.idle();
    // Nonsense is no order.
    guest.set(register::FIRST, u32::MAX);
    guest.set(register::ROUNDS, 1);
    guest.set(register::ACKNOWLEDGE, u32::MAX);
    assert_eq!(guest.get(register::BUSY), 0);
}

#[test]
fn blocks() {
    let guest = Guest::new();
    let function = &guest.function;
    assert_eq!(function.read_block(0, 128), None);
    assert_eq!(function.read_block(17, 128), None);
    assert_eq!(function.read_block(16, 128), Some(vec![16; BLOCK_LEN]));
    assert!(function.write_block(16, &[1, 2]));
    assert!(!function.write_block(0, &[1]));
    assert_eq!(function.read_block(16, 128), Some(vec![1, 2]));
    function.reset();
    assert_eq!(function.read_block(16, 128), Some(vec![16; BLOCK_LEN]));
}
