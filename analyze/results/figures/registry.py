"""Every figure of an analysis by name, each a function of its tables, in one style.

Arguments of a function are named as the fields of an `Analysis` they take: tables or the summary.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mlsae.analyze.results.figures.directions import decoder_cosine, embedding_cosine, layer_cosine
from mlsae.analyze.results.figures.distributions import (
    layer_distribution,
    layer_distribution_by_count,
    prompt,
)
from mlsae.analyze.results.figures.latents import (
    bimodality,
    density,
    layer_entropy,
    layer_std,
    mean_layer,
    num_layers,
    token_entropy,
)
from mlsae.analyze.results.figures.layers import (
    cross_entropy,
    norm_cosine,
    reconstruction,
    sparsity,
)
from mlsae.analyze.results.figures.style import FORMATS, STYLE, save
from mlsae.analyze.results.figures.variance import layer_variance
from mlsae.base.errors import InputError
from mlsae.base.output.drawing import by_product, own_style
from mlsae.base.units import counted

Sources = Mapping[str, Any]
"""Tables by name, and the summary as `summary`: the data that figures are drawn from."""


def _has_variance(sources: Sources) -> bool:
    return sources["summary"]["layer_variance"] is not None


def _always(_sources: Sources) -> bool:
    return True


def _has(table: str, *columns: str) -> Callable[[Sources], bool]:
    """A condition: one of the columns has a number."""
    return lambda sources: any(
        sources[table][column].null_count < len(sources[table]) for column in columns
    )


FIGURES: Mapping[str, tuple[Callable[..., Figure], Callable[[Sources], bool]]] = {
    "reconstruction": (reconstruction, _always),
    "sparsity": (sparsity, _always),
    "cross_entropy": (cross_entropy, _has("layers", "delta_ce")),
    "norm_cosine": (norm_cosine, _always),
    "layer_distribution": (layer_distribution, _always),
    "layer_distribution_by_count": (layer_distribution_by_count, _always),
    "mean_layer": (mean_layer, _always),
    "layer_std": (layer_std, _always),
    "layer_entropy": (layer_entropy, _always),
    "bimodality": (bimodality, _always),
    "num_layers": (num_layers, _always),
    "layer_variance": (layer_variance, _has_variance),
    "density": (density, _always),
    "token_entropy": (token_entropy, _always),
    "decoder_cosine": (decoder_cosine, _always),
    "layer_cosine": (layer_cosine, _always),
    "embedding_cosine": (
        embedding_cosine,
        _has("latents", "embedding_cosine", "unembedding_cosine"),
    ),
}
"""Name → the function that draws a figure, and the condition that the data for it are there.

Each prompt has a figure more, `prompt_0` and so on.
"""


def names(sources: Sources) -> tuple[str, ...]:
    """Names of the figures that can be drawn, in the order of docs/look-at-an-analysis.md."""
    fixed = (name for name, (_, can) in FIGURES.items() if can(sources))
    return (*fixed, *(f"prompt_{n}" for n in range(len(sources["summary"]["prompts"]))))


def draw(name: str, sources: Sources) -> Figure:
    """Draw a figure as a new matplotlib `Figure`.

    Raises:
        InputError: there is no such figure of these data.
    """
    if name not in (known := names(sources)):
        raise InputError(f"there is no figure {name!r}: the figures are {', '.join(known)}")
    if name in FIGURES:
        function = FIGURES[name][0]
    else:
        function = partial(prompt, number=int(name.removeprefix("prompt_")))
    needed = inspect.signature(function).parameters
    with own_style(STYLE):
        return function(**{source: sources[source] for source in needed if source in sources})


def files(sources: Sources) -> list[str]:
    """Names of the files that `draw_all` writes."""
    return [f"{name}.{form}" for name in names(sources) for form in FORMATS]


def draw_all(directory: Path, sources: Sources, progress: Callable[[int], object]) -> None:
    """Draw every figure into `directory`, as PNG and as SVG.

    Figures that cannot be drawn are named in one warning, and the others are drawn.

    Args:
        directory: existing directory.
        sources: the data of the analysis.
        progress: called with 1 for each figure.
    """
    failed: dict[str, Exception] = {}
    for name in names(sources):
        try:
            save(draw(name, sources), directory, name)
        except Exception as error:  # The others may be fine.
            failed[name] = error
        progress(1)
    if failed:
        with by_product(f"{counted(len(failed), 'figure')} ({', '.join(failed)})"):
            raise next(iter(failed.values()))
