"""Run by torchrun: `mlsae events` as a rank, which says how many parts it wrote."""

import sys

from mlsae.analyze.results.events_directory import EventsDirectory
from mlsae.analyze.results.records import PartRecord
from mlsae.base.ranks import Ranks
from mlsae.cli import main


def run() -> None:
    ranks = Ranks.from_environment()
    assert ranks.world_size == 2, f"{ranks.world_size} ranks, not 2"
    written: list[str] = []
    keep = EventsDirectory.keep

    def keep_and_count(self: EventsDirectory, record: PartRecord) -> None:
        written.append(record.path)
        keep(self, record)

    EventsDirectory.keep = keep_and_count  # type: ignore[method-assign]
    main(sys.argv[1:], standalone_mode=False)
    print(f"rank {ranks.rank} of {ranks.world_size} wrote {len(written)} parts", flush=True)


if __name__ == "__main__":
    run()
