// SPDX-License-Identifier: GPL-2.0
//! What is measured.

use super::super::guest::Guest;
use super::super::{ensure, Drivers, Result};
use super::report::{Better, Value};
use super::{bus, module, packets, streams, vf, Bench};

/// What the guest must be like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Setting {
    /// One processor, no VF.
    Synthetic,
    /// One processor, traffic by the VF.
    Vf,
    /// Two processors, so two queues; no VF.
    Queues,
    /// One processor, a virtual PCI bus that is not the VF's.
    Bus,
}

/// A measurement, which may give several figures.
pub struct Measure {
    /// Its name.
    pub name: &'static str,
    /// What it is.
    pub title: &'static str,
    /// Where it is taken.
    pub setting: Setting,
    /// Measures.
    pub run: fn(&Bench<'_>, &Guest, Drivers) -> Result<Vec<Value>>,
}

impl Measure {
    const fn new(
        setting: Setting,
        name: &'static str,
        title: &'static str,
        run: fn(&Bench<'_>, &Guest, Drivers) -> Result<Vec<Value>>,
    ) -> Self {
        Self {
            name,
            title,
            setting,
            run,
        }
    }
}

use Setting::{Bus, Queues, Synthetic, Vf};

/// All of them, in the order in which they are taken.
const MEASURES: [Measure; 20] = [
    Measure::new(
        Synthetic,
        "instructions.tx",
        "guest instructions for each packet sent, one at a time",
        packets::instructions_tx,
    ),
    Measure::new(
        Synthetic,
        "instructions.burst",
        "guest instructions for each packet sent, 32 at a time",
        packets::instructions_burst,
    ),
    Measure::new(
        Synthetic,
        "instructions.rx",
        "guest instructions for each packet received",
        packets::instructions_rx,
    ),
    Measure::new(
        Synthetic,
        "rate.tx",
        "packets of 64 bytes sent in a second",
        packets::rate_tx,
    ),
    Measure::new(
        Synthetic,
        "rate.burst",
        "packets of 64 bytes sent in a second, 32 at a time",
        packets::rate_burst,
    ),
    Measure::new(
        Synthetic,
        "rate.rx",
        "packets of 64 bytes received in a second",
        packets::rate_rx,
    ),
    Measure::new(
        Synthetic,
        "tcp.1",
        "TCP throughput of one stream, each way",
        |bench, guest, _| streams::tcp(bench, guest, "tcp.1", 1),
    ),
    Measure::new(
        Synthetic,
        "tcp.8",
        "TCP throughput of eight streams, each way",
        |bench, guest, _| streams::tcp(bench, guest, "tcp.8", 8),
    ),
    Measure::new(
        Synthetic,
        "latency",
        "time from a request to its response over TCP",
        streams::latency,
    ),
    Measure::new(
        Synthetic,
        "load",
        "time from insmod to the carrier, memory that the driver takes",
        module::load,
    ),
    Measure::new(Synthetic, "size", "size of the module", module::size),
    Measure::new(
        Vf,
        "vf.instructions",
        "guest instructions that the way through eth0 adds to sending on the VF",
        vf::instructions,
    ),
    Measure::new(
        Vf,
        "vf.time",
        "time that the way through eth0 adds to sending on the VF",
        vf::time,
    ),
    Measure::new(
        Vf,
        "vf.tcp",
        "TCP throughput of one stream by the VF, each way",
        |bench, guest, _| streams::tcp(bench, guest, "vf.tcp", 1),
    ),
    Measure::new(
        Vf,
        "switch",
        "data path switched: longest gap, packets lost",
        vf::switch,
    ),
    Measure::new(
        Bus,
        "bus.probe",
        "time that hv_pci takes to show the function on a bus",
        bus::probe,
    ),
    Measure::new(
        Bus,
        "bus.vectors",
        "time that 64 interrupts of a function take, and what the host does for them",
        bus::vectors,
    ),
    Measure::new(
        Queues,
        "queues.tx",
        "packets of 64 bytes sent in a second by two queues",
        packets::rate_tx_queues,
    ),
    Measure::new(
        Queues,
        "queues.rx",
        "packets of 64 bytes received in a second by two queues",
        packets::rate_rx_queues,
    ),
    Measure::new(
        Queues,
        "channel",
        "memory that a second channel takes",
        module::channel,
    ),
];

/// Those whose names begin with one of the words; all when there is none.
pub fn choose(words: &[String]) -> Result<Vec<&'static Measure>> {
    let known = |word: &String| {
        MEASURES
            .iter()
            .any(|measure| measure.name.starts_with(word.as_str()))
    };
    if let Some(word) = words.iter().find(|word| !known(word)) {
        return Err(format!("no measure begins with '{word}', see hvlab bench --list").into());
    }
    let wanted = |measure: &&Measure| {
        words.is_empty()
            || words
                .iter()
                .any(|word| measure.name.starts_with(word.as_str()))
    };
    Ok(MEASURES.iter().filter(wanted).collect())
}

/// Prints the measures.
pub fn list() {
    for measure in &MEASURES {
        println!("{:20} {}", measure.name, measure.title);
    }
}

/// A value that is better when it is less.
pub fn less(name: impl Into<String>, unit: &'static str, value: f64) -> Value {
    Value {
        name: name.into(),
        unit: unit.to_owned(),
        better: Better::Less,
        value,
    }
}

/// A value that is better when it is more.
pub fn more(name: impl Into<String>, unit: &'static str, value: f64) -> Value {
    Value {
        better: Better::More,
        ..less(name, unit, value)
    }
}

/// Fails unless each is a number, and not a negative one where that makes no sense.
pub fn check(values: &[Value]) -> Result<()> {
    for Value { name, value, .. } in values {
        ensure(value.is_finite(), || format!("{name} is {value}"))?;
    }
    Ok(())
}
