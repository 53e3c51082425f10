/* SPDX-License-Identifier: BSD-3-Clause */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "replay.h"

/* Every target takes this much in a command, unless told otherwise. */
#define COMMAND_BYTES_MAX	(128u * 1024u)
#define HANG_SECONDS		60

static bool g_answered;
static enum io_status g_status;

static void
request_answered(struct io *io, enum io_status status, const char *reason)
{
	if (status != IO_OK) {
		fprintf(stderr, "ackclient: request kind %d, block %" PRIu64 ", %" PRIu64 " blocks: %s\n",
			io->kind, io->lba, io->len_blocks, reason);
	}
	g_status = status;
	g_answered = true;
}

static enum io_status
run_request(const struct transport *transport, struct io *io)
{
	time_t start = time(NULL);

	g_answered = false;
	if (!transport->submit(io)) {
		return IO_LOST;
	}
	while (!g_answered) {
		if (!transport->service() || time(NULL) - start > HANG_SECONDS) {
			return IO_LOST;
		}
	}
	return g_status;
}

/* False at the end of the file. */
static bool
next_request(FILE *file, const char *path, uint64_t line, const struct geometry *geometry, struct io *io)
{
	char kind[8];
	int got = fscanf(file, "%7s %" SCNu64 " %" SCNu64, kind, &io->lba, &io->len_blocks);

	if (got == EOF && !ferror(file)) {
		return false;
	}
	if (got != 3 || (strcmp(kind, "read") != 0 && strcmp(kind, "write") != 0)) {
		die("%s:%" PRIu64 ": not 'read LBA LEN' or 'write LBA LEN'", path, line);
	}
	io->kind = strcmp(kind, "read") == 0 ? IO_READ : IO_WRITE;
	if (io->len_blocks == 0 || io->len_blocks > COMMAND_BYTES_MAX / geometry->block_size) {
		die("%s:%" PRIu64 ": %" PRIu64 " blocks; a request has 1 to %" PRIu64, path, line,
		    io->len_blocks, COMMAND_BYTES_MAX / geometry->block_size);
	}
	if (io->lba >= geometry->block_count || io->len_blocks > geometry->block_count - io->lba) {
		die("%s:%" PRIu64 ": blocks %" PRIu64 " to %" PRIu64 "; the device has %" PRIu64, path, line,
		    io->lba, io->lba + io->len_blocks - 1, geometry->block_count);
	}
	return true;
}

enum io_status
replay(const char *url, const char *path, uint64_t *count)
{
	const struct transport *transport = transport_of(url);
	struct io io = { .done = request_answered };
	enum io_status status = IO_OK;
	struct geometry geometry;
	FILE *file = fopen(path, "r");

	if (file == NULL) {
		die("cannot open %s: %s", path, strerror(errno));
	}
	if (posix_memalign((void **)&io.buf, 4096, COMMAND_BYTES_MAX) != 0) {
		die("out of memory");
	}
	memset(io.buf, 0x5a, COMMAND_BYTES_MAX);
	if (!transport->connect(url, &geometry)) {
		die("cannot connect to %s", url);
	}
	*count = 0;
	while (status == IO_OK && next_request(file, path, *count + 1, &geometry, &io)) {
		status = run_request(transport, &io);
		*count += status == IO_OK;
	}
	transport->disconnect(status == IO_LOST);
	fclose(file);
	free(io.buf);
	return status;
}
