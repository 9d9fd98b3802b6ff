// SPDX-License-Identifier: GPL-2.0
//! What a host may say and do besides the usual: sizes, capabilities, tables, VFs that fit no NIC,
//! and messages that nobody has asked for.

use std::time::{Duration, Instant};

use hyperv_wire::nvsp;
use lab_control::{Fault, Kind, Setting};

use super::ending::account_for;
use super::faults::{account_optional, held, netvsc, released};
use super::frames::{frames_logged, has};
use super::guest::{Boot, Guest, Nic};
use super::traffic::Link;
use super::vf::{bonded, BONDING};
use super::{ensure, eventually, Context, Drivers, Result};

/// The host's name for the first NIC.
const ALIAS: &str = "Lab uplink";
/// How often the association is toggled.
const TOGGLES: u32 = 1000;

pub fn run(context: &mut Context<'_>) -> Result<()> {
    let lab = context.lab();
    let rust = context.drivers == Drivers::Rust;
    let with = |index, more| Nic {
        more,
        ..Nic::new(index)
    };
    let guest = context.boot(&Boot {
        cpus: 4,
        // The order of teardown was another one then.
        vmbus_version: Some("3.0"),
        append: "log_buf_len=1M".into(),
        ..Boot::new(vec![
            with(0, ",alias=Lab uplink"),
            with(1, ",vf=mana,slot=9"),
            with(2, ",vf=mana,slot=8,vf-mac=60:45:bd:00:00:01"),
            Nic {
                twin: 0,
                ..with(3, ",vf=mana")
            },
        ])
    })?;
    let nics = guest.nics.clone();
    let nic = &nics[0];
    let link = Link::new(&guest, lab, nic);

    context.check("the alias and the link speed are the host's", || {
        identity(&guest, nic)
    });
    pairing(context, &guest, &nics);
    context.check(
        "four channels carry sent traffic, the send table is the host's",
        || send_table(&link),
    );
    context.check(
        "send tables: bad ones are refused, odd ones do no harm",
        || odd_send_tables(&link),
    );
    context.check("ethtool -N: UDP is spread by ports or by addresses", || {
        udp_hash(&link)
    });
    context.check("messages that no driver uses do no harm", || {
        unused_messages(&link)
    });
    context.check(
        &format!("the association toggled {TOGGLES} times, then a VF joins"),
        || toggled(&link),
    );
    context.check("the switch of the data path is answered late", || {
        late_switch(&link)
    });
    if rust {
        context.check(
            "the switch of the data path is not answered: traffic goes on",
            || unanswered_switch(&link),
        );
    } else {
        context.note(
            "the stock hv_netvsc waits for ever for the answer to a switch of the data path: not tried with it",
        );
    }
    context.check("gso_max_size: the host's, the VF's, the host's", || {
        gso(&link)
    });
    context.check(
        "link changes: each shown, two seconds apart, and announced to the network",
        || link_changes(&link),
    );
    context.check("teardown order before VMBus 4.0", || {
        teardown(&guest, nic, true)
    });
    bad_buffers(context, &link);
    context.check("buffers of odd sizes: traffic passes", || {
        odd_buffers(&link)
    });
    context.check("0 to 3 subchannels are granted", || granted(&link));
    context.check("offloads: the features are those that the host has", || {
        offloads(&link)
    });
    context.check("alignment and number of packets: any value will do", || {
        packing(&link)
    });
    // The stock driver takes one for the next answer that it waits for: the last of its checks.
    context.check("completions of nothing do no harm", || completions(&link));
    context.check("ring_size: raised to the least, seen by the host", || {
        ring_size(&guest, &nics)
    });
    context.finish(guest)
}

/// The NIC's driver anew.
fn again(guest: &Guest, nic: &Nic) -> Result<()> {
    netvsc(guest, nic, "unbind")?;
    netvsc(guest, nic, "bind")
}

