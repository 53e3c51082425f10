/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * ackclient - a storage client that remembers what it was promised.
 *
 * It writes to a device over iSCSI or NVMe/TCP and keeps, in a journal file, which version of each block it has sent
 * (issued) and which one the target has acknowledged (acked). Whatever then happens to the
 * target - SIGKILL included - a later verify reads every block back and checks that it holds
 *
 *   - the acked version, or
 *   - the issued one, if a write was under way when the connection broke,
 *
 * and that such a write, if small enough to be promised atomic, is there as a whole or not at all.
 * Reads that are mixed into the writes must return the acked version exactly.
 *
 * Each sector of a block carries the block's number and version and a pattern made from both, so
 * any content that is neither of the two allowed ones shows. Version 0 is a block of zeroes.
 *
 * The journal is a shared mapping: it stays complete when this program is killed as well. After a
 * break nothing may be written before a verify has settled what the interrupted writes became;
 * from then on that content is the acked one.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "history.h"
#include "replay.h"
#include "transport.h"

enum exit_code {
	EXIT_DONE = 0,
	EXIT_VIOLATION = 1,	/* the data are not what was promised */
	EXIT_SETUP = 2,		/* bad arguments, no journal, no connection */
	EXIT_TARGET_ERROR = 3,	/* the target answered with an error */
	EXIT_DISCONNECTED = 4,	/* the connection broke while requests were under way */
	EXIT_HUNG = 5,		/* no answer for a long time */
};

#define JOURNAL_MAGIC	0x314b4341484341ULL	/* "ACHACK1" */
#define SECTOR_MAGIC	0x61636b636c69656eULL
#define SECTOR_SIZE	512u
#define IO_BYTES_MAX	(1024u * 1024u)
/* A target over NVMe/TCP takes no more at once, unless told. */
#define VERIFY_IO_BYTES	(128u * 1024u)
#define VERIFY_DEPTH	16
#define ZERO_VERSION	0ULL
/* Marks a version whose content is zeroes: an UNMAP or WRITE ZEROES. */
#define ZERO_FLAG	(1ULL << 63)
/* What a block holds if it is no version at all. */
#define GARBAGE		UINT64_MAX
#define HANG_SECONDS	60
#define COMPLAINTS_MAX	12

struct journal_slot {
	uint64_t version;	/* 0: free */
	uint64_t lba;
	uint64_t len_blocks;
};

struct journal_block {
	uint64_t issued;
	uint64_t acked;
};

/* test/e2e/harness/ackclient.py reads the counters; the layout is known to both. */
struct journal_header {
	uint64_t magic;
	uint64_t block_count;
	uint64_t block_size;
	uint64_t seed;
	uint64_t next_version;
	uint64_t writes_issued;
	uint64_t writes_acked;
	uint64_t unmaps_acked;
	uint64_t flushes_acked;
	uint64_t reads_checked;
	uint64_t blocks_acked;
	uint64_t rsv[5];
	struct journal_slot slots[DEPTH_MAX];
};

struct options {
	const char *journal_path;
	const char *url;
	const char *file;
	uint64_t block_size;
	uint64_t block_count;
	uint64_t seed;
	unsigned depth;
	unsigned io_bytes_min;
	unsigned io_bytes_max;
	unsigned read_percent;
	unsigned unmap_percent;
	unsigned zero_percent;
	unsigned flush_percent;
	unsigned fua_percent;
	unsigned atomic_bytes_max;
	double seconds;
	uint64_t writes_max;
	bool aligned;
};

static struct options g_opt = {
	.block_size = 512,
	.seed = 1,
	.depth = 32,
	.io_bytes_min = 512,
	.io_bytes_max = 128 * 1024,
	.read_percent = 20,
	.unmap_percent = 4,
	.flush_percent = 2,
	.atomic_bytes_max = 64 * 1024,
	.seconds = 5,
};

static struct journal_header *g_journal;
static struct journal_block *g_blocks;
static volatile sig_atomic_t g_stop;

/* ---- small helpers -------------------------------------------------------------------------- */

void
die(const char *format, ...)
{
	va_list args;

	fputs("ackclient: ", stderr);
	va_start(args, format);
	vfprintf(stderr, format, args);
	va_end(args);
	fputc('\n', stderr);
	exit(EXIT_SETUP);
}

