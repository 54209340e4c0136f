"""One shard of every array while its rows arrive: pieces go straight to the files, open together.

So a few batches are all that lies in memory, however many layers there are and however large a
shard is. Every method runs in whatever thread; the writer decides in which order.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, wait
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsae.store.accumulate import Accumulator, Blocks, blocks_of
from mlsae.store.commit import commit_shard
from mlsae.store.encoding import STORED_DTYPE, check_encoding
from mlsae.store.moments import GroupMoments
from mlsae.store.producers import Producer
from mlsae.store.schema import activation_array, chunk_key
from mlsae.store.shardfile import ShardFile

Array = npt.NDArray[Any]
Key = tuple[str, int]


class NotFiniteError(Exception):
    """Some value of a batch is not finite; the writer finds out which."""


class OpenShard:
    """Files and moments of one shard.

    Args:
        path: the store.
        plan: its plan.
        shard: index of the shard.
        keys: (site, layer) of every array, in the plan's order.
    """

    def __init__(
        self, path: Path, plan: Mapping[str, Any], shard: int, keys: Sequence[Key]
    ) -> None:
        self.shard = shard
        self._path, self._plan, self._keys = path, plan, keys
        self._layers = tuple(plan["layers"])
        encoding = check_encoding(plan["encoding"])
        self._moments = {
            site: Accumulator(self._layers, plan["d_model"], encoding) for site in plan["sites"]
        }
        self._files: dict[Key, ShardFile] = {}
        try:
            for key in keys:
                self._files[key] = ShardFile(
                    path / activation_array(*key) / chunk_key(shard, 2),
                    row_bytes=plan["d_model"] * STORED_DTYPE[encoding].itemsize,
                    chunk_rows=plan["chunk_rows"],
                    shard_rows=plan["shard_rows"],
                )
        except BaseException:
            self.abandon()
            raise

    def jobs(
        self,
        stored: Mapping[Key, Array],
        groups: npt.NDArray[np.int8],
        moments: Mapping[str, GroupMoments] | None,
    ) -> list[Callable[[], None]]:
        """What there is to do for some rows; in any order, but before the next rows' jobs.

        Args:
            stored: (site, layer) → (n, d_model) of the stored data type.
            groups: (n,) group of each row.
            moments: site → moments of these rows; None to compute them.
        """
        jobs: list[Callable[[], None]] = []
        if moments is not None:
            jobs += [partial(self._moments[site].merge, moments[site]) for site in moments]
        else:
            # One thread a site, and first: two would spend on each other what they save, because
            # each step is so short.
            blocks = blocks_of(groups, self._plan["d_model"])
            for site, of_site in self._moments.items():
                stored_L = [stored[site, layer] for layer in self._layers]
                jobs.append(partial(_accumulate, of_site, blocks, stored_L))
        for key in self._keys:
            jobs.append(partial(self._files[key].write, np.ascontiguousarray(stored[key])))
        return jobs

    def commit(self, pool: Executor, producer: Producer | None) -> int:
        """Make the files durable, several at a time, then the record of the shard.

        Returns:
            Bytes of the files.
        """
        flushed = {key: pool.submit(self._files[key].commit) for key in self._keys}
        wait(flushed.values())
        objects = {
            f"{activation_array(*key)}/{chunk_key(self.shard, 2)}": future.result()
            for key, future in flushed.items()
        }
        commit_shard(self._path, self._plan, self.shard, objects, self._moments, producer)
        return sum(file.num_bytes for file in self._files.values())

    def abandon(self) -> None:
        """Remove what was written and not committed."""
        for file in self._files.values():
            file.abandon()


def _accumulate(moments: Accumulator, blocks: Blocks, stored_L: Sequence[Array]) -> None:
    if not moments.add(blocks, stored_L):
        raise NotFiniteError
