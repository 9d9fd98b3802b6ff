// SPDX-License-Identifier: GPL-2.0
//! `lab-agent`: see the library.

use std::error::Error;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::atomic::AtomicBool;
use std::sync::Arc;

use clap::{Parser, Subcommand};
use lab_agent::{
    count, counters, flood, frames, module, netdev, netns, packet, rr, serve, tcp, udp,
};
use nix::sys::signal::SigSet;
use serde::Serialize;

/// The lab's hands in the guest and in the namespace of its peer
#[derive(Parser)]
#[command(version)]
struct Cli {
    /// Work in this network namespace
    #[arg(long)]
    netns: Option<String>,
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Take commands over a serial port
    Serve {
        /// The terminal device
        line: PathBuf,
    },
    /// Run a program (in the network namespace)
    Exec {
        /// The program and its arguments
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        argv: Vec<String>,
    },
    /// Do something between two marks, for the counter of instructions
    Count(count::Options),
    /// Send a number of small UDP packets
    Flood(flood::Options),
    /// Tell how large a kernel module is
    ModuleSize(module::Options),
    /// Answer requests of one byte over TCP
    RrServe(rr::ServeOptions),
    /// Send requests of one byte over TCP
    Rr(rr::Options),
    /// Send raw frames of random sizes
    FramesSend(frames::SendOptions),
    /// Receive and check raw frames
    FramesReceive(frames::ReceiveOptions),
    /// Send one frame as it is
    FrameSend {
        /// The interface to use
        #[arg(long)]
        interface: String,
        /// The frame as hexadecimal digits
        frame: String,
    },
    /// Send a sequence-numbered UDP stream
    UdpSend(udp::SendOptions),
    /// Receive a sequence-numbered UDP stream
    UdpReceive(udp::ReceiveOptions),
    /// Send a TCP stream
    TcpSend(tcp::SendOptions),
    /// Receive and check a TCP stream
    TcpReceive(tcp::ReceiveOptions),
    /// Watch an interface's counters
    Counters(counters::Options),
    /// Ask the kernel about the queues of an interface
    Netdev(netdev::Options),
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<(), Box<dyn Error>> {
    // Whoever started us may take signals in a way of its own, and a blocked one stays blocked.
    SigSet::all().thread_unblock()?;
    if let Some(name) = &cli.netns {
        netns::enter(name)?;
    }
    match cli.command {
        Task::Serve { line } => serve::serve(&line)?,
        Task::Exec { argv } => return Err(exec(&argv).into()),
        Task::Count(options) => print(&count::count(&options)?)?,
        Task::Flood(options) => print(&flood::flood(&options)?)?,
        Task::ModuleSize(options) => print(&module::size(&options)?)?,
        Task::RrServe(options) => rr::serve(&options)?,
        Task::Rr(options) => print(&rr::ask(&options)?)?,
        Task::FramesSend(options) => print(&frames::send(&options)?)?,
        Task::FramesReceive(options) => print(&frames::receive(&options)?)?,
        Task::FrameSend { interface, frame } => {
            packet::Socket::sender(&interface)?.send(&packet::parse_frame(&frame)?)?;
        }
        Task::UdpSend(options) => print(&udp::send(&options, &*on_interrupt()?)?)?,
        Task::UdpReceive(options) => print(&udp::receive(&options)?)?,
        Task::TcpSend(options) => print(&tcp::send(&options, &*on_interrupt()?)?)?,
        Task::TcpReceive(options) => print(&tcp::receive(&options)?)?,
        Task::Counters(options) => print(&counters::watch(&options, &*on_interrupt()?)?)?,
        Task::Netdev(options) => print(&netdev::ask(&options)?)?,
    }
    Ok(())
}

/// Replaces this process; returns only when that fails.
fn exec(argv: &[String]) -> io::Error {
    let error = Command::new(&argv[0]).args(&argv[1..]).exec();
    io::Error::new(error.kind(), format!("{}: {error}", argv[0]))
}

/// A flag that SIGINT and SIGTERM set.
fn on_interrupt() -> io::Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [libc::SIGINT, libc::SIGTERM] {
        signal_hook::flag::register(signal, flag.clone())?;
    }
    Ok(flag)
}

fn print(report: &impl Serialize) -> serde_json::Result<()> {
    println!("{}", serde_json::to_string(report)?);
    Ok(())
}
