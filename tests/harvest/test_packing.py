"""Packing joins documents, cuts whole sequences and loses nothing but the final incomplete one."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mlsae.base.errors import InputError, ResourceError
from mlsae.harvest.text.joints import BOS, Joints
from mlsae.harvest.text.packing import PackedText, pack
from mlsae.harvest.text.report import text_lines
from mlsae.harvest.text.sources import Source, TextSettings, open_sources
from mlsae.models import load_tokenizer
from mlsae.models.source.tokenizer import tokenizer_sha256
from mlsae.store import MASKED, PADDING, SPECIAL

KINDS = {
    "eos": {"eos": True},
    "eos, bos by default": {"eos": True, "bos": True, "adds_bos": True},
    "eos, bos not by default": {"eos": True, "bos": True},
    "bos only": {"eos": False, "bos": True},
    "bos only, by default": {"eos": False, "bos": True, "adds_bos": True},
    "neither": {"eos": False},
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Settings of packing, and the tokenizer's own default."""

    context_length: int
    packing: str = "concatenate"
    bos: str = "auto"
    isolate_documents: bool = False
    adds_bos: bool = False


def expected_rows(
    texts: list[str], tokenizer: Any, case: Case
) -> list[list[tuple[int, int, int, bool]]]:
    """(token, document, flag, put there to open) of every sequence, written out token by token; the
    last one may be too short, or a document's too long."""
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    opens = case.bos == "always" or (case.bos == "auto" and case.adds_bos)
    alone = case.packing == "document"
    separator = eos is None and bos is not None and case.bos != "never"
    if alone or (opens and case.isolate_documents):
        separator = False
    rows: list[list[tuple[int, int, int, bool]]] = [[]]
    is_first = True

    def put(token: int, document: int) -> None:
        if len(rows[-1]) == case.context_length and not alone:
            rows.append([])
        if not rows[-1] and opens and token != bos:
            rows[-1].append((bos, document, SPECIAL, True))
        flag = SPECIAL if token in tokenizer.all_special_ids else 0
        rows[-1].append((token, document, flag, False))

    for index, text in enumerate(texts):
        ids = [tokenizer.convert_tokens_to_ids(word) for word in text.split()]
        if not ids:
            continue
        sink = None
        if alone and not is_first:
            rows.append([])
        elif case.isolate_documents and 0 < len(rows[-1]) < case.context_length:
            if opens:
                put(bos, index)
            else:
                sink = (len(rows) - 1, len(rows[-1]))
        for token in [*([bos] if separator and not is_first else []), *ids]:
            put(token, index)
        if eos is not None:
            put(eos, index)
        if alone:
            padding = 0 if eos is None else eos
            rows[-1] += [(padding, index, PADDING, False)] * (case.context_length - len(rows[-1]))
        if sink is not None:
            token, document, flag, _ = rows[sink[0]][sink[1]]
            rows[sink[0]][sink[1]] = (token, document, flag | MASKED, False)
        is_first = False
    return rows


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_equals_packing_token_by_token(
    kind: str,
    data: st.DataObject,
    tokenizer_maker: Callable[..., Any],
    packed_of: Callable[..., PackedText],
) -> None:
    """Tokens, documents, flags and what is left out, for every kind of tokenizer and packing."""
    tokenizer = tokenizer_maker(**KINDS[kind])
    word = st.sampled_from(["w0", "w1", "w49", "<unk>"])
    text = st.lists(word, max_size=9).map(" ".join)
    texts = data.draw(st.lists(text, max_size=30))
    case = Case(
        context_length=data.draw(st.integers(2, 7)),
        packing=data.draw(st.sampled_from(["auto", "concatenate", "document"])),
        bos=data.draw(st.sampled_from(BOS if KINDS[kind].get("bos") else ["auto", "never"])),
        isolate_documents=data.draw(st.booleans()),
        adds_bos=bool(KINDS[kind].get("adds_bos")),
    )
    settings_of_case = {
        name: value for name, value in vars(case).items() if name not in {"adds_bos"}
    }
    rows = expected_rows(texts, tokenizer, case)
    length = case.context_length
    whole = [row[:length] for row in rows if len(row) >= length]
    if not whole:
        with pytest.raises(InputError, match="the data set"):
            packed_of(texts, tokenizer, **settings_of_case)
        return
    packed = packed_of(texts, tokenizer, **settings_of_case)
    flat = np.array(whole).reshape(-1, 4)
    np.testing.assert_array_equal(packed.tokens, flat[:, 0])
    np.testing.assert_array_equal(packed.documents, flat[:, 1])
    np.testing.assert_array_equal(packed.token_flags, flat[:, 2])
    assert (packed.tokens.dtype, packed.documents.dtype) == (np.uint32, np.uint32)
    assert packed.token_flags.dtype == np.uint8
    left_out = rows[-1] if len(rows[-1]) < length else []
    assert packed.num_left_over == sum(not opens for *_, opens in left_out[:1]) + len(left_out[1:])
    assert packed.num_documents == sum(bool(t.split()) for t in texts)
    assert packed.num_empty == len(texts) - packed.num_documents
    assert packed.num_padding == (flat[:, 2] == PADDING).sum()
    assert packed.num_cut == sum(len(row) - length for row in rows if len(row) > length)
    assert packed.num_cut_documents == sum(len(row) > length for row in rows)


