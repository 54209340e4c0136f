"""Settings: one description for each serves its dataclass, the command line, run files and docs."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

from mlsae.base.errors import without_secrets
from mlsae.base.files import Location
from mlsae.base.units import parse_bytes

T = TypeVar("T")
_KEY = "setting"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Description of a field in a settings class."""

    doc: str
    """Meaning, unit and range, in sentences that need no other field's; shown by `--help`."""
    decides: bool
    """True where another value gives another result: other bytes in a store or in events, or other
    numbers from a training run. A run may go on with sums rounded differently, on another device or
    in other micro-batches; a store and events are shared among processes to the byte."""
    group: str
    """Heading in `--help`."""
    unset: str | None = None
    """Meaning of the default None, as in `[default: all]`."""
    option: str | None = None
    """Option name; None for the field's own, as in --batch-size."""
    short: str | None = None
    """One-letter option name."""
    parse: Callable[[str], Any] | None = None
    """Reader for the option's text; None for what the annotation takes."""
    metavar: str | None = None
    """Word for the option's value; None for the reader's, or the annotation's."""
    swept: bool = False
    """True where SAEs in one run may differ: the option takes several values, the field has one."""
    again: bool = False
    """True where the option may be given several times, for a tuple."""
    by_layer: bool = False
    """True for a value for each layer of the run."""
    is_file: bool = False
    """True for a path to a file, not to a directory."""
    on_command_line: bool = True
    """False where there is no option."""
    gives_way_to: tuple[str, ...] = ()
    """Fields that the setting makes no sense beside: a value from a file is dropped where the
    command line changes one of them."""

    def flag(self, name: str) -> str:
        """Long option for the field `name`."""
        return self.option or "--" + name.replace("_", "-")


def setting(
    *,
    decides: bool,
    group: str,
    doc: str,
    default: Any = MISSING,
    unset: str | None = None,
    option: str | None = None,
    short: str | None = None,
    parse: Callable[[str], Any] | None = None,
    metavar: str | None = None,
    swept: bool = False,
    again: bool = False,
    by_layer: bool = False,
    is_file: bool = False,
    on_command_line: bool = True,
    gives_way_to: tuple[str, ...] = (),
) -> Any:
    """A field in a settings class; the arguments are those of `Setting`.

    Without a default the field, and its option, must be given.
    """
    described = Setting(
        doc=doc,
        decides=decides,
        group=group,
        unset=unset,
        option=option,
        short=short,
        parse=parse,
        metavar=metavar,
        swept=swept,
        again=again,
        by_layer=by_layer,
        is_file=is_file,
        on_command_line=on_command_line,
        gives_way_to=gives_way_to,
    )
    return dataclasses.field(default=default, metadata={_KEY: described})


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(setting,))
def settings(cls: type[T]) -> type[T]:
    """Make a frozen dataclass with keyword arguments alone, in which every field is a `setting`.

    A field that is a `Path` takes text, too.

    Raises:
        TypeError: a field, inherited ones too, does not say whether it decides the result.
    """
    made: Any = dataclass(frozen=True, kw_only=True)(cls)
    for field in dataclasses.fields(made):
        if _KEY not in field.metadata:
            raise TypeError(
                f"{cls.__name__}.{field.name} must be a setting(decides=…, …), which says whether "
                f"the field decides the result"
            )
    paths = {f.name for f in dataclasses.fields(made) if f.type in (Path, Path | None)}
    initialize = made.__init__

    @functools.wraps(initialize)
    def with_paths(self: Any, /, **given: Any) -> None:
        texts = {name for name in paths & given.keys() if isinstance(given[name], str)}
        initialize(self, **given | {name: Path(given[name]) for name in texts})

    made.__init__ = with_paths
    return cls


def described(cls: type[Any]) -> dict[str, Setting]:
    """Field → description, in the class's order."""
    return {field.name: field.metadata[_KEY] for field in dataclasses.fields(cls)}


def deciding(cls: type[Any]) -> tuple[str, ...]:
    """Fields in a settings class that decide the result."""
    return tuple(name for name, of in described(cls).items() if of.decides)


def flag(cls: type[Any], name: str) -> str:
    """A field's option as messages name it, or the field's name where it has no option."""
    one = described(cls)[name]
    if not one.on_command_line:
        return name
    return one.short if one.short == f"-{name}" else one.flag(name)


def words_of(config: Any) -> list[str]:
    """Words for a command line that give a configuration's values other than defaults.

    Options that must be given come first. URLs stand without their passwords.
    """
    words: list[str] = []
    fields = dataclasses.fields(config)
    for field in sorted(fields, key=lambda field: field.default is not MISSING):
        one: Setting = field.metadata[_KEY]
        value, option = getattr(config, field.name), one.flag(field.name)
        if value == field.default or not one.on_command_line:
            continue
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
            continue
        values = value if isinstance(value, tuple) else (value,)
        for text in values if one.again else (",".join(map(str, values)),):
            words += [option, without_secrets(str(text))]
    return words


def device_setting(*, decides: bool = False, gives_way_to: tuple[str, ...] = ()) -> Any:
    """The field `device` of a settings class; it decides where last bits count."""
    return setting(
        default="auto",
        decides=decides,
        group="Run",
        doc="Device: cpu, cuda, cuda:N, or auto for CUDA where there is any.",
        gives_way_to=gives_way_to,
    )


@settings
class ReadsStores:
    """Settings for work that reads activation stores, wherever they are."""

    cache: Location | tuple[Location, ...] = setting(
        decides=True,
        group="Data",
        again=True,
        metavar="LOCATION",
        doc="Activation store: a directory, https://…, s3://… or hf://datasets/…; given again, "
        "stores of one model and different text, read as one in any order.",
    )
    cache_dir: Path | None = setting(
        default=None,
        unset="~/.cache/mlsae",
        decides=False,
        group="Data",
        doc="Directory in which parts of remote stores are kept.",
    )
    cache_size: int | None = setting(
        default=None,
        unset="10GiB",
        decides=False,
        group="Data",
        parse=parse_bytes,
        doc="Most bytes from remote stores kept on this machine, 0 for none.",
    )
