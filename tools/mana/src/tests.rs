// SPDX-License-Identifier: GPL-2.0

//! The VF on a virtual PCI bus, driven by a guest in memory.

use std::{
    sync::{mpsc, Arc, Mutex},
    time::{Duration, Instant},
};

use hyperv_wire::{
    hypercall::{self, Retarget, Target},
    vpci::{
        config_window, CreateInterruptReply, InterruptRequest, Processors, ProtocolVersion,
        Request, ResourceRequirementsReply, SlotNumber, Status,
    },
    Guid,
};
use netvsp::{frame::TxOffload, Delivery, RxFrame, VfSink};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmbus_host::{Counters, MessageLog};
use vmm::MmioBus;
use vpci::{Bus, BusCounters, BusOptions, RetargetRouter};
use zerocopy::{
    little_endian::{U16, U32, U64},
    FromBytes, FromZeros, Immutable, IntoBytes,
};

use crate::{wire::*, ManaVf, Uplink, VfOptions};

const WINDOW: u64 = 0xf_f000_0000;
const BAR0: u64 = 0xf_e000_0000;
const BAR4: u64 = 0xf_e010_0000;
const DOORBELLS: u64 = BAR0 + 0x1_0000;
const SHARED: u64 = BAR0 + 0x1000;
const MAC: [u8; 6] = [0x60, 0x45, 0xbd, 1, 2, 3];
const INSTANCE: &str = "e9ac9b28-cf63-4466-9ae3-4b849c3ee03b";
const DEADLINE: Duration = Duration::from_secs(10);

struct Sent(Mutex<mpsc::Sender<(Vec<u8>, TxOffload)>>);

impl Uplink for Sent {
    fn transmit(&self, data: &mut [u8], offload: &TxOffload) {
        let _ = self.0.lock().unwrap().send((data.to_vec(), *offload));
    }
}

/// The driver's end of a queue with owner bits.
struct Ring {
    address: u64,
    entries: u32,
    entry: usize,
    head: u32,
}

impl Ring {
    fn new(address: u64, size: u32, entry: usize) -> Self {
        let entries = size / entry as u32;
        Self {
            address,
            entries,
            entry,
            head: entries,
        }
    }

    fn poll(&mut self, memory: &GuestMemoryMmap) -> Option<Vec<u8>> {
        let at = self.address + u64::from(self.head % self.entries) * self.entry as u64;
        let mut bytes = vec![0; self.entry];
        memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        let owner = u32::from(bytes[self.entry - 1] >> 5);
        if owner == (self.head / self.entries - 1) & 7 {
            return None;
        }
        assert_eq!(owner, (self.head / self.entries) & 7, "overflow");
        self.head += 1;
        Some(bytes)
    }

    fn tail(&self) -> u32 {
        self.head % (self.entries * 8)
    }
}

/// The driver's end of a work queue.
struct Work {
    id: u32,
    address: u64,
    size: u32,
    head: u32,
}

struct Guest {
    memory: GuestMemoryMmap,
    mmio: Arc<MmioBus>,
    bus: Arc<Bus>,
    router: RetargetRouter,
    vf: Arc<ManaVf>,
    counters: Arc<Counters>,
    sent: mpsc::Receiver<(Vec<u8>, TxOffload)>,
    vectors: mpsc::Receiver<(u64, u32)>,
    next_page: u64,
    interrupts: Vec<hyperv_wire::vpci::TranslatedInterrupt>,
    hwc: Option<Hwc>,
    /// Interrupt that comes before that of a request.
    expected_first: Option<u32>,
}

struct Hwc {
    eq_id: u32,
    cq_id: u32,
    eq: Ring,
    cq: Ring,
    rq: Work,
    sq: Work,
    request: u64,
    response: u64,
    next_id: u16,
}

fn slot() -> SlotNumber {
    SlotNumber::new(2, 0)
}