@pytest.mark.parametrize("isolate", [False, True])
def test_settings_that_decide_tokens_are_described(
    isolate: bool, tokenizer_maker: Callable[..., Any], packed_of: Callable[..., PackedText]
) -> None:
    """Two packings with different tokens differ in what the store's plan says of them."""
    tokenizer = tokenizer_maker(bos=True)
    seen: dict[bytes, str] = {}
    for packing in ("auto", "concatenate", "document"):
        for bos in BOS:
            options = {"packing": packing, "bos": bos, "isolate_documents": isolate}
            packed = packed_of(["w1 w2", "w3"] * 9, tokenizer, context_length=5, **options)
            described = str(packed.joints.describe())
            assert seen.setdefault(packed.tokens.tobytes(), described) == described
    assert len(seen) == 4


def test_bos_that_the_tokenizer_lacks_is_refused(
    tokenizer_maker: Callable[..., Any], packed_of: Callable[..., PackedText]
) -> None:
    with pytest.raises(
        InputError, match=r"--bos always needs a BOS token, and the tokenizer .* has none"
    ):
        packed_of(["w1"], tokenizer_maker(), context_length=4, bos="always")


def test_encoders_have_their_own_opening_and_closing_tokens(
    packed_of: Callable[..., PackedText],
) -> None:
    """BERT's tokenizer has neither BOS nor EOS; what it puts around a text stands for them."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = transformers.BertTokenizer(vocab=vocabulary)
    packed = packed_of(["a b", "b"], tokenizer, context_length=5, packing="document")
    assert packed.tokens.tolist() == [2, 5, 6, 3, 0, 2, 6, 3, 0, 0]
    expected = [SPECIAL, 0, 0, SPECIAL, PADDING, SPECIAL, 0, SPECIAL, PADDING, PADDING]
    assert packed.token_flags.tolist() == expected


@pytest.mark.parametrize("options", [{}, {"bos": "never"}, {"packing": "rows"}])
def test_rows_that_are_sequences_stay_whole(
    options: dict[str, str],
    tokenizer_maker: Callable[..., Any],
    packed_of: Callable[..., PackedText],
) -> None:
    rows = np.random.default_rng(0).integers(0, 50, (100, 8)).astype(np.uint32)
    packed = packed_of(rows, tokenizer_maker(bos=True, adds_bos=True), context_length=8, **options)
    np.testing.assert_array_equal(packed.tokens.reshape(-1, 8), rows)
    np.testing.assert_array_equal(packed.documents.reshape(-1, 8)[:, 0], np.arange(100))
    assert "rows of token ids are sequences of 8 already and stay whole" in text_lines(packed)
    other = [*rows, rows[0, :5]]
    with pytest.raises(
        InputError, match=r"row 100 of data set texts holds 5 tokens, no sequence of 8"
    ):
        packed_of(other, tokenizer_maker(), context_length=8, **options)
    joined = packed_of(other, tokenizer_maker(), context_length=8, packing="concatenate")
    assert joined.tokens[:9].tolist() == [*rows[0], 0] or rows[0, -1] == 0


def test_rows_of_another_length_are_joined_and_that_is_said(
    tokenizer_maker: Callable[..., Any], packed_of: Callable[..., PackedText]
) -> None:
    rows = np.full((9, 8), 5, np.uint32)
    lines = text_lines(packed_of(rows, tokenizer_maker(), context_length=6))
    assert (
        "note: the first rows of token ids all hold 8 tokens; if they are sequences already, give "
        "--context-length 8"
    ) in lines
    with pytest.raises(InputError, match="row 0 of data set texts holds 8 tokens"):
        packed_of(rows, tokenizer_maker(), context_length=6, packing="rows")


def test_failing_tokenizer_is_named_with_its_document(
    tokenizer_maker: Callable[..., Any], packed_of: Callable[..., PackedText]
) -> None:
    """Whatever it raises; a panic in Rust is no `Exception`."""
    tokenizer = tokenizer_maker()
    PanicException = type("PanicException", (BaseException,), {})

    class Failing:
        name_or_path = "mine"

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, texts: Any, **options: Any) -> Any:
            if "w7" in texts:
                raise PanicException("index out of bounds\nnote: run")
            return tokenizer(texts, **options)

    with pytest.raises(InputError) as info:
        packed_of(["w1", "w7", "w2"], Failing(), context_length=2)
    assert str(info.value) == (
        "the tokenizer mine fails on a document that begins 'w7': index out of bounds; leave the "
        "document out, or mend the tokenizer"
    )


def test_long_documents_and_full_blocks_have_no_seam(
    tokenizer_maker: Callable[..., Any], packed_of: Callable[..., PackedText]
) -> None:
    """More tokens than are held in memory, in documents longer than a batch and far shorter."""
    tokenizer = tokenizer_maker(bos=True, adds_bos=True)
    generator = np.random.default_rng(0)
    lengths = [600_000, *generator.integers(1, 400, 2000), 3, 700_000]
    documents = [generator.integers(3, 53, length).astype(np.uint32) for length in lengths]
    packed = packed_of(documents, tokenizer, context_length=97)
    stream = np.concatenate([np.append(ids, np.uint32(0)) for ids in documents])
    index = np.repeat(np.arange(len(documents)), [len(ids) + 1 for ids in documents])
    used = len(stream) // 96 * 96
    np.testing.assert_array_equal(
        packed.tokens.reshape(-1, 97)[:, 1:], stream[:used].reshape(-1, 96)
    )
    np.testing.assert_array_equal(
        packed.documents.reshape(-1, 97)[:, 1:], index[:used].reshape(-1, 96)
    )
    assert (packed.tokens.reshape(-1, 97)[:, 0] == 1).all()


def test_padding_of_full_blocks_has_no_seam(
    tokenizer_maker: Callable[..., Any], packed_of: Callable[..., PackedText]
) -> None:
    """More padded sequences than are held in memory; every document is of one token."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 90, 7000)
    documents = [np.full(length, 2 + i % 50, np.uint32) for i, length in enumerate(lengths)]
    packed = packed_of(documents, tokenizer_maker(), context_length=60, packing="document")
    position, length = np.arange(60), lengths[:, None]
    is_text = position < length
    tokens = np.where(is_text, 2 + np.arange(7000)[:, None] % 50, 0)
    flags = np.where(is_text, 0, np.where(position == length, SPECIAL, PADDING))
    np.testing.assert_array_equal(packed.tokens.reshape(-1, 60), tokens)
    np.testing.assert_array_equal(packed.token_flags.reshape(-1, 60), flags)
    assert packed.num_cut == np.maximum(lengths + 1 - 60, 0).sum()


