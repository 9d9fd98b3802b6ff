// SPDX-License-Identifier: GPL-2.0

//! PCI host bridge driver for Hyper-V and Azure virtual machines.
//!
//! The host passes PCI functions through to the guest, network VFs above all, each on a virtual
//! root bus of its own that is a VMBus device. The functions' configuration space is seen through
//! a window in MMIO space, everything else goes by messages over the VMBus channel.
//!
//! - `driver`: what happens when a bus comes and goes.
//! - `bus`: the state of a bus, and what the host says about it.
//! - `protocol`: the conversation with the host, request by request.
//! - `requests`: which requests are under way.
//! - `relations`: functions come and go on a bus.
//! - `config`: configuration space.
//! - `bars`: how much MMIO space the functions need, and where they get it.
//! - `msi`: interrupts.
//! - `blocks`: configuration blocks.

#![forbid(unsafe_code)]

use kernel::{
    driver::Registration,
    prelude::*, //
};
use pci_host::BlockInterface;

#[path = "pci_hyperv/bars.rs"]
mod bars;
#[path = "pci_hyperv/blocks.rs"]
mod blocks;
#[path = "pci_hyperv/bus.rs"]
mod bus;
#[path = "pci_hyperv/config.rs"]
mod config;
#[path = "pci_hyperv/driver.rs"]
mod driver;
#[path = "pci_hyperv/msi.rs"]
mod msi;
#[path = "pci_hyperv/protocol.rs"]
mod protocol;
#[path = "pci_hyperv/relations.rs"]
mod relations;
#[path = "pci_hyperv/requests.rs"]
mod requests;

module! {
    type: PciHyperv,
    name: "hv_pci",
    authors: ["hv_pci authors"],
    description: "Hyper-V PCI",
    license: "GPL v2",
}

/// Name of the driver. User space matches it: udev rules, cloud-init, netplan.
const DRIVER_NAME: &CStr = c"hv_pci";

/// The fields are dropped from first to last.
struct PciHyperv {
    _registration: Pin<KBox<Registration<vmbus::Adapter<driver::HvPci>>>>,
    _blocks: BlockInterface<bus::Bus>,
}

impl kernel::Module for PciHyperv {
    fn init(module: &'static ThisModule) -> Result<Self> {
        // In the root partition interrupts are mapped by other hypercalls.
        if !vmbus::exists() || pci_host::hypercall::is_root_partition() {
            return Err(ENODEV);
        }
        // Functions may ask for blocks as soon as there is a bus.
        let blocks = BlockInterface::register().inspect_err(|_| in_place())?;
        let registration = KBox::pin_init(Registration::new(DRIVER_NAME, module), GFP_KERNEL)
            .inspect_err(|e| {
                if *e == EBUSY {
                    in_place();
                }
            })?;
        Ok(Self {
            _registration: registration,
            _blocks: blocks,
        })
    }
}

fn in_place() {
    pr_err!(
        "the kernel's own driver, pci_hyperv, is in place; to use this one, boot with \
         initcall_blacklist=init_hv_pci_drv on the kernel's command line\n"
    );
}
