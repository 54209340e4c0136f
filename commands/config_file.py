"""YAML files of options, each read as if it stood on the command line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from mlsae.base.errors import InputError


def read_config_file(path: Path, options: Mapping[str, click.Option]) -> dict[str, Any]:
    """Read the options in a YAML file, as text.

    Args:
        path: YAML file, a mapping from options without dashes to values or lists of values.
        options: options that the file may have, by their names, with `_` for `-`.

    Returns:
        Value of each option, by the name of its parameter.

    Raises:
        InputError: the file is no such YAML.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        what = "does not exist" if isinstance(error, FileNotFoundError) else error.strerror
        raise InputError(f"--config {path} {what}") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        what = " ".join(str(error).split())
        raise InputError(f"--config {path} is no YAML file: {what}") from None
    if not isinstance(content, dict):
        raise InputError(f"--config {path} must map options to values, such as `batch-size: 4096`")
    found: dict[str, Any] = {}
    for word, value in content.items():
        option = options.get(str(word).replace("-", "_"))
        if option is None:
            known = ", ".join(sorted(name.replace("_", "-") for name in options))
            raise InputError(
                f"--config {path} gives {str(word)!r}, which is no option; expected {known}"
            )
        if value is not None:
            found[str(option.name)] = _as_given(value, again=option.multiple)
    return found


def names_of(option: click.Option) -> set[str]:
    """Names that an option has in a file: its flag's, and its parameter's."""
    flags = {word.removeprefix("--") for word in option.opts if word.startswith("--")}
    return {name.replace("-", "_") for name in (*flags, str(option.name))}


def _as_given(value: Any, *, again: bool) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, list):
        words = [str(word) for word in value]
        return words if again else ",".join(words)
    return [str(value)] if again else str(value)
