"""Sizes are read as people write them, and nothing else is guessed at."""

import pytest

from mlsae.base.errors import InputError
from mlsae.base.units import (
    counted,
    format_bytes,
    parse_bytes,
    parse_count,
    parse_layers,
    portion,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10M", 10**7),
        ("1e7", 10**7),
        ("2.5k", 2500),
        ("16384", 16384),
        ("1_000", 1000),
        ("1B", 10**9),
        ("1.1k", 1100),
        ("9007199254740993", 2**53 + 1),
        ("9223372.036854775807T", 2**63 - 1),
        ("1e22", 10**22),
    ],
)
def test_counts(text, value):
    """Powers of 1,000, exact beyond the whole numbers of float64."""
    assert parse_count(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("200GB", 2 * 10**11), ("64KiB", 65536), ("1.5 MiB", 1572864), ("7", 7), ("2tb", 2 * 10**12)],
)
def test_bytes(text, value):
    """Powers of 1,000 and, with an i, of 1,024."""
    assert parse_bytes(text) == value


@pytest.mark.parametrize(
    "text", ["", "ten", "10X", "-5", "1.5", "0x10", "10 M M", "1e400", "9" * 999]
)
def test_other_counts_are_refused(text):
    """The text is repeated, with examples of what is expected."""
    with pytest.raises(InputError, match=r"got '"):
        parse_count(text)


def test_bytes_are_shown_with_three_digits():
    """The unit changes at 1,000."""
    shown = [format_bytes(n) for n in (0, 999, 1000, 61_440_000_000, 1.234e15)]
    assert shown == ["0 B", "999 B", "1 kB", "61.4 GB", "1.23e+03 TB"]


def test_one_thing_is_singular():
    """Any other number of things is plural, 0 too."""
    assert [counted(n, "dead latent") for n in (0, 1, 2, 480_000)] == [
        "0 dead latents",
        "1 dead latent",
        "2 dead latents",
        "480,000 dead latents",
    ]


def test_a_portion_has_the_verb_of_its_number():
    """Singular for one thing, and for any part of a single one."""
    found = [portion(*of, "shard") for of in ((0, 20), (1, 20), (2, 2000), (0, 1), (1, 1))]
    assert found == [
        "0 of 20 shards are",
        "1 of 20 shards is",
        "2 of 2,000 shards are",
        "0 of 1 shard is",
        "1 of 1 shard is",
    ]


@pytest.mark.parametrize(
    ("text", "layers"), [("0,2,4", (0, 2, 4)), ("0-3", (0, 1, 2, 3)), ("5,0-1", (0, 1, 5))]
)
def test_layers(text, layers):
    """Lists and ranges, ascending."""
    assert parse_layers(text) == layers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3-1", "got the range '3-1'"),
        ("a", "expected layers such as 0,2,4 or 0-5, got 'a'"),
        ("1,0-2", "expected each layer once"),
        ("-1", "expected layers such as"),
        ("", "expected layers such as"),
    ],
)
def test_other_layers_are_refused(text, message):
    """Backward ranges, repeats, negative indices."""
    with pytest.raises(InputError, match=message):
        parse_layers(text)
