"""Mixtures keep their shares of the tokens, draw for draw, and end where one of them does."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlsae.base.errors import InputError
from mlsae.harvest.text.mixture import parse_mixture
from mlsae.harvest.text.packing import pack
from mlsae.harvest.text.report import text_lines
from mlsae.harvest.text.sources import Source, TextSettings, open_sources


def test_weights_are_shares() -> None:
    assert parse_mixture(["a/b"]) == {"a/b": 1.0}
    assert parse_mixture(["a:5"]) == {"a": 1.0}
    assert parse_mixture(["a:0.7", "b/c:0.3"]) == pytest.approx({"a": 0.7, "b/c": 0.3})
    assert parse_mixture(["a:3", "b:1"]) == {"a": 0.75, "b": 0.25}
    assert parse_mixture(["c:/texts"]) == {"c:/texts": 1.0}


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ([], "no data set; name one with --dataset"),
        (["a", "b"], "--dataset a is one of 2 and has no weight; give each its share of the "
         "tokens, such as a:0.5"),
        (["a:0.5", "b"], "--dataset b is one of 2 and has no weight"),
        (["a:0.5", "a:0.5"], "--dataset a is there twice; name each data set once"),
        (["a:0", "b:1"], "--dataset a:0: expected a name and a positive weight, such as A:0.7"),
        (["a:-1", "b:1"], "--dataset a:-1: expected a name and a positive weight"),
        (["a:nan"], "--dataset a:nan: expected a name and a positive weight"),
        (["a:inf"], "--dataset a:inf: expected a name and a positive weight"),
        ([":1"], "--dataset :1: expected a name and a positive weight"),
    ],
)  # fmt: skip
def test_weights_that_are_none_are_refused(datasets: list[str], message: str) -> None:
    with pytest.raises(InputError) as info:
        TextSettings(dataset=tuple(datasets))
    assert str(info.value).startswith(message)


def mixture(lengths: dict[str, list[int]], shares: dict[str, float]) -> list[Source]:
    """Documents of given lengths, each of one word: w1 in the first data set, w2 in the second."""
    return [
        Source(
            name=name,
            share=shares[name],
            documents=iter([" ".join([f"w{index}"] * length) for length in lengths[name]]),
        )
        for index, name in enumerate(lengths, start=1)
    ]


def test_next_document_is_of_the_data_set_that_lags_most(
    tokenizer_maker: Callable[..., Any], tmp_path: Path
) -> None:
    """Draw for draw as by exact arithmetic, separators counted; the shares hold at every point."""
    generator = np.random.default_rng(0)
    shares = {"a": 0.625, "b": 0.25, "c": 0.125}
    lengths = {name: generator.integers(0, 60, 4000).tolist() for name in shares}
    packed = pack(
        mixture(lengths, shares), tokenizer_maker(), context_length=10, max_tokens=60_000,
        spool=tmp_path,
    )  # fmt: skip
    taken = dict.fromkeys(shares, 0)
    remaining = {name: iter(values) for name, values in lengths.items()}
    stream: list[int] = []
    while len(stream) < 60_000:
        name = min(shares, key=lambda name: Fraction(taken[name]) / Fraction(shares[name]))
        if length := next(remaining[name]):
            stream += [1 + list(shares).index(name)] * length + [-1]
            taken[name] += length + 1
            total = sum(taken.values())
            assert all(abs(taken[n] - shares[n] * total) <= 2 * 60 for n in shares)
    words = packed.tokens.astype(np.int64) - 2  # w1 is token 3, EOS 0.
    np.testing.assert_array_equal(np.where(words < 0, -1, words), stream[:60_000])
    assert (np.diff(packed.documents.astype(np.int64)) >= 0).all()
    assert sum(one.num_tokens for one in packed.taken) == 60_000
    for one in packed.taken:
        assert one.num_tokens / 60_000 == pytest.approx(shares[one.name], abs=1e-3)
        assert not one.ran_out


def test_mixture_ends_where_a_data_set_does(
    tokenizer_maker: Callable[..., Any], tmp_path: Path
) -> None:
    """Not later, so that the shares stay true, and it says so."""
    lengths = {"a": [9] * 1000, "b": [9] * 10}
    packed = pack(
        mixture(lengths, {"a": 0.8, "b": 0.2}), tokenizer_maker(), context_length=10, spool=tmp_path
    )
    assert [(one.num_documents, one.ran_out) for one in packed.taken] == [(41, False), (10, True)]
    assert list(text_lines(packed)) == [
        "packed 510 tokens: 51 sequences of 10 from 51 documents",
        "a: 410 tokens, 80.39% (asked: 80.00%), from 41 documents",
        "b: 100 tokens, 19.61% (asked: 20.00%), from 10 documents; it ran out, and the text ended "
        "there",
    ]


def test_empty_data_set_of_a_mixture_is_named(
    tokenizer_maker: Callable[..., Any], tmp_path: Path
) -> None:
    lengths: dict[str, list[int]] = {"a": [0, 0], "b": [9]}
    with pytest.raises(InputError, match="the data set a is empty: it holds no text"):
        pack(
            mixture(lengths, {"a": 0.5, "b": 0.5}), tokenizer_maker(), context_length=10,
            spool=tmp_path,
        )  # fmt: skip


def test_files_and_directories_are_mixed(
    tokenizer_maker: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "w1 w1 w1"}\n' * 30)
    (tmp_path / "b").mkdir()
    for part in range(10):
        (tmp_path / "b" / f"{part}.txt").write_text("w2 w2 w2")
    config = TextSettings(dataset=(f"{tmp_path}/a.jsonl:3", f"{tmp_path}/b:1"))
    packed = pack(
        open_sources(config), tokenizer_maker(), context_length=4, max_tokens=100,
        packing="document", spool=tmp_path,
    )  # fmt: skip
    assert [one.num_tokens for one in packed.taken] == [76, 24]


def test_what_was_left_out_is_said(tokenizer_maker: Callable[..., Any], tmp_path: Path) -> None:
    texts = ["w1 w2", "", "w1 " * 12, "w1 " * 9]
    for packing, lines in (
        (
            "document",
            [
                "packed 24 tokens: 3 sequences of 8 from 3 documents",
                "padding: 5 tokens, 20.8% of all",
                "cut off: 7 tokens of 2 documents longer than a sequence",
                "passed over: 1 empty document",
            ],
        ),
        (
            "concatenate",
            [
                "packed 24 tokens: 3 sequences of 8 from 3 documents",
                "left out: the final incomplete sequence, 2 tokens",
                "passed over: 1 empty document",
            ],
        ),
    ):
        source = Source(name="a", share=1.0, documents=iter(texts))
        packed = pack(
            [source], tokenizer_maker(), context_length=8, packing=packing, spool=tmp_path
        )
        assert list(text_lines(packed)) == lines
