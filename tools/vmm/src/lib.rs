// SPDX-License-Identifier: GPL-2.0
//! A virtual machine monitor on KVM that looks like Hyper-V to its guest.
//!
//! [`Vm::new`] makes a machine with memory but without devices; its [`Machine`] is the [`Platform`] on which the
//! VMBus host and its devices are built; [`Vm::start`] then takes the [`Hypercalls`] they provide and runs the guest.

mod acpi;
mod boot;
mod cmos;
mod cpuid;
pub mod hypercall;
mod isolation;
pub mod layout;
pub mod mmio;
mod ports;
mod serial;
mod synic;
mod vcpu;

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_bindings::{
    kvm_enable_cap, kvm_msi, kvm_pit_config, kvm_userspace_memory_region,
    KVM_CAP_X86_USER_SPACE_MSR, KVM_MAX_CPUID_ENTRIES, KVM_MSR_EXIT_REASON_FILTER,
    KVM_PIT_SPEAKER_DUMMY,
};
use kvm_ioctls::{
    Cap, Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd,
};
use thiserror::Error;
use vm_memory::{FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};
use vmbus_host::Platform;
use vmm_sys_util::signal::{register_signal_handler, Killable, SIGRTMIN};

pub use acpi::Window;
pub use hypercall::Hypercalls;
pub use mmio::{MmioBus, MmioDevice, MmioError};

/// Most virtual processors of a guest.
pub const MAX_CPUS: u32 = 128;
/// Least memory a guest gets.
const MIN_MEMORY: u64 = 64 << 20;
/// A processor that does not leave the guest at once is signalled again after this time.
const KICK_INTERVAL: Duration = Duration::from_millis(5);

/// Why a machine cannot be made or run.
#[derive(Debug, Error)]
pub enum VmError {
    /// `/dev/kvm` is not there, or not for us.
    #[error("/dev/kvm: {0}")]
    NoKvm(kvm_ioctls::Error),
    /// KVM is there but lacks something.
    #[error("/dev/kvm lacks {}", .0.join(", "))]
    Lacks(Vec<&'static str>),
    /// A call to KVM failed.
    #[error("{what}: {error}")]
    Kvm {
        /// Which one.
        what: &'static str,
        /// Why.
        error: kvm_ioctls::Error,
    },
    /// Interrupt routing.
    #[error(transparent)]
    Route(#[from] synic::RouteError),
    /// CPUID table.
    #[error("CPUID: {0:?}")]
    Cpuid(vmm_sys_util::fam::Error),
    /// Kernel, initrd, command line.
    #[error(transparent)]
    Boot(#[from] boot::BootError),
    /// A nonsensical configuration.
    #[error("{0}")]
    Config(String),
    /// Guest memory.
    #[error("guest memory: {0}")]
    Memory(String),
    /// Sockets, threads, events.
    #[error("{what}: {error}")]
    Io {
        /// What failed.
        what: String,
        /// Why.
        error: io::Error,
    },
}

impl VmError {
    fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |error| Self::Io { what, error }
    }
}

fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VmError {
    move |error| VmError::Kvm { what, error }
}

/// Why a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest switched itself off.
    PowerOff,
    /// The guest wants to start anew.
    Reset,
    /// The guest reported a crash, with these parameters, before it ended.
    Crash([u64; vcpu::CRASH_PARAMETERS]),
    /// The guest faulted beyond repair.
    TripleFault,
    /// It was asked to stop.
    Stopped,
    /// The machine broke.
    Error(String),
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("the guest switched itself off"),
            Self::Reset => f.write_str("the guest asked for a reset"),
            Self::Crash(parameters) => write!(f, "the guest reported a crash: {parameters:x?}"),
            Self::TripleFault => f.write_str("the guest died of a triple fault"),
            Self::Stopped => f.write_str("stopped from outside"),
            Self::Error(error) => write!(f, "machine error: {error}"),
        }
    }
}

/// Where the console goes.
pub struct Console {
    /// The guest's output.
    pub output: Box<dyn Write + Send>,
    /// The guest's input, if there is any.
    pub input: Option<File>,
}

