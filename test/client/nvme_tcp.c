/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * NVMe over TCP, as much of it as the client needs: nvme+tcp://IPV4:PORT/SUBNQN, namespace 1, one I/O
 * queue, no digests. Unlike iSCSI it carries FUA and WRITE ZEROES to SPDK's bdev layer. After the NVMe
 * Base, Fabrics and TCP Transport specifications; all numbers are little-endian, as is the machine.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "transport.h"

#define HOST_NQN	"nqn.2016-06.io.spdk:ackclient"
#define NSID		1u
#define ADMIN_DEPTH	32u
/* A target that sends half of a PDU and then nothing is as good as dead. */
#define STUCK_SECONDS	60
/* Command identifiers of what is not a struct io. */
#define CID_SETUP	0xfff0u

enum pdu_type {
	PDU_ICREQ = 0x00, PDU_ICRESP = 0x01, PDU_C2H_TERM = 0x03, PDU_CMD = 0x04, PDU_RESP = 0x05,
	PDU_H2C_DATA = 0x06, PDU_C2H_DATA = 0x07, PDU_R2T = 0x09,
};

#define PDU_LAST	0x04u	/* of the data of a command */
#define PDU_SUCCESS	0x08u	/* the data are the whole answer */

enum opcode {
	OP_FLUSH = 0x00, OP_WRITE = 0x01, OP_READ = 0x02, OP_WRITE_ZEROES = 0x08, OP_DSM = 0x09,
	OP_ADMIN_IDENTIFY = 0x06, OP_FABRICS = 0x7f,
};

enum fabrics { FABRICS_PROPERTY_SET = 0x00, FABRICS_CONNECT = 0x01, FABRICS_PROPERTY_GET = 0x04 };

#define SGL_IN_CAPSULE	0x01u
#define SGL_TRANSPORT	0x5au
#define FLAG_SGL	0x40u
#define CDW12_FUA	(1u << 30)
#define DSM_DEALLOCATE	(1u << 2)
#define PROPERTY_CC	0x14u
#define PROPERTY_CSTS	0x1cu
/* Enabled, submission entries of 2^6 bytes, completion entries of 2^4. */
#define CC_ENABLE	(1u | 6u << 16 | 4u << 20)
#define CSTS_READY	1u

struct pdu_header {
	uint8_t type;
	uint8_t flags;
	uint8_t header_len;
	uint8_t data_offset;
	uint32_t len;
};

struct ic_pdu {
	struct pdu_header common;
	uint16_t version;
	uint8_t data_align;
	uint8_t digests;
	/* ICReq: R2Ts under way; ICResp: the most data in one H2CData PDU. */
	uint32_t max;
	uint8_t rsv[112];
};

/* H2CData, C2HData and R2T. */
struct data_pdu {
	struct pdu_header common;
	uint16_t cid;
	uint16_t tag;
	uint32_t offset;
	uint32_t len;
	uint32_t rsv;
};

struct sqe {
	uint8_t opcode;
	uint8_t flags;
	uint16_t cid;
	/* A fabrics command has its type in the lowest byte. */
	uint32_t nsid;
	uint32_t cdw2[4];
	uint64_t sgl_address;
	uint32_t sgl_len;
	uint8_t sgl_rsv[3];
	uint8_t sgl_type;
	uint32_t cdw10[6];
};

struct command_pdu {
	struct pdu_header common;
	struct sqe sqe;
};

struct response_pdu {
	struct pdu_header common;
	uint32_t result;
	uint32_t rsv;
	uint16_t sq_head;
	uint16_t sq_id;
	uint16_t cid;
	/* Bit 0 is the phase tag, which means nothing here. */
	uint16_t status;
};

struct connect_data {
	uint8_t host_id[16];
	uint16_t controller;
	uint8_t rsv[238];
	char subsystem[256];
	char host[256];
	uint8_t rsv2[256];
};

struct dsm_range {
	uint32_t attributes;
	uint32_t len_blocks;
	uint64_t lba;
};

_Static_assert(sizeof(struct ic_pdu) == 128, "ICReq");
_Static_assert(sizeof(struct data_pdu) == 24, "H2CData");
_Static_assert(sizeof(struct command_pdu) == 72, "capsule");
_Static_assert(sizeof(struct response_pdu) == 24, "response");
_Static_assert(sizeof(struct connect_data) == 1024, "Connect");

/* A command under way, by its identifier. */
struct command {
	struct io *io;
	/* What is sent, or filled by the answer. */
	uint8_t *data;
	uint32_t len;
	struct dsm_range range;
};

struct queue {
	int fd;
	uint32_t data_max;
};

