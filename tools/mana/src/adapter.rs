// SPDX-License-Identifier: GPL-2.0

//! The state of the adapter and the requests that change it.

use std::{collections::HashMap, sync::Arc};

use vm_memory::GuestMemoryMmap;
use zerocopy::{
    little_endian::{U16, U32, U64},
    FromBytes, FromZeros, Immutable, IntoBytes,
};

use crate::{
    queue::{CompletionQueue, EventQueue, QueueMemory, WorkQueue},
    statistics::Statistics,
    wire::{self, *},
};

/// Longest request and response.
pub const MESSAGE_MAX: usize = 4096;
/// Numbers of completion queues are below this.
const CQS: u32 = 256;
/// Doorbell page of the hardware channel.
pub const HWC_DOORBELL: u32 = 0;
/// Doorbell page of the network adapter.
pub const MANA_DOORBELL: u32 = 1;
const HWC_PD: u32 = 1;
const MANA_PD: u32 = 2;
/// Memory keys are not checked: the guest may use all of its memory anyway.
const GPA_MKEY: u32 = 0x100;
/// Handle of the only virtual port.
const VPORT: u64 = 1;
/// Number of the virtual port in packets.
pub const VPORT_OFFSET: u16 = 0;
const INDIRECTION_ENTRIES: u32 = 64;
/// Most pages of a queue.
const REGION_PAGES: usize = 4096;
/// Most DMA regions, and most queues of a kind that are not bounded otherwise.
const OBJECTS: usize = 1024;

/// What the adapter offers.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Send and receive queues.
    pub queues: u16,
    /// Interrupt vectors.
    pub vectors: u16,
    /// Largest packet, Ethernet header included.
    pub frame: u16,
    /// Permanent MAC address.
    pub mac: [u8; 6],
    /// Speed in megabits per second.
    pub speed: u32,
}

/// The hardware channel.
#[derive(Clone)]
pub struct HardwareChannel {
    /// Events, those about the whole adapter too.
    pub events: Arc<EventQueue>,
    /// Requests of the driver.
    pub send: Arc<WorkQueue>,
    /// Buffers for responses.
    pub receive: Arc<WorkQueue>,
}

/// Pages that the driver has registered and not yet used for a queue.
struct Region {
    pages: Vec<u64>,
    page_count: usize,
}

#[derive(Clone, Copy)]
struct WqObject {
    wq_type: u32,
    wq: u32,
    cq: u32,
}

/// What happens to received packets.
pub struct Steering {
    /// Whether they are received at all.
    pub enabled: bool,
    /// Whether the hash selects the queue.
    pub rss: bool,
    /// Key of the hash.
    pub key: [u8; 40],
    /// Queue objects by hash.
    table: Vec<u64>,
    default: u64,
}

/// The state of the adapter.
pub struct Adapter {
    memory: GuestMemoryMmap,
    limits: Limits,
    /// The hardware channel, when it is up.
    pub hwc: Option<HardwareChannel>,
    /// The driver was told to reset the adapter: nothing is answered or received until it has.
    pub resetting: bool,
    regions: HashMap<u64, Region>,
    /// Event queues by number, that of the hardware channel included.
    pub events: HashMap<u32, Arc<EventQueue>>,
    /// Completion queues by number, that of the hardware channel included.
    pub completions: HashMap<u32, Arc<CompletionQueue>>,
    /// Send queues by number, without the hardware channel's.
    pub sends: HashMap<u32, Arc<WorkQueue>>,
    /// Receive queues by number, without the hardware channel's.
    pub receives: HashMap<u32, Arc<WorkQueue>>,
    objects: HashMap<u64, WqObject>,
    /// What happens to received packets.
    pub steering: Steering,
    next_handle: u64,
}

/// What follows from a request besides its response.
pub enum Effect {
    /// Nothing.
    None,
    /// An event for this queue.
    TestEvent(Arc<EventQueue>),
    /// A fence in this receive queue.
    Fence(Arc<WorkQueue>),
    /// Receiving was switched on.
    ReceiveEnabled {
        /// Queue for events about the adapter.
        events: Arc<EventQueue>,
    },
}

