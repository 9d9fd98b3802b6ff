// SPDX-License-Identifier: GPL-2.0

//! Message-signalled interrupts.
//!
//! The host says which message a function has to send for an interrupt, when it is told the vector
//! and the processor. Later the hypervisor can be told another vector and processor ("retarget"),
//! and the message stays the same. On arm64 the vector is an SPI, and nothing is told later.

use hyperv_wire::{
    hypercall::{
        device_id,
        Retarget,
        Target,
        BANKS_MAX,
        PARTITION_SELF, //
    },
    vpci::{
        CreateInterruptReply,
        DeleteInterrupt,
        InterruptRequest,
        Processors,
        ProtocolVersion,
        SlotNumber,
        TranslatedInterrupt,
        CREATE_INTERRUPT_MAX, //
    },
};
use kernel::{
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc, //
    },
    time::{
        delay::udelay,
        Delta,
        Instant,
        Monotonic, //
    },
};
use pci_host::{
    hypercall,
    Interrupt,
    MsiController,
    MsiKind,
    MsiMessage, //
};
use vmbus::Reply;
use zerocopy::{
    little_endian::U64,
    IntoBytes, //
};

use crate::{
    bus::{
        Bus,
        Child, //
    },
    protocol::eproto, //
};

/// How long the host has to set up an interrupt. The CPU can do nothing else meanwhile.
const COMPOSE_TIMEOUT: Delta = Delta::from_secs(5);

/// How often the guest looks for the host's answer at first; most hosts answer soon.
const COMPOSE_POLL: Delta = Delta::from_micros(2);

/// When a host is slow.
const COMPOSE_SLOW: Delta = Delta::from_micros(500);

/// How often the guest looks then, and whether the function is still there, which costs an exit.
const COMPOSE_SLOW_POLL: Delta = Delta::from_micros(100);

/// Delivery mode of the local APIC: to the given vector. On arm64 there is no other.
const DELIVERY_FIXED: u8 = 0;

/// The interrupts of one bus.
pub(crate) struct Controller {
    bus: Arc<Bus>,
    /// Where several MSIs at once go first; different CPUs, since the host spreads the work by it.
    next_cpu: Atomic<u32>,
}

impl Controller {
    /// Makes the controller of `bus`.
    pub(crate) fn new(bus: Arc<Bus>) -> Result<Arc<Self>> {
        Ok(Arc::new(
            Self {
                bus,
                next_cpu: Atomic::new(0),
            },
            GFP_KERNEL,
        )?)
    }

    /// Gives an interrupt back to the host.
    fn delete(&self, slot: SlotNumber, interrupt: TranslatedInterrupt) {
        // Those that share another one's message are not known to the host.
        if interrupt.vector_count() == 0 {
            return;
        }
        // On a bus that is gone there is nothing to be given back, and a full ring is no reason to
        // keep the guest from freeing an interrupt.
        let _ = self
            .bus
            .send(DeleteInterrupt::new(slot, interrupt).as_bytes());
    }