static double
now_s(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

static uint64_t
mix(uint64_t x)
{
	x ^= x >> 30;
	x *= 0xbf58476d1ce4e5b9ULL;
	x ^= x >> 27;
	x *= 0x94d049bb133111ebULL;
	return x ^ (x >> 31);
}

static uint64_t g_random_state;

static uint64_t
random_u64(void)
{
	g_random_state += 0x9e3779b97f4a7c15ULL;
	return mix(g_random_state);
}

static uint64_t
random_below(uint64_t bound)
{
	return random_u64() % bound;
}

static void *
xcalloc(size_t count, size_t size)
{
	void *p = calloc(count, size);

	if (p == NULL) {
		die("out of memory");
	}
	return p;
}

/* ---- what a block of a version looks like ------------------------------------------------------ */

static void
fill_block(uint8_t *buf, uint64_t lba, uint64_t version)
{
	size_t words = SECTOR_SIZE / sizeof(uint64_t);
	uint64_t sectors = g_journal->block_size / SECTOR_SIZE;

	if (version == ZERO_VERSION || (version & ZERO_FLAG)) {
		memset(buf, 0, g_journal->block_size);
		return;
	}
	for (uint64_t sector = 0; sector < sectors; sector++) {
		uint64_t *word = (uint64_t *)(buf + sector * SECTOR_SIZE);
		uint64_t state = mix(g_journal->seed ^ mix(lba * sectors + sector) ^ (version << 20));

		word[0] = SECTOR_MAGIC ^ g_journal->seed;
		word[1] = lba;
		word[2] = version;
		for (size_t i = 3; i < words; i++) {
			state += 0x9e3779b97f4a7c15ULL;
			word[i] = state ^ (state >> 29);
		}
	}
}

/* The version that a block holds: ZERO_VERSION for zeroes, GARBAGE for anything unknown. */
static uint64_t
decode_block(const uint8_t *buf, uint64_t lba)
{
	static uint8_t expected[65536];
	const uint64_t *word = (const uint64_t *)buf;
	uint64_t version = ZERO_VERSION;

	if (word[0] == (SECTOR_MAGIC ^ g_journal->seed) && word[1] == lba && !(word[2] & ZERO_FLAG)) {
		version = word[2];
	}
	fill_block(expected, lba, version);
	return memcmp(buf, expected, g_journal->block_size) == 0 ? version : GARBAGE;
}

static uint64_t
content_of(uint64_t version)
{
	return (version & ZERO_FLAG) ? ZERO_VERSION : version;
}

/* ---- the journal --------------------------------------------------------------------------------- */

static size_t
journal_size(uint64_t block_count)
{
	return sizeof(struct journal_header) + block_count * sizeof(struct journal_block);
}

static void
map_journal(int fd, size_t size)
{
	g_journal = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (g_journal == MAP_FAILED) {
		die("cannot map %s: %s", g_opt.journal_path, strerror(errno));
	}
	g_blocks = (struct journal_block *)(g_journal + 1);
	close(fd);
}

static void
create_journal(void)
{
	size_t size = journal_size(g_opt.block_count);
	int fd;

	if (g_opt.block_count == 0 || g_opt.block_size % SECTOR_SIZE || g_opt.block_size > 65536 ||
	    g_opt.block_size == 0) {
		die("init needs --block-count, and --block-size as a multiple of %u", SECTOR_SIZE);
	}
	fd = open(g_opt.journal_path, O_RDWR | O_CREAT | O_TRUNC, 0600);
	if (fd < 0 || ftruncate(fd, (off_t)size) != 0) {
		die("cannot create %s: %s", g_opt.journal_path, strerror(errno));
	}
	map_journal(fd, size);
	g_journal->block_count = g_opt.block_count;
	g_journal->block_size = g_opt.block_size;
	g_journal->seed = g_opt.seed;
	g_journal->next_version = 1;
	g_journal->magic = JOURNAL_MAGIC;
}

static void
open_journal(void)
{
	struct stat st;
	int fd = open(g_opt.journal_path, O_RDWR);

	if (fd < 0 || fstat(fd, &st) != 0) {
		die("cannot open the journal %s: %s", g_opt.journal_path, strerror(errno));
	}
	if ((size_t)st.st_size < sizeof(struct journal_header)) {
		die("%s is no journal", g_opt.journal_path);
	}
	map_journal(fd, (size_t)st.st_size);
	if (g_journal->magic != JOURNAL_MAGIC ||
	    (size_t)st.st_size != journal_size(g_journal->block_count)) {
		die("%s is no journal", g_opt.journal_path);
	}
}

static bool
journal_is_settled(void)
{
	for (unsigned i = 0; i < DEPTH_MAX; i++) {
		if (g_journal->slots[i].version != 0) {
			return false;
		}
	}
	return true;
}

/* ---- the connection ------------------------------------------------------------------------------------- */

struct session {
	const struct transport *transport;
	unsigned outstanding;
	bool closing;
	bool failed;
	double last_answer_s;
};

static struct session g_session;

const struct transport *
transport_of(const char *url)
{
	static const struct transport *const transports[] = { &iscsi_transport, &nvme_tcp_transport };

	for (size_t i = 0; i < sizeof(transports) / sizeof(transports[0]); i++) {
		if (strncmp(url, transports[i]->scheme, strlen(transports[i]->scheme)) == 0) {
			return transports[i];
		}
	}
	die("not a url of a target: %s", url);
}

static void
connect_target(void)
{
	struct geometry geometry;

	if (g_opt.url == NULL) {
		die("--url is missing");
	}
	g_session.transport = transport_of(g_opt.url);
	for (int attempt = 0; !g_session.transport->connect(g_opt.url, &geometry); attempt++) {
		if (attempt == 20) {
			die("cannot connect to %s", g_opt.url);
		}
		usleep(100 * 1000);
	}
	if (geometry.block_size != g_journal->block_size ||
	    geometry.block_count < g_journal->block_count) {
		die("the device has another block size than the journal, or is smaller");
	}
	g_session.last_answer_s = now_s();
}

static void
disconnect_target(void)
{
	/* What is still under way may end now; that must change nothing. */
	g_session.closing = true;
	g_session.transport->disconnect(g_session.failed);
}

/* Waits for events a little while; false if the connection is gone. */
static bool
service_session(void)
{
	if (!g_session.transport->service()) {
		g_session.failed = true;
	}
	return !g_session.failed;
}

static bool
session_hangs(void)
{
	return g_session.outstanding > 0 && now_s() - g_session.last_answer_s > HANG_SECONDS;
}

/* ---- requests of the write phase ---------------------------------------------------------------------- */

struct request {
	/* First: what is done to the one is done to the other. */
	struct io io;
	bool busy;
	uint64_t version;
};

static struct request g_requests[DEPTH_MAX];
/* Blocks that a request is under way for; no two requests share one. */
static uint8_t *g_in_use;
static unsigned g_target_errors;
static unsigned g_stale_reads;

static bool
writes_zeroes(enum io_kind kind)
{
	return kind == IO_UNMAP || kind == IO_WRITE_ZEROES;
}

static void
set_in_use(const struct request *req, uint8_t value)
{
	memset(g_in_use + req->io.lba, value, req->io.len_blocks);
}

static void
check_read(const struct request *req)
{
	for (uint64_t i = 0; i < req->io.len_blocks; i++) {
		uint64_t lba = req->io.lba + i;
		uint64_t expected = content_of(g_blocks[lba].acked);
		uint64_t found = decode_block(req->io.buf + i * g_journal->block_size, lba);

		if (found != expected && g_stale_reads++ < COMPLAINTS_MAX) {
			fprintf(stderr, "ackclient: read of block %" PRIu64 " returned version %" PRId64
				", acknowledged is %" PRId64 "\n", lba, (int64_t)found, (int64_t)expected);
		}
	}
	g_journal->reads_checked++;
}

static void
record_ack(const struct request *req)
{
	for (uint64_t i = 0; i < req->io.len_blocks; i++) {
		g_blocks[req->io.lba + i].acked = req->version;
	}
	history_note(HISTORY_ACKED, req->version, req->io.lba, req->io.len_blocks);
	g_journal->slots[req->io.index].version = 0;
	g_journal->blocks_acked += req->io.len_blocks;
	if (writes_zeroes(req->io.kind)) {
		g_journal->unmaps_acked++;
	} else {
		g_journal->writes_acked++;
	}
}

static void
request_done(struct io *io, enum io_status status, const char *reason)
{
	struct request *req = (struct request *)io;

	if (g_session.closing) {
		return;
	}
	g_session.outstanding--;
	g_session.last_answer_s = now_s();
	if (status == IO_LOST) {
		g_session.failed = true;
		return;
	}
	if (status == IO_ERROR) {
		if (g_target_errors++ < COMPLAINTS_MAX) {
			fprintf(stderr, "ackclient: request kind %d, block %" PRIu64 ", %" PRIu64
				" blocks: %s\n", io->kind, io->lba, io->len_blocks, reason);
		}
		return;
	}
	if (io->kind == IO_READ) {
		check_read(req);
	} else if (io->kind == IO_FLUSH) {
		g_journal->flushes_acked++;
	} else {
		record_ack(req);
	}
	if (io->kind != IO_FLUSH) {
		set_in_use(req, 0);
	}
	req->busy = false;
}

/* The journal knows of a write before the target does. */
static void
record_issue(struct request *req)
{
	struct journal_slot *slot = &g_journal->slots[req->io.index];

	req->version = g_journal->next_version++;
	if (writes_zeroes(req->io.kind)) {
		req->version |= ZERO_FLAG;
	}
	slot->lba = req->io.lba;
	slot->len_blocks = req->io.len_blocks;
	slot->version = req->version;
	history_note(HISTORY_ISSUED, req->version, req->io.lba, req->io.len_blocks);
	for (uint64_t i = 0; i < req->io.len_blocks; i++) {
		g_blocks[req->io.lba + i].issued = req->version;
	}
	g_journal->writes_issued++;
}

static enum io_kind
choose_kind(void)
{
	const struct {
		enum io_kind kind;
		unsigned percent;
	} table[] = {
		{ IO_READ, g_opt.read_percent },
		{ IO_UNMAP, g_opt.unmap_percent },
		{ IO_WRITE_ZEROES, g_opt.zero_percent },
		{ IO_FLUSH, g_opt.flush_percent },
		{ IO_WRITE_FUA, g_opt.fua_percent },
	};
	uint64_t dice = random_below(100);

	for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
		if (dice < table[i].percent) {
			return table[i].kind;
		}
		dice -= table[i].percent;
	}
	return IO_WRITE;
}

