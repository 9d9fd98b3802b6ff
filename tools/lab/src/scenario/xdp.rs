// SPDX-License-Identifier: GPL-2.0
//! XDP programs on the synthetic device and on its VF.
//!
//! The programs are those of `tools/image/bpf/xdp.c`, compiled when the guest image is made.

use regex::Regex;

use super::ending::account_for;
use super::guest::{Boot, Guest, Nic, COMMAND};
use super::traffic::{Iperf, Link};
use super::vf::bonded;
use super::{ensure, Context, Drivers, Result};

/// The numbers of interfaces that the programs know.
const ETH0: u32 = 2;
const VETH: u32 = 77;
/// The VLAN that they know.
const TAG: u32 = 100;

/// Frames that nobody answers: fewer than the sender has on the way at once.
const FEW: u32 = 100;
/// Frames that are to arrive.
const MANY: u32 = 2000;

/// Largest MTU whose frames fit into a page, with the room that XDP needs.
const MTU_MAX: u32 = 3506;

pub fn run(context: &mut Context<'_>) -> Result<()> {
    synthetic(context)?;
    with_vf(context)
}

/// On the synthetic device alone.
fn synthetic(context: &mut Context<'_>) -> Result<()> {
    let lab = context.lab();
    let mut guest = context.boot(&Boot {
        cpus: 2,
        ..Boot::new(vec![Nic::new(0)])
    })?;
    let nic = guest.nics[0].clone();
    guest.peer_server(lab, &nic, &["iperf3", "-s"])?;
    let link = Link::new(&guest, lab, &nic);

    context.check("LRO and XDP exclude each other, and say so", || lro(&guest));
    context.check("ip shows the program in native mode", || {
        attach(&guest, "eth0", "pass")?;
        let shown = guest.sh("ip -d link show eth0")?;
        detach(&guest, "eth0")?;
        let gone = guest.sh("ip -d link show eth0")?;
        ensure(
            shown.contains("> mtu 1500 xdp ") && !gone.contains("xdp"),
            || format!("{shown}{gone}"),
        )
    });
    verdicts(context, &link, "eth0");
    context.check("XDP_PASS: TCP both ways", || {
        attached(&guest, "eth0", "pass", || {
            for reverse in [false, true] {
                link.iperf(Iperf {
                    udp: false,
                    v6: false,
                    reverse,
                    seconds: 1,
                })?;
            }
            Ok(())
        })
    });
    context.check("XDP_PASS: multicast and neighbours", || {
        attached(&guest, "eth0", "pass", || {
            guest.sh("ip neighbour flush dev eth0; ping -q -c 2 -W 5 ff02::1%eth0")?;
            link.pings()
        })
    });
    context.check(
        "a verdict that there is not, and a redirection to nowhere, drop",
        || {
            dropped(&link, "eth0", "unknown")?;
            dropped(&link, "eth0", "to_nowhere")?;
            let lines = guest.dmesg("Illegal XDP return value 99 on prog unknown .* dev eth0")?;
            ensure(!lines.is_empty(), || "no line about the verdict".into())
        },
    );
    context.check("XDP_ABORTED is traced, frame by frame", || traced(&link));
    context.check("programs find room before and behind the frame", || {
        attached(&guest, "eth0", "room", || link.frames_in(MANY, 1514))
    });
    if guest.drivers() == Drivers::Rust {
        // The stock driver says that there is no metadata.
        context.check("programs can leave metadata", || {
            attached(&guest, "eth0", "metadata", || link.frames_in(MANY, 1514))
        });
        // The stock driver allocates a page for each frame.
        context.check("the pages of frames are used again", || reused(&link));
    }
    context.check(
        "redirected to another device and from there, both ways",
        || redirected(&link, "eth0"),
    );
    context.check(
        "MTU 3506 goes with a program, a larger one does not",
        || mtu(&link),
    );
    context.check("attached and detached 10 times under streams", || {
        under_streams(&link)
    });
    context.check(
        "the program survives down and up, and other buffers",
        || {
            attached(&guest, "eth0", "drop", || {
                guest.sh(
                    "ip link set eth0 down && ip link set eth0 up && ethtool -G eth0 rx 2000",
                )?;
                guest.sh("ip -6 address add fd00:0::2/64 dev eth0 nodad 2>/dev/null; true")?;
                link.pings()?;
                lost(&link, "eth0")
            })
        },
    );
    if guest.drivers() == Drivers::Rust {
        // With the stock driver the kernel warns, as it does not take its program back.
        context.check("hv_netvsc can go with a program in place", || {
            attach(&guest, "eth0", "drop")?;
            guest.sh("rmmod hv_netvsc").map(drop)
        });
    }
    context.finish(guest)
}

