// SPDX-License-Identifier: GPL-2.0
//! Traffic between the guest and the peer of one of its NICs.

use std::time::Duration;

use lab_agent::{frames, tcp, udp};
use serde_json::Value;

use super::guest::{report, Guest, Lab, Nic, Tool};
use super::{ensure, Result};

/// The two ends of a NIC's network.
pub struct Link<'a> {
    /// The guest.
    pub guest: &'a Guest,
    /// Programs for the peer.
    pub lab: &'a Lab,
    /// The NIC in between.
    pub nic: &'a Nic,
    /// The interface in the guest that has the addresses.
    pub interface: String,
}

/// What iperf3 is to do.
#[derive(Debug, Clone, Copy)]
pub struct Iperf {
    /// UDP at a moderate rate instead of TCP.
    pub udp: bool,
    /// IPv6.
    pub v6: bool,
    /// From the peer to the guest.
    pub reverse: bool,
    /// How long.
    pub seconds: u32,
}

impl<'a> Link<'a> {
    /// The link of `nic`, whose interface is named after its index.
    pub fn new(guest: &'a Guest, lab: &'a Lab, nic: &'a Nic) -> Self {
        Self {
            guest,
            lab,
            nic,
            interface: nic.name(),
        }
    }

    /// Echo requests that must all be answered.
    pub fn ping(&self, address: &str, options: &str) -> Result<()> {
        // The first one may wait for neighbour discovery on a slow machine.
        self.guest
            .sh(&format!("ping -q -c 5 -i 0.1 -W 5 {options} {address}"))
            .and_then(|text| ensure(text.contains(" 0% packet loss"), || text.clone()))
    }

    /// Both address families.
    pub fn pings(&self) -> Result<()> {
        self.ping(&self.nic.peer_v4(), "")?;
        self.ping(&self.nic.peer_v6(), "")
    }

    /// Runs iperf3 from the guest; bits per second.
    pub fn iperf(&self, what: Iperf) -> Result<u64> {
        let mut command = format!(
            "iperf3 -J -i 0 -t {} -c {}",
            what.seconds,
            if what.v6 {
                self.nic.peer_v6()
            } else {
                self.nic.peer_v4()
            }
        );
        if what.udp {
            command += " -u -b 2M -l 1200";
        }
        if what.reverse {
            command += " -R";
        }
        // A report with an error in it is still a report.
        let exit = self
            .guest
            .exit(&command, Duration::from_secs(u64::from(what.seconds) + 40))?;
        let result: Value = serde_json::from_str(&exit.stdout)
            .map_err(|_| format!("{command}: {}{}", exit.stdout, exit.stderr))?;
        if let Some(error) = result.get("error") {
            return Err(format!("{command}: {error}").into());
        }
        let sum = &result["end"]["sum_received"];
        let rate = sum["bits_per_second"].as_f64().unwrap_or(0.0);
        ensure(rate > 100_000.0, || {
            format!("{command}: only {rate:.0} bit/s")
        })?;
        if what.udp {
            let lost = result["end"]["sum"]["lost_percent"]
                .as_f64()
                .unwrap_or(100.0);
            ensure(lost <= 5.0, || {
                format!("{command}: {lost:.1} % lost\n{}", self.losses())
            })?;
        }
        Ok(rate as u64)
    }

    /// Where datagrams may have been lost so far, for whoever has to find out.
    fn losses(&self) -> String {
        let sockets = "grep ^Udp: /proc/net/snmp";
        let guest = self.guest.sh(sockets).unwrap_or_default();
        let peer = self
            .guest
            .peer(self.lab, self.nic, sockets)
            .unwrap_or_default();
        let host: Vec<_> = self
            .guest
            .host
            .counters()
            .unwrap_or_default()
            .into_iter()
            .filter(|(name, value)| {
                *value > 0 && (name.contains("dropped") || name.contains("no_room"))
            })
            .map(|(name, value)| format!("{name} = {value}"))
            .collect();
        format!(
            "guest's sockets:\n{guest}peer's sockets:\n{peer}host:\n{}",
            host.join("\n")
        )
    }

    /// Raw frames of random sizes from the guest to the peer, all contents checked.
    pub fn frames_out(&self, count: u32, largest: usize) -> Result<()> {
        self.frames_out_to(self.peer_interface(), count, largest)
    }

