// SPDX-License-Identifier: GPL-2.0
/*
 * C inline functions and macros, made callable from Rust.  The prefix is not
 * "rust_helper_" because vmlinux exports functions of that name.
 *
 * One block for each crate that uses them.
 */

#include <asm/mshyperv.h>
#include <linux/acpi.h>
#include <linux/bpf_trace.h>
#include <linux/cpumask.h>
#include <linux/dma-mapping.h>
#include <linux/etherdevice.h>
#include <linux/filter.h>
#include <linux/hyperv.h>
#include <linux/if_vlan.h>
#include <linux/interrupt.h>
#include <linux/irq.h>
#include <linux/irqdomain.h>
#include <linux/jhash.h>
#include <linux/mmzone.h>
#include <linux/msi.h>
#include <linux/netdevice.h>
#include <linux/netpoll.h>
#include <linux/numa.h>
#include <linux/of_irq.h>
#include <linux/once.h>
#include <linux/pci.h>
#include <linux/percpu.h>
#include <linux/rtnetlink.h>
#include <linux/spinlock.h>
#include <linux/workqueue.h>
#include <net/flow_dissector.h>
#include <net/netdev_lock.h>
#include <net/page_pool/helpers.h>
#include <net/pkt_sched.h>
#include <net/sch_generic.h>
#include <net/sock.h>
#include <net/xdp.h>

/* vmbus */

void hyperv_helper_dma_set_min_align_mask(struct device *dev, unsigned int mask)
{
	dma_set_min_align_mask(dev, mask);
}

bool hyperv_helper_pfn_valid(unsigned long pfn)
{
	return pfn_valid(pfn);
}

unsigned long hyperv_helper_spin_lock_irqsave(spinlock_t *lock)
{
	unsigned long flags;

	spin_lock_irqsave(lock, flags);
	return flags;
}

bool hyperv_helper_spin_trylock_irqsave(spinlock_t *lock, unsigned long *flags)
{
	return spin_trylock_irqsave(lock, *flags);
}

void hyperv_helper_spin_unlock_irqrestore(spinlock_t *lock, unsigned long flags)
{
	spin_unlock_irqrestore(lock, flags);
}

void hyperv_helper_reinit_completion(struct completion *completion)
{
	reinit_completion(completion);
}

u32 hyperv_helper_hv_get_bytes_to_read(const struct hv_ring_buffer_info *ring)
{
	return hv_get_bytes_to_read(ring);
}

u32 hyperv_helper_hv_get_avail_to_write_percent(const struct hv_ring_buffer_info *ring)
{
	return hv_get_avail_to_write_percent(ring);
}

void hyperv_helper_hv_begin_read(struct hv_ring_buffer_info *ring)
{
	hv_begin_read(ring);
}

u32 hyperv_helper_hv_end_read(struct hv_ring_buffer_info *ring)
{
	return hv_end_read(ring);
}

unsigned long hyperv_helper_virt_to_hvpfn(void *addr)
{
	return virt_to_hvpfn(addr);
}

/* Runs the callback of an open channel as if the host had signalled. */
void hyperv_helper_hyperv_channel_kick(struct vmbus_channel *channel)
{
	unsigned long flags;

	spin_lock_irqsave(&channel->sched_lock, flags);
	if (channel->onchannel_callback) {
		if (channel->callback_mode == HV_CALL_ISR)
			channel->onchannel_callback(channel->channel_callback_context);
		else
			tasklet_schedule(&channel->callback_event);
	}
	spin_unlock_irqrestore(&channel->sched_lock, flags);
}

/* pci_host */

void hyperv_helper_local_irq_save(unsigned long *flags)
{
	local_irq_save(*flags);
}

void hyperv_helper_local_irq_restore(unsigned long flags)
{
	local_irq_restore(flags);
}

void *hyperv_helper_hv_pcpu_input_page(void)
{
	return *this_cpu_ptr(hyperv_pcpu_input_arg);
}

u64 hyperv_helper_hyperv_do_hypercall(u64 control, void *input, void *output)
{
	return hv_do_hypercall(control, input, output);
}

int hyperv_helper_hv_cpu_number_to_vp_number(int cpu)
{
	return hv_cpu_number_to_vp_number(cpu);
}

