// SPDX-License-Identifier: GPL-2.0
/*
 * What only C's macros can define, for hv_netvsc alone: its tracepoints and the
 * module parameters that are shown in /sys/module.
 */

#include <linux/module.h>
#include <linux/moduleparam.h>

#define CREATE_TRACE_POINTS
#define CREATE_RUST_TRACE_POINTS
#include "netvsc_trace.h"

unsigned int hyperv_netvsc_ring_size = 128;
module_param_named(ring_size, hyperv_netvsc_ring_size, uint, 0444);
MODULE_PARM_DESC(ring_size, "Ring buffer size (# of 4K pages)");

int hyperv_netvsc_debug = -1;
module_param_named(debug, hyperv_netvsc_debug, int, 0444);
MODULE_PARM_DESC(debug, "Debug level (0=none,...,16=all)");
