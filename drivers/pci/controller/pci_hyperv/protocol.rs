// SPDX-License-Identifier: GPL-2.0

//! The conversation with the host: what the guest asks and reports, in the order of a bus's life.

use hyperv_wire::vpci::{
    ChildMessage,
    D0Entry,
    EjectionComplete,
    Message,
    MessageType,
    ProtocolVersion,
    ResourceRequirementsReply,
    ResourcesAssigned,
    ResourcesAssigned2,
    SlotNumber,
    Status,
    VersionRequest,
    BARS, //
};
use kernel::{
    prelude::*,
    time::Delta, //
};
use zerocopy::IntoBytes;

use crate::bus::{
    Bus,
    Child, //
};

/// How long the host has for an answer, when the guest can wait.
pub(crate) const HOST_TIMEOUT: Delta = Delta::from_secs(30);

/// How long the host has to see the bus off.
const EXIT_TIMEOUT: Delta = Delta::from_secs(10);

/// The host does not keep to the protocol, or refuses what it may not.
pub(crate) fn eproto() -> Error {
    // The `kernel` crate has no name for it.
    const EPROTO: c_int = 71;
    Error::from_errno(-EPROTO)
}

impl Bus {
    /// Agrees with the host on the newest version of the protocol that both know.
    pub(crate) fn negotiate(&self, versions: &[ProtocolVersion]) -> Result {
        for &version in versions {
            let response = self
                .request(VersionRequest::new(version).as_bytes(), HOST_TIMEOUT)
                .inspect_err(|e| {
                    dev_err!(
                        self.log(),
                        "PCI Pass-through VSP failed to request version: {}\n",
                        e.to_errno()
                    );
                })?;
            match self.status(response.as_bytes(), "version request")? {
                Status::REVISION_MISMATCH => {}
                status if status.is_failure() => {
                    dev_err!(
                        self.log(),
                        "PCI Pass-through VSP failed version request: {:#x}\n",
                        status.0
                    );
                    return Err(eproto());
                }
                _ => {
                    self.version.populate(version);
                    dev_info!(
                        self.log(),
                        "PCI VMBus probing: Using version {:#x}\n",
                        version.0
                    );
                    return Ok(());
                }
            }
        }
        dev_err!(
            self.log(),
            "PCI pass-through VSP failed to find supported version\n"
        );
        Err(eproto())
    }

    /// The status of an answer to what is named.
    fn status(&self, response: &[u8], what: &str) -> Result<Status> {
        Status::parse(response).map_err(|e| {
            dev_err!(self.log(), "{}: {}\n", what, format_args!("{e}"));
            eproto()
        })
    }

    /// Logs that the host did not do what was asked for, if that is the error.
    pub(crate) fn log_timeout(&self, error: Error, what: &str) {
        if error == ETIMEDOUT {
            dev_err!(
                self.log(),
                "PCI Pass-through VSP failed to {}: {}\n",
                what,
                error.to_errno()
            );
        }
    }

    /// Asks which functions are on the bus, and waits until that is known.
    pub(crate) fn query_relations(&self) -> Result {
        self.send(Message::new(MessageType::QUERY_BUS_RELATIONS).as_bytes())?;
        self.wait_for(&self.surveyed, HOST_TIMEOUT)
            .inspect_err(|e| self.log_timeout(*e, "send bus relations"))
    }

    /// Asks how much MMIO space the BARs of a function need.
    ///
    /// A function whose BARs the host does not tell has none.
    pub(crate) fn query_bars(&self, slot: SlotNumber) -> Result<[u32; BARS]> {
        let query = ChildMessage::new(MessageType::QUERY_RESOURCE_REQUIREMENTS, slot);
        let response = self
            .request(query.as_bytes(), HOST_TIMEOUT)
            .inspect_err(|e| self.log_timeout(*e, "tell resource requirements"))?;
        match ResourceRequirementsReply::parse(response.as_bytes()) {
            Ok(Ok(bars)) => return Ok(bars),
            Ok(Err(status)) => dev_err!(
                self.log(),
                "query resource requirements failed: {:x}\n",
                status.0
            ),
            Err(e) => dev_err!(
                self.log(),
                "query resource requirements failed: {}\n",
                format_args!("{e}")
            ),
        }
        Ok([0; BARS])
    }

