"""Isolated documents and padded sequences give what each text gives when it is run alone."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mlsae.base.errors import InputError
from mlsae.models import Transformer, load
from mlsae.models.capture import capture
from mlsae.models.inputs import Inputs
from mlsae.models.passes.documents import passes
from mlsae.models.splice import run

LENGTHS = ((7, 1, 12), (20,), (3, 9, 8))
"""Documents of each of three sequences of twenty tokens."""


@pytest.fixture(scope="session")
def documents() -> torch.Tensor:
    number = iter(range(100))
    return torch.tensor([[n for run in row for n in [next(number)] * run] for row in LENGTHS])


def alone(transformer: Transformer, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Each block's output for one text, by plain hooks: (T, d) each."""
    outputs: list[torch.Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        outputs.append((output if isinstance(output, torch.Tensor) else output[0])[0])

    handles = [block.register_forward_hook(keep) for block in transformer.blocks]
    with torch.no_grad():
        transformer.model(input_ids=tokens[None])
    for handle in handles:
        handle.remove()
    return outputs


def error(x: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest relative error of a token's vector."""
    return float(((x - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def test_each_document_gives_what_it_gives_alone(
    any_family: Transformer, tokens: torch.Tensor, documents: torch.Tensor
) -> None:
    isolated = capture(any_family, Inputs(tokens=tokens, documents=documents), range(3))
    packed = capture(any_family, Inputs(tokens=tokens), range(3))
    for document in documents.unique():
        here = documents == document
        for layer, expected in enumerate(alone(any_family, tokens[here])):
            key = ("resid_post", layer)
            assert error(isolated[key][here], expected) < 1e-5
            begins = int(here.nonzero()[0, 1]) == 0
            decodes = any_family.kind == "decoder"
            if not (begins and (decodes or int(here.sum()) == 20)):
                assert error(packed[key][here], expected) > 1e-3


def test_padding_changes_no_token(any_family: Transformer, tokens: torch.Tensor) -> None:
    """And a sequence of nothing else is finite."""
    lengths = (20, 4, 0)
    padding = torch.arange(20) >= torch.tensor(lengths)[:, None]
    x = capture(any_family, Inputs(tokens=tokens, padding=padding), range(3))
    for row, length in enumerate(lengths[:2]):
        for layer, expected in enumerate(alone(any_family, tokens[row, :length])):
            assert error(x["resid_post", layer][row, :length], expected) < 1e-5
    assert all(bool(values.isfinite().all()) for values in x.values())


def test_padding_and_documents_together(
    any_family: Transformer, tokens: torch.Tensor, documents: torch.Tensor
) -> None:
    """Padding in a document's last part, of a whole sequence, and none."""
    padding = torch.arange(20) >= torch.tensor([15, 0, 20])[:, None]
    inputs = Inputs(tokens=tokens, documents=documents, padding=padding)
    x = capture(any_family, inputs, [2])["resid_post", 2]
    for document in documents.unique():
        here = (documents == document) & ~padding
        if here.any():
            assert error(x[here], alone(any_family, tokens[here])[2]) < 1e-5
    assert bool(x.isfinite().all())


def test_logits_of_isolated_documents(
    transformer: Transformer, tokens: torch.Tensor, documents: torch.Tensor
) -> None:
    logits = run(transformer, Inputs(tokens=tokens, documents=documents))
    for document in documents.unique():
        here = documents == document
        with torch.no_grad():
            expected = transformer.model(input_ids=tokens[here][None]).logits[0]
        assert error(logits[here], expected) < 1e-5


def test_the_controls_embeddings_belong_to_the_same_tokens(
    make_model_directory: Callable[[str], Any], tokens: torch.Tensor, documents: torch.Tensor
) -> None:
    """Embeddings keyed by a token's place in the text keep to it when documents are dealt anew."""
    control = load(make_model_directory("llama"), init="control", init_seed=3)
    embedded = [
        capture(control, Inputs(tokens=tokens, documents=given, first_token=40), [0], ["resid_pre"])
        for given in (None, documents)
    ]
    assert torch.equal(embedded[0]["resid_pre", 0], embedded[1]["resid_pre", 0])
    moved = capture(control, Inputs(tokens=tokens, first_token=60), [0], ["resid_pre"])
    assert torch.equal(moved["resid_pre", 0][:2], embedded[0]["resid_pre", 0][1:])


@pytest.mark.parametrize("family", ["BERT", "RoBERTa"])
def test_documents_of_a_model_that_attends_to_padding_are_run_by_length(
    family: str,
    make_family: Callable[[str], Transformer],
    tokens: torch.Tensor,
    documents: torch.Tensor,
) -> None:
    """Isolated or padded, each document still gives what it gives alone."""
    unmasked = load(make_family(family).name)

    def without_mask(_module: Any, args: Any, given: dict[str, Any]) -> Any:
        return args, {name: x for name, x in given.items() if name != "attention_mask"}

    unmasked.model.register_forward_pre_hook(without_mask, with_kwargs=True)
    padding = torch.arange(20) >= torch.tensor([15, 20, 4])[:, None]
    for inputs in (
        Inputs(tokens=tokens, documents=documents),
        Inputs(tokens=tokens, padding=padding),
    ):
        x = capture(unmasked, inputs, [2])["resid_post", 2]
        rows = torch.arange(3)[:, None].expand(3, 20) if inputs.documents is None else documents
        for row in rows.unique():
            here = (rows == row) & (~padding if inputs.documents is None else True)
            assert error(x[here], alone(unmasked, tokens[here])[2]) < 1e-5
        assert bool(x.isfinite().all())


def test_half_precision_is_no_leak(make_family: Callable[[str], Transformer]) -> None:
    tokens = torch.arange(12).view(2, 6)
    for family in ("Llama", "BERT", "Mixtral", "BLOOM"):
        half = load(make_family(family).name, dtype="bfloat16")
        capture(half, Inputs(tokens=tokens, documents=tokens // 4), [2])


@pytest.mark.parametrize("seed", range(20))
def test_passes_hold_every_token_once_and_little_else(seed: int) -> None:
    generator = np.random.default_rng(seed)
    shape = tuple(generator.integers(1, 9, 2) * (1, 16))
    documents = torch.from_numpy(generator.integers(0, 1 + seed % 4, shape).cumsum(1))
    padding = torch.from_numpy(generator.integers(1, shape[1] + 1, shape[0]))[:, None]
    padding = torch.arange(shape[1]) >= padding
    tokens = torch.from_numpy(generator.integers(0, 1000, shape))
    first = int(generator.integers(0, 10**6))
    inputs = Inputs(tokens=tokens, documents=documents, padding=padding, first_token=first)
    placed = []
    for each in passes(inputs):
        assert each.places is not None
        there = each.places >= 0
        longest = there.shape[1]
        assert there.sum(1).min() >= longest - max(longest // 4, 8)
        assert there.sum(1).max() == longest
        assert there.numel() <= tokens.numel()
        filled = each.inputs.padding
        assert torch.equal(there, torch.ones_like(there) if filled is None else ~filled)
        places = each.places[there]
        assert torch.equal(each.inputs.tokens[there], tokens.flatten()[places])
        assert torch.equal(each.inputs.token_indices()[there], first + places)
        for row, here in zip(each.places, there, strict=True):
            run = row[here]
            assert torch.equal(run, torch.arange(int(run[0]), int(run[0]) + len(run)))
            for values in (documents, padding, torch.arange(shape[0])[:, None].expand(shape)):
                assert len(values.flatten()[run].unique()) == 1
        placed.append(places)
    assert torch.equal(torch.cat(placed).sort().values, torch.arange(tokens.numel()))


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"tokens": torch.zeros(4)}, r"tokens must be .* \(B, T\), got shape \(4,\)"),
        ({"tokens": torch.zeros(0, 4)}, r"tokens must be .* \(B, T\), got shape \(0, 4\)"),
        ({"documents": torch.zeros(2, 3)}, r"documents must have the shape of tokens \(2, 4\), "),
        ({"indices": torch.zeros(2, 3)}, r"indices must have the shape of tokens \(2, 4\), got"),
        (
            {"padding": torch.tensor([[False] * 4, [True, False, True, True]])},
            "padding must end its sequence, got a token after padding",
        ),
    ],
)
def test_inputs_that_no_pass_could_be_given(given: dict[str, torch.Tensor], line: str) -> None:
    with pytest.raises(InputError, match=line):
        Inputs(**{"tokens": torch.zeros(2, 4), **given})
