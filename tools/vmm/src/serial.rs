// SPDX-License-Identifier: GPL-2.0
//! Serial ports: the console and the agent's.
//!
//! The guest's bytes are queued by the virtual processor and written out by a thread, so that neither a slow reader
//! nor a system call a byte holds the guest up.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_ioctls::VmFd;
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// Output kept for an agent client that has yet to connect.
const BACKLOG: usize = 1 << 20;
/// Time in which further output is collected before a write.
const COLLECT: Duration = Duration::from_millis(1);
/// A client that does not read for so long is dropped.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait for the guest to take input before looking whether the VM has stopped.
const ROOM_TIMEOUT: Duration = Duration::from_millis(50);

// Registers of a 16550, and bits of them.
const IER: u8 = 1;
const IIR: u8 = 2;
const LCR: u8 = 3;
const LCR_DLAB: u8 = 1 << 7;
const LSR: u8 = 5;
const LSR_DATA_READY: u8 = 1 << 0;

/// Raises an edge on an interrupt line.
struct IrqLine {
    vm: Arc<VmFd>,
    line: u32,
}

impl Trigger for IrqLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.vm
            .set_irq_line(self.line, true)
            .and_then(|()| self.vm.set_irq_line(self.line, false))
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }
}

/// Reads a register.
///
/// vm-superio takes the interrupt for received bytes back when the first of them is read. Linux stops after 256 and asks
/// whether there are more: then writing the register that enables interrupts raises it again.
fn read<T, E, W>(serial: &mut Serial<T, E, W>, register: u8) -> u8
where
    T: Trigger,
    E: SerialEvents,
    W: Write,
{
    if register == IIR && serial.read(LSR) & LSR_DATA_READY != 0 && serial.read(LCR) & LCR_DLAB == 0
    {
        let enabled = serial.read(IER);
        // An interrupt that cannot be raised is not pending.
        let _ = serial.write(IER, enabled);
    }
    serial.read(register)
}

/// Tells who feeds the port when the guest has taken all there was.
#[derive(Default)]
struct Room {
    empty: Mutex<bool>,
    changed: Condvar,
}

impl SerialEvents for Room {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        *self.empty.lock().unwrap() = true;
        self.changed.notify_all();
    }
}

#[derive(Default)]
struct Queue {
    bytes: Vec<u8>,
    closed: bool,
    /// Where an agent port's output goes, once there is a client.
    client: Option<UnixStream>,
}

/// Output on its way from the guest to the outside.
#[derive(Default)]
struct Output {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Output {
    fn close(&self) {
        self.queue.lock().unwrap().closed = true;
        self.changed.notify_all();
    }

    fn set_client(&self, client: Option<UnixStream>) {
        self.queue.lock().unwrap().client = client;
        self.changed.notify_all();
    }