type Outcome = Result<(Vec<u8>, Effect), u32>;

fn body<T: IntoBytes + Immutable>(response: T) -> Outcome {
    Ok((response.as_bytes().to_vec(), Effect::None))
}

fn done() -> Outcome {
    Ok((Vec::new(), Effect::None))
}

fn parse<T: FromBytes>(bytes: &[u8]) -> Result<(T, &[u8]), u32> {
    T::read_from_prefix(bytes).map_err(|_| status::INVALID_PARAMETER)
}

/// Lowest number that is not a key.
fn free_number<T>(map: &HashMap<u32, T>, below: u32) -> Result<u32, u32> {
    (0..below)
        .find(|n| !map.contains_key(n))
        .ok_or(status::INSUFFICIENT_RESOURCES)
}

impl Adapter {
    /// The adapter after power-on.
    pub fn new(memory: GuestMemoryMmap, limits: Limits) -> Self {
        Self {
            memory,
            limits,
            hwc: None,
            resetting: false,
            regions: HashMap::new(),
            events: HashMap::new(),
            completions: HashMap::new(),
            sends: HashMap::new(),
            receives: HashMap::new(),
            objects: HashMap::new(),
            steering: Steering {
                enabled: false,
                rss: false,
                key: [0; 40],
                table: Vec::new(),
                default: 0,
            },
            next_handle: 1,
        }
    }

    /// Back to the state after power-on.
    pub fn reset(&mut self) {
        *self = Self::new(self.memory.clone(), self.limits.clone());
    }

    /// Memory of the guest.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// Sets the hardware channel up and gives the events which tell the driver about it.
    pub fn establish(&mut self, request: &Establish) -> Vec<(u8, u32)> {
        self.reset();
        let [eq, cq, rq, sq] = request
            .queues
            .map(|page| QueueMemory::new(self.memory.clone(), vec![page]));
        // The numbers of the first queues.
        let (eq_id, cq_id, rq_id, sq_id) = (0, 0, 0, 1);
        let events = Arc::new(EventQueue::new(eq, request.vector));
        let completions = Arc::new(CompletionQueue::new(cq_id, cq, events.clone(), true));
        self.events.insert(eq_id, events.clone());
        self.completions.insert(cq_id, completions.clone());
        let receive = WorkQueue::new(rq_id, rq, RQE_MAX, completions.clone());
        let send = WorkQueue::new(sq_id, sq, SQE_MAX, completions);
        self.hwc = Some(HardwareChannel {
            events,
            receive: Arc::new(receive),
            send: Arc::new(send),
        });
        let mut announcements = vec![(event::HWC_INIT_EQ_ID_DB, eq_id | (HWC_DOORBELL << 16))];
        announcements.extend(
            [
                (init_data::CQ_ID, cq_id),
                (init_data::RQ_ID, rq_id),
                (init_data::SQ_ID, sq_id),
                (init_data::QUEUE_DEPTH, 1),
                (init_data::MAX_REQUEST, MESSAGE_MAX as u32),
                (init_data::MAX_RESPONSE, MESSAGE_MAX as u32),
                (init_data::MAX_CQS, CQS),
                (init_data::PD_ID, HWC_PD),
                (init_data::GPA_MKEY, GPA_MKEY),
            ]
            .map(|(data_type, value)| (event::HWC_INIT_DATA, typed_data(data_type, value))),
        );
        announcements.push((event::HWC_INIT_DONE, 0));
        announcements
    }

    /// The receive queue for a packet with this hash.
    pub fn receive_queue(&self, hash: Option<u32>) -> Option<&Arc<WorkQueue>> {
        let steering = &self.steering;
        let object = match hash {
            Some(hash) if steering.rss && !steering.table.is_empty() => {
                steering.table[hash as usize % steering.table.len()]
            }
            _ => steering.default,
        };
        let object = self.objects.get(&object)?;
        self.receives.get(&object.wq)
    }

