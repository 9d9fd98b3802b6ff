// SPDX-License-Identifier: GPL-2.0

//! Drives the host as a guest would, over memory of its own and a fake platform.

mod guest;

use std::time::Duration;

use guest::{connected, Echo, Guest, NET, PCI, WAIT};
use hyperv_wire::vmbus::{
    ChannelId, GpadlCreated, GpadlHeader, GpadlTeardown, GpadlTorndown, MessageType,
    ModifyChannelResponse, OfferChannel, OpenChannel, OpenResult, TlConnectRequest,
    TlConnectResult, Version, VersionResponse,
};
use vm_memory::{Bytes, GuestAddress};
use vmbus_host::{hv_status, AddDeviceError, Config, GpadlError, Usage};

fn config(max_version: Version) -> Config {
    Config {
        max_version,
        ..Config::default()
    }
}

#[test]
fn the_newest_common_version_is_agreed() {
    for max_version in Version::ALL {
        let guest = Guest::new(config(max_version));
        let mut accepted = None;
        for version in Version::ALL {
            let v5 = version >= Version::V5_0;
            let status = guest.contact(version, if v5 { 4 } else { 1 });
            if v5 && max_version < Version::V5_0 {
                // Such a host does not know the connection.
                assert_eq!(status, hv_status::INVALID_CONNECTION_ID);
                continue;
            }
            assert_eq!(status, hv_status::SUCCESS);
            let response: VersionResponse = guest.expect(MessageType::VERSION_RESPONSE);
            assert_eq!(response.version_supported != 0, version <= max_version);
            if response.version_supported != 0 {
                let connection = response.message_connection_id.get();
                assert_eq!(connection == 1, !v5);
                accepted = Some(version);
                break;
            }
        }
        assert_eq!(accepted, Some(max_version));
        assert!(guest.wait_usage(|usage| usage.version == Some(max_version)));
        guest.assert_protocol_errors(0);
    }
}

#[test]
fn odd_contacts_are_refused() {
    let guest = Guest::new(config(Version::V5_3));
    // Versions that do not exist, or are too old.
    for version in [
        Version(0),
        Version::new(0, 13),
        Version::new(1, 1),
        Version::new(4, 2),
    ] {
        guest.contact(version, 1);
        let response: VersionResponse = guest.expect(MessageType::VERSION_RESPONSE);
        assert_eq!(response.version_supported, 0, "{version}");
    }
    guest.assert_protocol_errors(0);
    // Version and connection do not go together.
    for (version, connection) in [(Version::V5_0, 1), (Version::V4_1, 4)] {
        guest.contact(version, connection);
        let response: VersionResponse = guest.expect(MessageType::VERSION_RESPONSE);
        assert_eq!(response.version_supported, 0, "{version}");
    }
    guest.assert_protocol_errors(2);
    // There are two processors and SINTs 1 to 15: nowhere to answer to.
    guest.contact_at(Version::V5_3, 4, 2, 2);
    guest.contact_at(Version::V5_3, 4, 0, 16);
    guest.contact_at(Version::V5_3, 4, 0, 0);
    guest.assert_protocol_errors(5);
    guest.expect_nothing();

    // Answers go where the guest wants them.
    guest.contact_at(Version::V5_3, 4, 1, 5);
    let response: VersionResponse = guest.expect_at(MessageType::VERSION_RESPONSE, 1, 5);
    assert_eq!(response.version_supported, 1);
}

#[test]
fn hypercalls_check_their_arguments() {
    let guest = connected(Version::V5_3);
    let host = &guest.host;
    assert_eq!(
        host.post_message(9, 1, &[0; 8]),
        hv_status::INVALID_CONNECTION_ID
    );
    assert_eq!(
        host.post_message(0, 1, &[0; 8]),
        hv_status::INVALID_CONNECTION_ID
    );
    assert_eq!(
        host.post_message(1, 2, &[0; 8]),
        hv_status::INVALID_PARAMETER
    );
    assert_eq!(
        host.post_message(1, 1, &[0; 241]),
        hv_status::INVALID_PARAMETER
    );
    assert_eq!(host.signal_event(0x2001, 1), hv_status::INVALID_PARAMETER);
    assert_eq!(
        host.signal_event(0x2001, 0),
        hv_status::INVALID_CONNECTION_ID
    );
    assert_eq!(host.signal_event(2, 0), hv_status::INVALID_CONNECTION_ID);
    guest.assert_protocol_errors(0);
    // A connected guest of version 5 uses the connection it was given.
    host.post_message(1, 1, &[3, 0, 0, 0, 0, 0, 0, 0]);
    guest.assert_protocol_errors(1);
    guest.expect_nothing();
}

