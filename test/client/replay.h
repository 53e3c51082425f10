/* SPDX-License-Identifier: BSD-3-Clause */
/* Recorded requests, replayed one by one. */
#ifndef ACKCLIENT_REPLAY_H
#define ACKCLIENT_REPLAY_H

#include <stdint.h>

#include "transport.h"

/*
 * Sends the requests of a file to a target, each when the one before it was answered. A line is
 * "read LBA LEN" or "write LBA LEN", in blocks. What is wrong with one is complained about, with
 * its line, and ends the program; how the first that did not end well did is the result. `count`
 * becomes the number of those that were answered.
 */
enum io_status replay(const char *url, const char *path, uint64_t *count);

#endif
