/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The tracepoints of hv_netvsc, trace system "netvsc".  Names, fields and print
 * formats are those of the kernel's own driver: tools that read these events
 * must not see which of the two is loaded.
 */

#undef TRACE_SYSTEM
#define TRACE_SYSTEM netvsc

#if !defined(_HYPERV_NETVSC_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define _HYPERV_NETVSC_TRACE_H

#include <linux/netdevice.h>
#include <linux/rndis.h>
#include <linux/tracepoint.h>

/* Commas before a brace are part of the print formats. */
#define netvsc_rndis_name(type)						\
	__print_symbolic(type,						\
			 { RNDIS_MSG_PACKET, "PACKET" },		\
			 { RNDIS_MSG_INDICATE, "INDICATE", },		\
			 { RNDIS_MSG_INIT, "INIT", },			\
			 { RNDIS_MSG_INIT_C, "INIT_C", },		\
			 { RNDIS_MSG_HALT, "HALT", },			\
			 { RNDIS_MSG_QUERY, "QUERY", },			\
			 { RNDIS_MSG_QUERY_C, "QUERY_C", },		\
			 { RNDIS_MSG_SET, "SET", },			\
			 { RNDIS_MSG_SET_C, "SET_C", },			\
			 { RNDIS_MSG_RESET, "RESET", },			\
			 { RNDIS_MSG_RESET_C, "RESET_C", },		\
			 { RNDIS_MSG_KEEPALIVE, "KEEPALIVE", },		\
			 { RNDIS_MSG_KEEPALIVE_C, "KEEPALIVE_C", })

/* The numbers are those of hyperv_wire::nvsp::MessageType. */
#define netvsc_nvsp_name(type)						\
	__print_symbolic(type,						\
			 { 1, "INIT" },					\
			 { 2, "INIT_COMPLETE" },			\
			 { 100, "SEND_NDIS_VER" },			\
			 { 101, "SEND_RECV_BUF" },			\
			 { 102, "SEND_RECV_BUF_COMPLETE" },		\
			 { 103, "REVOKE_RECV_BUF" },			\
			 { 104, "SEND_SEND_BUF" },			\
			 { 105, "SEND_SEND_BUF_COMPLETE" },		\
			 { 106, "REVOKE_SEND_BUF" },			\
			 { 107, "SEND_RNDIS_PKT" },			\
			 { 108, "SEND_RNDIS_PKT_COMPLETE" },		\
			 { 125, "SEND_NDIS_CONFIG" },			\
			 { 128, "SEND_VF_ASSOCIATION" },		\
			 { 129, "SWITCH_DATA_PATH" },			\
			 { 133, "SUBCHANNEL" },				\
			 { 134, "SEND_INDIRECTION_TABLE" })

DECLARE_EVENT_CLASS(rndis_msg_class,
	TP_PROTO(const struct net_device *dev, u16 queue, u32 req_id, u32 msg_type, u32 msg_len),
	TP_ARGS(dev, queue, req_id, msg_type, msg_len),
	TP_STRUCT__entry(
		__string(name, dev->name)
		__field(u16, queue)
		__field(u32, req_id)
		__field(u32, msg_type)
		__field(u32, msg_len)
	),
	TP_fast_assign(
		__assign_str(name);
		__entry->queue = queue;
		__entry->req_id = req_id;
		__entry->msg_type = msg_type;
		__entry->msg_len = msg_len;
	),
	TP_printk("dev=%s q=%u req=%#x type=%s msg_len=%u",
		  __get_str(name), __entry->queue, __entry->req_id,
		  netvsc_rndis_name(__entry->msg_type), __entry->msg_len)
);

DEFINE_EVENT(rndis_msg_class, rndis_send,
	TP_PROTO(const struct net_device *dev, u16 queue, u32 req_id, u32 msg_type, u32 msg_len),
	TP_ARGS(dev, queue, req_id, msg_type, msg_len)
);

DEFINE_EVENT(rndis_msg_class, rndis_recv,
	TP_PROTO(const struct net_device *dev, u16 queue, u32 req_id, u32 msg_type, u32 msg_len),
	TP_ARGS(dev, queue, req_id, msg_type, msg_len)
);

TRACE_EVENT(nvsp_send,
	TP_PROTO(const struct net_device *dev, u32 msg_type),
	TP_ARGS(dev, msg_type),
	TP_STRUCT__entry(
		__string(name, dev->name)
		__field(u32, msg_type)
	),
	TP_fast_assign(
		__assign_str(name);
		__entry->msg_type = msg_type;
	),
	TP_printk("dev=%s type=%s",
		  __get_str(name), netvsc_nvsp_name(__entry->msg_type))
);

TRACE_EVENT(nvsp_send_pkt,
	TP_PROTO(const struct net_device *dev, u16 qid, u32 channel_type, u32 section_index,
		 u32 section_size),
	TP_ARGS(dev, qid, channel_type, section_index, section_size),
	TP_STRUCT__entry(
		__string(name, dev->name)
		__field(u16, qid)
		__field(u32, channel_type)
		__field(u32, section_index)
		__field(u32, section_size)
	),
	TP_fast_assign(
		__assign_str(name);
		__entry->qid = qid;
		__entry->channel_type = channel_type;
		__entry->section_index = section_index;
		__entry->section_size = section_size;
	),
	TP_printk("dev=%s qid=%u type=%s section=%u size=%d",
		  __get_str(name), __entry->qid, __entry->channel_type ? "CONTROL" : "DATA",
		  __entry->section_index, __entry->section_size)
);

TRACE_EVENT(nvsp_recv,
	TP_PROTO(const struct net_device *dev, u16 qid, u32 msg_type),
	TP_ARGS(dev, qid, msg_type),
	TP_STRUCT__entry(
		__string(name, dev->name)
		__field(u16, qid)
		__field(u32, msg_type)
	),
	TP_fast_assign(
		__assign_str(name);
		__entry->qid = qid;
		__entry->msg_type = msg_type;
	),
	TP_printk("dev=%s qid=%u type=%s",
		  __get_str(name), __entry->qid, netvsc_nvsp_name(__entry->msg_type))
);

#endif /* _HYPERV_NETVSC_TRACE_H */

#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE netvsc_trace
#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#include <trace/define_trace.h>