/* Half of the requests go to the first sixteenth, so that blocks are overwritten soon and often. */
static bool
choose_range(struct request *req)
{
	uint64_t min = g_opt.io_bytes_min / g_journal->block_size;
	uint64_t max = g_opt.io_bytes_max / g_journal->block_size;
	uint64_t span = g_journal->block_count;
	uint64_t len;

	min = min ? min : 1;
	max = max > min ? max : min;
	/* Sizes are spread over the powers of two, not over the bytes: small ones are as common. */
	for (len = min; len < max && random_below(5) != 0; len *= 2)
		;
	len = len > max ? max : len;
	if (!g_opt.aligned && len > min && random_below(4) == 0) {
		len = min + random_below(len - min + 1);
	}
	if (random_below(2) == 0 && span / 16 > len) {
		span /= 16;
	}
	req->io.lba = random_below(span - len + 1);
	if (g_opt.aligned) {
		req->io.lba -= req->io.lba % len;
	}
	req->io.len_blocks = len;
	return memchr(g_in_use + req->io.lba, 1, len) == NULL;
}

static void
start_request(struct request *req)
{
	req->io.kind = choose_kind();
	if (req->io.kind != IO_FLUSH) {
		for (int attempt = 0; !choose_range(req); attempt++) {
			if (attempt == 16) {
				return;
			}
		}
		set_in_use(req, 1);
	}
	if (req->io.kind != IO_FLUSH && req->io.kind != IO_READ) {
		record_issue(req);
	}
	if (req->io.kind == IO_WRITE || req->io.kind == IO_WRITE_FUA) {
		for (uint64_t i = 0; i < req->io.len_blocks; i++) {
			fill_block(req->io.buf + i * g_journal->block_size, req->io.lba + i,
				   req->version);
		}
	}
	req->busy = true;
	g_session.outstanding++;
	if (!g_session.transport->submit(&req->io)) {
		g_session.failed = true;
	}
}

