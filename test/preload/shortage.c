// SPDX-License-Identifier: BSD-3-Clause
// Preloaded before the module: tells how often it waits for one of SPDK's requests, and how often SPDK does not let it, since
// there are some. With PCACHE_SHORTAGE_EVERY=N something else is short at each Nth read and write of the base.
// Numbers are printed when they are powers of two.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct iovec;

bool spdk_thread_is_app_thread(void *thread);

static bool is_module(const void *caller)
{
	Dl_info info;
	return dladdr(caller, &info) != 0 && strstr(info.dli_fname, "bdev_pcache") != NULL;
}

static void tell(const char *what, atomic_ulong *counter)
{
	unsigned long count = atomic_fetch_add(counter, 1) + 1;
	if ((count & (count - 1)) == 0)
		fprintf(stderr, "shortage: %s %lu\n", what, count);
}

int spdk_bdev_queue_io_wait(void *bdev, void *channel, void *entry)
{
	static atomic_ulong g_background, g_channels, g_refused;
	int (*next)(void *, void *, void *) = dlsym(RTLD_NEXT, "spdk_bdev_queue_io_wait");
	int rc = next(bdev, channel, entry);
	if (!is_module(__builtin_return_address(0)))
		return rc;
	if (rc != 0)
		tell("refused", &g_refused);
	else if (spdk_thread_is_app_thread(NULL))
		tell("background", &g_background);
	else
		tell("channels", &g_channels);
	return rc;
}

static bool is_short(const void *caller)
{
	static atomic_ulong g_calls;
	const char *every = getenv("PCACHE_SHORTAGE_EVERY");
	if (every == NULL || !is_module(caller))
		return false;
	return (atomic_fetch_add(&g_calls, 1) + 1) % strtoul(every, NULL, 10) == 0;
}

typedef int vectored(void *, void *, struct iovec *, int, uint64_t, uint64_t, void *, void *);

int spdk_bdev_readv_blocks(void *desc, void *channel, struct iovec *iov, int iov_count, uint64_t lba,
			   uint64_t block_count, void *done, void *arg)
{
	if (is_short(__builtin_return_address(0)))
		return -ENOMEM;
	vectored *next = dlsym(RTLD_NEXT, "spdk_bdev_readv_blocks");
	return next(desc, channel, iov, iov_count, lba, block_count, done, arg);
}

int spdk_bdev_writev_blocks(void *desc, void *channel, struct iovec *iov, int iov_count, uint64_t lba,
			    uint64_t block_count, void *done, void *arg)
{
	if (is_short(__builtin_return_address(0)))
		return -ENOMEM;
	vectored *next = dlsym(RTLD_NEXT, "spdk_bdev_writev_blocks");
	return next(desc, channel, iov, iov_count, lba, block_count, done, arg);
}
