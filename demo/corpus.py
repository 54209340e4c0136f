"""The demo's text: the documentation strings of the Python standard library, in two parts.

A module belongs whole to one part, chosen by a hash of its name, so nobody picked which modules
the model never sees. Repeated text is kept once, and text that both parts share is left out of
the held-out part.
"""

import ast
import hashlib
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LICENCE = "PSF-2.0"
HELD_OUT_SALT = "mlsae demo held-out 0:"
HELD_OUT_ONE_IN = 8
SHINGLE_WORDS = 6
MAX_SHARED_SHINGLES = 0.3

_SKIPPED_PACKAGES = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
# A module with terms of its own (turtle, logging, optparse, …) is left out, so that the one
# licence shipped beside the text covers all of it.
_OWN_TERMS = re.compile(
    r"hereby granted|permission is granted|permission notice|redistributions of source"
    r"|licensed under|can be redistributed under",
    re.IGNORECASE,
)
_ALL_RIGHTS = re.compile(r"all rights reserved", re.IGNORECASE)
_PSF = re.compile(r"Python Software Foundation|Licensed to PSF")


@dataclass(frozen=True, kw_only=True)
class Module:
    """The documentation of one module."""

    name: str
    """Dotted name, `asyncio.events`."""
    source: str
    """Path in the CPython repository, `Lib/asyncio/events.py`."""
    entries: tuple[str, ...]
    """An entry for each documented object: name and parameters, an empty line, documentation."""

    @property
    def text(self) -> str:
        """The entries, with an empty line between them and a line end after the last."""
        return "\n\n".join(self.entries) + "\n"

    @property
    def held_out(self) -> bool:
        """True for a module of the part that tokenizer and model never see."""
        digest = hashlib.sha256(f"{HELD_OUT_SALT}{self.name}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def collect() -> tuple[list[Module], list[Module]]:
    """The running Python's documentation: modules to train on and modules held out, by name."""
    seen: set[str] = set()
    parts: tuple[list[Module], list[Module]] = ([], [])
    modules = list(_modules(Path(sysconfig.get_path("stdlib"))))
    for module in (m for m in modules if not m.held_out):
        parts[0].extend(_without(module, seen))
    for module in (m for m in modules if m.held_out):
        parts[1].extend(_without(module, seen))
    return parts


def _modules(stdlib: Path) -> Iterator[Module]:
    # Not below site-packages, where most files lie.
    packages = (path for path in stdlib.iterdir() if path.name in sys.stdlib_module_names)
    inner = (path for package in packages for path in package.rglob("*.py"))
    for path in sorted([*stdlib.glob("*.py"), *inner]):
        parts = path.relative_to(stdlib).with_suffix("").parts
        if parts[0] not in sys.stdlib_module_names or _SKIPPED_PACKAGES & set(parts):
            continue
        code = path.read_bytes()
        if _has_own_terms(code.decode("utf-8", "replace")):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(code)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        entries = tuple(_topics(tree) if name == "pydoc_data.topics" else _entries(tree, name))
        yield Module(
            name=name, source=f"Lib/{path.relative_to(stdlib).as_posix()}", entries=entries
        )


def _has_own_terms(code: str) -> bool:
    prose = re.sub(r"[\s#]+", " ", code)
    return bool(_OWN_TERMS.search(prose)) or bool(
        _ALL_RIGHTS.search(prose) and not _PSF.search(prose)
    )


def _entries(node: ast.AST, heading: str, prefix: str = "") -> Iterator[str]:
    """Entries of a module, class or function, in the order of the source."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        documentation = ast.get_docstring(node)
        if documentation and documentation.strip():
            yield f"{heading}\n\n{documentation.strip()}"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            bases = ", ".join(map(ast.unparse, child.bases))
            name = f"{prefix}{child.name}"
            yield from _entries(child, f"class {name}({bases})", f"{name}.")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{prefix}{child.name}"
            yield from _entries(child, f"{name}({ast.unparse(child.args)})", f"{name}.")
        elif isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            # Expressions define nothing that is documented.
            yield from _entries(child, "", prefix)


def _topics(tree: ast.Module) -> Iterator[str]:
    """The sections of the language reference that `help("...")` prints."""
    (assignment,) = (node for node in tree.body if isinstance(node, ast.Assign))
    yield from (text.strip() for text in ast.literal_eval(assignment.value).values())


def _shingles(entry: str) -> set[str]:
    """Runs of SHINGLE_WORDS words of an entry's documentation; all of it, if it is shorter."""
    words = re.findall(r"\w+", entry.split("\n\n", 1)[-1].lower())
    last = max(len(words) - SHINGLE_WORDS, 0)
    return {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(last + 1)}


def _without(module: Module, seen: set[str]) -> Iterator[Module]:
    """The module without the entries that mostly repeat `seen`, which grows by the others."""
    kept = []
    for entry in module.entries:
        shingles = _shingles(entry)
        if len(shingles & seen) <= MAX_SHARED_SHINGLES * len(shingles):
            kept.append(entry)
            seen |= shingles
    if kept:
        yield Module(name=module.name, source=module.source, entries=tuple(kept))
