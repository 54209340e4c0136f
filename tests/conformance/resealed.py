"""A store as a mapping from names to bytes, to be changed and sealed again.

So that a case breaks one rule alone, everything that depends on what was changed is made right
again: hashes in records, plan_id wherever it stands, store_id.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
SETUP, COMPLETE, PLAN = "commits/setup.json", "complete.json", "plan.json"
LENGTH, WIDTH = 6, 3
"""Tokens of a sequence, and channels of an activation unless a store says otherwise."""


def canonical(value: Any) -> bytes:
    """Canonical JSON, from the specification's own words."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def sha256(data: bytes) -> str:
    """Hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sealed(content: Record) -> bytes:
    """Bytes of a sealed record."""
    return canonical({**content, "sha256": sha256(canonical(content))}) + b"\n"


class Files(dict[str, bytes]):
    """Name → bytes of every object of a store."""

    @classmethod
    def read(cls, path: Path) -> "Files":
        """Files of a store on disk."""
        files = (file for file in path.rglob("*") if file.is_file())
        return cls({file.relative_to(path).as_posix(): file.read_bytes() for file in files})

    def write(self, path: Path) -> None:
        """To an absent directory."""
        for name, data in sorted(self.items()):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)

    def record(self, name: str) -> Record:
        """The content of a record, without its seal."""
        content: Record = json.loads(self[name])
        del content["sha256"]
        return content

    def edit(self, name: str, change: Callable[[Record], object]) -> None:
        """Change a record and seal it again; what depends on it is left alone."""
        content = self.record(name)
        change(content)
        self[name] = sealed(content)

    def edit_json(self, name: str, change: Callable[[Record], object]) -> None:
        """Change JSON that carries no seal."""
        content: Record = json.loads(self[name])
        change(content)
        self[name] = json.dumps(content, indent=2).encode() + b"\n"

    def flip(self, name: str, at: int) -> None:
        """Flip the lowest bit of a byte."""
        data = bytearray(self[name])
        data[at] ^= 1
        self[name] = bytes(data)

    def commits(self) -> list[str]:
        """Names of the commit records."""
        return sorted(n for n in self if n.startswith("commits/") and n != SETUP)

    def reseal(self) -> None:
        """Make right whatever depends on plan, metadata, objects and moments."""
        plan_id = sha256(canonical(self.record(PLAN)))
        version = self.record(PLAN)["schema_version"]
        about = {"schema_version": version, "plan_id": plan_id}
        self.edit_json("zarr.json", lambda group: group["attributes"].update(mlsae=about))
        metadata = {name: sha256(self[name]) for name in self if name.endswith("zarr.json")}
        self.edit(SETUP, lambda record: record.update(plan_id=plan_id, metadata=metadata))
        objects: dict[str, str] = {}
        for name in (SETUP, *self.commits()):
            named = self.record(name)["objects"]
            named = {key: sha256(self[key]) if key in self else named[key] for key in named}
            self.edit(name, lambda record, named=named: record.update(objects=named))
            objects.update(named)
        for name in self.commits():
            moments = name.replace("commits/", "moments/").replace(".json", ".safetensors")
            digest = sha256(self[moments])
            self.edit(name, lambda r, d=digest: r.update(plan_id=plan_id, moments_sha256=d))
        store_id = sha256(canonical([plan_id, sorted(map(list, objects.items()))]))
        digest = sha256(self["moments.safetensors"])
        self.edit(
            COMPLETE,
            lambda r: r.update(plan_id=plan_id, store_id=store_id, moments_sha256=digest),
        )