def test_texts_are_tokenised_in_order_whatever_their_length(
    tokenizer_maker: Callable[..., Any], packed_of: Callable[..., PackedText]
) -> None:
    """Batches grow, and a long text has one alone: none is lost, doubled or moved."""
    tokenizer = tokenizer_maker()
    generator = np.random.default_rng(0)
    lengths = [*generator.integers(1, 50, 20_000), 900_000, 2, *generator.integers(1, 50, 9000)]
    texts = [" ".join([f"w{i % 50}"] * length) for i, length in enumerate(lengths)]
    packed = packed_of(texts, tokenizer, context_length=8)
    stream = np.concatenate(
        [np.append(np.full(length, 2 + i % 50), 0) for i, length in enumerate(lengths)]
    )
    np.testing.assert_array_equal(packed.tokens, stream[: len(stream) // 8 * 8])


def test_nothing_lies_on_the_disk_under_a_name(
    tokenizer_maker: Callable[..., Any], tmp_path: Path
) -> None:
    """Not while documents are read, not after; and the text stays readable."""
    seen = []

    def texts() -> Iterator[str]:
        for _ in range(50):
            seen.append(list(tmp_path.iterdir()))
            yield "w1 w2 w3"

    source = Source(name="a", share=1.0, documents=texts())
    where = tmp_path / "not" / "there"
    packed = pack([source], tokenizer_maker(), context_length=4, spool=where)
    assert seen == [[]] * 50
    assert list(tmp_path.iterdir()) == []
    assert packed.tokens.sum() == 50 * (3 + 4 + 5)
    with pytest.raises(ValueError, match="read-only"):
        packed.tokens[0] = 1


def test_text_that_is_not_unicode_is_refused(
    tokenizer_maker: Callable[..., Any], packed_of: Callable[..., PackedText]
) -> None:
    with pytest.raises(InputError, match=r"not valid Unicode: '\\ud800' after 'w1 w2 '; repair it"):
        packed_of(["w1", "w1 w2 \ud800"], tokenizer_maker(), context_length=4)


def test_document_too_long_for_the_memory_is_refused(
    tokenizer_maker: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    packed_of: Callable[..., PackedText],
) -> None:
    monkeypatch.setattr("mlsae.base.machine.resources.available_memory", lambda: 100_000_000)
    with pytest.raises(ResourceError, match="tokenising a document of 3,000,000 characters: needs"):
        packed_of(["w1 " * 1_000_000], tokenizer_maker(), context_length=4)


def test_documents_are_read_in_batches_without_a_seam(
    tokenizer_maker: Callable[..., Any], packed_of: Callable[..., PackedText]
) -> None:
    """More documents than are tokenised at once give the same as any number."""
    tokenizer = tokenizer_maker(eos=False, bos=True)
    texts = [f"w{i % 50}" for i in range(700)]
    packed = packed_of(texts, tokenizer, context_length=4)
    rows = expected_rows(texts, tokenizer, Case(context_length=4))
    expected = [row for row in rows if len(row) == 4]
    np.testing.assert_array_equal(packed.tokens, np.array(expected)[..., 0].reshape(-1))


@pytest.mark.parametrize("adds_bos", [False, True])
def test_max_tokens_counts_whole_sequences_and_stops_reading(
    adds_bos: bool, tokenizer_maker: Callable[..., Any], packed_of: Callable[..., PackedText]
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


def test_max_tokens_below_one_sequence_is_refused(
    tokenizer_maker: Callable[..., Any], packed_of: Callable[..., PackedText]
) -> None:
    with pytest.raises(InputError, match="--max-tokens 15 is less than one sequence of 16 tokens"):
        packed_of(["w1"], tokenizer_maker(), context_length=16, max_tokens=15)


@pytest.mark.parametrize("texts", [[], ["", "  "]])
def test_empty_data_set_is_refused(
    texts: list[str], tokenizer_maker: Callable[..., Any], packed_of: Callable[..., PackedText]
) -> None:
    with pytest.raises(InputError, match="the data set is empty: it holds no text"):
        packed_of(texts, tokenizer_maker(), context_length=16)


def test_less_than_one_sequence_is_refused(
    tokenizer_maker: Callable[..., Any], packed_of: Callable[..., PackedText]
) -> None:
    with pytest.raises(InputError, match="holds 4 tokens, less than one sequence of 16"):
        packed_of(["w1 w2 w3"], tokenizer_maker(), context_length=16)


def test_special_token_in_the_text_is_flagged(
    tokenizer_maker: Callable[..., Any], packed_of: Callable[..., PackedText]
) -> None:
    packed = packed_of(["w1 <|endoftext|> w2"], tokenizer_maker(), context_length=4)
    assert packed.token_flags.tolist() == [0, SPECIAL, 0, SPECIAL]


def test_document_that_is_closed_already_is_not_closed_twice(
    tokenizer_maker: Callable[..., Any], packed_of: Callable[..., PackedText]
) -> None:
    """As token ids from elsewhere often are."""
    ids = [np.array(values, np.uint32) for values in ([5, 6, 0], [7, 8], [9, 0])]
    packed = packed_of(ids, tokenizer_maker(), context_length=4)
    assert packed.tokens.tolist() == [5, 6, 0, 7, 8, 0, 9, 0]
    assert packed.documents.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]


def test_text_longer_than_the_context_warns_of_nothing(
    tokenizer_maker: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    packed_of: Callable[..., PackedText],
) -> None:
    packed_of(["w1 " * 100], tokenizer_maker(), context_length=4)
    assert not caplog.records


def test_a_tokenizer_without_an_unknown_token_takes_its_own_words(tmp_path: Path) -> None:
    """Joints are found by a word that it knows, and another word in a text is one line."""
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "w1": 2, "w2": 3}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", name_or_path="toy"
    )
    assert Joints.of(tokenizer) == Joints(eos=1, bos=None, opening=(0,))
    source = Source(name="text", share=1.0, documents=iter(["w1 w2", "w1 hello w2"]))
    with pytest.raises(InputError) as info:
        pack([source], tokenizer, context_length=4, spool=tmp_path)
    assert str(info.value) == (
        "the tokenizer toy fails on a document that begins 'w1 hello w2': WordLevel error: "
        "Missing [UNK] token from the vocabulary; leave the document out, or mend the tokenizer"
    )


