// SPDX-License-Identifier: GPL-2.0
/*
 * XDP programs for the scenario "xdp".  One for each verdict, and some to see
 * that a frame's buffer has the room it must have.
 *
 *   ip link set dev eth0 xdpdrv obj /usr/lib/bpf/xdp.o program drop
 *
 * Those that would cut off the guest decide about the frames of lab-agent only,
 * which have the first EtherType for local experiments, and pass all others.
 */

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define ETH_P_LOCAL 0x88b5

/* The interfaces that the scenario makes or finds under these numbers. */
#define ETH0 2
#define VETH 77
/* The VLAN of the peer. */
#define TAG 100

static __always_inline int is_ours(struct xdp_md *ctx)
{
	struct ethhdr *eth = (void *)(long)ctx->data;

	if ((void *)(eth + 1) > (void *)(long)ctx->data_end)
		return 0;
	return eth->h_proto == bpf_htons(ETH_P_LOCAL);
}

SEC("xdp")
int pass(struct xdp_md *ctx)
{
	return XDP_PASS;
}

SEC("xdp")
int drop(struct xdp_md *ctx)
{
	return is_ours(ctx) ? XDP_DROP : XDP_PASS;
}

SEC("xdp")
int aborted(struct xdp_md *ctx)
{
	return is_ours(ctx) ? XDP_ABORTED : XDP_PASS;
}

/* A verdict that there is not. */
SEC("xdp")
int unknown(struct xdp_md *ctx)
{
	return is_ours(ctx) ? 99 : XDP_PASS;
}

/* Back to where it came from. */
SEC("xdp")
int tx(struct xdp_md *ctx)
{
	struct ethhdr *eth = (void *)(long)ctx->data;
	unsigned char address[ETH_ALEN];

	if (!is_ours(ctx) || (void *)(eth + 1) > (void *)(long)ctx->data_end)
		return XDP_PASS;
	__builtin_memcpy(address, eth->h_dest, ETH_ALEN);
	__builtin_memcpy(eth->h_dest, eth->h_source, ETH_ALEN);
	__builtin_memcpy(eth->h_source, address, ETH_ALEN);
	return XDP_TX;
}

SEC("xdp")
int to_veth(struct xdp_md *ctx)
{
	return is_ours(ctx) ? bpf_redirect(VETH, 0) : XDP_PASS;
}

SEC("xdp")
int to_eth0(struct xdp_md *ctx)
{
	return bpf_redirect(ETH0, 0);
}

/* With an 802.1Q tag in front of what it was. */
SEC("xdp")
int to_eth0_tagged(struct xdp_md *ctx)
{
	struct vlan_hdr {
		struct ethhdr eth;
		__be16 tci;
		__be16 protocol;
	} *tagged;
	struct ethhdr *eth = (void *)(long)ctx->data, old;

	if ((void *)(eth + 1) > (void *)(long)ctx->data_end)
		return XDP_ABORTED;
	old = *eth;
	if (bpf_xdp_adjust_head(ctx, -4))
		return XDP_ABORTED;
	tagged = (void *)(long)ctx->data;
	if ((void *)(tagged + 1) > (void *)(long)ctx->data_end)
		return XDP_ABORTED;
	tagged->eth = old;
	tagged->eth.h_proto = bpf_htons(ETH_P_8021Q);
	tagged->tci = bpf_htons(TAG);
	tagged->protocol = old.h_proto;
	return bpf_redirect(ETH0, 0);
}

/* There is no interface of that number. */
SEC("xdp")
int to_nowhere(struct xdp_md *ctx)
{
	return is_ours(ctx) ? bpf_redirect(9999, 0) : XDP_PASS;
}

/* Takes room before and behind the frame and gives it back: the frame stays as it is. */
SEC("xdp")
int room(struct xdp_md *ctx)
{
	if (!is_ours(ctx))
		return XDP_PASS;
	if (bpf_xdp_adjust_head(ctx, -192) || bpf_xdp_adjust_head(ctx, 192) ||
	    bpf_xdp_adjust_tail(ctx, 64) || bpf_xdp_adjust_tail(ctx, -64))
		return XDP_ABORTED;
	return XDP_PASS;
}

/* Leaves metadata before the frame. */
SEC("xdp")
int metadata(struct xdp_md *ctx)
{
	unsigned int *mark;

	if (!is_ours(ctx))
		return XDP_PASS;
	if (bpf_xdp_adjust_meta(ctx, -(int)sizeof(*mark)))
		return XDP_ABORTED;
	mark = (void *)(long)ctx->data_meta;
	if ((void *)(mark + 1) > (void *)(long)ctx->data)
		return XDP_ABORTED;
	*mark = 1;
	return XDP_PASS;
}

char _license[] SEC("license") = "GPL";
