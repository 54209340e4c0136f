"""An exact copy of a store: the same bytes, so the same store_id.

Data goes before the record that vouches for it, and each object is hashed while it is read. So a
copy is complete, or visibly incomplete and resumable, like any other store.
"""

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock

from mlsae.base.files import seal
from mlsae.base.interruption import Interruption
from mlsae.base.output.console import Progress
from mlsae.store.copying.manifest import Item, Manifest, sha256
from mlsae.store.copying.target import StoppedError, Target
from mlsae.store.errors import DamagedStoreError, PlanMismatchError, RemoteError
from mlsae.store.read.records import MAX_RECORD_BYTES, read_sealed_object
from mlsae.store.schema import (
    CARD,
    COMPLETE,
    PLAN,
    SETUP,
    commit_record,
    is_provenance,
)
from mlsae.store.write.card import MAX_CARD_BYTES, card_problem
from mlsae.store.write.completion import has_foreign_card, make_card

_AHEAD = 4
"""Objects for each worker that are waited for before more are begun."""
STOPPING = "finishing the files in hand, then stopping; press Ctrl-C again to stop at once"


@dataclass(frozen=True, kw_only=True)
class Mirrored:
    """Result of an exact copy."""

    num_bytes: int
    """Bytes written; 0 where the whole store was there."""
    notes: tuple[str, ...]
    """Things that could not be copied, and things made anew."""


def mirror(
    manifest: Manifest, target: Target, interruption: Interruption, *, progress: bool = True
) -> Mirrored:
    """Copy every byte of a store, or go on with a copy that was stopped.

    Args:
        manifest: manifest of the store.
        target: empty, or with objects that an earlier copy left.
        interruption: says between objects whether to stop.
        progress: show a bar, or lines where there is no terminal.

    Raises:
        NotAStoreError, PlanMismatchError: something else is at the target.
        DamagedStoreError: the source does not have the bytes that its records name.
        ResourceError, RemoteError: the disk is full, a place cannot be reached.
        StoppedError: the user asked to stop; copied objects stay.
    """
    copy = _Copy(manifest, target, interruption)
    if copy.is_there():
        return Mirrored(num_bytes=0, notes=())
    with (
        Progress("copy", copy.bytes_left(), "B", shown=progress) as shown,
        interruption.deferred(STOPPING),
    ):
        copy.run(shown)
    return Mirrored(num_bytes=copy.num_bytes, notes=tuple(copy.notes))