static struct queue g_admin = { .fd = -1 };
static struct queue g_io = { .fd = -1 };
static struct command g_commands[DEPTH_MAX];
/* The one command that a queue is set up with. */
static struct command g_setup;
static struct response_pdu g_setup_response;
static bool g_setup_done;
static struct geometry g_geometry;

/* ---- bytes -------------------------------------------------------------------------------------------- */

static bool
send_parts(int fd, const void *header, size_t header_len, const void *data, size_t len)
{
	struct iovec parts[2] = {
		{ .iov_base = (void *)header, .iov_len = header_len },
		{ .iov_base = (void *)data, .iov_len = len },
	};
	struct msghdr message = { .msg_iov = parts, .msg_iovlen = 2 };

	while (parts[0].iov_len + parts[1].iov_len > 0) {
		ssize_t sent = sendmsg(fd, &message, MSG_NOSIGNAL);

		if (sent < 0 && errno == EINTR) {
			continue;
		}
		if (sent <= 0) {
			return false;
		}
		for (int i = 0; i < 2; i++) {
			size_t part = (size_t)sent < parts[i].iov_len ? (size_t)sent : parts[i].iov_len;

			parts[i].iov_base = (char *)parts[i].iov_base + part;
			parts[i].iov_len -= part;
			sent -= (ssize_t)part;
		}
	}
	return true;
}

static bool
receive(int fd, void *buf, size_t len)
{
	while (len > 0) {
		ssize_t got = recv(fd, buf, len, MSG_WAITALL);

		if (got < 0 && errno == EINTR) {
			continue;
		}
		if (got <= 0) {
			return false;
		}
		buf = (char *)buf + got;
		len -= (size_t)got;
	}
	return true;
}

/* ---- PDUs ---------------------------------------------------------------------------------------------- */

static struct command *
command_of(uint16_t cid)
{
	if (cid == CID_SETUP) {
		return &g_setup;
	}
	return cid < DEPTH_MAX && g_commands[cid].io != NULL ? &g_commands[cid] : NULL;
}

static void
command_done(uint16_t cid, uint16_t status)
{
	struct io *io;
	char reason[64];

	if (cid == CID_SETUP) {
		g_setup_done = true;
		return;
	}
	io = g_commands[cid].io;
	g_commands[cid].io = NULL;
	if (status >> 1 == 0) {
		io->done(io, IO_OK, NULL);
	} else {
		snprintf(reason, sizeof(reason), "NVMe status %#x", status >> 1);
		io->done(io, IO_ERROR, reason);
	}
}

static bool
send_asked_data(struct queue *queue, const struct data_pdu *r2t)
{
	struct command *command = command_of(r2t->cid);
	uint32_t done = 0;

	if (command == NULL || (uint64_t)r2t->offset + r2t->len > command->len) {
		return false;
	}
	while (done < r2t->len) {
		uint32_t left = r2t->len - done;
		uint32_t len = left < queue->data_max ? left : queue->data_max;
		struct data_pdu pdu = {
			.common = {
				.type = PDU_H2C_DATA,
				.flags = len == left ? PDU_LAST : 0,
				.header_len = sizeof(pdu),
				.data_offset = sizeof(pdu),
				.len = (uint32_t)sizeof(pdu) + len,
			},
			.cid = r2t->cid,
			.tag = r2t->tag,
			.offset = r2t->offset + done,
			.len = len,
		};

		if (!send_parts(queue->fd, &pdu, sizeof(pdu), command->data + pdu.offset, len)) {
			return false;
		}
		done += len;
	}
	return true;
}

static bool
take_data(struct queue *queue, const struct data_pdu *pdu)
{
	struct command *command = command_of(pdu->cid);

	if (command == NULL || (uint64_t)pdu->offset + pdu->len > command->len ||
	    pdu->common.data_offset != sizeof(*pdu) ||
	    !receive(queue->fd, command->data + pdu->offset, pdu->len)) {
		return false;
	}
	if (pdu->common.flags & PDU_SUCCESS) {
		command_done(pdu->cid, 0);
	}
	return true;
}

/* One PDU. False: the connection is gone, or nobody understands it any more. */
static bool
take_pdu(struct queue *queue)
{
	union {
		struct pdu_header common;
		struct data_pdu data;
		struct response_pdu response;
	} pdu;
	size_t rest = sizeof(pdu) - sizeof(pdu.common);

	if (!receive(queue->fd, &pdu, sizeof(pdu.common)) || pdu.common.header_len != sizeof(pdu) ||
	    !receive(queue->fd, (char *)&pdu + sizeof(pdu.common), rest)) {
		return false;
	}
	switch (pdu.common.type) {
	case PDU_RESP:
		if (command_of(pdu.response.cid) == NULL) {
			return false;
		}
		if (pdu.response.cid == CID_SETUP) {
			g_setup_response = pdu.response;
		}
		command_done(pdu.response.cid, pdu.response.status);
		return true;
	case PDU_C2H_DATA:
		return take_data(queue, &pdu.data);
	case PDU_R2T:
		return send_asked_data(queue, &pdu.data);
	default:
		fprintf(stderr, "ackclient: the target sent a PDU of type %#x\n", pdu.common.type);
		return false;
	}
}

