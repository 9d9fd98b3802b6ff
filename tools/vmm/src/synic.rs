// SPDX-License-Identifier: GPL-2.0
//! Synthetic interrupt controller: message pages and event flags.
//!
//! KVM keeps the MSRs and delivers interrupts; it tells us where the guest's two pages are (an exit whenever the
//! guest moves them), and when the guest has taken a message out of its slot although another one waits (the
//! resample event of the SINT).

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use hyperv_wire::vmbus::MAX_MESSAGE_LEN;
use kvm_bindings::{
    kvm_irq_routing_entry, kvm_irq_routing_hv_sint, kvm_irq_routing_irqchip, KvmIrqRouting,
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQ_ROUTING_HV_SINT,
    KVM_IRQ_ROUTING_IRQCHIP,
};
use kvm_ioctls::VmFd;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, VolatileMemory};
use vmm_sys_util::eventfd::EventFd;

use crate::layout::FIRST_SINT_GSI;
use crate::serial::Stop;

/// Synthetic interrupts of a virtual processor.
pub const SINTS: u8 = 16;
/// The one whose end of message is watched: the VMBus's.
pub const MESSAGE_SINT: u8 = 2;
/// Event flags of a SINT.
const FLAGS: u16 = 2048;

const SLOT: u64 = 256;
/// Bytes before the payload: type, payload size, flags, two reserved, sender.
const MESSAGE_HEADER: usize = 16;
/// Message flag: another message waits, so write the end-of-message register.
const MESSAGE_PENDING: u8 = 1;
const MESSAGE_NONE: u32 = 0;

/// Messages kept for a guest that does not take them. Then they are lost, as on a port with no buffers left.
const QUEUE_MAX: usize = 8192;

/// Bit 0 of SCONTROL, SIEFP and SIMP.
const ENABLE: u64 = 1;

struct Message {
    message_type: u32,
    payload: Vec<u8>,
}

/// Pages and queues of a virtual processor.
#[derive(Default)]
struct Processor {
    /// SCONTROL, SIEFP and SIMP as the guest has them.
    control: AtomicU64,
    event_page: AtomicU64,
    message_page: AtomicU64,
    queues: [Mutex<VecDeque<Message>>; SINTS as usize],
}

impl Processor {
    fn page(&self, register: &AtomicU64) -> Option<u64> {
        let value = register.load(Ordering::Acquire);
        let enabled = value & self.control.load(Ordering::Acquire) & ENABLE != 0;
        enabled.then_some(value & !0xfff)
    }
}

/// How an interrupt is raised: KVM, or a test's recorder.
pub trait RaiseSint: Send + Sync {
    /// Raises a SINT of a processor.
    fn raise(&self, vp: u32, sint: u8);
}

/// KVM's interrupt routing.
pub struct KvmSints(pub Arc<VmFd>);

fn gsi(vp: u32, sint: u8) -> u32 {
    FIRST_SINT_GSI + vp * u32::from(SINTS) + u32::from(sint)
}

impl RaiseSint for KvmSints {
    fn raise(&self, vp: u32, sint: u8) {
        // It fails for a masked SINT; then there is nobody to interrupt.
        let _ = self.0.set_irq_line(gsi(vp, sint), true);
    }
}

/// Controllers of all processors.
pub struct Synic {
    memory: GuestMemoryMmap,
    processors: Vec<Processor>,
    raise: Box<dyn RaiseSint>,
}

impl Synic {
    /// Controllers of `vps` processors, all off.
    pub fn new(memory: GuestMemoryMmap, vps: u32, raise: Box<dyn RaiseSint>) -> Self {
        Self {
            memory,
            processors: (0..vps).map(|_| Processor::default()).collect(),
            raise,
        }
    }

    /// The guest has changed SCONTROL, SIEFP or SIMP of a processor.
    pub fn update(&self, vp: u32, control: u64, event_page: u64, message_page: u64) {
        let Some(processor) = self.processors.get(vp as usize) else {
            return;
        };
        processor.event_page.store(event_page, Ordering::Release);
        processor
            .message_page
            .store(message_page, Ordering::Release);
        processor.control.store(control, Ordering::Release);
        self.end_of_message(vp);
    }

    /// Queues a message and delivers it if its slot is free.
    pub fn post_message(&self, vp: u32, sint: u8, message_type: u32, payload: &[u8]) {
        let Some(processor) = self.processors.get(vp as usize) else {
            return;
        };
        let Some(queue) = processor.queues.get(usize::from(sint)) else {
            return;
        };
        let mut queue = queue.lock().unwrap();
        if queue.len() < QUEUE_MAX {
            let payload = payload[..payload.len().min(MAX_MESSAGE_LEN)].to_vec();
            queue.push_back(Message {
                message_type,
                payload,
            });
        }
        self.deliver(vp, sint, processor, &mut queue);
    }

    /// The guest has freed message slots of a processor.
    pub fn end_of_message(&self, vp: u32) {
        let Some(processor) = self.processors.get(vp as usize) else {
            return;
        };
        for (sint, queue) in (0..SINTS).zip(&processor.queues) {
            self.deliver(vp, sint, processor, &mut queue.lock().unwrap());
        }
    }

