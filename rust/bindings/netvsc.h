/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What netvsc.c defines beside tracepoints.
 */

#ifndef _HYPERV_NETVSC_H
#define _HYPERV_NETVSC_H

#include <linux/debugfs.h>
#include <linux/seq_file.h>

extern unsigned int hyperv_netvsc_ring_size;
extern int hyperv_netvsc_debug;

struct hyperv_debugfs_file {
	void (*show)(const struct hyperv_debugfs_file *file, struct seq_file *seq);
};

struct dentry *hyperv_debugfs_create_file(const char *name, struct dentry *parent,
					  struct hyperv_debugfs_file *file);

#endif /* _HYPERV_NETVSC_H */