impl Guest {
    fn new() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 16 << 20)]).unwrap();
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
            Arc::new(move |address, data| {
                let _ = vector.lock().unwrap().send((address, data));
            }),
            BusCounters::new(&counters, "pci"),
        );
        let router = RetargetRouter::new();
        router.add("vpci", &bus);
        let (sender, sent) = mpsc::channel();
        let vf = ManaVf::new(
            &VfOptions {
                name: "vf".to_owned(),
                mac: MAC,
                queues: 2,
                speed: 1000,
            },
            memory.clone(),
            Arc::new(Sent(Mutex::new(sender))),
            &counters,
            MessageLog::new(1000),
        )
        .unwrap();
        assert_eq!(bus.add_function(slot(), 7, None, vf.clone()), Some(None));
        Self {
            memory,
            mmio,
            bus,
            router,
            vf,
            counters,
            sent,
            vectors,
            next_page: 1,
            interrupts: Vec::new(),
            hwc: None,
            expected_first: None,
        }
    }

    fn count(&self, name: &str) -> u64 {
        self.counters.snapshot()[name]
    }

    fn pages(&mut self, bytes: u32) -> u64 {
        let address = self.next_page * PAGE;
        self.next_page += u64::from(bytes).div_ceil(PAGE);
        let zeros = vec![0; bytes as usize];
        self.memory
            .write_slice(&zeros, GuestAddress(address))
            .unwrap();
        address
    }

    /// One request of the PCI driver and its completion.
    fn pci(&self, request: Request<'_>) -> Vec<u8> {
        let mut replies = self.bus.handle(&request);
        assert_eq!(replies.len(), 1, "{request:?}");
        replies.remove(0).payload
    }

    fn pci_ok(&self, request: Request<'_>) {
        assert_eq!(Status::parse(&self.pci(request)), Ok(Status::SUCCESS));
    }

    fn read32(&self, address: u64) -> u32 {
        let mut data = [0; 4];
        self.mmio.read(address, &mut data);
        u32::from_le_bytes(data)
    }

    fn read64(&self, address: u64) -> u64 {
        let mut data = [0; 8];
        self.mmio.read(address, &mut data);
        u64::from_le_bytes(data)
    }

    fn write32(&self, address: u64, value: u32) {
        assert!(self.mmio.write(address, &value.to_le_bytes()));
    }

    fn config(&self, offset: u64) -> u64 {
        self.write32(WINDOW, slot().raw());
        WINDOW + config_window::CONFIG_SPACE + offset
    }

    /// What the PCI driver does until the function's driver is probed, and three vectors.
    fn probe(&mut self) {
        let too_new = ProtocolVersion(0x1_0005);
        let refused = self.pci(Request::QueryProtocolVersion(too_new));
        assert_eq!(Status::parse(&refused), Ok(Status::REVISION_MISMATCH));
        self.pci_ok(Request::QueryProtocolVersion(ProtocolVersion::V1_4));
        let relations = self.pci(Request::QueryBusRelations);
        assert_eq!(relations.len(), 8 + 28);
        let reply = self.pci(Request::QueryResourceRequirements(slot()));
        let masks = ResourceRequirementsReply::parse(&reply).unwrap().unwrap();
        assert_eq!(masks, [0xfff0_000c, !0, 0, 0, 0xffff_800c, !0]);
        self.pci_ok(Request::D0Entry { mmio_base: WINDOW });
        self.pci_ok(Request::ResourcesAssigned(slot()));
        for (n, bar) in [(0, BAR0), (4, BAR4)] {
            self.write32(self.config(0x10 + 4 * n), bar as u32);
            self.write32(self.config(0x14 + 4 * n), (bar >> 32) as u32);
        }
        assert_eq!(self.read32(BAR0 + 0x10), !0);
        self.write32(self.config(4), 6);
        assert_eq!(self.read32(self.config(0)), 0x00ba_1414);
        assert_eq!(self.count("pci.mapped_bars"), 2);

        // Enable MSI-X: the control word of the capability after the Express one.
        let msix = u64::from((self.read32(self.config(0x40)) >> 8) & 0xff);
        assert_eq!(self.read32(self.config(msix)) & 0xff, 0x11);
        self.write32(self.config(msix), 0x8000_0000);
        for n in 0..3_u32 {
            let request = InterruptRequest {
                vector: 0x40 + n,
                delivery_mode: 0,
                vector_count: 1,
                processors: Processors::one(ProtocolVersion::V1_4, 0).unwrap(),
            };
            let reply = self.pci(Request::CreateInterrupt(slot(), request));
            let interrupt = CreateInterruptReply::parse(&reply).unwrap().unwrap();
            let entry = BAR4 + 16 * u64::from(n);
            self.write32(entry, interrupt.address() as u32);
            self.write32(entry + 4, (interrupt.address() >> 32) as u32);
            self.write32(entry + 8, interrupt.data());
            self.write32(entry + 12, 0);
            self.interrupts.push(interrupt);
        }
        assert_eq!(self.count("pci.interrupts.live"), 3);
    }

    fn doorbell(&self, page: u64, offset: u64, id: u32, tail: u32, arm: bool) {
        let value = u64::from(id) | (u64::from(tail) << 32) | (u64::from(arm) << 63);
        let address = DOORBELLS + page * PAGE + offset;
        assert!(self.mmio.write(address, &value.to_le_bytes()));
    }

    fn wait_vector(&self, vector: u32) {
        let (_, data) = self.vectors.recv_timeout(DEADLINE).unwrap();
        assert_eq!(data, vector);
    }

    fn wait_shared(&self) -> u32 {
        let start = Instant::now();
        loop {
            let last = self.read32(SHARED + 28);
            if last & (1 << 31) == 0 {
                return last;
            }
            assert!(start.elapsed() < DEADLINE);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Sets the hardware channel up.
    fn establish(&mut self) {
        assert_eq!(self.read64(BAR0 + 8), DOORBELLS - BAR0);
        assert_eq!(self.read32(BAR0 + 0x10), PAGE as u32);
        assert_eq!(self.read64(BAR0 + 0x18), SHARED - BAR0);
        let queues: [u64; 4] = std::array::from_fn(|_| self.pages(4096));
        let mut memory = [0; 28];
        for (n, queue) in queues.iter().enumerate() {
            memory[6 * n..6 * n + 6].copy_from_slice(&(queue / PAGE).to_le_bytes()[..6]);
        }
        for (n, word) in memory.chunks_exact(4).enumerate() {
            assert!(self.mmio.write(SHARED + 4 * n as u64, word));
        }
        self.write32(SHARED + 28, SharedHeader::ESTABLISH.into());
        assert_eq!(self.wait_shared(), 0x81);

        let [eq, cq, rq, sq] = queues;
        let mut hwc = Hwc {
            eq_id: 0,
            cq_id: 0,
            eq: Ring::new(eq, 4096, EQE),
            cq: Ring::new(cq, 4096, CQE),
            rq: Work {
                id: 0,
                address: rq,
                size: 4096,
                head: 0,
            },
            sq: Work {
                id: 0,
                address: sq,
                size: 4096,
                head: 0,
            },
            request: self.pages(4096),
            response: self.pages(4096),
            next_id: 0,
        };
        let mut depth = 0;
        let mut done = false;
        // As the driver does it: five events an interrupt, then the doorbell.
        while !done {
            self.wait_vector(0x40);
            for _ in 0..5 {
                let Some(event) = hwc.eq.poll(&self.memory) else {
                    break;
                };
                let data = u32::from_le_bytes(event[..4].try_into().unwrap());
                let value = data & 0xff_ffff;
                match (event[12], (data >> 24) as u8) {
                    (event::HWC_INIT_EQ_ID_DB, _) => hwc.eq_id = data & 0xffff,
                    (event::HWC_INIT_DATA, init_data::CQ_ID) => hwc.cq_id = value,
                    (event::HWC_INIT_DATA, init_data::RQ_ID) => hwc.rq.id = value,
                    (event::HWC_INIT_DATA, init_data::SQ_ID) => hwc.sq.id = value,
                    (event::HWC_INIT_DATA, init_data::QUEUE_DEPTH) => depth = value,
                    (event::HWC_INIT_DATA, _) => {}
                    (event::HWC_INIT_DONE, _) => done = true,
                    other => panic!("event {other:?}"),
                }
            }
            self.doorbell(0, doorbell::EVENT, hwc.eq_id, hwc.eq.tail(), true);
        }
        assert_eq!(depth, 1);
        self.post(
            0,
            doorbell::RECEIVE,
            &mut hwc.rq,
            &[],
            &[(hwc.response, 4096)],
            0,
        );
        self.hwc = Some(hwc);
    }

    /// Writes a work queue entry and rings.
    fn post(
        &self,
        page: u64,
        offset: u64,
        queue: &mut Work,
        oob: &[u8],
        pieces: &[(u64, u32)],
        data_unit: u16,
    ) {
        let mut oob = oob.to_vec();
        if oob.is_empty() {
            oob.resize(8, 0);
        }
        let mut flags = pieces.len() as u32 | ((oob.len() as u32 / 4) << 8);
        if data_unit != 0 {
            flags |= (1 << 11) | (u32::from(data_unit) << 16);
        }
        let mut wqe = vec![0; 4];
        wqe.extend_from_slice(&flags.to_le_bytes());
        wqe.extend_from_slice(&oob);
        for (address, size) in pieces {
            let entry = ScatterEntry {
                address: U64::new(*address),
                mkey: U32::new(0x100),
                size: U32::new(*size),
            };
            wqe.extend_from_slice(entry.as_bytes());
        }
        wqe.resize(wqe.len().next_multiple_of(32), 0);
        for unit in wqe.chunks(32) {
            let at = queue.address + u64::from(queue.head % queue.size);
            self.memory.write_slice(unit, GuestAddress(at)).unwrap();
            queue.head = queue.head.wrapping_add(32);
        }
        self.doorbell(page, offset, queue.id, queue.head, false);
    }

    /// One request on the hardware channel.
    fn request(&mut self, code: u32, body: &[u8]) -> Result<Vec<u8>, u32> {
        let mut hwc = self.hwc.take().unwrap();
        let id = hwc.next_id;
        hwc.next_id += 1;
        let half = |size: u32| MessageHeader {
            header_type: U32::ZERO,
            message_type: U32::new(code),
            version: U16::new(1),
            id: U16::new(id),
            size: U32::new(size),
        };
        let header = RequestHeader {
            request: half(40 + body.len() as u32),
            response: half(4096),
            device_type: U16::new(2),
            device_instance: U16::ZERO,
            activity: U32::new(0x1234),
        };
        let mut message = header.as_bytes().to_vec();
        message.extend_from_slice(body);
        self.memory
            .write_slice(&message, GuestAddress(hwc.request))
            .unwrap();
        let pieces = [(hwc.request, message.len() as u32)];
        self.post(0, doorbell::SEND, &mut hwc.sq, &[0; 24], &pieces, 0);

        if let Some(vector) = self.expected_first.take() {
            self.wait_vector(vector);
        }
        self.wait_vector(0x40);
        let event = hwc.eq.poll(&self.memory).unwrap();
        assert_eq!(event[12], event::COMPLETION);
        let sent = hwc.cq.poll(&self.memory).unwrap();
        assert_eq!(sent[60..63], hwc.sq.id.to_le_bytes()[..3]);
        assert_eq!(sent[63] & 1, 1);
        let received = hwc.cq.poll(&self.memory).unwrap();
        assert_eq!(received[63] & 1, 0);
        assert_eq!(hwc.cq.poll(&self.memory), None);
        self.doorbell(0, doorbell::COMPLETION, hwc.cq_id, hwc.cq.tail(), true);
        self.doorbell(0, doorbell::EVENT, hwc.eq_id, hwc.eq.tail(), true);
        let length = u32::from_le_bytes(received[24..28].try_into().unwrap());
        let mut response = vec![0; length as usize];
        self.memory
            .read_slice(&mut response, GuestAddress(hwc.response))
            .unwrap();
        let pieces = [(hwc.response, 4096)];
        self.post(0, doorbell::RECEIVE, &mut hwc.rq, &[], &pieces, 0);
        self.hwc = Some(hwc);

        let (header, body) = ResponseHeader::read_from_prefix(&response).unwrap();
        assert_eq!(header.response.message_type.get(), code);
        assert_eq!(header.response.id.get(), id);
        assert_eq!(header.response.size.get() as usize, response.len());
        assert_eq!(header.activity.get(), 0x1234);
        match header.status.get() {
            status::SUCCESS => Ok(body.to_vec()),
            status => Err(status),
        }
    }

    fn ask<Q: IntoBytes + Immutable, R: FromBytes>(&mut self, code: u32, query: &Q) -> R {
        let body = self.request(code, query.as_bytes()).unwrap();
        R::read_from_bytes(&body).unwrap()
    }

    fn region(&mut self, address: u64, size: u32) -> U64 {
        let count = (u64::from(size) / PAGE) as u32;
        let mut body = CreateDmaRegionRequest {
            length: U64::new(size.into()),
            offset_in_page: U32::ZERO,
            page_type: U32::ZERO,
            page_count: U32::new(count),
            list_length: U32::new(count),
        }
        .as_bytes()
        .to_vec();
        for n in 0..u64::from(count) {
            body.extend_from_slice(&(address + n * PAGE).to_le_bytes());
        }
        let body = self.request(request::CREATE_DMA_REGION, &body).unwrap();
        RegionHandle::read_from_bytes(&body).unwrap().handle
    }

    fn event_queue(&mut self, vector: u32) -> (u32, Ring) {
        let address = self.pages(8192);
        let region = self.region(address, 8192);
        let mut create = CreateQueueRequest::new_zeroed();
        create.queue_type = U32::new(queue_type::EVENT);
        create.region = region;
        create.size = U32::new(8192);
        create.vector = U32::new(vector);
        let reply: CreateQueueResponse = self.ask(request::CREATE_QUEUE, &create);
        let id = reply.queue.get();
        let mut eq = Ring::new(address, 8192, EQE);
        let test = TestEventRequest {
            queue: U32::new(id),
        };
        self.request_with_event(request::GENERATE_TEST_EQE, test.as_bytes(), vector);
        assert_eq!(eq.poll(&self.memory).unwrap()[12], event::TEST);
        self.doorbell(1, doorbell::EVENT, id, eq.tail(), true);
        (id, eq)
    }

    /// A request that also makes another queue interrupt, before its response.
    fn request_with_event(&mut self, code: u32, body: &[u8], vector: u32) {
        self.expected_first = Some(0x40 + vector);
        assert_eq!(self.request(code, body), Ok(Vec::new()));
    }

    fn work_queue(&mut self, wq_type: u32, eq: u32) -> (Work, u32, Ring, u64) {
        let wq_address = self.pages(4096);
        let cq_address = self.pages(8192);
        let mut create = CreateWqRequest::new_zeroed();
        create.vport = U64::new(1);
        create.wq_type = U32::new(wq_type);
        create.wq_region = self.region(wq_address, 4096);
        create.cq_region = self.region(cq_address, 8192);
        create.wq_size = U32::new(4096);
        create.cq_size = U32::new(8192);
        create.cq_parent = U32::new(eq);
        let reply: CreateWqResponse = self.ask(request::MANA_CREATE_WQ_OBJ, &create);
        let cq = Ring::new(cq_address, 8192, CQE);
        self.doorbell(1, doorbell::COMPLETION, reply.cq.get(), cq.tail(), true);
        let work = Work {
            id: reply.wq.get(),
            address: wq_address,
            size: 4096,
            head: 0,
        };
        (work, reply.cq.get(), cq, reply.object.get())
    }

    fn steer(&mut self, enable: u32, objects: &[u64]) {
        let mut steer = ConfigVportRxRequest::new_zeroed();
        steer.vport = U64::new(1);
        steer.entries = U16::new(objects.len() as u16);
        steer.table_offset = U16::new(120);
        steer.rx_enable = U32::new(enable);
        steer.rss_enable = U32::new(enable);
        steer.update_default = enable as u8;
        steer.update_table = enable as u8;
        steer.default_object = U64::new(objects.first().copied().unwrap_or(0));
        let mut body = steer.as_bytes().to_vec();
        body.extend(objects.iter().flat_map(|o| o.to_le_bytes()));
        self.request(request::MANA_CONFIG_VPORT_RX, &body).unwrap();
    }
}

fn packet(length: usize, tag: u8) -> Vec<u8> {
    let mut packet = vec![tag; length];
    packet[..6].copy_from_slice(&MAC);
    packet[6..12].copy_from_slice(&[2; 6]);
    // Not IP: neither checksum nor hash.
    packet[12..14].copy_from_slice(&[0x88, 0xb5]);
    packet
}

fn receive(data: &[u8]) -> RxFrame<'_> {
    RxFrame {
        data,
        checksum_valid: false,
        gso_size: None,
    }
}