    /// Has the host make the interrupt, unless there is no need to, and says which message raises
    /// it.
    fn establish(&self, irq: &Interrupt<'_>, data: &mut Option<Composed>) -> Result<MsiMessage> {
        let child = self
            .bus
            .child(SlotNumber::from_devfn(irq.devfn()))
            .ok_or(ENODEV)?;
        let (cpu, vector, count) = match irq.kind() {
            // It is masked, and will be composed again with a vector of its own.
            MsiKind::MsiX if !irq.is_requested() => {
                return Ok(data
                    .as_ref()
                    .map_or(MsiMessage::default(), |c| message(&c.interrupt)));
            }
            MsiKind::MsiX | MsiKind::Single => {
                let cpu = irq.cpus().next().ok_or(EINVAL)?;
                let vector = irq.vector();
                match data.take() {
                    Some(old) if (old.cpu, old.vector) == (cpu, vector) => {
                        return Ok(message(&data.insert(old).interrupt));
                    }
                    // The host places an interrupt by the processor it is created for.
                    Some(old) => self.delete(child.function.slot, old.interrupt),
                    None => {}
                }
                (cpu, vector, 1)
            }
            MsiKind::Multi { index, count } => {
                if let Some(composed) = data {
                    return Ok(message(&composed.interrupt));
                }
                if index > 0 {
                    let first = irq.first_message();
                    if first == MsiMessage::default() {
                        return Err(EIO);
                    }
                    let own =
                        TranslatedInterrupt::new(0, first.address, first.data.wrapping_add(index));
                    let own = data.insert(Composed {
                        interrupt: own,
                        vector: 0,
                        cpu: 0,
                    });
                    return Ok(message(&own.interrupt));
                }
                let cpu = pci_host::next_online_cpu(self.next_cpu.load(Relaxed));
                self.next_cpu.store(cpu.wrapping_add(1), Relaxed);
                (cpu, irq.multi_vector(), count)
            }
        };
        let interrupt = self.create(&child, cpu, vector, count)?;
        let composed = data.insert(Composed {
            interrupt,
            vector,
            cpu,
        });
        Ok(message(&composed.interrupt))
    }

    /// Asks the host for a message.
    fn create(
        &self,
        child: &Child,
        cpu: u32,
        vector: u32,
        vector_count: u16,
    ) -> Result<TranslatedInterrupt> {
        let bus = &self.bus;
        let version = bus.version();
        // The processor is not final, see `unmask`.
        let processors = if version < ProtocolVersion::V1_2 {
            Processors::Mask(u64::MAX)
        } else {
            hypercall::vp_index(cpu)
                .and_then(|vp| Processors::one(version, vp))
                .ok_or(EINVAL)?
        };
        let mut message = [0; CREATE_INTERRUPT_MAX];
        let len = InterruptRequest {
            vector,
            delivery_mode: DELIVERY_FIXED,
            vector_count,
            processors,
        }
        .write(version, child.function.slot, &mut message)
        .map_err(|e| {
            dev_err!(bus.log(), "{}\n", format_args!("{e}"));
            EINVAL
        })?;

        let request = bus.requests.begin()?;
        let channel = bus.channel()?;
        channel
            .ring()?
            .send_inband(&message[..len], request.id(), Reply::Wanted)
            .inspect_err(|e| {
                dev_err!(
                    bus.log(),
                    "Sending request for interrupt failed: {:#x}\n",
                    e.to_errno()
                );
            })?;

        // Interrupts are off, so the channel's tasklet may not come to run: look for the answer
        // here.
        let start = Instant::<Monotonic>::now();
        loop {
            bus.receive(&channel.ring()?);
            if request.done().try_wait() {
                break;
            }
            let waited = start.elapsed();
            if waited < COMPOSE_SLOW {
                udelay(COMPOSE_POLL);
                continue;
            }
            if !bus.is_present(child) {
                dev_err!(bus.log(), "the device has gone\n");
                return Err(ENODEV);
            }
            if waited >= COMPOSE_TIMEOUT {
                if !request.give_up(child.function.slot) {
                    break;
                }
                dev_err!(bus.log(), "Request for interrupt timed out\n");
                return Err(ETIMEDOUT);
            }
            udelay(COMPOSE_SLOW_POLL);
        }

        let response = request.response().ok_or(eproto())?;
        match CreateInterruptReply::parse(response.as_bytes()) {
            Ok(Ok(interrupt)) => Ok(interrupt),
            Ok(Err(status)) => {
                dev_err!(bus.log(), "Request for interrupt failed: {:#x}\n", status.0);
                Err(eproto())
            }
            Err(e) => {
                dev_err!(
                    bus.log(),
                    "Request for interrupt failed: {}\n",
                    format_args!("{e}")
                );
                Err(eproto())
            }
        }
    }
}

fn message(interrupt: &TranslatedInterrupt) -> MsiMessage {
    MsiMessage {
        address: interrupt.address(),
        data: interrupt.data(),
    }
}

