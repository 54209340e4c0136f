"""Every table of an analysis: columns and version. docs/reference/tables.md is made from them."""

from collections.abc import Mapping

import pyarrow as pa

from mlsae.analyze.results.columns import (
    ACTIVATIONS,
    EXAMPLES,
    HISTOGRAMS,
    LATENT_LAYERS,
    LATENTS,
    LAYER_COSINE,
    PROMPTS,
    Column,
)
from mlsae.analyze.results.metric_columns import LAYERS, OVERALL

TABLES_VERSION = "0.4"
"""Version of these columns, in every file's schema metadata; a minor one only adds."""

TABLES: Mapping[str, tuple[Column, ...]] = {
    "layers": LAYERS,
    "overall": OVERALL,
    "latents": LATENTS,
    "latent_layers": LATENT_LAYERS,
    "histograms": HISTOGRAMS,
    "layer_cosine": LAYER_COSINE,
    "examples": EXAMPLES,
    "activations": ACTIVATIONS,
    "prompts": PROMPTS,
}
"""Every table of an analysis."""


def schema(table: str, provenance: Mapping[str, str]) -> pa.Schema:
    """Arrow schema of a table: units and definitions by field, `provenance` for the whole."""
    fields = [
        pa.field(c.name, c.type, metadata={"unit": c.unit, "description": c.text})
        for c in TABLES[table]
    ]
    whole = {"mlsae.table": table, "mlsae.tables_version": TABLES_VERSION}
    whole |= {f"mlsae.{key}": value for key, value in provenance.items()}
    return pa.schema(fields, metadata=whole)