#[test]
fn from_power_on_to_traffic_and_back() {
    let mut guest = Guest::new();
    guest.probe();
    guest.establish();

    let verify = VerifyVersionRequest {
        version_min: U64::new(1),
        version_max: U64::new(1),
        driver_caps: [U64::ZERO; 4],
    };
    let verified: VerifyVersionResponse = guest.ask(request::VERIFY_VF_DRIVER_VERSION, &verify);
    assert_eq!(verified.version.get(), 1);
    let devices: ListDevicesResponse = guest.ask(request::LIST_DEVICES, &[0_u8; 0]);
    assert_eq!(devices.count.get(), 2);
    let resources: MaxResourcesResponse = guest.ask(request::QUERY_MAX_RESOURCES, &[0_u8; 0]);
    assert_eq!(resources.max_msix.get(), 3);
    assert_eq!(guest.request(96, &[0; 16]), Err(status::UNSUPPORTED));
    assert_eq!(
        guest.request(request::GENERATE_TEST_EQE, &[0; 3]),
        Err(status::INVALID_PARAMETER)
    );
    let index = VportConfigRequest { index: U32::ZERO };
    let vport: VportConfigResponse = guest.ask(request::MANA_QUERY_VPORT_CONFIG, &index);
    assert_eq!(vport.mac, MAC);

    let (eq, mut events) = guest.event_queue(1);
    let (mut sq, _, mut sq_completions, sq_object) = guest.work_queue(queue_type::SEND, eq);
    let (mut rq, rq_cq, mut rq_completions, rq_object) = guest.work_queue(queue_type::RECEIVE, eq);

    // Nothing is received before it is switched on.
    assert_eq!(
        guest.vf.deliver(receive(&packet(60, 1))),
        Delivery::NotReady
    );
    guest.steer(1, &[rq_object, rq_object]);
    assert_eq!(guest.vf.deliver(receive(&packet(60, 1))), Delivery::Dropped);
    assert_eq!(guest.count("vf.rx_no_wqe"), 1);

    // Buffers in order; a packet that does not fit takes none.
    let buffers = guest.pages(8192);
    for n in 0..2 {
        let pieces = [(buffers + n * 2048, 1514)];
        guest.post(1, doorbell::RECEIVE, &mut rq, &[], &pieces, 0);
    }
    assert_eq!(
        guest.vf.deliver(receive(&packet(1515, 2))),
        Delivery::Dropped
    );
    let mut tagged = packet(1518, 3);
    tagged[12..18].copy_from_slice(&[0x81, 0, 0x20, 5, 0x88, 0xb5]);
    assert_eq!(guest.vf.deliver(receive(&tagged)), Delivery::Delivered);
    assert_eq!(
        guest.vf.deliver(receive(&packet(60, 4))),
        Delivery::Delivered
    );
    assert_eq!(guest.vf.deliver(receive(&packet(60, 5))), Delivery::Dropped);
    assert!(guest.vectors.try_recv().is_err());
    guest.vf.flush();
    guest.wait_vector(0x41);
    assert_eq!(
        events.poll(&guest.memory).unwrap()[..3],
        [rq_cq as u8, 0, 0]
    );
    for (n, (length, flags)) in [(1514, 0x1005_u32), (60, 0)].into_iter().enumerate() {
        let completion = rq_completions.poll(&guest.memory).unwrap();
        assert_eq!(completion[0], 0x41);
        assert_eq!(completion[4..8], flags.to_le_bytes());
        assert_eq!(completion[8..10], u16::to_le_bytes(length));
        assert_eq!(completion[56..60], (32 * n as u32).to_le_bytes());
    }
    assert_eq!(rq_completions.poll(&guest.memory), None);
    let mut received = vec![0; 1514];
    guest
        .memory
        .read_slice(&mut received, GuestAddress(buffers))
        .unwrap();
    tagged.drain(12..16);
    assert_eq!(received, tagged);

    // The queue is not armed: no event, until the doorbell says that something was missed.
    let pieces = [(buffers, 1514)];
    guest.post(1, doorbell::RECEIVE, &mut rq, &[], &pieces, 0);
    let old_tail = rq_completions.tail();
    guest.doorbell(1, doorbell::EVENT, eq, events.tail(), true);
    assert_eq!(
        guest.vf.deliver(receive(&packet(60, 6))),
        Delivery::Delivered
    );
    guest.vf.flush();
    assert_eq!(events.poll(&guest.memory), None);
    guest.doorbell(1, doorbell::COMPLETION, rq_cq, old_tail, true);
    guest.wait_vector(0x41);
    assert!(events.poll(&guest.memory).is_some());
    guest.doorbell(1, doorbell::EVENT, eq, events.tail(), true);

    // Send: three pieces, large send, VLAN tag.
    let data = guest.pages(4096);
    let sent = packet(1000, 7);
    guest.memory.write_slice(&sent, GuestAddress(data)).unwrap();
    let mut oob = [0; 24];
    oob[0] = 1 | (1 << 2) | (1 << 4) | (1 << 5);
    oob[8..12].copy_from_slice(&((1_u32 << 3) | (9 << 20)).to_le_bytes());
    let pieces = [(data, 54), (data + 54, 446), (data + 500, 500)];
    guest.post(1, doorbell::SEND, &mut sq, &oob, &pieces, 1448);
    let (bytes, offload) = guest.sent.recv_timeout(DEADLINE).unwrap();
    assert_eq!(bytes, sent);
    assert_eq!(
        offload,
        TxOffload {
            checksum: true,
            ipv4_checksum: true,
            lso_mss: Some(1448),
            vlan: Some(9)
        }
    );
    guest.wait_vector(0x41);
    assert!(events.poll(&guest.memory).is_some());
    let completion = sq_completions.poll(&guest.memory).unwrap();
    assert_eq!(completion[0], 0x60);
    assert_eq!(completion[60..63], sq.id.to_le_bytes()[..3]);
    assert_eq!(completion[63] & 1, 1);
    guest.doorbell(1, doorbell::EVENT, eq, events.tail(), true);

    // Link events come on the hardware channel.
    guest.vf.set_link(false);
    guest.wait_vector(0x40);
    let hwc = guest.hwc.as_mut().unwrap();
    let event = hwc.eq.poll(&guest.memory).unwrap();
    assert_eq!((event[3], event[12]), (3, event::HWC_RECONFIG_DATA));
    let (eq_id, tail) = (hwc.eq_id, hwc.eq.tail());
    guest.doorbell(0, doorbell::EVENT, eq_id, tail, true);
    assert_eq!(
        guest.vf.deliver(receive(&packet(60, 8))),
        Delivery::NotReady
    );
    guest.vf.set_link(true);
    guest.wait_vector(0x40);
    let event = guest.hwc.as_mut().unwrap().eq.poll(&guest.memory).unwrap();
    assert_eq!(event[3], 2);
    let tail = guest.hwc.as_ref().unwrap().eq.tail();
    guest.doorbell(0, doorbell::EVENT, eq_id, tail, true);

    // A retargeted interrupt goes elsewhere.
    let instance = INSTANCE.parse::<Guid>().unwrap().to_bytes();
    let banks = [U64::new(2)];
    let interrupt = guest.interrupts[0];
    let mut input = [0; Retarget::MAX];
    let control = Retarget {
        partition: hypercall::PARTITION_SELF,
        device: hypercall::device_id(&instance, 0),
        msi_address: interrupt.address() as u32,
        msi_data: interrupt.data(),
        vector: 0x40,
        target: Target::Sparse {
            valid_banks: 1,
            banks: &banks,
        },
    }
    .write(&mut input)
    .unwrap();
    let length = Retarget::FIXED + 8 * usize::from(control.variable_header());
    assert_eq!(guest.router.retarget(&input[..length]), 0);
    input[8] ^= 8;
    assert_ne!(guest.router.retarget(&input[..length]), 0);
    guest.vf.set_link(true);
    let (address, _) = guest.vectors.recv_timeout(DEADLINE).unwrap();
    assert_eq!(address, 0xfee0_1000);
    assert!(guest.hwc.as_mut().unwrap().eq.poll(&guest.memory).is_some());
    let tail = guest.hwc.as_ref().unwrap().eq.tail();
    guest.doorbell(0, doorbell::EVENT, eq_id, tail, true);

    let wanted = StatisticsRequest {
        wanted: U64::new(!0),
    };
    let statistics: StatisticsResponse = guest.ask(request::MANA_QUERY_GF_STAT, &wanted);
    assert_eq!(statistics.rx_unicast[0].get(), 3);
    assert_eq!(statistics.tx_unicast.map(U64::get), [1, 1000]);
    assert_eq!(statistics.rx_discards_no_wqe.get(), 2);

    // Down again.
    guest.steer(0, &[]);
    assert_eq!(
        guest.vf.deliver(receive(&packet(60, 9))),
        Delivery::NotReady
    );
    for (wq_type, object) in [
        (queue_type::SEND, sq_object),
        (queue_type::RECEIVE, rq_object),
    ] {
        let destroy = DestroyWqRequest {
            wq_type: U32::new(wq_type),
            reserved: U32::ZERO,
            object: U64::new(object),
        };
        let destroy = destroy.as_bytes();
        assert_eq!(
            guest.request(request::MANA_DESTROY_WQ_OBJ, destroy),
            Ok(vec![])
        );
        assert!(guest
            .request(request::MANA_DESTROY_WQ_OBJ, destroy)
            .is_err());
    }
    let disable = DisableQueueRequest {
        queue_type: U32::new(queue_type::EVENT),
        queue: U32::new(eq),
        alloc_on_creation: U32::new(1),
    };
    let disable = disable.as_bytes();
    assert_eq!(guest.request(request::DISABLE_QUEUE, disable), Ok(vec![]));
    guest.write32(SHARED + 28, SharedHeader::DESTROY.into());
    assert_eq!(guest.wait_shared(), 0x82);
    assert_eq!(guest.count("vf.faults"), 0);

    for interrupt in guest.interrupts.clone() {
        guest.pci_ok(Request::DeleteInterrupt(slot(), interrupt));
    }
    assert_eq!(guest.count("pci.interrupts.live"), 0);
    assert!(guest.bus.eject(slot()).is_some());
    assert!(!guest.bus.wait_ejected(slot(), Duration::ZERO));
    guest.pci_ok(Request::EjectionComplete {
        slot: slot(),
        status: Status::SUCCESS,
    });
    assert!(guest.bus.wait_ejected(slot(), Duration::ZERO));
    assert_eq!(guest.read32(guest.config(0)), !0);
    guest.pci_ok(Request::D0Exit);
    guest.bus.close(true);
    assert_eq!(guest.count("pci.interrupts.reclaimed"), 0);
    assert_eq!(guest.count("pci.mapped_bars"), 0);
    assert_eq!(guest.count("pci.functions"), 0);
}

