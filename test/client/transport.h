/* SPDX-License-Identifier: BSD-3-Clause */
/* How requests reach a target. One connection at a time; one thread. */
#ifndef ACKCLIENT_TRANSPORT_H
#define ACKCLIENT_TRANSPORT_H

#include <stdbool.h>
#include <stdint.h>

/* Requests that there is room for. */
#define DEPTH_MAX	128

enum io_kind { IO_READ, IO_WRITE, IO_WRITE_FUA, IO_WRITE_ZEROES, IO_UNMAP, IO_FLUSH };

enum io_status {
	IO_OK,
	IO_ERROR,	/* the target answered with an error */
	IO_LOST,	/* there was no answer: the connection is going down */
};

struct io {
	enum io_kind kind;
	/* Tells it from the others under way; below DEPTH_MAX. */
	unsigned index;
	uint64_t lba;
	uint64_t len_blocks;
	/* Of a read or a write. It stays as it is until `done`. */
	uint8_t *buf;
	void (*done)(struct io *io, enum io_status status, const char *reason);
};

struct geometry {
	uint64_t block_size;
	uint64_t block_count;
};

struct transport {
	/* What its urls begin with. */
	const char *scheme;
	/* Requests under way at once, at most. */
	unsigned depth_max;
	/* Bits of the io_kinds that it cannot send. */
	unsigned unsupported;
	/* False, after a complaint on stderr: there is no such target, or not yet. */
	bool (*connect)(const char *url, struct geometry *geometry);
	/* False: the connection is gone. */
	bool (*submit)(struct io *io);
	/* Waits for answers a little while; false: the connection is gone. */
	bool (*service)(void);
	/* `gone`: without saying good-bye. Requests under way may end with IO_LOST meanwhile. */
	void (*disconnect)(bool gone);
};

extern const struct transport iscsi_transport;
extern const struct transport nvme_tcp_transport;

/* The one for a url. */
const struct transport *transport_of(const char *url);

/* Complains, and ends the program with the status for "cannot start". */
void die(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));

#endif