#[test]
fn a_channel_lives_and_dies() {
    for version in Version::ALL {
        let guest = connected(version);
        let device = guest.add(Echo::new("net0", NET));
        guest.send(MessageType::REQUEST_OFFERS, &());
        let offer: OfferChannel = guest.expect(MessageType::OFFER_CHANNEL);
        guest.expect_empty(MessageType::ALL_OFFERS_DELIVERED);
        assert_eq!(offer.instance, NET);
        assert_eq!(offer.relid.get(), 1);
        assert_eq!(offer.is_dedicated.get(), 1);
        assert_eq!(offer.monitor_allocated, 0);
        assert_eq!(offer.connection_id.get(), 0x2001);

        for round in 0..50 {
            let mut ring = guest.open(&offer, round % 2);
            for n in 0..20_u8 {
                ring.send(&guest, u64::from(n), &[n; 16]);
                assert_eq!(ring.recv(), (u64::from(n), vec![n; 16]));
            }
            // The device interrupts the processor that the open named.
            assert!(guest.events().contains(&(round % 2, 2, 1)));
            assert_eq!(
                guest.usage(),
                Usage {
                    version: Some(version),
                    offered: 1,
                    open: 1,
                    unreleased: 0,
                    gpadls: 1,
                }
            );
            guest.close(ring);
            assert_eq!(device.log(), ["open 0", "close 0"]);
            assert_eq!(guest.usage().open, 0);
            assert_eq!(guest.usage().gpadls, 0);
        }
        guest.assert_protocol_errors(0);
    }
}

#[test]
fn offers_are_for_connected_guests_that_ask() {
    let guest = Guest::new(Config::default());
    guest.add(Echo::new("net0", NET));
    guest.expect_nothing();
    guest.connect(Version::V6_0);
    guest.expect_nothing();
    guest.send(MessageType::REQUEST_OFFERS, &());
    guest.expect::<OfferChannel>(MessageType::OFFER_CHANNEL);
    guest.expect_empty(MessageType::ALL_OFFERS_DELIVERED);

    // Hot-added.
    guest.add(Echo::new("vpci0", PCI));
    let offer: OfferChannel = guest.expect(MessageType::OFFER_CHANNEL);
    assert_eq!((offer.instance, offer.relid.get()), (PCI, 2));
    assert_eq!(
        guest.host.add_device(Echo::new("again", PCI)),
        Err(AddDeviceError::DuplicateInstance(PCI))
    );
    guest.assert_protocol_errors(0);
    guest.send(MessageType::REQUEST_OFFERS, &());
    guest.assert_protocol_errors(1);
    guest.expect_nothing();
}

#[test]
fn rescind_and_offer_again() {
    let guest = connected(Version::V5_3);
    guest.add(Echo::new("net0", NET));
    let offer = guest.request_offers().remove(0);

    for round in 0..20 {
        let ring = guest.open(&offer, 0);
        guest.establish(1, 0x900, &[40, 41], 8192);
        guest.host.remove_device(NET);
        let rescind: ChannelId = guest.expect(MessageType::RESCIND_CHANNEL_OFFER);
        assert_eq!(rescind.relid.get(), 1);
        // The host has let go before it said so.
        assert_eq!(guest.usage().open, 0);
        assert!(!guest.host.wait_removed(NET, Duration::from_millis(1)));

        // The successor waits for the release.
        guest.add(Echo::new("net0", NET));
        guest.expect_nothing();
        match round % 3 {
            // The guest had already begun to close.
            0 => guest.close(ring),
            // It only closes.
            1 => guest.send(MessageType::CLOSE_CHANNEL, &guest::channel_id(1)),
            // It does nothing.
            _ => {}
        }
        guest.send(MessageType::RELID_RELEASED, &guest::channel_id(1));
        assert!(guest.host.wait_removed(NET, WAIT));
        let again: OfferChannel = guest.expect(MessageType::OFFER_CHANNEL);
        assert_eq!((again.instance, again.relid.get()), (NET, 1));
        assert_eq!(guest.usage().gpadls, 0);
        assert_eq!(guest.usage().unreleased, 0);
    }
    guest.assert_protocol_errors(0);
}