/// With a VF, by which most frames come.
fn with_vf(context: &mut Context<'_>) -> Result<()> {
    let lab = context.lab();
    let guest = context.boot(&Boot::new(vec![Nic::with_vf(0)]))?;
    let nic = guest.nics[0].clone();
    if !context.check("the VF joins and the data path switches", || {
        bonded(&guest, &nic)
    }) {
        return context.finish(guest);
    }
    guest.sh("ethtool -K eth0 lro off")?;
    let link = Link::new(&guest, lab, &nic);
    let vf = nic.vf_name();

    verdicts(context, &link, &vf);
    context.check(
        "redirected to another device and from there, by the VF",
        || redirected(&link, &vf),
    );
    context.check(
        "a VF that refuses the program: eth0 has none either",
        || {
            refused(&guest, &vf)?;
            bonded(&guest, &nic)?;
            link.frames_in(MANY, 1514)
        },
    );
    context.check("the VF leaves and comes back: the program stays", || {
        attached(&guest, "eth0", "drop", || {
            lost(&link, &vf)?;
            guest.host.remove_vf(&nic)?;
            guest.wait_until(&format!("[ ! -e /sys/class/net/{vf} ]"), COMMAND)?;
            lost(&link, "eth0")?;
            guest.host.add_vf(&nic)?;
            bonded(&guest, &nic)?;
            link.pings()?;
            lost(&link, &vf)
        })?;
        // Nothing is left on the VF.
        link.frames_in(MANY, 1514)
    });
    context.check("attached and detached 10 times under streams", || {
        under_streams(&link)
    });
    if guest.drivers() == Drivers::Rust {
        context.check("hv_netvsc can go with a program on both", || {
            attach(&guest, "eth0", "drop")?;
            guest.sh("rmmod hv_netvsc").map(drop)
        });
    }
    context.finish(guest)
}

/// A command that sets a program, or another one.
fn command(interface: &str, program: &str) -> String {
    format!("ip -force link set dev {interface} xdpdrv obj /usr/lib/bpf/xdp.o program {program}")
}

/// Sets a program, or another one.
fn attach(guest: &Guest, interface: &str, program: &str) -> Result<()> {
    guest.sh(&command(interface, program)).map(drop)
}

/// Takes the program away.
fn detach(guest: &Guest, interface: &str) -> Result<()> {
    guest
        .sh(&format!("ip link set dev {interface} xdpdrv off"))
        .map(drop)
}

/// Does something with a program in place.
fn attached(
    guest: &Guest,
    interface: &str,
    program: &str,
    act: impl FnOnce() -> Result<()>,
) -> Result<()> {
    attach(guest, interface, program)?;
    let result = act();
    detach(guest, interface)?;
    result
}

/// The sum of a counter of `ethtool -S` over all queues.
fn counter(guest: &Guest, interface: &str, name: &str) -> Result<u64> {
    let pattern = Regex::new(&format!("^(rx|tx)_(queue_)?[0-9]+_{name}$"))?;
    let statistics = guest.statistics(interface)?;
    let mut queues = statistics
        .iter()
        .filter(|(key, _)| pattern.is_match(key))
        .peekable();
    ensure(queues.peek().is_some(), || {
        format!("{interface} has no counter {name}")
    })?;
    Ok(queues.map(|(_, value)| *value).sum())
}

/// Does something, and returns by how much a counter has grown.
fn growth<T>(
    guest: &Guest,
    interface: &str,
    name: &str,
    act: impl FnOnce() -> Result<T>,
) -> Result<(T, u64)> {
    let before = counter(guest, interface, name)?;
    let result = act()?;
    let after = counter(guest, interface, name)?;
    Ok((result, after.wrapping_sub(before)))
}

/// Frames of the peer do not arrive, and each is counted once, on `interface`.
fn lost(link: &Link<'_>, interface: &str) -> Result<()> {
    let (sent, counted) = growth(link.guest, interface, "xdp_drop", || {
        link.frames_nowhere(FEW)
    })?;
    ensure(sent == counted, || {
        format!("sent {sent} frames, {interface} counted {counted}")
    })
}

/// Frames are dropped by a program of eth0 that runs on `interface`; all else passes.
fn dropped(link: &Link<'_>, interface: &str, program: &str) -> Result<()> {
    attached(link.guest, "eth0", program, || {
        lost(link, interface)?;
        link.pings()
    })
}

