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

from mlsae.store.errors import NotFiniteError
from mlsae.store.format.accumulate import Accumulator
from mlsae.store.format.compression import compressor_of
from mlsae.store.format.encoding import Part, Parts, SiteCodec, parts_of
from mlsae.store.format.moments import GroupMoments
from mlsae.store.read.commits import Producer
from mlsae.store.schema import chunk_key
from mlsae.store.write.commit import commit_shard
from mlsae.store.write.shardfile import ShardFile

Key = tuple[str, int]


class OpenShard:
    """Files and moments of one shard.

    Args:
        path: the store.
        plan: its plan.
        shard: index of the shard.
        keys: (site, layer) of all, in the plan's order.
        codecs: site → how its rows are held.
        cached: as for a `ShardFile`.
    """

    def __init__(
        self,
        path: Path,
        plan: Mapping[str, Any],
        shard: int,
        keys: Sequence[Key],
        codecs: Mapping[str, SiteCodec],
        *,
        cached: bool,
    ) -> None:
        self.shard = shard
        self._path, self._plan, self._keys = path, plan, keys
        self._layers = tuple(plan["layers"])
        self._parts = parts_of(plan["encoding"], plan["d_model"])
        self._moments = {
            site: Accumulator(self._layers, plan["d_model"], codecs[site]) for site in plan["sites"]
        }
        self._files: dict[tuple[Key, Part], ShardFile] = {}
        try:
            for key in keys:
                for part in self._parts:
                    self._files[key, part] = ShardFile(
                        path / part.array(*key) / chunk_key(shard, 2),
                        row_bytes=part.row_bytes,
                        chunk_rows=plan["chunk_rows"],
                        shard_rows=plan["shard_rows"],
                        compressor=compressor_of(plan["compression"], part.dtype),
                        cached=cached,
                    )
        except BaseException:
            self.abandon()
            raise

    def jobs(
        self, stored: Mapping[Key, Parts], groups: npt.NDArray[np.int8] | None
    ) -> list[Callable[[], None]]:
        """Work to be done for some rows; in any order, but before the next rows' jobs.

        Args:
            stored: (site, layer) → n stored rows.
            groups: (n,) group of each row; None where `commit` is given the moments of these rows.
        """
        jobs: list[Callable[[], None]] = []
        if groups is not None:
            # One thread a site, and first: two would spend on each other what they save, because
            # each step is so short.
            for site, of_site in self._moments.items():
                stored_L = [stored[site, layer] for layer in self._layers]
                jobs.append(partial(_accumulate, of_site, groups, stored_L))
        for key in self._keys:
            for part, values in zip(self._parts, stored[key], strict=True):
                jobs.append(partial(self._files[key, part].write, np.ascontiguousarray(values)))
        return jobs

    def commit(
        self,
        pool: Executor,
        producer: Producer | None,
        moments: Mapping[str, GroupMoments],
        added_fvu: Mapping[str, Any] | None,
    ) -> int:
        """Make the files durable, several at a time, then the record of the shard.

        Args:
            pool: its threads wait for the disk.
            producer: what computed the rows, for the record.
            moments: site → moments of the rows that were not summed here.
            added_fvu: cost of the encoding, for the record.

        Returns:
            Bytes of the files.
        """
        flushed = {at: pool.submit(file.commit) for at, file in self._files.items()}
        wait(flushed.values())
        objects = {
            f"{part.array(*key)}/{chunk_key(self.shard, 2)}": future.result()
            for (key, part), future in flushed.items()
        }
        for site, given in moments.items():
            self._moments[site].merge(given)
        commit_shard(
            self._path, self._plan, self.shard, objects, self._moments, producer, added_fvu
        )
        return sum(file.num_bytes for file in self._files.values())

    def abandon(self) -> None:
        """Remove what was written and not committed."""
        for file in self._files.values():
            file.abandon()


def _accumulate(
    moments: Accumulator, groups: npt.NDArray[np.int8], stored_L: Sequence[Parts]
) -> None:
    if not moments.add(groups, stored_L):
        raise NotFiniteError
