// SPDX-License-Identifier: GPL-2.0

//! PCI host bridge driver for Hyper-V and Azure virtual machines.

#![forbid(unsafe_code)]

use kernel::prelude::*;

module! {
    type: PciHyperv,
    name: "hv_pci",
    authors: ["pci-hyperv authors"],
    description: "Hyper-V PCI",
    license: "GPL",
}

struct PciHyperv;

impl kernel::Module for PciHyperv {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        Err(ENODEV)
    }
}
