"""One shard of every array while its rows arrive: pieces go straight to the files, open together.

So a few batches are all that lies in memory, however many layers there are and however large a
shard is. Every method may run in any thread; the writer decides the order.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, wait
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsae.base.words import Key
from mlsae.store.errors import NotFiniteError
from mlsae.store.format.accumulate import Accumulator
from mlsae.store.format.encoding import SiteCodec, Stored
from mlsae.store.format.moments import GroupMoments
from mlsae.store.plan import Plan
from mlsae.store.read.records import Producer
from mlsae.store.write.commit import commit_shard
from mlsae.store.write.shardfile import ShardFile


class OpenShard:
    """Files and moments of one shard.

    Args:
        path: the store.
        plan: plan of the store.
        shard: index of the shard.
        codecs: site → how its rows are held.
        cached: argument of `ShardFile`.
    """

    def __init__(
        self,
        path: Path,
        plan: Plan,
        shard: int,
        codecs: Mapping[str, SiteCodec],
        *,
        cached: bool,
    ) -> None:
        self.shard = shard
        self._path, self._plan = path, plan
        self._moments = {
            site: Accumulator(plan.layers, plan.d_model, codecs[site]) for site in plan.sites
        }
        self._specs = {key: plan.activation_arrays(*key) for key in plan.keys}
        self._files: dict[str, ShardFile] = {}
        try:
            for specs in self._specs.values():
                for spec in specs:
                    path_of_shard = path / spec.object(shard)
                    self._files[spec.name] = ShardFile(path_of_shard, spec, cached=cached)
        except BaseException:
            self.abandon()
            raise

    def jobs(
        self, stored: Mapping[Key, Stored], groups: npt.NDArray[np.int8] | None
    ) -> list[Callable[[], None]]:
        """Work to be done for some rows; in any order, but before the next rows' jobs.

        Args:
            stored: (site, layer) → n stored rows.
            groups: (n,) group of each row; None where `commit` is given the moments of these rows.
        """
        jobs: list[Callable[[], None]] = []
        if groups is not None:
            # One thread a site, and first: two would cost each other as much as they save, as
            # each step is so short.
            for site, of_site in self._moments.items():
                stored_L = [stored[site, layer] for layer in self._plan.layers]
                jobs.append(partial(_accumulate, of_site, groups, stored_L))
        for key, specs in self._specs.items():
            for spec, values in zip(specs, stored[key], strict=True):
                jobs.append(partial(self._files[spec.name].write, np.ascontiguousarray(values)))
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
            pool: threads that wait for the disk.
            producer: device and versions that computed the rows, for the record.
            moments: site → moments of the rows that were not summed here.
            added_fvu: cost of the encoding, for the record.

        Returns:
            Bytes of the files.
        """
        flushed = [pool.submit(file.commit) for file in self._files.values()]
        wait(flushed)
        names = self._plan.shard_objects(self.shard)
        objects = {name: done.result() for name, done in zip(names, flushed, strict=True)}
        for site, given in moments.items():
            self._moments[site].merge(given)
        commit_shard(
            self._path, self._plan, self.shard, objects, self._moments, producer, added_fvu
        )
        return sum(file.num_bytes for file in self._files.values())

    def abandon(self) -> None:
        """Remove files that were written and not committed."""
        for file in self._files.values():
            file.abandon()


def _accumulate(
    moments: Accumulator, groups: npt.NDArray[np.int8], stored_L: Sequence[Stored]
) -> None:
    if not moments.add(groups, stored_L):
        raise NotFiniteError
