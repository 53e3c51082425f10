/* SPDX-License-Identifier: BSD-3-Clause */

#include "shim.h"

#include "spdk/accel.h"
#include "spdk/init.h"
#include "spdk/log.h"
#include "spdk/rpc.h"
#include "spdk/thread.h"
#include "spdk/util.h"
#include "spdk/uuid.h"

#if __has_include("spdk/module/bdev/nvme.h")
#include "spdk/module/bdev/nvme.h"
/* An application may have no NVMe bdevs. */
#pragma weak spdk_bdev_nvme_get_opts
#define PCACHE_KNOWS_NVME_OPTS
#endif

/* NVMe base specification, Read and Write commands: Force Unit Access is bit 30 of dword 12. */
#define PCACHE_NVME_CDW12_FUA (1u << 30)

#define PCACHE_PRODUCT_NAME "persistent-memory cache"

const int pcache_module_anchor = 1;

/* ---- the begin of the end ---- */

/*
 * spdk_bdev_finish waits until all examinations have ended, and calls fini_start then only. A cache that holds an
 * examination until it is open would keep the application from ending. SPDK's framework ends its subsystems from the
 * last to the first: one that comes behind all others hears of the end before anybody else.
 */
#if !defined(SPDK_SUBSYSTEM_REGISTER) && __has_include("spdk_internal/init.h")
/* Of a source tree. Later releases have it in spdk/init.h. */
#include "spdk_internal/init.h"
#elif !defined(SPDK_SUBSYSTEM_REGISTER)
/* An installed 26.01 has no header for it. */
struct spdk_subsystem {
	const char *name;
	void (*init)(void);
	void (*fini)(void);
	void (*write_config_json)(struct spdk_json_write_ctx *w);
	TAILQ_ENTRY(spdk_subsystem) tailq;
};

void spdk_add_subsystem(struct spdk_subsystem *subsystem);
void spdk_subsystem_fini_next(void);
#endif
/* An application may use the bdev layer without the framework. */
#pragma weak spdk_add_subsystem
#pragma weak spdk_subsystem_fini_next

static void
subsystem_fini(void)
{
	pcache_up_end_begins();
	spdk_subsystem_fini_next();
}

static struct spdk_subsystem g_pcache_subsystem = {
	.name = "pcache",
	.fini = subsystem_fini,
};

static void
add_subsystem(void)
{
	static bool is_added;

	if (!is_added && spdk_add_subsystem != NULL && spdk_subsystem_fini_next != NULL) {
		is_added = true;
		spdk_add_subsystem(&g_pcache_subsystem);
	}
}

/* ---- the module ---- */

static int
module_init(void)
{
	/* Now: the framework has sorted its subsystems, and is at the one of the bdevs. */
	add_subsystem();
	return pcache_up_module_init();
}

static void
module_fini_start(void)
{
	pcache_up_fini_start();
}

static void
module_fini(void)
{
	pcache_up_module_fini();
}

static int
module_config_json(struct spdk_json_write_ctx *w)
{
	pcache_up_config_json(w);
	return 0;
}

/* What a ZCOPY request carries from its start to its end. */
struct pcache_zcopy {
	/* The channel that has lent something; NULL: the memory is the request's own. */
	const void *owner;
	uint32_t loan;
};

static int
module_get_ctx_size(void)
{
	return sizeof(struct pcache_zcopy);
}

static void module_examine_config(struct spdk_bdev *bdev);
static void module_examine_disk(struct spdk_bdev *bdev);

static struct spdk_bdev_module g_pcache_module = {
	.name = "pcache",
	.module_init = module_init,
	.fini_start = module_fini_start,
	.async_fini_start = true,
	.module_fini = module_fini,
	.config_json = module_config_json,
	.get_ctx_size = module_get_ctx_size,
	.examine_config = module_examine_config,
	.examine_disk = module_examine_disk,
};

SPDK_BDEV_MODULE_REGISTER(pcache, &g_pcache_module)

struct spdk_bdev_module *
pcache_module(void)
{
	return &g_pcache_module;
}

static void
module_examine_config(struct spdk_bdev *bdev)
{
	pcache_up_examine_config(bdev);
	spdk_bdev_module_examine_done(&g_pcache_module);
}

static void
module_examine_disk(struct spdk_bdev *bdev)
{
	if (!pcache_up_examine_disk(bdev)) {
		spdk_bdev_module_examine_done(&g_pcache_module);
	}
}

