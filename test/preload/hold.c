// SPDX-License-Identifier: BSD-3-Clause
// Preloaded before the module: unmapping a large cache device, making its page tables, or making it known to devices takes
// as long as a test wants: while there is a file of the call's name in the folder PCACHE_HOLD. Tells which thread it is that waits. What is larger
// still are addresses that SPDK's environment reserves.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif

enum { SIZE_BYTES_MIN = 32 << 20, SIZE_BYTES_MAX = 1 << 30 };
/* A test that has failed does not let go. */
enum { LOOK_US = 2000, LIMIT_US = 20 * 1000 * 1000 };

static void hold(const char *call, size_t size_bytes)
{
	const char *folder = getenv("PCACHE_HOLD");
	if (folder == NULL || size_bytes < SIZE_BYTES_MIN || size_bytes > SIZE_BYTES_MAX)
		return;
	char thread[16] = "", path[4096];
	prctl(PR_GET_NAME, thread);
	fprintf(stderr, "hold: %s of %zu bytes, on %s\n", call, size_bytes, thread);
	snprintf(path, sizeof(path), "%s/%s", folder, call);
	for (int waited_us = 0; waited_us < LIMIT_US && access(path, F_OK) == 0; waited_us += LOOK_US)
		usleep(LOOK_US);
}

int munmap(void *address, size_t size_bytes)
{
	hold("munmap", size_bytes);
	return (int)syscall(SYS_munmap, address, size_bytes);
}

int madvise(void *address, size_t size_bytes, int advice)
{
	if (advice == MADV_POPULATE_READ || advice == MADV_POPULATE_WRITE)
		hold("madvise", size_bytes);
	return (int)syscall(SYS_madvise, address, size_bytes, advice);
}

/* Of SPDK. */
int spdk_mem_register(void *address, size_t size_bytes);
int spdk_mem_unregister(void *address, size_t size_bytes);

int spdk_mem_register(void *address, size_t size_bytes)
{
	int (*next)(void *, size_t) = (int (*)(void *, size_t))dlsym(RTLD_NEXT, "spdk_mem_register");
	hold("spdk_mem_register", size_bytes);
	return next(address, size_bytes);
}

int spdk_mem_unregister(void *address, size_t size_bytes)
{
	int (*next)(void *, size_t) = (int (*)(void *, size_t))dlsym(RTLD_NEXT, "spdk_mem_unregister");
	hold("spdk_mem_unregister", size_bytes);
	return next(address, size_bytes);
}