#[test]
fn messages_that_cross_a_rescind_are_no_errors() {
    let guest = connected(Version::V5_3);
    guest.add(Echo::new("net0", NET));
    let offer = guest.request_offers().remove(0);
    guest.establish(1, 0x900, &[40, 41, 42, 43], 16384);
    guest.host.remove_device(NET);
    guest.expect::<ChannelId>(MessageType::RESCIND_CHANNEL_OFFER);

    // The rescind ends these waits of the guest, so the host may be silent.
    guest.send(
        MessageType::OPEN_CHANNEL,
        &guest::open_message(&offer, 0x900, 2, 0),
    );
    guest.gpadl(1, 0x901, &[50], 4096);
    guest.expect_nothing();
    guest.send(
        MessageType::GPADL_TEARDOWN,
        &GpadlTeardown {
            relid: 1.into(),
            gpadl: 0x900.into(),
        },
    );
    guest.expect::<GpadlTorndown>(MessageType::GPADL_TORNDOWN);
    guest.assert_protocol_errors(0);
    guest.send(MessageType::RELID_RELEASED, &guest::channel_id(1));
    assert!(guest.host.wait_removed(NET, WAIT));
    assert!(guest.wait_usage(|usage| usage.offered + usage.unreleased + usage.gpadls == 0));
}

#[test]
fn removing_a_device_that_is_not_offered_is_quiet() {
    let guest = connected(Version::V5_3);
    guest.add(Echo::new("net0", NET));
    guest.host.remove_device(NET);
    guest.host.remove_device(PCI);
    assert!(guest.host.wait_removed(NET, WAIT));
    assert!(guest.request_offers().is_empty());
    // A successor may be added before the removal is carried out.
    for _ in 0..50 {
        guest.add(Echo::new("net0", NET));
        guest.host.remove_device(NET);
        guest.add(Echo::new("net0", NET));
        guest.expect::<OfferChannel>(MessageType::OFFER_CHANNEL);
        let relid: ChannelId = guest.expect(MessageType::RESCIND_CHANNEL_OFFER);
        guest.send(MessageType::RELID_RELEASED, &relid);
        guest.expect::<OfferChannel>(MessageType::OFFER_CHANNEL);
        guest.host.remove_device(NET);
        let relid: ChannelId = guest.expect(MessageType::RESCIND_CHANNEL_OFFER);
        guest.send(MessageType::RELID_RELEASED, &relid);
        assert!(guest.host.wait_removed(NET, WAIT));
    }
    guest.assert_protocol_errors(0);
}