void hyperv_helper_dev_set_msi_domain(struct device *dev, struct irq_domain *domain)
{
	dev_set_msi_domain(dev, domain);
}

void hyperv_helper_set_dev_node(struct device *dev, int node)
{
	set_dev_node(dev, node);
}

unsigned int hyperv_helper_num_possible_nodes(void)
{
	return num_possible_nodes();
}

int hyperv_helper_numa_map_to_online_node(int node)
{
	return numa_map_to_online_node(node);
}

struct msi_desc *hyperv_helper_irq_data_get_msi_desc(struct irq_data *data)
{
	return irq_data_get_msi_desc(data);
}

bool hyperv_helper_msi_desc_is_msix(struct msi_desc *desc)
{
	return desc->pci.msi_attrib.is_msix;
}

/* The first online CPU from @start on that the interrupt goes to at present. */
unsigned int hyperv_helper_irq_data_next_online_cpu(struct irq_data *data, unsigned int start)
{
	return cpumask_next_and((int)start - 1, irq_data_get_effective_affinity_mask(data),
				cpu_online_mask);
}

unsigned int hyperv_helper_cpumask_next_online_wrap(unsigned int start)
{
	return cpumask_next_wrap((int)start - 1, cpu_online_mask);
}

struct fwnode_handle *hyperv_helper_irq_domain_alloc_named_fwnode(const char *name)
{
	return irq_domain_alloc_named_fwnode(name);
}

#ifdef CONFIG_ARM64
/* The domain of the GIC that the VMBus has its own interrupt from, by ACPI or a device tree. */
struct irq_domain *hyperv_helper_hv_gic_domain(void)
{
	struct irq_domain *domain = NULL;

#ifdef CONFIG_ACPI
	if (!acpi_disabled) {
		acpi_gsi_domain_disp_fn dispatcher = acpi_get_gsi_dispatcher();

		if (dispatcher)
			domain = irq_find_matching_fwnode(dispatcher(0), DOMAIN_BUS_ANY);
	}
#endif
#ifdef CONFIG_OF
	if (!domain) {
		struct device *vmbus = hv_get_vmbus_root_device();
		struct device_node *gic = vmbus ? of_irq_find_parent(vmbus->of_node) : NULL;

		if (gic)
			domain = irq_find_host(gic);
		of_node_put(gic);
	}
#endif
	return domain;
}

/* Notes that the interrupt goes to the first online CPU of those that it may go to. */
void hyperv_helper_irq_data_choose_cpu(struct irq_data *data)
{
	unsigned int cpu = cpumask_first_and(irq_data_get_affinity_mask(data), cpu_online_mask);

	if (cpu >= nr_cpu_ids)
		cpu = cpumask_first(cpu_online_mask);
	irq_data_update_effective_affinity(data, cpumask_of(cpu));
}
#endif

/* net */

void *hyperv_helper_netdev_priv(struct net_device *dev)
{
	return netdev_priv(dev);
}

void hyperv_helper_dev_hold(struct net_device *dev)
{
	dev_hold(dev);
}

void hyperv_helper_dev_put(struct net_device *dev)
{
	dev_put(dev);
}

bool hyperv_helper_netif_running(const struct net_device *dev)
{
	return netif_running(dev);
}

bool hyperv_helper_netif_carrier_ok(const struct net_device *dev)
{
	return netif_carrier_ok(dev);
}

bool hyperv_helper_netif_registered(const struct net_device *dev)
{
	return READ_ONCE(dev->reg_state) == NETREG_REGISTERED;
}

void hyperv_helper_netif_tx_wake_all_queues(struct net_device *dev)
{
	netif_tx_wake_all_queues(dev);
}

void hyperv_helper_netif_tx_disable(struct net_device *dev)
{
	netif_tx_disable(dev);
}

struct netdev_queue *hyperv_helper_netdev_get_tx_queue(struct net_device *dev, unsigned int index)
{
	return netdev_get_tx_queue(dev, index);
}

void hyperv_helper_netif_tx_stop_queue(struct netdev_queue *queue)
{
	netif_tx_stop_queue(queue);
}