static bool
may_start_more(double end_s)
{
	return !g_stop && g_target_errors == 0 && g_stale_reads == 0 && now_s() < end_s &&
	       (g_opt.writes_max == 0 || g_journal->writes_issued < g_opt.writes_max);
}

static void
prepare_requests(void (*done)(struct io *, enum io_status, const char *))
{
	g_in_use = xcalloc(g_journal->block_count, 1);
	for (unsigned i = 0; i < g_opt.depth; i++) {
		g_requests[i].io.index = i;
		g_requests[i].io.done = done;
		if (posix_memalign((void **)&g_requests[i].io.buf, 4096, IO_BYTES_MAX) != 0) {
			die("out of memory");
		}
	}
}

static void
check_requests(void)
{
	const struct transport *transport = g_session.transport;

	if (g_opt.depth > transport->depth_max) {
		die("--depth is at most %u for %s", transport->depth_max, transport->scheme);
	}
	if (g_opt.read_percent + g_opt.unmap_percent + g_opt.zero_percent + g_opt.flush_percent +
	    g_opt.fua_percent > 100) {
		die("the shares are more than 100 percent");
	}
	if ((g_opt.fua_percent && transport->unsupported & 1u << IO_WRITE_FUA) ||
	    (g_opt.zero_percent && transport->unsupported & 1u << IO_WRITE_ZEROES)) {
		die("--fua-percent and --zero-percent are for NVMe/TCP");
	}
}

