# SPDX-License-Identifier: BSD-3-Clause
"""Where things are: the repository, the module, the SPDK that it is built for."""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
MODULE = ROOT / "target/pcache/libspdk_bdev_pcache.so"
PLUGIN_DIR = ROOT / "rpc"

# Where an SPDK tree keeps the applications that the tests run.
_APP_FOLDERS = ("build/bin", "build/examples", "test/bdev/bdevio")


@dataclass(frozen=True)
class Spdk:
    """An SPDK that is built and ready to use."""

    tree: Path | None
    prefix: Path | None
    library_dir: Path
    version: str
    shared: bool

    @classmethod
    def find(cls) -> Spdk:
        """Asks spdk.sh, which the build of the module asked as well."""
        script = ROOT / "spdk-sys/spdk.sh"
        found = subprocess.run([script, "find"], stdout=subprocess.PIPE, text=True, check=False)
        if found.returncode != 0:
            raise RuntimeError(f"there is no usable SPDK: run '{script} ensure' or 'make spdk'")
        words = (word.partition("=") for word in shlex.split(found.stdout))
        value = {key: text for key, _, text in words}
        return cls(
            tree=Path(value["SPDK_DIR"]) if value.get("SPDK_DIR") else None,
            prefix=Path(value["SPDK_PREFIX"]) if value.get("SPDK_PREFIX") else None,
            library_dir=Path(value["SPDK_LIBDIR"]),
            version=value["SPDK_VERSION"],
            shared=value["SPDK_LINKAGE"] == "shared",
        )

    def app(self, name: str) -> Path | None:
        """The application of that name; an installed SPDK lacks bdevperf and bdevio."""
        if self.tree is not None:
            places = [self.tree / folder / name for folder in _APP_FOLDERS]
        else:
            assert self.prefix is not None
            places = [self.prefix / "bin" / name]
        return next((place for place in places if place.is_file()), None)

    def library_path(self) -> str:
        """For LD_LIBRARY_PATH: SPDK's libraries and those of its DPDK."""
        folders = [self.library_dir]
        if self.tree is not None:
            folders.append(self.tree / "dpdk/build/lib")
        return ":".join(str(folder) for folder in folders)
