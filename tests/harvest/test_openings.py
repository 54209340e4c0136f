"""Tokens that open a context: once, all that the tokenizer puts before a text, and flagged."""

from collections.abc import Callable
from typing import Any

import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from mlsae.base.errors import InputError
from mlsae.harvest.text.joints import Joints
from mlsae.harvest.text.packing import PackedText
from mlsae.store import SPECIAL


def test_text_that_opens_itself_is_not_opened_twice(
    tokenizer_maker: Callable[..., Any], packed_of: Callable[..., PackedText]
) -> None:
    """As a rendered chat template does; a document in the middle keeps its own BOS."""
    tokenizer = tokenizer_maker(bos=True, adds_bos=True)
    texts = ["<s> w0 w1", "<s> w2 w3 w4 w5"]
    joined = packed_of(texts, tokenizer, context_length=4)
    assert joined.tokens.tolist() == [1, 3, 4, 0, 1, 5, 6, 7]
    assert joined.num_left_over == 2
    alone = packed_of(texts, tokenizer, context_length=4, packing="document")
    assert alone.tokens.tolist() == [1, 3, 4, 0, 1, 5, 6, 7]
    isolated = packed_of(texts, tokenizer, context_length=7, isolate_documents=True)
    assert isolated.tokens.tolist() == [1, 3, 4, 0, 1, 5, 6]


def make_chat_tokenizer(template: str, special: list[str], added: list[str], **names: str) -> Any:
    """Ids: <unk>, special tokens, the words, and then tokens that were added."""
    words = ["<unk>", *special, *(f"w{i}" for i in range(9))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in [*special, *added]])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(word, tokenizer.token_to_id(word)) for word in special]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", **names
    )


def test_every_token_that_was_added_as_special_is_flagged(
    packed_of: Callable[..., PackedText],
) -> None:
    """Marks of a chat template are none of BOS, EOS and their like."""
    tokenizer = make_chat_tokenizer("$A", ["</s>"], ["<|head|>", "<|eot|>"], eos_token="</s>")
    packed = packed_of(["<|head|> w0 w1 <|eot|>"], tokenizer, context_length=5)
    assert packed.tokens.tolist() == [11, 2, 3, 12, 1]
    assert packed.token_flags.tolist() == [SPECIAL, 0, 0, SPECIAL, SPECIAL]


def test_contexts_open_with_all_that_the_tokenizer_puts_before_a_text(
    packed_of: Callable[..., PackedText],
) -> None:
    """GLM has two such tokens, and no BOS."""
    tokenizer = make_chat_tokenizer(
        "[gMASK] <sop> $A", ["[gMASK]", "<sop>", "<eos>"], [], eos_token="<eos>"
    )
    packed = packed_of(["w0 w1 w2", "[gMASK] <sop> w3"], tokenizer, context_length=4)
    assert packed.tokens.reshape(-1, 4).tolist() == [[1, 2, 4, 5], [1, 2, 6, 3], [1, 2, 7, 3]]
    assert packed.token_flags.reshape(-1, 4)[0].tolist() == [SPECIAL, SPECIAL, 0, 0]
    assert packed.joints.describe()["context_bos"] == [1, 2]
    alone = packed_of(["w0"] * 3, tokenizer, context_length=5, isolate_documents=True)
    assert alone.tokens.reshape(-1, 5).tolist() == [[1, 2, 4, 3, 1], [1, 2, 4, 3, 1]]
    for bos, first in (("always", [1, 2, 4]), ("never", [4, 3, 4])):
        assert (
            packed_of(["w0"] * 3, tokenizer, context_length=3, bos=bos).tokens[:3].tolist() == first
        )
    with pytest.raises(
        InputError, match="--context-length 2 leaves no room for text behind the 2 tokens"
    ):
        packed_of(["w0"], tokenizer, context_length=2)


def test_unknown_word_that_is_the_bos_opens_nothing() -> None:
    """Tokenizers of few letters have one token for all of that."""
    words = {"<s>": 0, "w0": 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<s>", bos_token="<s>"
    )
    assert Joints.of(fast).opening == ()
    assert Joints.of(fast, bos="always").opening == (0,)