fn opened(guest: &Guest, nic: &Nic, count: u32) -> Result<()> {
    let what = format!("{count} channels are open");
    eventually(Duration::from_secs(15), &what, || {
        Ok(guest.host.nic(nic)?.channels == count)
    })
}

fn identity(guest: &Guest, nic: &Nic) -> Result<()> {
    let alias = guest.sh("cat /sys/class/net/eth0/ifalias /sys/class/net/eth1/ifalias")?;
    // The second has the name that hosts give by themselves, which is not worth showing.
    ensure(alias.trim() == ALIAS, || {
        format!("the aliases are '{alias}'")
    })?;
    let speed = |wanted: &str| {
        guest.wait_until(
            &format!("ethtool eth0 | grep -q 'Speed: {wanted}Mb/s'"),
            Duration::from_secs(5),
        )
    };
    speed("50000")?;
    guest.host.set(nic, Setting::LinkSpeed, Some(10_000))?;
    speed("10000")?;
    guest.host.set(nic, Setting::LinkSpeed, None)?;
    speed("50000")
}

/// VFs whose serial number or address is not that of their NIC.
fn pairing(context: &mut Context<'_>, guest: &Guest, nics: &[Nic]) {
    // The name of a VF whose slot is not its NIC's.
    let lower = |nic: &Nic, slot: u32| {
        format!(
            "[ -e /sys/class/net/eth{}/lower_enP{}s{slot} ]",
            nic.index,
            nic.domain()
        )
    };
    context.check(
        "a VF with a foreign serial number joins by its address",
        || guest.wait_until(&lower(&nics[1], 9), BONDING),
    );
    context.check(
        "a VF goes by its serial number, not by an address twice there",
        || {
            guest.wait_until(&lower(&nics[3], 4), BONDING)?;
            eventually(BONDING, "the data path is the VF's", || {
                guest.host.data_path_is_vf(&nics[3])
            })
        },
    );
    context.check(
        "a VF with foreign serial number and address joins nobody",
        || {
            guest.wait_until(
                "dmesg -t | grep -q 'no netdev found for vf serial:8'",
                BONDING,
            )?;
            let text = guest.sh("ls -d /sys/class/net/eth2/lower_* 2>/dev/null; true")?;
            ensure(
                text.is_empty() && !guest.host.data_path_is_vf(&nics[2])?,
                || format!("eth2 has {text}"),
            )
        },
    );
}

/// The send table as the driver has it.
fn table(guest: &Guest) -> Result<Vec<u32>> {
    let text = guest.sh("ethtool -d eth0 raw on | od -An -v -tu4 -w64")?;
    let words: Option<Vec<u32>> = text
        .split_whitespace()
        .map(|word| word.parse().ok())
        .collect();
    words
        .filter(|words| words.len() == nvsp::SEND_TABLE_SIZE)
        .ok_or_else(|| format!("ethtool -d: {text}").into())
}

/// Datagrams to many ports; how many each queue has sent.
fn spread(link: &Link<'_>) -> Result<Vec<u64>> {
    let counts = || -> Result<Vec<u64>> {
        let all = link.guest.statistics("eth0")?;
        Ok((0..4)
            .map(|queue| {
                all.get(&format!("tx_queue_{queue}_packets"))
                    .copied()
                    .unwrap_or(0)
            })
            .collect())
    };
    let before = counts()?;
    link.guest.sh(&format!(
        "bash -c 'for p in {{6001..6040}}; do echo x >/dev/udp/{}/$p; done'",
        link.nic.peer_v4()
    ))?;
    Ok(counts()?
        .iter()
        .zip(before)
        .map(|(now, before)| now - before)
        .collect())
}

fn send_table(link: &Link<'_>) -> Result<()> {
    opened(link.guest, link.nic, 4)?;
    let mut last = Vec::new();
    let wanted: Vec<u32> = (0..16).map(|i| i % 4).collect();
    eventually(Duration::from_secs(5), "the table has come", || {
        last = table(link.guest)?;
        Ok(last == wanted)
    })
    .map_err(|error| format!("{error}: {last:?}"))?;
    let grown = spread(link)?;
    ensure(grown.iter().all(|&count| count > 0), || {
        format!("queues have sent {grown:?}")
    })
}