    /// Carries a request out. Gives the response and what else is to be done.
    pub fn request(
        &mut self,
        header: &RequestHeader,
        rest: &[u8],
        statistics: &Statistics,
    ) -> (Vec<u8>, u32, Effect) {
        let code = header.request.message_type.get();
        let (status, payload, effect) = match self.dispatch(code, rest, statistics) {
            Ok((payload, effect)) => (status::SUCCESS, payload, effect),
            Err(status) => (status, Vec::new(), Effect::None),
        };
        let size = size_of::<ResponseHeader>() + payload.len();
        // The driver says how much it has room for.
        let size = size
            .min(header.response.size.get() as usize)
            .max(size_of::<ResponseHeader>());
        let response = ResponseHeader {
            response: MessageHeader {
                header_type: U32::ZERO,
                message_type: header.request.message_type,
                version: header.response.version,
                id: header.request.id,
                size: U32::new(size as u32),
            },
            device_type: header.device_type,
            device_instance: header.device_instance,
            activity: header.activity,
            status: U32::new(status),
            reserved: U32::ZERO,
        };
        let mut message = response.as_bytes().to_vec();
        message.extend_from_slice(&payload);
        message.truncate(size);
        (message, status, effect)
    }

    fn dispatch(&mut self, code: u32, rest: &[u8], statistics: &Statistics) -> Outcome {
        match code {
            request::VERIFY_VF_DRIVER_VERSION => self.verify_version(rest),
            request::QUERY_MAX_RESOURCES => self.max_resources(),
            request::LIST_DEVICES => list_devices(),
            request::REGISTER_DEVICE => body(RegisterDeviceResponse {
                pd: U32::new(MANA_PD),
                gpa_mkey: U32::new(GPA_MKEY),
                doorbell: U32::new(MANA_DOORBELL),
            }),
            request::DEREGISTER_DEVICE => done(),
            request::GENERATE_TEST_EQE => {
                let (request, _): (TestEventRequest, _) = parse(rest)?;
                let queue = self.events.get(&request.queue.get());
                let queue = queue.ok_or(status::INVALID_PARAMETER)?;
                Ok((Vec::new(), Effect::TestEvent(queue.clone())))
            }
            request::CREATE_QUEUE => self.create_queue(rest),
            request::DISABLE_QUEUE => self.disable_queue(rest),
            request::CREATE_DMA_REGION => self.create_region(rest),
            request::DMA_REGION_ADD_PAGES => self.add_pages(rest),
            request::DESTROY_DMA_REGION => {
                let (request, _): (RegionHandle, _) = parse(rest)?;
                let region = self.regions.remove(&request.handle.get());
                region.map_or(Err(status::INVALID_PARAMETER), |_| done())
            }
            request::QUERY_HWC_TIMEOUT => {
                let (request, _): (HwcTimeout, _) = parse(rest)?;
                // What the driver proposes is long enough: requests take no time here.
                body(request)
            }
            request::MANA_QUERY_DEV_CONFIG => self.dev_config(rest),
            request::MANA_QUERY_VPORT_CONFIG => self.vport_config(rest),
            request::MANA_CONFIG_VPORT_TX => {
                let (request, _): (ConfigVportTxRequest, _) = parse(rest)?;
                check_vport(request.vport)?;
                body(ConfigVportTxResponse {
                    vport_offset: U16::new(VPORT_OFFSET),
                    short_form: 1,
                    reserved: 0,
                })
            }
            request::MANA_CREATE_WQ_OBJ => self.create_wq(rest),
            request::MANA_DESTROY_WQ_OBJ => self.destroy_wq(rest),
            request::MANA_FENCE_RQ => {
                let (request, _): (FenceRequest, _) = parse(rest)?;
                let object = self.objects.get(&request.object.get());
                let queue = object.and_then(|object| self.receives.get(&object.wq));
                let queue = queue.ok_or(status::INVALID_PARAMETER)?;
                Ok((Vec::new(), Effect::Fence(queue.clone())))
            }
            request::MANA_CONFIG_VPORT_RX => self.config_steering(rest),
            request::MANA_QUERY_GF_STAT => {
                let (request, _): (StatisticsRequest, _) = parse(rest)?;
                body(statistics.response(request.wanted.get()))
            }
            request::MANA_QUERY_PHY_STAT => body(statistics.phy_response()),
            request::MANA_QUERY_LINK_CONFIG => {
                let (request, _): (LinkConfigRequest, _) = parse(rest)?;
                check_vport(request.vport)?;
                let mut response = LinkConfigResponse::new_zeroed();
                response.qos_speed_mbps = U32::new(self.limits.speed);
                response.link_speed_mbps = U32::new(self.limits.speed);
                body(response)
            }
            _ => Err(status::UNSUPPORTED),
        }
    }