bool hyperv_helper_netif_tx_queue_stopped(const struct netdev_queue *queue)
{
	return netif_tx_queue_stopped(queue);
}

bool hyperv_helper_netif_xmit_stopped(const struct netdev_queue *queue)
{
	return netif_xmit_stopped(queue);
}

void hyperv_helper_netdev_tx_sent_queue(struct netdev_queue *queue, unsigned int bytes)
{
	netdev_tx_sent_queue(queue, bytes);
}

/* Takes back what netdev_tx_sent_queue() was told; the queue's transmit lock is held. */
void hyperv_helper_netdev_tx_unsend_queue(struct netdev_queue *queue, unsigned int bytes)
{
#ifdef CONFIG_BQL
	WRITE_ONCE(queue->dql.num_queued, queue->dql.num_queued - bytes);
	/* As in netdev_tx_completed_queue(): whoever comes later sees that there is room. */
	smp_mb();
	if (dql_avail(&queue->dql) >= 0 &&
	    test_and_clear_bit(__QUEUE_STATE_STACK_XOFF, &queue->state))
		netif_schedule_queue(queue);
#endif
}

/* Never more than was sent: dql_completed() would stop the kernel. */
void hyperv_helper_netdev_tx_completed_queue(struct netdev_queue *queue, unsigned int packets,
					     unsigned int bytes)
{
#ifdef CONFIG_BQL
	unsigned int sent = READ_ONCE(queue->dql.num_queued) - queue->dql.num_completed;

	netdev_tx_completed_queue(queue, packets, min(bytes, sent));
#endif
}

void hyperv_helper_netdev_tx_reset_queue(struct netdev_queue *queue)
{
	netdev_tx_reset_queue(queue);
}

bool hyperv_helper_netdev_xmit_more(void)
{
	return netdev_xmit_more();
}

bool hyperv_helper_netpoll_tx_running(struct net_device *dev)
{
	return netpoll_tx_running(dev);
}

bool hyperv_helper_netdev_mc_empty(struct net_device *dev)
{
	return netdev_mc_empty(dev);
}

void hyperv_helper_netif_addr_lock_bh(struct net_device *dev)
{
	netif_addr_lock_bh(dev);
}

void hyperv_helper_netif_addr_unlock_bh(struct net_device *dev)
{
	netif_addr_unlock_bh(dev);
}

void hyperv_helper_netdev_lock_ops(struct net_device *dev)
{
	netdev_lock_ops(dev);
}

void hyperv_helper_netdev_unlock_ops(struct net_device *dev)
{
	netdev_unlock_ops(dev);
}

void hyperv_helper_eth_hw_addr_set(struct net_device *dev, const u8 *addr)
{
	eth_hw_addr_set(dev, addr);
}

bool hyperv_helper_netif_is_rxfh_configured(const struct net_device *dev)
{
	return netif_is_rxfh_configured(dev);
}

bool hyperv_helper_is_vlan_dev(const struct net_device *dev)
{
	return is_vlan_dev(dev);
}

bool hyperv_helper_netif_is_bond_master(const struct net_device *dev)
{
	return netif_is_bond_master(dev);
}

struct net *hyperv_helper_dev_net(const struct net_device *dev)
{
	return dev_net(dev);
}

void hyperv_helper_netdev_set_no_addrconf(struct net_device *dev)
{
	dev->priv_flags |= IFF_NO_ADDRCONF;
}

struct net_device *hyperv_helper_netdev_next(struct net *net, struct net_device *dev)
{
	return dev ? next_net_device(dev) : first_net_device(net);
}

struct net_device *hyperv_helper_netdev_notifier_info_to_dev(const struct netdev_notifier_info *info)
{
	return netdev_notifier_info_to_dev(info);
}

/* The name of the PCI slot of a network device's parent, if it has one. */
const char *hyperv_helper_netdev_pci_slot_name(const struct net_device *dev, bool *is_pci)
{
	struct device *parent = dev->dev.parent;

	*is_pci = parent && dev_is_pci(parent);
	if (!*is_pci || !to_pci_dev(parent)->slot)
		return NULL;
	return pci_slot_name(to_pci_dev(parent)->slot);
}

