/* SPDX-License-Identifier: BSD-3-Clause */

/*
 * The smallest SPDK application with pcache linked into it: everything else it does comes from its
 * JSON configuration and its RPC socket. Built as README.md tells, and by the tests.
 */

#include "spdk/stdinc.h"

#include "spdk/event.h"

static void
started(void *arg)
{
	printf("pcache_app: ready\n");
	fflush(stdout);
}

int
main(int argc, char **argv)
{
	struct spdk_app_opts opts = {};
	int rc;

	spdk_app_opts_init(&opts, sizeof(opts));
	opts.name = "pcache_app";
	rc = spdk_app_parse_args(argc, argv, &opts, NULL, NULL, NULL, NULL);
	if (rc != SPDK_APP_PARSE_ARGS_SUCCESS) {
		return rc == SPDK_APP_PARSE_ARGS_HELP ? 0 : 1;
	}
	rc = spdk_app_start(&opts, started, NULL);
	spdk_app_fini();
	return rc == 0 ? 0 : 1;
}
