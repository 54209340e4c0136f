"""Moments of the stored activations by group of rows, merged exactly.

Every filter that a later stage may ask for (special tokens out, the first n positions out) is a
union of disjoint groups of rows, so its moments are an exact merge and no second pass over the
store is needed. Merging follows Chan, Golub and LeVeque (1983), "Algorithms for computing the
sample variance", in float64.

Shape suffixes: L layers, G groups, D channels, N rows.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from mlsae.base.errors import InputError
from mlsae.store.schema import MASKED, PADDING, SPECIAL

Float64 = npt.NDArray[np.float64]
Floats = npt.NDArray[Any]

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


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Moments of a site's rows that pass a filter; float64, leading axis as `layers`."""

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
        """(L − 1,) pooled cosine of centred neighbours: cross / √(Σ m2_l · Σ m2_l+1).

        NaN where a layer does not vary: its m2 is 0, or the rounding of its mean.
        """
        total = self.m2.sum(axis=1)
        rounding = 1e-26 * self.count * np.square(self.mean).sum(axis=1)
        total = np.where(total > rounding, total, np.nan)
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


def moments_bytes(num_layers: int, num_sites: int, d_model: int) -> int:
    """Bytes of one moments object, its header aside."""
    per_layer = 4 * d_model + 3  # mean, m2, u_mean, u_m2; norm_sum, max_abs, adjacent_cross
    return 8 * num_sites * len(GROUPS) * (num_layers * per_layer + 1)


