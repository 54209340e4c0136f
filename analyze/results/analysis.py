"""Reading an analysis back."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.dataset as pd
import pyarrow.parquet as pq

from mlsae.analyze.results.directory import EXAMPLES_FILE, PAGE, read_summary
from mlsae.analyze.results.events import open_events
from mlsae.analyze.results.tables import check_version, read_table, with_later_columns
from mlsae.base.errors import InputError
from mlsae.base.files import stand_in
from mlsae.base.units import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WHOLE = (
    "layers",
    "overall",
    "latents",
    "latent_layers",
    "prefixes",
    "histograms",
    "layer_cosine",
    "prompts",
)
"""Tables that are in memory."""


@dataclass(frozen=True, eq=False, repr=False)
class Analysis:
    """An analysis as it lies on disk; the columns are defined in docs/reference/tables.md."""

    path: Path
    """The analysis's directory."""

    summary: Mapping[str, Any]
    """The analysis's settings and provenance, and numbers about the whole SAE."""

    layers: pa.Table
    """One row a layer."""

    overall: pa.Table
    """The mean over layers, and all layers together."""

    latents: pa.Table
    """One row a latent, in index order."""

    latent_layers: pa.Table
    """One row a latent and layer, by latent, then layer."""

    prefixes: pa.Table
    """One row a layer and prefix of the latents, then one a prefix over all layers; the last prefix
    is all latents. Empty in analyses before 1.2."""

    histograms: pa.Table
    """One row a bin in the histograms of mean layers and decoder cosines."""

    layer_cosine: pa.Table
    """Pairs of latents, one row a bin of mean layers' distance and decoder cosine."""

    prompts: pa.Table
    """One row for a latent active at a prompt's token and layer; empty without prompts."""

    examples: pd.Dataset | None
    """Each latent's strongest and random events, by latent, read as they are scanned; None for an
    analysis without examples."""

    events: pd.Dataset
    """One row for a latent active at a row and layer, read as they are scanned."""

    def __repr__(self) -> str:
        layers = ", ".join(map(str, self.summary["layers"]))
        return (
            f"Analysis({str(self.path)!r}: {counted(len(self.latents), 'latent')}, layers {layers})"
        )

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of figures that can be drawn; docs/look-at-an-analysis.md shows them."""
        # Here, so that whoever only reads tables does not wait for matplotlib.
        from mlsae.analyze.results.figures.registry import names

        return names(vars(self))

    def figure(self, name: str) -> "Figure":
        """Draw a figure, a matplotlib `Figure` to restyle or save.

        Raises:
            InputError: the analysis has no figure with that name.
        """
        from mlsae.analyze.results.figures.registry import draw

        return draw(name, vars(self))

    @property
    def page(self) -> Path:
        """The page's path; `mlsae.analyze.results.page.render.write_page` makes it again."""
        return self.path / PAGE

    def examples_of(self, latent: int) -> pa.Table:
        """One latent's examples; other latents' are not read.

        Raises:
            InputError: the analysis has no examples, or the SAE no such latent.
        """
        if self.examples is None:
            raise InputError(
                f"the analysis {self.path} was made without examples: analyze again with "
                f"--examples above 0"
            )
        if not 0 <= latent < len(self.latents):
            raise InputError(
                f"there is no latent {latent}: the SAE has {len(self.latents)}, from 0 to "
                f"{len(self.latents) - 1}"
            )
        return self.examples.to_table(filter=pd.field("latent") == latent)


def load(directory: str | Path) -> Analysis:
    """Open an analysis directory in any minor version.

    Columns that are not known here stay in their tables; those that an earlier version lacks are
    null.

    Raises:
        InputError: the directory is no analysis, of another major version, or a part of it is
            missing or damaged.
    """
    directory = Path(directory)
    summary = read_summary(directory)
    check_version(summary["tables_version"], directory, "analyze again")
    try:
        version = str(summary["tables_version"])
        tables = {name: read_table(directory / f"{name}.parquet", name, version) for name in _WHOLE}
        events = open_events(directory, summary["events"])
        examples = (
            None if summary["examples"] is None else _open_examples(directory / EXAMPLES_FILE)
        )
    except (OSError, pa.ArrowException) as error:
        for path in sorted(directory.glob("*.parquet")):
            if found := stand_in(path):
                raise InputError(f"{path} {found}, or make it again with mlsae analyze") from None
        reason = str(error).splitlines()[0]
        raise InputError(
            f"the analysis {directory} is damaged ({reason}): make it again with mlsae analyze"
        ) from None
    return Analysis(path=directory, summary=summary, examples=examples, events=events, **tables)


def _open_examples(path: Path) -> pd.Dataset:
    schema = with_later_columns("examples", pq.read_schema(path))
    return pd.dataset(path, schema=schema, format="parquet")
