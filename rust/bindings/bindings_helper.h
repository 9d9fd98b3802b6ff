/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The headers whose declarations rust/bindings/bindgen_parameters selects.
 */

#include <linux/etherdevice.h>
#include <linux/hyperv.h>
#include <linux/netdevice.h>
#include <linux/vmalloc.h>
