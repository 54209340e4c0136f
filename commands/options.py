"""Options of the command line: their types, and those that several commands have."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mlsae.base.errors import InputError
from mlsae.base.units import (
    parse_bytes,
    parse_context,
    parse_count,
    parse_count_or_auto,
    parse_layers,
    parse_names,
    parse_numbers,
    parse_range,
)


class Parsed(click.ParamType[Any]):
    """An option whose text a library function parses; its message becomes a usage error."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.ParamType`."""
        try:
            return self._parse(value) if isinstance(value, str) else value
        except InputError as error:
            self.fail(str(error), param, ctx)


COUNT = Parsed("count", parse_count)
BYTES = Parsed("bytes", parse_bytes)
COUNT_OR_AUTO = Parsed("count", parse_count_or_auto)
LAYERS = Parsed("layers", parse_layers)
NAMES = Parsed("names", parse_names)
NUMBERS = Parsed("numbers", parse_numbers)
ROWS = Parsed("rows", parse_range)
CONTEXT = Parsed("tokens", parse_context)
DIRECTORY = click.Path(path_type=Path, file_okay=False)
LOCATION = Parsed("location", str)
"""A directory or a URL, which a path would mangle."""


def reads_stores(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of a command that reads activations, wherever they are."""
    for option in (
        click.option(
            "--cache-size",
            type=BYTES,
            help="Most bytes kept there, 0 for none; 10GiB if not given.",
        ),
        click.option(
            "--cache-dir",
            type=DIRECTORY,
            help="Where parts of remote stores are kept; ~/.cache/mlsae if not given.",
        ),
        click.option(
            "--cache",
            required=True,
            multiple=True,
            type=LOCATION,
            help="Activation store: a directory, https://…, s3://… or hf://datasets/…; given "
            "again, stores of one model and different text, read as one.",
        ),
    ):
        command = option(command)
    return command


class _Several(click.ParamType[Any]):
    """Values with commas between them."""

    def __init__(self, one: click.ParamType[Any]) -> None:
        self.name = f"{one.name},…"
        self._one = one

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        return tuple(self._one.convert(word.strip(), param, ctx) for word in value.split(","))


def swept(
    *names: str, what: str, one: click.ParamType[Any] = click.STRING
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """An option of which several values may be given: a tuple of them, empty if there is none."""
    return click.option(
        *names,
        multiple=True,
        type=_Several(one),
        callback=lambda _ctx, _param, values: tuple(itertools.chain(*values)),
        help=f"{what} Several: an SAE for each.",
    )
