"""Inputs as forward passes of plain sequences, and their results put back in place.

A document that no other may attend to is run as a sequence of its own, right-padded beside others
of about its length: the one way that is exact for every kind of position encoding and attention.

B = sequences, T = positions; of a pass, N = sequences and L = positions.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlsae.models.inputs import Inputs


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One forward pass of N sequences of L tokens."""

    inputs: Inputs
    """Without documents: whoever sits in one sequence attends to each other."""
    places: Tensor | None = None
    """(N, L) int64 on the CPU: b · T + t of each token in the whole inputs, −1 where there is none.
    None: the pass is the whole of the inputs."""

    def take(self, whole_BTd: Tensor, otherwise: Tensor) -> Tensor:
        """This pass's part of a whole, in the shape of `otherwise` (N, L, d) or (N · L, d).

        `otherwise` is what stands where the pass has no token.
        """
        assert self.places is not None
        places_NL = self.places.to(whole_BTd.device)
        part_NLd = whole_BTd.flatten(0, 1)[places_NL.clamp(min=0)]
        otherwise_NLd = otherwise.reshape(part_NLd.shape)
        return torch.where((places_NL >= 0)[..., None], part_NLd, otherwise_NLd).view_as(otherwise)


def passes(inputs: Inputs) -> list[Pass]:
    """The forward passes that give every token of `inputs` what it may attend to and no more.

    One, of the inputs as they are, where there are no documents. Otherwise each run of a document
    (and of padding) is a sequence, and the runs are dealt by length, the longest first, into passes
    of at most B · T places, where a run is shorter than the longest by a quarter or 8 at most.
    """
    if inputs.documents is None:
        return [Pass(inputs=inputs)]
    starts, lengths = _runs(inputs)
    order = torch.argsort(lengths, descending=True, stable=True)
    starts, lengths = starts[order], lengths[order]
    made, first = [], 0
    while first < len(lengths):
        longest = int(lengths[first])
        alike = int((lengths >= longest - max(longest // 4, 8)).sum())
        last = min(alike, first + inputs.tokens.numel() // longest)
        made.append(_pass(inputs, starts[first:last], lengths[first:last]))
        first = last
    return made


def together(
    results: Iterable[tuple[Pass, Mapping[Any, Tensor]]], shape: torch.Size
) -> dict[Any, Tensor]:
    """Each entry of the passes' results (N, L, d) as one tensor (B, T, d).

    Args:
        results: each pass and what it gave, all under the same keys; taken one after another.
        shape: (B, T).
    """
    whole: dict[Any, Tensor] = {}
    for each, result in results:
        if each.places is None:
            return dict(result)
        there_NL = each.places >= 0
        places = each.places[there_NL]
        for key, x_NLd in result.items():
            if key not in whole:
                whole[key] = x_NLd.new_empty(*shape, x_NLd.shape[-1])
            on = x_NLd.device
            whole[key].flatten(0, 1)[places.to(on)] = x_NLd[there_NL.to(on)]
    return whole


def _runs(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Place b · T + t of the first token, and length, of each run of one document or padding."""
    assert inputs.documents is not None
    documents_BT = inputs.documents.cpu()
    opens_BT = torch.ones(documents_BT.shape, dtype=torch.bool)
    opens_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    if inputs.padding is not None:
        padding_BT = inputs.padding.cpu()
        opens_BT[:, 1:] |= padding_BT[:, 1:] != padding_BT[:, :-1]
    starts = opens_BT.flatten().nonzero().flatten()
    ends = torch.cat([starts[1:], torch.tensor([opens_BT.numel()])])
    return starts, ends - starts


def _pass(inputs: Inputs, starts_N: Tensor, lengths_N: Tensor) -> Pass:
    steps_L = torch.arange(int(lengths_N.max()))
    filled_NL = steps_L >= lengths_N[:, None]
    inside_NL = torch.where(filled_NL, 0, steps_L) + starts_N[:, None]
    return Pass(
        inputs=Inputs(
            tokens=inputs.tokens.flatten()[inside_NL.to(inputs.tokens.device)],
            padding=filled_NL if bool(filled_NL.any()) else None,
            indices=inputs.token_indices().flatten()[inside_NL],
        ),
        places=inside_NL.masked_fill(filled_NL, -1),
    )
