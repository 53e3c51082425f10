/* SPDX-License-Identifier: BSD-3-Clause */
/* iSCSI, by libiscsi: iscsi://HOST:PORT/IQN/LUN */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>

#include <iscsi/iscsi.h>
#include <iscsi/scsi-lowlevel.h>

#include "transport.h"

static struct iscsi_context *g_iscsi;
static int g_lun;
static struct geometry g_geometry;
/* Of the unmaps under way. */
static struct unmap_list g_unmaps[DEPTH_MAX];

static bool
read_capacity(void)
{
	struct scsi_task *task = iscsi_readcapacity16_sync(g_iscsi, g_lun);
	struct scsi_readcapacity16 *capacity;

	if (task == NULL || task->status != SCSI_STATUS_GOOD) {
		return false;
	}
	capacity = scsi_datain_unmarshall(task);
	if (capacity == NULL) {
		return false;
	}
	g_geometry.block_size = capacity->block_length;
	g_geometry.block_count = capacity->returned_lba + 1;
	scsi_free_scsi_task(task);
	return true;
}

static bool
iscsi_transport_connect(const char *text, struct geometry *geometry)
{
	struct iscsi_url *url;
	bool ok;

	g_iscsi = iscsi_create_context("iqn.2016-06.io.spdk:ackclient");
	if (g_iscsi == NULL) {
		die("out of memory");
	}
	url = iscsi_parse_full_url(g_iscsi, text);
	if (url == NULL) {
		die("not an iscsi:// url: %s", text);
	}
	iscsi_set_noautoreconnect(g_iscsi, 1);
	iscsi_set_session_type(g_iscsi, ISCSI_SESSION_NORMAL);
	iscsi_set_targetname(g_iscsi, url->target);
	iscsi_set_header_digest(g_iscsi, ISCSI_HEADER_DIGEST_NONE);
	g_lun = url->lun;
	ok = iscsi_full_connect_sync(g_iscsi, url->portal, url->lun) == 0 && read_capacity();
	iscsi_destroy_url(url);
	if (!ok) {
		fprintf(stderr, "ackclient: %s\n", iscsi_get_error(g_iscsi));
		iscsi_destroy_context(g_iscsi);
		return false;
	}
	*geometry = g_geometry;
	return true;
}

static void
task_done(struct iscsi_context *iscsi, int status, void *command_data, void *private_data)
{
	struct io *io = private_data;
	struct scsi_task *task = command_data;

	if (status == SCSI_STATUS_CANCELLED || status == SCSI_STATUS_ERROR ||
	    status == SCSI_STATUS_TIMEOUT) {
		io->done(io, IO_LOST, "no answer");
	} else if (status != SCSI_STATUS_GOOD) {
		io->done(io, IO_ERROR, iscsi_get_error(iscsi));
	} else {
		io->done(io, IO_OK, NULL);
	}
	if (task != NULL) {
		scsi_free_scsi_task(task);
	}
}

static bool
iscsi_transport_submit(struct io *io)
{
	uint32_t bytes = (uint32_t)(io->len_blocks * g_geometry.block_size);
	int block_size = (int)g_geometry.block_size;
	struct unmap_list *unmap = &g_unmaps[io->index];
	struct scsi_task *task = NULL;

	switch (io->kind) {
	case IO_WRITE:
		task = iscsi_write16_task(g_iscsi, g_lun, io->lba, io->buf, bytes, block_size,
					  0, 0, 0, 0, 0, task_done, io);
		break;
	case IO_UNMAP:
		unmap->lba = io->lba;
		unmap->num = (uint32_t)io->len_blocks;
		task = iscsi_unmap_task(g_iscsi, g_lun, 0, 0, unmap, 1, task_done, io);
		break;
	case IO_FLUSH:
		task = iscsi_synchronizecache16_task(g_iscsi, g_lun, 0, (uint32_t)g_geometry.block_count,
						     0, 0, task_done, io);
		break;
	case IO_READ:
		task = iscsi_read16_task(g_iscsi, g_lun, io->lba, bytes, block_size,
					 0, 0, 0, 0, 0, task_done, io);
		if (task != NULL) {
			scsi_task_add_data_in_buffer(task, (int)bytes, io->buf);
		}
		break;
	case IO_WRITE_FUA:
	case IO_WRITE_ZEROES:
		break;
	}
	return task != NULL;
}

static bool
iscsi_transport_service(void)
{
	struct pollfd pfd = {
		.fd = iscsi_get_fd(g_iscsi),
		.events = (short)iscsi_which_events(g_iscsi),
	};

	if (poll(&pfd, 1, 200) < 0 && errno != EINTR) {
		die("poll: %s", strerror(errno));
	}
	return iscsi_service(g_iscsi, pfd.revents) == 0;
}

static void
iscsi_transport_disconnect(bool gone)
{
	if (!gone) {
		iscsi_logout_sync(g_iscsi);
	}
	iscsi_destroy_context(g_iscsi);
}

const struct transport iscsi_transport = {
	.scheme = "iscsi://",
	.depth_max = DEPTH_MAX,
	/* SPDK's SCSI layer drops FUA and emulates WRITE SAME. */
	.unsupported = 1u << IO_WRITE_FUA | 1u << IO_WRITE_ZEROES,
	.connect = iscsi_transport_connect,
	.submit = iscsi_transport_submit,
	.service = iscsi_transport_service,
	.disconnect = iscsi_transport_disconnect,
};
