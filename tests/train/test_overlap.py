"""Text on both sides of a split is found, against sets of whole texts."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mlsae.base.errors import InputError
from mlsae.base.files import read_sealed
from mlsae.store import AnyStore, create, open_corpus
from mlsae.train import TrainConfig, run
from mlsae.train.data import overlap as module
from mlsae.train.data.overlap import measure

LENGTH = 8
Array = npt.NDArray[Any]


def make(path: Path, texts: list[Array], *, flag_every: int = 0) -> Path:
    """A store of documents, one after another, cut to whole sequences; all rows are random."""
    tokens = np.concatenate(texts)
    documents = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    num = len(tokens) // LENGTH * LENGTH
    flags = np.zeros(num, np.uint8)
    if flag_every:
        flags[::flag_every] = 1
    with create(
        path,
        tokens=tokens[:num],
        documents=documents[:num],
        token_flags=flags,
        context_length=LENGTH,
        layers=(0,),
        d_model=4,
        source={"made_by": "test"},
    ) as writer:
        generator = np.random.default_rng(num)
        writer.append({("resid_post", 0): generator.normal(0, 1, (num, 4)).astype(np.float32)})
    return path


def texts(seed: int, count: int, longest: int = 30) -> list[Array]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 50, generator.integers(1, longest)) for _ in range(count)]


def by_sets(store: AnyStore, validation: Array) -> tuple[int, int, float, int]:
    """Equal sequences, those in other stores, share of documents, documents in two stores."""
    held, trained = [], []
    whole: dict[tuple[int, ...], list[tuple[int, bool]]] = defaultdict(list)
    first = 0
    for number, member in enumerate(store.stores):
        tokens, flags = member.tokens(), member.token_flags()
        is_held = np.isin(np.arange(member.num_sequences) + first, validation)
        first += member.num_sequences
        for text, side in zip(tokens.reshape(-1, LENGTH), is_held, strict=True):
            (held if side else trained).append((number, tuple(text)))
        on_side = np.repeat(is_held, LENGTH)[flags == 0]
        words, of = tokens[flags == 0], member.documents()[flags == 0]
        for document in np.unique(of):
            text = tuple(words[of == document].tolist())
            whole[text] += [(number, bool(side)) for side in on_side[of == document]]
    anywhere = {text for _, text in trained}
    tokens_held = sum(side for places in whole.values() for _, side in places)
    shared = sum(
        sum(side for _, side in places)
        for places in whole.values()
        if not all(side for _, side in places)
    )
    return (
        sum(text in anywhere for _, text in held),
        sum(any(t == text and n != number for n, t in trained) for number, text in held),
        shared / tokens_held,
        sum(len({number for number, _ in places}) > 1 for places in whole.values()),
    )


@pytest.mark.parametrize("block", [LENGTH, 5 * LENGTH, 1 << 20])
def test_shared_text_is_counted_as_by_sets_of_texts(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents over several sequences and blocks, at other places, with flags, and repeated."""
    monkeypatch.setattr(module, "_BLOCK_TOKENS", block)
    monkeypatch.setattr(module, "_POSITIONS", 16)
    one, two = texts(0, 40), texts(1, 30)
    one[5:9] = [np.arange(LENGTH) for _ in range(4)]
    paths = [
        make(tmp_path / "a", [np.arange(3), *one]),
        make(tmp_path / "b", [*two[:11], *one[3:20], *two[11:]]),
        make(tmp_path / "c", texts(2, 20, longest=60), flag_every=5),
    ]
    store = open_corpus(paths)
    for seed in range(3):
        held = np.sort(np.random.default_rng(seed).permutation(store.num_sequences)[:25])
        found = measure(store, held)
        assert found.num_held_out == 25
        assert (
            found.num_equal,
            found.num_equal_elsewhere,
            found.share_of_documents,
            found.num_shared_documents,
        ) == pytest.approx(by_sets(store, held))
        assert 0 < found.num_shared_documents <= 17


def test_nothing_held_out_shares_nothing(tmp_path: Path) -> None:
    """No line, and nothing to refuse."""
    found = measure(open_corpus(make(tmp_path / "a", texts(0, 9))), np.zeros(0, np.int64))
    found.check()
    assert (list(found.lines()), found.share_of_documents) == ([], None)


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., TrainConfig]:
    """Settings of a short run."""

    def settings(*paths: Path, **changes: Any) -> TrainConfig:
        given: dict[str, Any] = {"num_latents": 8, "k": 2, "lr": 1e-3, "device": "cpu"}
        return TrainConfig(cache=paths, out=tmp_path / "run", **given | changes)

    return settings


def test_stores_that_repeat_each_other_are_refused(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """Before anything is written; without held-out sequences there is nothing to leak."""
    long = texts(0, 60)
    whole = make(tmp_path / "long", long)
    part = make(tmp_path / "short", long[:30])
    message = r"^tokens of \d+ of \d+ sequences held out are those of a sequence that is trained on"
    with pytest.raises(InputError, match=message):
        run(config(whole, part, validation_fraction=0.3))
    assert not (tmp_path / "run").exists()
    assert run(config(whole, part, validation_fraction=0.0)).metrics is None


def test_shared_documents_and_repeated_sequences_are_told_and_recorded(
    config: Callable[..., TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one store, where they are no reason to refuse."""
    again = [np.arange(LENGTH)] * 20
    path = make(tmp_path / "a", [*again, *texts(0, 40)])
    run(config(path, validation_fraction=0.3))
    told = capsys.readouterr()
    record = read_sealed(tmp_path / "run" / "training.json")["validation"]
    share, equal = record["share_of_documents"], record["num_equal_sequences"]
    assert (
        f"{share:.0%} of the tokens held out are in documents that are trained on in part"
        in told.out
    )
    warning = f"warning: tokens of {equal} of {record['num_held_out']} sequences held out are"
    assert warning in told.err
    assert equal > 0 < share
    assert record["num_shared_documents"] == 0
