// SPDX-License-Identifier: GPL-2.0
//! CPUID: what KVM supports, with Hyper-V's leaves instead of KVM's own.

use kvm_bindings::{kvm_cpuid_entry2, CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX};

use crate::layout;

/// First leaf of the hypervisor range.
const HYPERVISOR_BASE: u32 = 0x4000_0000;
/// One past the last leaf of the hypervisor range.
const HYPERVISOR_END: u32 = 0x4001_0000;
/// Most virtual processors a guest of ours may be told of.
const MAX_VPS: u32 = 64;

// Leaf 0x40000003, EAX: partition privileges.
const VP_RUNTIME: u32 = 1 << 0;
const TIME_REF_COUNT: u32 = 1 << 1;
const SYNIC: u32 = 1 << 2;
const SYNTHETIC_TIMERS: u32 = 1 << 3;
const APIC_ACCESS: u32 = 1 << 4;
const HYPERCALL_MSRS: u32 = 1 << 5;
const VP_INDEX: u32 = 1 << 6;
const RESET_MSR: u32 = 1 << 7;
const REFERENCE_TSC: u32 = 1 << 9;
const FREQUENCY_MSRS_ACCESS: u32 = 1 << 11;
const TSC_INVARIANT: u32 = 1 << 15;
// EBX.
const POST_MESSAGES: u32 = 1 << 4;
const SIGNAL_EVENTS: u32 = 1 << 5;
const ISOLATION: u32 = 1 << 22;
// EDX.
const FREQUENCY_MSRS: u32 = 1 << 8;
const CRASH_MSRS: u32 = 1 << 10;
const DIRECT_STIMERS: u32 = 1 << 19;
// Leaf 0x40000004, EAX: recommendations.
const RELAXED_TIMING: u32 = 1 << 5;
const MMIO_HYPERCALLS: u32 = 1 << 21;

// Leaf 0x4000000c, EBX: isolation by virtualisation-based security, without a paravisor; shared memory is
// accessed at addresses with a bit of their own.
const ISOLATION_VBS: u32 = 1;
const SHARED_BOUNDARY_ACTIVE: u32 = 1 << 5;
const SHARED_BOUNDARY_BITS: u32 = 6;

const LEAF_FEATURES: u32 = 1;
const FEATURES_ECX_X2APIC: u32 = 1 << 21;
const FEATURES_ECX_RDRAND: u32 = 1 << 30;
const FEATURES_ECX_TSC_DEADLINE: u32 = 1 << 24;
const FEATURES_ECX_HYPERVISOR: u32 = 1 << 31;
const FEATURES_EDX_HTT: u32 = 1 << 28;
const LEAF_SIZES: u32 = 0x8000_0008;
const LEAF_POWER: u32 = 0x8000_0007;
const POWER_EDX_INVARIANT_TSC: u32 = 1 << 8;

/// What the leaves depend on.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    /// Virtual processors.
    pub cpus: u32,
    /// APIC ids of a package.
    pub package: u32,
    /// KVM has the TSC deadline timer.
    pub tsc_deadline: bool,
    /// The guest's memory is isolated from the host.
    pub isolated: bool,
    /// The guest is to access MMIO by hypercalls where it can.
    pub mmio_hypercalls: bool,
}

fn words(text: &[u8; 12]) -> [u32; 3] {
    [0, 4, 8].map(|at| u32::from_le_bytes([text[at], text[at + 1], text[at + 2], text[at + 3]]))
}