def test_tokenizer_hash_names_the_vocabulary_and_the_special_tokens(
    tokenizer_maker: Callable[..., Any],
) -> None:
    hashes = [tokenizer_sha256(tokenizer_maker(**kind)) for kind in KINDS.values()]
    assert hashes[0] == tokenizer_sha256(tokenizer_maker())
    assert len(set(hashes)) == 4


@pytest.mark.parametrize(
    ("name", "joints"),
    [
        ("stories260k", Joints(eos=2, bos=None, opening=(1,))),
        ("pythia-tokenizer", Joints(eos=0, bos=None, opening=())),
        ("tinystories-char-gpt2", Joints(eos=None, bos=None, opening=())),
    ],
)
def test_joints_of_real_tokenizers(name: str, joints: Joints, shared: Path) -> None:
    assert Joints.of(load_tokenizer(shared / "models" / name)) == joints


def test_real_text_survives_packing(shared: Path, packed_of: Callable[..., PackedText]) -> None:
    """TinyStories through a real tokenizer: BOS opens every sequence, every story is all there."""
    tokenizer = load_tokenizer(shared / "models" / "stories260k")
    source = str(shared / "text" / "tinystories_1000.jsonl")
    texts = list(open_sources(TextSettings(dataset=source))[0].documents)[:200]
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
