/* SPDX-License-Identifier: BSD-3-Clause */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "history.h"
#include "transport.h"

static int g_fd = -1;

void
history_open(const char *path)
{
	g_fd = open(path, O_WRONLY | O_CREAT | O_APPEND, 0600);
	if (g_fd < 0) {
		die("cannot open %s: %s", path, strerror(errno));
	}
}

void
history_note(enum history_event event, uint64_t version, uint64_t lba, uint64_t len_blocks)
{
	struct history_record record = {
		.event = event,
		.version = version,
		.lba = lba,
		.len_blocks = len_blocks,
	};

	if (g_fd >= 0 && write(g_fd, &record, sizeof(record)) != (ssize_t)sizeof(record)) {
		die("cannot write the history: %s", strerror(errno));
	}
}
