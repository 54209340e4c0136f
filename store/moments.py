"""Moments of the stored activations by group of rows, merged exactly.

Every filter that a later stage may ask for (special tokens out, the first n positions out) is a
union of disjoint groups of rows, so its moments are an exact merge and no second pass over the
store is needed. Merging follows Chan, Golub and LeVeque (1983), "Algorithms for computing the
sample variance", in float64.

Shape suffixes: L layers, G groups, D channels, N rows.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from mlsae.base.errors import InputError
from mlsae.store.schema import MASKED, PADDING, SPECIAL

Float64 = npt.NDArray[np.float64]

NUM_POSITIONS = 16
GROUPS = (
    "special",
    "padding",
    "masked",
    *(f"position_{p}" for p in range(NUM_POSITIONS)),
    "rest",
)
"""Disjoint groups of rows; the first that matches a row has it."""
STANDARDIZE_EPS = 1e-5

_PER_CHANNEL = ("mean", "m2", "u_mean", "u_m2")
_PER_LAYER = ("norm_sum", "max_abs")


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Moments of the rows of one site that pass a filter; float64, leading axis as `layers`."""

    layers: tuple[int, ...]
    """Layer indices, ascending as in the store."""
    count: int
    """Rows of each layer."""
    mean: Float64
    """(L, D) mean of x."""
    m2: Float64
    """(L, D) Σ (x − mean)²."""
    u_mean: Float64
    """(L, D) mean of the standardised row u = (x − m(x)) / (s(x) + 1e-5)."""
    u_m2: Float64
    """(L, D) Σ (u − u_mean)²."""
    norm_mean: Float64
    """(L,) mean of ‖x‖₂."""
    max_abs: Float64
    """(L,) largest |x|; 0 without rows."""
    adjacent_cross: Float64
    """(L − 1,) Σ_rows ⟨x_l − mean_l, x_l+1 − mean_l+1⟩ for neighbours in `layers`."""

    def adjacent_cosine(self) -> Float64:
        """(L − 1,) pooled cosine of centred neighbours: cross / √(Σ m2_l · Σ m2_l+1)."""
        total = self.m2.sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            cosine: Float64 = self.adjacent_cross / np.sqrt(total[:-1] * total[1:])
        return cosine


def group_of_rows(
    token_flags: npt.NDArray[np.uint8], positions: npt.NDArray[np.int64]
) -> npt.NDArray[np.int8]:
    """(N,) int8 index into GROUPS for each row."""
    group = np.minimum(positions, NUM_POSITIONS) + 3
    for index, bit in ((2, MASKED), (1, PADDING), (0, SPECIAL)):
        group = np.where(token_flags & bit, index, group)
    return group.astype(np.int8)


def eligible_groups(skip_positions: int) -> tuple[int, ...]:
    """Indices of the groups that are eligible: no flag set and position ≥ skip_positions.

    Raises:
        InputError: skip_positions is not in 0 … 16, the positions that have groups of their own.
    """
    if not 0 <= skip_positions <= NUM_POSITIONS:
        raise InputError(
            f"skip_positions must be 0 to {NUM_POSITIONS}, the positions whose moments a store "
            f"keeps apart, got {skip_positions}"
        )
    return tuple(range(3 + skip_positions, len(GROUPS)))


def standardize(x_ND: Float64) -> Float64:
    """u = (x − m) / (s + 1e-5), m and s the mean and unbiased standard deviation of each row."""
    centred: Float64 = x_ND - x_ND.mean(axis=1, keepdims=True)
    num_channels = x_ND.shape[1]
    variance = np.einsum("nd,nd->n", centred, centred) / max(num_channels - 1, 1)
    centred /= (np.sqrt(variance) + STANDARDIZE_EPS)[:, None]
    return centred


def moments_bytes(num_layers: int, num_sites: int, d_model: int) -> int:
    """Bytes of one moments object, its header aside."""
    per_layer = len(_PER_CHANNEL) * d_model + len(_PER_LAYER) + 1
    return 8 * num_sites * len(GROUPS) * (num_layers * per_layer + 1)


