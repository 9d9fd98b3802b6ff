// SPDX-License-Identifier: GPL-2.0

//! A port of the virtual switch: connects the two paths of a NIC to its uplink.
//!
//! Frames from the uplink go to the guest by exactly one path:
//!
//! - While the guest has switched its data path to the VF, and a VF is there to take them,
//!   unicast frames to the NIC's address go by the VF, and broadcast, multicast and TCP
//!   connection requests (SYN without ACK) by the synthetic path.
//! - Otherwise all frames go by the synthetic path.
//!
//! A VF that says that it is not ready has not taken the frame; it then goes by the synthetic
//! path. Frames from the guest are taken from both paths at any time.
//!
//! One thread reads the uplink. It holds the port's lock for reading while it delivers a batch,
//! so a change of the data path takes effect between two frames and never in the middle of one.

use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::{self, JoinHandle};

use vmbus_host::{Counter, Counters};
use vmm_sys_util::eventfd::EventFd;

use crate::frame::{self, Mac, TxOffload, VnetHeader};
use crate::poll;
use crate::tap::Uplink;

/// Frames taken from the uplink in a row before the batch is sent to the guest.
const BATCH: usize = 64;

/// Longest frame with its header from the uplink: a large TCP packet with VLAN tag.
const BUFFER: usize = VnetHeader::SIZE + frame::ETHERNET_HEADER + frame::VLAN_TAG + 65536;

/// A frame on its way to the guest. All checksums in it are complete.
#[derive(Clone, Copy, Debug)]
pub struct RxFrame<'a> {
    /// The frame, with VLAN tag if it has one.
    pub data: &'a [u8],
    /// The TCP or UDP checksum is known to be right; otherwise nobody has looked.
    pub checksum_valid: bool,
    /// The frame is a large TCP packet that was to be cut into segments of so many bytes of
    /// payload.
    pub gso_size: Option<u16>,
}

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// The guest gets it.
    Delivered,
    /// It was dropped: the guest does not want it, or has no room for it.
    Dropped,
    /// The path is not in operation; the frame was not touched.
    NotReady,
}

/// The VF as the port sees it.
///
/// The port calls it with its lock held for reading: [`SwitchPort::set_vf_sink`] must not be
/// called from within, nor with a lock held that `deliver` takes.
pub trait VfSink: Send + Sync {
    /// Takes a frame of at most one segment; large packets are segmented before.
    fn deliver(&self, frame: RxFrame<'_>) -> Delivery;

    /// A batch of frames has ended: the guest may be interrupted now.
    fn flush(&self) {}
}

/// The synthetic path as the port sees it.
pub(crate) trait SyntheticSink: Send + Sync {
    /// Takes a frame, large packets included.
    fn deliver(&self, frame: RxFrame<'_>) -> Delivery;

    /// A batch of frames has ended.
    fn flush(&self);
}

/// A way between guest and switch port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// VMBus.
    Synthetic,
    /// The virtual function.
    Vf,
}

/// Counters of a path, from the guest's point of view.
#[derive(Debug)]
struct PathCounters {
    rx_packets: Counter,
    rx_bytes: Counter,
    rx_dropped: Counter,
    tx_packets: Counter,
    tx_bytes: Counter,
    tx_dropped: Counter,
}

impl PathCounters {
    fn new(counters: &Counters, nic: &str, path: &str) -> Self {
        let counter = |what| counters.counter(&format!("{nic}.{path}.{what}"));
        Self {
            rx_packets: counter("rx_packets"),
            rx_bytes: counter("rx_bytes"),
            rx_dropped: counter("rx_dropped"),
            tx_packets: counter("tx_packets"),
            tx_bytes: counter("tx_bytes"),
            tx_dropped: counter("tx_dropped"),
        }
    }

