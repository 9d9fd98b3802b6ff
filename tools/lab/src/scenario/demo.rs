// SPDX-License-Identifier: GPL-2.0
//! The demonstration: a VF bonds, the host takes it away and gives it back,
//! and a stream goes on.

use std::io::Write;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;

use crate::run::Files;

use super::guest::{Boot, Guest, Lab, Nic};
use super::traffic::{Link, Streams};
use super::vf::{bonded, paths};
use super::{ensure, level1, Drivers, Result};

/// Seconds that the VF is gone.
const SERVICING: Duration = Duration::from_secs(5);

/// Options of `hvlab demo`.
#[derive(Debug, Clone, Args)]
pub struct DemoOptions {
    /// What the guest is made of.
    #[command(flatten)]
    pub files: Files,
    /// Show the stock drivers instead of ours
    #[arg(long)]
    pub stock: bool,
}

/// A line of the kernel's log, by a part of it, and what it means.
const MEANINGS: [(&str, &str); 13] = [
    (
        "registering driver hv_netvsc",
        "our synthetic network driver is on the VMBus",
    ),
    (
        "registering driver hv_pci",
        "our virtual PCI bus driver is on the VMBus",
    ),
    (
        ": VF slot",
        "the host says whether this NIC has a VF; the number pairs the two",
    ),
    (
        "PCI VMBus probing",
        "a virtual PCI bus was offered; both sides agree on a protocol",
    ),
    (
        "PCI host bridge to bus",
        "the bus got its PCI domain, from the GUID the host gave it",
    ),
    (
        "type 00 class 0x020000",
        "behind it sits the VF, a MANA adapter",
    ),
    (
        "Microsoft Azure Network Adapter",
        "the stock mana driver takes the VF",
    ),
    (
        ": VF registering",
        "hv_netvsc recognizes the VF by serial number and address",
    ),
    (
        ": joined to",
        "from here on the VF is a slave of eth0; programs see eth0 only",
    ),
    (
        ": renamed from",
        "udev names the VF by its PCI domain and slot, always the same",
    ),
    (
        "Data path switched to VF",
        "the host sends eth0's traffic through the VF: the fast path",
    ),
    (
        "Data path switched from VF",
        "back to the VMBus: slower, but it is always there",
    ),
    (": VF unregistering", "the VF goes away, and eth0 stays"),
];

/// Shows it where KVM is usable.
pub fn run(options: &DemoOptions) -> Result<()> {
    options.files.check(!options.stock)?;
    let lab = Lab::new(&options.files)?;
    let drivers = if options.stock {
        Drivers::C
    } else {
        Drivers::Rust
    };
    let folder = std::env::temp_dir().join(format!("hvlab-demo-{}", std::process::id()));
    let result = show(&lab, drivers, &folder);
    // On a failure the error's text has what matters of it.
    let _ = std::fs::remove_dir_all(&folder);
    result
}

/// Shows it in an emulated machine.
pub fn run_in_level1(options: &DemoOptions) -> Result<i32> {
    options.files.check(!options.stock)?;
    let mut args = vec!["demo".to_owned()];
    args.extend(options.stock.then(|| "--stock".to_owned()));
    let launch = level1::launch(&options.files, args, !options.stock);
    Ok(launch.run(Report {
        ticker: Some(Ticker::start("starting the emulated machine")),
    })?)
}

/// What the emulated machine prints; its first word ends the wait for it.
struct Report {
    ticker: Option<Ticker>,
}

impl Write for Report {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if let Some(ticker) = self.ticker.take() {
            ticker.stop();
        }
        std::io::stdout().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        std::io::stdout().flush()
    }
}

fn show(lab: &Lab, drivers: Drivers, folder: &Path) -> Result<()> {
    let whose = match drivers {
        Drivers::C => "the kernel's stock drivers",
        Drivers::Rust => "the Rust drivers of this repository",
    };
    chapter("1. A stock Debian cloud kernel boots on our Hyper-V-compatible host");
    say(&format!(
        "It has {whose}, one network interface, and a VF for it."
    ));
    let nic = Nic::with_vf(0);
    let ticker = Ticker::start("booting");
    let guest = Guest::boot(lab, drivers, &Boot::new(vec![nic.clone()]), folder)?;
    bonded(&guest, &nic)?;
    ticker.stop();
    command_and_meaning(&guest, "uname -sr", "Debian's kernel, not rebuilt")?;
    let (modules, meaning) = match drivers {
        Drivers::C => ("hv_netvsc mana", "hv_pci is built into the kernel"),
        Drivers::Rust => ("hv_netvsc hv_pci mana", "ours are those in updates/"),
    };
    command_and_meaning(&guest, &format!("modinfo -F filename {modules}"), meaning)?;

    chapter("2. The VF bonds, in the kernel's words");
    let mut seen = story(&guest, 0)?;

    chapter("3. What an operator looks at");
    let name = nic.vf_name();
    for (command, meaning) in [
        (
            "ip -br link".to_owned(),
            format!("{name} is a SLAVE with the same address as eth0"),
        ),
        (
            "ip -br address".to_owned(),
            "only eth0 has IP addresses".to_owned(),
        ),
        (
            "lspci -D -d 1414:00ba".to_owned(),
            format!(
                "the domain {:04x} comes from the bus GUID {}",
                nic.domain(),
                nic.bus
            ),
        ),
        (
            format!("ethtool -i eth0 | head -1; ethtool -i {name} | head -1"),
            "two drivers, one interface".to_owned(),
        ),
    ] {
        command_and_meaning(&guest, &command, &meaning)?;
    }
    let link = Link::new(&guest, lab, &nic);
    link.pings()?;
    command_and_meaning(
        &guest,
        "ethtool -S eth0 | grep ' vf_'",
        "pings have just gone through the VF",
    )?;

    chapter("4. Host servicing under live streams");
    say("TCP from the guest, and UDP both ways at 100 datagrams a second each.");
    let streams = link.streams()?;
    let start = Instant::now();
    watch(&guest, &nic, start, Duration::from_secs(3), || true)?;
    say(&format!(
        "The host now takes the VF away for {} s.",
        SERVICING.as_secs()
    ));
    let servicing = guest.host.service(&nic, SERVICING)?;
    let mut gone = false;
    watch(&guest, &nic, start, Duration::from_secs(60), || {
        let vf = guest.host.data_path_is_vf(&nic).unwrap_or(false);
        gone |= !vf;
        !(gone && vf)
    })?;
    servicing.wait()?;
    bonded(&guest, &nic)?;
    say("The VF is back and carries the traffic again.");
    watch(&guest, &nic, start, Duration::from_secs(3), || true)?;
    report(streams)?;
    say("Meanwhile the kernel said:");
    seen = story(&guest, seen)?;
    ensure(seen > 0, || "the kernel has said nothing".into())?;
    guest.stop()?;
    say("\nmake demo ARGS=--stock shows the kernel's own drivers, make lab gives you a shell in the guest.");
    Ok(())
}