    /// The same to another interface of the peer.
    pub fn frames_out_to(&self, interface: &str, count: u32, largest: usize) -> Result<()> {
        let common = format!("--count {count} --largest {largest} --seed {count}");
        let receiver = self.guest.peer_tool(
            self.lab,
            self.nic,
            &format!("frames-receive --interface {interface} {common}"),
        )?;
        let command = format!(
            "lab-agent frames-send --interface {} --destination {} {common}",
            self.interface,
            self.peer_mac()?
        );
        let sent = self.guest.sh_within(&command, Duration::from_secs(180))?;
        let sent: frames::SendReport = report(&command, &sent)?;
        let received: frames::ReceiveReport = receiver.report(Duration::from_secs(40))?;
        complete(&sent, &received, count, largest).map_err(|error| {
            let counters = self.guest.sh(&format!(
                "ip -s link show {0}; tc -s qdisc show dev {0}; ethtool -S {0} | grep -v ': 0$'",
                self.interface
            ));
            format!("{error}\n{}", counters.unwrap_or_default()).into()
        })
    }

    /// The other way.
    pub fn frames_in(&self, count: u32, largest: usize) -> Result<()> {
        let common = format!("--count {count} --largest {largest} --seed {count}");
        let command = format!(
            "lab-agent frames-receive --interface {} {common}",
            self.interface
        );
        let receiver = self.guest.start(&command, Duration::from_secs(180))?;
        // The guest's receiver cannot say when it is ready, as its output comes at its end.
        self.guest
            .wait_until("grep -q ' 88b5 ' /proc/net/packet", Duration::from_secs(10))?;
        let sender = self.guest.peer_tool(
            self.lab,
            self.nic,
            &format!(
                "frames-send --interface {} --destination {} {common}",
                self.peer_interface(),
                self.nic.mac()
            ),
        )?;
        let sent: frames::SendReport = sender.report(Duration::from_secs(180))?;
        let exit = receiver.wait()?;
        let received: frames::ReceiveReport =
            report(&command, &format!("{}{}", exit.stdout, exit.stderr))?;
        complete(&sent, &received, count, largest)
    }

    /// Raw frames from the peer that come back to it, all contents checked.
    pub fn frames_back(&self, count: u32, largest: usize) -> Result<()> {
        let common = format!(
            "--interface {} --count {count} --largest {largest} --seed {count}",
            self.peer_interface()
        );
        let tool = |tool: String| self.guest.peer_tool(self.lab, self.nic, &tool);
        let receiver = tool(format!("frames-receive {common}"))?;
        let sender = tool(format!(
            "frames-send --destination {} {common}",
            self.nic.mac()
        ))?;
        let sent: frames::SendReport = sender.report(Duration::from_secs(180))?;
        let received: frames::ReceiveReport = receiver.report(Duration::from_secs(40))?;
        complete(&sent, &received, count, largest)
    }

    /// Raw frames from the peer that nobody is to answer. Returns how many were sent, with the one
    /// that asks for an answer at the end.
    pub fn frames_nowhere(&self, count: u32) -> Result<u64> {
        let command = format!(
            "frames-send --interface {} --destination {} --count {count} --attempts 1",
            self.peer_interface(),
            self.nic.mac()
        );
        let sender = self.guest.peer_tool(self.lab, self.nic, &command)?;
        let sent: frames::SendReport = sender.report(Duration::from_secs(60))?;
        ensure(sent.sent == count && !sent.confirmed, || {
            format!("somebody answered: {sent:?}")
        })?;
        Ok(u64::from(sent.sent) + 1)
    }

