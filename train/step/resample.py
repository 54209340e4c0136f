"""Resampling: dead latents of an SAE with an L1 penalty are drawn anew from rows that fare badly.

Source: Bricken et al. (2023), "Towards Monosemanticity", Transformer Circuits Thread, appendix
"Neuron resampling": at four times in the first half of training, every latent that no row has used
for half the time between them takes an input, drawn with probability proportional to the square of
its loss. The decoder row becomes its direction, the encoder row the same with a fifth of the mean
length of living latents' encoder rows, the encoder bias and the Adam moments 0. There the losses
come from another sample of inputs; here they come from the step's batch, before its update, and no
row is drawn twice. An input is u − b, as the encoder sees it.

Shape suffixes: B rows, D channels, R candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mlsae.sae import SAE
from mlsae.train.step.auxiliary import Sum, hashed
from mlsae.train.step.optimizer import Optimizer

PUBLISHED_TIMES = 8
"""In the published run: at each eighth of the steps, up to the half."""
ENCODER_SHARE = 0.2


@dataclass(frozen=True)
class Resampling:
    """When dead latents are drawn anew."""

    every: int
    """Steps between."""
    num_steps: int
    """Steps of the run; after the half of them there is no more of it."""

    def due(self, step: int) -> bool:
        """True where resampling follows this step, counted from 0."""
        done = step + 1
        return done % self.every == 0 and 2 * done <= self.num_steps


class Candidates(NamedTuple):
    """Rows for dead latents to be drawn from; the smallest key is the first."""

    keys: torch.Tensor
    """(R,) see `keys`."""
    rows: torch.Tensor
    """(R, D) u − b."""

    def first(self, count: int) -> "Candidates":
        """The first `count` that can be drawn, or all if there are fewer."""
        at = torch.argsort(self.keys, stable=True)[:count]
        at = at[self.keys[at].isfinite()]
        return Candidates(self.keys[at], self.rows[at])


def keys(x_BD: torch.Tensor, loss_B: torch.Tensor, seed: int, step: int) -> torch.Tensor:
    """(B,) float64 −log(r) / loss², r uniform from a hash of the row.

    The rows of the n smallest keys are n draws with probability ∝ loss², without putting back, the
    same however a batch is cut between ranks. Source: Efraimidis and Spirakis (2006).
    """
    uniform_B = (hashed(x_BD, seed, step).double() + 2**31 + 0.5) / 2**32
    return -uniform_B.log() / loss_B.detach().double().square()


@torch.no_grad()
def resample(
    sae: SAE,
    optimizer: Optimizer,
    dead: torch.Tensor,
    pieces: Sequence[Candidates],
    rank: int,
    world_size: int,
    sum_over_ranks: Sum,
) -> torch.Tensor:
    """Draw dead latents anew, equally on every rank.

    Args:
        sae: the SAE in training.
        optimizer: optimizer of the SAE.
        dead: (num_dead,) indices of the dead latents, the same on every rank.
        pieces: the candidates of this rank; with as many rows as there are dead latents, none are
            missed.
        rank: rank of this process.
        world_size: number of ranks.
        sum_over_ranks: called twice.

    Returns:
        The latents that were drawn: the first of `dead`, if there are fewer candidates.
    """
    num_dead = len(dead)
    parts = zip(*pieces, strict=True)
    mine = Candidates(*(torch.cat(part) for part in parts)).first(num_dead)
    # Each rank writes its own part of one tensor; a place that stays 0 has no candidate.
    some = slice(rank * num_dead, rank * num_dead + len(mine.keys))
    inverse = mine.keys.new_zeros(world_size * num_dead)
    rows = mine.rows.new_zeros(world_size * num_dead, mine.rows.shape[1])
    inverse[some], rows[some] = 1 / mine.keys, mine.rows
    drawn = Candidates(1 / sum_over_ranks(inverse), sum_over_ranks(rows)).first(num_dead)
    latents = dead[: len(drawn.keys)]
    directions = drawn.rows / torch.linalg.vector_norm(drawn.rows, dim=1, keepdim=True)
    lengths = torch.linalg.vector_norm(sae.W_enc, dim=1)
    living = torch.ones_like(lengths, dtype=torch.bool)
    living[dead] = False
    length = lengths[living].mean() if living.any() else lengths.mean()
    sae.W_dec[latents] = directions
    sae.W_enc[latents] = directions * (ENCODER_SHARE * length)
    for kind in sae.architecture.parameters(sae.config):
        if kind.by_latent and len(kind.shape) == 1:
            sae.get_parameter(kind.name)[latents] = 0
    optimizer.forget(latents)
    return latents