static int
run_writes(void)
{
	uint64_t acked_before = g_journal->writes_acked;
	double start_s, end_s;
	int rc = EXIT_DONE;

	if (!journal_is_settled()) {
		die("the last run was interrupted: run verify first");
	}
	if (g_opt.depth == 0 || g_opt.depth > DEPTH_MAX || g_opt.io_bytes_max > IO_BYTES_MAX ||
	    g_opt.io_bytes_max / g_journal->block_size > g_journal->block_count) {
		die("--depth is 1 to %d, --io-bytes at most %u and at most the device", DEPTH_MAX,
		    IO_BYTES_MAX);
	}
	g_random_state = g_journal->seed ^ mix(g_journal->next_version);
	prepare_requests(request_done);
	connect_target();
	check_requests();
	start_s = now_s();
	end_s = start_s + g_opt.seconds;
	while (may_start_more(end_s) || g_session.outstanding > 0) {
		for (unsigned i = 0; i < g_opt.depth && may_start_more(end_s); i++) {
			if (!g_requests[i].busy) {
				start_request(&g_requests[i]);
			}
		}
		if (!service_session()) {
			rc = EXIT_DISCONNECTED;
			break;
		}
		if (session_hangs()) {
			g_session.failed = true;
			rc = EXIT_HUNG;
			break;
		}
		if (g_target_errors >= g_opt.depth) {
			break;
		}
	}
	if (g_stale_reads) {
		rc = EXIT_VIOLATION;
	} else if (g_target_errors && rc == EXIT_DONE) {
		rc = EXIT_TARGET_ERROR;
	}
	printf("{\"mode\": \"write\", \"exit\": %d, \"seconds\": %.3f, \"writes_acked\": %" PRIu64
	       ", \"writes_acked_total\": %" PRIu64 ", \"reads_checked_total\": %" PRIu64
	       ", \"stale_reads\": %u, \"target_errors\": %u}\n",
	       rc, now_s() - start_s, g_journal->writes_acked - acked_before,
	       g_journal->writes_acked, g_journal->reads_checked, g_stale_reads, g_target_errors);
	disconnect_target();
	return rc;
}

/* ---- verify ------------------------------------------------------------------------------------------------ */

static uint64_t *g_observed;

struct verdict {
	uint64_t lost_blocks;
	uint64_t lost_writes;
	uint64_t garbage_blocks;
	uint64_t torn_writes;
	uint64_t interrupted_writes;
	uint64_t interrupted_found;
	unsigned complaints;
};

static bool
may_complain(struct verdict *verdict)
{
	return verdict->complaints++ < COMPLAINTS_MAX;
}

