// SPDX-License-Identifier: GPL-2.0
//! I/O ports: serial ports, clock, power and reset.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::Arc;

use crate::acpi::SLEEP_TYPE_OFF;
use crate::cmos::Cmos;
use crate::layout;
use crate::serial::Port;
use crate::ExitReason;

/// What the keyboard controller understands: pulse the reset line.
const I8042_PULSE_RESET: u8 = 0xfe;
/// PM1 control: ACPI mode is on.
const SCI_ENABLED: u8 = 1;
/// PM1 control: go to sleep.
const SLEEP_ENABLE: u16 = 1 << 13;

/// All ports.
pub struct Ports {
    console: Arc<Port>,
    agent: Arc<Port>,
    cmos: Cmos,
    pm1a_event: AtomicU32,
}

impl Ports {
    /// Ports of a machine with these two serial ports.
    pub fn new(console: Arc<Port>, agent: Arc<Port>) -> Self {
        Self {
            console,
            agent,
            cmos: Cmos::default(),
            pm1a_event: AtomicU32::new(0),
        }
    }

    /// The serial port and the register behind a port number.
    fn serial(&self, port: u16) -> Option<(&Port, u8)> {
        [(layout::COM1, &self.console), (layout::COM2, &self.agent)]
            .into_iter()
            .find(|&(base, _)| (base..base + 8).contains(&port))
            .map(|(base, serial)| (&**serial, (port - base) as u8))
    }

    /// The guest reads.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((serial, register)) = self.serial(port) {
            data[0] = serial.read(register);
            return;
        }
        match port {
            layout::I8042_COMMAND => data.fill(0),
            _ if port == layout::CMOS + 1 => data[0] = self.cmos.read(),
            layout::PM1A_CONTROL => {
                data.fill(0);
                data[0] = SCI_ENABLED;
            }
            _ if (layout::PM1A_EVENT..layout::PM1A_EVENT + 4).contains(&port) => {
                let bytes = self.pm1a_event.load(Ordering::Relaxed).to_le_bytes();
                let bytes = &bytes[usize::from(port - layout::PM1A_EVENT)..];
                let len = data.len().min(bytes.len());
                data[..len].copy_from_slice(&bytes[..len]);
            }
            _ => {}
        }
    }

    /// The guest writes. Some writes end the machine.
    pub fn write(&self, port: u16, data: &[u8]) -> Option<ExitReason> {
        if let Some((serial, register)) = self.serial(port) {
            serial.write(register, data[0]);
            return None;
        }
        match port {
            layout::CMOS => self.cmos.select(data[0]),
            layout::I8042_COMMAND if data[0] == I8042_PULSE_RESET => {
                return Some(ExitReason::Reset)
            }
            layout::RESET if data[0] == layout::RESET_VALUE => return Some(ExitReason::Reset),
            layout::PM1A_CONTROL if data.len() == 2 => {
                let value = u16::from_le_bytes([data[0], data[1]]);
                let sleep_type = ((value >> 10) & 7) as u8;
                if value & SLEEP_ENABLE != 0 && sleep_type == SLEEP_TYPE_OFF {
                    return Some(ExitReason::PowerOff);
                }
            }
            // No event ever happens, so status stays zero; only what is enabled is kept.
            _ if port == layout::PM1A_EVENT + 2 && data.len() == 2 => {
                let enable = u32::from(u16::from_le_bytes([data[0], data[1]])) << 16;
                self.pm1a_event.store(enable, Ordering::Relaxed);
            }
            _ => {}
        }
        None
    }
}
