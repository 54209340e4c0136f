"""Moments of a shard's rows, summed where the transformer computed them.

On a CPU, threads each take every n-th piece of some rows and compute alone: a team of threads that
share every operation waits after each for its slowest member, and operations on a piece are as
short as that wait.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlsae.harvest.compute.codecs import Codecs, Key, StoredTensors
from mlsae.harvest.compute.layer_sums import Run, Tables
from mlsae.store.format.accumulate import Block, blocks_of
from mlsae.store.format.moments import Floats, GroupMoments

PIECE_VALUES = {"cpu": 3 << 17, "cuda": 1 << 26}
"""Values of a piece, all layers of a site. On a CPU 1.3 ns each; in pieces of a quarter, with
tables that nearly fit into a core's own cache, 1.7 ns, for the interpreter weighs more."""
LEAST_ROWS = 16
"""Rows of a piece, however wide: work done once a piece and column must not outweigh its rows."""
MOST_THREADS = 4
"""More would only wait for the interpreter's lock."""


class RunningMoments:
    """Moments by group of every site and layer, of the rows added since the last `take`.

    Equal to the last bit at equal `num_threads`.

    Args:
        codecs: codec of each site and layer.
        sites: sites of the store.
        layers: layers of the store, ascending.
        d_model: channels.
        num_threads: at most so many sum rows on a CPU; None for the calling thread, which is right
            where a GPU does the work.
    """

    def __init__(
        self,
        codecs: Codecs,
        sites: Sequence[str],
        layers: Sequence[int],
        d_model: int,
        num_threads: int | None,
    ) -> None:
        self._sites, self._layers, self._d_model = tuple(sites), tuple(layers), d_model
        self._shares = [
            _Share(codecs, self._sites, self._layers, d_model)
            for _ in range(max(1, min(num_threads or 1, MOST_THREADS)))
        ]
        self._pool = (
            None
            if num_threads is None
            else ThreadPoolExecutor(len(self._shares), thread_name_prefix="moments")
        )

    def add(
        self, group_N: npt.NDArray[np.int8], stored: Mapping[Key, StoredTensors]
    ) -> dict[Key, Tensor]:
        """Add a batch.

        Args:
            group_N: index into `mlsae.store.format.moments.GROUPS` of each row.
            stored: (site, layer) → rows as they will be stored, on any device.

        Returns:
            For each key the largest magnitude, a scalar on its device; not finite where a value is
            not.
        """
        kind = stored[self._sites[0], self._layers[0]][0].device.type
        values = PIECE_VALUES.get(kind, PIECE_VALUES["cpu"])
        rows = max(LEAST_ROWS, values // (self._d_model * len(self._layers)))
        blocks = blocks_of(group_N, rows)
        if self._pool is None:
            return self._shares[0].add(blocks, stored)
        num_shares = len(self._shares)
        with each_alone():
            underway = [
                self._pool.submit(share.add, blocks[place::num_shares], stored)
                for place, share in enumerate(self._shares)
            ]
            found = [future.result() for future in underway]
        return {key: torch.stack([of[key] for of in found]).amax(dim=0) for key in found[0]}

    def take(self) -> dict[str, GroupMoments]:
        """Moments so far, on the host; the next batch begins anew."""
        moments = {site: GroupMoments(self._layers, self._d_model) for site in self._sites}
        for share in self._shares:
            share.give_to(moments)
        return moments


class _Share:
    """Sums of one thread."""

    def __init__(
        self, codecs: Codecs, sites: tuple[str, ...], layers: tuple[int, ...], d_model: int
    ) -> None:
        self._codecs = codecs
        self._sites, self._layers, self._d_model = sites, layers, d_model
        self._runs: dict[str, list[Run]] = {}

    @torch.inference_mode()
    def add(
        self, blocks: Sequence[Block], stored: Mapping[Key, StoredTensors]
    ) -> dict[Key, Tensor]:
        """Largest magnitude of each key, a scalar on its device."""
        if not self._runs:
            self._runs = self._begin(stored)
        runs = [run for of_site in self._runs.values() for run in of_site]
        for run in runs:
            run.clear_largest()
        devices = {run.largest_L.device for run in runs}
        for (group, rows), picked in zip(blocks, _pickers(blocks, devices), strict=True):
            for of_site in self._runs.values():
                below_ND = None
                for run in of_site:
                    below_ND = run.add(group, stored, picked, len(rows), below_ND)
        return {
            key: largest
            for run in runs
            for key, largest in zip(run.keys, run.largest_L, strict=True)
        }

    def give_to(self, moments: Mapping[str, GroupMoments]) -> None:
        """Merge the sums into a site's moments, and begin anew."""
        for site, runs in self._runs.items():
            for group in runs[0].sums:
                all_sums = [run.sums[group] for run in runs]
                columns_4LD = _on_host([sums.columns for sums in all_sums], 1)
                moments[site].merge_sums(
                    group,
                    all_sums[0].count,
                    centre_2LD=_on_host([sums.centre[:, :, 0] for sums in all_sums], 1),
                    first_2LD=columns_4LD[::2],
                    second_2LD=columns_4LD[1::2],
                    norm_sum_L=_on_host([sums.norm for sums in all_sums], 0),
                    max_abs_L=_on_host([sums.max_abs for sums in all_sums], 0),
                    cross_L=_on_host([sums.cross for sums in all_sums], 0)[1:],
                )
            for run in runs:
                run.sums = {}

    def _begin(self, stored: Mapping[Key, StoredTensors]) -> dict[str, list[Run]]:
        tables: dict[tuple[torch.device, int, int], Tables] = {}
        found: dict[str, list[Run]] = {}
        for site in self._sites:
            found[site] = []
            for device, keys in runs_of([(site, layer) for layer in self._layers], stored):
                # Sites take turns, so that they share tables.
                at = device, keys[0][1], len(keys)
                if at not in tables:
                    tables[at] = Tables(len(keys), self._d_model, device)
                found[site].append(Run(keys, self._codecs, self._d_model, tables[at]))
        return found


def runs_of(
    keys: Sequence[Key], stored: Mapping[Key, StoredTensors]
) -> Iterator[tuple[torch.device, list[Key]]]:
    """Neighbours whose rows are on one device."""
    for device, run in groupby(keys, lambda key: stored[key][0].device):
        yield device, list(run)


def _pickers(
    blocks: Sequence[Block], devices: set[torch.device]
) -> Iterator[Callable[[Tensor], Tensor]]:
    """For each block a function that takes its rows; a view where they follow one another."""
    if not blocks:
        return
    all_rows = torch.from_numpy(np.concatenate([rows for _, rows in blocks]))
    # Copied to a GPU once: each copy makes the host wait.
    everywhere = {device: all_rows.to(device) for device in devices}
    start = 0
    for _, rows in blocks:
        stop = start + len(rows)
        if rows[-1] - rows[0] == len(rows) - 1:
            yield itemgetter(slice(int(rows[0]), int(rows[-1]) + 1))
        else:
            yield _picker({device: index[start:stop] for device, index in everywhere.items()})
        start = stop


def _picker(index: Mapping[torch.device, Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda part: part.index_select(0, index[part.device])


def _on_host(parts: Sequence[Tensor], dim: int) -> Floats:
    values: Floats = torch.cat([part.cpu() for part in parts], dim).numpy()
    return values


@contextmanager
def each_alone() -> Iterator[None]:
    """Operations of any thread use that thread alone: others have work of their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
