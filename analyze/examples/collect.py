"""Where each latent is strongest, and random events from quarters of its range, in one pass.

Shapes: N rows in a block, R rows held, K active slots a row, E events (token, layer, latent), A
events that are kept, M = num_latents, L layers, W window places.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mlsae.analyze.examples.best import Best, Field
from mlsae.analyze.examples.sample import RANGES, Sample
from mlsae.analyze.examples.windows import Joined, Text, join_layers, read_text, windows
from mlsae.analyze.pairing import Pairing
from mlsae.analyze.selection import Int

_EVENTS = 2**20
"""Events that are gathered before they are looked at; at least a whole sequence's."""
_AT_ONCE = 2**16
"""Events whose windows are made at once."""


@dataclass(frozen=True, kw_only=True)
class ExamplesPlan:
    """Choice of examples that are kept for a latent."""

    top: int
    """Strongest tokens over all layers, and strongest ones of each layer; at least 1."""

    samples: int
    """Random ones from each of `RANGES`."""

    before: int
    """Window tokens before the peak."""

    after: int
    """Tokens after it."""

    seed: int
    """Seed for the random choice."""

    def fields(self, num_layers: int) -> dict[str, Field]:
        """Fields that are kept with an example."""
        width = self.before + 1 + self.after
        return {
            "event": Field(1, torch.int64),
            "row": Field(1, torch.int64),
            "ids": Field(width, torch.int32),
            "values": Field(width, torch.float32),
            "layer_values": Field(num_layers, torch.float32),
        }

    def most_examples(self, num_latents: int, num_layers: int) -> int:
        """Table rows, at most."""
        return num_latents * (self.top * (num_layers + 1) + self.samples * RANGES)

    def disk_bytes(self, num_layers: int) -> int:
        """Bytes a compressed table row takes, about."""
        return 30 + 5 * (self.before + 1 + self.after) + 3 * num_layers

    def num_bytes(self, num_latents: int, num_layers: int) -> int:
        """Memory for all examples."""
        fields = self.fields(num_layers)
        return Best.num_bytes(num_latents * num_layers, self.top, fields) + Sample.num_bytes(
            num_latents, self.samples, fields
        )


