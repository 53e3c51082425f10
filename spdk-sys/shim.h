/* SPDX-License-Identifier: BSD-3-Clause */

/*
 * The C side of the pcache bdev module.
 *
 * SPDK promises no ABI: struct spdk_bdev, spdk_bdev_io and the function tables differ between its
 * releases and its forks. Everything that needs the layout of one of them is here, compiled against
 * the headers of the SPDK that the module is built for; the Rust side sees pointers only.
 *
 * pcache_*    are defined here and called from Rust.
 * pcache_up_* are defined in Rust and called from here. None of them unwinds.
 */

#ifndef PCACHE_SHIM_H
#define PCACHE_SHIM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "spdk/bdev.h"
#include "spdk/bdev_module.h"
#include "spdk/json.h"
#include "spdk/jsonrpc.h"

/* What a request asks for. */
enum pcache_io_kind {
	PCACHE_IO_READ,
	PCACHE_IO_WRITE,
	PCACHE_IO_FLUSH,
	PCACHE_IO_UNMAP,
	PCACHE_IO_WRITE_ZEROES,
	PCACHE_IO_RESET,
	PCACHE_IO_ABORT,
	/* ZCOPY, start: a place that holds the data is wanted. Afterwards it may be a READ, see below. */
	PCACHE_IO_LEND,
	/* ZCOPY, start: memory to be filled is wanted. The end, if it commits, is a WRITE. */
	PCACHE_IO_LEND_BUF,
	/* ZCOPY, end of what was lent, or of what is not to be written. */
	PCACHE_IO_GIVE_BACK,
	PCACHE_IO_OTHER,
};

/* What the Rust side needs to know of a request. */
struct pcache_io {
	/* READ, WRITE: the caller's scatter list. It stays as it is until the request is completed. */
	struct iovec *iovs;
	/* First block. */
	uint64_t lba;
	/* Number of blocks. */
	uint64_t block_count;
	/* ABORT: the request to be given up. */
	struct spdk_bdev_io *abort_target;
	/* Elements of iovs. */
	uint32_t iov_count;
	/* enum pcache_io_kind */
	uint32_t kind;
	/* WRITE: Force Unit Access is set. */
	bool fua;
	/* READ: the caller brought no memory; pcache_io_get_buf has to be called first. */
	bool needs_buf;
	/* GIVE_BACK: there is a loan, of this number. */
	bool lent;
	/* GIVE_BACK: the caller wants it to be written. */
	bool commit;
	uint32_t loan;
};

/* With what a bdev is registered. Sizes are in blocks unless they say otherwise. */
struct pcache_bdev_params {
	const char *name;
	uint8_t uuid[16];
	uint32_t block_size_bytes;
	uint32_t phys_block_size_bytes;
	uint64_t block_count;
	uint32_t rw_blocks_max;
	uint32_t unmap_blocks_max;
	uint32_t write_zeroes_blocks_max;
	bool write_cache;
};

enum pcache_rpc_method {
	PCACHE_RPC_CREATE,
	PCACHE_RPC_DELETE,
	PCACHE_RPC_GET_BDEVS,
	PCACHE_RPC_GET_STATS,
	PCACHE_RPC_RESET_STATS,
	PCACHE_RPC_FLUSH_START,
	PCACHE_RPC_FLUSH_STATUS,
	PCACHE_RPC_SET_OPTIONS,
	PCACHE_RPC_CHECKPOINT_BEGIN,
	PCACHE_RPC_CHECKPOINT_END,
	PCACHE_RPC_CHECKPOINT_STATUS,
};

/*
 * Referring to it (ld -u pcache_module_anchor) pulls this object, and with it the constructors that
 * register the module, out of the static library.
 */
extern const int pcache_module_anchor;

/* ---- the module ---- */

struct spdk_bdev_module *pcache_module(void);
int pcache_up_module_init(void);
void pcache_up_end_begins(void);
void pcache_up_fini_start(void);
void pcache_up_module_fini(void);
void pcache_up_config_json(struct spdk_json_write_ctx *w);
void pcache_up_examine_config(struct spdk_bdev *bdev);
/* Non-zero: spdk_bdev_module_examine_done will be called later. */
bool pcache_up_examine_disk(struct spdk_bdev *bdev);
void pcache_up_rpc(enum pcache_rpc_method method, struct spdk_jsonrpc_request *request,
		   const struct spdk_json_val *params);

/* ---- our bdevs; ctx is what pcache_bdev_new was given ---- */

/* NULL: out of memory. The memory is to be given back by pcache_bdev_free. */
struct spdk_bdev *pcache_bdev_new(void *ctx, const struct pcache_bdev_params *params);
/* Only of a bdev that was never registered or is destructed. */
void pcache_bdev_free(struct spdk_bdev *bdev);
/* Registers ctx as the io_device whose channels serve the bdev. */
void pcache_io_device_register(void *ctx, const char *name);