#[test]
fn subchannels_follow_their_primary_channel() {
    let guest = connected(Version::V6_0);
    let device = guest.add(Echo::new("net0", NET));
    let offer = guest.request_offers().remove(0);
    // Nothing to attach them to.
    guest.host.offer_subchannels(NET, 2);
    guest.expect_nothing();

    for _ in 0..3 {
        let primary = guest.open(&offer, 0);
        guest.host.offer_subchannels(NET, 3);
        let offers: Vec<OfferChannel> = (0..3)
            .map(|_| guest.expect(MessageType::OFFER_CHANNEL))
            .collect();
        for (offer, index) in offers.iter().zip(1..) {
            assert_eq!((offer.instance, offer.subchannel_index.get()), (NET, index));
            assert_eq!(offer.relid.get(), u32::from(index) + 1);
        }
        // What is offered is not offered twice.
        guest.host.offer_subchannels(NET, 3);
        guest.expect_nothing();

        let mut first = guest.open(&offers[0], 1);
        let second = guest.open(&offers[1], 0);
        assert_eq!(
            guest.memory_of(&device, 2).name(),
            "net0.2",
            "names tell subchannels apart"
        );
        first.send(&guest, 1, b"subchann");
        assert_eq!(first.recv(), (1, b"subchann".to_vec()));
        assert_eq!(guest.usage().open, 3);

        // As the Linux driver does: subchannels first. The second one is left open here.
        guest.close(first);
        guest.send(MessageType::CLOSE_CHANNEL, &guest::channel_id(1));
        for relid in [2, 3, 4] {
            let rescind: ChannelId = guest.expect(MessageType::RESCIND_CHANNEL_OFFER);
            assert_eq!(rescind.relid.get(), relid);
        }
        guest.tear_down(&primary);
        guest.tear_down(&second);
        for relid in [2, 3, 4] {
            guest.send(MessageType::RELID_RELEASED, &guest::channel_id(relid));
        }
        assert!(guest.wait_usage(|usage| *usage
            == Usage {
                version: Some(Version::V6_0),
                offered: 1,
                ..Usage::default()
            }));
        assert_eq!(
            device.log(),
            ["open 0", "open 1", "open 2", "close 1", "close 0", "close 2"]
        );
    }
    guest.assert_protocol_errors(0);

    // Removal rescinds the subchannels first.
    let _primary = guest.open(&offer, 0);
    guest.host.offer_subchannels(NET, 1);
    guest.expect::<OfferChannel>(MessageType::OFFER_CHANNEL);
    guest.host.remove_device(NET);
    for relid in [2, 1] {
        let rescind: ChannelId = guest.expect(MessageType::RESCIND_CHANNEL_OFFER);
        assert_eq!(rescind.relid.get(), relid);
    }
}

#[test]
fn unload_and_new_contact_free_everything() {
    let guest = connected(Version::V5_3);
    let net = guest.add(Echo::new("net0", NET));
    guest.add(Echo::new("vpci0", PCI));
    for round in 0..6 {
        let offers = guest.request_offers();
        assert_eq!(offers.len(), 2);
        let _ring = guest.open(&offers[0], 0);
        guest.establish(offers[1].relid.get(), 0x900, &[40], 4096);
        guest.gpadl_begin(offers[1].relid.get(), 0x901, 100);
        match round % 3 {
            0 => {
                guest.send(MessageType::UNLOAD, &());
                guest.expect_empty(MessageType::UNLOAD_RESPONSE);
            }
            1 => {}
            _ => guest.host.reset(),
        }
        guest.connect(Version::V5_3);
        assert_eq!(
            guest.usage(),
            Usage {
                version: Some(Version::V5_3),
                ..Usage::default()
            }
        );
        assert_eq!(net.log(), ["open 0", "close 0"]);
    }
    // Without a connection there is nothing to unload and nothing to ask for.
    guest.host.reset();
    guest.assert_protocol_errors(0);
    assert_eq!(
        guest.host.post_message(1, 1, &[16, 0, 0, 0, 0, 0, 0, 0]),
        hv_status::SUCCESS
    );
    guest.assert_protocol_errors(1);
    guest.expect_nothing();
    guest.host.shutdown();
    // Even then nothing breaks.
    guest.host.reset();
    guest.host.remove_device(NET);
}