    fn verify_version(&self, rest: &[u8]) -> Outcome {
        let (request, _): (VerifyVersionRequest, _) = parse(rest)?;
        if !(request.version_min.get()..=request.version_max.get()).contains(&1) {
            return Err(status::INVALID_PARAMETER);
        }
        let mut caps = [U64::ZERO; 4];
        caps[0] = U64::new(CAP_HWC_TIMEOUT | CAP_LINK_AWARE);
        body(VerifyVersionResponse {
            version: U64::new(1),
            caps,
        })
    }

    fn max_resources(&self) -> Outcome {
        let queues = U32::new(self.limits.queues.into());
        body(MaxResourcesResponse {
            status: U32::ZERO,
            max_sq: queues,
            max_rq: queues,
            max_cq: U32::new(CQS),
            max_eq: U32::new(self.limits.vectors.into()),
            max_db: U32::new(MANA_DOORBELL + 1),
            max_mst: U32::ZERO,
            max_cq_mod_ctx: U32::ZERO,
            max_mod_cq: U32::ZERO,
            max_msix: U32::new(self.limits.vectors.into()),
        })
    }

    fn dev_config(&self, rest: &[u8]) -> Outcome {
        let (_, _): (DevConfigRequest, _) = parse(rest)?;
        let mut response = DevConfigResponse::new_zeroed();
        response.max_vports = U16::new(1);
        response.max_eqs = U32::new(self.limits.vectors.into());
        response.mtu = U16::new(self.limits.frame);
        body(response)
    }

    fn vport_config(&self, rest: &[u8]) -> Outcome {
        let (request, _): (VportConfigRequest, _) = parse(rest)?;
        if request.index.get() != 0 {
            return Err(status::INVALID_PARAMETER);
        }
        let queues = U32::new(self.limits.queues.into());
        body(VportConfigResponse {
            max_sq: queues,
            max_rq: queues,
            indirection_entries: U32::new(INDIRECTION_ENTRIES),
            reserved1: U32::ZERO,
            mac: self.limits.mac,
            reserved2: U16::ZERO,
            vport: U64::new(VPORT),
        })
    }

    fn handle(&mut self) -> u64 {
        self.next_handle += 1;
        self.next_handle
    }

    fn create_region(&mut self, rest: &[u8]) -> Outcome {
        let (request, list): (CreateDmaRegionRequest, _) = parse(rest)?;
        let page_count = request.page_count.get() as usize;
        let valid = page_count != 0
            && page_count <= REGION_PAGES
            && request.offset_in_page.get() == 0
            && request.page_type.get() == 0
            && request.length.get() == page_count as u64 * PAGE;
        if !valid {
            return Err(status::INVALID_PARAMETER);
        }
        if self.regions.len() >= OBJECTS {
            return Err(status::INSUFFICIENT_RESOURCES);
        }
        let mut region = Region {
            pages: Vec::new(),
            page_count,
        };
        region.add(list, request.list_length.get())?;
        let handle = self.handle();
        self.regions.insert(handle, region);
        body(RegionHandle {
            handle: U64::new(handle),
        })
    }

    fn add_pages(&mut self, rest: &[u8]) -> Outcome {
        let (request, list): (AddPagesRequest, _) = parse(rest)?;
        let region = self.regions.get_mut(&request.handle.get());
        let region = region.ok_or(status::INVALID_PARAMETER)?;
        region.add(list, request.list_length.get())?;
        done()
    }