/// Ends the streams and tells what became of them.
fn report(streams: Streams<'_>) -> Result<()> {
    let outcome = streams.collect()?;
    outcome.alive()?;
    let (tcp, out, back) = (&outcome.tcp_received, &outcome.udp_out, &outcome.udp_in);
    say("");
    say(&format!(
        "TCP: alive, {} KiB with the right contents, longest gap {} ms",
        tcp.bytes / 1024,
        tcp.longest_gap_ms
    ));
    for (way, udp) in [("out", out), ("in", back)] {
        say(&format!(
            "UDP {way:3}: {} of {} datagrams, {} lost, {} out of order, longest gap {} ms",
            udp.received, udp.sent, udp.lost, udp.reordered, udp.longest_gap_ms
        ));
    }
    say(&format!(
        "\n    ==> The connection was kept. Longest gap: {} ms",
        outcome.longest_gap_ms()
    ));
    say("        (the longest time in which one of the three streams got nothing; an emulated machine adds to it)\n");
    Ok(())
}

/// Shows once a second which path carries the traffic, while `go_on` says so. The clock runs since `begin`.
fn watch(
    guest: &Guest,
    nic: &Nic,
    begin: Instant,
    longest: Duration,
    mut go_on: impl FnMut() -> bool,
) -> Result<()> {
    let start = Instant::now();
    let mut last = paths(guest, nic)?;
    while start.elapsed() < longest && go_on() {
        thread::sleep(Duration::from_secs(1));
        let now = paths(guest, nic)?;
        let vf = now.vf_tx + now.vf_rx - last.vf_tx - last.vf_rx;
        let synthetic = now.synthetic_tx + now.synthetic_rx - last.synthetic_tx - last.synthetic_rx;
        last = now;
        say(&format!(
            "    {:3} s   VF {vf:5} packets  {:24} synthetic {synthetic:5} packets  {}",
            begin.elapsed().as_secs(),
            bar(vf),
            bar(synthetic)
        ));
    }
    Ok(())
}

fn bar(packets: u64) -> String {
    let length = (packets as usize).div_ceil(25).min(24);
    "#".repeat(length)
}

/// Prints the lines of the log after the first `skip` that tell the story; how many there are now.
fn story(guest: &Guest, skip: usize) -> Result<usize> {
    let lines = guest.dmesg("hv_netvsc|hv_pci|hv_vmbus|mana|1414:00ba|host bridge")?;
    for line in lines.iter().skip(skip) {
        if let Some((_, meaning)) = MEANINGS.iter().find(|(part, _)| line.contains(part)) {
            say(&format!("  | {line}"));
            say(&format!("        {meaning}"));
        }
    }
    Ok(lines.len())
}

fn command_and_meaning(guest: &Guest, command: &str, meaning: &str) -> Result<()> {
    say(&format!("guest:~# {command}"));
    quote(&guest.sh(command)?);
    say(&format!("        {meaning}"));
    Ok(())
}

fn chapter(title: &str) {
    say(&format!("\n{title}\n{}", "-".repeat(title.len())));
}

fn quote(text: &str) {
    for line in text.lines() {
        say(&format!("  | {line}"));
    }
}

fn say(text: &str) {
    let mut out = std::io::stdout();
    // Nobody left to tell when this fails.
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

/// Shows that time passes while something takes long.
pub struct Ticker(Option<(mpsc::Sender<()>, thread::JoinHandle<()>)>);

impl Ticker {
    /// Starts to show it.
    pub fn start(what: &'static str) -> Self {
        let (end, ended) = mpsc::channel();
        let thread = thread::spawn(move || {
            let start = Instant::now();
            while let Err(mpsc::RecvTimeoutError::Timeout) =
                ended.recv_timeout(Duration::from_secs(2))
            {
                say(&format!("    ... {what}: {} s", start.elapsed().as_secs()));
            }
        });
        Self(Some((end, thread)))
    }

    /// Ends it.
    pub fn stop(mut self) {
        if let Some((end, thread)) = self.0.take() {
            drop(end);
            let _ = thread.join();
        }
    }
}