void hyperv_helper_netif_napi_add_config(struct net_device *dev, struct napi_struct *napi,
					 int (*poll)(struct napi_struct *, int), int index)
{
	netif_napi_add_config(dev, napi, poll, index);
}

void hyperv_helper_netif_napi_del(struct napi_struct *napi)
{
	netif_napi_del(napi);
}

void hyperv_helper_napi_gro_receive(struct napi_struct *napi, struct sk_buff *skb)
{
	napi_gro_receive(napi, skb);
}

void hyperv_helper_dev_kfree_skb_any(struct sk_buff *skb)
{
	dev_kfree_skb_any(skb);
}

void hyperv_helper_dev_consume_skb_any(struct sk_buff *skb)
{
	dev_consume_skb_any(skb);
}

int hyperv_helper_skb_cow_head(struct sk_buff *skb, unsigned int headroom)
{
	return skb_cow_head(skb, headroom);
}

int hyperv_helper_skb_linearize(struct sk_buff *skb)
{
	return skb_linearize(skb);
}

struct skb_shared_info *hyperv_helper_skb_shinfo(const struct sk_buff *skb)
{
	return skb_shinfo(skb);
}

unsigned long hyperv_helper_skb_frag_hvpfn(const skb_frag_t *frag)
{
	return page_to_hvpfn(skb_frag_page(frag)) + (skb_frag_off(frag) >> HV_HYP_PAGE_SHIFT);
}

unsigned int hyperv_helper_skb_frag_off(const skb_frag_t *frag)
{
	return skb_frag_off(frag);
}

unsigned int hyperv_helper_skb_frag_size(const skb_frag_t *frag)
{
	return skb_frag_size(frag);
}

u16 hyperv_helper_skb_protocol_host(const struct sk_buff *skb)
{
	return ntohs(skb->protocol);
}

bool hyperv_helper_skb_csum_partial(const struct sk_buff *skb)
{
	return skb->ip_summed == CHECKSUM_PARTIAL;
}

u32 hyperv_helper_skb_get_hash_raw(const struct sk_buff *skb)
{
	return skb_get_hash_raw(skb);
}

bool hyperv_helper_skb_vlan_tag_present(const struct sk_buff *skb)
{
	return skb_vlan_tag_present(skb);
}

u16 hyperv_helper_skb_vlan_tag_get(const struct sk_buff *skb)
{
	return skb_vlan_tag_get(skb);
}

/* Moves the 802.1Q tag of a frame's data, if it has one, to where the hardware gets it from. */
int hyperv_helper_skb_untag(struct sk_buff *skb)
{
	u16 tci;
	int ret;

	skb_reset_mac_header(skb);
	if (!eth_type_vlan(eth_hdr(skb)->h_proto))
		return 0;
	ret = __skb_vlan_pop(skb, &tci);
	if (ret)
		return ret;
	__vlan_hwaccel_put_tag(skb, htons(ETH_P_8021Q), tci);
	return 0;
}

int hyperv_helper_skb_transport_offset(const struct sk_buff *skb)
{
	return skb_transport_offset(skb);
}

int hyperv_helper_skb_network_offset(const struct sk_buff *skb)
{
	return skb_network_offset(skb);
}

void hyperv_helper_skb_tx_timestamp(struct sk_buff *skb)
{
	skb_tx_timestamp(skb);
}

int hyperv_helper_dev_queue_xmit(struct sk_buff *skb)
{
	return dev_queue_xmit(skb);
}

void hyperv_helper_skb_record_rx_queue(struct sk_buff *skb, u16 queue)
{
	skb_record_rx_queue(skb, queue);
}

bool hyperv_helper_skb_rx_queue_recorded(const struct sk_buff *skb)
{
	return skb_rx_queue_recorded(skb);
}

u16 hyperv_helper_skb_get_rx_queue(const struct sk_buff *skb)
{
	return skb_get_rx_queue(skb);
}

u16 *hyperv_helper_skb_slave_queue_mapping(const struct sk_buff *skb)
{
	return &qdisc_skb_cb(skb)->slave_dev_queue_mapping;
}

int hyperv_helper_sk_tx_queue_get(const struct sk_buff *skb)
{
	return sk_tx_queue_get(skb->sk);
}

