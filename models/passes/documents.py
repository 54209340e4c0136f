"""Inputs as forward passes over plain sequences, and their results put back in place.

A document that no other may attend to is run as its own sequence, right-padded beside others
of similar length: the one way that is exact for every kind of position encoding and attention.

B = sequences, T = positions; N = sequences in a pass, L = its positions.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mlsae.models.inputs import Inputs


@dataclass(frozen=True, kw_only=True)
class DocumentPass:
    """One forward pass over N sequences of L tokens."""

    inputs: Inputs
    """Inputs without documents: every token in a sequence may attend to the others."""
    places: Tensor | None = None
    """(N, L) int64 on the CPU: each token's index b · T + t in the whole inputs, −1 for padding.
    None: the pass is the whole inputs."""

    def take(self, whole_BTd: Tensor, otherwise: Tensor) -> Tensor:
        """Take this pass's part from a whole, in the shape of `otherwise` (N, L, d) or (N · L, d).

        Padding has the values in `otherwise`.
        """
        assert self.places is not None
        places_NL = self.places.to(whole_BTd.device)
        part_NLd = whole_BTd.flatten(0, 1)[places_NL.clamp(min=0)]
        otherwise_NLd = otherwise.reshape(part_NLd.shape)
        return torch.where((places_NL >= 0)[..., None], part_NLd, otherwise_NLd).view_as(otherwise)


def passes(inputs: Inputs, *, of_equal_length: bool = False) -> list[DocumentPass]:
    """Forward passes in which every token in `inputs` sees the tokens it may attend to, no others.

    Inputs without documents are one pass. Otherwise each run of a document (and of padding) is a
    sequence, and the runs are dealt by length, the longest first, into passes of at most B · T
    places, where a run is shorter than the longest by a quarter or 8 at most.

    Args:
        inputs: the sequences.
        of_equal_length: no pass has padding: the runs of a pass are equally long, also those of
            padded sequences without documents.
    """
    if inputs.documents is None:
        if inputs.padding is None or not of_equal_length:
            return [DocumentPass(inputs=inputs)]
        inputs = replace(inputs, documents=torch.zeros_like(inputs.tokens))
    starts, lengths = _runs(inputs)
    order = torch.argsort(lengths, descending=True, stable=True)
    starts, lengths = starts[order], lengths[order]
    made, first = [], 0
    while first < len(lengths):
        longest = int(lengths[first])
        least = longest if of_equal_length else longest - max(longest // 4, 8)
        alike = int((lengths >= least).sum())
        last = min(alike, first + inputs.tokens.numel() // longest)
        made.append(_pass(inputs, starts[first:last], lengths[first:last]))
        first = last
    return made


def together(
    results: Iterable[tuple[DocumentPass, Mapping[Any, Tensor]]], shape: torch.Size
) -> dict[Any, Tensor]:
    """Put each entry from the passes' results (N, L, d) together as one tensor (B, T, d).

    Args:
        results: each pass and its results, all under the same keys; taken one after another.
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
    """First index b · T + t and length, for each run of one document or of padding."""
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


def _pass(inputs: Inputs, starts_N: Tensor, lengths_N: Tensor) -> DocumentPass:
    steps_L = torch.arange(int(lengths_N.max()))
    filled_NL = steps_L >= lengths_N[:, None]
    inside_NL = torch.where(filled_NL, 0, steps_L) + starts_N[:, None]
    return DocumentPass(
        inputs=Inputs(
            tokens=inputs.tokens.flatten()[inside_NL.to(inputs.tokens.device)],
            padding=filled_NL if bool(filled_NL.any()) else None,
            indices=inputs.token_indices().flatten()[inside_NL],
        ),
        places=inside_NL.masked_fill(filled_NL, -1),
    )
