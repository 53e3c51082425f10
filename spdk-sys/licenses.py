# SPDX-License-Identifier: BSD-3-Clause
"""licenses.py LICENSE METADATA - prints our licence, and those of the crates that stdin names: "NAME vVERSION" a line.

METADATA is what `cargo metadata` says. Of a crate that may be had under several licences each text is printed.
"""

import json
import sys
from pathlib import Path


def texts_in(folder: Path) -> list[Path]:
    """What a crate says of its licence."""
    starts = ("license", "licence", "copying", "unlicense", "notice", "copyright")
    return sorted(path for path in folder.iterdir() if path.name.lower().startswith(starts))


def main() -> int:
    licence, metadata = (Path(name) for name in sys.argv[1:])
    packages = {
        (package["name"], package["version"]): package
        for package in json.loads(metadata.read_text())["packages"]
    }
    print(licence.read_text())
    for line in sys.stdin:
        name, version = line.split()
        package = packages[name, version.removeprefix("v")]
        if package["source"] is None:
            # One of ours.
            continue
        texts = texts_in(Path(package["manifest_path"]).parent)
        if not texts:
            print(f"licenses.py: {name} {version} comes without its licence", file=sys.stderr)
            return 1
        print(f"\n---- {name} {version}: {package['license']}, {package['repository']}")
        for text in texts:
            print(f"\n{text.read_text()}")
    print("\n---- Rust's standard library: MIT OR Apache-2.0, https://github.com/rust-lang/rust")
    print("\nIts notices come with the toolchain: share/doc/rust/COPYRIGHT-library.html.")
    return 0


sys.exit(main())