    fn deliver(&self, vp: u32, sint: u8, processor: &Processor, queue: &mut VecDeque<Message>) {
        let Some(page) = processor.page(&processor.message_page) else {
            return;
        };
        let slot = page + u64::from(sint) * SLOT;
        if let Some(message) = queue.front() {
            match self.fill(slot, message, queue.len() > 1) {
                Ok(true) => {
                    queue.pop_front();
                    self.raise.raise(vp, sint);
                }
                Ok(false) => {}
                // The page is not in memory: no message ever gets through.
                Err(_) => queue.clear(),
            }
        }
    }

    /// Writes a message if the slot is free. Otherwise sees to it that the guest says when it is.
    fn fill(
        &self,
        slot: u64,
        message: &Message,
        more: bool,
    ) -> Result<bool, vm_memory::GuestMemoryError> {
        let volatile = self.memory.get_slice(GuestAddress(slot), SLOT as usize)?;
        let slot_type = volatile.get_atomic_ref::<AtomicU32>(0)?;
        let flags = volatile.get_atomic_ref::<AtomicU8>(5)?;
        if slot_type.load(Ordering::Acquire) != MESSAGE_NONE {
            flags.fetch_or(MESSAGE_PENDING, Ordering::SeqCst);
            // The guest empties the slot first and looks at the flag then. If it has emptied it by now, it may
            // have missed the flag.
            if slot_type.load(Ordering::SeqCst) != MESSAGE_NONE {
                return Ok(false);
            }
        }
        let mut header = [0; MESSAGE_HEADER];
        header[4] = message.payload.len() as u8;
        header[5] = if more { MESSAGE_PENDING } else { 0 };
        self.memory
            .write_slice(&header[4..], GuestAddress(slot + 4))?;
        self.memory
            .write_slice(&message.payload, GuestAddress(slot + MESSAGE_HEADER as u64))?;
        // The type makes it valid.
        slot_type.store(message.message_type, Ordering::Release);
        Ok(true)
    }

    /// Sets an event flag, and interrupts if it was clear.
    pub fn signal_event(&self, vp: u32, sint: u8, flag: u16) {
        let Some(processor) = self.processors.get(vp as usize) else {
            return;
        };
        if sint >= SINTS || flag >= FLAGS {
            return;
        }
        let Some(page) = processor.page(&processor.event_page) else {
            return;
        };
        let byte = page + u64::from(sint) * SLOT + u64::from(flag / 8);
        let bit = 1u8 << (flag % 8);
        let was = self
            .memory
            .get_slice(GuestAddress(byte), 1)
            .ok()
            .and_then(|slice| {
                let flags = slice.get_atomic_ref::<AtomicU8>(0).ok()?;
                Some(flags.fetch_or(bit, Ordering::SeqCst))
            });
        if was.is_some_and(|was| was & bit == 0) {
            self.raise.raise(vp, sint);
        }
    }
}

/// Routes the I/O APIC's lines as a PC has them, and a GSI to each SINT.
pub fn route(vm: &VmFd, vps: u32) -> Result<(), RouteError> {
    let mut entries = Vec::new();
    let mut irqchip = |gsi: u32, irqchip: u32, pin: u32| {
        let mut entry = kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            ..Default::default()
        };
        entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
        entries.push(entry);
    };
    for line in 0..FIRST_SINT_GSI {
        match line {
            0..=7 => irqchip(line, KVM_IRQCHIP_PIC_MASTER, line),
            8..=15 => irqchip(line, KVM_IRQCHIP_PIC_SLAVE, line - 8),
            _ => {}
        }
        irqchip(line, KVM_IRQCHIP_IOAPIC, line);
    }
    for vcpu in 0..vps {
        for sint in 0..SINTS {
            let mut entry = kvm_irq_routing_entry {
                gsi: gsi(vcpu, sint),
                type_: KVM_IRQ_ROUTING_HV_SINT,
                ..Default::default()
            };
            entry.u.hv_sint = kvm_irq_routing_hv_sint {
                vcpu,
                sint: sint.into(),
            };
            entries.push(entry);
        }
    }
    vm.set_gsi_routing(&KvmIrqRouting::from_entries(&entries)?)?;
    Ok(())
}

/// Why routing failed.
#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    /// Too many entries.
    #[error("interrupt routing table: {0:?}")]
    Table(vmm_sys_util::fam::Error),
    /// KVM refuses.
    #[error("KVM_SET_GSI_ROUTING: {0}")]
    Kvm(#[from] kvm_ioctls::Error),
}

impl From<vmm_sys_util::fam::Error> for RouteError {
    fn from(error: vmm_sys_util::fam::Error) -> Self {
        Self::Table(error)
    }
}

