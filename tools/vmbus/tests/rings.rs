// SPDX-License-Identifier: GPL-2.0

//! Open channels: packets of all kinds, full rings, hostile rings.

mod guest;

use std::{
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use guest::{connected, Guest, GuestRings, NET, WAIT};
use hyperv_wire::{
    ring::Outgoing,
    vmbus::{
        GpaDirectHeader, GpaRangeHeader, OfferChannel, PacketType, TransferPagesHeader,
        TransferRange as WireRange, Version,
    },
};
use vm_memory::{Bytes, GuestAddress};
use vmbus_host::{
    AccessError, Channel, Device, Offer, OpenRefused, Packet, PacketKind, RecvError, SendError,
    TransferRange, Wake,
};
use zerocopy::IntoBytes;

/// A device whose channel the test uses itself.
#[derive(Default)]
struct Manual(Mutex<Option<Arc<Channel>>>);

impl Device for Manual {
    fn name(&self) -> String {
        "net0".into()
    }

    fn offer(&self) -> Offer {
        Offer::new(hyperv_wire::vmbus::class::NETWORK, NET)
    }

    fn open(&self, channel: Arc<Channel>) -> Result<(), OpenRefused> {
        *self.0.lock().unwrap() = Some(channel);
        Ok(())
    }

    fn close(&self, _subchannel_index: u16) {
        *self.0.lock().unwrap() = None;
    }
}

/// A guest, its ends of an open channel, and the host's.
fn opened() -> (Guest, OfferChannel, GuestRings, Arc<Channel>) {
    let guest = connected(Version::V5_3);
    let device = Arc::new(Manual::default());
    guest.host.add_device(device.clone()).unwrap();
    let offer = guest.request_offers().remove(0);
    let rings = guest.open(&offer, 1);
    let channel = device.0.lock().unwrap().clone().unwrap();
    (guest, offer, rings, channel)
}

fn packet(
    packet_type: PacketType,
    header: &'static [u8],
    payload: &'static [u8],
) -> Outgoing<'static> {
    Outgoing {
        packet_type,
        flags: 0,
        transaction_id: 7,
        header,
        payload,
    }
}

#[test]
fn a_channel_knows_what_it_was_opened_with() {
    let (_guest, _, _, channel) = opened();
    assert_eq!(channel.name(), "net0");
    assert_eq!((channel.relid(), channel.subchannel_index()), (1, 0));
    assert_eq!(channel.target_vp(), 1);
    assert_eq!(channel.vmbus_version(), Version::V5_3);
    assert_eq!(channel.open_data(), &[0x77; 120]);
    // A worker looks into the ring once when it starts.
    assert_eq!(channel.wait(None), Ok(Wake::Signalled));
    assert_eq!(
        channel.wait(Some(Duration::from_millis(3))),
        Ok(Wake::TimedOut)
    );
}

#[test]
fn packets_from_the_guest_are_decoded() {
    let (guest, _, mut rings, channel) = opened();
    assert_eq!(channel.recv(), Ok(None));

    // In-band, with padding; a completion; an unknown type.
    rings.write(&Outgoing {
        flags: 1,
        ..packet(PacketType::DATA_INBAND, &[], b"abc")
    });
    rings.write(&packet(PacketType::COMPLETION, &[], &[]));
    rings.write(&packet(PacketType(99), &[0; 8], &[1; 8]));
    assert_eq!(
        channel.recv(),
        Ok(Some(Packet {
            kind: PacketKind::InBand,
            transaction_id: 7,
            completion_requested: true,
            payload: b"abc\0\0\0\0\0".to_vec(),
        }))
    );
    let completion = channel.recv().unwrap().unwrap();
    assert_eq!(completion.kind, PacketKind::Completion);
    assert!(!completion.completion_requested);
    assert_eq!(
        channel.recv().unwrap().unwrap().kind,
        PacketKind::Other(PacketType(99))
    );

    // Guest memory: 5000 bytes that begin at 0x20010 and go on in page 0x30, and one byte.
    guest
        .memory
        .write_slice(&[1; 4080], GuestAddress(0x20010))
        .unwrap();
    guest
        .memory
        .write_slice(&[2; 920], GuestAddress(0x30000))
        .unwrap();
    let mut header = GpaDirectHeader {
        reserved: 0.into(),
        range_count: 2.into(),
    }
    .as_bytes()
    .to_vec();
    for (count, offset, pfns) in [(5000, 16, &[0x20_u64, 0x30][..]), (1, 0, &[0x30])] {
        let range = GpaRangeHeader {
            byte_count: u32::into(count),
            byte_offset: u32::into(offset),
        };
        header.extend_from_slice(range.as_bytes());
        header.extend(pfns.iter().flat_map(|pfn| pfn.to_le_bytes()));
    }
    rings.write(&Outgoing {
        packet_type: PacketType::DATA_USING_GPA_DIRECT,
        flags: 1,
        transaction_id: 8,
        header: &header,
        payload: b"rndis...",
    });
    let direct = channel.recv().unwrap().unwrap();
    assert_eq!(direct.payload, b"rndis...");
    let PacketKind::GpaDirect(ranges) = direct.kind else {
        panic!("{direct:?}");
    };
    assert_eq!(ranges.len(), 2);
    let mut bytes = vec![0; 5000];
    ranges[0].read_at(channel.memory(), 0, &mut bytes).unwrap();
    assert!(bytes[..4080].iter().all(|&byte| byte == 1));
    assert!(bytes[4080..].iter().all(|&byte| byte == 2));
    assert_eq!(
        ranges[1].read_at(channel.memory(), 1, &mut [0]),
        Err(AccessError::OutOfRange)
    );

    // Transfer pages, which a guest does not send, but may.
    let mut header = TransferPagesHeader {
        pageset_id: 0xcafe.into(),
        sender_owns_set: 0,
        reserved: 0,
        range_count: 1.into(),
    }
    .as_bytes()
    .to_vec();
    let range = WireRange {
        byte_count: 3.into(),
        byte_offset: 4.into(),
    };
    header.extend_from_slice(range.as_bytes());
    rings.write(&Outgoing {
        packet_type: PacketType::DATA_USING_XFER_PAGES,
        flags: 0,
        transaction_id: 9,
        header: &header,
        payload: &[],
    });
    assert_eq!(
        channel.recv().unwrap().unwrap().kind,
        PacketKind::TransferPages {
            pageset_id: 0xcafe,
            ranges: vec![TransferRange {
                byte_count: 3,
                byte_offset: 4,
            }],
        }
    );
    assert_eq!(channel.recv(), Ok(None));
}

