# SPDX-License-Identifier: BSD-3-Clause
"""The schema, the plugin, the documentation and the module name the same methods and parameters."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import pytest
from harness import ROOT, Host, RpcError
from harness.paths import PLUGIN_DIR
from harness.scenario import CACHE, Storage, wait_online

SCHEMA = json.loads((ROOT / "rpc/schema.json").read_text())
METHODS = {method["name"]: method["params"] for method in SCHEMA["methods"]}
DOC = (ROOT / "docs/rpc.md").read_text()


def plugin_commands() -> dict[str, argparse.ArgumentParser]:
    sys.path.insert(0, str(PLUGIN_DIR))
    import pcache_rpc

    subparsers = argparse.ArgumentParser().add_subparsers()
    pcache_rpc.spdk_rpc_plugin_initialize(subparsers)
    return subparsers.choices


def doc_section(method: str) -> str:
    start = DOC.index(f"### {method} {{#rpc_{method}}}")
    end = DOC.find("\n### ", start + 1)
    return DOC[start : end if end > 0 else None]


def test_plugin_has_every_method_and_no_other():
    assert set(plugin_commands()) == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_plugin_takes_the_parameters_of_the_schema(method: str):
    actions = {a.dest: a for a in plugin_commands()[method]._actions if a.dest != "help"}
    assert set(actions) == {param["name"] for param in METHODS[method]}
    for param in METHODS[method]:
        assert actions[param["name"]].required == param.get("required", False), param["name"]
        assert actions[param["name"]].help


def test_documentation_has_every_method_and_no_other():
    documented = re.findall(r"^### (\S+) \{#rpc_(\S+)\}$", DOC, re.MULTILINE)
    assert [name for name, _ in documented] == [anchor for _, anchor in documented]
    assert {name for name, _ in documented} == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_documentation_has_the_parameters_of_the_schema(method: str):
    table = doc_section(method).split("#### Parameters")[1].split("#### Response")[0]
    rows = [[cell.strip() for cell in row.strip("|\n").split("|")] for row in table.splitlines()]
    listed = [row for row in rows if len(row) == 4 and row[0] != "Name" and set(row[0]) != {"-"}]
    expected = [
        [p["name"], "Required" if p.get("required") else "Optional", p["type"], p["description"]]
        for p in METHODS[method]
    ]
    assert listed == expected


@pytest.mark.parametrize("method", METHODS)
def test_examples_of_the_documentation_fit_the_schema(method: str):
    examples = re.findall(r"~~~json\n(.*?)~~~", doc_section(method), re.DOTALL)
    request, response = (json.loads(example) for example in examples)
    assert request["method"] == method
    names = {param["name"] for param in METHODS[method]}
    required = {param["name"] for param in METHODS[method] if param.get("required")}
    assert required <= set(request["params"]) <= names
    assert "result" in response


def test_module_has_every_method_and_no_other(host: Host):
    app = host.start("spdk_tgt")
    present = {name for name in app.rpc.rpc_get_methods() if name.startswith("bdev_pcache_")}
    assert present == set(METHODS)


def test_documentation_has_every_statistic_and_no_other(host: Host, media: Path):
    storage = Storage(media)
    app = host.start("spdk_tgt", bdevs=[storage.malloc_base(), storage.cache()])
    wait_online(app.rpc)
    (stats,) = app.rpc.bdev_pcache_get_stats(name=CACHE)
    assert stats.pop("name") == CACHE
    present = {f"{group}.{member}" for group, members in stats.items() for member in members}
    documented = re.findall(r"^\| (\w+\.\w+) ", doc_section("bdev_pcache_get_stats"), re.MULTILINE)
    assert sorted(documented) == sorted(present)
    app.stop()


def test_module_refuses_what_the_schema_does_not_know(host: Host):
    app = host.start("spdk_tgt")
    valid = {"string": "x", "number": 1, "boolean": True}
    for method in METHODS:
        params = {p["name"]: valid[p["type"]] for p in METHODS[method] if p.get("required")}
        with pytest.raises(RpcError) as caught:
            app.rpc.call(method, {**params, "no_such_parameter": 1})
        assert caught.value.code == -32602, method
        assert "no_such_parameter" in caught.value.message, method
