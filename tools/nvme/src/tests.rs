// SPDX-License-Identifier: GPL-2.0

//! The disk on a virtual PCI bus, driven by a guest in memory.

use std::{
    sync::{mpsc, Arc, Mutex},
    time::{Duration, Instant},
};

use hyperv_wire::{
    vpci::{
        config_window, CreateInterruptReply, InterruptRequest, Processors, ProtocolVersion,
        Request, ResourceRequirementsReply, SlotNumber, Status as PciStatus,
    },
    Guid,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmbus_host::{Counters, MessageLog};
use vmm::MmioBus;
use vpci::{Bus, BusCounters, BusOptions, PciFunction};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::{
    controller::TRANSFER_MAX,
    wire::{
        admin, cns, feature, io, log, register, BlockRange, Command, Completion, Configuration,
        IdentifyController, IdentifyNamespace, Status, EVENT_INVALID_DOORBELL, PAGE,
    },
    DiskOptions, NvmeDisk, Store,
};

const WINDOW: u64 = 0xf_f000_0000;
const BAR0: u64 = 0xf_e000_0000;
const MSIX: u64 = BAR0 + 0x2000;
const INSTANCE: &str = "e9ac9b28-cf63-4466-9ae3-4b849c3ee03b";
const DEADLINE: Duration = Duration::from_secs(20);
/// Memory of the guest.
const MEMORY: u64 = 32 << 20;
/// Size of the disk.
const DISK: u64 = 16 << 20;
const QUEUES: u16 = 3;
/// First interrupt vector of the guest.
const VECTOR: u32 = 0x40;
const BLOCK: u64 = 512;
const READY: u32 = 1;
const FATAL: u32 = 2;

fn slot() -> SlotNumber {
    SlotNumber::new(0, 0)
}

/// The driver's end of a pair of queues.
struct Pair {
    id: u16,
    sq: u64,
    cq: u64,
    entries: u32,
    tail: u32,
    head: u32,
    phase: u16,
}

struct Guest {
    memory: GuestMemoryMmap,
    mmio: Arc<MmioBus>,
    bus: Arc<Bus>,
    disk: Arc<NvmeDisk>,
    counters: Arc<Counters>,
    vectors: Mutex<mpsc::Receiver<u32>>,
    next_page: u64,
    next_id: u16,
    admin: Option<Pair>,
}

impl Guest {
    fn new() -> Self {
        Self::with_store(Arc::new(Store::memory(DISK).unwrap()))
    }

    fn with_store(store: Arc<Store>) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
        let mmio = Arc::new(MmioBus::new());
        let counters = Counters::new();
        let (vector, vectors) = mpsc::channel();
        let vector = Mutex::new(vector);
        let bus = Bus::new(
            BusOptions {
                instance: INSTANCE.parse::<Guid>().unwrap(),
                newest_version: ProtocolVersion::V1_4,
                processors: 2,
            },
            mmio.clone(),
            Arc::new(move |_, data| {
                let _ = vector.lock().unwrap().send(data);
            }),
            BusCounters::new(&counters, "pci"),
        );
        let disk = NvmeDisk::new(
            &DiskOptions {
                name: "nvme".to_owned(),
                queues: QUEUES,
                serial: 0x1234,
            },
            memory.clone(),
            store,
            &counters,
            MessageLog::new(1000),
        )
        .unwrap();
        assert_eq!(bus.add_function(slot(), 7, None, disk.clone()), Some(None));
        let mut guest = Self {
            memory,
            mmio,
            bus,
            disk,
            counters,
            vectors: Mutex::new(vectors),
            next_page: 1,
            next_id: 0,
            admin: None,
        };
        guest.probe();
        guest
    }

    /// A guest whose controller runs.
    fn enabled() -> Self {
        let mut guest = Self::new();
        guest.enable();
        guest
    }

    fn count(&self, name: &str) -> u64 {
        self.counters.snapshot()[name]
    }

    /// Memory that begins with a page and is zero.
    fn pages(&mut self, bytes: usize) -> u64 {
        let address = self.next_page * PAGE;
        self.next_page += (bytes as u64).div_ceil(PAGE);
        self.fill(address, &vec![0; bytes]);
        address
    }

    fn fill(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }

    fn get(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    fn pci(&self, request: Request<'_>) -> Vec<u8> {
        let mut replies = self.bus.handle(&request);
        assert_eq!(replies.len(), 1, "{request:?}");
        replies.remove(0).payload
    }

    fn pci_ok(&self, request: Request<'_>) {
        assert_eq!(PciStatus::parse(&self.pci(request)), Ok(PciStatus::SUCCESS));
    }

    fn read32(&self, address: u64) -> u32 {
        let mut data = [0; 4];
        self.mmio.read(address, &mut data);
        u32::from_le_bytes(data)
    }

    fn write32(&self, address: u64, value: u32) {
        assert!(self.mmio.write(address, &value.to_le_bytes()));
    }

    fn config(&self, offset: u64) -> u64 {
        self.write32(WINDOW, slot().raw());
        WINDOW + config_window::CONFIG_SPACE + offset
    }

    /// What the PCI driver does until the function's driver is probed, and all vectors.
    fn probe(&mut self) {
        self.pci_ok(Request::QueryProtocolVersion(ProtocolVersion::V1_4));
        self.pci(Request::QueryBusRelations);
        let reply = self.pci(Request::QueryResourceRequirements(slot()));
        let masks = ResourceRequirementsReply::parse(&reply).unwrap().unwrap();
        assert_eq!(masks, [0xffff_c004, !0, 0, 0, 0, 0]);
        self.pci_ok(Request::D0Entry { mmio_base: WINDOW });
        self.pci_ok(Request::ResourcesAssigned(slot()));
        self.write32(self.config(0x10), BAR0 as u32);
        self.write32(self.config(0x14), (BAR0 >> 32) as u32);
        self.write32(self.config(4), 6);
        assert_eq!(self.read32(self.config(8)), 0x0108_0201);
        // The control word of the capability after the Express one.
        let msix = u64::from((self.read32(self.config(0x40)) >> 8) & 0xff);
        assert_eq!(self.read32(self.config(msix)) & 0x7ff_00ff, 0x3_0011);
        self.write32(self.config(msix), 0x8000_0000);
        for n in 0..=u32::from(QUEUES) {
            let request = InterruptRequest {
                vector: VECTOR + n,
                delivery_mode: 0,
                vector_count: 1,
                processors: Processors::one(ProtocolVersion::V1_4, 0).unwrap(),
            };
            let reply = self.pci(Request::CreateInterrupt(slot(), request));
            let interrupt = CreateInterruptReply::parse(&reply).unwrap().unwrap();
            let entry = MSIX + 16 * u64::from(n);
            self.write32(entry, interrupt.address() as u32);
            self.write32(entry + 4, (interrupt.address() >> 32) as u32);
            self.write32(entry + 8, interrupt.data());
            self.write32(entry + 12, 0);
        }
    }

    fn register(&self, at: usize) -> u32 {
        self.read32(BAR0 + at as u64)
    }

    fn set_register(&self, at: usize, value: u32) {
        self.write32(BAR0 + at as u64, value);
    }

    fn configure(&self, configuration: u32, status: u32) {
        self.set_register(register::CC, configuration);
        self.wait_status(status);
    }

    fn wait_status(&self, status: u32) {
        let start = Instant::now();
        while self.register(register::CSTS) != status {
            assert!(
                start.elapsed() < DEADLINE,
                "{:#x}",
                self.register(register::CSTS)
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn pair(&mut self, id: u16, entries: u32) -> Pair {
        Pair {
            id,
            sq: self.pages(64 * entries as usize),
            cq: self.pages(16 * entries as usize),
            entries,
            tail: 0,
            head: 0,
            phase: 1,
        }
    }

    fn set_admin_queues(&self, entries: u32, sq: u64, cq: u64) {
        self.set_register(register::AQA, (entries - 1) | ((entries - 1) << 16));
        for (at, address) in [(register::ASQ, sq), (register::ACQ, cq)] {
            self.set_register(at, address as u32);
            self.set_register(at + 4, (address >> 32) as u32);
        }
    }

    fn enable(&mut self) {
        let pair = self.pair(0, 32);
        self.set_admin_queues(pair.entries, pair.sq, pair.cq);
        self.configure(Configuration::ENABLE.0, READY);
        self.admin = Some(pair);
    }

    fn doorbell(&self, queue: u16, completion: bool, value: u32) {
        let number = 2 * u64::from(queue) + u64::from(completion);
        self.write32(BAR0 + register::DOORBELLS + 4 * number, value);
    }

    /// Adds a command to a queue; its identifier.
    fn submit(&mut self, pair: &mut Pair, mut command: Command) -> u16 {
        self.next_id += 1;
        command.id = self.next_id.into();
        self.fill(pair.sq + 64 * u64::from(pair.tail), command.as_bytes());
        pair.tail = (pair.tail + 1) % pair.entries;
        self.doorbell(pair.id, false, pair.tail);
        self.next_id
    }

    /// The next completion, if there is one. Does not ring.
    fn poll(&self, pair: &mut Pair) -> Option<Completion> {
        let bytes = self.get(pair.cq + 16 * u64::from(pair.head), 16);
        let completion = Completion::read_from_bytes(&bytes).unwrap();
        if completion.status.get() & 1 != pair.phase {
            return None;
        }
        assert_eq!(completion.sq.get(), pair.id);
        pair.head = (pair.head + 1) % pair.entries;
        pair.phase ^= u16::from(pair.head == 0);
        Some(completion)
    }

    fn wait(&self, pair: &mut Pair) -> Completion {
        let start = Instant::now();
        loop {
            if let Some(completion) = self.poll(pair) {
                return completion;
            }
            assert!(start.elapsed() < DEADLINE);
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// One command from beginning to end, with its interrupt.
    fn execute(&mut self, pair: &mut Pair, command: Command) -> Result<u32, Status> {
        let id = self.submit(pair, command);
        self.wait_vector(pair.id);
        let completion = self.wait(pair);
        assert_eq!(completion.id.get(), id);
        self.doorbell(pair.id, true, pair.head);
        match completion.status.get() & !1 {
            0 => Ok(completion.result.get()),
            field => {
                assert_ne!(field & 0x8000, 0, "do not retry");
                Err(Status((field & 0x7fff) >> 1))
            }
        }
    }

    fn wait_vector(&self, vector: u16) {
        let vectors = self.vectors.lock().unwrap();
        assert_eq!(
            vectors.recv_timeout(DEADLINE),
            Ok(VECTOR + u32::from(vector))
        );
    }

    fn admin(&mut self, command: Command) -> Result<u32, Status> {
        let mut pair = self.admin.take().unwrap();
        let result = self.execute(&mut pair, command);
        self.admin = Some(pair);
        result
    }

    /// Creates a pair of queues.
    fn queues(&mut self, id: u16, entries: u32) -> Pair {
        let pair = self.pair(id, entries);
        let w10 = u32::from(id) | ((entries - 1) << 16);
        let cq = command(
            admin::CREATE_CQ,
            0,
            [pair.cq, 0],
            [w10, 3 | (u32::from(id) << 16)],
        );
        assert_eq!(self.admin(cq), Ok(0));
        let sq = command(
            admin::CREATE_SQ,
            0,
            [pair.sq, 0],
            [w10, 1 | (u32::from(id) << 16)],
        );
        assert_eq!(self.admin(sq), Ok(0));
        pair
    }
}

fn command<const N: usize>(opcode: u8, namespace: u32, prp: [u64; 2], words: [u32; N]) -> Command {
    let mut command = Command::new_zeroed();
    command.opcode = opcode;
    command.namespace = namespace.into();
    command.prp = prp.map(Into::into);
    for (to, word) in command.words.iter_mut().zip(words) {
        *to = word.into();
    }
    command
}

/// A READ or WRITE.
fn transfer(opcode: u8, prp: [u64; 2], first: u64, blocks: u64) -> Command {
    let words = [first as u32, (first >> 32) as u32, blocks as u32 - 1];
    command(opcode, 1, prp, words)
}

/// Bytes that differ from block to block and from seed to seed.
fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

#[test]
fn the_driver_learns_what_there_is() {
    let mut guest = Guest::new();
    assert_eq!(guest.register(register::VS), 0x1_0400);
    assert_eq!(guest.register(register::CAP) & 0x1_ffff, 0x1_03ff);
    assert_eq!(guest.register(register::CAP + 4), 0x20);
    assert_eq!(guest.register(register::CSTS), 0);
    guest.enable();

    let page = guest.pages(4096);
    let identify = |cns: u8, nsid| command(admin::IDENTIFY, nsid, [page, 0], [cns.into()]);
    assert_eq!(guest.admin(identify(cns::CONTROLLER, 0)), Ok(0));
    let bytes = guest.get(page, 4096);
    let (controller, rest) = IdentifyController::read_from_prefix(&bytes).unwrap();
    assert_eq!(&controller.serial, b"0000000000001234    ");
    assert_eq!(
        (controller.namespaces.get(), controller.max_transfer),
        (1, 10)
    );
    assert!(rest[..1024].iter().all(|byte| *byte == 0));

    assert_eq!(guest.admin(identify(cns::ACTIVE_NAMESPACES, 0)), Ok(0));
    assert_eq!(guest.get(page, 8), [1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(guest.admin(identify(cns::ACTIVE_NAMESPACES, 1)), Ok(0));
    assert_eq!(guest.get(page, 8), [0; 8]);
    assert_eq!(guest.admin(identify(cns::NAMESPACE, 1)), Ok(0));
    let bytes = guest.get(page, 4096);
    let (namespace, _) = IdentifyNamespace::read_from_prefix(&bytes).unwrap();
    assert_eq!(namespace.blocks.map(|n| n.get()), [DISK / BLOCK; 3]);
    assert_eq!(namespace.block_shift, 9);
    assert_eq!(guest.admin(identify(cns::NAMESPACE_DESCRIPTORS, 1)), Ok(0));
    assert_eq!(
        guest.get(page, 13),
        [1, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0x12, 0x34, 0]
    );
    for (cns, nsid) in [(5, 1), (6, 0)] {
        guest.fill(page, &[0xff; 4096]);
        assert_eq!(guest.admin(identify(cns, nsid)), Ok(0));
        assert_eq!(guest.get(page, 4096), [0; 4096]);
    }

    let number = u32::from(feature::NUMBER_OF_QUEUES);
    let set = command(admin::SET_FEATURES, 0, [0; 2], [number, 0xff_00ff]);
    assert_eq!(guest.admin(set), Ok(0x2_0002));
    let get = command(admin::GET_FEATURES, 0, [0; 2], [number]);
    assert_eq!(guest.admin(get), Ok(0x2_0002));
    let threshold = u32::from(feature::TEMPERATURE_THRESHOLD);
    let set = command(admin::SET_FEATURES, 0, [0; 2], [threshold, 350]);
    assert_eq!(guest.admin(set), Ok(0));
    let get = command(admin::GET_FEATURES, 0, [0; 2], [threshold]);
    assert_eq!(guest.admin(get), Ok(350));

    let read = |id: u8, words: u32, offset| {
        let w10 = u32::from(id) | ((words - 1) << 16);
        command(admin::GET_LOG_PAGE, !0, [page, 0], [w10, 0, offset])
    };
    assert_eq!(guest.admin(read(log::HEALTH, 128, 0)), Ok(0));
    assert_eq!(guest.get(page, 4), [0, 44, 1, 100]);
    assert_eq!(guest.admin(read(log::FIRMWARE, 4, 0)), Ok(0));
    assert_eq!(guest.get(page + 8, 8), b"1.0     ");
    assert_eq!(guest.admin(read(log::FIRMWARE, 2, 8)), Ok(0));
    assert_eq!(guest.get(page, 8), b"1.0     ");
    let abort = command(admin::ABORT, 0, [0; 2], [0]);
    assert_eq!(guest.admin(abort), Ok(1));
    assert_eq!(guest.count("nvme.protocol_errors"), 0);
    assert_eq!(guest.count("nvme.refused"), 0);
}

#[test]
fn what_was_written_is_read_whatever_the_pages() {
    let mut guest = Guest::enabled();
    let mut pairs: Vec<_> = (1..=QUEUES).map(|id| guest.queues(id, 16)).collect();
    // Where the data begins in its first page, and how many blocks.
    for (n, (start, blocks)) in [
        (0, 1),
        (4, 1),
        (3584, 1),
        (0, 8),
        (2048, 8),
        (0, 16),
        (512, 24),
        (4092, 1024),
        (0, 4096),
        (0, 8192),
        (2048, 8192),
    ]
    .into_iter()
    .enumerate()
    {
        let length = (blocks * BLOCK) as usize;
        let first = (n as u64 * 977) % (DISK / BLOCK - blocks);
        let data = pattern(n as u64, length);
        let pair = &mut pairs[n % usize::from(QUEUES)];
        guest.next_page = 1024;
        let [from, to] = [0, 1].map(|_| guest.pages(start + length) + start as u64);
        guest.fill(from, &data);
        // Lists at the end of a page need the next one soon, the others late.
        for list_room in [1, 2, 512] {
            let prps = prps(&mut guest, from, length, list_room);
            let write = transfer(io::WRITE, prps, first, blocks);
            assert_eq!(guest.execute(pair, write), Ok(0));
            guest.fill(to, &vec![0; length]);
            let prps = self::prps(&mut guest, to, length, list_room);
            let read = transfer(io::READ, prps, first, blocks);
            assert_eq!(guest.execute(pair, read), Ok(0));
            assert!(guest.get(to, length) == data, "{start} {blocks}");
        }
    }
    assert_eq!(guest.count("nvme.reads"), 33);
    assert_eq!(guest.count("nvme.refused"), 0);
    assert_eq!(guest.count("nvme.protocol_errors"), 0);
}

/// PRP entries for contiguous memory, with a first list that has room for so many entries.
fn prps(guest: &mut Guest, address: u64, length: usize, room: usize) -> [u64; 2] {
    let mut pages =
        (address / PAGE + 1..(address + length as u64).div_ceil(PAGE)).map(|n| n * PAGE);
    if pages.clone().count() < 2 {
        return [address, pages.next().unwrap_or_default()];
    }
    let room_in_page = PAGE as usize / 8;
    let mut at = guest.pages(4096) + 8 * (room_in_page - room) as u64;
    let first = at;
    let mut room = room;
    let entries: Vec<_> = pages.collect();
    let mut rest = entries.as_slice();
    while !rest.is_empty() {
        let chained = rest.len() > room;
        let (now, later) = rest.split_at(rest.len().min(room - usize::from(chained)));
        let mut bytes: Vec<_> = now.iter().flat_map(|page| page.to_le_bytes()).collect();
        if chained {
            let next = guest.pages(4096);
            bytes.extend(next.to_le_bytes());
            guest.fill(at, &bytes);
            at = next;
        } else {
            guest.fill(at, &bytes);
        }
        rest = later;
        room = room_in_page;
    }
    [address, first]
}

#[test]
fn blocks_are_zeroed_and_deallocated() {
    let mut guest = Guest::enabled();
    let mut pair = guest.queues(1, 16);
    let data = guest.pages(4096);
    let write = |guest: &mut Guest, pair: &mut Pair| {
        guest.fill(data, &[0xa5; 4096]);
        // With forced unit access.
        let write = command(io::WRITE, 1, [data, 0], [8, 0, 7 | (1 << 30)]);
        assert_eq!(guest.execute(pair, write), Ok(0));
    };
    let read = |guest: &mut Guest, pair: &mut Pair| {
        let read = transfer(io::READ, [data, 0], 8, 8);
        assert_eq!(guest.execute(pair, read), Ok(0));
        let bytes = guest.get(data, 4096);
        bytes
            .chunks(BLOCK as usize)
            .map(|block| block[0] == 0)
            .collect::<Vec<_>>()
    };
    let (x, o) = (false, true);
    write(&mut guest, &mut pair);
    assert_eq!(read(&mut guest, &mut pair), [x; 8]);
    let zero = command(io::WRITE_ZEROES, 1, [0; 2], [9, 0, 1]);
    assert_eq!(guest.execute(&mut pair, zero), Ok(0));
    assert_eq!(read(&mut guest, &mut pair), [x, o, o, x, x, x, x, x]);
    write(&mut guest, &mut pair);
    let ranges = [(8_u64, 1_u32), (11, 2), (15, 0)].map(|(first, count)| BlockRange {
        attributes: 0.into(),
        count: count.into(),
        first: first.into(),
    });
    let manage = |deallocate| command(io::DATASET_MANAGEMENT, 1, [data, 0], [2, deallocate]);
    for (deallocate, left) in [(0, [x; 8]), (4, [o, x, x, o, o, x, x, x])] {
        guest.fill(data, ranges.as_bytes());
        assert_eq!(guest.execute(&mut pair, manage(deallocate)), Ok(0));
        assert_eq!(read(&mut guest, &mut pair), left);
    }
    let flush = command(io::FLUSH, 1, [0; 2], []);
    assert_eq!(guest.execute(&mut pair, flush), Ok(0));
    assert_eq!(guest.count("nvme.flushes"), 1);
    assert_eq!(guest.count("nvme.zeroes"), 3);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let mut guest = Guest::enabled();
    let mut pair = guest.queues(1, 16);
    let page = guest.pages(4096);
    let last = DISK / BLOCK;
    let most = TRANSFER_MAX as u64 / BLOCK;
    let mut list = guest.pages(4096);
    guest.fill(list, &(page + 1).to_le_bytes());
    let fused = Command {
        flags: 1,
        ..transfer(io::READ, [page, 0], 0, 1)
    };
    let with_sgl = Command {
        flags: 0x40,
        ..transfer(io::READ, [page, 0], 0, 1)
    };
    for (command, status) in [
        (command(0x7f, 1, [page, 0], []), Status::INVALID_OPCODE),
        (fused, Status::INVALID_FIELD),
        (with_sgl, Status::INVALID_FIELD),
        (
            command(io::READ, 2, [page, 0], []),
            Status::INVALID_NAMESPACE,
        ),
        (
            command(io::FLUSH, !0, [0; 2], []),
            Status::INVALID_NAMESPACE,
        ),
        (
            transfer(io::READ, [page, 0], last, 1),
            Status::LBA_OUT_OF_RANGE,
        ),
        (
            transfer(io::WRITE, [page, 0], last - 1, 2),
            Status::LBA_OUT_OF_RANGE,
        ),
        (
            transfer(io::READ, [page, 0], u64::MAX, 2),
            Status::LBA_OUT_OF_RANGE,
        ),
        (
            transfer(io::WRITE_ZEROES, [0; 2], last, 1),
            Status::LBA_OUT_OF_RANGE,
        ),
        (
            transfer(io::READ, [page, 0], 0, most + 1),
            Status::INVALID_FIELD,
        ),
        (
            transfer(io::READ, [page + 1, 0], 0, 1),
            Status::INVALID_PRP_OFFSET,
        ),
        (
            transfer(io::READ, [page, page + 4], 0, 16),
            Status::INVALID_PRP_OFFSET,
        ),
        (
            transfer(io::READ, [page, list + 4], 0, 17),
            Status::INVALID_PRP_OFFSET,
        ),
        (
            transfer(io::READ, [page, list], 0, 17),
            Status::INVALID_PRP_OFFSET,
        ),
        (
            transfer(io::READ, [page, list + 4088], 0, 17),
            Status::DATA_TRANSFER_ERROR,
        ),
        (
            transfer(io::READ, [MEMORY, 0], 0, 1),
            Status::DATA_TRANSFER_ERROR,
        ),
        (
            transfer(io::WRITE, [!0 - 3, 0], 0, 1),
            Status::DATA_TRANSFER_ERROR,
        ),
        (
            transfer(io::READ, [page, !0xfff], 0, 16),
            Status::DATA_TRANSFER_ERROR,
        ),
        (
            transfer(io::READ, [page, MEMORY], 0, 17),
            Status::DATA_TRANSFER_ERROR,
        ),
        (
            command(io::DATASET_MANAGEMENT, 1, [MEMORY, 0], [0xff, 4]),
            Status::DATA_TRANSFER_ERROR,
        ),
    ] {
        // A list whose only entry is the address of the next list, which is not there.
        guest.fill(list + 4088, &MEMORY.to_le_bytes());
        assert_eq!(
            guest.execute(&mut pair, command),
            Err(status),
            "{command:?}"
        );
    }

    list = guest.pages(4096);
    let queue = |opcode, id: u32, entries: u32, w11: u32, address: u64| {
        command(opcode, 0, [address, 0], [id | ((entries - 1) << 16), w11])
    };
    let cq = |id, entries, w11, address| queue(admin::CREATE_CQ, id, entries, w11, address);
    let sq = |id, entries, w11, address| queue(admin::CREATE_SQ, id, entries, w11, address);
    let delete = |opcode, id: u32| command(opcode, 0, [0; 2], [id]);
    let identify = |cns: u32, nsid| command(admin::IDENTIFY, nsid, [page, 0], [cns]);
    for (command, status) in [
        (command(0x7f, 0, [0; 2], []), Status::INVALID_OPCODE),
        (identify(0x7f, 0), Status::INVALID_FIELD),
        (identify(0, 0), Status::INVALID_NAMESPACE),
        (identify(0, 2), Status::INVALID_NAMESPACE),
        (identify(2, !0), Status::INVALID_NAMESPACE),
        (cq(0, 16, 1, list), Status::INVALID_QUEUE_IDENTIFIER),
        (cq(1, 16, 1, list), Status::INVALID_QUEUE_IDENTIFIER),
        (cq(4, 16, 1, list), Status::INVALID_QUEUE_IDENTIFIER),
        (cq(2, 1, 1, list), Status::INVALID_QUEUE_SIZE),
        (cq(2, 1025, 1, list), Status::INVALID_QUEUE_SIZE),
        (cq(2, 16, 0, list), Status::INVALID_FIELD),
        (
            cq(2, 16, 3 | (4 << 16), list),
            Status::INVALID_INTERRUPT_VECTOR,
        ),
        (cq(2, 16, 1, list + 16), Status::INVALID_FIELD),
        (cq(2, 512, 1, MEMORY - 4096), Status::INVALID_FIELD),
        (cq(2, 16, 1, !0xfff), Status::INVALID_FIELD),
        (
            sq(2, 16, 1 | (2 << 16), list),
            Status::INVALID_COMPLETION_QUEUE,
        ),
        (sq(2, 16, 1, list), Status::INVALID_COMPLETION_QUEUE),
        (
            sq(1, 16, 1 | (1 << 16), list),
            Status::INVALID_QUEUE_IDENTIFIER,
        ),
        (
            sq(2, 128, 1 | (1 << 16), MEMORY - 4096),
            Status::INVALID_FIELD,
        ),
        (
            delete(admin::DELETE_CQ, 0),
            Status::INVALID_QUEUE_IDENTIFIER,
        ),
        (
            delete(admin::DELETE_CQ, 2),
            Status::INVALID_QUEUE_IDENTIFIER,
        ),
        (delete(admin::DELETE_CQ, 1), Status::INVALID_QUEUE_DELETION),
        (
            delete(admin::DELETE_SQ, 0),
            Status::INVALID_QUEUE_IDENTIFIER,
        ),
        (
            delete(admin::DELETE_SQ, 3),
            Status::INVALID_QUEUE_IDENTIFIER,
        ),
        (
            command(admin::GET_FEATURES, 0, [0; 2], [0xff]),
            Status::INVALID_FIELD,
        ),
        (
            command(admin::SET_FEATURES, 0, [0; 2], [0xff]),
            Status::INVALID_FIELD,
        ),
        (
            command(admin::SET_FEATURES, 0, [0; 2], [4 | (1 << 31)]),
            Status::INVALID_FIELD,
        ),
        (
            command(admin::GET_LOG_PAGE, 0, [page, 0], [9]),
            Status::INVALID_LOG_PAGE,
        ),
        (
            command(admin::GET_LOG_PAGE, 0, [page, 0], [0xffff_0001, 0xffff]),
            Status::INVALID_FIELD,
        ),
        (
            command(admin::GET_LOG_PAGE, 0, [page, 0], [1, 0, 68]),
            Status::INVALID_FIELD,
        ),
        (
            command(admin::GET_LOG_PAGE, 0, [page, 0], [1, 0, 2]),
            Status::INVALID_FIELD,
        ),
    ] {
        assert_eq!(guest.admin(command), Err(status), "{command:?}");
    }
    // In the right order, both queues go and can be made again.
    assert_eq!(guest.admin(delete(admin::DELETE_SQ, 1)), Ok(0));
    assert_eq!(guest.admin(delete(admin::DELETE_CQ, 1)), Ok(0));
    let mut pair = guest.queues(1, 16);
    let read = transfer(io::READ, [page, 0], 0, 1);
    assert_eq!(guest.execute(&mut pair, read), Ok(0));
    assert_eq!(guest.count("nvme.protocol_errors"), 0);
}

#[test]
fn a_full_completion_queue_loses_nothing() {
    let mut guest = Guest::enabled();
    // Two submission queues of 64 entries with one completion queue of 4.
    let mut small = guest.queues(1, 4);
    let mut pairs: Vec<_> = (2..=3).map(|id| guest.pair(id, 64)).collect();
    for pair in &pairs {
        let w10 = u32::from(pair.id) | (63 << 16);
        let sq = command(admin::CREATE_SQ, 0, [pair.sq, 0], [w10, 1 | (1 << 16)]);
        assert_eq!(guest.admin(sq), Ok(0));
    }
    let flush = command(io::FLUSH, 1, [0; 2], []);
    let mut expected: Vec<u16> = Vec::new();
    for pair in &mut pairs {
        for _ in 0..50 {
            expected.push(guest.submit(pair, flush));
        }
    }
    let mut done = Vec::new();
    let start = Instant::now();
    while done.len() < expected.len() {
        assert!(start.elapsed() < DEADLINE, "{} are done", done.len());
        // The completions are of other submission queues.
        let bytes = guest.get(small.cq + 16 * u64::from(small.head), 16);
        let completion = Completion::read_from_bytes(&bytes).unwrap();
        if completion.status.get() & 1 == small.phase {
            done.push(completion.id.get());
            small.head = (small.head + 1) % small.entries;
            small.phase ^= u16::from(small.head == 0);
            guest.doorbell(1, true, small.head);
        }
    }
    done.sort_unstable();
    assert_eq!(done, expected);
    assert_eq!(guest.count("nvme.flushes"), 100);
}

#[test]
fn wrong_doorbells_are_events() {
    let mut guest = Guest::enabled();
    let mut pair = guest.queues(1, 16);
    let mut admin_pair = guest.admin.take().unwrap();
    let request = command(admin::ASYNC_EVENT_REQUEST, 0, [0; 2], []);
    let ids: Vec<_> = (0..4)
        .map(|_| guest.submit(&mut admin_pair, request))
        .collect();
    let one_too_many = guest.execute(&mut admin_pair, request);
    assert_eq!(one_too_many, Err(Status::TOO_MANY_EVENT_REQUESTS));
    for (queue, completion, value) in [(1, false, 16), (1, true, 16), (2, false, 0), (60, true, 0)]
    {
        guest.doorbell(queue, completion, value);
        guest.wait_vector(0);
        let event = guest.wait(&mut admin_pair);
        assert!(ids.contains(&event.id.get()));
        assert_eq!(event.result.get(), EVENT_INVALID_DOORBELL);
        guest.doorbell(0, true, admin_pair.head);
    }
    // Accesses of other sizes, beyond the doorbells and to constant registers do nothing.
    assert!(guest.mmio.write(BAR0 + 0x1008, &[3, 0]));
    assert!(guest.mmio.write(BAR0 + 0x1001, &[3, 0, 0, 0]));
    assert!(guest.mmio.write(BAR0 + 0x3ff8, &[0xff; 8]));
    assert!(guest.mmio.write(BAR0 + register::CAP as u64, &[0xff; 8]));
    assert!(guest.mmio.write(BAR0 + 0xff8, &[0xff; 8]));
    assert_eq!(guest.register(register::CSTS), READY);
    let flush = command(io::FLUSH, 1, [0; 2], []);
    assert_eq!(guest.execute(&mut pair, flush), Ok(0));
    assert_eq!(guest.count("nvme.protocol_errors"), 4);
}

#[test]
fn a_controller_that_cannot_run_says_so() {
    let mut guest = Guest::new();
    let pair = guest.pair(0, 32);
    let enable = Configuration::ENABLE.0;
    for (entries, sq, cq, configuration) in [
        (32, pair.sq + 64, pair.cq, enable),
        (32, pair.sq, MEMORY, enable),
        (4096, MEMORY - 4096, pair.cq, enable),
        (32, !0xfff, pair.cq, enable),
        (1, pair.sq, pair.cq, enable),
        // Pages of 8 KiB; entries of other sizes; other commands.
        (32, pair.sq, pair.cq, enable | (1 << 7)),
        (32, pair.sq, pair.cq, enable ^ (1 << 16)),
        (32, pair.sq, pair.cq, enable | (6 << 4)),
    ] {
        guest.set_admin_queues(entries, sq, cq);
        guest.configure(configuration, FATAL);
        guest.configure(0, 0);
    }
    assert_eq!(guest.count("nvme.protocol_errors"), 8);
    guest.enable();
    // Shutdown, and a new start.
    guest.configure(enable | (1 << 14), READY | (2 << 2));
    guest.configure(0, 0);
    guest.enable();
    let abort = command(admin::ABORT, 0, [0; 2], [0]);
    assert_eq!(guest.admin(abort), Ok(1));
}

#[test]
fn after_a_reset_no_memory_is_touched() {
    for round in 0..20 {
        let mut guest = Guest::enabled();
        let mut pairs: Vec<_> = (1..=QUEUES).map(|id| guest.queues(id, 64)).collect();
        let data = guest.pages(1 << 20);
        let list = prps(&mut guest, data, 1 << 20, 512);
        for pair in &mut pairs {
            for _ in 0..40 {
                guest.submit(pair, transfer(io::READ, list, 0, 2048));
            }
        }
        std::thread::sleep(Duration::from_micros(300 * round));
        if round % 2 == 0 {
            guest.disk.reset();
        } else {
            guest.configure(0, 0);
        }
        let length = (guest.next_page * PAGE) as usize;
        let mark = vec![0x5a; length];
        guest.fill(0, &mark);
        std::thread::sleep(Duration::from_millis(2));
        assert!(guest.get(0, length) == mark);
        assert_eq!(guest.register(register::CSTS), 0);

        guest.next_page = 1;
        guest.vectors.lock().unwrap().try_iter().for_each(drop);
        guest.enable();
        let page = guest.pages(4096);
        let identify = command(admin::IDENTIFY, 1, [page, 0], [0]);
        assert_eq!(guest.admin(identify), Ok(0));
    }
}

#[test]
fn the_store_outlives_the_controller() {
    let path = std::env::temp_dir().join(format!("nvme-test-{}", std::process::id()));
    let stores = [
        Arc::new(Store::memory(DISK).unwrap()),
        Arc::new(Store::file(&path, DISK).unwrap()),
    ];
    for store in stores {
        for write in [true, false] {
            let mut guest = Guest::with_store(store.clone());
            guest.enable();
            let mut pair = guest.queues(1, 16);
            let data = guest.pages(4096);
            let last = DISK / BLOCK - 8;
            if write {
                guest.fill(data, &pattern(1, 4096));
            }
            let opcode = if write { io::WRITE } else { io::READ };
            let transfer = transfer(opcode, [data, 0], last, 8);
            assert_eq!(guest.execute(&mut pair, transfer), Ok(0));
            assert!(guest.get(data, 4096) == pattern(1, 4096));
        }
    }
    let file = std::fs::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert_eq!(file.len() as u64, DISK);
    assert!(file.ends_with(&pattern(1, 4096)));
}