/// A send table message with other words at some places.
fn send_table_message(entries: &[u32; 16], patches: &[(usize, u32)]) -> Result<Vec<u8>> {
    let mut buffer = [0; nvsp::MAX_MESSAGE_SIZE];
    let length = nvsp::encode_send_table(entries, &mut buffer).map_err(|e| e.to_string())?;
    for &(at, word) in patches {
        buffer[at..at + 4].copy_from_slice(&word.to_le_bytes());
    }
    Ok(buffer[..length].to_vec())
}

fn send(link: &Link<'_>, message: Vec<u8>) -> Result<()> {
    link.guest.host.send(link.nic, Kind::Nvsp, &[message], 1)
}

fn odd_send_tables(link: &Link<'_>) -> Result<()> {
    let guest = link.guest;
    let first = table(guest)?;
    let others = [3; 16];
    // Number of entries, and where they are.
    let mut bad = vec![
        send_table_message(&others, &[(4, 15)])?,
        send_table_message(&others, &[(4, u32::MAX)])?,
        send_table_message(&others, &[(8, 4096)])?,
        send_table_message(&others, &[(8, u32::MAX)])?,
    ];
    bad.push(bad[0][..8].to_vec());
    for message in bad {
        send(link, message)?;
    }
    link.pings()?;
    account_for(
        guest,
        &["send-table|nvsp_v5_msg|send table|too short|eth0: "],
    )?;
    let now = table(guest)?;
    ensure(now == first, || format!("a bad table was taken: {now:?}"))?;
    // Channels that there are not.
    let wild = match guest.drivers() {
        // The kernel warns of a queue that does not fit 16 bits.
        Drivers::C => [7, 64, 9, 33],
        Drivers::Rust => [7, 64, 0xffff, u32::MAX],
    };
    let wild = std::array::from_fn(|i| wild[i % 4]);
    send(link, send_table_message(&wild, &[])?)?;
    spread(link)?;
    link.pings()?;
    send(link, send_table_message(&others, &[])?)?;
    eventually(Duration::from_secs(5), "the new table is in use", || {
        Ok(table(guest)? == others)
    })?;
    let grown = spread(link)?;
    ensure(grown[3] >= 40, || {
        format!("all go to queue 3, but queues have sent {grown:?}")
    })?;
    let first: [u32; 16] = first.try_into().map_err(|_| "no table")?;
    send(link, send_table_message(&first, &[])?)?;
    eventually(Duration::from_secs(5), "the first table is back", || {
        Ok(table(guest)? == first)
    })
}

/// A table whose offset is wrong is found nevertheless.
pub fn send_table_found(link: &Link<'_>) -> Result<()> {
    let entries = std::array::from_fn(|i| (i % 3) as u32);
    send(link, send_table_message(&entries, &[(8, 4096)])?)?;
    eventually(Duration::from_secs(5), "the table is in use", || {
        Ok(table(link.guest)? == entries)
    })?;
    link.pings()
}

fn udp_hash(link: &Link<'_>) -> Result<()> {
    let guest = link.guest;
    for (fields, wanted) in [("sd", 1), ("sdfn", 2)] {
        guest.sh(&format!("ethtool -N eth0 rx-flow-hash udp4 {fields}"))?;
        let grown = spread(link)?;
        let used = grown.iter().filter(|&&count| count >= 4).count();
        ensure((wanted == 1) == (used == 1), || {
            format!("{fields}: queues have sent {grown:?}")
        })?;
    }
    Ok(())
}

