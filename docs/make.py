"""Pages of docs/reference and a table of docs/harvest.md, made from the code by `make docs`."""

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import click

from mlsae.analyze import EventsConfig
from mlsae.analyze.results.tables import TABLES
from mlsae.base.settings import deciding, described
from mlsae.cli import main as main_command
from mlsae.harvest import HarvestConfig
from mlsae.store.format.presets import COSTS
from mlsae.train import TrainConfig

REFERENCE = Path(__file__).resolve().parent / "reference"
ROOMS = ("store", "sae", "harvest", "train", "analyze", "models")
"""Rooms whose `__all__` is public, in the order of the page."""
RESUMED = {
    "mlsae harvest": HarvestConfig,
    "mlsae train": TrainConfig,
    "mlsae events": EventsConfig,
}
"""Settings of commands that go on where a run stopped."""
NOTICE = "<!-- Made by `make docs` from the docstrings; edit those. -->"
COLUMNS = re.compile(r"(<!-- columns: (\w+) -->)\n.*?(<!-- end -->)", re.S)
ENCODINGS = re.compile(r"(<!-- encodings -->)\n.*?(<!-- end -->)", re.S)
HARVEST = "../harvest.md"
VERBATIM = "\b\n"
"""Before a paragraph that click sets as it is."""
SETTINGS = """\
Counts are accepted as `10M` or `1e7`, bytes as `200GB`, layers as `0-5` or `0,2,4`. Commands
with `--config` also read options from YAML ([training](../training.md#settings-in-a-file)). In
Python the fields of `HarvestConfig`, `TrainConfig` and `AnalyzeConfig` are these
([Python](api.md))."""
WRAP: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
SECTION = re.compile(r"^(Args|Returns|Yields|Raises):$", re.M)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def api() -> str:
    """Signatures, docstrings, fields and methods of everything that rooms export."""
    parts = ["# Python", NOTICE, *(part for room in ROOMS for part in _room(room))]
    return "\n\n".join(parts) + "\n"


def _room(room: str) -> Iterator[str]:
    module = importlib.import_module(f"mlsae.{room}")
    yield f"## `mlsae.{room}`"
    yield _markdown(inspect.getdoc(module) or "")
    for name in sorted(module.__all__, key=lambda name: (name.isupper(), name.lower())):
        yield from _member(module, name)


def _member(module: ModuleType, name: str) -> Iterator[str]:
    node = _definition(_home(module, name), name)
    yield f"### `{name}`"
    if isinstance(node, ast.ClassDef):
        yield _markdown(ast.get_docstring(node) or "")
        yield from _class(node, getattr(module, name))
    elif isinstance(node, Function):
        yield _signature(node, name)
        yield _markdown(ast.get_docstring(node) or "")
    else:
        yield f"```py\n{_source(node)}\n```"
        if text := _text_after(ast.parse(inspect.getsource(_home(module, name))).body, node):
            yield _markdown(text)