/// Delivers waiting messages whenever a guest's processor says that it has emptied a slot.
pub fn watch_end_of_message(
    synic: Arc<Synic>,
    vm: &VmFd,
    stop: Arc<Stop>,
) -> io::Result<Vec<JoinHandle<()>>> {
    let from_errno = |error: kvm_ioctls::Error| io::Error::from_raw_os_error(error.errno());
    (0..synic.processors.len() as u32)
        .map(|vp| {
            // KVM ties the end of message to an irqfd. We raise by ioctl, so its own event stays unused.
            let raise = EventFd::new(libc::EFD_CLOEXEC)?;
            let resample = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
            vm.register_irqfd_with_resample(&raise, &resample, gsi(vp, MESSAGE_SINT))
                .map_err(from_errno)?;
            let (synic, stop) = (synic.clone(), stop.clone());
            thread::Builder::new()
                .name(format!("eom{vp}"))
                .spawn(move || {
                    let _raise = raise;
                    while stop.wait_readable(resample.as_raw_fd()) {
                        let _ = resample.read();
                        synic.end_of_message(vp);
                    }
                })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 0x1000;
    const EVENTS: u64 = 0x2000;

    #[derive(Clone, Default)]
    struct Raised(Arc<Mutex<Vec<(u32, u8)>>>);

    impl RaiseSint for Raised {
        fn raise(&self, vp: u32, sint: u8) {
            self.0.lock().unwrap().push((vp, sint));
        }
    }

    impl Raised {
        fn take(&self) -> Vec<(u32, u8)> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    fn synic() -> (Synic, Raised) {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
        let raised = Raised::default();
        (Synic::new(memory, 2, Box::new(raised.clone())), raised)
    }

    fn slot(synic: &Synic) -> (u32, u8, u8, Vec<u8>) {
        let at = GuestAddress(PAGE + 2 * SLOT);
        let mut bytes = vec![0; SLOT as usize];
        synic.memory.read_slice(&mut bytes, at).unwrap();
        let size = bytes[4];
        (
            u32::from_le_bytes(bytes[..4].try_into().unwrap()),
            size,
            bytes[5],
            bytes[16..16 + usize::from(size)].to_vec(),
        )
    }

    fn empty_slot(synic: &Synic) {
        let at = GuestAddress(PAGE + 2 * SLOT);
        synic.memory.write_obj(0u32, at).unwrap();
    }

    #[test]
    fn messages_wait_for_their_slot_in_order() {
        let (synic, raised) = synic();
        // The controller is off: the message waits.
        synic.post_message(1, 2, 1, b"first");
        assert!(raised.take().is_empty());
        synic.update(1, 1, EVENTS | 1, PAGE | 1);
        assert_eq!(raised.take(), [(1, 2)]);
        assert_eq!(slot(&synic), (1, 5, 0, b"first".to_vec()));
        synic.post_message(1, 2, 1, b"second");
        synic.post_message(1, 2, 1, b"third");
        assert!(raised.take().is_empty());
        assert_eq!(slot(&synic), (1, 5, MESSAGE_PENDING, b"first".to_vec()));
        empty_slot(&synic);
        synic.end_of_message(1);
        assert_eq!(raised.take(), [(1, 2)]);
        assert_eq!(slot(&synic), (1, 6, MESSAGE_PENDING, b"second".to_vec()));
        empty_slot(&synic);
        synic.end_of_message(1);
        assert_eq!(slot(&synic), (1, 5, 0, b"third".to_vec()));
    }

    #[test]
    fn payload_is_bounded() {
        let (synic, _) = synic();
        synic.update(0, 1, EVENTS | 1, PAGE | 1);
        synic.post_message(0, 2, 1, &[7; 300]);
        assert_eq!(slot(&synic).1, 240);
        synic.post_message(9, 2, 1, b"no such processor");
        synic.post_message(0, 16, 1, b"no such SINT");
    }

    #[test]
    fn page_outside_memory() {
        let (synic, raised) = synic();
        synic.update(0, 1, 0x8000 | 1, 0x8000 | 1);
        synic.post_message(0, 2, 1, b"lost");
        synic.signal_event(0, 2, 1);
        assert!(raised.take().is_empty());
    }

    #[test]
    fn event_flags() {
        let (synic, raised) = synic();
        synic.signal_event(0, 2, 5);
        assert!(raised.take().is_empty());
        synic.update(0, 1, EVENTS | 1, PAGE | 1);
        synic.signal_event(0, 2, 5);
        synic.signal_event(0, 2, 5);
        synic.signal_event(0, 2, 2047);
        synic.signal_event(0, 2, 2048);
        assert_eq!(raised.take(), [(0, 2), (0, 2)]);
        let base = EVENTS + 2 * SLOT;
        let first: u8 = synic.memory.read_obj(GuestAddress(base)).unwrap();
        let last: u8 = synic.memory.read_obj(GuestAddress(base + 255)).unwrap();
        assert_eq!((first, last), (1 << 5, 1 << 7));
        // Enabled pages without an enabled controller get nothing.
        synic.update(0, 0, EVENTS | 1, PAGE | 1);
        synic.signal_event(0, 2, 6);
        assert!(raised.take().is_empty());
    }
}