    fn received(&self, delivery: Delivery, bytes: usize) {
        match delivery {
            Delivery::Delivered => {
                self.rx_packets.inc();
                self.rx_bytes.add(bytes as u64);
            }
            Delivery::Dropped | Delivery::NotReady => self.rx_dropped.inc(),
        }
    }
}

/// What decides on the way of a frame.
#[derive(Default)]
struct Paths {
    /// The NIC's permanent address, and the one the guest has set.
    macs: [Mac; 2],
    /// The guest wants its traffic by the VF.
    to_vf: bool,
    vf: Option<Arc<dyn VfSink>>,
    synthetic: Option<Arc<dyn SyntheticSink>>,
}

impl Paths {
    /// The VF, if the frame is to go by it.
    fn vf_for(&self, frame: &[u8]) -> Option<&Arc<dyn VfSink>> {
        if !self.to_vf {
            return None;
        }
        let destination = frame::destination(frame)?;
        let by_vf = self.macs.contains(&destination) && !frame::is_tcp_syn(frame);
        self.vf.as_ref().filter(|_| by_vf)
    }
}

struct Shared {
    uplink: Uplink,
    paths: RwLock<Paths>,
    link_up: AtomicBool,
    synthetic: PathCounters,
    vf: PathCounters,
    stop: EventFd,
}

/// A port of the virtual switch. See the [module](self).
pub struct SwitchPort {
    shared: Arc<Shared>,
    reader: Mutex<Option<JoinHandle<()>>>,
}

impl fmt::Debug for SwitchPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SwitchPort")
            .field("data_path_is_vf", &self.data_path_is_vf())
            .finish_non_exhaustive()
    }
}

impl SwitchPort {
    /// A port for the NIC `name` with the given permanent address.
    pub fn new(name: &str, mac: Mac, uplink: Uplink, counters: &Counters) -> io::Result<Arc<Self>> {
        let shared = Arc::new(Shared {
            uplink,
            paths: RwLock::new(Paths {
                macs: [mac; 2],
                ..Paths::default()
            }),
            link_up: AtomicBool::new(true),
            synthetic: PathCounters::new(counters, name, "synthetic"),
            vf: PathCounters::new(counters, name, "vf"),
            stop: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        });
        let reader = thread::Builder::new()
            .name(format!("{name}-uplink"))
            .spawn({
                let shared = shared.clone();
                move || shared.read_uplink()
            })?;
        Ok(Arc::new(Self {
            shared,
            reader: Mutex::new(Some(reader)),
        }))
    }

    /// Connects the VF, or disconnects it. When this returns, the old one gets no more frames.
    pub fn set_vf_sink(&self, vf: Option<Arc<dyn VfSink>>) {
        let old = std::mem::replace(&mut self.paths().vf, vf);
        // Dropped without the lock.
        drop(old);
    }

    /// Connects the synthetic path, or disconnects it, which ends a switch to the VF.
    pub(crate) fn set_synthetic_sink(&self, sink: Option<Arc<dyn SyntheticSink>>) {
        let mut paths = self.paths();
        if sink.is_none() {
            paths.to_vf = false;
        }
        let old = std::mem::replace(&mut paths.synthetic, sink);
        drop(paths);
        drop(old);
    }

    /// Moves the unicast traffic to the given path.
    pub(crate) fn switch_data_path(&self, to: Path) {
        self.paths().to_vf = to == Path::Vf;
    }

    /// Whether the guest has switched its data path to the VF.
    pub fn data_path_is_vf(&self) -> bool {
        let paths = self.shared.paths.read();
        paths.unwrap_or_else(PoisonError::into_inner).to_vf
    }

    /// Sets the address that the guest uses besides the permanent one.
    pub(crate) fn set_mac(&self, mac: Mac) {
        self.paths().macs[1] = mac;
    }

    /// The address that the guest uses.
    pub fn mac(&self) -> Mac {
        let paths = self.shared.paths.read();
        paths.unwrap_or_else(PoisonError::into_inner).macs[1]
    }

    /// Plugs the cable in or pulls it: without, no frame passes in either direction.
    pub fn set_link(&self, up: bool) {
        self.shared.link_up.store(up, Ordering::Relaxed);
    }

    /// Whether the cable is plugged in.
    pub fn link(&self) -> bool {
        self.shared.link_up.load(Ordering::Relaxed)
    }

    /// Takes a frame from the guest's VF. Its headers are brought in order in place.
    pub fn deliver_from_vf(&self, frame: &mut [u8], offload: &TxOffload) {
        self.shared.transmit(&self.shared.vf, frame, offload);
    }

    /// Takes a frame from the guest's synthetic device.
    pub(crate) fn deliver_from_synthetic(&self, frame: &mut [u8], offload: &TxOffload) {
        self.shared.transmit(&self.shared.synthetic, frame, offload);
    }

    /// Stops reading the uplink.
    pub fn shut_down(&self) {
        // Fails only if the counter is at its limit, and then the event is set.
        let _ = self.shared.stop.write(1);
        let reader = self
            .reader
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(reader) = reader {
            // A panic of the thread was reported by it.
            let _ = reader.join();
        }
    }

