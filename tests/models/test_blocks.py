"""Blocks are found by structure and their outputs read whatever the library returns."""

import pytest
import torch
from torch import nn

from mlsae.base.errors import InputError
from mlsae.models.structure.blocks import find_blocks, hidden_of, with_hidden


class _Experts(nn.Module):
    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(num_experts))


class _Backbone(nn.Module):
    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(2) for _ in range(num_layers))
        self.decoder = nn.ModuleDict(
            {"stack": nn.ModuleList(_Experts(num_experts) for _ in range(num_layers))}
        )


def test_other_lists_of_the_same_length_are_not_the_blocks() -> None:
    """Neither norms kept beside the blocks nor experts inside them."""
    backbone = _Backbone(num_layers=3, num_experts=3)
    stack = list(backbone.decoder["stack"])  # type: ignore[call-overload]
    assert find_blocks(backbone, 3) == ("decoder.stack", stack)


def test_no_list_of_that_length_is_refused_naming_those_found() -> None:
    with pytest.raises(
        InputError,
        match=r"expected a list of 5 modules .* norms \(3\), decoder\.stack \(3\), .*; name .* "
        r"--blocks PATH$",
    ):
        find_blocks(_Backbone(num_layers=3, num_experts=2), 5)


def test_a_named_list_is_taken_whatever_its_length() -> None:
    backbone = _Backbone(num_layers=3, num_experts=2)
    assert find_blocks(backbone, 5, "norms") == ("norms", list(backbone.norms))


def test_the_part_that_reads_text_has_the_blocks_wherever_it_has_any() -> None:
    """Another part may have as many layers and more parameters; a head may be called decoder."""
    backbone = nn.ModuleDict({"text": _Backbone(3, 2), "vision": _Backbone(3, 9)})
    assert find_blocks(backbone, 3)[0] == "vision.decoder.stack"
    for within, path in ((backbone["text"], "text"), (nn.Linear(2, 2), "vision")):
        assert find_blocks(backbone, 3, within=within)[0] == f"{path}.decoder.stack"


@pytest.mark.parametrize("path", ["decoder", "decoder.layers", "", "norms.0"])
def test_a_name_that_is_no_list_is_refused_naming_the_lists(path: str) -> None:
    with pytest.raises(
        InputError, match=rf"--blocks {path}: _Backbone has no list .* decoder\.stack \(3\), "
    ):
        find_blocks(_Backbone(num_layers=3, num_experts=2), 3, path)


def test_hidden_state_of_a_tensor_and_of_a_tuple() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    assert hidden_of(a) is a
    assert hidden_of((a, b)) is a
    assert with_hidden(a, b) is b
    assert with_hidden((a, "cache"), b) == (b, "cache")


def test_other_outputs_are_refused() -> None:
    with pytest.raises(InputError, match="a block returned dict where its hidden state"):
        hidden_of([{}])
