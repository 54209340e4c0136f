"""Reconstruction of the held-out rows by an SAE, layer by layer, exactly encoded.

FVU = Σ‖x − x̂‖² / Σ‖x − μ_l‖², with μ_l the mean of layer l over the evaluated rows; sums over the
data set, never means of ratios. Special tokens are always out; position 0 is counted in and out.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mlsae.sae import SAE
from mlsae.store import AnyStore
from mlsae.train.data.decode import RowDecoder, StoredParts, origin_of, torch_rows
from mlsae.train.step.auxiliary import Sum
from mlsae.train.step.spread import least_share, rounding_left

POSITION_0_IN, POSITION_0_OUT = "position_0_in", "position_0_out"
_BLOCK_ROWS = 4096


class _LayerSums:
    """Sums over the evaluated rows of one layer, in float64, about a fixed point near the mean."""

    def __init__(
        self,
        about_x: torch.Tensor,
        about_u: torch.Tensor,
        least_share: float,
        prefixes: Sequence[int],
    ) -> None:
        self._about, self._least_share = (about_x, about_u), least_share
        self._prefixes = prefixes
        width, more = len(about_x), 3 * (len(prefixes) - 1)
        # rows, rows without a value, active values, then for x and u: error, squared length, and d
        # channel sums; then active values and both errors of each prefix but the last.
        size = 3 + 2 * (2 + width) + more
        self.sums = torch.zeros(size, dtype=torch.float64, device=about_x.device)

    def add(
        self,
        active_BG: torch.Tensor,
        rows: tuple[torch.Tensor, torch.Tensor],
        reconstructions: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Count rows (B, D), their reconstructions (B, G, D) and their active values by prefix."""
        num_active = active_BG.sum(dim=0, dtype=torch.float64)
        silent = (active_BG[:, -1] == 0).sum()
        parts = [self.sums.new_tensor([len(active_BG)]), silent.double()[None], num_active[-1:]]
        more = [num_active[:-1]]
        for about, row, reconstruction in zip(self._about, rows, reconstructions, strict=True):
            row = row.double()
            centred = row - about
            errors = torch.stack(
                [(row - one.double()).square().sum() for one in reconstruction.unbind(dim=1)]
            )
            parts += [errors[-1:], centred.square().sum()[None], centred.sum(0)]
            more.append(errors[:-1])
        self.sums += torch.cat([*parts, *more])

    def result(self) -> dict[str, Any]:
        rows, silent, active = self.sums[:3].tolist()
        fvu, spreads = [], []
        width = len(self._about[0])
        of_rows, more = self.sums[3 : 7 + 2 * width], self.sums[7 + 2 * width :]
        for i, (error, squares, *channels) in enumerate(of_rows.view(2, -1).tolist()):
            spread = squares - float(np.square(channels).sum()) / rows if rows else 0.0
            about = float(self._about[i].square().sum())
            least = rounding_left(squares, rows, about)
            # Rows are exact, what is made of them is rounded to 32 bits.
            if i == 1:
                least = max(least, self._least_share * (squares + rows * about))
            spreads.append(spread if spread > least else math.nan)
            fvu.append(error / spread if spread > least else None)
        found = {
            "num_rows": int(rows),
            "fvu": fvu[0],
            "fvu_standardized": fvu[1],
            "l0": active / rows if rows else None,
            "silent_fraction": silent / rows if rows else None,
        }
        if len(self._prefixes) == 1:
            return found
        by_prefix = [
            {
                "num_latents": width,
                "fvu": _known(errors[0] / spreads[0]),
                "fvu_standardized": _known(errors[1] / spreads[1]),
                "l0": count / rows if rows else None,
            }
            for width, count, *errors in zip(
                self._prefixes, *more.view(3, -1).tolist(), strict=False
            )
        ]
        last = {name: found[name] for name in ("fvu", "fvu_standardized", "l0")}
        return found | {"prefixes": [*by_prefix, {"num_latents": self._prefixes[-1], **last}]}


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def evaluate(
    sae: SAE,
    store: AnyStore,
    site: str,
    layers: tuple[int, ...],
    sequences: npt.NDArray[np.int64],
    *,
    skip_positions: int,
    rank: int,
    world_size: int,
    sum_over_ranks: Sum,
    report: Callable[[int], object] = lambda _: None,
) -> dict[str, Any]:
    """Reconstruct all rows of the given sequences but those with a flag.

    Args:
        sae: an SAE on its device.
        store: the store.
        site: site of the store.
        layers: layers of the store.
        sequences: (n,) the sequences to evaluate, over all ranks.
        skip_positions: rows at these first positions count as position 0 does.
        rank: this rank takes every world_size-th sequence.
        world_size: number of ranks.
        sum_over_ranks: adds up over them.
        report: called with the number of rows of each block, flagged ones too.

    Returns:
        For `position_0_in` and `position_0_out`: `layers`, a list of {layer, num_rows, fvu,
        fvu_standardized, l0, silent_fraction}, where `silent_fraction` is the share of rows without
        a value but 0, and `prefixes` where the SAE has some, a list of {num_latents, fvu,
        fvu_standardized, l0}; `num_rows` over layers; `num_dead`, latents without a value but 0
        on any of these rows; and `dead_fraction`. Ratios without rows or spread are None.
    """
    device = sae.b.device
    first_out = max(1, skip_positions)
    moments = store.moments(site, 0)
    decode = RowDecoder(store, site, layers, device)
    mine = sequences[rank::world_size]
    used = torch.zeros(2, sae.config.num_latents, device=device)
    by_layer: dict[str, list[dict[str, Any]]] = {POSITION_0_IN: [], POSITION_0_OUT: []}
    for layer in layers:
        at = moments.layers.index(layer)
        mean, u_mean = (torch.from_numpy(m[at]).to(device) for m in (moments.mean, moments.u_mean))
        if sae.config.normalize != "standardize":
            u_mean = sae.standardize(mean[None], layers.index(layer)).u[0].double()
        about = mean, u_mean
        least = least_share(standardized=sae.config.normalize == "standardize")
        sums = [_LayerSums(*about, least, sae.config.prefixes) for _ in by_layer]
        for stored, position, origin in row_blocks(store, site, layer, mine):
            x = decode(stored, layers.index(layer), origin).to(sae.b.dtype)
            keep = (position >= 0, position >= first_out)
            _count(sae, x, layers.index(layer), [mask.to(device) for mask in keep], sums, used)
            report(len(position))
        for name, total in zip(by_layer, sums, strict=True):
            total.sums = sum_over_ranks(total.sums)
            by_layer[name].append({"layer": layer, **total.result()})
    num_dead = (sum_over_ranks(used) == 0).sum(dim=1).tolist()
    num_rows = {name: sum(entry["num_rows"] for entry in of) for name, of in by_layer.items()}
    return {
        name: {
            "layers": by_layer[name],
            "num_rows": num_rows[name],
            "num_dead": dead,
            "dead_fraction": dead / sae.config.num_latents if num_rows[name] else None,
        }
        for name, dead in zip(by_layer, num_dead, strict=True)
    }