class GroupMoments:
    """Moments of one site by layer and group, filled row block by row block."""

    def __init__(self, layers: tuple[int, ...], d_model: int) -> None:
        num_layers, num_groups = len(layers), len(GROUPS)
        self.layers = layers
        self.d_model = d_model
        self.count_G = np.zeros(num_groups, np.int64)
        self.per_channel = {
            name: np.zeros((num_layers, num_groups, d_model)) for name in _PER_CHANNEL
        }
        self.per_layer = {name: np.zeros((num_layers, num_groups)) for name in _PER_LAYER}
        self.cross = np.zeros((max(num_layers - 1, 0), num_groups))

    def block(self, group_N: npt.NDArray[np.int8]) -> "Block":
        """Begin a block of rows; its layers may be added in any order, by several threads."""
        return Block(self.layers, self.d_model, group_N)

    def merge(self, other: "GroupMoments") -> None:
        """Add the rows of `other` (Chan et al. 1983, equation 2.1, for each group)."""
        mine, theirs = self.count_G, other.count_G
        total = np.maximum(mine + theirs, 1)
        share = (theirs / total)[:, None]
        weight = (mine * (theirs / total))[:, None]
        delta = {
            name: other.per_channel[name] - self.per_channel[name] for name in ("mean", "u_mean")
        }
        for mean, m2 in (("mean", "m2"), ("u_mean", "u_m2")):
            self.per_channel[m2] += other.per_channel[m2] + delta[mean] ** 2 * weight
            self.per_channel[mean] += delta[mean] * share
        products = np.einsum("lgd,lgd->lg", delta["mean"][:-1], delta["mean"][1:])
        self.cross += other.cross + products * weight[:, 0]
        self.per_layer["norm_sum"] += other.per_layer["norm_sum"]
        np.maximum(
            self.per_layer["max_abs"], other.per_layer["max_abs"], out=self.per_layer["max_abs"]
        )
        self.count_G = mine + theirs

    def select(self, groups: Iterable[int]) -> Moments:
        """Merge the named groups into the moments of their union."""
        merged = GroupMoments(self.layers, self.d_model)
        for group in groups:
            merged.merge(self._as_first_group(group))
        count = int(merged.count_G[0])
        return Moments(
            layers=self.layers,
            count=count,
            **{name: values[:, 0].copy() for name, values in merged.per_channel.items()},
            norm_mean=merged.per_layer["norm_sum"][:, 0] / max(count, 1),
            max_abs=merged.per_layer["max_abs"][:, 0].copy(),
            adjacent_cross=merged.cross[:, 0].copy(),
        )

    def _as_first_group(self, group: int) -> "GroupMoments":
        alone = GroupMoments(self.layers, self.d_model)
        alone.count_G[0] = self.count_G[group]
        for name, values in self.per_channel.items():
            alone.per_channel[name][:, 0] = values[:, group]
        for name, scalars in self.per_layer.items():
            alone.per_layer[name][:, 0] = scalars[:, group]
        alone.cross[:, 0] = self.cross[:, group]
        return alone

    def tensors(self) -> dict[str, npt.NDArray[np.generic]]:
        """Name → array, as they lie in a moments object."""
        return {
            "count": self.count_G,
            **self.per_channel,
            **self.per_layer,
            "adjacent_cross": self.cross,
        }


class Block(GroupMoments):
    """Moments of a block of rows, computed in two exact passes."""

    def __init__(
        self, layers: tuple[int, ...], d_model: int, group_N: npt.NDArray[np.int8]
    ) -> None:
        super().__init__(layers, d_model)
        self._members = [(g, np.flatnonzero(group_N == g)) for g in np.unique(group_N)]
        for group, rows in self._members:
            self.count_G[group] = len(rows)

    def add_layer(
        self, index: int, x_ND: npt.NDArray[np.float32], above_ND: npt.NDArray[np.float32] | None
    ) -> None:
        """Fill in the layer at `index` of `layers`.

        Args:
            index: place in `layers`.
            x_ND: (N, D) decoded activations of that layer.
            above_ND: those of the next layer of `layers`, None for the last.
        """
        x = x_ND.astype(np.float64)
        above = None if above_ND is None else above_ND.astype(np.float64)
        u = standardize(x)
        norm = np.sqrt(np.einsum("nd,nd->n", x, x))
        for group, rows in self._members:
            x_group = x[rows]
            for values, mean, m2 in ((x_group, "mean", "m2"), (u[rows], "u_mean", "u_m2")):
                centre = values.mean(axis=0)
                self.per_channel[mean][index, group] = centre
                values -= centre
                self.per_channel[m2][index, group] = np.einsum("nd,nd->d", values, values)
            self.per_layer["norm_sum"][index, group] = norm[rows].sum()
            self.per_layer["max_abs"][index, group] = np.abs(x_ND[rows]).max()
            if above is not None:
                above_group = above[rows]
                # A value of the layer above that is not finite is reported by that layer.
                with np.errstate(invalid="ignore"):
                    above_group -= above_group.mean(axis=0)
                    self.cross[index, group] = np.einsum("nd,nd->", x_group, above_group)


def to_bytes(moments: Mapping[str, GroupMoments]) -> bytes:
    """Site → moments, as the bytes of a safetensors file."""
    return save_safetensors(
        {
            f"{site}/{name}": np.ascontiguousarray(values)
            for site, of_site in moments.items()
            for name, values in of_site.tensors().items()
        }
    )


def from_bytes(
    data: bytes, sites: Iterable[str], layers: tuple[int, ...], d_model: int
) -> dict[str, GroupMoments]:
    """Inverse of `to_bytes`.

    Raises:
        KeyError, ValueError: the bytes are no moments of these sites, layers and width.
    """
    tensors = load_safetensors(data)
    result = {}
    for site in sites:
        moments = GroupMoments(layers, d_model)
        for name, expected in moments.tensors().items():
            found = tensors[f"{site}/{name}"]
            if found.shape != expected.shape or found.dtype != expected.dtype:
                raise ValueError(f"{site}/{name} has shape {found.shape}, not {expected.shape}")
            expected[...] = found
        result[site] = moments
    return result
