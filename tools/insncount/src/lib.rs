// SPDX-License-Identifier: GPL-2.0
//! A plugin for QEMU that counts the instructions of a nested guest between two marks.
//!
//! The machine that QEMU emulates (level 1) runs the guest under test (level 2) with SVM. A processor is in level 2
//! from its `VMRUN` to the instruction that follows this `VMRUN` in memory, where every exit of the guest leads. QEMU
//! does not share blocks of translated code between the two levels, so it is enough to ask once, when a block is
//! translated, which level it belongs to. Level 1's blocks stay as they are, and each one of level 2 adds its number
//! of instructions to a counter of its own.
//!
//! What is counted that way is exact but for blocks that a fault or an exit leaves early, which count whole.
//!
//! At the mark that ends the count ([`marks`]), one line of JSON is written to the Unix socket named by the argument
//! `out`: instructions in all, those in user mode, entries into the guest, and each kernel block that was executed
//! with its address and the instructions executed there.
#![allow(unsafe_code)]

mod marks;
mod qemu;

use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_uint, c_void, CStr};
use std::fmt::Write as _;
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::sync::{mpsc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

use qemu::{Block, Entry, Id, Insn, Scoreboard};

/// `VMRUN`.
const VMRUN: [u8; 3] = [0x0f, 0x01, 0xd8];
/// User addresses are below.
const KERNEL: u64 = 1 << 47;

/// Numbers of each processor. The first ones have a meaning of their own.
const SLOTS: usize = 1 << 18;
/// Whether the processor is in level 2.
const IN_GUEST: usize = 0;
/// How often it has entered level 2.
const ENTRIES: usize = 1;
/// Instructions executed in user mode.
const USER: usize = 2;
/// Instructions of blocks for which no slot was left.
const OTHER: usize = 3;
/// The first slot of a kernel block.
const BLOCKS: usize = 4;

/// What is known of the code so far.
#[derive(Default)]
struct Code {
    /// Slots of kernel blocks by their address.
    slots: HashMap<u64, usize>,
    /// Where exits of the guest lead.
    exits: Vec<u64>,
}

struct Counter {
    score: *mut Scoreboard,
    code: Mutex<Code>,
    /// All slots at the mark that began the count.
    start: Mutex<Vec<u64>>,
    reports: Mutex<mpsc::Sender<String>>,
}

// SAFETY: the scoreboard is made once and never freed, and QEMU's functions may use it on any thread.
unsafe impl Send for Counter {}
// SAFETY: as above; everything else is behind locks.
unsafe impl Sync for Counter {}

static COUNTER: OnceLock<Counter> = OnceLock::new();
/// The path of the socket.
static OUT: OnceLock<String> = OnceLock::new();

thread_local! {
    /// The processor that this thread emulates.
    static CPU: Cell<c_uint> = const { Cell::new(0) };
}

/// Tells QEMU which version of the interface this is.
#[no_mangle]
#[allow(non_upper_case_globals)]
pub static qemu_plugin_version: c_int = qemu::VERSION;

/// Called by QEMU after loading.
///
/// # Safety
///
/// QEMU gives `argc` C strings in `argv`.
#[no_mangle]
pub unsafe extern "C" fn qemu_plugin_install(
    id: Id,
    _info: *const c_void,
    argc: c_int,
    argv: *const *const c_char,
) -> c_int {
    for index in 0..argc as usize {
        // SAFETY: there are `argc` of them, as the caller promises.
        let arg = unsafe { CStr::from_ptr(*argv.add(index)) }.to_string_lossy();
        if let Some(path) = arg.strip_prefix("out=") {
            // There is one plugin and one installation.
            let _ = OUT.set(path.to_owned());
        }
    }
    if OUT.get().is_none() {
        eprintln!("insncount: the argument out=SOCKET is missing");
        return 1;
    }
    // SAFETY: this is the time to register callbacks, and `id` is ours.
    unsafe {
        qemu::qemu_plugin_register_vcpu_init_cb(id, on_cpu);
        qemu::qemu_plugin_register_vcpu_tb_trans_cb(id, on_block);
    }
    0
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A processor starts, on the thread that will emulate it.
extern "C" fn on_cpu(_id: Id, cpu: c_uint) {
    CPU.set(cpu);
    COUNTER.get_or_init(Counter::new);
}

impl Counter {
    fn new() -> Self {
        // A thread of its own writes, for the reader may be in the very machine that is being emulated.
        let (sender, reports) = mpsc::channel::<String>();
        let path = OUT.get().cloned().unwrap_or_default();
        // Now, and not for the first report, since the name may be gone then.
        match UnixStream::connect(&path) {
            Ok(mut stream) => {
                thread::spawn(move || {
                    for report in reports {
                        if stream.write_all(report.as_bytes()).is_err() {
                            break;
                        }
                    }
                });
            }
            Err(error) => eprintln!("insncount: {path}: {error}"),
        }
        Self {
            // SAFETY: no conditions.
            score: unsafe { qemu::qemu_plugin_scoreboard_new(SLOTS * size_of::<u64>()) },
            code: Mutex::default(),
            start: Mutex::default(),
            reports: Mutex::new(sender),
        }
    }

    fn entry(&self, slot: usize) -> Entry {
        Entry {
            score: self.score,
            offset: slot * size_of::<u64>(),
        }
    }

    /// A slot of one processor.
    fn get(&self, cpu: c_uint, slot: usize) -> u64 {
        // SAFETY: QEMU has an element for each processor, of `SLOTS` numbers, and `slot` is less.
        unsafe {
            qemu::qemu_plugin_scoreboard_find(self.score, cpu)
                .cast::<u64>()
                .add(slot)
                .read_volatile()
        }
    }

    /// All slots in use, over all processors.
    fn snapshot(&self, slots: usize) -> Vec<u64> {
        // SAFETY: no conditions.
        let cpus = unsafe { qemu::qemu_plugin_num_vcpus() } as c_uint;
        (0..slots)
            .map(|slot| (0..cpus).map(|cpu| self.get(cpu, slot)).sum())
            .collect()
    }

    /// The slot of a block of level 2.
    fn slot(&self, address: u64) -> usize {
        if address < KERNEL {
            return USER;
        }
        let mut code = lock(&self.code);
        let next = BLOCKS + code.slots.len();
        match code.slots.get(&address) {
            Some(&slot) => slot,
            None if next == SLOTS => OTHER,
            None => {
                code.slots.insert(address, next);
                next
            }
        }
    }

    fn start(&self) {
        let slots = BLOCKS + lock(&self.code).slots.len();
        *lock(&self.start) = self.snapshot(slots);
    }

    fn stop(&self) {
        let code = lock(&self.code);
        let mut counts = self.snapshot(BLOCKS + code.slots.len());
        // Slots that are new since then began at zero.
        for (count, before) in counts.iter_mut().zip(lock(&self.start).iter()) {
            *count -= before;
        }
        let mut text = format!(
            "{{\"total\":{},\"user\":{},\"entries\":{},\"blocks\":[",
            counts[USER..].iter().sum::<u64>(),
            counts[USER],
            counts[ENTRIES],
        );
        let mut comma = "";
        for (address, &slot) in &code.slots {
            if counts[slot] != 0 {
                // A string takes anything.
                let _ = write!(text, "{comma}[{address},{}]", counts[slot]);
                comma = ",";
            }
        }
        text.push_str("]}\n");
        // Without a reader there is nobody to miss it.
        let _ = lock(&self.reports).send(text);
    }
}

/// The beginning of an instruction.
fn bytes<const N: usize>(insn: *mut Insn) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    // SAFETY: `insn` is an instruction of the block that is being translated, and there is room for `N` bytes.
    let len = unsafe { qemu::qemu_plugin_insn_data(insn, bytes.as_mut_ptr().cast(), N) };
    (len == N).then_some(bytes)
}

/// A block is translated, on the thread of the processor that is about to execute it.
extern "C" fn on_block(_id: Id, block: *mut Block) {
    let Some(counter) = COUNTER.get() else {
        return;
    };
    // SAFETY: `block` is valid during this call.
    let (address, count) = unsafe {
        (
            qemu::qemu_plugin_tb_vaddr(block),
            qemu::qemu_plugin_tb_n_insns(block),
        )
    };
    // SAFETY: as above, and the block has that many.
    let insns = (0..count).map(|index| unsafe { qemu::qemu_plugin_tb_get_insn(block, index) });
    if lock(&counter.code).exits.contains(&address) {
        // SAFETY: as above.
        unsafe {
            qemu::qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(
                block,
                qemu::STORE,
                counter.entry(IN_GUEST),
                0,
            );
        }
    } else if counter.get(CPU.get(), IN_GUEST) == 0 {
        for insn in insns.filter(|&insn| bytes(insn) == Some(VMRUN)) {
            // SAFETY: `insn` is an instruction of this block.
            unsafe {
                let next = qemu::qemu_plugin_insn_vaddr(insn) + VMRUN.len() as u64;
                lock(&counter.code).exits.push(next);
                for (op, slot) in [(qemu::STORE, IN_GUEST), (qemu::ADD, ENTRIES)] {
                    qemu::qemu_plugin_register_vcpu_insn_exec_inline_per_vcpu(
                        insn,
                        op,
                        counter.entry(slot),
                        1,
                    );
                }
            }
        }
    } else {
        // SAFETY: as above.
        unsafe {
            qemu::qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(
                block,
                qemu::ADD,
                counter.entry(counter.slot(address)),
                count as u64,
            );
        }
        if address < KERNEL {
            for insn in insns {
                let Some([a, b, c, mark @ ..]) = bytes::<7>(insn) else {
                    continue;
                };
                let mark = u32::from_le_bytes(mark);
                if [a, b, c] == marks::OPCODE && [marks::START, marks::STOP].contains(&mark) {
                    // SAFETY: as above; the pointer is a number for the callback.
                    unsafe {
                        qemu::qemu_plugin_register_vcpu_insn_exec_cb(
                            insn,
                            on_mark,
                            qemu::NO_REGS,
                            mark as usize as *mut c_void,
                        );
                    }
                }
            }
        }
    }
}

/// A mark is executed.
extern "C" fn on_mark(_cpu: c_uint, mark: *mut c_void) {
    let Some(counter) = COUNTER.get() else {
        return;
    };
    if mark as usize == marks::START as usize {
        counter.start();
    } else {
        counter.stop();
    }
}