/// What machine to make.
pub struct Config {
    /// The bzImage.
    pub kernel: PathBuf,
    /// Archives that make up the initramfs, in this order.
    pub initrds: Vec<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// Virtual processors, 1 to [`MAX_CPUS`].
    pub cpus: u32,
    /// Memory in bytes.
    pub memory: u64,
    /// NUMA nodes, 1 to as many as there are processors.
    pub nodes: u32,
    /// A file that the guest has as persistent memory, a multiple of [`PMEM_UNIT`] long.
    pub pmem: Option<PathBuf>,
    /// Whether the guest's memory is isolated from the host, as by virtualisation-based security.
    pub isolated: bool,
    /// Whether the guest is to access MMIO by hypercalls where it can.
    pub mmio_hypercalls: bool,
    /// Segment of a PCI bus that firmware describes and that has nothing on it.
    pub pci_segment: Option<u16>,
    /// First serial port.
    pub console: Console,
    /// Unix socket to which the second serial port is connected.
    pub agent: Option<PathBuf>,
    /// MMIO window of the VMBus below 4 GiB.
    pub low_mmio: Window,
    /// MMIO window of the VMBus above 4 GiB.
    pub high_mmio: Window,
}

/// APIC ids of a NUMA node, which is a package.
fn node_size(cpus: u32, nodes: u32) -> u32 {
    cpus.div_ceil(nodes).next_power_of_two()
}

/// The usual low window.
pub const LOW_MMIO: Window = Window {
    base: layout::LOW_MMIO,
    len: layout::LOW_MMIO_LEN,
};
/// The usual high window.
pub const HIGH_MMIO: Window = Window {
    base: layout::HIGH_MMIO,
    len: layout::HIGH_MMIO_LEN,
};

/// The guest's kernel maps persistent memory in pieces of this size.
pub const PMEM_UNIT: u64 = 2 << 20;

