"""Pictures as by-products: drawn in a style of our own, and never at the cost of the product."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mlsae.base.output.console import say


@contextmanager
def own_style(settings: Mapping[str, Any]) -> Iterator[None]:
    """Draw with matplotlib's defaults and `settings`, whatever matplotlibrc or a notebook says.

    Args:
        settings: rcParams that differ from matplotlib's defaults.
    """
    from matplotlib import style

    with style.context(["default", dict(settings)]):
        yield


@contextmanager
def by_product(name: str) -> Iterator[None]:
    """Make something that the work can do without: an error becomes a warning.

    Args:
        name: name of the thing, for the warning.
    """
    try:
        yield
    except Exception as error:  # Nothing that goes wrong here may end the command.
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        say(f"warning: {name} could not be made ({cause}); all else is whole", err=True)
