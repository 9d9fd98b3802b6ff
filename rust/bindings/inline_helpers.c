// SPDX-License-Identifier: GPL-2.0
/*
 * The helpers once more, to be optimised together with the Rust code that calls
 * them, so that they cost no call.  See "One object" in Kbuild.
 */

#include <linux/atomic.h>
#include <linux/rcupdate.h>
#include <linux/refcount.h>
#include <linux/spinlock.h>

#include "bindings_helper.h"

/* Rust functions and these have other target attributes, which LLVM minds otherwise. */
#pragma clang attribute push([[clang::always_inline]], apply_to = function)

#include "helpers.c"

/* Those of the kernel's crate that are called for each packet. */

int rust_helper_atomic_read(const atomic_t *v)
{
	return atomic_read(v);
}

int rust_helper_atomic_read_acquire(const atomic_t *v)
{
	return atomic_read_acquire(v);
}

void rust_helper_atomic_set(atomic_t *v, int i)
{
	atomic_set(v, i);
}

void rust_helper_atomic_set_release(atomic_t *v, int i)
{
	atomic_set_release(v, i);
}

int rust_helper_atomic_fetch_add_relaxed(int i, atomic_t *v)
{
	return atomic_fetch_add_relaxed(i, v);
}

int rust_helper_atomic_fetch_sub_relaxed(int i, atomic_t *v)
{
	return atomic_fetch_sub_relaxed(i, v);
}

s64 rust_helper_atomic64_read(const atomic64_t *v)
{
	return atomic64_read(v);
}

void rust_helper_atomic64_set(atomic64_t *v, s64 i)
{
	atomic64_set(v, i);
}

bool rust_helper_atomic64_try_cmpxchg(atomic64_t *v, s64 *old, s64 new)
{
	return atomic64_try_cmpxchg(v, old, new);
}

s8 rust_helper_atomic_i8_read(s8 *ptr)
{
	return READ_ONCE(*ptr);
}

s8 rust_helper_atomic_i8_read_acquire(s8 *ptr)
{
	/* As the caller has it. */
	return smp_load_acquire(ptr);
}

void rust_helper_atomic_i8_set(s8 *ptr, s8 val)
{
	WRITE_ONCE(*ptr, val);
}

void rust_helper_atomic_i8_set_release(s8 *ptr, s8 val)
{
	/* As the caller has it. */
	smp_store_release(ptr, val);
}

s8 rust_helper_atomic_i8_xchg(s8 *ptr, s8 val)
{
	return xchg(ptr, val);
}

s8 rust_helper_atomic_i8_xchg_acquire(s8 *ptr, s8 val)
{
	return xchg_acquire(ptr, val);
}

const void *rust_helper_atomic_ptr_read_acquire(const void **ptr)
{
	/* As the caller has it. */
	return smp_load_acquire(ptr);
}

const void *rust_helper_atomic_ptr_xchg(const void **ptr, const void *val)
{
	return xchg(ptr, val);
}

void rust_helper_smp_mb(void)
{
	/* As the caller has it. */
	smp_mb();
}

void rust_helper_rcu_read_lock(void)
{
	rcu_read_lock();
}

void rust_helper_rcu_read_unlock(void)
{
	rcu_read_unlock();
}

void rust_helper_spin_lock(spinlock_t *lock)
{
	spin_lock(lock);
}

void rust_helper_spin_unlock(spinlock_t *lock)
{
	spin_unlock(lock);
}

#pragma clang attribute pop