#define PCACHE_RPC(verb, method)                                                                   \
	static void rpc_bdev_pcache_##verb(struct spdk_jsonrpc_request *request,                   \
					   const struct spdk_json_val *params)                     \
	{                                                                                          \
		pcache_up_rpc(method, request, params);                                            \
	}                                                                                          \
	SPDK_RPC_REGISTER("bdev_pcache_" #verb, rpc_bdev_pcache_##verb, SPDK_RPC_RUNTIME)

PCACHE_RPC(create, PCACHE_RPC_CREATE)
PCACHE_RPC(delete, PCACHE_RPC_DELETE)
PCACHE_RPC(get_bdevs, PCACHE_RPC_GET_BDEVS)
PCACHE_RPC(get_stats, PCACHE_RPC_GET_STATS)
PCACHE_RPC(reset_stats, PCACHE_RPC_RESET_STATS)
PCACHE_RPC(flush_start, PCACHE_RPC_FLUSH_START)
PCACHE_RPC(flush_status, PCACHE_RPC_FLUSH_STATUS)
PCACHE_RPC(set_options, PCACHE_RPC_SET_OPTIONS)
PCACHE_RPC(checkpoint_begin, PCACHE_RPC_CHECKPOINT_BEGIN)
PCACHE_RPC(checkpoint_end, PCACHE_RPC_CHECKPOINT_END)
PCACHE_RPC(checkpoint_status, PCACHE_RPC_CHECKPOINT_STATUS)

/* ---- channels ---- */

struct pcache_channel {
	void *state;
};

static int
channel_create(void *io_device, void *ctx_buf)
{
	struct pcache_channel *channel = ctx_buf;

	channel->state = pcache_up_channel_create(io_device);
	return channel->state != NULL ? 0 : -ENOMEM;
}

static void
channel_destroy(void *io_device, void *ctx_buf)
{
	struct pcache_channel *channel = ctx_buf;

	pcache_up_channel_destroy(channel->state);
}

void *
pcache_channel_state(struct spdk_io_channel *ch)
{
	struct pcache_channel *channel = spdk_io_channel_get_ctx(ch);

	return channel->state;
}

void
pcache_io_device_register(void *ctx, const char *name)
{
	spdk_io_device_register(ctx, channel_create, channel_destroy, sizeof(struct pcache_channel),
				name);
}

/* ---- requests ---- */

static struct pcache_zcopy *
zcopy_of(struct spdk_bdev_io *bdev_io)
{
	return (struct pcache_zcopy *)bdev_io->driver_ctx;
}

static const struct pcache_zcopy *
const_zcopy_of(const struct spdk_bdev_io *bdev_io)
{
	return (const struct pcache_zcopy *)bdev_io->driver_ctx;
}

static enum pcache_io_kind
zcopy_kind(const struct spdk_bdev_io *bdev_io)
{
	if (bdev_io->u.bdev.zcopy.start) {
		return bdev_io->u.bdev.zcopy.populate ? PCACHE_IO_LEND : PCACHE_IO_LEND_BUF;
	}
	if (bdev_io->u.bdev.zcopy.commit && const_zcopy_of(bdev_io)->owner == NULL) {
		return PCACHE_IO_WRITE;
	}
	return PCACHE_IO_GIVE_BACK;
}

static enum pcache_io_kind
io_kind(const struct spdk_bdev_io *bdev_io)
{
	switch (bdev_io->type) {
	case SPDK_BDEV_IO_TYPE_READ:
		return PCACHE_IO_READ;
	case SPDK_BDEV_IO_TYPE_WRITE:
		return PCACHE_IO_WRITE;
	case SPDK_BDEV_IO_TYPE_FLUSH:
		return PCACHE_IO_FLUSH;
	case SPDK_BDEV_IO_TYPE_UNMAP:
		return PCACHE_IO_UNMAP;
	case SPDK_BDEV_IO_TYPE_WRITE_ZEROES:
		return PCACHE_IO_WRITE_ZEROES;
	case SPDK_BDEV_IO_TYPE_RESET:
		return PCACHE_IO_RESET;
	case SPDK_BDEV_IO_TYPE_ABORT:
		return PCACHE_IO_ABORT;
	case SPDK_BDEV_IO_TYPE_ZCOPY:
		return zcopy_kind(bdev_io);
	default:
		return PCACHE_IO_OTHER;
	}
}

/* Only the parameters that the type has are read: they share memory with those of other types. */
static void
describe(const struct spdk_bdev_io *bdev_io, struct pcache_io *io)
{
	memset(io, 0, sizeof(*io));
	io->kind = io_kind(bdev_io);

	switch (io->kind) {
	case PCACHE_IO_READ:
		io->needs_buf = bdev_io->u.bdev.iovs[0].iov_base == NULL;
		io->iovs = bdev_io->u.bdev.iovs;
		io->iov_count = bdev_io->u.bdev.iovcnt;
		break;
	case PCACHE_IO_WRITE:
		/*
		 * The calls for a single buffer leave the dword as an earlier request of the pool
		 * had it. A flag that nobody meant costs an epoch, one that is lost would cost order.
		 * For ZCOPY nobody passes the host's flag on, so it is taken for set.
		 */
		io->fua = bdev_io->type == SPDK_BDEV_IO_TYPE_ZCOPY ||
			  (bdev_io->u.bdev.nvme_cdw12.raw & PCACHE_NVME_CDW12_FUA) != 0;
		io->iovs = bdev_io->u.bdev.iovs;
		io->iov_count = bdev_io->u.bdev.iovcnt;
		break;
	case PCACHE_IO_ABORT:
		io->abort_target = bdev_io->u.abort.bio_to_abort;
		return;
	case PCACHE_IO_GIVE_BACK:
		io->lent = const_zcopy_of(bdev_io)->owner != NULL;
		io->loan = const_zcopy_of(bdev_io)->loan;
		io->commit = bdev_io->u.bdev.zcopy.commit;
		return;
	case PCACHE_IO_FLUSH:
	case PCACHE_IO_UNMAP:
	case PCACHE_IO_WRITE_ZEROES:
	case PCACHE_IO_LEND:
	case PCACHE_IO_LEND_BUF:
		break;
	default:
		return;
	}
	io->lba = bdev_io->u.bdev.offset_blocks;
	io->block_count = bdev_io->u.bdev.num_blocks;
}

static void
bdev_submit_request(struct spdk_io_channel *ch, struct spdk_bdev_io *bdev_io)
{
	struct pcache_io io;

	describe(bdev_io, &io);
	pcache_up_submit(pcache_channel_state(ch), bdev_io, &io);
}

static void
get_buf_done(struct spdk_io_channel *ch, struct spdk_bdev_io *bdev_io, bool success)
{
	struct pcache_io io;

	describe(bdev_io, &io);
	pcache_up_buf_ready(pcache_channel_state(ch), bdev_io, &io, success);
}

void
pcache_io_get_buf(struct spdk_bdev_io *bdev_io)
{
	spdk_bdev_io_get_buf(bdev_io, get_buf_done,
			     bdev_io->u.bdev.num_blocks * bdev_io->bdev->blocklen);
}

static void
get_zcopy_buf_done(struct spdk_io_channel *ch, struct spdk_bdev_io *bdev_io, bool success)
{
	struct pcache_io io;

	describe(bdev_io, &io);
	if (io.kind == PCACHE_IO_LEND) {
		io.kind = PCACHE_IO_READ;
		io.iovs = bdev_io->u.bdev.iovs;
		io.iov_count = bdev_io->u.bdev.iovcnt;
	}
	pcache_up_buf_ready(pcache_channel_state(ch), bdev_io, &io, success);
}

void
pcache_io_get_zcopy_buf(struct spdk_bdev_io *bdev_io)
{
	zcopy_of(bdev_io)->owner = NULL;
	if (bdev_io->internal.f.has_buf) {
		/* SPDK submits it once more, having had no room for it: it has kept its memory. */
		get_zcopy_buf_done(spdk_bdev_io_get_io_channel(bdev_io), bdev_io, true);
		return;
	}
	if (bdev_io->u.bdev.iovs != NULL) {
		/* An array to be filled: what it holds is left over from other requests. */
		bdev_io->u.bdev.iovs[0].iov_base = NULL;
		bdev_io->u.bdev.iovcnt = 1;
	}
	spdk_bdev_io_get_buf(bdev_io, get_zcopy_buf_done,
			     bdev_io->u.bdev.num_blocks * bdev_io->bdev->blocklen);
}

void
pcache_io_lend(struct spdk_bdev_io *bdev_io, void *buf, size_t len, const void *owner,
	       uint32_t loan)
{
	zcopy_of(bdev_io)->owner = owner;
	zcopy_of(bdev_io)->loan = loan;
	spdk_bdev_io_set_buf(bdev_io, buf, len);
	bdev_io->u.bdev.iovcnt = 1;
}

bool
pcache_io_has_loan(const struct spdk_bdev_io *bdev_io, const void *owner, uint32_t loan)
{
	const struct pcache_zcopy *zcopy = const_zcopy_of(bdev_io);
	/*
	 * With the caller; or on its way back to us, in some queue. Another start that has not come to
	 * us yet, or was ended on the way, has another status.
	 */
	enum spdk_bdev_io_status status = bdev_io->u.bdev.zcopy.start ?
					  SPDK_BDEV_IO_STATUS_SUCCESS : SPDK_BDEV_IO_STATUS_PENDING;

	return bdev_io->type == SPDK_BDEV_IO_TYPE_ZCOPY && bdev_io->internal.status == (int)status &&
	       zcopy->owner == owner && zcopy->loan == loan;
}

/* ---- our bdevs ---- */

static int
bdev_destruct(void *ctx)
{
	return pcache_up_destruct(ctx);
}

/* A list of its own, never the base's answer: what is not here would bypass the cache. */
static bool
bdev_io_type_supported(void *ctx, enum spdk_bdev_io_type type)
{
	switch (type) {
	case SPDK_BDEV_IO_TYPE_READ:
	case SPDK_BDEV_IO_TYPE_WRITE:
	case SPDK_BDEV_IO_TYPE_FLUSH:
	case SPDK_BDEV_IO_TYPE_UNMAP:
	case SPDK_BDEV_IO_TYPE_WRITE_ZEROES:
	case SPDK_BDEV_IO_TYPE_RESET:
	case SPDK_BDEV_IO_TYPE_ABORT:
		return true;
	case SPDK_BDEV_IO_TYPE_ZCOPY:
		return pcache_up_supports_zcopy(ctx);
	default:
		return false;
	}
}

static struct spdk_io_channel *
bdev_get_io_channel(void *ctx)
{
	return spdk_get_io_channel(ctx);
}

static int
bdev_dump_info_json(void *ctx, struct spdk_json_write_ctx *w)
{
	return pcache_up_dump_info(ctx, w);
}

static void
bdev_write_config_json(struct spdk_bdev *bdev, struct spdk_json_write_ctx *w)
{
	pcache_up_write_config(bdev->ctxt, w);
}

static void
bdev_dump_device_stat_json(void *ctx, struct spdk_json_write_ctx *w)
{
	pcache_up_dump_stat(ctx, w);
}

static void
bdev_reset_device_stat(void *ctx)
{
	pcache_up_reset_stat(ctx);
}

static const struct spdk_bdev_fn_table g_pcache_fn_table = {
	.destruct = bdev_destruct,
	.submit_request = bdev_submit_request,
	.io_type_supported = bdev_io_type_supported,
	.get_io_channel = bdev_get_io_channel,
	.dump_info_json = bdev_dump_info_json,
	.write_config_json = bdev_write_config_json,
	.dump_device_stat_json = bdev_dump_device_stat_json,
	.reset_device_stat = bdev_reset_device_stat,
};

struct spdk_bdev *
pcache_bdev_new(void *ctx, const struct pcache_bdev_params *params)
{
	struct spdk_bdev *bdev;

	bdev = calloc(1, sizeof(*bdev));
	if (bdev == NULL) {
		return NULL;
	}
	bdev->name = strdup(params->name);
	if (bdev->name == NULL) {
		free(bdev);
		return NULL;
	}
	bdev->product_name = PCACHE_PRODUCT_NAME;
	bdev->write_cache = params->write_cache;
	bdev->blocklen = params->block_size_bytes;
	bdev->phys_blocklen = params->phys_block_size_bytes;
	bdev->blockcnt = params->block_count;
	bdev->write_unit_size = 1;
	bdev->max_rw_size = params->rw_blocks_max;
	bdev->max_unmap = params->unmap_blocks_max;
	bdev->max_unmap_segments = 1;
	bdev->max_write_zeroes = params->write_zeroes_blocks_max;
	memcpy(&bdev->uuid, params->uuid, sizeof(bdev->uuid));
	bdev->ctxt = ctx;
	bdev->module = &g_pcache_module;
	bdev->fn_table = &g_pcache_fn_table;
	return bdev;
}

SPDK_STATIC_ASSERT(sizeof(struct spdk_uuid) == 16, "a uuid has 16 bytes");

void
pcache_bdev_free(struct spdk_bdev *bdev)
{
	free(bdev->name);
	free(bdev);
}

/* ---- the base bdev ---- */

enum pcache_nvme_flush
pcache_nvme_flush(void)
{
#ifdef PCACHE_KNOWS_NVME_OPTS
	struct spdk_bdev_nvme_opts opts = { 0 };

	if (spdk_bdev_nvme_get_opts != NULL) {
		spdk_bdev_nvme_get_opts(&opts, sizeof(opts));
		return opts.enable_flush ? PCACHE_NVME_FLUSH_SENT : PCACHE_NVME_FLUSH_DROPPED;
	}
#endif
	return PCACHE_NVME_FLUSH_UNKNOWN;
}

bool
pcache_bdev_is_called(const struct spdk_bdev *bdev, const char *name)
{
	const struct spdk_bdev_aliases_list *aliases = spdk_bdev_get_aliases(bdev);
	const struct spdk_bdev_alias *alias;

	if (strcmp(spdk_bdev_get_name(bdev), name) == 0) {
		return true;
	}
	TAILQ_FOREACH(alias, aliases, tailq) {
		if (strcmp(alias->alias.name, name) == 0) {
			return true;
		}
	}
	return false;
}

int
pcache_claim(struct spdk_bdev_desc *desc, const char *owner)
{
	struct spdk_bdev_claim_opts opts;

	spdk_bdev_claim_opts_init(&opts, sizeof(opts));
	snprintf(opts.name, sizeof(opts.name), "pcache %s", owner);
	return spdk_bdev_module_claim_bdev_desc(desc, SPDK_BDEV_CLAIM_READ_MANY_WRITE_ONE, &opts,
						&g_pcache_module);
}

bool
pcache_bdev_has_dif(const struct spdk_bdev *bdev)
{
	return spdk_bdev_get_dif_type(bdev) != SPDK_DIF_DISABLE;
}

/* spdk_bdev_io_type_supported() says yes for whatever can be written: SPDK writes zeroes to it. */
bool
pcache_bdev_zeroes_itself(const struct spdk_bdev *bdev)
{
	return bdev->fn_table->io_type_supported(bdev->ctxt, SPDK_BDEV_IO_TYPE_WRITE_ZEROES);
}

void
pcache_bdev_uuid(const struct spdk_bdev *bdev, uint8_t out[16])
{
	memcpy(out, spdk_bdev_get_uuid(bdev), 16);
}

SPDK_STATIC_ASSERT(_Alignof(struct spdk_bdev_io_wait_entry) <= _Alignof(void *),
		   "the Rust side aligns the entry like a pointer");

int
pcache_queue_io_wait(struct spdk_bdev_desc *desc, struct spdk_io_channel *ch,
		     struct spdk_bdev_io_wait_entry *entry, spdk_bdev_io_wait_cb fn, void *arg)
{
	memset(entry, 0, sizeof(*entry));
	entry->bdev = spdk_bdev_desc_get_bdev(desc);
	entry->cb_fn = fn;
	entry->cb_arg = arg;
	return spdk_bdev_queue_io_wait(entry->bdev, ch, entry);
}

/* ---- the rest ---- */

void
pcache_log(int level, const char *file, size_t file_len, int line, const char *text,
	   size_t text_len)
{
	char name[64];

	snprintf(name, sizeof(name), "%.*s", (int)file_len, file);
	spdk_log(level, name, line, "pcache", "%.*s\n", (int)text_len, text);
}

void
pcache_uuid_from(uint8_t out[16], const uint8_t *name, size_t len)
{
	/* 0f6d1c5a-6b8e-4f0c-9a5d-70636163 6865 ("pcache"): drawn once, never to change. */
	static const uint8_t name_space[16] = {
		0x0f, 0x6d, 0x1c, 0x5a, 0x6b, 0x8e, 0x4f, 0x0c,
		0x9a, 0x5d, 0x70, 0x63, 0x61, 0x63, 0x68, 0x65,
	};
	struct spdk_uuid ns, uuid;

	memcpy(&ns, name_space, sizeof(ns));
	memset(&uuid, 0, sizeof(uuid));
	spdk_uuid_generate_sha1(&uuid, &ns, (const char *)name, len);
	memcpy(out, &uuid, sizeof(uuid));
}

void
pcache_uuid_random(uint8_t out[16])
{
	struct spdk_uuid uuid;

	spdk_uuid_generate(&uuid);
	memcpy(out, &uuid, sizeof(uuid));
}

bool
pcache_accel_copies_by_cpu(void)
{
	const char *module = NULL;

	return spdk_accel_get_opc_module_name(SPDK_ACCEL_OPC_COPY, &module) == 0 &&
	       module != NULL && strcmp(module, "software") == 0;
}

bool
pcache_accel_is_software(void)
{
	const char *module;
	int opcode;

	for (opcode = 0; opcode < SPDK_ACCEL_OPC_LAST; opcode++) {
		/* What nobody does is done by no device. */
		if (spdk_accel_get_opc_module_name(opcode, &module) == 0 &&
		    strcmp(module, "software") != 0) {
			return false;
		}
	}
	return true;
}

uint64_t
pcache_buf_size_max(void)
{
	struct spdk_iobuf_opts opts;

	spdk_iobuf_get_opts(&opts, sizeof(opts));
	return opts.large_bufsize;
}