/// What a program can say about a frame, on the interface by which it comes.
fn verdicts(context: &mut Context<'_>, link: &Link<'_>, interface: &str) {
    let guest = link.guest;
    context.check("XDP_PASS: frames of 60 to 1514 bytes arrive whole", || {
        attached(guest, "eth0", "pass", || {
            link.pings()?;
            link.frames_in(MANY, 1514)?;
            link.frames_out(MANY, 1514)
        })
    });
    context.check("XDP_DROP: frames are dropped and counted", || {
        dropped(link, interface, "drop")
    });
    context.check("XDP_ABORTED: frames are dropped and counted", || {
        dropped(link, interface, "aborted")
    });
    context.check("XDP_TX: frames come back whole and are counted", || {
        attached(guest, "eth0", "tx", || {
            let ((), counted) =
                growth(guest, interface, "xdp_tx", || link.frames_back(MANY, 1514))?;
            ensure(counted > u64::from(MANY), || {
                format!("{interface} counted {counted} frames")
            })?;
            link.pings()
        })
    });
    context.check("without a program frames arrive again", || {
        link.frames_in(MANY, 1514)
    });
}

/// With LRO on there is no program, and with a program no LRO.
fn lro(guest: &Guest) -> Result<()> {
    let has_lro = || -> Result<bool> {
        let text = guest.sh("ethtool -k eth0 | grep large-receive-offload")?;
        Ok(text.contains(": on"))
    };
    guest.sh("ethtool -K eth0 lro on")?;
    ensure(has_lro()?, || "LRO cannot be switched on".into())?;
    let exit = guest.exit(&command("eth0", "pass"), COMMAND)?;
    ensure(
        exit.code != 0 && exit.stderr.contains("hv_netvsc: XDP: not support LRO"),
        || format!("exit code {}: {}", exit.code, exit.stderr),
    )?;
    let lines = account_for(guest, &["eth0: XDP: not support LRO$"])?;
    ensure(lines.len() == 1, || format!("{lines:?}"))?;
    guest.sh("ethtool -K eth0 lro off")?;
    attached(guest, "eth0", "pass", || {
        // Some versions of ethtool call this an error.
        guest.exit("ethtool -K eth0 lro on", COMMAND)?;
        ensure(!has_lro()?, || "LRO is on with a program".into())?;
        let lines = guest.dmesg("eth0: Skip LRO - unsupported with XDP$")?;
        ensure(!lines.is_empty(), || "no line about it".into())
    })?;
    // Whoever has asked for it gets it as soon as that is possible.
    guest.sh("ethtool -K eth0 lro off")?;
    Ok(())
}

/// The largest MTU, and one that is too large, first with a program and then for one.
fn mtu(link: &Link<'_>) -> Result<()> {
    let guest = link.guest;
    let peer = |mtu: u32| {
        let command = format!("ip link set {} mtu {mtu}", link.peer_interface());
        guest.peer(link.lab, link.nic, &command).map(drop)
    };
    let is = |mtu: u32| -> Result<()> {
        let now = guest.sh("cat /sys/class/net/eth0/mtu")?;
        ensure(now.trim() == mtu.to_string(), || {
            format!("the MTU is {now}, not {mtu}")
        })
    };
    let line = |mtu: u32, size: u32| -> Result<()> {
        let pattern = format!("eth0: XDP: mtu:{mtu} too large, buf_max:{size}$");
        let lines = account_for(guest, &[&pattern])?;
        ensure(lines.len() == 1, || format!("{lines:?}"))
    };
    peer(9000)?;
    attached(guest, "eth0", "pass", || {
        guest.sh(&format!("ip link set eth0 mtu {MTU_MAX}"))?;
        let largest = MTU_MAX as usize + 14;
        link.frames_in(MANY, largest)?;
        link.frames_out(MANY, largest)?;
        let exit = guest.exit(&format!("ip link set eth0 mtu {}", MTU_MAX + 1), COMMAND)?;
        ensure(
            exit.code != 0 && exit.stderr.contains("Operation not supported"),
            || format!("exit code {}: {}", exit.code, exit.stderr),
        )?;
        line(MTU_MAX + 1, 4160)?;
        is(MTU_MAX)?;
        link.pings()
    })?;
    attached(guest, "eth0", "tx", || {
        link.frames_back(MANY, MTU_MAX as usize + 14)
    })?;
    guest.sh("ip link set eth0 mtu 9000")?;
    let exit = guest.exit(&command("eth0", "pass"), COMMAND)?;
    ensure(
        exit.code != 0 && exit.stderr.contains("hv_netvsc: XDP: mtu too large"),
        || format!("exit code {}: {}", exit.code, exit.stderr),
    )?;
    line(9000, 9600)?;
    is(9000)?;
    guest.sh("ip link set eth0 mtu 1500")?;
    peer(1500)?;
    link.pings()
}