fn unused_messages(link: &Link<'_>) -> Result<()> {
    let chimney = (109..=124).chain([126, 127]);
    let others = [131, 132, 135, 136, 137, 255, 0x7fff_ffff, u32::MAX];
    for number in chimney.chain(others) {
        let mut message = vec![0xa5; nvsp::MESSAGE_SIZE];
        message[..4].copy_from_slice(&number.to_le_bytes());
        send(link, message)?;
    }
    link.pings()
}

fn completions(link: &Link<'_>) -> Result<()> {
    // Of a packet, of a version, of a switch, of nothing.
    for number in [108, 2, 130, 0] {
        let mut message = vec![0; nvsp::MESSAGE_SIZE];
        message[..4].copy_from_slice(&u32::to_le_bytes(number));
        let host = &link.guest.host;
        host.send(link.nic, Kind::Completion, &[message], 20)?;
        link.ping(&link.nic.peer_v4(), "")?;
    }
    account_for(link.guest, &["[Ii]nvalid transaction|eth0: "]).map(drop)
}

fn toggled(link: &Link<'_>) -> Result<()> {
    let (guest, nic) = (link.guest, link.nic);
    // The console is slow.
    guest.sh("dmesg -n 4")?;
    let message = |on: u32| {
        [128, on, nic.serial]
            .map(u32::to_le_bytes)
            .concat()
            .into_iter()
            .chain([0; nvsp::MESSAGE_SIZE - 12])
            .collect::<Vec<_>>()
    };
    for _ in 0..TOGGLES / 2 {
        send(link, message(1))?;
        send(link, message(0))?;
    }
    guest.wait_until(
        &format!("[ $(dmesg -t | grep -c 'eth0: VF slot 1 \\(added\\|removed\\)') -ge {TOGGLES} ]"),
        Duration::from_secs(20),
    )?;
    guest.host.add_vf(nic)?;
    bonded(guest, nic)?;
    link.pings()
}

/// Sets the VF of the first NIC up or down in the guest.
fn vf_state(guest: &Guest, nic: &Nic, state: &str) -> Result<()> {
    guest.sh_within(
        &format!("ip link set {} {state}", nic.vf_name()),
        Duration::from_secs(60),
    )?;
    Ok(())
}

fn late_switch(link: &Link<'_>) -> Result<()> {
    let (guest, nic) = (link.guest, link.nic);
    for state in ["down", "up"] {
        guest.host.fault(nic, Fault::DataPathDelayed, 1)?;
        let since = Instant::now();
        let name = nic.vf_name();
        let command = format!("ip link set {name} {state}");
        let running = guest.start(&command, Duration::from_secs(60))?;
        link.pings()?;
        let exit = running.wait()?;
        ensure(exit.code == 0, || format!("{command}: {exit:?}"))?;
        let wanted = if state == "up" { "to VF" } else { "from VF" };
        guest.wait_until(
            &format!(
                "dmesg -t | grep 'eth0: Data path switched' | tail -n 1 | grep -q '{wanted}: '"
            ),
            Duration::from_secs(20),
        )?;
        ensure(since.elapsed() >= Duration::from_secs(3), || {
            format!("{state}: switched after {:?}", since.elapsed())
        })?;
    }
    link.pings()
}

fn unanswered_switch(link: &Link<'_>) -> Result<()> {
    let (guest, nic) = (link.guest, link.nic);
    vf_state(guest, nic, "down")?;
    guest.host.fault(nic, Fault::DataPathUnanswered, 1)?;
    vf_state(guest, nic, "up")?;
    guest.wait_until(
        "dmesg -t | grep -q 'Data path failed to switch to VF'",
        Duration::from_secs(20),
    )?;
    account_for(guest, &["Data path failed to switch to VF: .*, err: -110$"])?;
    link.pings()?;
    vf_state(guest, nic, "down")?;
    vf_state(guest, nic, "up")?;
    bonded(guest, nic)?;
    link.pings()
}