#[test]
fn opens_are_checked() {
    let guest = connected(Version::V5_3);
    guest.add(Echo::new("net0", NET));
    guest.add(Echo::new("vpci0", PCI));
    let offers = guest.request_offers();
    guest.establish(1, 0x900, &[40, 41, 42, 43], 16384);
    guest.establish(1, 0x901, &[44, 45], 4097);
    guest.establish(2, 0x902, &[46, 47, 48, 49], 16384);

    let good = guest::open_message(&offers[0], 0x900, 2, 0);
    let mut errors = 0;
    for (what, message) in [
        (
            "relid",
            OpenChannel {
                relid: 9.into(),
                ..good
            },
        ),
        (
            "gpadl",
            OpenChannel {
                ring_gpadl: 0x999.into(),
                ..good
            },
        ),
        (
            "other channel's gpadl",
            OpenChannel {
                ring_gpadl: 0x902.into(),
                ..good
            },
        ),
        (
            "half page",
            OpenChannel {
                ring_gpadl: 0x901.into(),
                ..good
            },
        ),
        (
            "no upstream",
            OpenChannel {
                downstream_page_offset: 0.into(),
                ..good
            },
        ),
        (
            "no upstream data",
            OpenChannel {
                downstream_page_offset: 1.into(),
                ..good
            },
        ),
        (
            "no downstream data",
            OpenChannel {
                downstream_page_offset: 3.into(),
                ..good
            },
        ),
        (
            "no downstream",
            OpenChannel {
                downstream_page_offset: 4.into(),
                ..good
            },
        ),
        (
            "far away",
            OpenChannel {
                downstream_page_offset: u32::MAX.into(),
                ..good
            },
        ),
        (
            "processor",
            OpenChannel {
                target_vp: 2.into(),
                ..good
            },
        ),
    ] {
        guest.send(MessageType::OPEN_CHANNEL, &message);
        let result: OpenResult = guest.expect(MessageType::OPEN_CHANNEL_RESULT);
        assert_ne!(result.status.get(), 0, "{what}");
        assert_eq!(
            (result.relid, result.open_id),
            (message.relid, message.open_id)
        );
        errors += 1;
        guest.assert_protocol_errors(errors);
        assert_eq!(guest.usage().open, 0);
    }
    // Indices that are not within the rings.
    for word in [0, 4] {
        for page in [40, 42] {
            let place = GuestAddress(page * 4096 + word);
            guest.memory.write_obj(4096_u32, place).unwrap();
            guest.send(MessageType::OPEN_CHANNEL, &good);
            let result: OpenResult = guest.expect(MessageType::OPEN_CHANNEL_RESULT);
            // The host's own ends are the upstream read index and the downstream write index.
            let own = (word == 4) == (page == 40);
            assert_eq!(result.status.get() != 0, own);
            errors += u64::from(own);
            if !own {
                guest.send(MessageType::CLOSE_CHANNEL, &guest::channel_id(1));
            }
            guest.assert_protocol_errors(errors);
            guest.memory.write_obj(0_u32, place).unwrap();
        }
    }

    guest.send(MessageType::OPEN_CHANNEL, &good);
    let result: OpenResult = guest.expect(MessageType::OPEN_CHANNEL_RESULT);
    assert_eq!(result.status.get(), 0);
    guest.send(MessageType::OPEN_CHANNEL, &good);
    let result: OpenResult = guest.expect(MessageType::OPEN_CHANNEL_RESULT);
    assert_ne!(result.status.get(), 0);
    guest.assert_protocol_errors(errors + 1);
    assert_eq!(guest.usage().open, 1);

    // A ring taken away under an open channel ends the channel.
    guest.send(
        MessageType::GPADL_TEARDOWN,
        &GpadlTeardown {
            relid: 1.into(),
            gpadl: 0x900.into(),
        },
    );
    guest.expect::<GpadlTorndown>(MessageType::GPADL_TORNDOWN);
    guest.assert_protocol_errors(errors + 2);
    assert_eq!(guest.usage().open, 0);
}

#[test]
fn a_device_may_refuse_to_open() {
    let guest = connected(Version::V5_3);
    let device = guest.add(Echo::new("net0", NET));
    let offer = guest.request_offers().remove(0);
    device.refuse(true);
    guest.establish(1, 0x900, &[40, 41, 42, 43], 16384);
    let message = guest::open_message(&offer, 0x900, 2, 0);
    guest.send(MessageType::OPEN_CHANNEL, &message);
    let result: OpenResult = guest.expect(MessageType::OPEN_CHANNEL_RESULT);
    assert_ne!(result.status.get(), 0);
    assert_eq!(guest.usage().open, 0);
    device.refuse(false);
    guest.send(MessageType::OPEN_CHANNEL, &message);
    let result: OpenResult = guest.expect(MessageType::OPEN_CHANNEL_RESULT);
    assert_eq!(result.status.get(), 0);
    assert_eq!(device.log(), ["open 0"]);
    guest.assert_protocol_errors(0);
}