/// Counts what the kernel traces while something is done.
fn trace(
    guest: &Guest,
    event: &str,
    pattern: &str,
    act: impl FnOnce() -> Result<()>,
) -> Result<u64> {
    let switch = |on: u32| {
        let file = format!("/sys/kernel/tracing/events/{event}/enable");
        guest.sh(&format!("echo {on} >{file}")).map(drop)
    };
    guest.sh("echo >/sys/kernel/tracing/trace")?;
    switch(1)?;
    let result = act();
    switch(0)?;
    result?;
    // No line is no error.
    let text = guest.sh(&format!(
        "grep -c '{pattern}' /sys/kernel/tracing/trace || true"
    ))?;
    Ok(text.trim().parse()?)
}

/// There is an event for each frame on which a program fails.
fn traced(link: &Link<'_>) -> Result<()> {
    let guest = link.guest;
    attached(guest, "eth0", "aborted", || {
        let pattern = format!("xdp_exception: .* action=ABORTED ifindex={ETH0}");
        let (events, counted) = growth(guest, "eth0", "xdp_drop", || {
            trace(guest, "xdp/xdp_exception", &pattern, || {
                link.frames_nowhere(FEW).map(drop)
            })
        })?;
        ensure(events == counted && events > u64::from(FEW), || {
            format!("{counted} frames, {events} events")
        })
    })
}

/// Once there are enough pages, hardly any is taken from the kernel.
fn reused(link: &Link<'_>) -> Result<()> {
    attached(link.guest, "eth0", "pass", || {
        link.frames_in(MANY, 1514)?;
        let event = "page_pool/page_pool_state_hold";
        let pages = trace(link.guest, event, "page_pool_state_hold: ", || {
            link.frames_in(MANY, 1514)
        })?;
        ensure(pages < u64::from(MANY) / 10, || {
            format!("{pages} pages for {MANY} frames")
        })
    })
}

/// Frames between the peer and a pair of virtual devices in the guest, all of the way by XDP, at
/// last with a tag that the program puts into the frames. `interface` counts what is redirected.
fn redirected(link: &Link<'_>, interface: &str) -> Result<()> {
    let guest = link.guest;
    let index = guest.sh("cat /sys/class/net/eth0/ifindex")?;
    ensure(index.trim() == ETH0.to_string(), || {
        format!("the number of eth0 is {index}")
    })?;
    guest.sh(&format!(
        "ip link add xdp0 index {VETH} type veth peer name xdp1 && \
         ip link set xdp1 address {} && ip link set xdp0 up && ip link set xdp1 up",
        link.nic.mac()
    ))?;
    let result = (|| {
        // A veth takes redirected frames when the other end has a program.
        attach(guest, "xdp1", "pass")?;
        attach(guest, "xdp0", "to_eth0")?;
        attached(guest, "eth0", "to_veth", || {
            let over = Link {
                interface: "xdp1".into(),
                ..*link
            };
            let many = u64::from(MANY);
            for name in ["xdp_redirect", "xdp_xmit"] {
                let ((), counted) = growth(guest, interface, name, || match name {
                    "xdp_redirect" => over.frames_in(MANY, 1514),
                    _ => over.frames_out(MANY, 1514),
                })?;
                ensure(counted >= many, || {
                    format!("{interface}: {name} grew by {counted}")
                })?;
            }
            let peer = |command: &str| guest.peer(link.lab, link.nic, command).map(drop);
            peer(&format!(
                "ip link add link {} name tagged type vlan id {TAG} && ip link set tagged up",
                link.peer_interface()
            ))?;
            attach(guest, "xdp0", "to_eth0_tagged")?;
            let tagged = over.frames_out_to("tagged", MANY, 1514);
            peer("ip link del tagged")?;
            tagged?;
            link.pings()
        })
    })();
    guest.sh("ip link del xdp0")?;
    result
}

/// Programs come and go, while there is traffic.
fn under_streams(link: &Link<'_>) -> Result<()> {
    let guest = link.guest;
    let streams = link.streams()?;
    for _ in 0..10 {
        for program in ["pass", "drop"] {
            attach(guest, "eth0", program)?;
        }
        detach(guest, "eth0")?;
    }
    streams.collect()?.alive()
}

/// A VF with an MTU of its own, which is too large for XDP.
fn refused(guest: &Guest, vf: &str) -> Result<()> {
    guest.sh(&format!("ip link set {vf} mtu 9000"))?;
    let exit = guest.exit(&command("eth0", "drop"), COMMAND)?;
    ensure(
        exit.code != 0 && exit.stderr.contains("hv_netvsc: vf_setxdp failed"),
        || format!("exit code {}: {}", exit.code, exit.stderr),
    )?;
    account_for(
        guest,
        &[
            "eth0: vf_setxdp failed:-95$",
            "XDP: mtu:9000 too large, mtu_max:",
        ],
    )?;
    guest.sh(&format!("ip link set {vf} mtu 1500"))?;
    let shown = guest.sh("ip -d link show eth0")?;
    ensure(!shown.contains("xdp"), || shown)
}