class GroupMoments:
    """Moments of one site by layer and group. `Accumulator` fills them from rows."""

    def __init__(self, layers: tuple[int, ...], d_model: int) -> None:
        num_layers, num_groups = len(layers), len(GROUPS)
        self.layers = layers
        self.d_model = d_model
        self.count_G = np.zeros(num_groups, np.int64)
        # Leading axis: x, u.
        self.mean_2LGD = np.zeros((2, num_layers, num_groups, d_model))
        self.m2_2LGD = np.zeros((2, num_layers, num_groups, d_model))
        self.norm_sum_LG = np.zeros((num_layers, num_groups))
        self.max_abs_LG = np.zeros((num_layers, num_groups))
        self.cross_LG = np.zeros((max(num_layers - 1, 0), num_groups))

    @classmethod
    def from_arrays(
        cls, layers: tuple[int, ...], d_model: int, arrays: Mapping[str, npt.NDArray[Any]]
    ) -> "GroupMoments":
        """Moments that were computed elsewhere, on a device for instance.

        Args:
            layers: layer indices, ascending as in the store.
            d_model: channels.
            arrays: the names and shapes of storage_schema.md, section 8, any real data type;
                float64 is kept.

        Raises:
            InputError: a name is missing or unknown, or a shape differs.
        """
        moments = cls(layers, d_model)
        targets = moments.tensors()
        if arrays.keys() != targets.keys():
            raise InputError(
                f"moments must be {', '.join(targets)}, got {', '.join(sorted(arrays))}"
            )
        for name, target in targets.items():
            if arrays[name].shape != target.shape:
                raise InputError(
                    f"moments: {name} must have shape {target.shape}, got {arrays[name].shape}"
                )
            target[...] = arrays[name]
        return moments

    def merge(self, other: "GroupMoments") -> None:
        """Add the rows of `other`."""
        for group in np.flatnonzero(other.count_G).tolist():
            self.merge_group(group, **other._of_group(group))

    def merge_group(
        self,
        group: int,
        count: int,
        *,
        mean_2LD: Float64,
        m2_2LD: Float64,
        norm_sum_L: Float64,
        max_abs_L: Floats,
        cross_L: Float64,
    ) -> None:
        """Add `count` ≥ 1 rows to a group, given their own moments (Chan et al. 1983, eq. 2.1)."""
        total = int(self.count_G[group]) + count
        share = count / total
        weight = int(self.count_G[group]) * share
        delta_2LD = mean_2LD - self.mean_2LGD[:, :, group]
        products_L = np.einsum("ld,ld->l", delta_2LD[0, :-1], delta_2LD[0, 1:])
        self.cross_LG[:, group] += cross_L + products_L * weight
        self.mean_2LGD[:, :, group] += delta_2LD * share
        np.square(delta_2LD, out=delta_2LD)
        delta_2LD *= weight
        delta_2LD += m2_2LD
        self.m2_2LGD[:, :, group] += delta_2LD
        self.norm_sum_LG[:, group] += norm_sum_L
        self.max_abs_LG[:, group] = np.maximum(self.max_abs_LG[:, group], max_abs_L)
        self.count_G[group] = total

    def merge_sums(
        self,
        group: int,
        count: int,
        *,
        centre_2LD: Floats,
        first_2LD: Floats,
        second_2LD: Floats,
        norm_sum_L: Floats,
        max_abs_L: Floats,
        cross_L: Floats,
    ) -> None:
        """Add `count` ≥ 1 rows to a group, given their sums about a centre near their mean.

        The leading axis is x, then u. With S = Σ (x − c): mean = c + S / count and
        m2 = Σ (x − c)² − S² / count (Chan et al. 1983, equation 1.7); cross moments likewise.

        Args:
            group: index into `GROUPS`.
            count: rows.
            centre_2LD: c, any float type like the other sums.
            first_2LD: S.
            second_2LD: Σ (x − c)².
            norm_sum_L: Σ ‖x‖₂.
            max_abs_L: largest |x|.
            cross_L: (L − 1,) Σ ⟨x − c, the same of the next layer⟩.
        """
        first_2LD = first_2LD.astype(np.float64)
        offset_2LD = first_2LD / count
        products_L = np.einsum("ld,ld->l", offset_2LD[0, :-1], offset_2LD[0, 1:])
        first_2LD *= offset_2LD
        self.merge_group(
            group,
            count,
            mean_2LD=centre_2LD + offset_2LD,
            m2_2LD=np.maximum(second_2LD - first_2LD, 0.0),
            norm_sum_L=norm_sum_L,
            max_abs_L=max_abs_L,
            cross_L=cross_L - products_L * count,
        )

    def is_finite(self) -> bool:
        """True if every number is finite, as the moments of finite rows are."""
        return all(bool(np.isfinite(values).all()) for values in self.tensors().values())

    def select(self, groups: Iterable[int]) -> Moments:
        """Merge the named groups into the moments of their union."""
        merged = GroupMoments(self.layers, self.d_model)
        for group in groups:
            if self.count_G[group]:
                merged.merge_group(0, **self._of_group(group))
        count = int(merged.count_G[0])
        return Moments(
            layers=self.layers,
            count=count,
            mean=merged.mean_2LGD[0, :, 0].copy(),
            m2=merged.m2_2LGD[0, :, 0].copy(),
            u_mean=merged.mean_2LGD[1, :, 0].copy(),
            u_m2=merged.m2_2LGD[1, :, 0].copy(),
            norm_mean=merged.norm_sum_LG[:, 0] / max(count, 1),
            max_abs=merged.max_abs_LG[:, 0].copy(),
            adjacent_cross=merged.cross_LG[:, 0].copy(),
        )

    def _of_group(self, group: int) -> dict[str, Any]:
        """Moments of one group, as `merge_group` takes them."""
        return {
            "count": int(self.count_G[group]),
            "mean_2LD": self.mean_2LGD[:, :, group],
            "m2_2LD": self.m2_2LGD[:, :, group],
            "norm_sum_L": self.norm_sum_LG[:, group],
            "max_abs_L": self.max_abs_LG[:, group],
            "cross_L": self.cross_LG[:, group],
        }

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """Name → array, as they lie in a moments object; views."""
        return {
            "count": self.count_G,
            "mean": self.mean_2LGD[0],
            "m2": self.m2_2LGD[0],
            "u_mean": self.mean_2LGD[1],
            "u_m2": self.m2_2LGD[1],
            "norm_sum": self.norm_sum_LG,
            "max_abs": self.max_abs_LG,
            "adjacent_cross": self.cross_LG,
        }


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
    sites = list(sites)
    # Memory is taken by the bytes that are there, whatever a plan says.
    if len(data) < moments_bytes(len(layers), len(sites), d_model):
        raise ValueError(f"too few bytes: {len(data)}")
    try:
        tensors = load_safetensors(data)
    except SafetensorError as error:
        raise ValueError(error) from None
    result = {}
    for site in sites:
        moments = GroupMoments(layers, d_model)
        for name, expected in moments.tensors().items():
            found = tensors[f"{site}/{name}"]
            if found.shape != expected.shape or found.dtype != expected.dtype:
                raise ValueError(
                    f"{site}/{name} has shape {found.shape} of {found.dtype}, "
                    f"not {expected.shape} of {expected.dtype}"
                )
            expected[...] = found
        if (moments.count_G < 0).any() or not moments.is_finite():
            raise ValueError(f"{site} has negative counts, or values that are not finite")
        result[site] = moments
    return result
