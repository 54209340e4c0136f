"""Texts of the repository open with a noun or verb of their own."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from english import OPENINGS, OTHERS, files, fixed_plurals, refused, rooms, texts


@pytest.mark.parametrize("room", [room.name for room in rooms()])
def test_texts_open_with_a_noun_or_verb(room: str):
    """Never with one of `OPENINGS`; `python tests/house/english.py ROOM` lists those that do."""
    (place,) = (place for place in rooms() if place.name == room)
    found = refused(place)
    assert not found, "\n".join(map(str, found))


@pytest.mark.parametrize("opening", OPENINGS)
def test_every_kind_of_text_is_seen(opening: str, tmp_path: Path):
    """A forbidden opening is found in each place where text for people stands."""
    path = tmp_path / "room.py"
    path.write_text(
        f'''"""{opening} a module."""

import click

# {opening} a comment
# that goes on.
LIMIT = 1  # {opening.lower()} a line
"""{opening} an attribute."""


@click.option("--a", help="{opening} an option.")
def command(a: int) -> dict[str, str]:
    """Do it.

    Args:
        a: {opening.lower()} an argument.

    Returns:
        {opening} a result.

    Raises:
        ValueError: {opening.lower()} an error.
    """
    raise ValueError(f"{opening.lower()} a message {{a}}")


FIELD = {{"help": f"{opening} a field {{LIMIT}}"}}
USUAL = setting(unset="{opening.lower()} a default", parse=int)
COLUMN = Column("name", int, "{opening.lower()} a unit", f"{opening.lower()} a text {{LIMIT}}")
click.echo("{opening} a line")
click.report("rule", "{opening.lower()} a line")
'''.replace("{{", "{").replace("}}", "}")
    )
    assert sorted(text.kind for text in refused(path)) == [
        "argument",
        "argument",
        "argument",
        "column",
        "column",
        "comment",
        "comment",
        "docstring",
        "docstring",
        "error",
        "help",
        "help",
        "help",
        "line",
        "line",
    ]


def test_other_openings_are_free(tmp_path: Path):
    """Words that merely begin like one of them, directives, and lines inside a text."""
    path = tmp_path / "room.py"
    path.write_text(
        '''"""Offsets of rows.

What follows is no opening.
"""

# Software
# of this kind
SO = 1  # noqa: whether
'''
    )
    assert [text.kind for text in texts(path)] == ["docstring", "comment"]
    assert refused(path) == []


def test_numbers_of_things_agree_with_their_nouns():
    """`mlsae.base.units.counted` and `portion` write both, wherever a number may be 1."""
    package = [file for room in rooms() if room.name not in OTHERS for file in files(room)]
    found = [text for file in package for text in fixed_plurals(file)]
    assert not found, "\n".join(map(str, found))


def test_a_fixed_plural_is_seen(tmp_path: Path):
    """Behind a count and perhaps an adjective; a rate, a verb and `counted` are free."""
    path = tmp_path / "room.py"
    path.write_text(
        """A = f"{len(rows)} rows"
B = f"{self.num_latents:,} dead latents, {total} is all"
C = f"{counted(num_rows, 'row')} there, {format_count(rate)} rows/s, {num_rows} has"
"""
    )
    assert [text.line for text in fixed_plurals(path)] == [1, 2]
