// SPDX-License-Identifier: GPL-2.0

//! Configuration blocks: up to 128 bytes that a function's driver and the host's driver of the
//! physical function exchange. What is in them is their affair.

use hyperv_wire::vpci::{
    ReadBlock,
    SlotNumber,
    Status,
    WriteBlock,
    BLOCK_SIZE_MAX, //
};
use kernel::prelude::*;
use pci_host::{
    BlockOps,
    Invalidate, //
};
use zerocopy::IntoBytes;

use crate::{
    bus::Bus,
    protocol::HOST_TIMEOUT, //
};

impl Bus {
    /// Fails for a length that no block has, and for a function that is not there.
    fn block_slot(&self, devfn: u8, len: usize) -> Result<SlotNumber> {
        if len == 0 || len > BLOCK_SIZE_MAX {
            return Err(EINVAL);
        }
        let slot = SlotNumber::from_devfn(devfn);
        self.child(slot).ok_or(ENODEV)?;
        Ok(slot)
    }
}

impl BlockOps for Bus {
    fn read_block(&self, devfn: u8, block: u32, data: &mut [u8]) -> Result<usize> {
        let slot = self.block_slot(devfn, data.len())?;
        let request = ReadBlock::new(slot, block, data.len() as u32);
        let response = self
            .request(request.as_bytes(), HOST_TIMEOUT)
            .inspect_err(|e| self.log_timeout(*e, "read a configuration block"))?;
        let (status, bytes) = match ReadBlock::parse_reply(response.as_bytes()) {
            Ok(Ok(bytes)) => (Status::SUCCESS, bytes),
            Ok(Err(status)) => (status, &[][..]),
            // Too short for a status.
            Err(_) => (Status(-1), &[][..]),
        };
        // The host pads its packets.
        let count = bytes.len().min(data.len());
        if count == 0 {
            dev_err!(
                self.log(),
                "Read Config Block failed: {:#x}, bytes_returned={}\n",
                status.0,
                count
            );
            return Err(EIO);
        }
        data[..count].copy_from_slice(&bytes[..count]);
        Ok(count)
    }

    fn write_block(&self, devfn: u8, block: u32, data: &[u8]) -> Result {
        let slot = self.block_slot(devfn, data.len())?;
        let mut message = [0; WriteBlock::MAX];
        let len = WriteBlock::write(slot, block, data, &mut message).map_err(|_| EINVAL)?;
        let response = self
            .request(&message[..len], HOST_TIMEOUT)
            .inspect_err(|e| self.log_timeout(*e, "write a configuration block"))?;
        let status = Status::parse(response.as_bytes()).unwrap_or(Status(-1));
        if status != Status::SUCCESS {
            dev_err!(self.log(), "Write Config Block failed: {:#x}\n", status.0);
            return Err(EIO);
        }
        Ok(())
    }

    fn set_invalidate(&self, devfn: u8, invalidate: Option<Invalidate>) -> Result {
        let child = self.child(SlotNumber::from_devfn(devfn)).ok_or(ENODEV)?;
        *child.invalidate.lock() = invalidate;
        Ok(())
    }
}
