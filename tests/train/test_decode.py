"""Rows decoded where they are trained on are the rows that the store decodes."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from mlsae.store import open_corpus, open_store
from mlsae.train.data.decode import RowDecoder, torch_rows
from mlsae.train.data.loader import Loader
from mlsae.train.data.mixture import Mixture

FORMS = ["float16", "bfloat16", "float32", "int8"]
CPU = torch.device("cpu")


@pytest.mark.parametrize("encoding", FORMS)
@pytest.mark.parametrize("d_model", [20, 64, 130])
def test_rows_are_decoded_as_the_store_does(
    encoding: str, d_model: int, sample_maker: Callable, encoded: Callable
) -> None:
    """To the last bit: rows of one layer, and of several in any order; blocks short or not."""
    store = open_store(encoded(sample_maker(d_model=d_model), encoding=encoding))
    layers = (3, 0)
    decode = RowDecoder(store, "resid_post", layers, CPU)
    stored, expected = [], []
    for i, layer in enumerate(layers):
        parts = store.reader("resid_post", layer).read(50, 150)
        stored.append(tuple(torch_rows(part, encoding) for part in parts))
        expected.append(torch.from_numpy(store.read("resid_post", layer, 50, 150)))
        assert torch.equal(decode(stored[i], i).float(), expected[i])
    mixed = tuple(torch.cat(part) for part in zip(*stored, strict=True))
    layer = torch.arange(2).repeat_interleave(100)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    found = decode(tuple(part[order] for part in mixed), layer[order])
    assert torch.equal(found.float(), torch.cat(expected)[order])
    assert decode(tuple(part[:0] for part in mixed), layer[:0]).shape == (0, d_model)


@pytest.mark.parametrize("encoding", ["float16", "int8"])
def test_a_row_of_a_corpus_is_decoded_as_its_own_store_does(
    encoding: str, sample_maker: Callable, encoded: Callable
) -> None:
    """Scales of the stores differ, and a batch holds rows of both."""
    samples = [sample_maker(f"acts{seed}", seed=seed) for seed in (0, 1)]
    corpus = open_corpus([encoded(sample, encoding=encoding) for sample in samples])
    mixture = Mixture.plan(
        corpus,
        "resid_post",
        corpus.layers,
        batch_rows=50,
        seed=1,
        skip_positions=1,
        validation=np.array([3, 40]),
    )
    known = [{row.tobytes() for row in corpus.read("resid_post", layer)} for layer in corpus.layers]
    decode = RowDecoder(corpus, "resid_post", corpus.layers, CPU)
    seen = 0
    with Loader(mixture, start=0, stop=mixture.epoch_steps) as loader:
        for batch in loader:
            x = decode((batch.x, *batch.more), batch.layer, batch.origin).float().numpy()
            for layer, row in zip(batch.layer.tolist(), x, strict=True):
                assert row.tobytes() in known[layer]
            seen += len(x)
    assert seen == mixture.epoch_rows