    /// The peer's interface.
    pub fn peer_interface(&self) -> &'static str {
        "peer"
    }

    /// The peer's hardware address.
    pub fn peer_mac(&self) -> Result<String> {
        let text = self.guest.peer(
            self.lab,
            self.nic,
            &format!("ip -o link show dev {}", self.peer_interface()),
        )?;
        text.split_whitespace()
            .skip_while(|word| *word != "link/ether")
            .nth(1)
            .map(str::to_owned)
            .ok_or_else(|| format!("no hardware address in '{text}'").into())
    }

    /// Starts TCP and UDP streams that live until they are collected.
    pub fn streams(&self) -> Result<Streams<'a>> {
        let (guest, nic) = (self.guest, self.nic);
        let long = Duration::from_secs(1500);
        let tcp_receiver = guest.peer_tool(
            self.lab,
            nic,
            &format!("tcp-receive --bind {}:7001", nic.peer_v4()),
        )?;
        let udp_out_receiver = guest.peer_tool(
            self.lab,
            nic,
            &format!("udp-receive --bind {}:7002", nic.peer_v4()),
        )?;
        let udp_in_receiver = guest.start(
            &format!("lab-agent udp-receive --bind {}:7003", nic.guest_v4()),
            long,
        )?;
        let tcp_sender = guest.start(
            &format!(
                "lab-agent tcp-send --rate 200000 --to {}:7001",
                nic.peer_v4()
            ),
            long,
        )?;
        let udp_out_sender = guest.start(
            &format!("lab-agent udp-send --rate 100 --to {}:7002", nic.peer_v4()),
            long,
        )?;
        guest.wait_until("grep -q :1B5B /proc/net/udp", Duration::from_secs(10))?;
        let udp_in_sender = guest.peer_tool(
            self.lab,
            nic,
            &format!("udp-send --rate 100 --to {}:7003", nic.guest_v4()),
        )?;
        Ok(Streams {
            tcp_receiver,
            udp_out_receiver,
            udp_in_receiver,
            tcp_sender,
            udp_out_sender,
            udp_in_sender,
        })
    }
}

fn complete(
    sent: &frames::SendReport,
    received: &frames::ReceiveReport,
    count: u32,
    largest: usize,
) -> Result<()> {
    let whole = sent.sent == count
        && received.received == count
        && received.corrupted == 0
        && received.duplicated == 0
        && received.largest == largest
        && received.smallest == 60;
    ensure(whole, || format!("sent: {sent:?}\nreceived: {received:?}"))
}

/// Streams under way.
pub struct Streams<'a> {
    tcp_receiver: Tool,
    udp_out_receiver: Tool,
    udp_in_receiver: lab_agent::client::Running<'a>,
    tcp_sender: lab_agent::client::Running<'a>,
    udp_out_sender: lab_agent::client::Running<'a>,
    udp_in_sender: Tool,
}

/// What became of the streams.
#[derive(Debug)]
pub struct Outcome {
    /// As the sender in the guest saw it.
    pub tcp_sent: tcp::Report,
    /// As the peer saw it.
    pub tcp_received: tcp::Report,
    /// From the guest to the peer.
    pub udp_out: udp::ReceiveReport,
    /// From the peer to the guest.
    pub udp_in: udp::ReceiveReport,
}

impl Streams<'_> {
    /// Ends the streams.
    pub fn collect(self) -> Result<Outcome> {
        let tcp_sent = self.tcp_sender.stop()?;
        let tcp_received = self.tcp_receiver.report(Duration::from_secs(60))?;
        self.udp_out_sender.stop()?;
        let udp_out = self.udp_out_receiver.report(Duration::from_secs(60))?;
        let _: udp::SendReport = self.udp_in_sender.stop()?;
        let udp_in = self.udp_in_receiver.wait()?;
        Ok(Outcome {
            tcp_sent: report("tcp-send", &(tcp_sent.stdout + &tcp_sent.stderr))?,
            tcp_received,
            udp_out,
            udp_in: report("udp-receive", &(udp_in.stdout + &udp_in.stderr))?,
        })
    }
}

impl Outcome {
    /// The TCP connection lived through it, and nothing arrived damaged.
    pub fn alive(&self) -> Result<()> {
        let (sent, received) = (&self.tcp_sent, &self.tcp_received);
        let good = sent.error.is_none()
            && received.error.is_none()
            && received.bytes > 0
            && received.bytes == sent.bytes
            && self.udp_in.corrupted == 0
            && self.udp_out.corrupted == 0;
        ensure(good, || format!("{self:#?}"))
    }

    /// Lost datagrams of both directions.
    pub fn lost(&self) -> u64 {
        self.udp_in.lost + self.udp_out.lost
    }

    /// Reordered datagrams of both directions.
    pub fn reordered(&self) -> u64 {
        self.udp_in.reordered + self.udp_out.reordered
    }

    /// Datagrams that came twice.
    pub fn duplicated(&self) -> u64 {
        self.udp_in.duplicated + self.udp_out.duplicated
    }

    /// The longest time in which some stream stood still.
    pub fn longest_gap_ms(&self) -> u64 {
        self.tcp_received
            .longest_gap_ms
            .max(self.udp_in.longest_gap_ms)
            .max(self.udp_out.longest_gap_ms)
    }
}
