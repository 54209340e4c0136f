"""Figures and page of an analysis: by-products, made once its tables are safe."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlsae.analyze.results.analysis import load
from mlsae.analyze.results.directory import FIGURES_FOLDER, PAGE
from mlsae.analyze.results.page.render import write_page
from mlsae.base.directories import held
from mlsae.base.files import remove_stale_partials
from mlsae.base.output.console import Progress
from mlsae.base.output.drawing import by_product


def planned_figures(sources: Mapping[str, Any]) -> list[str]:
    """Paths within an analysis of the files that figures will have; none without matplotlib.

    Args:
        sources: tables by name, and the summary as `summary`.
    """
    found: list[str] = []
    with by_product("figures"):
        # Here, so that an analysis does without matplotlib where that cannot be imported.
        from mlsae.analyze.results.figures import registry

        found += [f"{FIGURES_FOLDER}/{name}" for name in registry.files(sources)]
    return found


def make_pictures(out: Path) -> None:
    """Draw the figures that the summary of an analysis names, then write the page.

    An error becomes a warning; tables and summary stay as they are.

    Args:
        out: directory of the analysis.
    """
    with by_product(str(out / PAGE)), held(out):
        remove_stale_partials(out)
        analysis = load(out)
        if analysis.summary["figures"]:
            with by_product(str(out / FIGURES_FOLDER)):
                from mlsae.analyze.results.figures import registry

                (out / FIGURES_FOLDER).mkdir(exist_ok=True)
                with Progress("figures", len(analysis.figures), "figure") as progress:
                    registry.draw_all(out / FIGURES_FOLDER, vars(analysis), progress.update)
        write_page(analysis, out / PAGE)
