// SPDX-License-Identifier: GPL-2.0
/*
 * C inline functions and macros, made callable from Rust.  The prefix is not
 * "rust_helper_" because vmlinux exports functions of that name.
 *
 * One block for each crate that uses them.
 */

#include <linux/hyperv.h>
#include <linux/interrupt.h>
#include <linux/spinlock.h>

/* vmbus */

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

u32 hyperv_helper_hv_get_bytes_to_write(const struct hv_ring_buffer_info *ring)
{
	return hv_get_bytes_to_write(ring);
}

u32 hyperv_helper_hv_get_bytes_to_read(const struct hv_ring_buffer_info *ring)
{
	return hv_get_bytes_to_read(ring);
}

u32 hyperv_helper_hv_get_avail_to_write_percent(const struct hv_ring_buffer_info *ring)
{
	return hv_get_avail_to_write_percent(ring);
}

void hyperv_helper_set_channel_pending_send_size(struct vmbus_channel *channel, u32 size)
{
	set_channel_pending_send_size(channel, size);
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
