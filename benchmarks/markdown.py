"""Markdown of the pages in docs/evidence."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EVIDENCE = Path(__file__).resolve().parents[1] / "docs" / "evidence"


def paragraph(text: str) -> str:
    """Wrapped at 100 characters."""
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns to the right."""
    lines = [head, ["---:"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def made(content: dict[str, Any]) -> str:
    """When, at which commit, on what, and the store if there is one."""
    machine = dict(content["machine"])
    processor, cores = machine.pop("processor"), machine.pop("cores")
    threads = machine.pop("threads")
    versions = ", ".join(f"{name} {number}" for name, number in machine.items())
    store = content.get("store")
    of_store = f" Store {store['store_id'][:12]}, {store['encoding']}." if store else ""
    return paragraph(
        f"On {content['date']} at commit {content['commit']}; {processor}, {cores} cores, "
        f"torch threads: {threads}; {versions}.{of_store}"
    )