/// Opens KVM and says what it lacks for us, if anything. Its mere presence proves nothing: there are kinds of
/// `/dev/kvm` without these.
pub fn open_kvm() -> Result<Kvm, VmError> {
    let kvm = Kvm::new().map_err(VmError::NoKvm)?;
    let needed = [
        (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
        (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
        (Cap::Pit2, "KVM_CAP_PIT2"),
        (Cap::IrqfdResample, "KVM_CAP_IRQFD_RESAMPLE"),
        (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
        (Cap::SyncRegs, "KVM_CAP_SYNC_REGS"),
        (Cap::HypervTime, "KVM_CAP_HYPERV_TIME"),
        (Cap::HypervSynic2, "KVM_CAP_HYPERV_SYNIC2"),
        (Cap::X86UserSpaceMsr, "KVM_CAP_X86_USER_SPACE_MSR"),
        (Cap::X86MsrFilter, "KVM_CAP_X86_MSR_FILTER"),
    ];
    let missing: Vec<_> = needed
        .into_iter()
        .filter(|&(cap, _)| !kvm.check_extension(cap))
        .map(|(_, name)| name)
        .collect();
    if missing.is_empty() {
        Ok(kvm)
    } else {
        Err(VmError::Lacks(missing))
    }
}

/// The parts of a machine that its threads share. For devices it is the [`Platform`].
pub struct Machine {
    vm: Arc<VmFd>,
    memory: GuestMemoryMmap,
    cpus: u32,
    synic: Arc<synic::Synic>,
    ports: ports::Ports,
    mmio: Arc<MmioBus>,
    isolation: isolation::Isolation,
    mmio_hypercalls: bool,
    stop: Arc<serial::Stop>,
}

impl Platform for Machine {
    fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    fn is_shared(&self, pfn: u64) -> bool {
        self.isolation.is_shared(pfn)
    }

    fn vp_count(&self) -> u32 {
        self.cpus
    }

    fn post_message(&self, vp: u32, sint: u8, message_type: u32, payload: &[u8]) {
        self.synic.post_message(vp, sint, message_type, payload);
    }

    fn signal_event(&self, vp: u32, sint: u8, flag: u16) {
        self.synic.signal_event(vp, sint, flag);
    }

    fn signal_msi(&self, address: u64, data: u32) {
        let msi = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..Default::default()
        };
        // Zero or an error: the guest has no such processor or its APIC is off, and the interrupt is lost.
        let _ = self.vm.signal_msi(msi);
    }
}

impl Machine {
    /// Where devices put their registers.
    pub fn mmio(&self) -> &Arc<MmioBus> {
        &self.mmio
    }
}

/// A machine whose guest has not begun to run.
pub struct Vm {
    machine: Arc<Machine>,
    vcpus: Vec<VcpuFd>,
    console: Arc<serial::Port>,
    agent: Arc<serial::Port>,
    threads: Vec<JoinHandle<()>>,
}

impl Vm {
    /// Makes the machine, loads the kernel and opens the agent's socket.
    pub fn new(config: Config) -> Result<Self, VmError> {
        if !(1..=MAX_CPUS).contains(&config.cpus) {
            return Err(VmError::Config(format!(
                "{} virtual processors: 1 to {MAX_CPUS} are possible",
                config.cpus
            )));
        }
        if config.memory < MIN_MEMORY || config.memory % (1 << 20) != 0 {
            return Err(VmError::Config(format!(
                "{} bytes of memory: at least {MIN_MEMORY}, in MiB, are needed",
                config.memory
            )));
        }
        if !(1..=config.cpus).contains(&config.nodes) {
            return Err(VmError::Config(format!(
                "{} NUMA nodes: 1 to {}, the number of processors, are possible",
                config.nodes, config.cpus
            )));
        }
        let ranges = boot::ram_ranges(config.memory);
        let ram_end = ranges
            .iter()
            .map(|&(base, len)| base.0 + len as u64)
            .max()
            .unwrap_or(0);
        if config.high_mmio.len > 0 && ram_end > config.high_mmio.base {
            return Err(VmError::Config(
                "the memory reaches into the high MMIO window".into(),
            ));
        }
        let mut pmem = None;
        let mut regions: Vec<_> = ranges
            .iter()
            .map(|&(base, len)| (base, len, None))
            .collect();
        if let Some(path) = &config.pmem {
            if ram_end > layout::PMEM {
                return Err(VmError::Config(
                    "the memory reaches into the persistent memory".into(),
                ));
            }
            let (file, len) = open_pmem(path)?;
            pmem = Some(Window {
                base: layout::PMEM,
                len,
            });
            let file = FileOffset::new(file, 0);
            regions.push((GuestAddress(layout::PMEM), len as usize, Some(file)));
        }
        let memory = GuestMemoryMmap::from_ranges_with_files(regions)
            .map_err(|error| VmError::Memory(error.to_string()))?;
        let tables = acpi::Config {
            cpus: config.cpus,
            memory: config.memory,
            nodes: config.nodes,
            low_mmio: config.low_mmio,
            high_mmio: config.high_mmio,
            pmem,
            pci_segment: config.pci_segment,
        };
        let entry = boot::load(
            &memory,
            &config.kernel,
            &config.initrds,
            &config.cmdline,
            &tables,
        )?;

        let kvm_fd = open_kvm()?;
        let vm = Arc::new(create_vm(&kvm_fd, &memory, config.isolated)?);
        let console = Arc::new(serial::Port::new(vm.clone(), layout::COM1_IRQ));
        let agent = Arc::new(serial::Port::new(vm.clone(), layout::COM2_IRQ));
        let stop = Arc::new(serial::Stop::new().map_err(VmError::io("eventfd"))?);
        let machine = Arc::new(Machine {
            synic: Arc::new(synic::Synic::new(
                memory.clone(),
                config.cpus,
                Box::new(synic::KvmSints(vm.clone())),
            )),
            ports: ports::Ports::new(console.clone(), agent.clone()),
            mmio: Arc::new(MmioBus::new()),
            vm,
            memory,
            cpus: config.cpus,
            isolation: isolation::Isolation::new(config.isolated),
            mmio_hypercalls: config.mmio_hypercalls,
            stop,
        });

        let supported = kvm_fd
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(kvm("KVM_GET_SUPPORTED_CPUID"))?;
        if config.isolated {
            if let Some(obstacle) = cpuid::isolation_obstacle(supported.as_slice()) {
                return Err(VmError::Config(obstacle));
            }
        }
        let cpuid_config = cpuid::Config {
            cpus: config.cpus,
            package: node_size(config.cpus, config.nodes),
            tsc_deadline: kvm_fd.check_extension(Cap::TscDeadlineTimer),
            isolated: config.isolated,
            mmio_hypercalls: config.mmio_hypercalls,
        };
        let mut vcpus = Vec::new();
        for vp in 0..config.cpus {
            let mut fd = machine
                .vm
                .create_vcpu(vp.into())
                .map_err(kvm("KVM_CREATE_VCPU"))?;
            let cpuid = cpuid::build(&supported, cpuid_config, vp).map_err(VmError::Cpuid)?;
            vcpu::set_up(&machine.memory, &mut fd, &cpuid, (vp == 0).then_some(entry))?;
            vcpus.push(fd);
        }
        // Only now have the processors controllers that SINTs can be routed to.
        synic::route(&machine.vm, config.cpus)?;

        // From here on there are threads. They end when the machine is dropped.
        let mut this = Self {
            machine,
            vcpus,
            console,
            agent,
            threads: Vec::new(),
        };
        this.connect(config.console, config.agent)?;
        Ok(this)
    }

    /// Starts the threads that serve the guest from outside.
    fn connect(&mut self, console: Console, agent: Option<PathBuf>) -> Result<(), VmError> {
        let Console { output, input } = console;
        let stop = &self.machine.stop;
        let threads = &mut self.threads;
        let thread = || VmError::io("starting a thread");
        threads.push(
            self.console
                .write_to("console-out", output)
                .map_err(thread())?,
        );
        if let Some(input) = input {
            // Not joined: a read of a terminal may not end.
            self.console
                .read_from("console-in", input, stop.clone())
                .map_err(thread())?;
        }
        if let Some(path) = agent {
            let listener = UnixListener::bind(&path)
                .map_err(VmError::io(format!("agent socket {}", path.display())))?;
            threads.extend(
                self.agent
                    .serve("agent", listener, stop.clone())
                    .map_err(thread())?,
            );
        }
        threads.extend(
            synic::watch_end_of_message(self.machine.synic.clone(), &self.machine.vm, stop.clone())
                .map_err(VmError::io("end-of-message events"))?,
        );
        Ok(())
    }

    /// The platform for devices.
    pub fn machine(&self) -> Arc<Machine> {
        self.machine.clone()
    }

    /// Runs the guest.
    pub fn start(mut self, hypercalls: Arc<dyn Hypercalls>) -> Result<VmHandle, VmError> {
        extern "C" fn kicked(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        // The signal only has to end KVM_RUN.
        register_signal_handler(SIGRTMIN(), kicked).map_err(|error| VmError::Io {
            what: "signal handler".into(),
            error: io::Error::from_raw_os_error(error.errno()),
        })?;
        let guest = Arc::new(Guest {
            machine: self.machine.clone(),
            hypercalls,
            hypercall_msrs: Mutex::default(),
            exit: Mutex::default(),
            ended: Condvar::new(),
            crash: Mutex::default(),
        });
        let mut handle = VmHandle {
            guest: guest.clone(),
            vcpus: Vec::new(),
            vm: None,
        };
        for (vp, fd) in std::mem::take(&mut self.vcpus).into_iter().enumerate() {
            let guest = guest.clone();
            let vcpu = thread::Builder::new()
                .name(format!("vcpu{vp}"))
                .spawn(move || {
                    let _on_panic = EndOnPanic(&guest);
                    vcpu::run(&guest, vp as u32, fd);
                })
                .map_err(VmError::io("starting a thread"))?;
            handle.vcpus.push(vcpu);
        }
        handle.vm = Some(self);
        Ok(handle)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.machine.stop.set();
        self.console.close();
        self.agent.close();
        for thread in self.threads.drain(..) {
            // A panic of one of them has been reported where it happened.
            let _ = thread.join();
        }
    }
}

/// Opens the file that is persistent memory, and tells its length.
fn open_pmem(path: &Path) -> Result<(File, u64), VmError> {
    let failed = || VmError::io(path.display().to_string());
    let file = File::options()
        .read(true)
        .write(true)
        .open(path)
        .map_err(failed())?;
    let len = file.metadata().map_err(failed())?.len();
    let most = layout::HIGH_MMIO - layout::PMEM;
    if len == 0 || len % PMEM_UNIT != 0 || len > most {
        return Err(VmError::Config(format!(
            "{}: {len} bytes: persistent memory is a multiple of {} MiB, at most {} MiB",
            path.display(),
            PMEM_UNIT >> 20,
            most >> 20
        )));
    }
    Ok((file, len))
}

/// A VM with memory, interrupt controllers and the MSR filter.
fn create_vm(kvm_fd: &Kvm, memory: &GuestMemoryMmap, isolated: bool) -> Result<VmFd, VmError> {
    let vm = kvm_fd.create_vm().map_err(kvm("KVM_CREATE_VM"))?;
    let bases: &[u64] = if isolated {
        &[0, 1 << layout::SHARED_BIT]
    } else {
        &[0]
    };
    let regions = bases
        .iter()
        .flat_map(|base| memory.iter().map(move |region| (base, region)));
    for (slot, (base, region)) in (0..).zip(regions) {
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: base + region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            flags: 0,
        };
        #[expect(unsafe_code)]
        // SAFETY: the mapping is owned by `memory`, of which the machine keeps a clone next to the VM's file
        // descriptor and whose other clones only keep it longer; each region has a slot of its own.
        let added = unsafe { vm.set_user_memory_region(region) };
        added.map_err(kvm("KVM_SET_USER_MEMORY_REGION"))?;
    }
    vm.set_tss_address(layout::TSS as usize)
        .map_err(kvm("KVM_SET_TSS_ADDR"))?;
    vm.set_identity_map_address(layout::IDENTITY_MAP)
        .map_err(kvm("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.create_irq_chip().map_err(kvm("KVM_CREATE_IRQCHIP"))?;
    vm.create_pit2(kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    })
    .map_err(kvm("KVM_CREATE_PIT2"))?;
    vm.enable_cap(&kvm_enable_cap {
        cap: KVM_CAP_X86_USER_SPACE_MSR,
        args: [KVM_MSR_EXIT_REASON_FILTER.into(), 0, 0, 0],
        ..Default::default()
    })
    .map_err(kvm("KVM_CAP_X86_USER_SPACE_MSR"))?;
    vm.set_msr_filter(
        MsrFilterDefaultAction::ALLOW,
        &[MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base: *vcpu::FILTERED_MSRS.start(),
            msr_count: vcpu::FILTERED_MSRS.count() as u32,
            bitmap: &[0],
        }],
    )
    .map_err(kvm("KVM_X86_SET_MSR_FILTER"))?;
    Ok(vm)
}

/// What the virtual processors share.
struct Guest {
    machine: Arc<Machine>,
    hypercalls: Arc<dyn Hypercalls>,
    hypercall_msrs: Mutex<vcpu::HypercallMsrs>,
    exit: Mutex<Option<ExitReason>>,
    ended: Condvar,
    crash: Mutex<Option<[u64; vcpu::CRASH_PARAMETERS]>>,
}

impl Guest {
    /// The guest has crashed. It runs on: it may have a dump to write, and restarts or switches itself off.
    fn crashed(&self, parameters: [u64; vcpu::CRASH_PARAMETERS]) {
        let mut crash = self.crash.lock().unwrap_or_else(|error| error.into_inner());
        crash.get_or_insert(parameters);
    }

    /// Ends the machine. The first reason counts.
    fn end(&self, reason: ExitReason) {
        let crash = *self.crash.lock().unwrap_or_else(|error| error.into_inner());
        let reason = match (reason, crash) {
            (ExitReason::Error(error), _) => ExitReason::Error(error),
            (_, Some(parameters)) => ExitReason::Crash(parameters),
            (reason, None) => reason,
        };
        // A panic while it was held cannot have left it half set.
        let mut exit = self.exit.lock().unwrap_or_else(|error| error.into_inner());
        exit.get_or_insert(reason);
        drop(exit);
        self.machine.stop.set();
        self.ended.notify_all();
    }
}

/// A processor's thread that dies takes the machine with it.
struct EndOnPanic<'a>(&'a Guest);

impl Drop for EndOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0
                .end(ExitReason::Error("a virtual processor panicked".into()));
        }
    }
}

