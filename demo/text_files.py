"""Shipped text: two files of one module a line, and `sources.json`, which accounts for them.

A line is {"module", "source", "sha256", "text"}; `sha256` is over the text in UTF-8. `sources.json`
names the Python the text was taken from, the licence, and the SHA-256 of each file.
"""

import hashlib
import json
import platform
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlsae.base.files import sha256_file, write_durably
from mlsae.demo.corpus import LICENCE, Module, collect

TRAIN, HELD_OUT = "train.jsonl", "held_out.jsonl"
SOURCES, LICENCE_TEXT = "sources.json", "LICENSE-python.txt"


def read_texts(path: Path) -> list[str]:
    """The texts of one part, a module each, in the file's order."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def write_running(directory: Path) -> None:
    """Take the text of the running Python into `directory`, with its licence and `sources.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    parts = dict(zip((TRAIN, HELD_OUT), map(_encoded, collect()), strict=True))
    for name, data in parts.items():
        write_durably(directory / name, data)
    licence = Path(sysconfig.get_path("stdlib"), "LICENSE.txt").read_bytes()
    write_durably(directory / LICENCE_TEXT, licence)
    sources = {
        "what": "documentation strings of the Python standard library",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "licence": LICENCE,
        "licence_file": LICENCE_TEXT,
        "copyright": "Copyright (c) 2001-2023 Python Software Foundation; All Rights Reserved",
        "files": {name: _account(data) for name, data in parts.items()},
    }
    write_durably(directory / SOURCES, (json.dumps(sources, indent=2) + "\n").encode())


def read_sources(directory: Path) -> dict[str, Any]:
    """`sources.json` of a text directory.

    Raises:
        ValueError: a text file is not the one that it accounts for.
    """
    sources: dict[str, Any] = json.loads((directory / SOURCES).read_text())
    for name, account in sources["files"].items():
        found = sha256_file(directory / name)
        if found != account["sha256"]:
            raise ValueError(
                f"{directory / name} is not the text that {SOURCES} accounts for: "
                f"expected SHA-256 {account['sha256'][:12]}, got {found[:12]}"
            )
    return sources


def difference_from_running(
    sources: dict[str, Any], running: tuple[list[Module], list[Module]]
) -> str | None:
    """One line if the running Python's documentation differs from the shipped text, else None.

    Args:
        sources: content of `sources.json`.
        running: modules of the running Python, as `collect` gives them.
    """
    parts = zip((TRAIN, HELD_OUT), map(_encoded, running), strict=True)
    if all(_account(data) == sources["files"][name] for name, data in parts):
        return None
    return (
        f"the documentation of this Python {platform.python_version()} differs from that of "
        f"{sources['python']}, which the shipped text was taken from: using the shipped text "
        "(--collect takes this Python's)"
    )


def _encoded(modules: Sequence[Module]) -> bytes:
    lines = [
        json.dumps(
            {
                "module": module.name,
                "source": module.source,
                "sha256": hashlib.sha256(module.text.encode()).hexdigest(),
                "text": module.text,
            },
            ensure_ascii=False,
        )
        for module in modules
    ]
    return "".join(f"{line}\n" for line in lines).encode()


def _account(data: bytes) -> dict[str, Any]:
    return {
        "sha256": hashlib.sha256(data).hexdigest(),
        "num_bytes": len(data),
        "num_modules": data.count(b"\n"),
    }
