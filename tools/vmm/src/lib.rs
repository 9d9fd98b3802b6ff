// SPDX-License-Identifier: GPL-2.0
//! A virtual machine monitor on KVM that looks like Hyper-V to its guest.