/// An interrupt that the host knows.
pub(crate) struct Composed {
    interrupt: TranslatedInterrupt,
    /// Where the host was told that it goes to. It may have been retargeted since.
    vector: u32,
    cpu: u32,
}

impl MsiController for Controller {
    type Data = Option<Composed>;

    fn activate(&self, irq: &Interrupt<'_>, data: &mut Self::Data) -> Result {
        self.establish(irq, data).map(drop)
    }

    fn compose(&self, irq: &Interrupt<'_>, data: &mut Self::Data) -> MsiMessage {
        self.establish(irq, data).unwrap_or_default()
    }

    fn unmask(&self, irq: &Interrupt<'_>, data: &mut Self::Data) {
        let bus = &self.bus;
        let Some(Composed { interrupt, .. }) = data else {
            dev_warn!(
                bus.log(),
                "hv_irq_retarget_interrupt() can not unmask irq {}\n",
                irq.irq()
            );
            return;
        };

        let mut set = ProcessorSet::default();
        for vp in irq.cpus().filter_map(hypercall::vp_index) {
            set.insert(vp);
        }
        let mut banks = [U64::ZERO; BANKS_MAX];
        let retarget = Retarget {
            partition: PARTITION_SELF,
            device: device_id(&bus.dev.instance().to_bytes(), irq.devfn() & 7),
            // The hypervisor knows the message by the lower half of the address.
            msi_address: interrupt.address() as u32,
            msi_data: interrupt.data(),
            vector: irq.vector(),
            // Hosts with the older protocol may know the mask only, but then have no other
            // processors either.
            target: match set.as_mask() {
                Some(mask) if bus.version() < ProtocolVersion::V1_2 => Target::Mask(mask),
                _ => set.as_target(&mut banks),
            },
        };
        let result = if set.is_empty() {
            Err(hypercall::Failed(1))
        } else {
            hypercall::retarget_interrupt(&retarget)
        };
        if let Err(e) = result {
            if !bus.is_removing() {
                dev_err!(
                    bus.log(),
                    "hv_irq_retarget_interrupt() failed: {:#x}\n",
                    e.0
                );
            }
        }
    }

    fn free(&self, irq: &Interrupt<'_>, data: &mut Self::Data) {
        if let Some(Composed { interrupt, .. }) = data.take() {
            let slot = SlotNumber::from_devfn(irq.devfn());
            // The host takes back the interrupts of a function that is gone.
            if self.bus.child(slot).is_some() {
                self.delete(slot, interrupt);
            }
        }
    }
}

/// A set of virtual processors.
struct ProcessorSet {
    banks: [u64; BANKS_MAX],
}

impl Default for ProcessorSet {
    fn default() -> Self {
        Self {
            banks: [0; BANKS_MAX],
        }
    }
}

impl ProcessorSet {
    /// Adds a processor. One with a number too high for a set is left out.
    fn insert(&mut self, vp: u32) {
        if let Some(bank) = self.banks.get_mut(vp as usize / 64) {
            *bank |= 1 << (vp % 64);
        }
    }

    fn is_empty(&self) -> bool {
        self.banks.iter().all(|bank| *bank == 0)
    }

    /// The set as a mask of the first 64 processors, if there are no others.
    fn as_mask(&self) -> Option<u64> {
        let (first, others) = self.banks.split_first()?;
        others.iter().all(|bank| *bank == 0).then_some(*first)
    }

    /// The set as the hypercall wants it: only the banks that are not empty.
    fn as_target<'a>(&self, banks: &'a mut [U64; BANKS_MAX]) -> Target<'a> {
        let mut valid_banks = 0;
        let mut used = 0;
        for (number, &bank) in self
            .banks
            .iter()
            .enumerate()
            .filter(|(_, bank)| **bank != 0)
        {
            valid_banks |= 1 << number;
            banks[used] = U64::new(bank);
            used += 1;
        }
        Target::Sparse {
            valid_banks,
            banks: &banks[..used],
        }
    }
}
