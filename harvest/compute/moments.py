"""Moments of a shard's rows, summed where the transformer computed them.

On a CPU, threads each take every n-th piece of some rows and compute alone: a team of threads that
share every operation waits after each for its slowest member, and operations on a piece are as
short as that wait.

Shape suffixes: L layers, N rows, D channels.
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

from mlsae.base.words import Key
from mlsae.harvest.compute.codecs import Codecs, StoredTensors
from mlsae.harvest.compute.layer_sums import Run, Tables, merge_runs
from mlsae.store.format.accumulate import GroupRows, blocks_of
from mlsae.store.format.moments import GroupMoments

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
        self._codecs, self._d_model = codecs, d_model
        self._sites, self._layers = tuple(sites), tuple(layers)
        self._num_shares = max(1, min(num_threads or 1, MOST_THREADS))
        self._pool = None
        if num_threads is not None:
            self._pool = ThreadPoolExecutor(self._num_shares, thread_name_prefix="moments")
        self._shares: list[list[Run]] = []
        """Runs of all sites, for each thread."""

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
        if not self._shares:
            self._shares = [self._runs(stored) for _ in range(self._num_shares)]
        kind = stored[self._sites[0], self._layers[0]][0].device.type
        values = PIECE_VALUES.get(kind, PIECE_VALUES["cpu"])
        rows = max(LEAST_ROWS, values // (self._d_model * len(self._layers)))
        blocks = blocks_of(group_N, rows)
        dealt = [(share, blocks[i :: self._num_shares]) for i, share in enumerate(self._shares)]
        if self._pool is None:
            _add(*dealt[0], stored)
        else:
            with each_alone():
                for future in [self._pool.submit(_add, *pieces, stored) for pieces in dealt]:
                    future.result()
        largest: dict[Key, Tensor] = {}
        for same in zip(*self._shares, strict=True):
            most_L = torch.stack([run.largest_L for run in same]).amax(dim=0)
            largest.update(zip(same[0].keys, most_L, strict=True))
        return largest

    def take(self) -> dict[str, GroupMoments]:
        """Moments so far, on the host; the next batch begins anew."""
        moments = {site: GroupMoments(self._layers, self._d_model) for site in self._sites}
        for share in self._shares:
            for site, of_site in moments.items():
                merge_runs([run for run in share if run.keys[0][0] == site], of_site)
        return moments

    def _runs(self, stored: Mapping[Key, StoredTensors]) -> list[Run]:
        runs = []
        tables: dict[tuple[torch.device, int, int], Tables] = {}
        for site in self._sites:
            for device, keys in runs_of([(site, layer) for layer in self._layers], stored):
                # Sites take turns, so that they share tables.
                at = device, keys[0][1], len(keys)
                if at not in tables:
                    tables[at] = Tables(len(keys), self._d_model, device)
                is_lowest = keys[0][1] == self._layers[0]
                runs.append(Run(keys, self._codecs, self._d_model, tables[at], is_lowest=is_lowest))
        return runs


@torch.inference_mode()
def _add(
    runs: Sequence[Run], blocks: Sequence[GroupRows], stored: Mapping[Key, StoredTensors]
) -> None:
    """Add some blocks of a batch to the sums of one thread."""
    for run in runs:
        run.clear_largest()
    devices = {run.largest_L.device for run in runs}
    for (group, rows), picked in zip(blocks, _pickers(blocks, devices), strict=True):
        below_ND = None
        for run in runs:
            below_ND = run.add(group, stored, picked, len(rows), below_ND)


def runs_of(
    keys: Sequence[Key], stored: Mapping[Key, StoredTensors]
) -> Iterator[tuple[torch.device, list[Key]]]:
    """Neighbours whose rows are on one device."""
    for device, run in groupby(keys, lambda key: stored[key][0].device):
        yield device, list(run)


def _pickers(
    blocks: Sequence[GroupRows], devices: set[torch.device]
) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function for each block, which takes the block's rows; consecutive rows as a view."""
    if not blocks:
        return
    all_rows = torch.from_numpy(np.concatenate([rows for _, rows in blocks]))
    # Copied once, and from pinned memory: the host would wait for each other copy to a GPU.
    everywhere = {
        device: (all_rows.pin_memory() if device.type == "cuda" else all_rows).to(
            device, non_blocking=True
        )
        for device in devices
    }
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


@contextmanager
def each_alone() -> Iterator[None]:
    """Operations of any thread use that thread alone: others have work of their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
