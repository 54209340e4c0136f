"""Counts and byte sizes as people write them: `10M`, `1e7`, `200GB`, `64KiB`."""

import math
import operator
import re
from collections.abc import Sequence
from fractions import Fraction

from mlsae.base.errors import InputError

_COUNT = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
_BYTES = {
    "": 1,
    "b": 1,
    **{f"{p}b": 1000**i for i, p in enumerate("kmgt", start=1)},
    **{f"{p}ib": 1024**i for i, p in enumerate("kmgt", start=1)},
}
EMPTY = "expected a value, got an empty one; is a variable unset?"
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/{1,2})(?=[^/]|$)")
_SCHEMES = frozenset({"file", "hf", "http", "https", "s3"})
# Bounded, since numbers are computed in full: 1e999999999 would fill the memory.
_NUMBER = re.compile(
    r"\s*([0-9][0-9_]{0,99}\.?[0-9]{0,99}(?:e[+]?0{0,99}[0-9]{1,2})?)\s*([a-z]*)\s*"
)


def parse_location(text: str) -> str:
    """A directory or a URL, as it is.

    Raises:
        InputError: nothing, or a URL with one slash in place of two.
    """
    if not text.strip():
        raise InputError(EMPTY)
    found = _URL.match(text)
    if found is not None and found[1].lower() in _SCHEMES - {"file"} and found[2] == "/":
        raise InputError(
            f"{text} lacks a slash: expected {found[1]}://{text[found.end() :]}, or ./{text} for a "
            f"directory of that name"
        )
    return text


def parse_path(text: str) -> str:
    """A place on this machine, as it is.

    Raises:
        InputError: nothing, or a URL, of which a path would make a directory.
    """
    if not text.strip():
        raise InputError(EMPTY)
    found = _URL.match(text)
    # A path that was made of a URL has one slash left.
    if found is not None and (found[2] == "//" or found[1].lower() in _SCHEMES):
        raise InputError(f"{text} is a URL: expected a directory or file of this machine")
    return text


def _parse(text: str, units: dict[str, int], what: str, examples: str) -> int:
    match = _NUMBER.fullmatch(text.lower())
    if match is None or match[2] not in units:
        raise InputError(f"expected {what} such as {examples}, got {text!r}")
    # Exact, where a float64 would round above 2⁵³.
    value = Fraction(match[1].replace("_", "")) * units[match[2]]
    if value.denominator != 1:
        raise InputError(f"expected a whole number of {what.split()[-1]}, got {text!r}")
    return int(value)


def parse_count(text: str) -> int:
    """`10M`, `1e7`, `2.5k`, `16384` → int. Suffixes are powers of 1,000; B means 10⁹."""
    return _parse(text, _COUNT, "a number of items", "10M, 1e7 or 16384")


def parse_bytes(text: str) -> int:
    """`200GB` (powers of 1,000), `64KiB` (powers of 1,024) or a plain number → bytes."""
    return _parse(text, _BYTES, "a number of bytes", "200GB or 64KiB")


def whole(name: str, value: object) -> int:
    """A whole number of any library: of numpy, or a tensor of one.

    Raises:
        InputError: the value is no whole number.
    """
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"{name} must be a whole number, got {type(value).__name__} {str(value)[:40]}"
        ) from None


def format_bytes(num_bytes: float) -> str:
    """Bytes for people, in powers of 1,000 with three significant digits: `61.4 GB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(num_bytes) < 1000 or unit == "TB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.3g} {unit}"


def format_short(count: float) -> str:
    """A count or rate with three significant digits and the suffix that fits: `1.23M`, `0.5`."""
    for suffix in ("", "k", "M", "G", "T"):
        if abs(count) < 999.5 or suffix == "T":
            break
        count /= 1000
    return f"{count:.3g}{suffix}"


def format_duration(seconds: float) -> str:
    """A time for people, in its two largest units: `42 s`, `12 min`, `1 h 12 min`, `2 d 3 h`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"


def format_count(count: float) -> str:
    """A count with thousands separators: `480,000`."""
    return f"{count:,.0f}"


def counted(num: int, noun: str) -> str:
    """A number of things for people: `1 shard`, `480,000 rows`, `0 tokens`."""
    return f"{format_count(num)} {noun}{'' if num == 1 else 's'}"


def portion(num: int, total: int, noun: str) -> str:
    """Part of a number of things, with the verb: `3 of 20 shards are`, `1 of 20 shards is`."""
    return f"{format_count(num)} of {counted(total, noun)} {'is' if 1 in (num, total) else 'are'}"


def format_ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers for people, neighbours joined: `0–5, 8`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] + 1 == number:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("–".join(map(str, run)) for run in runs)


def parse_layers(text: str) -> tuple[int, ...]:
    """`0,2,4`, `0-5` or `0-2,5` → block indices, ascending.

    Raises:
        InputError: not such a list, a range that runs backwards, or a layer named twice.
    """
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise InputError(f"expected layers such as 0,2,4 or 0-5, got {text!r}")
        chosen = range(int(first), int(last if dash else first) + 1)
        if not chosen:
            raise InputError(f"expected layers such as 0-5, got the range {part.strip()!r}")
        layers.extend(chosen)
    if len(set(layers)) != len(layers):
        raise InputError(f"expected each layer once, got {text!r}")
    return tuple(sorted(layers))


def parse_range(text: str) -> tuple[int, int]:
    """`1M:2M` → start and stop, `500k` → 0 and stop; counts as `parse_count` reads them.

    Raises:
        InputError: not such a range, or an empty one.
    """
    first, colon, last = text.partition(":")
    start, stop = (parse_count(first), parse_count(last)) if colon else (0, parse_count(first))
    if start >= stop:
        raise InputError(f"expected START:STOP with START below STOP, got {text!r}")
    return start, stop


def parse_names(text: str) -> tuple[str, ...]:
    """`resid_mid,attn_out` → names, in the order given.

    Raises:
        InputError: an empty name.
    """
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise InputError(f"expected names such as resid_mid,attn_out, got {text!r}")
    return names


def parse_numbers(text: str) -> tuple[float, ...]:
    """`1,0.5,2` → numbers, in the order given.

    Raises:
        InputError: not such a list.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"expected numbers such as 1,0.5,2, got {text!r}") from None


def check_not_negative(flag: str, values: tuple[float, ...] | None) -> None:
    """Require finite numbers of at least 0; None is none.

    Raises:
        InputError: one is neither; the message begins with the flag.
    """
    if values is not None and not all(0 <= value < math.inf for value in values):
        shown = ",".join(f"{value:g}" for value in values)
        raise InputError(f"{flag} takes numbers of at least 0, got {shown}")


def parse_context(text: str) -> tuple[int, int]:
    """`8,4` → tokens before and after; `8` → the same before and after.

    Raises:
        InputError: not one or two counts.
    """
    parts = [parse_count(part) for part in text.split(",")]
    if len(parts) > 2:
        raise InputError(f"expected tokens before and after, such as 8,4, got {text!r}")
    return parts[0], parts[-1]


def parse_count_or_auto(text: str) -> int | None:
    """A count as `parse_count` reads it, or None for `auto`."""
    return None if text.strip().lower() == "auto" else parse_count(text)


def check_seed(flag: str, seed: int | None) -> None:
    """Require a seed that every generator takes, of torch and numpy; None is none.

    Raises:
        InputError: the seed is below 0 or above 2⁶³ − 1; the message begins with the flag.
    """
    if seed is not None and not 0 <= seed < 2**63:
        raise InputError(f"{flag} must be from 0 to 2^63 - 1, got {seed}")
