"""The directory of `mlsae events`: its plan, the parts that are there, and their sums.

    events.json                  the plan: inputs and settings, sealed before the first part
    events/layer-<l>/part-<first row>.parquet
    parts/layer-<l>/part-<first row>.json   record of a part, written when the part is durable
    complete.json                all records and their sums

Version 0.4 had activations.json and the folder activations, which are read as well.

Nothing in the directory depends on who wrote it, on the number of processes, or on the time.
"""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlsae.analyze.results.directory import EVENTS_NAME, FORMERLY
from mlsae.analyze.results.records import (
    PartRecord,
    RecordedPlan,
    check_part,
    part_record,
    totals_of,
)
from mlsae.analyze.results.tables import check_version
from mlsae.base.directories import content_of, is_systems_own, require_outside_stores
from mlsae.base.errors import InputError
from mlsae.base.files import (
    DamagedFileError,
    read_sealed,
    remove_stale_partials,
    seal,
    sha256_file,
    write_durably,
    write_new_durably,
)
from mlsae.base.units import portion

KIND = "mlsae events"
COMPLETE = "complete.json"
RECORDS = "parts"
PLACES = ("cache", "sae")
"""Keys of the plan for the places of inputs, which may change."""


class EventsDirectory:
    """The directory at `path`, there or not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._name = FORMERLY if (path / f"{FORMERLY}.json").exists() else EVENTS_NAME
        self.data = path / self._name
        """Folder of the data set."""
        self.plan_file = path / f"{self._name}.json"
        """File of the plan."""

    @property
    def is_begun(self) -> bool:
        """True once the plan is written."""
        return self.plan_file.exists()

    @property
    def is_complete(self) -> bool:
        """True once every part was there."""
        return (self.path / COMPLETE).exists()

    def begin(self, plan: RecordedPlan) -> None:
        """Make the directory, or require that its plan is the same.

        Raises:
            InputError: the directory holds something else, or events of another plan.
        """
        self.check_usable()
        if not self.is_begun:
            self.path.mkdir(parents=True, exist_ok=True)
            write_new_durably(self.plan_file, seal(plan.to_json()))
        remove_stale_partials(self.path)
        self.check_plan(plan)

    def check_usable(self) -> None:
        """Require that the directory is absent or empty, or holds events.

        Raises:
            InputError: the directory holds something else.
        """
        require_outside_stores(self.path, "--out")
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--out {self.path} is a file; give a directory")
        # A process that is killed at its beginning leaves nothing but temporary files.
        names = content_of(self.path)
        if names and not self.is_begun:
            raise InputError(
                f"--out {self.path} holds other things than events ({names[0]}); give a "
                f"directory that is empty or absent"
            )

    def plan(self) -> RecordedPlan:
        """Inputs and settings of the events.

        Raises:
            InputError: no plan is there, a damaged one, or one of another major version.
        """
        content = self._content()
        check_version(content["tables_version"], self.path, "make them again with mlsae events")
        return RecordedPlan.from_json(content)

    def check_plan(self, plan: RecordedPlan) -> None:
        """Require that the recorded plan is `plan`, apart from the places of inputs.

        Raises:
            InputError: settings differ; the message names all of them.
        """
        there, here = self._content(), plan.to_json()
        if there["tables_version"] != plan.tables_version:
            raise InputError(
                f"--out {self.path} was begun with tables of version {there['tables_version']}, "
                f"this mlsae writes {plan.tables_version}: go on with the mlsae that began it, "
                f"or give another directory"
            )
        # Numbers follow from the other settings, so they come last.
        keys = sorted(
            (there.keys() | here.keys()) - set(PLACES), key=lambda key: ("num_" in key, key)
        )
        if differences := [
            f"{key} is {_brief(there.get(key))} there, {_brief(here.get(key))} here"
            for key in keys
            if there.get(key) != here.get(key)
        ]:
            raise InputError(
                f"--out {self.path} was begun with other settings: {'; '.join(differences)}; give "
                f"those again, or another directory"
            )

    def record(self, path: str) -> PartRecord | None:
        """The record of a part, or None before the part is written.

        Raises:
            InputError: the record is damaged, or belongs to other events.
        """
        place = self._place(path)
        if not place.exists():
            return None
        content = _read(place)
        if content["plan"] != self._digest() or content["part"]["path"] != path:
            raise InputError(
                f"{place} records a part of other events; remove it and run the same command again"
            )
        return part_record(content["part"])

    def keep(self, record: PartRecord) -> None:
        """Record a part that is durable."""
        place = self._place(record.path)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_durably(place, seal({"plan": self._digest(), "part": asdict(record)}))

    def pending(self, paths: Iterable[str]) -> list[str]:
        """Paths, among `paths`, whose file or record is missing."""
        return [
            path
            for path in paths
            if not (self._place(path).exists() and (self.data / path).exists())
        ]

    def progress(self) -> tuple[int, int]:
        """Numbers of recorded parts and of all parts."""
        there = sum(1 for _ in (self.path / RECORDS).rglob("*.json"))
        return there, self.plan().num_parts

    def check_foreign(self, paths: Iterable[str]) -> None:
        """Require that the data set holds no file but the parts at `paths`.

        Raises:
            InputError: there is another file; the message names it.
        """
        known = {self.data / path for path in paths}
        for file in sorted(self.data.rglob("*")):
            if file.is_file() and file not in known and not is_systems_own(file.name):
                raise InputError(
                    f"{file} does not belong to the events in {self.path}: move it away and run "
                    f"the same command again"
                )

    def check_whole(self, path: str) -> None:
        """Require that every byte of a part is as recorded.

        Raises:
            InputError: the bytes differ, or the record belongs to other events.
        """
        if (record := self.record(path)) is not None:
            check_part(self.data, record, every_byte=True)

    def complete(self, paths: Iterable[str]) -> None:
        """Record that all parts are there, and their sums."""
        records = [record for path in paths if (record := self.record(path)) is not None]
        write_durably(
            self.path / COMPLETE,
            seal({"plan": self._digest(), EVENTS_NAME: totals_of(records)}),
        )

    def totals(self) -> dict[str, Any]:
        """Sums over the parts, and the records of all.

        Raises:
            InputError: parts are missing, or their sums are damaged or those of other events.
        """
        if not self.is_complete:
            there, total = self.progress()
            raise InputError(
                f"{self.path} is unfinished: {portion(there, total, 'part')} "
                f"there; run the same mlsae events again to go on"
            )
        content = _read(self.path / COMPLETE)
        if content["plan"] != self._digest():
            raise InputError(
                f"{self.path / COMPLETE} was written for other events; remove it and run the "
                f"same command again"
            )
        return dict(content[self._name])

    def _content(self) -> dict[str, Any]:
        """JSON of the plan, of any version."""
        if not self.is_begun:
            raise InputError(
                f"{self.path} holds no events: it has no {self.plan_file.name}; make them with "
                f"mlsae events"
            )
        content, kind = _read(self.plan_file), f"mlsae {self._name}"
        if content.get("kind") != kind:
            raise InputError(
                f"{self.path} holds no events: the kind in its {self.plan_file.name} is "
                f"{content.get('kind')!r}, expected {kind!r}"
            )
        return content

    def _place(self, path: str) -> Path:
        return (self.path / RECORDS / path).with_suffix(".json")

    def _digest(self) -> str:
        return sha256_file(self.plan_file)


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_sealed(path)
    except DamagedFileError as error:
        raise InputError(f"{error} with mlsae events") from None


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