static int
compare_u64(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

static uint64_t
count_distinct(uint64_t *values, uint64_t count)
{
	uint64_t distinct = 0;

	qsort(values, count, sizeof(*values), compare_u64);
	for (uint64_t i = 0; i < count; i++) {
		distinct += i == 0 || values[i] != values[i - 1];
	}
	return distinct;
}

static void
judge_blocks(struct verdict *verdict)
{
	uint64_t *lost = xcalloc(g_journal->block_count, sizeof(*lost));

	for (uint64_t lba = 0; lba < g_journal->block_count; lba++) {
		uint64_t found = g_observed[lba];
		uint64_t acked = content_of(g_blocks[lba].acked);
		uint64_t issued = content_of(g_blocks[lba].issued);

		if (found == acked || found == issued) {
			continue;
		}
		lost[verdict->lost_blocks++] = g_blocks[lba].acked;
		verdict->garbage_blocks += found == GARBAGE;
		if (may_complain(verdict)) {
			fprintf(stderr, "ackclient: block %" PRIu64 " holds version %" PRId64
				", acknowledged is %" PRIu64 ", last issued %" PRIu64 "%s\n", lba,
				(int64_t)found, acked, issued,
				found == GARBAGE ? " (no content that was ever written there)" : "");
		}
	}
	verdict->lost_writes = count_distinct(lost, verdict->lost_blocks);
	free(lost);
}

/* Is an interrupted write there as a whole, or not at all? */
static void
judge_interrupted(struct verdict *verdict, const struct journal_slot *slot)
{
	uint64_t content = content_of(slot->version);
	uint64_t telling = 0, present = 0;

	for (uint64_t lba = slot->lba; lba < slot->lba + slot->len_blocks; lba++) {
		/* A block that was zeroes before tells nothing about an unmap. */
		if (content_of(g_blocks[lba].acked) != content) {
			telling++;
			present += g_observed[lba] == content;
		}
	}
	verdict->interrupted_writes++;
	verdict->interrupted_found += present > 0;
	if (present == 0 || present == telling ||
	    slot->len_blocks * g_journal->block_size > g_opt.atomic_bytes_max) {
		return;
	}
	verdict->torn_writes++;
	if (may_complain(verdict)) {
		fprintf(stderr, "ackclient: interrupted %s of %" PRIu64 " blocks at block %" PRIu64
			" is there in part: %" PRIu64 " of %" PRIu64 "\n",
			(slot->version & ZERO_FLAG) ? "unmap" : "write", slot->len_blocks, slot->lba,
			present, telling);
	}
}

/* What was found is what counts from now on: a later read must return the same. */
static void
settle_journal(void)
{
	for (uint64_t lba = 0; lba < g_journal->block_count; lba++) {
		struct journal_block *block = &g_blocks[lba];

		if (g_observed[lba] == content_of(block->issued)) {
			block->acked = block->issued;
		} else {
			block->issued = block->acked;
		}
	}
	memset(g_journal->slots, 0, sizeof(g_journal->slots));
}

static int
judge(const char *mode)
{
	struct verdict verdict = { 0 };
	int rc;

	judge_blocks(&verdict);
	for (unsigned i = 0; i < DEPTH_MAX; i++) {
		if (g_journal->slots[i].version != 0) {
			judge_interrupted(&verdict, &g_journal->slots[i]);
		}
	}
	rc = verdict.lost_blocks || verdict.torn_writes ? EXIT_VIOLATION : EXIT_DONE;
	printf("{\"mode\": \"%s\", \"exit\": %d, \"blocks\": %" PRIu64 ", \"writes_acked_total\": %" PRIu64
	       ", \"lost_writes\": %" PRIu64 ", \"lost_blocks\": %" PRIu64 ", \"garbage_blocks\": %" PRIu64
	       ", \"torn_writes\": %" PRIu64 ", \"interrupted_writes\": %" PRIu64
	       ", \"interrupted_found\": %" PRIu64 "}\n",
	       mode, rc, g_journal->block_count, g_journal->writes_acked, verdict.lost_writes,
	       verdict.lost_blocks, verdict.garbage_blocks, verdict.torn_writes,
	       verdict.interrupted_writes, verdict.interrupted_found);
	if (rc == EXIT_DONE) {
		settle_journal();
	}
	return rc;
}

static void
observe(const uint8_t *buf, uint64_t lba, uint64_t len_blocks)
{
	for (uint64_t i = 0; i < len_blocks; i++) {
		g_observed[lba + i] = decode_block(buf + i * g_journal->block_size, lba + i);
	}
}

static void
verify_read_done(struct io *io, enum io_status status, const char *reason)
{
	if (g_session.closing) {
		return;
	}
	g_session.outstanding--;
	g_session.last_answer_s = now_s();
	((struct request *)io)->busy = false;
	if (status != IO_OK) {
		g_target_errors++;
		fprintf(stderr, "ackclient: reading %" PRIu64 " blocks at %" PRIu64 ": %s\n",
			io->len_blocks, io->lba, reason);
	} else {
		observe(io->buf, io->lba, io->len_blocks);
	}
}

static bool
start_verify_read(struct request *req, uint64_t lba)
{
	uint64_t left = g_journal->block_count - lba;
	uint64_t len = VERIFY_IO_BYTES / g_journal->block_size;

	req->io.kind = IO_READ;
	req->io.lba = lba;
	req->io.len_blocks = len < left ? len : left;
	req->busy = true;
	g_session.outstanding++;
	return g_session.transport->submit(&req->io);
}

static int
run_verify(void)
{
	uint64_t next_lba = 0;
	int rc = EXIT_DONE;

	g_observed = xcalloc(g_journal->block_count, sizeof(*g_observed));
	g_opt.depth = VERIFY_DEPTH;
	prepare_requests(verify_read_done);
	connect_target();
	while (next_lba < g_journal->block_count || g_session.outstanding > 0) {
		for (unsigned i = 0; i < g_opt.depth && next_lba < g_journal->block_count; i++) {
			if (g_requests[i].busy) {
				continue;
			}
			if (!start_verify_read(&g_requests[i], next_lba)) {
				g_session.failed = true;
			}
			next_lba += g_requests[i].io.len_blocks;
		}
		if (!service_session() || session_hangs()) {
			rc = g_session.failed ? EXIT_DISCONNECTED : EXIT_HUNG;
			g_session.failed = true;
			fprintf(stderr, "ackclient: the connection broke during verify\n");
			break;
		}
		if (g_target_errors) {
			rc = EXIT_TARGET_ERROR;
			break;
		}
	}
	disconnect_target();
	return rc == EXIT_DONE ? judge("verify") : rc;
}

/* ---- files ------------------------------------------------------------------------------------------------- */

static int
open_file(int flags)
{
	int fd;

	if (g_opt.file == NULL) {
		die("--file is missing");
	}
	fd = open(g_opt.file, flags, 0600);
	if (fd < 0) {
		die("cannot open %s: %s", g_opt.file, strerror(errno));
	}
	return fd;
}

/* Checks a raw image, without any target or cache. */
static int
run_verify_file(void)
{
	uint64_t len = VERIFY_IO_BYTES / g_journal->block_size;
	uint8_t *buf = xcalloc(1, VERIFY_IO_BYTES);
	int fd = open_file(O_RDONLY);

	g_observed = xcalloc(g_journal->block_count, sizeof(*g_observed));
	for (uint64_t lba = 0; lba < g_journal->block_count; lba += len) {
		uint64_t left = g_journal->block_count - lba;
		uint64_t part = len < left ? len : left;
		ssize_t bytes = (ssize_t)(part * g_journal->block_size);

		if (pread(fd, buf, (size_t)bytes, (off_t)(lba * g_journal->block_size)) != bytes) {
			die("%s is shorter than the journal's device", g_opt.file);
		}
		observe(buf, lba, part);
	}
	close(fd);
	return judge("verify-file");
}

/* Makes the journal; with --file also an image with content of its own in every block. */
static int
run_init(void)
{
	uint8_t *buf;
	int fd;

	create_journal();
	if (g_opt.file == NULL) {
		return EXIT_DONE;
	}
	buf = xcalloc(1, g_journal->block_size);
	fd = open_file(O_WRONLY | O_CREAT);
	for (uint64_t lba = 0; lba < g_journal->block_count; lba++) {
		fill_block(buf, lba, 1);
		if (pwrite(fd, buf, g_journal->block_size, (off_t)(lba * g_journal->block_size)) !=
		    (ssize_t)g_journal->block_size) {
			die("cannot write %s: %s", g_opt.file, strerror(errno));
		}
		g_blocks[lba].issued = g_blocks[lba].acked = 1;
	}
	g_journal->next_version = 2;
	close(fd);
	return EXIT_DONE;
}

/* ---- replay ------------------------------------------------------------------------------------------------ */

/* Keeps no journal: what counts is what the target makes of the requests. */
static int
run_replay(void)
{
	double start_s = now_s();
	uint64_t count;
	int rc = EXIT_DONE;

	if (g_opt.url == NULL || g_opt.file == NULL) {
		die("replay needs --url, and --file with the requests");
	}
	switch (replay(g_opt.url, g_opt.file, &count)) {
	case IO_OK:
		break;
	case IO_ERROR:
		rc = EXIT_TARGET_ERROR;
		break;
	case IO_LOST:
		rc = EXIT_DISCONNECTED;
		break;
	}
	printf("{\"mode\": \"replay\", \"exit\": %d, \"seconds\": %.3f, \"requests\": %" PRIu64 "}\n",
	       rc, now_s() - start_s, count);
	return rc;
}

/* ---- command line ---------------------------------------------------------------------------------------------- */

static const char g_usage[] =
	"ackclient MODE --journal FILE [options]; replay needs no journal\n"
	"\n"
	"  init         make a journal: --block-count N --block-size N --seed N; with --file, also\n"
	"               fill that image with content of its own\n"
	"  write        random writes, with checked reads, unmaps and flushes: --url, --seconds N,\n"
	"               --writes N (0: no limit), --depth N, --io-bytes MIN:MAX, --aligned,\n"
	"               --read-percent, --unmap-percent, --flush-percent N; with NVMe/TCP also\n"
	"               --zero-percent (WRITE ZEROES), --fua-percent N; --history FILE: append\n"
	"               what is issued and acknowledged, in order\n"
	"  verify       read everything back from --url and compare with the journal;\n"
	"               --atomic-bytes N: largest write that must not be torn\n"
	"  verify-file  the same on a raw image: --file\n"
	"  replay       send the requests of --file to --url, one by one: lines 'read LBA LEN' or\n"
	"               'write LBA LEN', in blocks\n"
	"\n"
	"exit status: 0 done, 1 data are not what was promised, 2 cannot start, 3 the target answered\n"
	"with an error, 4 the connection broke, 5 no answer\n";

enum option_id {
	OPT_JOURNAL = 256, OPT_URL, OPT_FILE, OPT_BLOCK_SIZE, OPT_BLOCK_COUNT, OPT_SEED, OPT_DEPTH,
	OPT_IO_BYTES, OPT_READ, OPT_UNMAP, OPT_ZERO, OPT_FLUSH, OPT_FUA, OPT_ATOMIC, OPT_SECONDS,
	OPT_WRITES, OPT_ALIGNED, OPT_HISTORY,
};

static const struct option g_long_options[] = {
	{ "journal", required_argument, NULL, OPT_JOURNAL },
	{ "url", required_argument, NULL, OPT_URL },
	{ "file", required_argument, NULL, OPT_FILE },
	{ "block-size", required_argument, NULL, OPT_BLOCK_SIZE },
	{ "block-count", required_argument, NULL, OPT_BLOCK_COUNT },
	{ "seed", required_argument, NULL, OPT_SEED },
	{ "depth", required_argument, NULL, OPT_DEPTH },
	{ "io-bytes", required_argument, NULL, OPT_IO_BYTES },
	{ "read-percent", required_argument, NULL, OPT_READ },
	{ "unmap-percent", required_argument, NULL, OPT_UNMAP },
	{ "zero-percent", required_argument, NULL, OPT_ZERO },
	{ "flush-percent", required_argument, NULL, OPT_FLUSH },
	{ "fua-percent", required_argument, NULL, OPT_FUA },
	{ "atomic-bytes", required_argument, NULL, OPT_ATOMIC },
	{ "seconds", required_argument, NULL, OPT_SECONDS },
	{ "writes", required_argument, NULL, OPT_WRITES },
	{ "aligned", no_argument, NULL, OPT_ALIGNED },
	{ "history", required_argument, NULL, OPT_HISTORY },
	{ NULL, 0, NULL, 0 },
};

static uint64_t
parse_number(const char *text)
{
	char *end;
	uint64_t value;

	errno = 0;
	value = strtoull(text, &end, 0);
	if (errno || end == text || *end != '\0' || *text == '-') {
		die("not a number: %s", text);
	}
	return value;
}

static void
parse_option(int id, const char *arg)
{
	switch (id) {
	case OPT_JOURNAL: g_opt.journal_path = arg; break;
	case OPT_URL: g_opt.url = arg; break;
	case OPT_FILE: g_opt.file = arg; break;
	case OPT_BLOCK_SIZE: g_opt.block_size = parse_number(arg); break;
	case OPT_BLOCK_COUNT: g_opt.block_count = parse_number(arg); break;
	case OPT_SEED: g_opt.seed = parse_number(arg); break;
	case OPT_DEPTH: g_opt.depth = (unsigned)parse_number(arg); break;
	case OPT_IO_BYTES:
		if (sscanf(arg, "%u:%u", &g_opt.io_bytes_min, &g_opt.io_bytes_max) != 2) {
			die("--io-bytes is MIN:MAX");
		}
		break;
	case OPT_READ: g_opt.read_percent = (unsigned)parse_number(arg); break;
	case OPT_UNMAP: g_opt.unmap_percent = (unsigned)parse_number(arg); break;
	case OPT_ZERO: g_opt.zero_percent = (unsigned)parse_number(arg); break;
	case OPT_FUA: g_opt.fua_percent = (unsigned)parse_number(arg); break;
	case OPT_FLUSH: g_opt.flush_percent = (unsigned)parse_number(arg); break;
	case OPT_ATOMIC: g_opt.atomic_bytes_max = (unsigned)parse_number(arg); break;
	case OPT_SECONDS: g_opt.seconds = strtod(arg, NULL); break;
	case OPT_WRITES: g_opt.writes_max = parse_number(arg); break;
	case OPT_ALIGNED: g_opt.aligned = true; break;
	case OPT_HISTORY: history_open(arg); break;
	default:
		fputs(g_usage, stderr);
		exit(EXIT_SETUP);
	}
}

static void
on_stop_signal(int sig)
{
	(void)sig;
	g_stop = 1;
}

int
main(int argc, char **argv)
{
	const char *mode = argc > 1 ? argv[1] : "";
	int id;

	while ((id = getopt_long(argc, argv, "", g_long_options, NULL)) != -1) {
		parse_option(id, optarg);
	}
	signal(SIGPIPE, SIG_IGN);
	if (strcmp(mode, "replay") == 0) {
		return run_replay();
	}
	if (g_opt.journal_path == NULL) {
		fputs(g_usage, stderr);
		return EXIT_SETUP;
	}
	signal(SIGTERM, on_stop_signal);
	signal(SIGINT, on_stop_signal);
	if (strcmp(mode, "init") == 0) {
		return run_init();
	}
	open_journal();
	if (strcmp(mode, "write") == 0) {
		return run_writes();
	}
	if (strcmp(mode, "verify") == 0) {
		return run_verify();
	}
	if (strcmp(mode, "verify-file") == 0) {
		return run_verify_file();
	}
	fputs(g_usage, stderr);
	return EXIT_SETUP;
}
