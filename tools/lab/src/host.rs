// SPDX-License-Identifier: GPL-2.0
//! What is behind the guest's VMBus.

use std::sync::Arc;

use vmm::{Hypercalls, Machine};

use crate::run::Args;

/// The VMBus with its devices.
pub struct Host {
    hypercalls: Arc<Router>,
}

/// Takes the guest's hypercalls to who serves them.
struct Router {}

/// Hypercall status: no such connection.
const STATUS_INVALID_CONNECTION: u16 = 18;
const STATUS_INVALID_PARAMETER: u16 = 5;

impl Hypercalls for Router {
    fn post_message(&self, _connection: u32, _message_type: u32, _payload: &[u8]) -> u16 {
        STATUS_INVALID_CONNECTION
    }
    fn signal_event(&self, _connection: u32, _flag: u16) -> u16 {
        STATUS_INVALID_CONNECTION
    }
    fn retarget_device_interrupt(&self, _input: &[u8]) -> u16 {
        STATUS_INVALID_PARAMETER
    }
}

impl Host {
    /// A host as the command line describes it.
    pub fn new(_args: &Args, _machine: Arc<Machine>) -> Result<Self, String> {
        Ok(Self {
            hypercalls: Arc::new(Router {}),
        })
    }

    /// Who serves the guest's hypercalls.
    pub fn hypercalls(&self) -> Arc<dyn Hypercalls> {
        self.hypercalls.clone()
    }
}
