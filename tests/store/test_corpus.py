"""Several stores as one: every reading method against the arrays that the stores were made of."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlsae.base.errors import InputError
from mlsae.store import Calibrator, Corpus, IncompleteStoreError, Store, create, open_corpus
from mlsae.store.format.moments import GROUPS
from mlsae.store.read.corpus import sequence_origin
from mlsae.store.read.split import validation_of, validation_sequences

LENGTH, WIDTH, LAYERS, SITES = 8, 70, (1, 4), ("mlp_out", "resid_post")
MODEL = {"fingerprint": "a" * 64, "init": "trained", "init_seed": None}
PACKING = {"packing": "concatenate", "context_bos": None, "isolate_documents": False}


def make(
    path: Path,
    seed: int,
    *,
    num_sequences: int = 11,
    encoding: str = "float16",
    source: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """A store of its own text and scale, with flags, in several shards."""
    settings: dict[str, Any] = {
        "context_length": LENGTH,
        "layers": LAYERS,
        "sites": SITES,
        "d_model": WIDTH,
        "batch_sequences": 2,
        "shard_bytes": 6000,
    } | options
    generator = np.random.default_rng(seed)
    num_tokens = num_sequences * settings["context_length"]
    keys = [(site, layer) for site in settings["sites"] for layer in settings["layers"]]
    width = settings["d_model"]
    rows = {
        key: (generator.normal(size=(num_tokens, width)) * (1 + seed) + seed).astype(np.float32)
        for key in keys
    }
    if encoding == "int8":
        calibrator = Calibrator(keys, width)
        calibrator.add(rows)
        settings["calibration"] = calibrator.result()
    with create(
        path,
        tokens=generator.integers(0, 1000, num_tokens),
        documents=np.arange(num_tokens) // 5,
        token_flags=(generator.random(num_tokens) < 0.1).astype(np.uint8),
        encoding=encoding,
        source={"model": MODEL, "packing": PACKING} if source is None else source,
        **settings,
    ) as writer:
        tokens = writer.row_tokens(0, writer.num_rows)
        writer.append({key: x[tokens] for key, x in rows.items()})
    return path


@pytest.fixture(scope="module", params=["float16", "bfloat16", "int8"])
def corpus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Three stores of 11, 3 and 8 sequences."""
    root = tmp_path_factory.mktemp("corpus")
    found = open_corpus(
        [
            make(root / str(seed), seed, num_sequences=n, encoding=request.param)
            for seed, n in enumerate((11, 3, 8))
        ]
    )
    assert isinstance(found, Corpus)
    return found


def joined(corpus: Corpus, read: Callable[[Store], Any]) -> Any:
    return np.concatenate([read(store) for store in corpus.stores])


def test_a_corpus_is_its_stores_one_after_another(corpus: Corpus) -> None:
    """Tokens, flags, rows and values, of all and of every span across every border."""
    assert (corpus.num_sequences, corpus.num_rows, corpus.num_tokens) == (22, 176, 176)
    assert corpus.store_id not in {store.store_id for store in corpus.stores}
    readings: list[tuple[Callable[..., Any], Any]] = [
        (corpus.tokens, joined(corpus, Store.tokens)),
        (corpus.documents, joined(corpus, Store.documents)),
        (corpus.token_flags, joined(corpus, Store.token_flags)),
        (corpus.row_flags, joined(corpus, Store.row_flags)),
        (corpus.row_groups, joined(corpus, Store.row_groups)),
        (corpus.positions, joined(corpus, Store.positions)),
        (corpus.row_tokens, np.arange(176)),
        (lambda a, b: corpus.eligible(2, a, b), joined(corpus, lambda s: s.eligible(2))),
        *(
            (
                lambda a, b, key=(site, layer): corpus.read(*key, a, b),
                joined(corpus, lambda s, key=(site, layer): s.read(*key)),
            )
            for site in SITES
            for layer in LAYERS
        ),
    ]
    starts = np.cumsum([0, *(store.num_rows for store in corpus.stores)]).tolist()
    spans = [(0, None), (0, 0), (176, 176), (0, 176), (5, 170)]
    spans += [(s - 1, s + 1) for s in starts[1:-1]] + [(s, s) for s in starts]
    spans += list(pairwise(starts))
    for read, expected in readings:
        for start, stop in spans:
            found = read(start, stop)
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected[start:stop])
    for read, _ in readings:
        for span in ((-1, 2), (3, 2), (170, 177)):
            with pytest.raises(InputError, match=rf"{span[0]} to {span[1]} are not in 0 to 176"):
                read(*span)


def test_their_representations_are_one_line(corpus: Corpus) -> None:
    """Place, size and contents, of a store and of several."""
    for one, kind in ((corpus, "Corpus"), (corpus.stores[0], "Store")):
        assert repr(one) == (
            f"{kind}({one.place!r}: {one.num_rows:,} rows of 70 channels, {one.encoding}, "
            f"mlp_out, resid_post, layers 1, 4)"
        )