#[test]
fn packets_with_hidden_pages_are_errors() {
    let (guest, _, mut rings, channel) = opened();
    // One range of two pages.
    const HEADER: [u8; 32] = {
        let mut header = [0; 32];
        header[4] = 1;
        header[9] = 0x20;
        header[16] = 0x20;
        header[24] = 0x30;
        header
    };
    let direct = packet(PacketType::DATA_USING_GPA_DIRECT, &HEADER, &[]);
    guest.hide(0x30);
    rings.write(&direct);
    assert_eq!(channel.recv(), Err(RecvError::Hidden));
    // It is consumed: what follows is still a packet.
    guest.hide(0x31);
    rings.write(&direct);
    assert!(matches!(channel.recv(), Ok(Some(_))));
    assert_eq!(channel.recv(), Ok(None));
}

#[test]
fn packets_with_bad_headers_are_errors() {
    for (packet_type, header) in [
        (PacketType::DATA_USING_GPA_DIRECT, &[][..]),
        (PacketType::DATA_USING_GPA_DIRECT, &[0, 0, 0, 0, 1, 0, 0, 0]),
        (
            PacketType::DATA_USING_GPA_DIRECT,
            &[0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ),
        (
            PacketType::DATA_USING_GPA_DIRECT,
            &[0, 0, 0, 0, 255, 255, 255, 255, 1, 0, 0, 0, 0, 0, 0, 0],
        ),
        (PacketType::DATA_USING_XFER_PAGES, &[]),
        (
            PacketType::DATA_USING_XFER_PAGES,
            &[0, 0, 0, 0, 255, 255, 255, 255],
        ),
    ] {
        let (_guest, _, mut rings, channel) = opened();
        rings.write(&packet(packet_type, header, &[]));
        assert!(
            matches!(
                channel.recv(),
                Err(RecvError::Header(_) | RecvError::Ranges(_))
            ),
            "{packet_type} {header:?}"
        );
        // It is consumed: what follows is still a packet.
        assert_eq!(channel.recv(), Ok(None));
    }
}

#[test]
fn a_spoiled_ring_is_reported_and_the_channel_can_still_be_closed() {
    let (guest, _, mut rings, channel) = opened();
    rings.write(&packet(PacketType::DATA_INBAND, &[], &[0; 8]));
    let word = |pfn: u64, offset: u64| GuestAddress(pfn * 4096 + offset);
    let write_index: u32 = guest.memory.read_obj(word(rings.upstream[0], 0)).unwrap();

    guest
        .memory
        .write_obj(3_u32, word(rings.upstream[0], 0))
        .unwrap();
    assert!(matches!(channel.recv(), Err(RecvError::Ring(_))));
    guest
        .memory
        .write_obj(write_index, word(rings.upstream[0], 0))
        .unwrap();
    assert!(matches!(channel.recv(), Ok(Some(_))));

    guest
        .memory
        .write_obj(u32::MAX, word(rings.downstream[0], 4))
        .unwrap();
    assert!(matches!(
        channel.send_inband(1, false, &[]),
        Err(SendError::Ring(_))
    ));
    guest.close(rings);
    assert!(channel.is_closed());
    assert_eq!(channel.recv(), Err(RecvError::Closed));
    assert_eq!(channel.send_completion(1, &[]), Err(SendError::Closed));
    assert!(channel.wait(None).is_err());
    assert_eq!(guest.usage().gpadls, 0);
}

#[test]
fn packets_to_the_guest() {
    let (guest, _, mut rings, channel) = opened();
    guest.events();
    channel.send_inband(5, true, b"hello").unwrap();
    assert_eq!(guest.events(), [(1, 2, 1)]);
    // The ring is not empty: the guest is awake already.
    channel.send_completion(6, &[]).unwrap();
    let ranges = [
        TransferRange {
            byte_count: 100,
            byte_offset: 0,
        },
        TransferRange {
            byte_count: 60,
            byte_offset: 2048,
        },
    ];
    channel
        .send_transfer_pages(7, 0xcafe, &ranges, b"nvspnvsp")
        .unwrap();
    assert_eq!(guest.events(), []);

    let (packet_type, id, header, payload, _) = rings.try_recv().unwrap();
    assert_eq!((packet_type, id), (PacketType::DATA_INBAND, 5));
    assert_eq!((header, payload), (vec![], b"hello\0\0\0".to_vec()));
    let (packet_type, id, _, payload, _) = rings.try_recv().unwrap();
    assert_eq!(
        (packet_type, id, payload),
        (PacketType::COMPLETION, 6, vec![])
    );
    let (packet_type, id, header, payload, _) = rings.try_recv().unwrap();
    assert_eq!((packet_type, id), (PacketType::DATA_USING_XFER_PAGES, 7));
    assert_eq!(payload, b"nvspnvsp");
    assert_eq!(
        header,
        [
            [0xfe, 0xca, 0, 0, 2, 0, 0, 0],
            [100, 0, 0, 0, 0, 0, 0, 0],
            [60, 0, 0, 0, 0, 8, 0, 0],
        ]
        .concat()
    );
    assert!(rings.try_recv().is_none());

    // Rings have 8192 bytes.
    assert_eq!(
        channel.send_inband(1, false, &[0; 8192]),
        Err(SendError::TooLarge)
    );
}

#[test]
fn a_full_ring_asks_for_a_signal_and_gets_it_once() {
    let (guest, _, mut rings, channel) = opened();
    channel.wait(None).unwrap();
    let mut sent = 0;
    while channel.send_inband(sent, false, &[0; 1000]).is_ok() {
        sent += 1;
    }
    assert_eq!(sent, 7);
    assert_eq!(
        channel.send_inband(sent, false, &[0; 1000]),
        Err(SendError::Full)
    );
    // Something smaller does fit; then nobody waits.
    channel.send_inband(sent, false, &[0; 8]).unwrap();
    assert_eq!(
        channel.send_inband(sent, false, &[0; 2500]),
        Err(SendError::Full)
    );

    let mut signals = Vec::new();
    for _ in 0..8 {
        signals.push(rings.try_recv().unwrap().4);
    }
    // 8192 - 7 * 1024 - 32 = 992 bytes were free; more than 2528 are after two packets.
    assert_eq!(signals.iter().filter(|&&signal| signal).count(), 1);
    assert!(signals[1]);
    rings.signal(&guest);
    assert_eq!(channel.wait(Some(WAIT)), Ok(Wake::Signalled));
    channel.send_inband(sent, false, &[0; 2500]).unwrap();
}

#[test]
fn no_wakeup_is_lost_under_load() {
    const PACKETS: u64 = 30_000;
    let (guest, _, mut rings, channel) = opened();
    let worker = thread::spawn({
        let channel = channel.clone();
        move || {
            let mut next = 0;
            // Every wait must end by a signal.
            while next < PACKETS {
                assert_eq!(channel.wait(Some(WAIT)), Ok(Wake::Signalled));
                while let Some(packet) = channel.recv().unwrap() {
                    assert_eq!(packet.transaction_id, next);
                    next += 1;
                    loop {
                        match channel.send_completion(packet.transaction_id, &packet.payload) {
                            Ok(()) => break,
                            Err(SendError::Full) => {
                                assert_eq!(channel.wait(Some(WAIT)), Ok(Wake::Signalled));
                            }
                            Err(error) => panic!("{error}"),
                        }
                    }
                }
            }
        }
    });

    let deadline = Instant::now() + WAIT;
    let (mut sent, mut received) = (0_u64, 0);
    while received < PACKETS {
        assert!(Instant::now() < deadline, "stuck at {sent}/{received}");
        // At most so many under way that the guest never finds its ring full.
        while sent < PACKETS && sent - received < 60 {
            let payload = vec![sent as u8; 8 * (sent % 12) as usize];
            rings.send(&guest, sent, &payload);
            sent += 1;
        }
        match rings.try_recv() {
            Some((_, id, _, payload, signal)) => {
                assert_eq!(id, received);
                assert_eq!(payload, vec![id as u8; 8 * (id % 12) as usize]);
                received += 1;
                if signal {
                    rings.signal(&guest);
                }
            }
            None => thread::yield_now(),
        }
    }
    worker.join().unwrap();
}
