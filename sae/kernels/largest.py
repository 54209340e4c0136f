"""The largest values of each row on a CPU, by numpy's vectorised partition.

A value and its place go into one integer, value above and place below, so that a partition of
integers, which numpy runs in the widest registers there are, yields the places as well.

Shape suffixes: B rows, N latents, G groups, K selected latents.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]

GROUP = 16
"""Latents in a group of the two-stage selection: measured best of 8, 16, 32 and 64 on CPUs."""
_ROWS = 32
"""Rows at once: few enough that intermediate arrays stay in the cache of a core."""
_PLACE_BITS = 32
"""Bits of a place beside a value of 16 or 32 bits in an int64; 16 do where they hold it."""


def supports(pre_BN: torch.Tensor) -> bool:
    """True for a tensor that `largest` takes: bfloat16 or float32, on a CPU."""
    return pre_BN.device.type == "cpu" and pre_BN.dtype in (torch.bfloat16, torch.float32)


def largest(pre_BN: torch.Tensor, k: int, pool: ThreadPoolExecutor, out_BK: torch.Tensor) -> None:
    """Write the places of each row's k largest values, in no order; among equal values any choice.

    bfloat16 values are compared by their bits: values above 0 in their order, then all others in
    none, because a ReLU follows.

    Args:
        pre_BN: (B, N) float32 or bfloat16, contiguous, on the CPU.
        k: number of indices, at most N.
        pool: threads that share the rows.
        out_BK: (B, K) int64.
    """
    bits = pre_BN.view(torch.int16) if pre_BN.dtype == torch.bfloat16 else pre_BN
    values, out = bits.numpy(), out_BK.numpy()
    choose = _by_groups if _has_groups(values.shape[1], k) else _in_full
    shares = [slice(i, i + _ROWS) for i in range(0, len(values), _ROWS)]

    def work(rows: slice) -> None:
        choose(values[rows], k, out[rows])

    # One thread would only pass the interpreter's lock to and fro with this one.
    run: Callable[..., Any] = pool.map if torch.get_num_threads() > 1 else map
    for _ in run(work, shares):
        pass


def _has_groups(num_latents: int, k: int) -> bool:
    return num_latents % GROUP == 0 and num_latents // GROUP >= 4 * k


def _by_groups(values_BN: Array, k: int, out_BK: Array) -> None:
    # A row's k largest lie in the k groups with the largest maxima: any value outside is at most
    # the maximum of each of those k groups. A group's members lie num_groups apart, so that its
    # maximum is taken over whole vectors.
    num_rows, num_latents = values_BN.shape
    num_groups = num_latents // GROUP
    maxima_BG = np.maximum.reduce(values_BN.reshape(num_rows, GROUP, num_groups), axis=1)
    groups_BK = _places(maxima_BG, k)
    first = np.arange(0, num_rows * num_latents, num_latents)[:, None, None]
    members = np.arange(0, num_latents, num_groups)[None, :, None]
    at = (groups_BK[:, None, :] + (first + members)).reshape(num_rows, -1)
    # mode="clip" spares a check of indices that are in range.
    chosen_BK = _places(np.take(values_BN.reshape(-1), at, mode="clip"), k)
    np.subtract(np.take_along_axis(at, chosen_BK, axis=1), first[:, 0], out=out_BK)


def _in_full(values_BN: Array, k: int, out_BK: Array) -> None:
    out_BK[:] = _places(values_BN, k)


def _places(values_BN: Array, k: int) -> npt.NDArray[np.int64]:
    num_values = values_BN.shape[1]
    # An int32 is partitioned twice as fast, and holds a value of 16 bits with a place of 16.
    is_narrow = values_BN.dtype == np.int16 and num_values <= 1 << 16
    key_type, bits = (np.int32, 16) if is_narrow else (np.int64, _PLACE_BITS)
    keys: Array
    if values_BN.dtype == np.float32:
        integers = values_BN.view(np.int32)
        # The order of negative floats is the reverse of their bits'.
        values_BN = integers ^ ((integers >> 31) & 0x7FFFFFFF)
    keys = values_BN.astype(key_type)
    keys <<= bits
    keys |= np.arange(num_values, dtype=key_type)
    keys.partition(num_values - k, axis=1)
    places = keys[:, num_values - k :].astype(np.int64)
    places &= (1 << bits) - 1
    return places