class Examples:
    """Collector of examples from blocks of tokens.

    Memory: all examples (`ExamplesPlan.num_bytes`), on the device, and 2²⁰ events or those in one
    sequence, whichever are more.

    Args:
        pairing: store and SAE.
        plan: choice of examples.
    """

    def __init__(self, pairing: Pairing, plan: ExamplesPlan) -> None:
        self.plan = plan
        self.layers = pairing.layers
        self.num_latents = pairing.sae.config.num_latents
        self._store = pairing.store
        self._device = pairing.device
        fields = plan.fields(len(self.layers))
        self.top = Best(self.num_latents * len(self.layers), plan.top, fields, pairing.device)
        """Group latent · L + layer index: the layer's strongest."""
        self.samples = Sample(self.num_latents, plan.samples, fields, pairing.device)
        """Random ones from each range."""
        self._rows: list[tuple[Int, Int]] = []
        self._events: list[tuple[Tensor, Tensor, Tensor]] = []
        self._num_rows = self._num_events = 0

    def add(self, rows_N: Int, tokens_N: Int, latents: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """Add a block of eligible rows, which come after those in earlier blocks.

        Args:
            rows_N: rows, ascending.
            tokens_N: each one's token index.
            latents: layer → (N, K) values and (N, K) indices, layers in order; K may differ.
        """
        widest = max(values.shape[1] for values, _ in latents.values())
        values, indices = (
            torch.stack([torch.nn.functional.pad(t, (0, widest - t.shape[1])) for t in of], dim=1)
            for of in zip(*latents.values(), strict=True)
        )
        place_E = (values != 0).view(-1).nonzero()[:, 0]
        self._events.append(
            (
                place_E // widest + self._num_rows * len(latents),
                indices.view(-1)[place_E],
                values.view(-1)[place_E].abs(),
            )
        )
        self._rows.append((rows_N, tokens_N))
        self._num_rows += len(rows_N)
        self._num_events += len(place_E)
        if self._num_events >= _EVENTS:
            self._look(is_last=False)

    def finish(self) -> None:
        """Look at what is held; there are no more rows."""
        if self._num_rows:
            self._look(is_last=True)

    def _look(self, *, is_last: bool) -> None:
        """Take the events in all sequences but the last, which may go on, or in all."""
        rows_R, tokens_R = (np.concatenate(of) for of in zip(*self._rows, strict=True))
        at_E, latent_E, value_E = (torch.cat(of) for of in zip(*self._events, strict=True))
        length, num_layers = self._store.context_length, len(self.layers)
        of_row = tokens_R // length
        whole = len(tokens_R) if is_last else int(np.searchsorted(of_row, of_row[-1]))
        end = int(torch.searchsorted(at_E, whole * num_layers))
        self._rows = [(rows_R[whole:], tokens_R[whole:])]
        self._events = [(at_E[end:] - whole * num_layers, latent_E[end:], value_E[end:])]
        self._num_rows, self._num_events = len(tokens_R) - whole, len(at_E) - end
        if end == 0:
            return
        tokens_R = tokens_R[:whole]
        sequences, place_R = np.unique(of_row[:whole], return_inverse=True)
        local_R = place_R * length + tokens_R % length
        is_eligible = np.zeros(len(sequences) * length, dtype=bool)
        is_eligible[local_R] = True
        text = read_text(self._store, sequences, is_eligible, self._device)
        at_E, latent_E, value_E = at_E[:end], latent_E[:end], value_E[:end]
        place_E = at_E // num_layers
        layer_E = at_E - place_E * num_layers
        rows_R3 = np.stack([rows_R[:whole], tokens_R, local_R], axis=1)
        self._take(
            _Held(
                text=text,
                rows=torch.from_numpy(rows_R3).to(self._device),
                places=place_E,
                layers=layer_E,
                latents=latent_E,
                values=value_E,
            )
        )

    def _take(self, held: "_Held") -> None:
        num_layers = len(self.layers)
        token_E, local_E = held.rows[:, 1][held.places], held.rows[:, 2][held.places]
        joined = join_layers(
            local_E,
            held.layers,
            held.latents,
            held.values,
            num_tokens=len(held.text.ids),
            num_layers=num_layers,
        )
        event_E = token_E * num_layers + held.layers
        if self.plan.samples:
            scores_E = random_scores(event_E, held.latents, self.plan.seed)
            kept, places_A = self.samples.place(held.latents, held.values, scores_E)
            self._write(self.samples, held, joined, kept, places_A)
        group_E, score_E = held.latents * num_layers + held.layers, held.values.view(torch.int32)
        offered = self.top.passes(group_E, score_E).nonzero()[:, 0]
        if len(offered):
            kept, places_A = self.top.place(group_E[offered], score_E[offered])
            self._write(self.top, held, joined, offered[kept], places_A)

    def _write(
        self, kept: Best | Sample, held: "_Held", joined: Joined, at_A: Tensor, places_A: Tensor
    ) -> None:
        for first in range(0, len(at_A), _AT_ONCE):
            some = slice(first, first + _AT_ONCE)
            kept.write(places_A[some], **self._known(held, joined, at_A[some]))

    def _known(self, held: "_Held", joined: Joined, at_A: Tensor) -> dict[str, Tensor]:
        """Event fields."""
        rows_A, tokens_A, local_A = held.rows[held.places[at_A]].unbind(1)
        layer_A, pair_A = held.layers[at_A], joined.pairs[at_A]
        ids, values = windows(
            held.text,
            joined,
            pair_A,
            layer_A,
            local_A,
            before=self.plan.before,
            after=self.plan.after,
        )
        return {
            "event": (tokens_A * len(self.layers) + layer_A)[:, None],
            "row": rows_A[:, None],
            "ids": ids,
            "values": values,
            "layer_values": joined.values[pair_A],
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class _Held:
    """Events in whole sequences."""

    text: Text
    """Tokens at the rows."""

    rows: Tensor
    """(R, 3): each eligible row's number, its token in the store and its token in `text`."""

    places: Tensor
    """(E,) index of each event's row in `rows`."""

    layers: Tensor
    """(E,) each event's layer index."""

    latents: Tensor
    """(E,) latent."""

    values: Tensor
    """(E,) value, float32."""


def random_scores(events_E: Tensor, latents_E: Tensor, seed: int) -> Tensor:
    """Numbers from 1 to 2³¹ − 1, int32, that seem random: always the same for an event and a seed.

    Those with the largest are a random sample, drawn without knowing how many there are. SplitMix64
    (Steele, Lea, Flood 2014), its shifts arithmetic.
    """
    x = events_E * _signed(0x9E3779B97F4A7C15)
    x ^= (latents_E + _signed(seed * 0x632BE5AB)) * _signed(0xD1B54A32D192ED03)
    x = (x ^ (x >> 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27)) * _signed(0x94D049BB133111EB)
    x ^= x >> 31
    return ((x >> 32) & 0x7FFFFFFF).clamp_(min=1).int()


def _signed(bits: int) -> int:
    """The number that the low 64 bits are as an int64."""
    return (bits + (1 << 63)) % (1 << 64) - (1 << 63)
