// SPDX-License-Identifier: GPL-2.0
//! What the virtual PCI buses of VFs and of other functions have in common.

use std::sync::Arc;
use std::time::Duration;

use hyperv_wire::vpci::{MessageType, ProtocolVersion};
use lab_control::{Answer, Fault, PciRequest};
use vmbus_host::{Guid, MessageLog, Platform, VmbusHost};
use vmm::Machine;
use vpci::{Bus, BusCounters, BusOptions, FaultAction, Faults, RetargetRouter, VpciDevice};

use super::Devices;

/// What a guest may take to give a function up when asked to.
pub const EJECT: Duration = Duration::from_secs(30);
/// What a guest may take to release a rescinded device. The mana driver of a VF that has gone without warning waits
/// 30 seconds for an answer.
const RELEASE: Duration = Duration::from_secs(60);

/// How late answers come that are late: in time, too late for an interrupt, too late for any request.
const SLOW: Duration = Duration::from_secs(1);
const LATE: Duration = Duration::from_secs(7);
const VERY_LATE: Duration = Duration::from_secs(35);

/// The instance of a bus for which none is given. The guest names the PCI domain after the third word.
pub fn usual_instance(domain: u16) -> Guid {
    Guid::new(
        0xe9ac9b28,
        domain,
        0x4466,
        [0x9a, 0xe3, 0x4b, 0x84, 0x9c, 0x3e, 0xe0, 0x3b],
    )
}

/// All that a virtual PCI bus needs; a rescinded one is not used again.
pub struct BusMaker {
    name: String,
    options: BusOptions,
    machine: Arc<Machine>,
    retarget: Arc<RetargetRouter>,
    counters: BusCounters,
    log: Arc<MessageLog>,
    faults: Arc<Faults>,
}

impl BusMaker {
    /// For the bus `name` of the log and the counters.
    pub fn new(
        name: &str,
        instance: Guid,
        newest_version: ProtocolVersion,
        machine: &Arc<Machine>,
        devices: &Devices,
    ) -> Self {
        Self {
            name: name.to_owned(),
            options: BusOptions {
                instance,
                newest_version,
                processors: machine.vp_count(),
            },
            machine: machine.clone(),
            retarget: devices.retarget.clone(),
            counters: BusCounters::new(&devices.counters, name),
            log: devices.log.clone(),
            faults: Arc::default(),
        }
    }

    /// A new bus without functions.
    pub fn make(&self) -> Arc<VpciDevice> {
        let machine = self.machine.clone();
        let bus = Bus::new(
            self.options.clone(),
            self.machine.mmio().clone(),
            Arc::new(move |address, data| machine.signal_msi(address, data)),
            self.counters.clone(),
        );
        self.retarget.add(&self.name, &bus);
        VpciDevice::new(&self.name, bus, self.log.clone(), self.faults.clone())
    }

    /// Name in the log and of the counters.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Instance GUID.
    pub fn instance(&self) -> Guid {
        self.options.instance
    }

    /// The machine.
    pub fn machine(&self) -> &Arc<Machine> {
        &self.machine
    }

    /// Interrupts that the guest has.
    pub fn interrupts(&self) -> u32 {
        u32::try_from(self.counters.interrupts.live.get()).unwrap_or(u32::MAX)
    }

    /// Lets a request be answered otherwise the next times it comes.
    pub fn answer(&self, request: PciRequest, how: Answer, times: u32) {
        let requests: &[_] = match request {
            PciRequest::Version => &[MessageType::QUERY_PROTOCOL_VERSION],
            PciRequest::Relations => &[MessageType::QUERY_BUS_RELATIONS],
            PciRequest::Requirements => &[MessageType::QUERY_RESOURCE_REQUIREMENTS],
            PciRequest::D0Entry => &[MessageType::BUS_D0_ENTRY],
            // Which one it is depends on the version.
            PciRequest::Assigned => &[
                MessageType::RESOURCES_ASSIGNED,
                MessageType::RESOURCES_ASSIGNED2,
            ],
            PciRequest::CreateInterrupt => &[
                MessageType::CREATE_INTERRUPT,
                MessageType::CREATE_INTERRUPT2,
                MessageType::CREATE_INTERRUPT3,
            ],
            PciRequest::DeleteInterrupt => &[MessageType::DELETE_INTERRUPT],
            PciRequest::ReadBlock => &[MessageType::READ_BLOCK],
            PciRequest::WriteBlock => &[MessageType::WRITE_BLOCK],
            PciRequest::D0Exit => &[MessageType::BUS_D0_EXIT],
        };
        let action = match how {
            Answer::Mute => FaultAction::Mute,
            Answer::Refused => FaultAction::Refuse,
            Answer::Short => FaultAction::Short,
            Answer::Long => FaultAction::Long,
            Answer::Slow => FaultAction::Late(SLOW),
            Answer::Late => FaultAction::Late(LATE),
            Answer::VeryLate => FaultAction::Late(VERY_LATE),
            Answer::Twice => FaultAction::Twice,
            Answer::Stray => FaultAction::Stray,
        };
        for request in requests {
            self.faults.inject(*request, action, times);
        }
    }

    /// Lets something go wrong the next times it comes up. Says whether it is a fault of a bus.
    pub fn inject(&self, fault: Fault, times: u32) -> bool {
        let (request, how) = match fault {
            Fault::PciVersionUnanswered => (PciRequest::Version, Answer::Mute),
            Fault::PciRelationsUnsent => (PciRequest::Relations, Answer::Mute),
            Fault::PciD0Unanswered => (PciRequest::D0Entry, Answer::Mute),
            Fault::PciD0Refused => (PciRequest::D0Entry, Answer::Refused),
            Fault::PciResourcesRefused => (PciRequest::Assigned, Answer::Refused),
            _ => return false,
        };
        self.answer(request, how, times);
        true
    }
}

/// Waits until the guest has released a rescinded device.
pub fn released(host: &VmbusHost, instance: Guid) -> Result<(), String> {
    if host.wait_removed(instance, RELEASE) {
        Ok(())
    } else {
        Err(format!(
            "the guest has not released {instance} within {} seconds",
            RELEASE.as_secs()
        ))
    }
}