    /// Waits until there is output (and, if so asked, a client). `None` at the end.
    fn take(&self, for_client: bool) -> Option<(Vec<u8>, Option<UnixStream>)> {
        let waiting = |queue: &mut Queue| {
            !queue.closed && (queue.bytes.is_empty() || for_client && queue.client.is_none())
        };
        drop(
            self.changed
                .wait_while(self.queue.lock().unwrap(), waiting)
                .unwrap(),
        );
        thread::sleep(COLLECT);
        let mut queue = self.queue.lock().unwrap();
        let client = queue
            .client
            .as_ref()
            .and_then(|client| client.try_clone().ok());
        if queue.bytes.is_empty() || for_client && client.is_none() {
            return (!queue.closed).then(|| (Vec::new(), None));
        }
        Some((std::mem::take(&mut queue.bytes), client))
    }
}

/// The side of [`Output`] the guest writes to.
struct Sender(Arc<Output>);

impl Write for Sender {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut queue = self.0.queue.lock().unwrap();
        if queue.bytes.len() + bytes.len() <= BACKLOG {
            let was_empty = queue.bytes.is_empty();
            queue.bytes.extend_from_slice(bytes);
            if was_empty {
                self.0.changed.notify_all();
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// One port.
pub struct Port {
    serial: Mutex<Serial<IrqLine, Arc<Room>, Sender>>,
    room: Arc<Room>,
    output: Arc<Output>,
}

impl Port {
    /// A port on interrupt line `line`.
    pub fn new(vm: Arc<VmFd>, line: u32) -> Self {
        let room = Arc::new(Room::default());
        let output = Arc::new(Output::default());
        let serial =
            Serial::with_events(IrqLine { vm, line }, room.clone(), Sender(output.clone()));
        Self {
            serial: Mutex::new(serial),
            room,
            output,
        }
    }

    /// The guest reads a register.
    pub fn read(&self, register: u8) -> u8 {
        read(&mut self.serial.lock().unwrap(), register)
    }

    /// The guest writes a register.
    pub fn write(&self, register: u8, value: u8) {
        // An error means that a byte or an interrupt is lost, as on a real line.
        let _ = self.serial.lock().unwrap().write(register, value);
    }

    /// Gives the guest input, as fast as it takes it. Returns early when the VM stops.
    fn feed(&self, mut bytes: &[u8], stop: &Stop) {
        while !bytes.is_empty() && !stop.is_set() {
            {
                let mut serial = self.serial.lock().unwrap();
                *self.room.empty.lock().unwrap() = false;
                // Nothing is taken when the buffer is full or in loop-back mode.
                let taken = serial.enqueue_raw_bytes(bytes).unwrap_or(0);
                bytes = &bytes[taken..];
            }
            if !bytes.is_empty() {
                let empty = self.room.empty.lock().unwrap();
                drop(
                    self.room
                        .changed
                        .wait_timeout_while(empty, ROOM_TIMEOUT, |empty| !*empty)
                        .unwrap(),
                );
            }
        }
    }

    /// Ends the output thread, which writes what is left.
    pub fn close(&self) {
        self.output.close();
    }

    /// Sends the output to `sink`.
    pub fn write_to(
        &self,
        name: &str,
        mut sink: Box<dyn Write + Send>,
    ) -> io::Result<JoinHandle<()>> {
        let output = self.output.clone();
        thread::Builder::new().name(name.into()).spawn(move || {
            while let Some((bytes, _)) = output.take(false) {
                // A closed sink is no reason to stop the guest.
                let _ = sink.write_all(&bytes).and_then(|()| sink.flush());
            }
        })
    }

    /// Takes the input from `source`.
    pub fn read_from<S>(
        self: &Arc<Self>,
        name: &str,
        mut source: S,
        stop: Arc<Stop>,
    ) -> io::Result<JoinHandle<()>>
    where
        S: Read + AsRawFd + Send + 'static,
    {
        let port = self.clone();
        thread::Builder::new()
            .name(name.into())
            .spawn(move || port.copy_in(&mut source, &stop))
    }

    fn copy_in<S: Read + AsRawFd>(&self, source: &mut S, stop: &Stop) {
        let mut buf = [0; 4096];
        while stop.wait_readable(source.as_raw_fd()) {
            match source.read(&mut buf) {
                Ok(0) => break,
                Ok(len) => self.feed(&buf[..len], stop),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    eprintln!("hvlab: input of a serial port: {error}");
                    break;
                }
            }
        }
    }

    /// Connects both directions with whoever connects to `listener`, one client at a time.
    pub fn serve(
        self: &Arc<Self>,
        name: &str,
        listener: UnixListener,
        stop: Arc<Stop>,
    ) -> io::Result<Vec<JoinHandle<()>>> {
        let output = self.output.clone();
        let writer = thread::Builder::new()
            .name(format!("{name}-out"))
            .spawn(move || {
                while let Some((bytes, client)) = output.take(true) {
                    if let Some(mut client) = client {
                        if let Err(error) = client.write_all(&bytes) {
                            eprintln!("hvlab: output of a serial port: {error}");
                            output.set_client(None);
                        }
                    }
                }
            })?;
        let port = self.clone();
        let reader = thread::Builder::new()
            .name(format!("{name}-in"))
            .spawn(move || {
                while stop.wait_readable(listener.as_raw_fd()) {
                    let Ok((mut client, _)) = listener.accept() else {
                        break;
                    };
                    let _ = client.set_write_timeout(Some(CLIENT_TIMEOUT));
                    port.output.set_client(client.try_clone().ok());
                    port.copy_in(&mut client, &stop);
                    port.output.set_client(None);
                }
            })?;
        Ok(vec![writer, reader])
    }
}

/// Says to all threads that the VM has stopped.
pub struct Stop {
    event: EventFd,
    set: AtomicBool,
}

impl Stop {
    /// Not stopped yet.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            set: AtomicBool::new(false),
        })
    }

    /// Stops, for good.
    pub fn set(&self) {
        self.set.store(true, Ordering::SeqCst);
        // Nobody reads the event, so it stays signalled.
        let _ = self.event.write(1);
    }

    /// Whether the VM has stopped.
    pub fn is_set(&self) -> bool {
        self.set.load(Ordering::SeqCst)
    }

    /// Waits until `fd` can be read. `false` when the VM stops.
    pub fn wait_readable(&self, fd: RawFd) -> bool {
        const STOPPED: u64 = 0;
        const READABLE: u64 = 1;
        let epoll = match Epoll::new() {
            Ok(epoll) => epoll,
            Err(error) => {
                eprintln!("hvlab: epoll: {error}");
                return false;
            }
        };
        let add = |fd, data| {
            let event = EpollEvent::new(EventSet::IN, data);
            epoll.ctl(ControlOperation::Add, fd, event).is_ok()
        };
        if !add(self.event.as_raw_fd(), STOPPED) {
            return false;
        }
        if !add(fd, READABLE) {
            // Regular files are unknown to epoll and always readable.
            return !self.is_set();
        }
        let mut events = [EpollEvent::default(); 2];
        loop {
            match epoll.wait(-1, &mut events) {
                Ok(count) => return events[..count].iter().all(|event| event.data() == READABLE),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    eprintln!("hvlab: epoll_wait: {error}");
                    return false;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct NoLine;

    impl Trigger for NoLine {
        type E = io::Error;

        fn trigger(&self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn received_bytes_stay_pending_until_the_last_is_read() {
        const DATA: u8 = 0;
        const RECEIVED: u8 = 1 << 2;
        const NOT_PENDING: u8 = 1 << 0;
        let mut serial = Serial::new(NoLine, io::sink());
        serial.write(IER, 1).unwrap();
        serial.enqueue_raw_bytes(b"abc").unwrap();
        for byte in b"abc" {
            let pending = read(&mut serial, IIR);
            assert_eq!(pending & (RECEIVED | NOT_PENDING), RECEIVED);
            assert_eq!(read(&mut serial, DATA), *byte);
        }
        assert_eq!(read(&mut serial, IIR) & NOT_PENDING, NOT_PENDING);
    }
}
