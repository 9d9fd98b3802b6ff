// SPDX-License-Identifier: GPL-2.0
/*
 * What only C's macros can define, for hv_netvsc alone: its tracepoints, the
 * module parameters that are shown in /sys/module, operations of files.
 */

#include <linux/module.h>
#include <linux/moduleparam.h>

#define CREATE_TRACE_POINTS
#define CREATE_RUST_TRACE_POINTS
#include "netvsc_trace.h"

#include "netvsc.h"

unsigned int hyperv_netvsc_ring_size = 128;
module_param_named(ring_size, hyperv_netvsc_ring_size, uint, 0444);
MODULE_PARM_DESC(ring_size, "Ring buffer size (# of 4K pages)");

int hyperv_netvsc_debug = -1;
module_param_named(debug, hyperv_netvsc_debug, int, 0444);
MODULE_PARM_DESC(debug, "Debug level (0=none,...,16=all)");

/* A file of debugfs whose text is made in Rust.  Being open it keeps the module. */
static int hyperv_debugfs_show(struct seq_file *seq, void *unused)
{
	const struct hyperv_debugfs_file *file = seq->private;

	file->show(file, seq);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(hyperv_debugfs);

struct dentry *hyperv_debugfs_create_file(const char *name, struct dentry *parent,
					  struct hyperv_debugfs_file *file)
{
	return debugfs_create_file(name, 0400, parent, file, &hyperv_debugfs_fops);
}