def test_rows_are_read_into_the_callers_buffers_across_stores(corpus: Corpus) -> None:
    """As stored, in every part."""
    reader = corpus.reader("mlp_out", 4)
    whole = reader.read()
    assert len(whole) == len(corpus.parts) == len(reader.parts)
    for start, stop in ((0, 176), (3, 9), (20, 120), (87, 89), (88, 88)):
        out = [np.zeros((stop - start, part.width), part.dtype) for part in corpus.parts]
        reader.read_into(out, start)
        for found, expected in zip(out, whole, strict=True):
            np.testing.assert_array_equal(found, expected[start:stop])


def test_every_row_has_the_calibration_of_its_store(corpus: Corpus) -> None:
    origin = corpus.row_origin(np.arange(176))
    sizes = [store.num_rows for store in corpus.stores]
    assert origin.tolist() == np.repeat([0, 1, 2], sizes).tolist()
    assert [c is s.calibration for c, s in zip(corpus.calibrations, corpus.stores, strict=True)]
    if corpus.encoding == "int8":
        assert len({c.sha256() for c in corpus.calibrations if c is not None}) == 3
    for store in corpus.stores:
        assert store.calibrations == (store.calibration,)
        assert store.row_origin(np.arange(3)).tolist() == [0, 0, 0]
        assert store.stores == (store,)


def test_sequences_know_their_store(corpus: Corpus) -> None:
    origin, own = sequence_origin(corpus, np.arange(22))
    expected = [(i, n) for i, s in enumerate(corpus.stores) for n in range(s.num_sequences)]
    assert list(zip(origin.tolist(), own.tolist(), strict=True)) == expected
    origin, own = sequence_origin(corpus.stores[1], np.array([0, 2]))
    assert (origin.tolist(), own.tolist()) == ([0, 0], [0, 2])


def test_moments_are_those_of_all_rows(corpus: Corpus) -> None:
    """Against float64 over the decoded values of all stores at once, by group and by filter."""
    rows, groups = corpus.eligible(1), corpus.row_groups()
    for site in SITES:
        x = np.stack([corpus.read(site, layer) for layer in LAYERS]).astype(np.float64)
        found = corpus.group_moments()[site]
        assert found.count_G.tolist() == np.bincount(groups, minlength=len(GROUPS)).tolist()
        for group in np.unique(groups).tolist():
            of_group = x[:, groups == group]
            np.testing.assert_allclose(
                found.mean_2LGD[0, :, group], of_group.mean(1), rtol=1e-5, atol=1e-5
            )
        moments, chosen = corpus.moments(site, 1), x[:, rows]
        centred = chosen - chosen.mean(1, keepdims=True)
        assert moments.count == rows.sum()
        np.testing.assert_allclose(moments.mean, chosen.mean(1), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(moments.m2, np.square(centred).sum(1), rtol=1e-5)
        np.testing.assert_allclose(moments.max_abs, np.abs(chosen).max((1, 2)), rtol=1e-6)
        np.testing.assert_allclose(
            moments.adjacent_cross, [(centred[0] * centred[1]).sum()], rtol=1e-3
        )
    for store in corpus.stores:
        assert store.group_moments()["mlp_out"].count_G.sum() == store.num_rows


def test_the_split_is_the_union_of_the_stores_own(corpus: Corpus) -> None:
    expected, first = [], 0
    for store in corpus.stores:
        own = validation_sequences(store.plan.tokens_sha256, store.num_sequences, 0.3, 7)
        np.testing.assert_array_equal(validation_of(store, 0.3, 7), own)
        expected += (own + first).tolist()
        first += store.num_sequences
    assert validation_of(corpus, 0.3, 7).tolist() == expected == sorted(expected)
    assert validation_of(corpus, 0.0, 7).tolist() == []
    with pytest.raises(InputError, match=r"[012]: validation fraction 0.9 holds out 3 of 3 seq"):
        validation_of(corpus, 0.9, 7)


def test_the_order_in_which_stores_are_given_does_not_matter(tmp_path: Path) -> None:
    paths = [make(tmp_path / str(seed), seed) for seed in range(3)]
    one, other = open_corpus(paths), open_corpus(reversed(paths))
    assert one.store_id == other.store_id
    assert one.plan_id == other.plan_id
    np.testing.assert_array_equal(one.tokens(), other.tokens())
    assert open_corpus(paths[:2]).store_id != one.store_id


def test_one_location_is_that_store(tmp_path: Path) -> None:
    path = make(tmp_path / "acts", 0)
    for given in (path, str(path), f"file://{path}", [path], (str(path),)):
        assert isinstance(open_corpus(given), Store)
    with pytest.raises(InputError, match="give at least one store"):
        open_corpus([])


def test_stores_may_differ_in_how_they_are_cut_and_kept(tmp_path: Path) -> None:
    """Shards, compression, order of sites, seeds of kept positions, and when they were made."""
    paths = [
        make(tmp_path / "a", 0, keep_positions=3, keep_seed=1),
        make(
            tmp_path / "b",
            1,
            keep_positions=3,
            keep_seed=2,
            sites=SITES[::-1],
            shard_bytes=10**6,
            batch_sequences=1,
            compression="zstd",
        ),
    ]
    corpus = open_corpus(paths)
    assert corpus.is_compressed
    assert corpus.rows_per_sequence == 3
    by_path = {Path(store.place): store for store in corpus.stores}
    tokens = [s.row_tokens() + 88 * i for i, s in enumerate(corpus.stores)]
    np.testing.assert_array_equal(corpus.row_tokens(), np.concatenate(tokens))
    np.testing.assert_array_equal(corpus.positions(), np.concatenate(tokens) % LENGTH)
    for site in SITES:
        values = [by_path[Path(s.place)].read(site, 4) for s in corpus.stores]
        np.testing.assert_array_equal(corpus.read(site, 4), np.concatenate(values))
        assert corpus.moments(site).count == corpus.eligible().sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoding": "float32"}, r"encoding (float16 and float32|float32 and float16)\. Give"),
        ({"layers": (1, 5)}, r"layers \[1, (4\] and \[1, 5|5\] and \[1, 4)\]\. "),
        ({"sites": ("mlp_out",)}, r"sites .*\[mlp_out\].*\. Give stores of one model and the same"),
        ({"d_model": 64}, "d_model (64 and 70|70 and 64)"),
        ({"context_length": 4}, "context_length .*; rows of a sequence (4 and 8|8 and 4)"),
        ({"keep_positions": 2}, r": rows of a sequence (2 and 8|8 and 2)\."),
        (
            {"source": {"model": MODEL | {"fingerprint": "b" * 64}, "packing": PACKING}},
            "model fingerprint (a{12} and b{12}|b{12} and a{12})",
        ),
        (
            {"source": {"model": MODEL | {"init": "random", "init_seed": 3}, "packing": PACKING}},
            r"model init .*random.*; model init_seed (3 and \(none\)|\(none\) and 3)\.",
        ),
        (
            {"source": {"model": MODEL, "packing": PACKING | {"context_bos": 1}}},
            r"packing context_bos (1 and \(none\)|\(none\) and 1)",
        ),
        (
            {"source": {"model": MODEL, "packing": PACKING, "tokenizer_sha256": "c" * 64}},
            r"tokenizer_sha256 (c{12} and \(none\)|\(none\) and c{12})",
        ),
        ({"source": {}}, r"model fingerprint (a{12} and \(none\)|\(none\) and a{12})"),
    ],
)
def test_stores_that_do_not_belong_together_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """In one line that names both, and each difference with both values."""
    paths = [make(tmp_path / "a", 0), make(tmp_path / "b", 1, **change)]
    with pytest.raises(InputError, match=message) as caught:
        open_corpus(paths)
    assert "\n" not in str(caught.value)
    assert all(str(path) in str(caught.value) for path in paths)