#[test]
fn a_reset_request_silences_the_adapter_until_it_is_set_up_again() {
    let mut guest = Guest::new();
    assert!(!guest.vf.request_reset());
    guest.probe();
    guest.establish();
    let (eq, _) = guest.event_queue(1);
    let (mut sq, _, mut sq_completions, _) = guest.work_queue(queue_type::SEND, eq);
    let (_, _, _, rq_object) = guest.work_queue(queue_type::RECEIVE, eq);
    guest.steer(1, &[rq_object]);
    assert!(guest.vf.is_receiving());
    assert!(guest.vf.request_reset());
    guest.wait_vector(0x40);
    let event = guest.hwc.as_mut().unwrap().eq.poll(&guest.memory).unwrap();
    assert_eq!(event[12], event::HWC_RESET_REQUEST);
    assert!(!guest.vf.is_receiving());
    assert_eq!(
        guest.vf.deliver(receive(&packet(60, 1))),
        Delivery::NotReady
    );

    // What was sent is completed, so that the driver does not wait for it.
    let data = guest.pages(4096);
    let pieces = [(data, 60)];
    guest.post(1, doorbell::SEND, &mut sq, &[0; 8], &pieces, 0);
    guest.wait_vector(0x41);
    assert!(sq_completions.poll(&guest.memory).is_some());
    assert!(guest.sent.try_recv().is_err());

    guest.write32(SHARED + 28, SharedHeader::DESTROY.into());
    assert_eq!(guest.wait_shared(), 0x82);
    guest.establish();
    guest.event_queue(1);
}

#[test]
fn lost_interrupts_are_reclaimed() {
    let mut guest = Guest::new();
    guest.probe();
    guest.bus.close(true);
    assert_eq!(guest.count("pci.interrupts.live"), 0);
    assert_eq!(guest.count("pci.interrupts.reclaimed"), 3);
    // The bus can be opened again.
    guest.probe();
    guest.bus.close(false);
    assert_eq!(guest.count("pci.interrupts.reclaimed"), 3);
}
