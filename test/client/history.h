/* SPDX-License-Identifier: BSD-3-Clause */
/* What ackclient did, in order: one record for each write when it is issued, and one when it is acknowledged. */
#ifndef ACKCLIENT_HISTORY_H
#define ACKCLIENT_HISTORY_H

#include <stdint.h>

enum history_event {
	HISTORY_ISSUED = 1,
	HISTORY_ACKED = 2,
};

/* test/e2e/harness/history.py reads them. */
struct history_record {
	uint64_t event;
	uint64_t version;
	uint64_t lba;
	uint64_t len_blocks;
};

/* Appends to this file from now on; without it nothing is recorded. */
void history_open(const char *path);

/*
 * The record is in the file when this returns: whoever looks at its length before and after something knows
 * what came before and what came after.
 */
void history_note(enum history_event event, uint64_t version, uint64_t lba, uint64_t len_blocks);

#endif