def test_the_same_text_twice_is_refused(tmp_path: Path) -> None:
    """One store given twice, or another of the same text."""
    path = make(tmp_path / "a", 0)
    with pytest.raises(InputError, match=r"a and .*a hold the same text: give one of them"):
        open_corpus([path, path])
    again = make(tmp_path / "b", 0, shard_bytes=10**6)
    with pytest.raises(InputError, match="hold the same text: give one of them"):
        open_corpus([path, make(tmp_path / "c", 1), again])


def test_copies_that_share_text_are_refused(tmp_path: Path) -> None:
    """With what they were copied from, at any remove, or with one another."""
    whole = make(tmp_path / "whole", 0, num_sequences=11)
    whole_id = open_corpus(whole).store_id

    def copied(name: str, seed: int, derived_from: dict[str, Any], num_sequences: int = 4) -> Path:
        return make(tmp_path / name, seed, num_sequences=num_sequences, derived_from=derived_from)

    head = copied("head", 1, {"store_id": whole_id, "sequences": [0, 4]})
    tail = copied("tail", 2, {"store_id": whole_id, "sequences": [4, 8]})
    chain = {"store_id": "e" * 64, "sequences": [1, 5]}
    chain["derived_from"] = {"store_id": whole_id, "sequences": [2, 9]}
    middle = copied("middle", 3, chain)  # Sequences 3 to 6 of the whole.
    unknown = copied("unknown", 4, {"store_id": whole_id})
    before = copied("before", 5, {"store_id": whole_id, "sequences": [0, 3]}, 3)
    after = copied("after", 6, {"store_id": whole_id, "sequences": [7, 11]})
    for apart in ([head, tail], [before, middle, after]):
        assert open_corpus(apart).num_sequences == 4 * len(apart) - (before in apart)
    for paths in [(whole, head), (whole, middle), (tail, middle), (head, middle), (unknown, tail)]:
        with pytest.raises(InputError, match=rf"share text, that of store {whole_id[:12]}, which"):
            open_corpus(paths)


def test_every_store_must_be_complete(tmp_path: Path) -> None:
    paths = [make(tmp_path / str(seed), seed) for seed in range(2)]
    (paths[1] / "complete.json").unlink()
    with pytest.raises(IncompleteStoreError, match="1 is incomplete"):
        open_corpus(paths)