static bool
send_command(struct queue *queue, struct sqe *sqe, const void *data, size_t len)
{
	struct command_pdu pdu = {
		.common = {
			.type = PDU_CMD,
			.header_len = sizeof(pdu),
			.data_offset = len > 0 ? sizeof(pdu) : 0,
			.len = (uint32_t)(sizeof(pdu) + len),
		},
	};

	sqe->flags |= FLAG_SGL;
	pdu.sqe = *sqe;
	return send_parts(queue->fd, &pdu, sizeof(pdu), data, len);
}

/* ---- setting up ------------------------------------------------------------------------------------------ */

/* Sends the one command that is under way, and waits for its end. */
static bool
run_setup(struct queue *queue, struct sqe *sqe, const void *data, size_t len)
{
	sqe->cid = CID_SETUP;
	g_setup_done = false;
	memset(&g_setup_response, 0, sizeof(g_setup_response));
	if (!send_command(queue, sqe, data, len)) {
		return false;
	}
	while (!g_setup_done) {
		if (!take_pdu(queue)) {
			return false;
		}
	}
	if (g_setup_response.status >> 1 != 0) {
		fprintf(stderr, "ackclient: command %#x of the setup: NVMe status %#x\n", sqe->opcode,
			g_setup_response.status >> 1);
	}
	return g_setup_response.status >> 1 == 0;
}

