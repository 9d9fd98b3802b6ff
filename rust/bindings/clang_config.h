/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What a kernel that gcc has built is configured for and clang cannot do.
 *
 * clang leaves the segment out of an assembler operand in a named address space.
 * With these the kernel's headers write it themselves.
 */
#undef CONFIG_CC_HAS_NAMED_AS
#undef CONFIG_USE_X86_SEG_SUPPORT