class _Copy:
    def __init__(self, manifest: Manifest, target: Target, interruption: Interruption) -> None:
        self._manifest = manifest
        self._store = manifest.store
        self._target = target
        self._interruption = interruption
        self._has_setup = False
        self._pending: list[int] = []
        self._stop = Event()
        self._lock = Lock()
        self._progress = Progress("copy", 0, "B")
        self.num_bytes = 0
        self.notes: list[str] = []

    def is_there(self) -> bool:
        """True if the whole store is at the target; shards committed there are noted.

        Raises:
            NotAStoreError, PlanMismatchError: something else is.
        """
        manifest = self._manifest
        self._require_this_plan()
        if self._has_same(COMPLETE, sha256(manifest.complete_record)):
            return True
        self._has_setup = self._has_same(SETUP, sha256(manifest.setup_record))
        shards = range(manifest.num_shards)
        with ThreadPoolExecutor(self._target.workers) as pool:
            there = pool.map(self._has_same, map(commit_record, shards), manifest.commit_sha256)
            self._pending = [s for s, is_there in zip(shards, there, strict=True) if not is_there]
        return False

    def bytes_left(self) -> int:
        """Bytes that are to be copied.

        Raises:
            DamagedStoreError: the source lacks an object.
            ResourceError: the disk has no room for them.
        """
        sizes = self._manifest.sizes()
        names = [self._manifest.moments.name]
        if not self._has_setup:
            names += [item.name for item in self._manifest.setup]
        for shard in self._pending:
            names += self._manifest.names(shard)
        left = sum(sizes[name] for name in names)
        self._target.require_room(names, left)
        return left

    def run(self, progress: Progress) -> None:
        """Copy the missing objects, `complete.json` last."""
        self._progress = progress
        manifest, target = self._manifest, self._target
        target.begin()
        target.put(PLAN, manifest.plan_record)
        pool = ThreadPoolExecutor(target.workers, thread_name_prefix="store-copy")
        try:
            if not self._has_setup:
                _finish(self._begin(pool, manifest.setup))
                for name, data in manifest.remade.items():
                    target.put(name, data)
                target.put(SETUP, manifest.setup_record)
            self._copy_shards(pool)
            _finish(self._begin(pool, [manifest.moments]))
        except StoppedError:
            raise
        except BaseException:
            self._stop.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        self._copy_provenance()
        self._copy_card()
        target.put(COMPLETE, manifest.complete_record)

    def _copy_shards(self, pool: ThreadPoolExecutor) -> None:
        """Copy the pending shards; while one ends, the next are under way."""
        underway: deque[tuple[int, bytes, list[Future[None]]]] = deque()

        def settle(most: int) -> None:
            while sum(len(futures) for *_, futures in underway) > most:
                shard, record, futures = underway.popleft()
                _finish(futures)
                self._target.put(commit_record(shard), record)

        for shard in self._pending:
            items, record = self._manifest.shard(shard)
            underway.append((shard, record, self._begin(pool, items)))
            settle(_AHEAD * self._target.workers)
        settle(0)

    def _begin(self, pool: ThreadPoolExecutor, items: Iterable[Item]) -> list[Future[None]]:
        return [pool.submit(self._copy, item) for item in items]

    def _copy(self, item: Item) -> None:
        if self._interruption.requested:
            raise StoppedError
        self._target.receive(item, self._store.objects, self._count, self._stop)

    def _count(self, num_bytes: int) -> None:
        with self._lock:
            self.num_bytes += num_bytes
            self._progress.update(num_bytes)

    def _copy_provenance(self) -> None:
        """Copy the records of the runs; each carries its own checksum."""
        objects = self._store.objects
        try:
            names = [name for name, _ in objects.walk() if is_provenance(name)]
        except RemoteError as error:
            self.notes.append(f"provenance was not copied: {error}")
            return
        for name in sorted(names):
            self._target.put(name, seal(read_sealed_object(objects, name)))

    def _copy_card(self) -> None:
        """Copy the card, which its owner may have written; make it anew where there is none."""
        store, target = self._store, self._target
        if has_foreign_card(target.objects):
            return
        try:
            card = store.objects.read(CARD, MAX_CARD_BYTES)
        except (FileNotFoundError, DamagedStoreError):
            card = None
        problem = None if card is None else card_problem(card)
        if card is None or problem is not None:
            here = target.objects if target.objects.is_local else store.objects
            card = make_card(
                Path(here.place), store.plan, store.store_id, self._manifest.object_names()
            )
        if problem is not None:
            self.notes.append(f"{CARD} was made anew: that of {store.place} {problem}")
        target.put(CARD, card)

    def _require_this_plan(self) -> None:
        place, present = self._target.objects.place, self._target.plan()
        if present is not None and present != self._store.plan:
            lines = present.differences(self._store.plan)
            raise PlanMismatchError(
                f"{place} holds another store ({'; '.join(lines[:3])}); give another place"
            )

    def _has_same(self, name: str, digest: str) -> bool:
        """True if the target has this record.

        Raises:
            PlanMismatchError: the target has another record of that name.
        """
        try:
            data = self._target.objects.read(name, MAX_RECORD_BYTES)
        except FileNotFoundError:
            return False
        if sha256(data) != digest:
            raise PlanMismatchError(
                f"{self._target.objects.place} holds another store of the same plan: its {name} "
                f"differs; give another place"
            )
        return True


def _finish(futures: Iterable[Future[None]]) -> None:
    for future in futures:
        future.result()
