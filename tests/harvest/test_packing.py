"""Packing joins documents, cuts whole sequences and loses nothing but the final incomplete one."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsae.base.errors import InputError
from mlsae.harvest.joints import Joints, tokenizer_sha256
from mlsae.harvest.packing import PackedText, pack
from mlsae.harvest.text import Source, TextConfig, open_sources
from mlsae.models import load_tokenizer
from mlsae.store import SPECIAL

HERE = Path(__file__).parent


def packed_of(
    texts: Iterable[str], tokenizer: Any, *, context_length: int, **options: Any
) -> PackedText:
    """One data set of these texts, packed on this disk."""
    source = Source(name="texts", share=1.0, documents=iter(texts))
    return pack([source], tokenizer, context_length=context_length, spool=HERE, **options)


KINDS = {
    "eos": {"eos": True},
    "eos, bos by default": {"eos": True, "bos": True, "adds_bos": True},
    "eos, bos not by default": {"eos": True, "bos": True},
    "bos only": {"eos": False, "bos": True},
    "bos only, by default": {"eos": False, "bos": True, "adds_bos": True},
    "neither": {"eos": False},
}


def expected_rows(
    texts: list[str], tokenizer: Any, context_length: int, opens: bool
) -> list[list[tuple[int, int]]]:
    """(token, document) of every whole sequence, written out token by token."""
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    stream: list[tuple[int, int]] = []
    for index, text in enumerate(texts):
        ids = [tokenizer.convert_tokens_to_ids(word) for word in text.split()]
        if not ids:
            continue
        if eos is None and bos is not None and stream:
            stream.append((bos, index))
        stream += [(token, index) for token in ids]
        if eos is not None:
            stream.append((eos, index))
    rows = []
    while stream:
        row = [(bos, stream[0][1])] if opens else []
        while stream and len(row) < context_length:
            row.append(stream.pop(0))
        rows.append(row)
    return rows


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_equals_packing_token_by_token(
    kind: str, data: st.DataObject, tokenizer_maker: Callable[..., Any]
) -> None:
    """Tokens, documents, flags and the size of what is left out, for every kind of tokenizer."""
    tokenizer = tokenizer_maker(**KINDS[kind])
    word = st.sampled_from(["w0", "w1", "w49", "unknown"])
    text = st.lists(word, max_size=9).map(" ".join)
    texts = data.draw(st.lists(text, max_size=30))
    context_length = data.draw(st.integers(2, 7))
    opens = bool(KINDS[kind].get("adds_bos"))
    rows = expected_rows(
        [" ".join(w if w != "unknown" else "<unk>" for w in t.split()) for t in texts],
        tokenizer, context_length, opens,
    )  # fmt: skip
    whole = [row for row in rows if len(row) == context_length]
    if not whole:
        with pytest.raises(InputError, match="the data set"):
            packed_of(texts, tokenizer, context_length=context_length)
        return
    packed = packed_of(texts, tokenizer, context_length=context_length)
    flat = np.array(whole).reshape(-1, 2)
    np.testing.assert_array_equal(packed.tokens, flat[:, 0])
    np.testing.assert_array_equal(packed.documents, flat[:, 1])
    special = [token in tokenizer.all_special_ids for token in flat[:, 0]]
    np.testing.assert_array_equal(packed.token_flags, np.where(special, SPECIAL, 0))
    assert (packed.tokens.dtype, packed.documents.dtype) == (np.uint32, np.uint32)
    assert packed.token_flags.dtype == np.uint8
    left_out = rows[-1] if len(rows) > len(whole) else []
    assert packed.num_left_over == len(left_out) - (opens and bool(left_out))
    assert packed.num_documents == sum(bool(t.split()) for t in texts)
    assert packed.num_empty == len(texts) - packed.num_documents


def test_documents_are_read_in_batches_without_a_seam(
    tokenizer_maker: Callable[..., Any],
) -> None:
    """More documents than are tokenised at once give the same as any number."""
    tokenizer = tokenizer_maker(eos=False, bos=True)
    texts = [f"w{i % 50}" for i in range(700)]
    packed = packed_of(texts, tokenizer, context_length=4)
    expected = [row for row in expected_rows(texts, tokenizer, 4, False) if len(row) == 4]
    np.testing.assert_array_equal(packed.tokens, np.array(expected)[..., 0].reshape(-1))


@pytest.mark.parametrize("adds_bos", [False, True])
def test_max_tokens_counts_whole_sequences_and_stops_reading(
    adds_bos: bool, tokenizer_maker: Callable[..., Any]
) -> None:
    tokenizer = tokenizer_maker(bos=True, adds_bos=adds_bos)
    num_read = 0

    def endless() -> Iterator[str]:
        nonlocal num_read
        while True:
            num_read += 1
            yield "w1 w2 w3 w4 " * 1000

    packed = packed_of(endless(), tokenizer, context_length=10, max_tokens=59)
    whole = packed_of(["w1 w2 w3 w4 " * 1000], tokenizer, context_length=10)
    np.testing.assert_array_equal(packed.tokens, whole.tokens[:50])
    np.testing.assert_array_equal(packed.documents, whole.documents[:50])
    assert packed.num_left_over == 0
    assert num_read < 50


def test_max_tokens_below_one_sequence_is_refused(tokenizer_maker: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="--max-tokens 15 is less than one sequence of 16 tokens"):
        packed_of(["w1"], tokenizer_maker(), context_length=16, max_tokens=15)


@pytest.mark.parametrize("texts", [[], ["", "  "]])
def test_empty_data_set_is_refused(texts: list[str], tokenizer_maker: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="the data set is empty: it holds no text"):
        packed_of(texts, tokenizer_maker(), context_length=16)


def test_less_than_one_sequence_is_refused(tokenizer_maker: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="holds 4 tokens, less than one sequence of 16"):
        packed_of(["w1 w2 w3"], tokenizer_maker(), context_length=16)


def test_special_token_in_the_text_is_flagged(tokenizer_maker: Callable[..., Any]) -> None:
    packed = packed_of(["w1 <|endoftext|> w2"], tokenizer_maker(), context_length=4)
    assert packed.token_flags.tolist() == [0, SPECIAL, 0, SPECIAL]


def test_text_longer_than_the_context_warns_of_nothing(
    tokenizer_maker: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    packed_of(["w1 " * 100], tokenizer_maker(), context_length=4)
    assert not caplog.records


def test_tokenizer_hash_names_the_vocabulary_and_the_special_tokens(
    tokenizer_maker: Callable[..., Any],
) -> None:
    hashes = [tokenizer_sha256(tokenizer_maker(**kind)) for kind in KINDS.values()]
    assert hashes[0] == tokenizer_sha256(tokenizer_maker())
    assert len(set(hashes)) == 4


@pytest.mark.parametrize(
    ("name", "joints"),
    [
        ("stories260k", Joints(eos=2, bos=None, opening=1)),
        ("pythia-tokenizer", Joints(eos=0, bos=None, opening=None)),
        ("tinystories-char-gpt2", Joints(eos=None, bos=None, opening=None)),
    ],
)
def test_joints_of_real_tokenizers(name: str, joints: Joints, shared: Path) -> None:
    assert Joints.of(load_tokenizer(shared / "models" / name)) == joints


def test_real_text_survives_packing(shared: Path) -> None:
    """TinyStories through a real tokenizer: BOS opens every sequence, every story is all there."""
    tokenizer = load_tokenizer(shared / "models" / "stories260k")
    source = str(shared / "text" / "tinystories_1000.jsonl")
    texts = list(open_sources(TextConfig(datasets=(source,)))[0].documents)[:200]
    packed = packed_of(texts, tokenizer, context_length=256)
    rows = packed.tokens.reshape(-1, 256)
    assert (rows[:, 0] == 1).all()
    assert (packed.token_flags.reshape(-1, 256)[:, 0] == SPECIAL).all()
    stream = rows[:, 1:].reshape(-1)
    stories = np.split(stream, np.flatnonzero(stream == 2) + 1)
    for text, story in zip(texts, stories[:-1], strict=False):
        assert story.tolist() == [*tokenizer(text, add_special_tokens=False)["input_ids"], 2]
        assert tokenizer.decode(story[:-1]).strip() == text.strip()
    assert len(stories) - 1 >= 198
    assert packed.num_left_over < 255