/* Remembers the transmit queue of a connected socket. */
void hyperv_helper_sk_tx_queue_remember(const struct sk_buff *skb, int queue)
{
	struct sock *sk = skb->sk;

	if (sk && sk_fullsock(sk) && rcu_access_pointer(sk->sk_dst_cache))
		sk_tx_queue_set(sk, queue);
}

bool hyperv_helper_skb_ooo_okay(const struct sk_buff *skb)
{
	return skb->ooo_okay;
}

/* The queue that @dev itself would select. */
u16 hyperv_helper_netdev_select_queue(struct net_device *dev, struct sk_buff *skb,
				      struct net_device *sb_dev)
{
	if (dev->netdev_ops->ndo_select_queue)
		return dev->netdev_ops->ndo_select_queue(dev, skb, sb_dev);
	return netdev_pick_tx(dev, skb, NULL);
}

bool hyperv_helper_skb_flow_dissect_flow_keys(const struct sk_buff *skb, struct flow_keys *keys)
{
	return skb_flow_dissect_flow_keys(skb, keys, 0);
}

u32 hyperv_helper_skb_get_hash(struct sk_buff *skb)
{
	return skb_get_hash(skb);
}

void hyperv_helper_skb_set_sw_hash(struct sk_buff *skb, u32 hash, bool is_l4)
{
	__skb_set_sw_hash(skb, hash, is_l4);
}

/* Hash of the addresses of a dissected packet, with a secret that is chosen once. */
u32 hyperv_helper_flow_addrs_hash(const struct flow_keys *keys)
{
	static u32 secret __read_mostly;

	net_get_random_once(&secret, sizeof(secret));
	if (keys->basic.n_proto == htons(ETH_P_IP))
		return jhash2((const u32 *)&keys->addrs.v4addrs, 2, secret);
	if (keys->basic.n_proto == htons(ETH_P_IPV6))
		return jhash2((const u32 *)&keys->addrs.v6addrs, 8, secret);
	return 0;
}

void *hyperv_helper_skb_put_bytes(struct sk_buff *skb, unsigned int len)
{
	return skb_put(skb, len);
}

unsigned int hyperv_helper_skb_tailroom(const struct sk_buff *skb)
{
	return skb_tailroom(skb);
}

/* Computes the checksum of the IPv4 header that the data begins with, if it is there. */
bool hyperv_helper_skb_fix_ip_checksum(struct sk_buff *skb)
{
	struct iphdr *ip = (struct iphdr *)skb->data;

	if (skb_headlen(skb) < sizeof(*ip) || ip->ihl < 5 || skb_headlen(skb) < ip->ihl * 4)
		return false;
	ip->check = 0;
	ip->check = ip_fast_csum(ip, ip->ihl);
	return true;
}

void hyperv_helper_skb_set_csum_unnecessary(struct sk_buff *skb)
{
	skb->ip_summed = CHECKSUM_UNNECESSARY;
}

void hyperv_helper_skb_set_l4_hash(struct sk_buff *skb, u32 hash)
{
	skb_set_hash(skb, hash, PKT_HASH_TYPE_L4);
}

void hyperv_helper_vlan_hwaccel_put_ctag(struct sk_buff *skb, u16 tci)
{
	__vlan_hwaccel_put_tag(skb, htons(ETH_P_8021Q), tci);
}

/* 0: to this host alone, 1: broadcast, 2: multicast. */
int hyperv_helper_skb_pkt_class(const struct sk_buff *skb)
{
	switch (skb->pkt_type) {
	case PACKET_BROADCAST:
		return 1;
	case PACKET_MULTICAST:
		return 2;
	default:
		return 0;
	}
}

void hyperv_helper_skb_set_protocol(struct sk_buff *skb, __be16 protocol)
{
	skb->protocol = protocol;
}

void hyperv_helper_skb_set_dev(struct sk_buff *skb, struct net_device *dev)
{
	skb->dev = dev;
}

struct net_device *hyperv_helper_skb_rx_handler_data(const struct sk_buff *skb)
{
	return rcu_dereference(skb->dev->rx_handler_data);
}

struct sk_buff *hyperv_helper_skb_share_check(struct sk_buff *skb)
{
	return skb_share_check(skb, GFP_ATOMIC);
}

