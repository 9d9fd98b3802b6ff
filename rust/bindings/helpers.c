// SPDX-License-Identifier: GPL-2.0
/*
 * C inline functions and macros, made callable from Rust.  The prefix is not
 * "rust_helper_" because vmlinux exports functions of that name.
 */

#include <linux/hyperv.h>

void hyperv_helper_hv_set_drvdata(struct hv_device *dev, void *data)
{
	hv_set_drvdata(dev, data);
}