/// A running machine. Dropping it stops it.
pub struct VmHandle {
    guest: Arc<Guest>,
    vcpus: Vec<JoinHandle<()>>,
    vm: Option<Vm>,
}

impl VmHandle {
    /// The platform for devices.
    pub fn machine(&self) -> &Arc<Machine> {
        &self.guest.machine
    }

    /// Lets another thread stop the machine.
    pub fn stopper(&self) -> Stopper {
        Stopper(self.guest.clone())
    }

    /// Waits for the end, at most for `timeout`. `None`: it runs on.
    pub fn wait_timeout(&self, timeout: Duration) -> Option<ExitReason> {
        let exit = self.guest.exit.lock().unwrap();
        let (exit, _) = self
            .guest
            .ended
            .wait_timeout_while(exit, timeout, |exit| exit.is_none())
            .unwrap();
        exit.clone()
    }

    /// Waits for the end and releases what belongs to the machine.
    pub fn wait(self) -> ExitReason {
        loop {
            if let Some(reason) = self.wait_timeout(Duration::from_secs(3600)) {
                return reason;
            }
        }
    }
}

impl Drop for VmHandle {
    fn drop(&mut self) {
        self.guest.end(ExitReason::Stopped);
        for vcpu in self.vcpus.drain(..) {
            // A signal that comes just before KVM_RUN is lost, so repeat it.
            while !vcpu.is_finished() {
                let _ = vcpu.kill(SIGRTMIN());
                thread::sleep(KICK_INTERVAL);
            }
            let _ = vcpu.join();
        }
        // Input and output end, and what is left is written out.
        self.vm.take();
    }
}

/// Stops a machine.
#[derive(Clone)]
pub struct Stopper(Arc<Guest>);

impl Stopper {
    /// Stops it.
    pub fn stop(&self) {
        self.0.end(ExitReason::Stopped);
    }
}