    /// Checks that a region is complete and has the given size.
    fn check_region(&self, handle: U64, size: U32) -> Result<(), u32> {
        let size = size.get() as usize;
        match self.regions.get(&handle.get()) {
            Some(region)
                if region.pages.len() == region.page_count
                    && region.pages.len() * PAGE as usize == size
                    && size.is_power_of_two() =>
            {
                Ok(())
            }
            _ => Err(status::INVALID_PARAMETER),
        }
    }

    /// Uses a region up.
    fn take_region(&mut self, handle: U64) -> Result<QueueMemory, u32> {
        let region = self.regions.remove(&handle.get());
        let region = region.ok_or(status::INVALID_PARAMETER)?;
        Ok(QueueMemory::new(self.memory.clone(), region.pages))
    }

    fn create_queue(&mut self, rest: &[u8]) -> Outcome {
        let (request, _): (CreateQueueRequest, _) = parse(rest)?;
        let vector = request.vector.get();
        if request.queue_type.get() != queue_type::EVENT || vector >= self.limits.vectors.into() {
            return Err(status::INVALID_PARAMETER);
        }
        self.check_region(request.region, request.size)?;
        let id = free_number(&self.events, u32::from(self.limits.vectors) + 1)?;
        let memory = self.take_region(request.region)?;
        let queue = EventQueue::new(memory, vector as u16);
        self.events.insert(id, Arc::new(queue));
        body(CreateQueueResponse {
            queue: U32::new(id),
        })
    }

    fn disable_queue(&mut self, rest: &[u8]) -> Outcome {
        let (request, _): (DisableQueueRequest, _) = parse(rest)?;
        let id = request.queue.get();
        // Number 0 belongs to the hardware channel.
        if request.queue_type.get() != queue_type::EVENT || id == 0 {
            return Err(status::INVALID_PARAMETER);
        }
        let queue = self.events.remove(&id);
        queue.map_or(Err(status::INVALID_PARAMETER), |_| done())
    }

    fn create_wq(&mut self, rest: &[u8]) -> Outcome {
        let (request, _): (CreateWqRequest, _) = parse(rest)?;
        check_vport(request.vport)?;
        self.check_region(request.wq_region, request.wq_size)?;
        self.check_region(request.cq_region, request.cq_size)?;
        if request.wq_region == request.cq_region {
            return Err(status::INVALID_PARAMETER);
        }
        let events = self.events.get(&request.cq_parent.get());
        let events = events.ok_or(status::INVALID_PARAMETER)?.clone();
        let cq = free_number(&self.completions, CQS)?;
        // Numbers 0 and 1 belong to the hardware channel. Send and receive queues share a space.
        let first = 2;
        let wq_type = request.wq_type.get();
        let (entry_max, used) = match wq_type {
            queue_type::SEND => (SQE_MAX, self.sends.len()),
            queue_type::RECEIVE => (RQE_MAX, self.receives.len()),
            _ => return Err(status::INVALID_PARAMETER),
        };
        if used >= usize::from(self.limits.queues) {
            return Err(status::INSUFFICIENT_RESOURCES);
        }
        let wq = (first..first + 2 * u32::from(self.limits.queues))
            .find(|n| !self.sends.contains_key(n) && !self.receives.contains_key(n))
            .ok_or(status::INSUFFICIENT_RESOURCES)?;
        let wq_memory = self.take_region(request.wq_region)?;
        let cq_memory = self.take_region(request.cq_region)?;

        let completions = Arc::new(CompletionQueue::new(cq, cq_memory, events, false));
        self.completions.insert(cq, completions.clone());
        let queue = Arc::new(WorkQueue::new(wq, wq_memory, entry_max, completions));
        let queues = match wq_type {
            queue_type::SEND => &mut self.sends,
            _ => &mut self.receives,
        };
        queues.insert(wq, queue);
        let object = self.handle();
        self.objects.insert(object, WqObject { wq_type, wq, cq });
        body(CreateWqResponse {
            wq: U32::new(wq),
            cq: U32::new(cq),
            object: U64::new(object),
            moderation_completions: U16::ZERO,
            moderation_time: U16::ZERO,
            moderated: 0,
            reserved: [0; 3],
        })
    }

