// SPDX-License-Identifier: GPL-2.0

//! Counters of which each CPU has its own.
//!
//! C header: [`include/linux/percpu.h`](srctree/include/linux/percpu.h)

use core::ptr::NonNull;

use hyperv_bindings as bindings;
use kernel::prelude::*;

/// `N` counters of 64 bits for each CPU.
///
/// # Invariants
///
/// `counters` is a per-CPU allocation of `N` counters.
pub struct PerCpuCounters<const N: usize> {
    counters: NonNull<u64>,
}

// SAFETY: Each CPU changes only its own counters, by one instruction; all may be read by anybody.
unsafe impl<const N: usize> Send for PerCpuCounters<N> {}

// SAFETY: See above.
unsafe impl<const N: usize> Sync for PerCpuCounters<N> {}

impl<const N: usize> PerCpuCounters<N> {
    /// Allocates the counters, all zero.
    pub fn new() -> Result<Self> {
        // SAFETY: No requirements.
        let counters = unsafe { bindings::alloc_percpu_u64(N) };
        // INVARIANT: The allocation was just made.
        Ok(Self {
            counters: NonNull::new(counters).ok_or(ENOMEM)?,
        })
    }

    /// Adds to the counter `INDEX` of this CPU.
    #[inline]
    pub fn add<const INDEX: usize>(&self, value: u64) {
        const { assert!(INDEX < N) };
        // SAFETY: By the type invariants the counter exists. The instruction cannot be torn apart
        // by moving to another CPU.
        unsafe { bindings::this_cpu_add_u64(self.counters.as_ptr().add(INDEX), value) };
    }

    /// # Safety
    ///
    /// `cpu` must be a possible one.
    unsafe fn read(&self, cpu: u32) -> [u64; N] {
        // SAFETY: By the type invariants there are `N` counters for each possible CPU.
        core::array::from_fn(|i| unsafe {
            bindings::per_cpu_read_u64(self.counters.as_ptr().add(i), cpu)
        })
    }

    /// The counters of one CPU. `cpu` must be one of [`possible_cpus`], or all are zero.
    pub fn of_cpu(&self, cpu: u32) -> [u64; N] {
        if !possible_cpus().any(|possible| possible == cpu) {
            return [0; N];
        }
        // SAFETY: The CPU is a possible one.
        unsafe { self.read(cpu) }
    }

    /// The sums over all CPUs.
    pub fn sum(&self) -> [u64; N] {
        let mut sum = [0u64; N];
        for cpu in possible_cpus() {
            // SAFETY: The CPU is a possible one.
            let one = unsafe { self.read(cpu) };
            for (to, value) in sum.iter_mut().zip(one) {
                *to = to.wrapping_add(value);
            }
        }
        sum
    }
}

impl<const N: usize> Drop for PerCpuCounters<N> {
    fn drop(&mut self) {
        // SAFETY: By the type invariants this is a per-CPU allocation, and it is ours.
        unsafe { bindings::free_percpu(self.counters.as_ptr().cast()) };
    }
}

/// Iterates over a mask of CPUs by the function that gives the next one.
fn cpus(next: unsafe extern "C" fn(c_int) -> c_uint) -> impl Iterator<Item = u32> {
    let count = kernel::cpu::nr_cpu_ids();
    let mut last = -1;
    core::iter::from_fn(move || {
        // SAFETY: The functions read a mask of the kernel, from the CPU after `last` on.
        let cpu = unsafe { next(last) };
        if cpu >= count {
            return None;
        }
        last = cpu as c_int;
        Some(cpu)
    })
}

/// The CPUs that are plugged in.
pub fn present_cpus() -> impl Iterator<Item = u32> {
    cpus(bindings::next_present_cpu)
}

/// The CPUs that can ever be.
pub fn possible_cpus() -> impl Iterator<Item = u32> {
    cpus(bindings::next_possible_cpu)
}

/// Number of CPUs that run.
pub fn online_cpus() -> u32 {
    // SAFETY: No requirements.
    unsafe { bindings::num_online_cpus_now() }
}