fn entry(function: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

/// Hyper-V's leaves. `invariant_tsc`: the processor's time stamp counter never stops.
fn hyperv(invariant_tsc: bool, config: Config) -> Vec<kvm_cpuid_entry2> {
    let isolated = config.isolated;
    let [ebx, ecx, edx] = words(b"Microsoft Hv");
    let mut privileges = VP_RUNTIME
        | TIME_REF_COUNT
        | SYNIC
        | SYNTHETIC_TIMERS
        | APIC_ACCESS
        | HYPERCALL_MSRS
        | VP_INDEX
        | RESET_MSR
        | REFERENCE_TSC
        | FREQUENCY_MSRS_ACCESS;
    if invariant_tsc {
        privileges |= TSC_INVARIANT;
    }
    let mut rights = POST_MESSAGES | SIGNAL_EVENTS;
    if isolated {
        rights |= ISOLATION;
    }
    let mut recommendations = RELAXED_TIMING;
    if config.mmio_hypercalls {
        recommendations |= MMIO_HYPERCALLS;
    }
    let last = HYPERVISOR_BASE + if isolated { 0xc } else { 6 };
    let mut entries = vec![
        entry(HYPERVISOR_BASE, [last, ebx, ecx, edx]),
        entry(HYPERVISOR_BASE + 1, [u32::from_le_bytes(*b"Hv#1"), 0, 0, 0]),
        // Build 20348 of version 10.0.
        entry(HYPERVISOR_BASE + 2, [20348, 10 << 16, 0, 0]),
        entry(
            HYPERVISOR_BASE + 3,
            [
                privileges,
                rights,
                0,
                FREQUENCY_MSRS | CRASH_MSRS | DIRECT_STIMERS,
            ],
        ),
        // No recommendation to deprecate auto-EOI: it saves the guest an exit an interrupt. The spin-wait
        // field says never to notify.
        entry(HYPERVISOR_BASE + 4, [recommendations, u32::MAX, 0, 0]),
        entry(HYPERVISOR_BASE + 5, [MAX_VPS, MAX_VPS, 0, 0]),
        entry(HYPERVISOR_BASE + 6, [0, 0, 0, 0]),
    ];
    if isolated {
        entries.extend((7..0xc).map(|leaf| entry(HYPERVISOR_BASE + leaf, [0; 4])));
        let config =
            ISOLATION_VBS | SHARED_BOUNDARY_ACTIVE | (layout::SHARED_BIT << SHARED_BOUNDARY_BITS);
        entries.push(entry(HYPERVISOR_BASE + 0xc, [0, config, 0, 0]));
    }
    entries
}

/// Adapts what KVM supports to the processor with APIC id `id`.
fn adapt(entries: &mut Vec<kvm_cpuid_entry2>, config: Config, id: u32) {
    // APIC id bits that count processors within the package.
    let shift = config.package.trailing_zeros();
    let in_package = config.cpus.min(config.package);
    entries.retain(|entry| {
        !(HYPERVISOR_BASE..HYPERVISOR_END).contains(&entry.function)
            // Topology is built below.
            && !matches!(entry.function, 0xb | 0x1f)
    });
    for entry in entries.iter_mut() {
        match entry.function {
            LEAF_FEATURES => {
                entry.ecx |= FEATURES_ECX_HYPERVISOR | FEATURES_ECX_X2APIC;
                if config.tsc_deadline {
                    entry.ecx |= FEATURES_ECX_TSC_DEADLINE;
                }
                entry.ebx = entry.ebx & 0xffff | (id << 24) | ((1 << shift) << 16);
                if config.cpus > 1 {
                    entry.edx |= FEATURES_EDX_HTT;
                } else {
                    entry.edx &= !FEATURES_EDX_HTT;
                }
            }
            // Intel's caches: cores in the package; caches below the last level are a core's own.
            4 if entry.eax & 0x1f != 0 => {
                let level = (entry.eax >> 5) & 7;
                let sharing = if level < 3 { 0 } else { (1 << shift) - 1 };
                entry.eax = entry.eax & 0x3fff | (sharing << 14) | (((1 << shift) - 1) << 26);
            }
            // AMD's count of cores and width of the core id.
            LEAF_SIZES => entry.ecx = (in_package - 1) | (shift << 12),
            // AMD's caches, the same way as Intel's.
            0x8000_001d if entry.eax & 0x1f != 0 => {
                let level = (entry.eax >> 5) & 7;
                let sharing = if level < 3 { 0 } else { (1 << shift) - 1 };
                entry.eax = entry.eax & 0x3fff | (sharing << 14);
            }
            0x8000_001e => {
                entry.eax = id;
                // One thread a core, one node a package.
                entry.ebx = id;
                entry.ecx = id >> shift;
            }
            _ => {}
        }
    }
    let max_leaf = entries
        .iter()
        .find(|entry| entry.function == 0)
        .map_or(0, |entry| entry.eax);
    if max_leaf >= 0xb {
        // Threads, then cores, then the end.
        let levels = [
            [0, 1, 0x100, id],
            [shift, in_package, 0x201, id],
            [0, 0, 2, id],
        ];
        for (index, registers) in levels.into_iter().enumerate() {
            entries.push(kvm_cpuid_entry2 {
                index: index as u32,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                ..entry(0xb, registers)
            });
        }
    }
    let invariant_tsc = entries
        .iter()
        .any(|entry| entry.function == LEAF_POWER && entry.edx & POWER_EDX_INVARIANT_TSC != 0);
    entries.extend(hyperv(invariant_tsc, config));
}

/// Why a guest cannot be isolated with what KVM supports.
pub fn isolation_obstacle(supported: &[kvm_cpuid_entry2]) -> Option<String> {
    let leaf = |function| supported.iter().find(|entry| entry.function == function);
    let width = leaf(LEAF_SIZES).map_or(0, |entry| entry.eax & 0xff);
    if leaf(LEAF_FEATURES).is_none_or(|entry| entry.ecx & FEATURES_ECX_RDRAND == 0) {
        // Linux panics without it: the host must not be the only source of its random numbers.
        return Some("an isolated guest needs a processor with RDRAND".into());
    }
    (width <= layout::SHARED_BIT).then(|| {
        format!(
            "an isolated guest needs physical addresses of {} bits, the processor has {width}",
            layout::SHARED_BIT + 1
        )
    })
}

/// CPUID of the virtual processor `id`, made of what KVM supports.
pub fn build(
    supported: &CpuId,
    config: Config,
    id: u32,
) -> Result<CpuId, vmm_sys_util::fam::Error> {
    let mut entries = supported.as_slice().to_vec();
    adapt(&mut entries, config, id);
    CpuId::from_entries(&entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Vec<kvm_cpuid_entry2> {
        vec![
            entry(0, [0xd, 0, 0, 0]),
            entry(1, [0x663, 0x1234_0800, 0, FEATURES_EDX_HTT]),
            entry(0xb, [9, 9, 9, 9]),
            entry(0x4000_0000, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
            entry(0x4000_0001, [0xffff, 0, 0, 0]),
            entry(LEAF_POWER, [0, 0, 0, 0]),
            entry(0x8000_0008, [0x3028, 0, 0, 0]),
        ]
    }

    fn leaf(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> [u32; 4] {
        let mut found = entries
            .iter()
            .filter(|entry| entry.function == function && entry.index == index);
        let entry = found.next().unwrap();
        assert!(found.next().is_none(), "leaf {function:#x} twice");
        [entry.eax, entry.ebx, entry.ecx, entry.edx]
    }

    fn adapted(cpus: u32, id: u32) -> Vec<kvm_cpuid_entry2> {
        let config = Config {
            cpus,
            package: crate::node_size(cpus, 1),
            tsc_deadline: true,
            isolated: false,
            mmio_hypercalls: false,
        };
        let mut entries = host();
        adapt(&mut entries, config, id);
        entries
    }

    #[test]
    fn hypervisor_is_hyperv_and_nothing_else() {
        let entries = adapted(1, 0);
        let [eax, ebx, ecx, edx] = leaf(&entries, 0x4000_0000, 0);
        assert_eq!(eax, 0x4000_0006);
        let vendor: Vec<u8> = [ebx, ecx, edx]
            .iter()
            .flat_map(|r| r.to_le_bytes())
            .collect();
        assert_eq!(vendor, b"Microsoft Hv");
        assert_eq!(leaf(&entries, 0x4000_0001, 0)[0].to_le_bytes(), *b"Hv#1");
        assert!(leaf(&entries, 1, 0)[2] & FEATURES_ECX_HYPERVISOR != 0);
        let [eax, ebx, ..] = leaf(&entries, 0x4000_0003, 0);
        assert_eq!(
            eax & (HYPERCALL_MSRS | VP_INDEX | SYNIC),
            HYPERCALL_MSRS | VP_INDEX | SYNIC
        );
        assert_eq!(ebx, 0x30);
    }

    #[test]
    fn invariant_tsc_only_if_the_host_has_it() {
        assert_eq!(leaf(&adapted(1, 0), 0x4000_0003, 0)[0] & TSC_INVARIANT, 0);
        let mut entries = host();
        entries[5].edx = POWER_EDX_INVARIANT_TSC;
        let config = Config {
            cpus: 1,
            package: 1,
            tsc_deadline: false,
            isolated: false,
            mmio_hypercalls: false,
        };
        adapt(&mut entries, config, 0);
        assert!(leaf(&entries, 0x4000_0003, 0)[0] & TSC_INVARIANT != 0);
        assert_eq!(leaf(&entries, 1, 0)[2] & FEATURES_ECX_TSC_DEADLINE, 0);
    }

    #[test]
    fn isolation_is_announced() {
        let config = Config {
            cpus: 1,
            package: 1,
            tsc_deadline: true,
            isolated: true,
            mmio_hypercalls: false,
        };
        let mut entries = host();
        adapt(&mut entries, config, 0);
        assert_eq!(leaf(&entries, 0x4000_0000, 0)[0], 0x4000_000c);
        assert_eq!(leaf(&entries, 0x4000_0003, 0)[1], 0x40_0030);
        let [paravisor, kind, ..] = leaf(&entries, 0x4000_000c, 0);
        assert_eq!((paravisor, kind), (0, 1 | (1 << 5) | (39 << 6)));
    }

    #[test]
    fn isolation_needs_rdrand_and_the_shared_bit() {
        let mut entries = host();
        assert!(isolation_obstacle(&entries).unwrap().contains("RDRAND"));
        entries[1].ecx |= FEATURES_ECX_RDRAND;
        assert_eq!(isolation_obstacle(&entries), None);
        entries[6].eax = 0x3027;
        assert!(isolation_obstacle(&entries).unwrap().contains("40 bits"));
    }

    #[test]
    fn topology() {
        for (cpus, id, shift) in [(1, 0, 0), (2, 1, 1), (3, 2, 2), (8, 7, 3)] {
            let entries = adapted(cpus, id);
            let [_, ebx, _, edx] = leaf(&entries, 1, 0);
            assert_eq!((ebx >> 24, (ebx >> 16) & 0xff), (id, 1 << shift));
            assert_eq!(ebx & 0xffff, 0x0800);
            assert_eq!(edx & FEATURES_EDX_HTT != 0, cpus > 1);
            assert_eq!(leaf(&entries, 0xb, 1), [shift, cpus, 0x201, id]);
            assert_eq!(
                leaf(&entries, 0x8000_0008, 0)[2],
                (cpus - 1) | (shift << 12)
            );
        }
    }
}
