"""The published form of our tables, beside a transcription of the code that made that."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mlsae.analyze import AnalyzeConfig, run
from mlsae.analyze.interop.companions import dists, examples
from mlsae.sae import load as load_sae

LAYERS, LENGTH = (0, 1, 3), 24


class Dists:
    """`Metric` and `Dists` of mlsae/analysis/dists.py, in float32 as there."""

    def __init__(self, num_layers: int, num_latents: int) -> None:
        self.counts = torch.zeros((num_layers, num_latents))
        self.totals = torch.zeros((num_layers, num_latents))
        self.layers = torch.arange(num_layers).unsqueeze(1)

    def update(self, layer: int, indices: torch.Tensor, values: torch.Tensor) -> None:
        ones = torch.ones_like(indices, dtype=torch.float)
        self.counts[layer].put_(indices, ones, accumulate=True)
        self.totals[layer].put_(indices, values, accumulate=True)

    def rows(self) -> list[dict[str, Any]]:
        count, total = self.counts.sum(0), self.totals.sum(0)
        means = self.totals / (self.counts + 1e-8)
        probs = self.totals / self.totals.sum(0)
        layer_mean = (probs * self.layers).sum(0)
        layer_var = (probs * self.layers**2).sum(0) - layer_mean**2
        return [
            {
                "latent": latent,
                "count": count[latent].item(),
                "total": total[latent].item(),
                "mean": (total / (count + 1e-8))[latent].item(),
                "layer_mean": layer_mean[latent].item(),
                "layer_var": layer_var[latent].item(),
                "layer_std": layer_var.sqrt()[latent].item(),
                "counts": self.counts[:, latent].tolist(),
                "totals": self.totals[:, latent].tolist(),
                "means": means[:, latent].tolist(),
                "probs": probs[:, latent].tolist(),
            }
            for latent in range(len(count))
        ]


def test_dists_are_those_of_the_published_code(
    world: Any, sae_maker: Callable[..., Path], dense: Callable[..., Any], tmp_path: Path
) -> None:
    """Dead latents and a layer left out among them; with what is not above 0 taken off."""
    sae = sae_maker(world.store, num_latents=96, k=2)
    analysis = run(
        AnalyzeConfig(
            cache=world.store,
            sae=sae,
            out=tmp_path / "out",
            rows="all",
            figures=False,
            device="cpu",
        )
    )
    eligible = (world.flags == 0) & (np.arange(len(world.flags)) % LENGTH >= 1)
    published = Dists(len(LAYERS), 96)
    for place, layer in enumerate(LAYERS):
        x = world.activations[layer][eligible].astype(np.float64)
        z = torch.from_numpy(dense(load_sae(sae)).latents(x)).float()
        _, indices = torch.where(z > 0)
        published.update(place, indices, z[z > 0])
    found, expected = dists(analysis.latent_layers), published.rows()
    pq.write_table(found, tmp_path / "dists.parquet")
    assert pq.read_table(tmp_path / "dists.parquet").column_names == list(expected[0])
    assert any(row["count"] == 0 for row in expected)
    assert sum(0 < row["layer_mean"] < 2 for row in expected) > 10
    for name in expected[0]:
        values = np.array([row[name] for row in expected])
        ours = np.array(found[name].to_pylist())
        # The published variance is a difference of squares in float32: a small one may be below 0.
        atol = {"layer_var": 1e-5, "layer_std": 4e-3}.get(name, 1e-6)
        if name == "layer_std":
            values = np.where(np.array([row["layer_var"] for row in expected]) < 0, 0, values)
        np.testing.assert_allclose(ours, values, rtol=1e-4, atol=atol, err_msg=name)


def test_dists_have_the_types_that_a_generator_of_floats_gives() -> None:
    """As the published were made: `Dataset.from_generator` of rows of Python numbers."""
    table = dists(
        pa.table(
            {
                "latent": pa.array([0, 0, 1, 1], pa.int32()),
                "layer": pa.array([0, 2, 0, 2], pa.int32()),
                "count": pa.array([1, 3, 0, 0]),
                "total": [1.0, 6.0, 0.0, 0.0],
            }
        )
    )
    first, dead = table.to_pylist()
    assert pa.Table.from_pylist([first]).schema == table.schema
    assert first == {
        "latent": 0,
        "count": 4.0,
        "total": 7.0,
        "mean": 1.75,
        "layer_mean": pytest.approx(6 / 7),
        "layer_var": pytest.approx(6 / 49),
        "layer_std": pytest.approx((6 / 49) ** 0.5),
        "counts": [1.0, 3.0],
        "totals": [1.0, 6.0],
        "means": [1.0, 2.0],
        "probs": [pytest.approx(1 / 7), pytest.approx(6 / 7)],
    }
    assert (dead["count"], dead["mean"], dead["means"]) == (0.0, 0.0, [0.0, 0.0])
    assert np.isnan([dead["layer_mean"], dead["layer_std"], *dead["probs"]]).all()


class Example(NamedTuple):
    """The class of this name in the published mlsae/analysis/examples.py."""

    latent: int
    layer: int
    token_id: int
    token: str
    act: float
    token_ids: list[int]
    tokens: list[str]
    acts: list[float]

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "Example":
        return Example(
            data["latent"],
            data["layer"],
            data["token_id"],
            data["token"],
            data["act"],
            json.loads(data["token_ids"]),
            json.loads(data["tokens"]),
            json.loads(data["acts"]),
        )


def get_examples(
    tokens: npt.NDArray[np.int64], acts: dict[int, npt.NDArray[np.float32]], n_tokens: int
) -> list[Example]:
    """`get_examples` of the same, of dense activations (tokens, latents) by layer."""
    found = []
    for layer, values in acts.items():
        for pos, latent in np.argwhere(values > 1e-3).tolist():
            window = slice(pos - n_tokens, pos + n_tokens)
            token_ids = tokens[window].tolist()
            found.append(
                Example(
                    latent,
                    layer,
                    int(tokens[pos]),
                    f"<{tokens[pos]}>",
                    float(values[pos, latent]),
                    token_ids,
                    [f"<{token}>" for token in token_ids],
                    values[window, latent].tolist(),
                )
            )
    return found


def test_examples_are_read_as_the_published_code_reads_them() -> None:
    """`Example.from_dict` of each row; the three largest of each latent and layer."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 50, 60)
    acts = {}
    for layer in (1, 4):
        values = generator.random((60, 5), dtype=np.float32)
        values[(values < 0.7) | (np.arange(60)[:, None] < 4) | (np.arange(60)[:, None] > 56)] = 0
        acts[layer] = values
    table, expected = _examples_table(get_examples(tokens, acts, 4))
    converted = examples(table)
    assert [Example.from_dict(row) for row in converted.to_pylist()] == expected
    assert len(expected) == 5 * 2 * 3
    assert converted.column_names == list(Example._fields)
    assert [str(kind) for kind in converted.schema.types] == (
        ["int64"] * 3 + ["string", "double"] + ["string"] * 3
    )


