"""docs/evidence/benchmarks.md from benchmarks.json beside it, whose diaries it leaves out."""

from collections.abc import Sequence
from typing import Any

from benchmarks.markdown import paragraph

HEAD = """\
# Benchmarks

<!-- Made by `make results` from benchmarks.json; edit that file. -->

"""
INTRODUCTION = (
    "Every ratio is one of medians within a run of interleaved rounds, so that a machine's "
    "changing speed touches both sides. The last line that a benchmark prints is a JSON object. "
    "Each script says at its head how it tells the truth: buffers reused, page cache kept full, "
    "CPU time of the system printed. No number is from a GPU yet. Measurements of earlier code, "
    "on other machines and of the parts of a whole are in `benchmarks.json`, under `diary`."
)


def benchmarks_page(content: Sequence[dict[str, Any]]) -> str:
    """Markdown of all benchmarks: question, command, machine, tables and a reading of them."""
    return HEAD + paragraph(INTRODUCTION) + "\n" + "".join(_section(of) for of in content)


def _section(of: dict[str, Any]) -> str:
    command = "\n".join(of["command"])
    parts = [
        f"## {of['name']}: `{of['script']}`",
        paragraph(of["what"]),
        f"<!-- not run: {of['not_run']} -->\n```sh\n{command}\n```",
        paragraph(of["machine"]),
        *(_table(table) for table in of["tables"]),
        paragraph(of["reading"]),
    ]
    return "".join(f"\n{part}\n" for part in parts)


def _table(table: dict[str, Any]) -> str:
    lines = [table["head"], ["---"] * len(table["head"]), *table["rows"]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