int pcache_up_destruct(void *ctx);
int pcache_up_dump_info(void *ctx, struct spdk_json_write_ctx *w);
void pcache_up_write_config(void *ctx, struct spdk_json_write_ctx *w);
void pcache_up_dump_stat(void *ctx, struct spdk_json_write_ctx *w);
void pcache_up_reset_stat(void *ctx);

/* ---- channels; a channel's state is a pointer of the Rust side ---- */

/* NULL: no channel to be had. */
void *pcache_up_channel_create(void *ctx);
void pcache_up_channel_destroy(void *state);
void *pcache_channel_state(struct spdk_io_channel *ch);
void pcache_up_submit(void *state, struct spdk_bdev_io *bdev_io, const struct pcache_io *io);
/*
 * The memory for a READ or LEND_BUF is there (io has its place), or there is none. A LEND has become a READ:
 * what could not be lent is copied.
 */
void pcache_up_buf_ready(void *state, struct spdk_bdev_io *bdev_io, const struct pcache_io *io,
			 bool success);
void pcache_io_get_buf(struct spdk_bdev_io *bdev_io);

/* ---- ZCOPY: a request that is seen twice, at the start and at the end ---- */

/* Whether a bdev has it. */
bool pcache_up_supports_zcopy(void *ctx);
/* At the start: gets memory that belongs to the request until it is freed; ends in pcache_up_buf_ready. */
void pcache_io_get_zcopy_buf(struct spdk_bdev_io *bdev_io);
/* At the start: the caller is to find buf. owner is the state of the channel. */
void pcache_io_lend(struct spdk_bdev_io *bdev_io, void *buf, size_t len, const void *owner,
		    uint32_t loan);
/*
 * Whether the loan goes on. While a channel is reset, and when a request is aborted in a queue of SPDK, the
 * bdev layer ends a request without asking us; afterwards it may be any request of any bdev.
 */
bool pcache_io_has_loan(const struct spdk_bdev_io *bdev_io, const void *owner, uint32_t loan);

/* ---- the base bdev ---- */

/* Is it known by this name, be it its own or an alias (the uuid is one)? */
bool pcache_bdev_is_called(const struct spdk_bdev *bdev, const char *name);
/* Claims the bdev behind desc for its only writer; closing desc releases it. */
int pcache_claim(struct spdk_bdev_desc *desc, const char *owner);
/* What SPDK's NVMe bdevs do with a FLUSH for a device with a volatile write cache. */
enum pcache_nvme_flush {
	/* There are none in this process, or they do not tell. */
	PCACHE_NVME_FLUSH_UNKNOWN,
	PCACHE_NVME_FLUSH_SENT,
	/* It succeeds, and the device never hears of it. */
	PCACHE_NVME_FLUSH_DROPPED,
};
enum pcache_nvme_flush pcache_nvme_flush(void);
bool pcache_bdev_has_dif(const struct spdk_bdev *bdev);
/* Whether bdev's module takes WRITE_ZEROES, so that SPDK does not write zeroes to it as data. */
bool pcache_bdev_zeroes_itself(const struct spdk_bdev *bdev);
void pcache_bdev_uuid(const struct spdk_bdev *bdev, uint8_t out[16]);

/* The room that a struct spdk_bdev_io_wait_entry takes; it is aligned like a pointer. */
enum { PCACHE_WAIT_ENTRY_SIZE_BYTES = sizeof(struct spdk_bdev_io_wait_entry) };

/*
 * Has entry wait for a free spdk_bdev_io, after a submission failed for lack of one. entry stays
 * where it is until fn has been called.
 */
int pcache_queue_io_wait(struct spdk_bdev_desc *desc, struct spdk_io_channel *ch,
			 struct spdk_bdev_io_wait_entry *entry, spdk_bdev_io_wait_cb fn, void *arg);

/* ---- the rest ---- */

/* level is an enum spdk_log_level; the texts need no terminator. */
void pcache_log(int level, const char *file, size_t file_len, int line, const char *text,
		size_t text_len);
/* sha1 based uuid of a name in pcache's own name space. */
void pcache_uuid_from(uint8_t out[16], const uint8_t *name, size_t len);
void pcache_uuid_random(uint8_t out[16]);
/* Whether copies are made by the CPU, and not by a device that needs registered memory. */
bool pcache_accel_copies_by_cpu(void);
/* The same for everything that the accel framework does. */
bool pcache_accel_is_software(void);
/* Size of the largest buffer that pcache_io_get_buf and pcache_io_get_zcopy_buf can get, in bytes. */
uint64_t pcache_buf_size_max(void);

#endif