def test_examples_without_a_tokenizer_have_no_text() -> None:
    table, expected = _examples_table([Example(2, 0, 7, "", 1.5, [6, 7], [], [0.5, 1.5])], peak=1)
    table = table.set_column(
        table.column_names.index("pieces"), "pieces", pa.nulls(2, pa.list_(pa.string()))
    )
    (row,) = examples(table).to_pylist()
    assert (row["token_id"], row["token"], row["tokens"]) == (7, None, None)
    assert json.loads(row["acts"]) == expected[0].acts


def _examples_table(found: list[Example], peak: int = 4) -> tuple[pa.Table, list[Example]]:
    """The table `examples` in a mixed order, another kind among it, and what is to come of it."""
    ranks: dict[tuple[int, int], int] = {}
    rows, expected = [], []
    for example in sorted(found, key=lambda e: (e.latent, e.layer, -e.act)):
        key = (example.latent, example.layer)
        rank = ranks[key] = ranks.get(key, -1) + 1
        if rank == 3:
            continue
        expected += [example] if rank < 3 else []
        if rank < 3:
            rows += [_row(example, kind, rank, peak) for kind in ("sample", "top_layer")]
    np.random.default_rng(1).shuffle(rows)  # type: ignore[arg-type]
    return pa.Table.from_pylist(rows, schema=_SCHEMA), expected


_SCHEMA = pa.schema(
    [
        ("latent", pa.int32()),
        ("layer", pa.int32()),
        ("kind", pa.string()),
        ("rank", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("peak", pa.int32()),
        ("pieces", pa.list_(pa.string())),
        ("values", pa.list_(pa.float32())),
        ("value", pa.float32()),
    ]
)


def _row(example: Example, kind: str, rank: int, peak: int) -> dict[str, Any]:
    return {
        "latent": example.latent,
        "layer": example.layer,
        "kind": kind,
        "rank": rank,
        "token_ids": example.token_ids,
        "peak": peak,
        "pieces": example.tokens,
        "values": example.acts,
        "value": example.act,
    }