def _home(module: ModuleType, name: str) -> ModuleType:
    """The module that defines a name, by way of those that import it from there."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            return _home(importlib.import_module(node.module or ""), name)
    return module


def _definition(module: ModuleType, name: str) -> ast.stmt:
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ClassDef | Function) and node.name == name:
            return node
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(of, ast.Name) and of.id == name for of in targets):
                return node
    message = f"{module.__name__} does not define {name}"
    raise LookupError(message)


def _class(node: ast.ClassDef, kind: type[Any]) -> Iterator[str]:
    """Fields as a list, then public methods and properties."""
    fields = [of for of in node.body if isinstance(of, ast.AnnAssign) and _is_public(of.target)]
    if any(_source(of) == "settings" for of in node.decorator_list):
        lines = _settings_of(kind)
    else:
        lines = [_field(node, of) for of in fields]
    if lines:
        yield "Fields:"
        yield "\n".join(lines)
    for of in node.body:
        if isinstance(of, Function) and not of.name.startswith("_"):
            yield _signature(of, f"{node.name}.{of.name}")
            yield _markdown(ast.get_docstring(of) or "")


def _settings_of(kind: type[Any]) -> list[str]:
    """Fields of a settings class, inherited ones too, by what they say of themselves."""
    lines = []
    for field in dataclasses.fields(kind):
        one = described(kind)[field.name]
        given = "" if field.default is dataclasses.MISSING else f" = {field.default!r}"
        shown = f"{field.name}: {inspect.formatannotation(field.type)}{given}"
        shown = shown.replace("pathlib._local.", "").replace("pathlib.", "").replace("'", '"')
        meaning = f" None: {one.unset}." if one.unset and field.default is None else ""
        lines.append(f"- `{shown}`: {one.doc}{meaning}")
    return lines


def _field(node: ast.ClassDef, field: ast.AnnAssign) -> str:
    """Name, annotation, default and meaning."""
    default, text = field.value, _text_after(node.body, field)
    shown = f"{_source(field.target)}: {_source(field.annotation)}"
    shown += f" = {_source(default)}" if default else ""
    return f"- `{shown}`" + (f": {' '.join(text.split())}" if text else "")


def _source(node: ast.AST) -> str:
    """Code with double quotes, as the package has them."""
    text = ast.unparse(node)
    return text if '"' in text else text.replace("'", '"')


def _is_public(target: ast.expr) -> bool:
    return isinstance(target, ast.Name) and not target.id.startswith("_")


def _text_after(body: list[ast.stmt], node: ast.stmt) -> str | None:
    """The string under an assignment, which documents it."""
    where = [_source(of) for of in body].index(_source(node))
    for of in body[where + 1 : where + 2]:
        if isinstance(of, ast.Expr) and isinstance(of.value, ast.Constant):
            return str(of.value.value)
    return None


def _signature(node: Function, name: str) -> str:
    """As a code block; a property without parentheses."""
    decorators = {_source(of).split(".")[-1] for of in node.decorator_list}
    result = f" -> {_source(node.returns)}" if node.returns else ""
    if decorators & {"property", "cached_property"}:
        return f"```py\n{name}{result}\n```"
    arguments = _source(node.args)
    if not decorators & {"staticmethod"}:
        arguments = re.sub(r"^(self|cls)(, )?", "", arguments)
    line = f"{name}({arguments}){result}"
    if len(line) > 96:
        given = ast.parse(f"def f({arguments}): ...").body[0]
        assert isinstance(given, Function)
        line = f"{name}(\n" + "".join(f"    {of},\n" for of in _arguments(given)) + f"){result}"
    return f"```py\n{line}\n```"


def _arguments(node: Function) -> list[str]:
    """One text an argument, `*` and `/` included."""
    of = node.args
    positional = [*of.posonlyargs, *of.args]
    defaults = [None] * (len(positional) - len(of.defaults)) + of.defaults
    texts = [_argument(*pair) for pair in zip(positional, defaults, strict=True)]
    if of.vararg or of.kwonlyargs:
        texts.append(f"*{_source(of.vararg)}" if of.vararg else "*")
    texts += [_argument(*pair) for pair in zip(of.kwonlyargs, of.kw_defaults, strict=True)]
    return [*texts, *([f"**{_source(of.kwarg)}"] if of.kwarg else [])]


def _argument(of: ast.arg, default: ast.expr | None) -> str:
    equals = " = " if of.annotation else "="
    return _source(of) + (f"{equals}{_source(default)}" if default else "")


def _markdown(docstring: str) -> str:
    """Sections of arguments and errors as lists, the rest as it is."""
    text, *sections = SECTION.split(docstring.replace("```python", "```py"))
    parts = [text.strip()]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        lines = body.strip("\n").splitlines()
        end = next((i for i, of in enumerate(lines) if of and not of[0].isspace()), len(lines))
        parts += [f"{title}:", _entries("\n".join(lines[:end])), "\n".join(lines[end:]).strip()]
    return "\n\n".join(part for part in parts if part)


def _entries(body: str) -> str:
    """Entries `name: text` as a list; a text without names as a paragraph."""
    texts = [" ".join(of.split()) for of in re.split(r"\n(?=\S)", textwrap.dedent(body).strip())]
    if all(re.match(r"[\w*.]+(?: \(.*\))?: ", of) for of in texts):
        return "\n".join(re.sub(r"^([\w*.]+)", r"- `\1`", of) for of in texts)
    return " ".join(texts)


def tables() -> str:
    """The page of tables with the columns of each renewed; text around them is by hand."""
    page = (REFERENCE / "tables.md").read_text()
    return COLUMNS.sub(lambda found: f"{found[1]}\n{_columns(found[2])}\n{found[3]}", page)


def harvest() -> str:
    """The page of the harvest with its table of encodings renewed."""
    page = (REFERENCE / HARVEST).read_text()
    lines = [
        "| `--encoding` | bytes an activation | added FVU | time to read | |",
        "|---|---|---|---|---|",
        *(
            f"| `{name}` | {of.num_bytes} | {of.added_fvu} | {of.read_time} | {of.use} |"
            for name, of in COSTS.items()
        ),
    ]
    rows = "\n".join(lines)
    return ENCODINGS.sub(lambda found: f"{found[1]}\n{rows}\n{found[2]}", page)


def _columns(table: str) -> str:
    """Name, type, unit and definition of each; intervals and columns of `layers` once, together."""
    columns = {column.name: column for column in TABLES[table]}
    bounds = [name.removesuffix("_low") for name in columns if name.endswith("_low")]
    bounds = [name for name in bounds if name in columns and f"{name}_high" in columns]
    hidden = {f"{name}_{end}" for name in bounds for end in ("low", "high")}
    of_layers = {column.name for column in TABLES["layers"]}
    absent = [name for name in of_layers if name not in columns]
    if table == "overall":
        hidden |= of_layers & columns.keys()
    lines = ["| column | type | unit | definition |", "|---|---|---|---|"]
    for name, column in columns.items():
        if name not in hidden:
            lines.append(f"| `{name}` | {column.type} | {column.unit} | {_cell(column.text)} |")
    parts = ["\n".join(lines)]
    if table == "overall":
        parts.append(f"and all columns of `layers` but for {_listed(sorted(absent))}.")
    elif bounds:
        parts.append(
            f"and, for {_listed(bounds)}, two columns `…_low` and `…_high`, in the unit of the "
            "column: the ends of the 95% interval, null below 10 sequences "
            "([intervals](../metrics.md#intervals))."
        )
    return "\n\n".join([parts[0], *(textwrap.fill(of, 100, **WRAP) for of in parts[1:])])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def _listed(names: Sequence[str]) -> str:
    *others, last = [f"`{name}`" for name in names]
    return f"{', '.join(others)} and {last}"


def settings() -> str:
    """Every command of the command line with its options."""
    parts = ["# Settings", NOTICE.replace("docstrings", "options of the commands"), SETTINGS]
    for name, command in _commands(main_command, "mlsae"):
        # click keeps the help option that it has made once: it must have both its names.
        context = click.Context(command, info_name=name, **main_command.context_settings)
        usage = " ".join([name, *command.collect_usage_pieces(context)])
        parts += [f"## `{name}`", f"```\n{usage}\n```", _help(command)]
        options: dict[str, list[str]] = {}
        for of in command.get_params(context):
            record = of.get_help_record(context)
            if record is not None and "--help" not in of.opts:
                line = f"| `{record[0]}` | {_cell(record[1])} |"
                options.setdefault(getattr(of, "group", ""), []).append(line)
        for heading, lines in options.items():
            parts.append("\n".join([f"| {heading} | |", "|---|---|", *lines]))
        if name in RESUMED:
            parts.append(_deciding(RESUMED[name], command.get_params(context)))
    return "\n\n".join(parts) + "\n"


def _deciding(settings: type[Any], options: Sequence[click.Parameter]) -> str:
    """Options of the fields that decide the result."""
    names = [max(of.opts, key=len) for of in options if of.name in deciding(settings)]
    return textwrap.fill(
        "Another value of these gives another result, which a run that goes on refuses: "
        f"{_listed(names)}.",
        100,
        **WRAP,
    )


def _commands(group: click.Group, prefix: str) -> Iterator[tuple[str, click.Command]]:
    """Full name and command, groups inside groups too."""
    context = click.Context(group, **main_command.context_settings)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from _commands(command, f"{prefix} {name}")
        elif command is not None:
            yield f"{prefix} {name}", command


def _help(command: click.Command) -> str:
    """A command's text; what it sets verbatim is a code block."""
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    return "\n\n".join(
        f"```\n{of.removeprefix(VERBATIM)}\n```" if of.startswith(VERBATIM) else of
        for of in paragraphs
    )


PAGES: dict[str, Callable[[], str]] = {
    "api.md": api,
    "settings.md": settings,
    "tables.md": tables,
    HARVEST: harvest,
}


def main() -> None:
    """Write all pages."""
    for name, make in PAGES.items():
        (REFERENCE / name).write_text(make())


if __name__ == "__main__":
    main()
