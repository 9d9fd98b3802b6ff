// SPDX-License-Identifier: GPL-2.0

//! Network driver for Hyper-V and Azure virtual machines.

#![forbid(unsafe_code)]

use kernel::prelude::*;

module! {
    type: HvNetvsc,
    name: "hv_netvsc",
    authors: ["hv_netvsc authors"],
    description: "Microsoft Hyper-V network driver",
    license: "GPL",
}

struct HvNetvsc;

impl kernel::Module for HvNetvsc {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        Err(ENODEV)
    }
}