    /// Tells the host that the bus is ready, and where its configuration window is.
    ///
    /// After a crash the host may still hold what the crashed kernel had. It is told to let go, and
    /// asked again.
    pub(crate) fn enter_d0(&self) -> Result {
        let window = self.config.as_ref().ok_or(ENODEV)?.start();
        let mut retry = true;
        loop {
            let response = self
                .request(D0Entry::new(window).as_bytes(), HOST_TIMEOUT)
                .inspect_err(|e| self.log_timeout(*e, "answer D0 Entry"))?;
            let status = self.status(response.as_bytes(), "D0 entry")?;
            if !status.is_failure() {
                return Ok(());
            }
            if !core::mem::take(&mut retry) {
                return Err(self.d0_failed(status));
            }
            dev_err!(self.log(), "Retrying D0 Entry\n");
            for child in &self.all_children()? {
                child.assigned.store(true, kernel::sync::atomic::Relaxed);
            }
            if let Err(e) = self.exit_d0() {
                dev_err!(self.log(), "Retrying D0 failed with ret {}\n", e.to_errno());
                return Err(self.d0_failed(status));
            }
        }
    }

    fn d0_failed(&self, status: Status) -> Error {
        dev_err!(
            self.log(),
            "PCI Pass-through VSP failed D0 Entry with status {:x}\n",
            status.0
        );
        eproto()
    }

    /// Tells the host that a function has its resources.
    ///
    /// The host takes the addresses from the BARs; the message moves it on.
    pub(crate) fn report_assigned(&self, child: &Child) -> Result {
        let slot = child.function.slot;
        let response = match self.version().resources_assigned() {
            MessageType::RESOURCES_ASSIGNED => {
                self.request(ResourcesAssigned::new(slot).as_bytes(), HOST_TIMEOUT)
            }
            _ => self.request(ResourcesAssigned2::new(slot).as_bytes(), HOST_TIMEOUT),
        }
        .inspect_err(|e| self.log_timeout(*e, "take assigned resources"))?;
        let status = self.status(response.as_bytes(), "assigned resources")?;
        if status.is_failure() {
            dev_err!(self.log(), "resource allocated returned {:#x}\n", status.0);
            return Err(eproto());
        }
        child.assigned.store(true, kernel::sync::atomic::Relaxed);
        Ok(())
    }

    /// Tells the host that a function does not use its resources any more, if it had any.
    fn report_released(&self, child: &Child) -> Result {
        if !child.assigned.xchg(false, kernel::sync::atomic::Relaxed) {
            return Ok(());
        }
        let message = ChildMessage::new(MessageType::RESOURCES_RELEASED, child.function.slot);
        self.send(message.as_bytes())
    }

    /// Tells the host that the bus is not used any more, and waits until the host agrees.
    pub(crate) fn exit_d0(&self) -> Result {
        // Nobody listens any more.
        if self.dev.is_rescinded() {
            return Ok(());
        }
        for child in &self.all_children()? {
            self.report_released(child).inspect_err(|_| {
                dev_err!(self.log(), "Couldn't send resources released packet(s)\n");
            })?;
        }
        let message = Message::new(MessageType::BUS_D0_EXIT);
        self.request(message.as_bytes(), EXIT_TIMEOUT).map(|_| ())
    }

    /// Tells the host that the function which it wanted back is not used any more.
    pub(crate) fn report_ejected(&self, slot: SlotNumber) {
        if let Err(e) = self.send(EjectionComplete::new(slot).as_bytes()) {
            // A rescinded bus is expected: the host waits only so long.
            if e != ENODEV {
                dev_err!(
                    self.log(),
                    "Couldn't send ejection complete packet: {}\n",
                    e.to_errno()
                );
            }
        }
    }
}