def not_finite(
    sae: SAE, metrics: Mapping[str, Any] | None, layers: tuple[int, ...]
) -> tuple[int, ...]:
    """Layers whose rows an SAE does not reconstruct as finite numbers; all, if its weights are not.

    Args:
        sae: the SAE.
        metrics: result of `evaluate`; None for weights alone.
        layers: layers of the SAE.
    """
    if not all(weights.isfinite().all() for weights in sae.parameters()):
        return layers
    found = [] if metrics is None else [*metrics[POSITION_0_IN]["layers"]]
    # Position 0 is among these rows, so that others are not looked at.
    return tuple(e["layer"] for e in found if not math.isfinite(e["fvu"] or 0))


@torch.no_grad()
def _count(
    sae: SAE,
    x: torch.Tensor,
    at: int,
    keep: list[torch.Tensor],
    sums: list[_LayerSums],
    used: torch.Tensor,
) -> None:
    u, mean, scale = sae.standardize(x, at)
    values, support = sae.activate(u, at)
    u_hat = sae.reconstructions(values, support)
    x_hat = u_hat * scale[:, None] + mean[:, None]
    active = values != 0
    counts = support.counts(active, sae.config.prefixes)
    for i, mask in enumerate(keep):
        sums[i].add(counts[mask], (x[mask], u[mask]), (x_hat[mask], u_hat[mask]))
        used[i, support.indices_BK[mask][active[mask]]] = 1


def row_blocks(
    store: AnyStore, site: str, layer: int, sequences: npt.NDArray[np.int64]
) -> Iterator[tuple[StoredParts, torch.Tensor, torch.Tensor | None]]:
    """Rows of sequences as stored, some sequences at once, their positions and their stores.

    Rows with a flag have position −1.
    """
    length, reader = store.rows_per_sequence, store.reader(site, layer)
    together = max(1, _BLOCK_ROWS // length)
    out = [np.empty((together * length, part.width), part.dtype) for part in store.parts]
    for first in range(0, len(sequences), together):
        starts = sequences[first : first + together] * length
        positions = []
        for i, start in enumerate(starts.tolist()):
            reader.read_into([rows[i * length : (i + 1) * length] for rows in out], start)
            flagged = store.row_flags(start, start + length) != 0
            positions.append(np.where(flagged, -1, store.positions(start, start + length)))
        num_rows = len(starts) * length
        stored = tuple(torch_rows(rows[:num_rows], store.encoding) for rows in out)
        origin = origin_of(store, (starts[:, None] + np.arange(length)).reshape(-1))
        yield (
            stored,
            torch.from_numpy(np.concatenate(positions)),
            None if origin is None else torch.from_numpy(origin),
        )
