"""Command options, made from the fields of settings classes, and help under headings."""

import itertools
import os
from collections.abc import Callable
from dataclasses import MISSING
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click
from click.core import ParameterSource

from mlsae.base.errors import InputError
from mlsae.base.settings import Setting, described
from mlsae.base.units import (
    EMPTY,
    parse_count,
    parse_layers,
    parse_location,
    parse_path,
)
from mlsae.commands.config_file import names_of, read_config_file


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


class _Text(click.types.StringParamType):
    """A text that is not empty, as the value of an unset variable is."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.ParamType`."""
        if value == "":
            self.fail(EMPTY, param, ctx)
        return super().convert(value, param, ctx)


class _Path(click.Path):
    """A place on this machine: neither empty, as the value of an unset variable is, nor a URL."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.ParamType`."""
        try:
            return super().convert(parse_path(os.fspath(value)), param, ctx)
        except InputError as error:
            self.fail(str(error), param, ctx)


COUNT = Parsed("count", parse_count)
LAYERS = Parsed("layers", parse_layers)
TEXT = _Text()
DIRECTORY = _Path(path_type=Path, file_okay=False)
FILE = _Path(path_type=Path, dir_okay=False)
LOCATION = Parsed("location", parse_location)
"""A directory or a URL, which a path would mangle."""
_PLAIN: dict[object, click.ParamType[Any]] = {
    int: click.INT,
    float: click.FLOAT,
    str: TEXT,
    Path: DIRECTORY,
}


class GroupedOption(click.Option):
    """An option that stands under a heading in its command's help."""

    def __init__(self, *args: Any, group: str, **more: Any) -> None:
        super().__init__(*args, **more)
        self.group = group

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Flags and help, with one space before each note, where click puts two."""
        found = super().get_help_record(ctx)
        return found and (found[0], found[1].replace("  [", " ["))


class SettingsCommand(click.Command):
    """A command whose options are a settings class's fields, beside its own.

    They are made when they are first asked for, so that a list of commands imports no settings.

    Args:
        args: arguments for `click.Command`.
        settings: function that returns the settings class.
        example: a file of the options, for the help of --config; None for no such option.
        table: function that returns lines for the end of the help text, shown verbatim.
        more: further arguments for `click.Command`.
    """

    def __init__(
        self,
        *args: Any,
        settings: Callable[[], type[Any]],
        example: str | None = None,
        table: Callable[[], str] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(*args, **more)
        self._settings, self._example, self._table = settings, example, table
        self._made = False

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """All options, and that for help; the first call completes the help text too."""
        if not self._made:
            self.params = [*options_of(self._settings()), *self.params]
            if self._example is not None:
                self.params.append(_config_option(self._example))
            if self._table is not None:
                self.help = f"{self.help}\n\n\b\n{self._table()}"
            self._made = True
        return super().get_params(ctx)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See `click.Command`; a file's options then give way to those of the command line."""
        rest = super().parse_args(ctx, args)
        if ctx.default_map:
            self._give_way(ctx)
        return rest

    def _give_way(self, ctx: click.Context) -> None:
        """Drop values of a file that make no sense beside others of the command line."""
        settings = self._settings()
        options = {str(option.name): option for option in self.get_params(ctx)}
        in_file = ctx.default_map or {}

        def is_changed(name: str) -> bool:
            if ctx.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
                return False
            option, before = options[name], settings.__dataclass_fields__[name].default
            if name in in_file:
                before = option.process_value(ctx, in_file[name])
            elif option.multiple:
                before = (before,)
            return bool(ctx.params[name] != before)

        for name, one in described(settings).items():
            from_file = ctx.get_parameter_source(name) is ParameterSource.DEFAULT_MAP
            if from_file and any(map(is_changed, one.gives_way_to)):
                default = settings.__dataclass_fields__[name].default
                ctx.params[name] = () if options[name].multiple else default

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each heading's options, ordered by their first ones."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx)
            if record is not None and isinstance(option, click.Option):
                sections.setdefault(getattr(option, "group", "Other"), []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


class CommandList(click.Group):
    """A group whose help has each command's first paragraph, whole and in order."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Names, in the order in which commands were added."""
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the names and what the commands do."""
        with formatter.section("Commands"):
            formatter.write_dl(
                [
                    (name, " ".join((command.help or "").split("\n\n")[0].split()))
                    for name, command in self.commands.items()
                ]
            )


def _config_option(example: str) -> click.Option:
    return GroupedOption(
        ["--config"],
        group="Run",
        type=FILE,
        is_eager=True,
        expose_value=False,
        callback=_use_config_file,
        help=f"YAML file of these options, such as {example}; options given here come first.",
    )


def _use_config_file(ctx: click.Context, _param: click.Parameter, path: Path | None) -> None:
    """Take the defaults of a command's options from a YAML file."""
    if path is None:
        return
    options = {
        name: option
        for option in ctx.command.get_params(ctx)
        if isinstance(option, click.Option) and option.expose_value
        for name in names_of(option)
    }
    try:
        ctx.default_map = read_config_file(path, options)
    except InputError as error:
        raise click.UsageError(str(error), ctx) from None


def options_of(settings: type[Any]) -> list[click.Option]:
    """A settings class's options, in the order of its fields."""
    hints, fields = get_type_hints(settings), settings.__dataclass_fields__
    return [
        _option(name, setting, fields[name].default, hints[name])
        for name, setting in described(settings).items()
        if setting.on_command_line
    ]


def default_text(setting: Setting, default: Any) -> str:
    """The default for people; empty where a value must be given, and for a plain flag."""
    if default is MISSING or default is False or default == ():
        return ""
    if default is None:
        return setting.unset or ""
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return (
        "yes" if default is True else f"{default:g}" if isinstance(default, float) else str(default)
    )


def _option(name: str, setting: Setting, default: Any, hint: Any) -> GroupedOption:
    flag = setting.flag(name)
    notes = [f"default: {shown}"] if (shown := default_text(setting, default)) else []
    options: dict[str, Any] = {"required": default is MISSING}
    if hint is bool:
        options |= {"is_flag": True, "default": default}
        flag += f"/--no-{flag[2:]}" if default else ""
    else:
        options["multiple"] = setting.again or setting.swept
        options |= {"type": _type(setting, hint), "metavar": setting.metavar}
        if setting.swept:
            options["callback"] = lambda _ctx, _param, values: tuple(itertools.chain(*values))
            notes.append("several: an SAE each")
        elif default is not MISSING:
            options["default"] = default
    names = [name, *([setting.short] if setting.short else []), flag]
    help_text = f"{setting.doc} [{'; '.join(notes)}]" if notes else setting.doc
    return GroupedOption(names, group=setting.group, help=help_text, show_default=False, **options)


def _type(setting: Setting, hint: Any) -> click.ParamType[Any]:
    if setting.parse is not None:
        name = setting.parse.__name__.removeprefix("parse_")
        kind: click.ParamType[Any] = Parsed(name, setting.parse)
    elif setting.is_file:
        kind = FILE
    else:
        kind = _PLAIN[next(one for one in (*get_args(hint), hint) if one in _PLAIN)]
    return _Several(kind) if setting.swept else kind


class _Several(click.ParamType[Any]):
    """Values with commas between them."""

    def __init__(self, one: click.ParamType[Any]) -> None:
        self.name = f"{one.name},…"
        self._one = one

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        return tuple(self._one.convert(word.strip(), param, ctx) for word in value.split(","))