#[test]
fn gpadls_are_assembled_of_bodies() {
    let guest = connected(Version::V5_3);
    let device = guest.add(Echo::new("net0", NET));
    let offer = guest.request_offers().remove(0);
    let ring = guest.open(&offer, 0);

    // 26 page numbers fit into the header, 28 into each body.
    for pages in [1, 25, 26, 27, 53, 54, 55, 300] {
        let pfns: Vec<u64> = (0..pages).map(|n| 100 + (n * 7) % pages).collect();
        guest.establish(1, 0x900, &pfns, pages as u32 * 4096);
        let gpadl = guest.memory_of(&device, 0).gpadl(0x900).unwrap();
        assert_eq!((gpadl.id(), gpadl.len()), (0x900, pages * 4096));
        let last = pages * 4096 - 1;
        gpadl.write_at(last, &[0x5a]).unwrap();
        let place = GuestAddress(pfns[pages as usize - 1] * 4096 + 4095);
        assert_eq!(guest.memory.read_obj::<u8>(place).unwrap(), 0x5a);
        assert!(gpadl.write_at(last, &[0; 2]).is_err());
        assert!(gpadl.read_at(u64::MAX, &mut [0]).is_err());

        guest.send(
            MessageType::GPADL_TEARDOWN,
            &GpadlTeardown {
                relid: 1.into(),
                gpadl: 0x900.into(),
            },
        );
        guest.expect::<GpadlTorndown>(MessageType::GPADL_TORNDOWN);
        // The device still holds it, but the memory is the guest's again.
        assert_eq!(gpadl.write_at(0, &[0]), Err(GpadlError::TornDown));
        assert!(guest.memory_of(&device, 0).gpadl(0x900).is_none());
    }
    guest.assert_protocol_errors(0);
    guest.close(ring);
}

#[test]
fn bad_gpadls_are_refused() {
    let guest = connected(Version::V5_3);
    guest.add(Echo::new("net0", NET));
    guest.request_offers();
    let refused = |errors| {
        let created: GpadlCreated = guest.expect(MessageType::GPADL_CREATED);
        assert_ne!(created.status.get(), 0);
        guest.assert_protocol_errors(errors);
        assert_eq!(guest.usage().gpadls, 0);
    };

    // Unknown channel.
    guest.gpadl(7, 0x900, &[40], 4096);
    refused(1);
    // Memory that does not exist.
    guest.gpadl(1, 0x900, &[40, 1 << 40], 8192);
    refused(2);
    // Fewer page numbers than bytes, no bytes, offset outside of the page.
    guest.gpadl(1, 0x900, &[40], 4097);
    refused(3);
    guest.gpadl(1, 0x900, &[40], 0);
    refused(4);
    let header = |ranges: u16, length: u16| GpadlHeader {
        relid: 1.into(),
        gpadl: 0x900.into(),
        range_buffer_len: length.into(),
        range_count: ranges.into(),
    };
    guest.send_with(MessageType::GPADL_HEADER, &header(1, 16), &[0xff; 16]);
    refused(5);
    // No range, and nothing at all.
    guest.send_with(MessageType::GPADL_HEADER, &header(0, 16), &[0; 16]);
    refused(6);
    guest.send_with(MessageType::GPADL_HEADER, &header(0, 0), &[]);
    refused(7);
    guest.send_with(MessageType::GPADL_HEADER, &header(1, 0), &[]);
    refused(8);
    // More bytes than announced, in the header and in a body.
    guest.send_with(MessageType::GPADL_HEADER, &header(1, 16), &[0; 24]);
    refused(9);
    guest.gpadl_begin(1, 0x900, 28);
    guest.gpadl_body(0x900, &[0; 28]);
    guest.gpadl_body(0x900, &[0; 28]);
    refused(10);
    // The rest of a refused one belongs to nothing.
    guest.gpadl_body(0x900, &[0; 28]);
    guest.assert_protocol_errors(11);
    guest.expect_nothing();

    // An id in use, complete or not.
    guest.establish(1, 0x900, &[40], 4096);
    guest.gpadl_begin(1, 0x901, 28);
    for id in [0x900, 0x901] {
        guest.gpadl(1, id, &[41], 4096);
        let created: GpadlCreated = guest.expect(MessageType::GPADL_CREATED);
        assert_ne!(created.status.get(), 0);
    }
    guest.assert_protocol_errors(13);
    assert_eq!(guest.usage().gpadls, 1);
    // Teardown of one that does not exist is answered, or the guest would wait for ever.
    guest.send(
        MessageType::GPADL_TEARDOWN,
        &GpadlTeardown {
            relid: 1.into(),
            gpadl: 0x999.into(),
        },
    );
    guest.expect::<GpadlTorndown>(MessageType::GPADL_TORNDOWN);
    guest.assert_protocol_errors(14);
}

