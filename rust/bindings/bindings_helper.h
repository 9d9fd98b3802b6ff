/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The headers whose declarations rust/bindings/bindgen_parameters selects.
 */

#include <asm/hw_irq.h>
#include <asm/mshyperv.h>
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
#include <linux/percpu.h>
#include <linux/rtnetlink.h>
#include <linux/skbuff.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <linux/vmalloc.h>
#include <linux/workqueue.h>
#include <net/flow_dissector.h>
#include <net/ip6_checksum.h>

#include "netvsc_trace.h"

extern unsigned int hyperv_netvsc_ring_size;
extern int hyperv_netvsc_debug;
