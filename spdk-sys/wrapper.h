/* SPDX-License-Identifier: BSD-3-Clause */

/* What bindgen reads. The shim is compiled against the same headers. */

#include "shim.h"

#include "spdk/accel.h"
#include "spdk/bdev.h"
#include "spdk/bdev_module.h"
#include "spdk/env.h"
#include "spdk/json.h"
#include "spdk/jsonrpc.h"
#include "spdk/notify.h"
#include "spdk/rpc.h"
#include "spdk/thread.h"
#include "spdk/uuid.h"
#include "spdk/version.h"