#[test]
fn gpadls_of_hidden_pages_are_refused() {
    let guest = connected(Version::V5_3);
    guest.add(Echo::new("net0", NET));
    guest.request_offers();
    guest.hide(42);
    guest.gpadl(1, 0x900, &[41, 42], 8192);
    let created: GpadlCreated = guest.expect(MessageType::GPADL_CREATED);
    assert_ne!(created.status.get(), 0);
    guest.assert_protocol_errors(1);
    assert_eq!(guest.usage().gpadls, 0);
    guest.hide(43);
    guest.establish(1, 0x900, &[41, 42], 8192);
    guest.assert_protocol_errors(1);
}

#[test]
fn channels_move_to_another_processor() {
    for version in Version::ALL {
        let guest = connected(version);
        guest.add(Echo::new("net0", NET));
        let offer = guest.request_offers().remove(0);
        let mut ring = guest.open(&offer, 0);
        guest.events();
        for (vp, sound) in [(1, true), (0, true), (1, true), (2, false)] {
            guest.send(
                MessageType::MODIFY_CHANNEL,
                &hyperv_wire::vmbus::ModifyChannel {
                    relid: 1.into(),
                    target_vp: vp.into(),
                },
            );
            if version >= Version::V5_3 {
                let response: ModifyChannelResponse =
                    guest.expect(MessageType::MODIFY_CHANNEL_RESPONSE);
                assert_eq!(response.status.get() == 0, sound);
            } else {
                guest.expect_nothing();
            }
        }
        let errors = if version >= Version::V4_1 { 1 } else { 4 };
        guest.assert_protocol_errors(errors);
        ring.send(&guest, 1, &[0; 8]);
        ring.recv();
        let vp = u32::from(version >= Version::V4_1);
        assert_eq!(guest.events(), [(vp, 2, 1)], "{version}");
    }
}

#[test]
fn marked_channels_are_woken_through_the_interrupt_page() {
    let guest = Guest::new(Config {
        dedicated_interrupts: false,
        ..config(Version::V4_1)
    });
    guest.connect(Version::V4_1);
    guest.add(Echo::new("net0", NET));
    guest.add(Echo::new("vpci0", PCI));
    let offers = guest.request_offers();
    assert_eq!(offers[0].is_dedicated.get(), 0);
    assert_eq!(offers[0].connection_id.get(), 2);
    let mut rings: Vec<_> = offers.iter().map(|offer| guest.open(offer, 0)).collect();
    for (n, ring) in rings.iter_mut().enumerate() {
        ring.send_marked(&guest, n as u64, &[0; 8]);
        assert_eq!(ring.recv(), (n as u64, vec![0; 8]));
    }
    // Marks of channels that do not exist do no harm.
    guest.mark(2047);
    assert_eq!(guest.host.signal_event(2, 0), hv_status::SUCCESS);
    assert_eq!(guest.marks(), 0);
}

#[test]
fn sockets_are_refused() {
    let guest = connected(Version::V6_0);
    guest.send(
        MessageType::TL_CONNECT_REQUEST,
        &TlConnectRequest {
            endpoint: NET,
            service: PCI,
        },
    );
    let result: TlConnectResult = guest.expect(MessageType::TL_CONNECT_RESULT);
    assert_eq!((result.endpoint, result.service), (NET, PCI));
    assert_ne!(result.status.get(), 0);
}