fn gso(link: &Link<'_>) -> Result<()> {
    let (guest, nic) = (link.guest, link.nic);
    let size = |name: &str| -> Result<u64> {
        let text = guest.sh(&format!("ip -d link show {name}"))?;
        let mut words = text
            .split_whitespace()
            .skip_while(|word| *word != "tso_max_size");
        words
            .nth(1)
            .and_then(|word| word.parse().ok())
            .ok_or_else(|| text.clone().into())
    };
    let (vf, bound) = (size(&nic.vf_name())?, size("eth0")?);
    guest.host.remove_vf(nic)?;
    let alone = size("eth0")?;
    // The least of what the host offers for IPv4 and IPv6.
    ensure(bound == vf && alone == 62_780, || {
        format!("the VF's is {vf}, eth0's with it {bound}, without {alone}")
    })?;
    guest.host.set(nic, Setting::LargeSendV6, Some(30_000))?;
    again(guest, nic)?;
    guest.host.set(nic, Setting::LargeSendV6, None)?;
    let least = size("eth0")?;
    ensure(least == 30_000, || format!("it is {least}"))
}

fn link_changes(link: &Link<'_>) -> Result<()> {
    let (guest, nic) = (link.guest, link.nic);
    let changes = || -> Result<u32> {
        let text = guest.sh("cat /sys/class/net/eth0/carrier_changes")?;
        Ok(text.trim().parse()?)
    };
    let first = changes()?;
    let reach = |count: u32| {
        guest.wait_until(
            &format!("[ $(cat /sys/class/net/eth0/carrier_changes) -ge {count} ]"),
            Duration::from_secs(15),
        )
    };
    let start = Instant::now();
    let lines = frames_logged(link, || {
        for up in [false, true, false, true] {
            guest.host.nic_link(nic, up)?;
            // Otherwise the host has nothing to say at the end.
            std::thread::sleep(Duration::from_millis(100));
        }
        reach(first + 4)?;
        guest.wait_until(
            "grep -q 1 /sys/class/net/eth0/carrier",
            Duration::from_secs(5),
        )?;
        link.ping(&nic.peer_v4(), "")
    })?;
    let took = start.elapsed();
    ensure(took >= Duration::from_secs(6), || {
        format!("four changes in {took:?}")
    })?;
    has(&lines, &["type=0x0806", "to=ff:ff:ff:ff:ff:ff"])?;
    // Down and up, without the cable having been touched.
    guest.host.change_network(nic)?;
    reach(first + 6)?;
    link.ping(&nic.peer_v4(), "")
}

/// Looks into the message log for the order in which a device is given back.
pub fn teardown(guest: &Guest, nic: &Nic, gpadls_first: bool) -> Result<()> {
    let since = guest.host.log_end()?;
    netvsc(guest, nic, "unbind")?;
    let lines = guest.host.log_since(since)?;
    netvsc(guest, nic, "bind")?;
    let place = |word: &str| -> Result<usize> {
        let found = lines.iter().rposition(|line| line.contains(word));
        found.ok_or_else(|| format!("no {word}:\n{}", lines.join("\n")).into())
    };
    // NVSP messages and GPADLs have different threads at the host, so their lines may be in
    // another order than what the guest has sent.
    let halt = place("RNDIS_HALT")?;
    // The guest does not wait for an answer to these: it may close the channel before the host
    // has read them, or while it does.
    let revokes = ["NVSP_REVOKE_RECEIVE_BUFFER", "NVSP_REVOKE_SEND_BUFFER"];
    let revokes: Vec<_> = revokes.iter().filter_map(|word| place(word).ok()).collect();
    // The primary channel is closed last.
    let close = place("CLOSE_CHANNEL")?;
    let relid = lines[close].split("relid=").nth(1).unwrap_or_default();
    let own = format!("GPADL_TEARDOWN relid={} ", relid.trim());
    let torn = |lines: &[String]| lines.iter().filter(|line| line.contains(&own)).count();
    // Two buffers, and the rings.
    let (before, all) = (torn(&lines[..close]), torn(&lines));
    let wanted = if gpadls_first { 2 } else { 0 };
    let mut order = vec![halt];
    order.extend(revokes);
    let good = order.is_sorted() && halt < close;
    ensure(good && before == wanted && all == 3, || {
        format!(
            "{before} of {all} GPADLs torn down before the close:\n{}",
            lines.join("\n")
        )
    })
}