void hyperv_helper_init_delayed_work(struct delayed_work *work, void (*func)(struct work_struct *))
{
	INIT_DELAYED_WORK(work, func);
}

bool hyperv_helper_schedule_delayed_work(struct delayed_work *work, unsigned long delay)
{
	return schedule_delayed_work(work, delay);
}

/* Rust knows no address space of per-CPU pointers, so they pass as plain ones. */

u64 *hyperv_helper_alloc_percpu_u64(size_t count)
{
	return (__force u64 *)(unsigned long)__alloc_percpu(count * sizeof(u64), __alignof__(u64));
}

void hyperv_helper_this_cpu_add_u64(u64 *counter, u64 value)
{
	this_cpu_add(*(u64 __percpu *)(unsigned long)counter, value);
}

u64 hyperv_helper_per_cpu_read_u64(u64 *counter, unsigned int cpu)
{
	return READ_ONCE(*per_cpu_ptr((u64 __percpu *)(unsigned long)counter, cpu));
}

unsigned int hyperv_helper_num_online_cpus_now(void)
{
	return num_online_cpus();
}

unsigned int hyperv_helper_next_present_cpu(int cpu)
{
	return cpumask_next(cpu, cpu_present_mask);
}

unsigned int hyperv_helper_next_possible_cpu(int cpu)
{
	return cpumask_next(cpu, cpu_possible_mask);
}

void hyperv_helper_netif_tx_lock_queue(struct netdev_queue *queue)
{
	__netif_tx_lock_bh(queue);
	/* As the core does for what it transmits itself, for the watchdog. */
	txq_trans_cond_update(queue);
}

void hyperv_helper_netif_tx_unlock_queue(struct netdev_queue *queue)
{
	__netif_tx_unlock_bh(queue);
}

/* Puts the Ethernet header, which eth_type_trans() took off, back. */
bool hyperv_helper_skb_restore_eth_header(struct sk_buff *skb)
{
	if (!skb_mac_header_was_set(skb) || skb_mac_offset(skb) != -ETH_HLEN)
		return false;
	skb_reset_network_header(skb);
	__skb_push(skb, ETH_HLEN);
	return true;
}

void *hyperv_helper_page_pool_alloc_address(struct page_pool *pool)
{
	struct page *page = page_pool_dev_alloc_pages(pool);

	return page ? page_address(page) : NULL;
}

void hyperv_helper_page_pool_recycle_address(struct page_pool *pool, void *address)
{
	page_pool_recycle_direct(pool, virt_to_page(address));
}

void hyperv_helper_xdp_prepare_empty(struct xdp_buff *xdp, struct xdp_rxq_info *queue, void *start,
				     u32 size, u32 headroom)
{
	xdp_init_buff(xdp, size, queue);
	xdp_prepare_buff(xdp, start, headroom, 0, true);
}

u32 hyperv_helper_bpf_prog_run_xdp(const struct bpf_prog *prog, struct xdp_buff *xdp)
{
	return bpf_prog_run_xdp(prog, xdp);
}

void hyperv_helper_trace_xdp_exception(const struct net_device *dev, const struct bpf_prog *prog,
				       u32 action)
{
	trace_xdp_exception(dev, prog, action);
}

/* A packet in the memory of a frame, which is a page of a pool. */
struct sk_buff *hyperv_helper_xdp_buff_build_skb(struct xdp_buff *xdp)
{
	struct sk_buff *skb = napi_build_skb(xdp->data_hard_start, xdp->frame_sz);

	if (!skb)
		return NULL;
	skb_reserve(skb, xdp->data - xdp->data_hard_start);
	__skb_put(skb, xdp->data_end - xdp->data);
	if (xdp->data > xdp->data_meta)
		skb_metadata_set(skb, xdp->data - xdp->data_meta);
	skb_mark_for_recycle(skb);
	return skb;
}

int hyperv_helper_netdev_xdp_xmit(struct net_device *dev, int count, struct xdp_frame **frames,
				  u32 flags)
{
	if (!dev->netdev_ops->ndo_xdp_xmit)
		return -EOPNOTSUPP;
	return dev->netdev_ops->ndo_xdp_xmit(dev, count, frames, flags);
}