#[test]
fn short_messages_are_errors() {
    let guest = connected(Version::V6_0);
    guest.add(Echo::new("net0", NET));
    guest.request_offers();
    let mut errors = 0;
    for message_type in [
        MessageType::OPEN_CHANNEL,
        MessageType::CLOSE_CHANNEL,
        MessageType::GPADL_HEADER,
        MessageType::GPADL_BODY,
        MessageType::GPADL_TEARDOWN,
        MessageType::RELID_RELEASED,
        MessageType::MODIFY_CHANNEL,
        MessageType::TL_CONNECT_REQUEST,
        // And types that a guest does not send.
        MessageType(0),
        MessageType::OFFER_CHANNEL,
        MessageType::VERSION_RESPONSE,
        MessageType::OPEN_RESERVED_CHANNEL,
        MessageType::PAUSE,
        MessageType(u32::MAX),
    ] {
        guest.send(message_type, &());
        errors += 1;
        guest.assert_protocol_errors(errors);
    }
    assert_eq!(guest.post(&[]), hv_status::SUCCESS);
    guest.post(&[3; 7]);
    guest.assert_protocol_errors(errors + 2);
    guest.expect_nothing();
    assert_eq!(guest.usage().offered, 1);
}

#[test]
fn any_sequence_of_messages_leaves_the_host_usable() {
    let guest = connected(Version::V6_0);
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    guest.add(Echo::new("net0", NET));
    guest.add(Echo::new("vpci0", PCI));
    for _ in 0..20_000 {
        let mut message = [0_u8; 240];
        for word in message[8..].chunks_exact_mut(4) {
            // Small numbers are what relids, ids, counts and page numbers are made of.
            let value = match next() % 4 {
                0 => next() as u32,
                1 => 0,
                _ => (next() % 6) as u32,
            };
            word.copy_from_slice(&value.to_le_bytes());
        }
        message[0] = (next() % 26) as u8;
        if message[0] == 15 {
            message[0] = MessageType::REQUEST_OFFERS.0 as u8;
        }
        let length = match next() % 3 {
            0 => 240,
            1 => (next() % 241) as usize,
            _ => 8 + 4 * (next() % 16) as usize,
        };
        while guest.post(&message[..length]) == hv_status::INSUFFICIENT_BUFFERS {
            std::thread::yield_now();
        }
        guest.host.signal_event(0x2000 + (next() % 4) as u32, 0);
        if next() % 1000 == 0 {
            guest.host.offer_subchannels(NET, (next() % 5) as u16);
        }
        if guest.usage().version.is_none() {
            guest.contact(Version::V6_0, 4);
        }
        guest.discard();
    }
    guest.host.reset();
    guest.discard();
    guest.connect(Version::V6_0);
    let offers = guest.request_offers();
    let mut ring = guest.open(&offers[0], 0);
    ring.send(&guest, 3, &[9; 8]);
    assert_eq!(ring.recv(), (3, vec![9; 8]));
}

#[test]
fn the_log_has_a_line_for_each_message() {
    let guest = connected(Version::V5_3);
    guest.add(Echo::new("net0", NET));
    guest.request_offers();
    let lines = guest.log.since(0).lines;
    for (line, text) in lines.iter().zip([
        "guest>host vmbus INITIATE_CONTACT version=5.3 target_vp=0 sint=2 vtl=0",
        "host>guest vmbus VERSION_RESPONSE supported=1 state=0 connection=0x104",
        "guest>host vmbus REQUEST_OFFERS",
        "host>guest vmbus OFFER_CHANNEL relid=1 class=f8615163-df3e-46c5-913f-f2d2f965ed0e",
        "host>guest vmbus ALL_OFFERS_DELIVERED",
    ]) {
        assert!(line.contains(text), "{line}");
    }
    assert_eq!(lines.len(), 5);
    let counters = guest.counters.snapshot();
    assert_eq!(counters["vmbus.messages.in"], 2);
    assert_eq!(counters["vmbus.messages.out"], 3);
    let zeroed = OfferChannel::default();
    assert_eq!(zeroed.relid.get(), 0);
}
