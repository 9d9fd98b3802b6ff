// SPDX-License-Identifier: GPL-2.0

//! Control messages as log lines.

use hyperv_wire::vmbus::{
    self, ChannelId, GpadlBody, GpadlCreated, GpadlHeader, GpadlTeardown, GpadlTorndown,
    InitiateContact, MessageHeader, MessageType, ModifyChannel, ModifyChannelResponse,
    OfferChannel, OpenChannel, OpenResult, TlConnectRequest, TlConnectResult, TooShort, Version,
    VersionResponse,
};

/// Stands for the name of a message that has none.
const UNKNOWN: &str = "UNKNOWN";

/// Name and fields of a message.
pub(crate) fn describe(message: &[u8]) -> (&'static str, String) {
    match vmbus::parse::<MessageHeader>(message) {
        Ok((header, body)) => {
            let message_type = MessageType(header.message_type.get());
            let fields =
                fields(message_type, body).unwrap_or_else(|short| format!("truncated: {short}"));
            (message_type.name().unwrap_or(UNKNOWN), fields)
        }
        Err(short) => (UNKNOWN, format!("truncated: {short}")),
    }
}

/// Fields of a message of the given type.
fn fields(message_type: MessageType, body: &[u8]) -> Result<String, TooShort> {
    Ok(match message_type {
        MessageType::OFFER_CHANNEL => {
            let m = vmbus::parse::<OfferChannel>(body)?.0;
            format!(
                "relid={} class={} instance={} subchannel={} flags={:#x} mmio_mb={} \
                 dedicated={} connection={:#x}",
                m.relid,
                m.class,
                m.instance,
                m.subchannel_index,
                m.flags,
                m.mmio_megabytes,
                m.is_dedicated,
                m.connection_id
            )
        }
        MessageType::RESCIND_CHANNEL_OFFER
        | MessageType::CLOSE_CHANNEL
        | MessageType::RELID_RELEASED => {
            format!("relid={}", vmbus::parse::<ChannelId>(body)?.0.relid)
        }
        MessageType::OPEN_CHANNEL => {
            let m = vmbus::parse::<OpenChannel>(body)?.0;
            format!(
                "relid={} open_id={} ring_gpadl={:#x} target_vp={} downstream_page={}",
                m.relid, m.open_id, m.ring_gpadl, m.target_vp, m.downstream_page_offset
            )
        }
        MessageType::OPEN_CHANNEL_RESULT => {
            let m = vmbus::parse::<OpenResult>(body)?.0;
            format!(
                "relid={} open_id={} status={:#x}",
                m.relid, m.open_id, m.status
            )
        }
        MessageType::GPADL_HEADER => {
            let m = vmbus::parse::<GpadlHeader>(body)?.0;
            format!(
                "relid={} gpadl={:#x} ranges={} bytes={}",
                m.relid, m.gpadl, m.range_count, m.range_buffer_len
            )
        }
        MessageType::GPADL_BODY => {
            let (m, rest) = vmbus::parse::<GpadlBody>(body)?;
            format!(
                "gpadl={:#x} number={} bytes={}",
                m.gpadl,
                m.message_number,
                rest.len()
            )
        }
        MessageType::GPADL_CREATED => {
            let m = vmbus::parse::<GpadlCreated>(body)?.0;
            format!(
                "relid={} gpadl={:#x} status={:#x}",
                m.relid, m.gpadl, m.status
            )
        }
        MessageType::GPADL_TEARDOWN => {
            let m = vmbus::parse::<GpadlTeardown>(body)?.0;
            format!("relid={} gpadl={:#x}", m.relid, m.gpadl)
        }
        MessageType::GPADL_TORNDOWN => {
            format!("gpadl={:#x}", vmbus::parse::<GpadlTorndown>(body)?.0.gpadl)
        }
        MessageType::INITIATE_CONTACT => {
            let m = vmbus::parse::<InitiateContact>(body)?.0;
            let version = Version(m.version.get());
            let target = if version < Version::V5_0 {
                format!("interrupt_page={:#x}", m.interrupt_page_or_target)
            } else {
                format!(
                    "sint={} vtl={} features={:#x}",
                    m.message_sint(),
                    m.message_vtl(),
                    m.feature_flags()
                )
            };
            format!(
                "version={version} target_vp={} {target} monitor_pages={:#x},{:#x}",
                m.target_vp, m.monitor_page_to_guest, m.monitor_page_to_host
            )
        }
        MessageType::VERSION_RESPONSE => {
            let m = vmbus::parse::<VersionResponse>(body)?.0;
            format!(
                "supported={} state={} connection={:#x}",
                m.version_supported, m.connection_state, m.message_connection_id
            )
        }
        MessageType::TL_CONNECT_REQUEST => {
            let m = vmbus::parse::<TlConnectRequest>(body)?.0;
            format!("endpoint={} service={}", m.endpoint, m.service)
        }
        MessageType::TL_CONNECT_RESULT => {
            let m = vmbus::parse::<TlConnectResult>(body)?.0;
            format!(
                "endpoint={} service={} status={:#x}",
                m.endpoint, m.service, m.status
            )
        }
        MessageType::MODIFY_CHANNEL => {
            let m = vmbus::parse::<ModifyChannel>(body)?.0;
            format!("relid={} target_vp={}", m.relid, m.target_vp)
        }
        MessageType::MODIFY_CHANNEL_RESPONSE => {
            let m = vmbus::parse::<ModifyChannelResponse>(body)?.0;
            format!("relid={} status={:#x}", m.relid, m.status)
        }
        MessageType::REQUEST_OFFERS
        | MessageType::ALL_OFFERS_DELIVERED
        | MessageType::UNLOAD
        | MessageType::UNLOAD_RESPONSE => String::new(),
        other => format!("type={other} bytes={}", body.len()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyperv_wire::vmbus::MessageBuffer;

    #[test]
    fn every_length_of_every_message_has_a_line() {
        let bytes = [0xa5; vmbus::MAX_MESSAGE_LEN];
        for message_type in (0..32).map(MessageType) {
            let mut message = MessageBuffer::empty(message_type);
            message.push(&bytes[8..]).unwrap();
            for length in 0..=vmbus::MAX_MESSAGE_LEN {
                let (name, fields) = describe(&message.as_bytes()[..length]);
                assert!(length < 8 || name == message_type.name().unwrap_or(UNKNOWN));
                assert!(length >= 8 || fields.starts_with("truncated"));
            }
        }
    }

    #[test]
    fn fields_are_decoded() {
        let release =
            MessageBuffer::new(MessageType::RELID_RELEASED, &ChannelId { relid: 7.into() });
        assert_eq!(
            describe(release.unwrap().as_bytes()),
            ("RELID_RELEASED", "relid=7".to_owned())
        );
    }
}
