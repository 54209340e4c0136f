"""Settings say of themselves whether they decide a result."""

from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path

import pytest

from mlsae.base.settings import deciding, described, setting, settings


def test_a_field_without_the_mark_is_refused():
    """At the creation of the class, in whichever class the field is."""
    with pytest.raises(TypeError, match=r"Bare\.size must be a setting"):

        @settings
        class Bare:
            size: int = 1

    @dataclass(frozen=True, kw_only=True)
    class Plain:
        size: int = 1

    with pytest.raises(TypeError, match=r"Heir\.size must be a setting"):

        @settings
        class Heir(Plain):
            other: int = setting(default=1, decides=True, group="A", doc="Another.")

    with pytest.raises(TypeError, match="decides"):
        setting(default=1, group="A", doc="A number.")  # type: ignore[call-arg]


def test_settings_are_frozen_dataclasses_with_keywords_alone():
    """A setting without a default must be given."""

    @settings
    class Some:
        size: int = setting(decides=True, group="A", doc="A size.")
        speed: float = setting(default=0.5, decides=False, group="B", doc="A speed.")

    assert Some(size=3) == Some(size=3, speed=0.5)
    assert deciding(Some) == ("size",)
    assert [(name, one.group) for name, one in described(Some).items()] == [
        ("size", "A"),
        ("speed", "B"),
    ]
    with pytest.raises(TypeError, match="size"):
        Some()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Some(3)  # type: ignore[misc]


def test_a_path_may_be_text():
    """As Python users give them; the field is a path in any case, in heirs and copies too."""

    @settings
    class Some:
        out: Path = setting(decides=False, group="A", doc="A directory.")

    @settings
    class Heir(Some):
        other: Path | None = setting(default=None, decides=False, group="A", doc="Another.")
        name: str = setting(default="b", decides=False, group="A", doc="A name.")

    made = Heir(out="a", other="c")  # type: ignore[arg-type]
    assert made == Heir(out=Path("a"), other=Path("c"))
    assert (replace(made, other=None).other, made.name) == (None, "b")
    assert list(signature(Heir).parameters) == ["out", "other", "name"]
