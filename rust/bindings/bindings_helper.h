/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The headers whose declarations rust/bindings/bindgen_parameters selects.
 */

#include <asm/hw_irq.h>
#include <asm/mshyperv.h>
#include <linux/bpf.h>
#include <linux/dma-mapping.h>
#include <linux/etherdevice.h>
#include <linux/ethtool.h>
#include <linux/hyperv.h>
#include <linux/if_arp.h>
#include <linux/if_ether.h>
#include <linux/if_vlan.h>
#include <linux/inetdevice.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/irq.h>
#include <linux/irqchip/irq-msi-lib.h>
#include <linux/irqdomain.h>
#include <linux/msi.h>
#include <linux/netdevice.h>
#include <linux/notifier.h>
#include <linux/pci.h>
#ifdef CONFIG_ARM64
#include <linux/pci-ecam.h>
#endif
#include <linux/percpu.h>
#include <linux/rtnetlink.h>
#include <linux/skbuff.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <linux/vmalloc.h>
#include <linux/workqueue.h>
#include <net/flow_dissector.h>
#include <net/ip6_checksum.h>
#include <net/netdev_queues.h>
#include <net/page_pool/types.h>
#include <net/xdp.h>

#include "netvsc.h"
#include "netvsc_trace.h"

/* Macros with casts, which bindgen cannot evaluate. */
const u32 HYPERV_CONST_SKB_ALIGN = SKB_DATA_ALIGN(1);
const u32 HYPERV_CONST_SKB_TAILROOM = SKB_DATA_ALIGN(sizeof(struct skb_shared_info));
