// SPDX-License-Identifier: BSD-3-Clause
// Preloaded before the module: the buffers of bdevperf, which are all zeroes, hold noise. Some machines store zeroes at
// twice the rate of anything else. Tells the first time that it has filled one.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

/* Of SPDK. */
void *spdk_zmalloc(size_t size, size_t align, uint64_t *unused, int numa_id, uint32_t flags);

static void fill(void *buffer, size_t size_bytes)
{
	static uint64_t state = 0x9e3779b97f4a7c15;
	uint8_t *at = buffer;
	for (size_t done = 0; done < size_bytes; done += sizeof(state)) {
		/* Marsaglia, Xorshift RNGs, 2003. */
		state ^= state << 13;
		state ^= state >> 7;
		state ^= state << 17;
		size_t left = size_bytes - done;
		memcpy(at + done, &state, left < sizeof(state) ? left : sizeof(state));
	}
}

void *spdk_zmalloc(size_t size, size_t align, uint64_t *unused, int numa_id, uint32_t flags)
{
	void *(*next)(size_t, size_t, uint64_t *, int, uint32_t) =
		(void *(*)(size_t, size_t, uint64_t *, int, uint32_t))dlsym(RTLD_NEXT, "spdk_zmalloc");
	void *buffer = next(size, align, unused, numa_id, flags);
	Dl_info caller;
	/* What OCF is linked with allocates without an alignment. */
	if (buffer == NULL || align == 0 || dladdr(__builtin_return_address(0), &caller) == 0 || caller.dli_fname == NULL)
		return buffer;
	const char *file = strrchr(caller.dli_fname, '/');
	if (strcmp(file == NULL ? caller.dli_fname : file + 1, "bdevperf") != 0)
		return buffer;
	static int told;
	if (!told++)
		fprintf(stderr, "noise: the buffers hold noise\n");
	fill(buffer, size);
	return buffer;
}
