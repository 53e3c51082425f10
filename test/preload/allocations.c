// SPDX-License-Identifier: BSD-3-Clause
// Preloaded before the module: counts what the module asks of the heap, and of SPDK's memory for devices, in the file
// PCACHE_ALLOCATIONS, which is as long as `struct report` and holds zeroes at first. Whoever made the file lets the counting
// begin and end, and reads it while the application runs. A call is the module's if it would return into it; calls that
// SPDK makes for the module are SPDK's.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <execinfo.h>
#include <fcntl.h>
#include <link.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { TRACES_MAX = 16, FRAMES_MAX = 24 };

/* test/e2e/harness/allocations.py reads and writes it; the layout is known to both. */
struct report {
	_Atomic uint64_t is_counting;
	_Atomic uint64_t allocations;
	_Atomic uint64_t allocated_bytes;
	_Atomic uint64_t frees;
	/* Of the first calls: where they came from, as offsets in the module; 0 is somewhere else. */
	uint64_t traces[TRACES_MAX][FRAMES_MAX];
};

static struct report *g_report;
static uintptr_t g_module_start, g_module_end;

/* glibc's own, under names that nobody takes the place of. */
void *__libc_malloc(size_t size_bytes);
void *__libc_calloc(size_t count, size_t size_bytes);
void *__libc_realloc(void *at, size_t size_bytes);
void *__libc_memalign(size_t align_bytes, size_t size_bytes);
void __libc_free(void *at);

static int find_module(struct dl_phdr_info *info, size_t size_bytes, void *arg)
{
	(void)size_bytes;
	(void)arg;
	if (strstr(info->dlpi_name, "bdev_pcache") == NULL)
		return 0;
	g_module_start = info->dlpi_addr;
	for (int i = 0; i < info->dlpi_phnum; i++) {
		const ElfW(Phdr) *part = &info->dlpi_phdr[i];
		uintptr_t end = info->dlpi_addr + part->p_vaddr + part->p_memsz;
		if (part->p_type == PT_LOAD && end > g_module_end)
			g_module_end = end;
	}
	return 1;
}

__attribute__((constructor)) static void begin(void)
{
	const char *path = getenv("PCACHE_ALLOCATIONS");
	void *frames[2];
	if (path == NULL)
		return;
	/* Its first call loads a library. */
	backtrace(frames, 2);
	dl_iterate_phdr(find_module, NULL);
	int file = open(path, O_RDWR | O_CLOEXEC);
	void *report = mmap(NULL, sizeof(*g_report), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	close(file);
	if (report != MAP_FAILED)
		g_report = report;
}

static bool counts(const void *caller)
{
	uintptr_t at = (uintptr_t)caller;
	return at >= g_module_start && at < g_module_end && g_report != NULL && g_report->is_counting;
}

static void note_trace(uint64_t number)
{
	void *frames[FRAMES_MAX];
	if (number >= TRACES_MAX)
		return;
	int count = backtrace(frames, FRAMES_MAX);
	for (int i = 0; i < FRAMES_MAX; i++) {
		uintptr_t at = i < count ? (uintptr_t)frames[i] : 0;
		bool is_module = at >= g_module_start && at < g_module_end;
		g_report->traces[number][i] = is_module ? at - g_module_start : 0;
	}
}

static void note_allocation(const void *caller, size_t size_bytes)
{
	if (!counts(caller))
		return;
	atomic_fetch_add(&g_report->allocated_bytes, size_bytes);
	note_trace(atomic_fetch_add(&g_report->allocations, 1));
}

#define CALLER __builtin_return_address(0)

void *malloc(size_t size_bytes)
{
	note_allocation(CALLER, size_bytes);
	return __libc_malloc(size_bytes);
}

void *calloc(size_t count, size_t size_bytes)
{
	note_allocation(CALLER, count * size_bytes);
	return __libc_calloc(count, size_bytes);
}

void *realloc(void *at, size_t size_bytes)
{
	note_allocation(CALLER, size_bytes);
	return __libc_realloc(at, size_bytes);
}

int posix_memalign(void **at, size_t align_bytes, size_t size_bytes)
{
	note_allocation(CALLER, size_bytes);
	*at = __libc_memalign(align_bytes, size_bytes);
	return *at == NULL ? ENOMEM : 0;
}

void *aligned_alloc(size_t align_bytes, size_t size_bytes)
{
	note_allocation(CALLER, size_bytes);
	return __libc_memalign(align_bytes, size_bytes);
}

void free(void *at)
{
	if (at != NULL && counts(CALLER))
		atomic_fetch_add(&g_report->frees, 1);
	__libc_free(at);
}

void *spdk_dma_malloc(size_t size_bytes, size_t align_bytes, uint64_t *physical)
{
	void *(*next)(size_t, size_t, uint64_t *) = dlsym(RTLD_NEXT, "spdk_dma_malloc");
	note_allocation(CALLER, size_bytes);
	return next(size_bytes, align_bytes, physical);
}
