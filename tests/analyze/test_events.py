"""The table of activations: streamed, whole, and equal to what was appended."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mlsae.analyze import events
from mlsae.analyze.columns import schema
from mlsae.analyze.events import EventsWriter

SCHEMA = schema("activations", {"store_id": "ab"})


def _batch(num_rows: int, first: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    values = np.maximum(generator.normal(size=(num_rows, 3)), 0).astype(np.float32)
    indices = np.stack([generator.permutation(50)[:3] for _ in range(num_rows)])
    return np.arange(first, first + num_rows), values, indices


@pytest.mark.parametrize("row_group", [1, 13, 10**6])
def test_events_are_the_active_latents_in_the_order_of_rows_and_latents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row_group: int
) -> None:
    monkeypatch.setattr(events, "ROW_GROUP", row_group)
    expected = []
    with EventsWriter(tmp_path / "layer-7.parquet", SCHEMA, 7) as writer:
        for number in range(4):
            rows, values, indices = _batch(9, 20 * number, seed=number)
            writer.append(rows, 3 * rows, values, indices)
            for n, row in enumerate(rows):
                for latent in np.sort(indices[n]):
                    value = values[n, indices[n] == latent][0]
                    if value > 0:
                        expected.append((row, 3 * row, 7, latent, value))
    found = pq.read_table(tmp_path / "layer-7.parquet")
    assert writer.num_events == len(expected) == len(found)
    assert list(zip(*(found[name].to_pylist() for name in found.column_names), strict=True)) == (
        expected
    )
    groups = pq.ParquetFile(tmp_path / "layer-7.parquet").metadata
    sizes = [groups.row_group(n).num_rows for n in range(groups.num_row_groups)]
    assert all(size == row_group for size in sizes[:-1])
    assert 0 < sizes[-1] <= row_group


def test_a_layer_without_an_event_is_an_empty_table_of_the_same_schema(tmp_path: Path) -> None:
    with EventsWriter(tmp_path / "a.parquet", SCHEMA, 0) as writer:
        rows, values, indices = _batch(5, 0, seed=0)
        writer.append(rows, rows, np.zeros_like(values), indices)
        writer.append(rows[:0], rows[:0], values[:0], indices[:0])
    found = pq.read_table(tmp_path / "a.parquet")
    assert len(found) == writer.num_events == 0
    assert found.schema.equals(SCHEMA, check_metadata=True)
