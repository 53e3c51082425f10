// SPDX-License-Identifier: BSD-3-Clause
// Preloaded before the module: a large unmapping takes its time, as it does for a large cache device, and tells which
// thread it is that waits for it. What is larger still are addresses that SPDK's environment reserves.

#define _GNU_SOURCE
#include <stdio.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SIZE_BYTES_MIN = 32 << 20, SIZE_BYTES_MAX = 1 << 30, DELAY_US = 500 * 1000 };

int munmap(void *address, size_t size_bytes)
{
	if (size_bytes >= SIZE_BYTES_MIN && size_bytes <= SIZE_BYTES_MAX) {
		char thread[16] = "";
		prctl(PR_GET_NAME, thread);
		fprintf(stderr, "slow_unmap: %zu bytes, on %s\n", size_bytes, thread);
		usleep(DELAY_US);
	}
	return (int)syscall(SYS_munmap, address, size_bytes);
}