static bool
open_queue(struct queue *queue, const struct sockaddr_in *address)
{
	struct timeval stuck = { .tv_sec = STUCK_SECONDS };
	int one = 1;
	struct ic_pdu pdu = {
		.common = { .type = PDU_ICREQ, .header_len = sizeof(pdu), .len = sizeof(pdu) },
	};

	queue->fd = socket(AF_INET, SOCK_STREAM, 0);
	if (queue->fd < 0) {
		die("socket: %s", strerror(errno));
	}
	setsockopt(queue->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	setsockopt(queue->fd, SOL_SOCKET, SO_RCVTIMEO, &stuck, sizeof(stuck));
	setsockopt(queue->fd, SOL_SOCKET, SO_SNDTIMEO, &stuck, sizeof(stuck));
	if (connect(queue->fd, (const struct sockaddr *)address, sizeof(*address)) != 0) {
		fprintf(stderr, "ackclient: connect: %s\n", strerror(errno));
		return false;
	}
	if (!send_parts(queue->fd, &pdu, sizeof(pdu), NULL, 0) ||
	    !receive(queue->fd, &pdu, sizeof(pdu)) || pdu.common.type != PDU_ICRESP ||
	    pdu.digests != 0 || pdu.max == 0) {
		fprintf(stderr, "ackclient: the target does not speak NVMe/TCP as expected\n");
		return false;
	}
	queue->data_max = pdu.max;
	return true;
}

/* Connects a queue to the controller; returns the controller's number in `controller`. */
static bool
connect_queue(struct queue *queue, uint16_t id, uint32_t depth, const char *nqn, uint16_t *controller)
{
	struct connect_data data = { .host_id = "ackclient", .controller = *controller };
	struct sqe sqe = {
		.opcode = OP_FABRICS,
		.nsid = FABRICS_CONNECT,
		.sgl_len = sizeof(data),
		.sgl_type = SGL_IN_CAPSULE,
		.cdw10 = { (uint32_t)id << 16, depth - 1 },
	};

	snprintf(data.subsystem, sizeof(data.subsystem), "%s", nqn);
	snprintf(data.host, sizeof(data.host), "%s", HOST_NQN);
	if (!run_setup(queue, &sqe, &data, sizeof(data))) {
		return false;
	}
	*controller = (uint16_t)g_setup_response.result;
	return true;
}

static bool
enable_controller(void)
{
	struct sqe set = {
		.opcode = OP_FABRICS,
		.nsid = FABRICS_PROPERTY_SET,
		.cdw10 = { 0, PROPERTY_CC, CC_ENABLE },
	};

	if (!run_setup(&g_admin, &set, NULL, 0)) {
		return false;
	}
	for (int attempt = 0; attempt < 100; attempt++) {
		struct sqe get = {
			.opcode = OP_FABRICS,
			.nsid = FABRICS_PROPERTY_GET,
			.cdw10 = { 0, PROPERTY_CSTS },
		};

		if (!run_setup(&g_admin, &get, NULL, 0)) {
			return false;
		}
		if (g_setup_response.result & CSTS_READY) {
			return true;
		}
		usleep(10 * 1000);
	}
	return false;
}

static bool
identify_namespace(void)
{
	static uint8_t data[4096];
	struct sqe sqe = {
		.opcode = OP_ADMIN_IDENTIFY,
		.nsid = NSID,
		.sgl_len = sizeof(data),
		.sgl_type = SGL_TRANSPORT,
	};
	uint32_t format;

	g_setup.data = data;
	g_setup.len = sizeof(data);
	if (!run_setup(&g_admin, &sqe, NULL, 0)) {
		return false;
	}
	memcpy(&g_geometry.block_count, data, sizeof(g_geometry.block_count));
	/* Byte 26 has the number of the format, the formats begin at byte 128. */
	memcpy(&format, data + 128 + 4 * (data[26] & 0xf), sizeof(format));
	g_geometry.block_size = 1ull << (format >> 16 & 0xff);
	return true;
}

static void
close_queues(void)
{
	for (struct queue *queue = &g_io; queue != NULL; queue = queue == &g_io ? &g_admin : NULL) {
		if (queue->fd >= 0) {
			close(queue->fd);
			queue->fd = -1;
		}
	}
}

static bool
nvme_tcp_connect(const char *url, struct geometry *geometry)
{
	struct sockaddr_in address = { .sin_family = AF_INET };
	char host[64], nqn[224];
	uint16_t controller = 0xffff;
	unsigned port;

	if (sscanf(url, "nvme+tcp://%63[0-9.]:%u/%223s", host, &port, nqn) != 3 ||
	    inet_pton(AF_INET, host, &address.sin_addr) != 1) {
		die("not nvme+tcp://IPV4:PORT/SUBNQN: %s", url);
	}
	address.sin_port = htons((uint16_t)port);
	if (open_queue(&g_admin, &address) &&
	    connect_queue(&g_admin, 0, ADMIN_DEPTH, nqn, &controller) && enable_controller() &&
	    identify_namespace() && open_queue(&g_io, &address) &&
	    connect_queue(&g_io, 1, DEPTH_MAX, nqn, &controller)) {
		*geometry = g_geometry;
		return true;
	}
	close_queues();
	return false;
}

/* ---- requests -------------------------------------------------------------------------------------------- */

static bool
nvme_tcp_submit(struct io *io)
{
	struct command *command = &g_commands[io->index];
	struct sqe sqe = { .cid = (uint16_t)io->index, .nsid = NSID, .sgl_type = SGL_TRANSPORT };

	command->io = io;
	command->data = io->buf;
	command->len = (uint32_t)(io->len_blocks * g_geometry.block_size);
	sqe.cdw10[0] = (uint32_t)io->lba;
	sqe.cdw10[1] = (uint32_t)(io->lba >> 32);
	sqe.cdw10[2] = (uint32_t)(io->len_blocks - 1);
	switch (io->kind) {
	case IO_READ:
		sqe.opcode = OP_READ;
		break;
	case IO_WRITE_FUA:
		sqe.cdw10[2] |= CDW12_FUA;
		/* fall through */
	case IO_WRITE:
		sqe.opcode = OP_WRITE;
		break;
	case IO_WRITE_ZEROES:
		sqe.opcode = OP_WRITE_ZEROES;
		command->len = 0;
		break;
	case IO_UNMAP:
		sqe.opcode = OP_DSM;
		memset(sqe.cdw10, 0, sizeof(sqe.cdw10));
		sqe.cdw10[1] = DSM_DEALLOCATE;
		command->range.lba = io->lba;
		command->range.len_blocks = (uint32_t)io->len_blocks;
		command->data = (uint8_t *)&command->range;
		command->len = sizeof(command->range);
		break;
	case IO_FLUSH:
		sqe.opcode = OP_FLUSH;
		memset(sqe.cdw10, 0, sizeof(sqe.cdw10));
		command->len = 0;
		break;
	}
	sqe.sgl_len = command->len;
	return send_command(&g_io, &sqe, NULL, 0);
}

static bool
nvme_tcp_service(void)
{
	struct pollfd pfd = { .fd = g_io.fd, .events = POLLIN };
	int timeout_ms = 200;

	while (poll(&pfd, 1, timeout_ms) > 0) {
		if (!take_pdu(&g_io)) {
			return false;
		}
		timeout_ms = 0;
	}
	return true;
}

static void
nvme_tcp_disconnect(bool gone)
{
	(void)gone;
	close_queues();
}

const struct transport nvme_tcp_transport = {
	.scheme = "nvme+tcp://",
	/* A submission queue is full when one entry is left. */
	.depth_max = DEPTH_MAX - 1,
	.connect = nvme_tcp_connect,
	.submit = nvme_tcp_submit,
	.service = nvme_tcp_service,
	.disconnect = nvme_tcp_disconnect,
};