/// Sizes of buffers that make no sense.
fn bad_buffers(context: &mut Context<'_>, link: &Link<'_>) {
    let (guest, nic) = (link.guest, link.nic);
    let cases = [
        (Setting::ReceiveSectionSize, 60),
        (Setting::ReceiveSectionCount, 1 << 20),
        (Setting::ReceiveSectionOffset, 64),
        (Setting::ReceiveGroups, 0),
        (Setting::ReceiveGroups, 2),
        (Setting::SendSectionSize, 60),
    ];
    context.check("buffers that make no sense: the probe fails cleanly", || {
        netvsc(guest, nic, "unbind")?;
        let before = held(guest)?;
        for (setting, value) in cases {
            guest.host.set(nic, setting, Some(value))?;
            let bind = netvsc(guest, nic, "bind");
            guest.host.set(nic, setting, None)?;
            ensure(bind.is_err(), || {
                format!("{setting:?} of {value} was accepted")
            })?;
            account_for(
                guest,
                &["invalid (recv|send)_section_size|unable to connect to NetVSP - -22|unable to add netvsc device|probe"],
            )?;
            released(guest, &before)?;
        }
        netvsc(guest, nic, "bind")?;
        link.pings()
    });
}

fn odd_buffers(link: &Link<'_>) -> Result<()> {
    let (guest, nic) = (link.guest, link.nic);
    for (setting, value) in [
        (Setting::ReceiveSectionSize, 1777),
        (Setting::ReceiveSectionSize, 5000),
        (Setting::SendSectionSize, 68),
        (Setting::SendSectionSize, 2001),
    ] {
        guest.host.set(nic, setting, Some(value))?;
        again(guest, nic)?;
        link.frames_out(200, 1514)?;
        link.frames_in(200, 1514)?;
        guest.host.set(nic, setting, None)?;
    }
    Ok(())
}

fn granted(link: &Link<'_>) -> Result<()> {
    let (guest, nic) = (link.guest, link.nic);
    for count in 0..=3 {
        guest.host.set(nic, Setting::Subchannels, Some(count))?;
        again(guest, nic)?;
        // The host refuses to give none.
        if count == 0 {
            guest.wait_until(
                "dmesg -t | grep -q 'sub channel request failed'",
                Duration::from_secs(10),
            )?;
            account_optional(guest, &["sub channel request failed"])?;
        }
        opened(guest, nic, count + 1)?;
        guest.wait_until(
            &format!(
                "[ $(ethtool -l eth0 | grep Combined: | tail -n 1 | tr -dc 0-9) = {} ]",
                count + 1
            ),
            Duration::from_secs(10),
        )?;
        link.pings()?;
    }
    if guest.drivers() == Drivers::C {
        // It fills its table for the channels that it has asked for, not for those it gets.
        account_optional(guest, &["Fail to set RSS parameters"])?;
    }
    guest.host.set(nic, Setting::Subchannels, None)
}

