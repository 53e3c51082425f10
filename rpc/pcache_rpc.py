# SPDX-License-Identifier: BSD-3-Clause
"""The commands of pcache for SPDK's rpc.py and for spdk-rpc of the `spdk` Python package.

PYTHONPATH=rpc rpc.py --plugin pcache_rpc bdev_pcache_create -b Cache0 -B Aio0 -p /mnt/pmem0/c0
"""

import argparse
import json
from pathlib import Path

from spdk.rpc.cmd_parser import print_dict, print_json, strip_globals

_SCHEMA = json.loads(Path(__file__).with_name("schema.json").read_text())


def _call(args):
    """One call of the method that the command is named after; what was not given is not sent."""
    given = strip_globals(vars(args))
    params = {name: value for name, value in given.items() if value is not None}
    return args.client.call(args.called_rpc_name, params)


def _print_text(args):
    print_json(_call(args))


def _print_object(args):
    print_dict(_call(args))


def _call_only(args):
    _call(args)


def _add(subparsers, method, func, text):
    parser = subparsers.add_parser(method, help=text, description=text)
    parser.set_defaults(func=func)
    return parser


def _add_name(parser, required=True, text="Name of the cache bdev"):
    parser.add_argument("-b", "--name", required=required, help=text)


def _add_settings(parser):
    """Those that can be changed are listed in the schema; the module checks their values."""
    methods = {method["name"]: method["params"] for method in _SCHEMA["methods"]}
    for param in methods["bdev_pcache_set_options"]:
        if param["name"] == "name":
            continue
        kinds = {
            "number": {"type": int, "metavar": "N"},
            "string": {"type": str, "metavar": "WORD"},
            "boolean": {"action": argparse.BooleanOptionalAction, "default": None},
        }
        parser.add_argument(
            "--" + param["name"].replace("_", "-"),
            help=param["description"].replace("%", "%%"),
            **kinds[param["type"]],
        )


def _add_create(subparsers):
    parser = _add(
        subparsers,
        "bdev_pcache_create",
        _print_text,
        "Put a persistent-memory write-back and read cache in front of a bdev. An existing cache is "
        "opened again, with all its data. If the base bdev does not exist yet, the cache appears "
        "together with it",
    )
    _add_name(parser, text="Name of the cache bdev to create")
    parser.add_argument(
        "-B", "--base-bdev-name", required=True, help="Name of the bdev to cache; it is claimed"
    )
    parser.add_argument(
        "-p",
        "--cache-path",
        required=True,
        help="Cache device: a device-DAX node, or a file (on a DAX file system, tmpfs, hugetlbfs or "
        "any other)",
    )
    parser.add_argument(
        "--cache-offset-mib",
        type=int,
        help="Start in MiB of the part of the cache device to use, if several caches share it; "
        "--cache-size-mib is the size of the part then",
    )
    parser.add_argument(
        "-s",
        "--cache-size-mib",
        type=int,
        help="Size in MiB of the file to create, if it does not exist, or of the part",
    )
    parser.add_argument(
        "--data-crc",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="Keep a checksum of all cached data. Fixed when the cache is formatted. Default: no",
    )
    parser.add_argument(
        "--segment-size-kib",
        type=int,
        help="Size of a segment in KiB, a power of two. Fixed when the cache is formatted. "
        "Default: the largest up to 16384 of which the device holds 32, but not below 256",
    )
    _add_settings(parser)
    parser.add_argument(
        "--report-write-cache",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="Report a volatile write cache, though there is none, so that hosts send their barriers as "
        "FLUSH: write-back keeps to their order. Default: yes",
    )
    parser.add_argument(
        "--base-growth",
        choices=["refuse", "accept"],
        help="Whether a base that is larger than when the cache was last in use is taken for the same one, "
        "grown. One that grows while in use needs no option. Default: refuse",
    )
    parser.add_argument(
        "--format",
        choices=["auto", "never", "force"],
        help="auto: format a blank cache device, open one that holds a cache, refuse anything else. "
        "never: only open. force: format whatever it holds, dirty data included. Default: auto",
    )


def _add_delete(subparsers):
    parser = _add(
        subparsers,
        "bdev_pcache_delete",
        _call_only,
        "Remove a cache bdev. Data that the base does not have yet stays in the cache device, and "
        "is there again when the cache is created again",
    )
    _add_name(parser)
    parser.add_argument(
        "--drain",
        action="store_true",
        default=None,
        help="Write all dirty data to the base first; afterwards the base can be used by itself",
    )


def _add_drain(subparsers):
    parser = _add(
        subparsers,
        "bdev_pcache_flush_start",
        _call_only,
        "Start to write all data that is dirty now to the base, while I/O goes on",
    )
    _add_name(parser)
    parser = _add(
        subparsers,
        "bdev_pcache_flush_status",
        _print_object,
        "Show how far the last bdev_pcache_flush_start has come",
    )
    _add_name(parser)


def _add_checkpoint(subparsers):
    parser = _add(
        subparsers,
        "bdev_pcache_checkpoint_begin",
        _print_object,
        "Bring the base to an exact past state of the cache and hold it there, while I/O goes on, for a "
        "snapshot of the base",
    )
    _add_name(parser)
    parser.add_argument(
        "--timeout-s",
        type=int,
        metavar="1..3600",
        help="How long the base is held at most, in seconds. Default: 60",
    )
    parser = _add(
        subparsers,
        "bdev_pcache_checkpoint_end",
        _print_object,
        "Write to the base again. Fails if the base was not held until now",
    )
    _add_name(parser)
    parser.add_argument(
        "--checkpoint-id",
        type=int,
        help="Which checkpoint, as told by begin. Default: whichever there is",
    )
    parser = _add(
        subparsers, "bdev_pcache_checkpoint_status", _print_object, "Show how far the checkpoint is"
    )
    _add_name(parser)


def _add_stats(subparsers):
    parser = _add(subparsers, "bdev_pcache_get_stats", _print_object, "Show statistics of one or all caches")
    _add_name(parser, required=False, text="Name of the cache bdev. Default: all of them")
    parser = _add(subparsers, "bdev_pcache_reset_stats", _call_only, "Set the statistics of a cache to zero")
    _add_name(parser)


def spdk_rpc_plugin_initialize(subparsers):
    """Called by rpc.py and spdk-rpc."""
    _add_create(subparsers)
    _add_delete(subparsers)
    parser = _add(
        subparsers,
        "bdev_pcache_get_bdevs",
        _print_object,
        "List caches, also those that wait for their base bdev",
    )
    _add_name(parser, required=False, text="Name of the cache bdev. Default: all of them")
    _add_stats(subparsers)
    _add_drain(subparsers)
    _add_checkpoint(subparsers)
    parser = _add(
        subparsers,
        "bdev_pcache_set_options",
        _call_only,
        "Change options of a cache in use; the cache device remembers them",
    )
    _add_name(parser)
    _add_settings(parser)