    fn paths(&self) -> std::sync::RwLockWriteGuard<'_, Paths> {
        self.shared
            .paths
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for SwitchPort {
    fn drop(&mut self) {
        self.shut_down();
    }
}

impl Shared {
    fn transmit(&self, counters: &PathCounters, frame: &mut [u8], offload: &TxOffload) {
        let header =
            if frame.len() < frame::ETHERNET_HEADER || !self.link_up.load(Ordering::Relaxed) {
                None
            } else {
                frame::prepare_transmit(frame, offload).ok()
            };
        let Some(header) = header else {
            counters.tx_dropped.inc();
            return;
        };
        let sent = match offload.vlan {
            None => self.uplink.send(header, &[frame]),
            Some(tci) => {
                let (macs, rest) = frame.split_at(12);
                let tag = frame::vlan_tag(tci);
                let header = header.shifted(frame::VLAN_TAG as u16);
                self.uplink.send(header, &[macs, &tag, rest])
            }
        };
        match sent {
            Ok(()) => {
                counters.tx_packets.inc();
                counters.tx_bytes.add(frame.len() as u64);
            }
            // The interface is down or out of memory: the frame is lost as on a real wire.
            Err(_) => counters.tx_dropped.inc(),
        }
    }

    fn read_uplink(&self) {
        let mut buffer = vec![0; BUFFER];
        let fds = [self.uplink.as_raw_fd(), self.stop.as_raw_fd()];
        loop {
            match poll::wait(&fds, None) {
                Ok(ready) if ready[1] => return,
                Ok(_) => {}
                Err(_) => return,
            }
            if !self.read_batch(&mut buffer) {
                return;
            }
        }
    }

    /// Delivers what the uplink has, at most a batch. Returns false if the uplink is gone.
    fn read_batch(&self, buffer: &mut [u8]) -> bool {
        let paths = self.paths.read().unwrap_or_else(PoisonError::into_inner);
        let mut alive = true;
        for _ in 0..BATCH {
            match self.uplink.receive(buffer) {
                Ok(Some((header, length))) => {
                    self.receive(&paths, header, &mut buffer[VnetHeader::SIZE..length]);
                }
                Ok(None) => break,
                // The interface was deleted; one that is down only has no frames.
                Err(_) => {
                    alive = false;
                    break;
                }
            }
        }
        if let Some(synthetic) = &paths.synthetic {
            synthetic.flush();
        }
        if let Some(vf) = paths.vf.as_ref().filter(|_| paths.to_vf) {
            vf.flush();
        }
        alive
    }

    /// Delivers a frame from the uplink.
    fn receive(&self, paths: &Paths, header: VnetHeader, data: &mut [u8]) {
        let pending = header.flags & VnetHeader::NEEDS_CHECKSUM != 0;
        let complete = !pending
            || frame::complete_checksum(
                data,
                header.checksum_start.into(),
                header.checksum_offset.into(),
            );
        if !complete || !self.link_up.load(Ordering::Relaxed) {
            self.synthetic.rx_dropped.inc();
            return;
        }
        let frame = RxFrame {
            data,
            checksum_valid: pending || header.flags & VnetHeader::DATA_VALID != 0,
            gso_size: header.is_gso().then_some(header.gso_size),
        };
        let taken = paths
            .vf_for(frame.data)
            .is_some_and(|vf| self.receive_by_vf(vf.as_ref(), frame));
        if !taken {
            let delivery = match &paths.synthetic {
                Some(synthetic) => synthetic.deliver(frame),
                None => Delivery::NotReady,
            };
            self.synthetic.received(delivery, frame.data.len());
        }
    }

    /// Gives a frame to the VF. Returns false if the VF has not taken it.
    fn receive_by_vf(&self, vf: &dyn VfSink, frame: RxFrame<'_>) -> bool {
        let Some(mss) = frame.gso_size else {
            let delivery = vf.deliver(frame);
            if delivery == Delivery::NotReady {
                return false;
            }
            self.vf.received(delivery, frame.data.len());
            return true;
        };
        // Once a segment was taken, the rest belongs to the VF too.
        let mut taken = false;
        let mut refused = false;
        let fits = frame::segment(frame.data, mss.into(), |data| {
            if refused {
                return;
            }
            let delivery = vf.deliver(RxFrame {
                data,
                checksum_valid: true,
                gso_size: None,
            });
            if delivery == Delivery::NotReady && !taken {
                refused = true;
                return;
            }
            taken = true;
            self.vf.received(delivery, data.len());
        });
        fits && !refused
    }
}