fn offloads(link: &Link<'_>) -> Result<()> {
    let (guest, nic) = (link.guest, link.nic);
    const NAMES: [&str; 5] = [
        "tx-checksum-ipv4",
        "tx-checksum-ipv6",
        "tx-tcp-segmentation",
        "tx-tcp6-segmentation",
        "large-receive-offload",
    ];
    // What the host offers, and which of the features there are then.
    let cases = [
        (None, [true; 5]),
        (
            Some((Setting::ChecksumV4, 0)),
            [false, true, false, true, true],
        ),
        (
            Some((Setting::ChecksumV4, 0x10)),
            [false, true, false, true, true],
        ),
        (Some((Setting::ChecksumV4, 0x14)), [true; 5]),
        (
            Some((Setting::ChecksumV6, 0x54)),
            [true, false, true, false, true],
        ),
        (
            Some((Setting::LargeSendV4, 0)),
            [true, true, false, true, true],
        ),
        (
            Some((Setting::LargeSendV6Options, 4)),
            [true, true, true, false, true],
        ),
        (Some((Setting::Rsc, 1)), [true, true, true, true, false]),
    ];
    for (setting, wanted) in cases {
        if let Some((setting, value)) = setting {
            guest.host.set(nic, setting, Some(value))?;
        }
        again(guest, nic)?;
        let text = guest.sh("ethtool -k eth0")?;
        let on = |name: &str| {
            let line = text.lines().map(str::trim).find(|line| {
                line.strip_prefix(name)
                    .is_some_and(|rest| rest.starts_with(':'))
            });
            line.is_some_and(|line| line.contains(": on"))
        };
        ensure(NAMES.map(on) == wanted, || format!("{setting:?}: {text}"))?;
        if setting == Some((Setting::ChecksumV4, 0x14)) {
            // Not of UDP, then.
            let lines = frames_logged(link, || {
                let to = nic.peer_v4();
                guest
                    .sh(&format!("bash -c 'echo x >/dev/udp/{to}/6001'"))
                    .map(drop)
            })?;
            let offloaded = lines.iter().any(|line| line.contains("udp@"));
            ensure(!offloaded, || lines.join("\n"))?;
        }
        if let Some((setting, _)) = setting {
            guest.host.set(nic, setting, None)?;
        }
    }
    Ok(())
}

fn packing(link: &Link<'_>) -> Result<()> {
    let (guest, nic) = (link.guest, link.nic);
    for (setting, value) in [
        (Setting::PacketsPerMessage, 0),
        (Setting::PacketsPerMessage, 1),
        (Setting::PacketsPerMessage, u32::MAX),
        (Setting::PacketAlignment, 0),
        (Setting::PacketAlignment, 8),
    ]
    .into_iter()
    .chain(match guest.drivers() {
        // A shift by that much is not defined in C.
        Drivers::C => None,
        Drivers::Rust => Some((Setting::PacketAlignment, 200)),
    }) {
        guest.host.set(nic, setting, Some(value))?;
        again(guest, nic)?;
        link.frames_out(200, 1514)?;
        guest.host.set(nic, setting, None)?;
    }
    Ok(())
}

fn ring_size(guest: &Guest, nics: &[Nic]) -> Result<()> {
    // The rings' GPADL is the first of a channel.
    let pages = |lines: &[String]| -> Result<u64> {
        let header = lines.iter().find(|line| line.contains("GPADL_HEADER"));
        let bytes: Option<u64> = header
            .and_then(|line| line.split("bytes=").nth(1))
            .and_then(|text| text.trim().parse().ok());
        // A range is two words and the pages.
        bytes
            .map(|bytes| bytes / 8 - 1)
            .ok_or_else(|| format!("no GPADL:\n{}", lines.join("\n")).into())
    };
    let since = guest.host.log_end()?;
    again(guest, &nics[0])?;
    let usual = pages(&guest.host.log_since(since)?)?;
    // With all NICs coming at once its VF would join the first one of its address.
    guest.host.remove_vf(&nics[3])?;
    guest.sh_within("rmmod hv_netvsc", Duration::from_secs(60))?;
    let since = guest.host.log_end()?;
    guest.sh("modprobe hv_netvsc ring_size=8")?;
    let least = pages(&guest.host.log_since(since)?)?;
    let said = guest.dmesg("Increased ring_size to 64 \\(min allowed\\)")?;
    ensure(
        usual == 2 * 128 && least == 2 * 64 && !said.is_empty(),
        || format!("{usual} pages, then {least}; {said:?}"),
    )?;
    let text = guest.sh("modinfo -p hv_netvsc")?;
    ensure(
        text.contains("ring_size:") && text.contains("debug:"),
        || text,
    )
}