    fn destroy_wq(&mut self, rest: &[u8]) -> Outcome {
        let (request, _): (DestroyWqRequest, _) = parse(rest)?;
        let handle = request.object.get();
        let object = match self.objects.get(&handle) {
            Some(object) if object.wq_type == request.wq_type.get() => *object,
            _ => return Err(status::INVALID_PARAMETER),
        };
        self.objects.remove(&handle);
        self.completions.remove(&object.cq);
        match object.wq_type {
            queue_type::SEND => self.sends.remove(&object.wq),
            _ => self.receives.remove(&object.wq),
        };
        done()
    }

    fn config_steering(&mut self, rest: &[u8]) -> Outcome {
        let (request, _): (ConfigVportRxRequest, _) = parse(rest)?;
        check_vport(request.vport)?;
        let mut table = None;
        if request.update_table != 0 {
            // The offset counts from the beginning of the message.
            let start = usize::from(request.table_offset.get())
                .checked_sub(size_of::<RequestHeader>())
                .ok_or(status::INVALID_PARAMETER)?;
            let list = rest.get(start..).ok_or(status::INVALID_PARAMETER)?;
            let entries = usize::from(request.entries.get());
            if !entries.is_power_of_two() || entries > INDIRECTION_ENTRIES as usize {
                return Err(status::INVALID_PARAMETER);
            }
            let (list, _) = <[U64]>::ref_from_prefix_with_elems(list, entries)
                .map_err(|_| status::INVALID_PARAMETER)?;
            let list: Vec<_> = list.iter().map(|handle| handle.get()).collect();
            if list.iter().any(|handle| !self.is_receive_object(*handle)) {
                return Err(status::INVALID_PARAMETER);
            }
            table = Some(list);
        }
        let default = request.default_object.get();
        if request.update_default != 0 && !self.is_receive_object(default) {
            return Err(status::INVALID_PARAMETER);
        }

        let steering = &mut self.steering;
        if request.update_default != 0 {
            steering.default = default;
        }
        if request.update_key != 0 {
            steering.key = request.key;
        }
        if let Some(table) = table {
            steering.table = table;
        }
        // Tri-state: all ones means "as it is".
        let tri = |value: U32, old: bool| match value.get() {
            u32::MAX => old,
            value => value != 0,
        };
        let was_enabled = steering.enabled;
        steering.enabled = tri(request.rx_enable, steering.enabled);
        steering.rss = tri(request.rss_enable, steering.rss);
        let effect = match &self.hwc {
            Some(hwc) if steering.enabled && !was_enabled => Effect::ReceiveEnabled {
                events: hwc.events.clone(),
            },
            _ => Effect::None,
        };
        let response = ConfigVportRxResponse::new_zeroed();
        Ok((response.as_bytes().to_vec(), effect))
    }

    fn is_receive_object(&self, handle: u64) -> bool {
        self.objects
            .get(&handle)
            .is_some_and(|object| object.wq_type == queue_type::RECEIVE)
    }
}

impl Region {
    fn add(&mut self, list: &[u8], length: u32) -> Result<(), u32> {
        let (list, _) = <[U64]>::ref_from_prefix_with_elems(list, length as usize)
            .map_err(|_| status::INVALID_PARAMETER)?;
        let fits = self.pages.len() + list.len() <= self.page_count;
        if !fits || list.iter().any(|page| page.get() % PAGE != 0) {
            return Err(status::INVALID_PARAMETER);
        }
        self.pages.extend(list.iter().map(|page| page.get()));
        Ok(())
    }
}

fn check_vport(vport: U64) -> Result<(), u32> {
    if vport.get() == VPORT {
        Ok(())
    } else {
        Err(status::INVALID_PARAMETER)
    }
}

fn list_devices() -> Outcome {
    let mut response = ListDevicesResponse::new_zeroed();
    for (slot, device_type) in response.devices.iter_mut().zip([DEVICE_HWC, DEVICE_MANA]) {
        slot.device_type = U16::new(device_type);
        response.count += 1;
    }
    body(response)
}

/// Name of a request for the message log.
pub fn request_name(header: &RequestHeader) -> &'static str {
    wire::request::name(header.request.message_type.get())
}
