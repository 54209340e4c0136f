"""Texts of the repository that open without a noun or verb of their own.

`python tests/house/english.py [FOLDER_OR_FILE …]` lists them, in the whole repository by default.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

OPENINGS = (
    "Of", "Those of", "That of", "The same", "As for", "It", "Its", "Their", "So", "What",
    "Whether", "Which", "How",
)  # fmt: skip
"""A reader who meets one of these first has to look elsewhere for the noun it stands for."""

OTHERS = ("tests", "benchmarks", "docs", "examples")
"""Folders beside the package whose files are held to the same rules."""

_OPENING = re.compile(rf"(?:{'|'.join(OPENINGS)})\b(?![-.(])", re.IGNORECASE)
_DIRECTIVE = re.compile(r"noqa\b|type:|fmt:|pragma:|!|%")
_COUNTS = {"len", "sum", "format_count", "number", "total"}
_PLURAL = re.compile(r" (?:[a-z]+ )?(?!is\b|has\b|was\b|its\b)[A-Za-z]+s\b(?!/)")
"""Word of a thing behind its number, or behind one adjective; a rate is none."""
_HELP = {"help", "short_help", "epilog", "doc", "unset"}
_SHOWN = {"Column": "column", "report": "line", "say": "line", "_say": "line", "echo": "line"}
"""Function or class whose arguments are texts for people → kind of these texts."""


@dataclass(frozen=True)
class Text:
    """A text for people in a Python file."""

    path: Path
    line: int
    kind: str
    """`docstring`, `argument`, `comment`, `help`, `error`, `column` or `line`."""
    text: str

    @property
    def is_refused(self) -> bool:
        """True for a text that begins with one of `OPENINGS`."""
        return _OPENING.match(self.text) is not None

    def __str__(self) -> str:
        first = self.text.strip().partition("\n")[0]
        return f"{self.path.relative_to(ROOT)}:{self.line}: {self.kind}: {first}"


def texts(path: Path) -> Iterator[Text]:
    """Texts for people in a file: its docstrings, comments, helps, errors, columns and lines."""
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        for line, kind, text in (
            *_docstrings(node),
            *_helps(node),
            *_errors(node),
            *_shown(node),
        ):
            yield Text(path, line, kind, text.lstrip())
    for line, text in _comments(source):
        yield Text(path, line, "comment", text)


def refused(*places: Path) -> list[Text]:
    """Texts with a forbidden opening in files and folders."""
    found = (file for place in places for file in files(place))
    return [text for file in found for text in texts(file) if text.is_refused]


def fixed_plurals(path: Path) -> Iterator[Text]:
    """Texts in which a number precedes a plural that stays when the number is 1.

    `mlsae.base.units.counted` and `portion` write the noun, and the verb, that agree.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        for number, rest in pairwise(node.values if isinstance(node, ast.JoinedStr) else ()):
            if isinstance(number, ast.FormattedValue) and _is_count(number.value):
                text = _literal(rest) or ""
                if _PLURAL.match(text):
                    yield Text(path, node.lineno, "plural", f"{ast.unparse(number)}{text}")


def _is_count(value: ast.expr) -> bool:
    """True for an expression that by its name counts things."""
    name = _last_name(value.func if isinstance(value, ast.Call) else value)
    return name.startswith("num_") or name in _COUNTS


def rooms() -> list[Path]:
    """Folders of the package, the modules beside them, and other folders with Python files."""
    package = [*(path.parent for path in ROOT.glob("*/__init__.py")), *ROOT.glob("*.py")]
    return sorted([*package, *(ROOT / name for name in OTHERS)])


def files(place: Path) -> list[Path]:
    """Python files in a folder, or a file alone."""
    return [place] if place.is_file() else sorted(place.rglob("*.py"))


def _docstrings(node: ast.AST) -> Iterator[tuple[int, str, str]]:
    """A string that stands as a statement: a docstring of a module, class, function, attribute."""
    if isinstance(node, ast.Expr) and (text := _literal(node.value)) is not None:
        yield node.lineno, "docstring", text
        for entry in re.finditer(r"(?m)^ +(?:\*{0,2}\w+: |(?:Returns|Yields):\n +)", text):
            line = node.lineno + text.count("\n", 0, entry.start())
            yield line, "argument", text[entry.end() :]


def _helps(node: ast.AST) -> Iterator[tuple[int, str, str]]:
    if isinstance(node, ast.keyword) and node.arg in _HELP:
        named: list[tuple[ast.expr | None, ast.expr]] = [(None, node.value)]
    elif isinstance(node, ast.Dict):
        named = [pair for pair in zip(node.keys, node.values, strict=True) if _is_help(pair[0])]
    else:
        return
    for _, value in named:
        if (text := _literal(value)) is not None:
            yield value.lineno, "help", text


def _is_help(key: ast.expr | None) -> bool:
    return isinstance(key, ast.Constant) and key.value in _HELP


def _errors(node: ast.AST) -> Iterator[tuple[int, str, str]]:
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
        text = _literal(node.exc.args[0])
        if text is not None:
            yield node.lineno, "error", text


def _shown(node: ast.AST) -> Iterator[tuple[int, str, str]]:
    """Texts that a known function or class is given: units, definitions, lines that are printed."""
    if isinstance(node, ast.Call) and (kind := _SHOWN.get(_last_name(node.func))) is not None:
        for value in node.args:
            if (text := _literal(value)) is not None:
                yield value.lineno, kind, text


def _last_name(function: ast.expr) -> str:
    """Name of a called function, without that of its module or object."""
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _literal(value: ast.expr) -> str | None:
    """A string, or the literal part that opens an f-string; None where there is none."""
    if isinstance(value, ast.JoinedStr) and value.values:
        value = value.values[0]
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


def _comments(source: str) -> Iterator[tuple[int, str]]:
    """Comments, those on lines of their own that follow each other as one."""
    last = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, text = token.start[0], token.string.lstrip("# ")
        is_alone = not token.line[: token.start[1]].strip()
        if not (is_alone and last == line - 1) and not _DIRECTIVE.match(text):
            yield line, text
        last = line if is_alone else -1


if __name__ == "__main__":
    found = refused(*(Path(place).resolve() for place in sys.argv[1:]) if sys.argv[1:] else rooms())
    print(*found, f"{len(found)} texts", sep="\n")
