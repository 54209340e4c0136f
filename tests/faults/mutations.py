"""Small sound stores, and what a hostile hand could do to one: edits, then hashes made right again.

An edit is plain data, so that a failing case can be printed and tried again.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from mlsae.store import MASKED, PADDING, SPECIAL, Calibrator, create
from mlsae.store.errors import StoreError
from mlsae.store.plancheck import check_plan

PLAN, SETUP, COMPLETE = "plan.json", "commits/setup.json", "complete.json"
KINDS = ("nothing", "directory", "pipe", "zeros", "loop", "nowhere")
"""Kinds of file that `put` can leave where an object should be."""
NEST = "@nest:"
"""A string that begins so is written as brackets nested so many times."""
Edit = tuple[Any, ...]
_SHAPED = (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError)
"""Errors that edits and seals meet in records that other edits have bent."""


def make_store(path: Path, **options: Any) -> Path:
    """A complete store of three shards, the last one short, with flags of every kind."""
    length, sequences = 6, 5
    settings: dict[str, Any] = {"sites": ("resid_post",), "layers": (0, 2), "d_model": 3}
    settings |= {"encoding": "float16", "shard_bytes": 1, "batch_sequences": 2, **options}
    num_tokens, width = length * sequences, settings["d_model"]
    flags = np.zeros(num_tokens, np.uint8)
    flags[[2, 9, 17]] = [SPECIAL, PADDING, MASKED]
    generator = np.random.default_rng(0)
    keys = [(site, layer) for site in settings["sites"] for layer in settings["layers"]]
    values = {
        key: (generator.normal(size=(num_tokens, width)) * (place + 1) + np.arange(width)).astype(
            np.float32
        )
        for place, key in enumerate(keys)
    }
    if settings["encoding"] == "int8":
        calibrator = Calibrator(keys, width)
        calibrator.add(values)
        settings |= {"calibration": calibrator.result(), "max_added_fvu": 1.0}
    with create(
        path,
        tokens=np.arange(num_tokens) * 7 % 23,
        context_length=length,
        documents=np.arange(num_tokens) // 4,
        token_flags=flags,
        source={"model": {"name": "a model", "fingerprint": "ab" * 32}},
        provenance={"started": "2000-01-01", "model": {"name": "a model"}},
        producer={"device": "none"},
        **settings,
    ) as writer:
        tokens = writer.row_tokens(0, writer.num_rows)
        while writer.position is not None:
            rows = slice(writer.position, min(writer.position + length, writer.num_rows))
            writer.append({key: x[tokens[rows]] for key, x in values.items()})
    return path


BASES: dict[str, dict[str, Any]] = {
    "float16": {},
    "bfloat16, two sites": {"encoding": "bfloat16", "sites": ("attn_out", "resid_pre")},
    "float32 zstd": {"encoding": "float32", "compression": "zstd", "d_model": 5},
    "int8 zstd, kept positions": {
        "encoding": "int8",
        "compression": "zstd",
        "d_model": 70,
        "keep_positions": 4,
    },
}


class Files(dict[str, bytes]):
    """Name → bytes of every object of a store."""

    @classmethod
    def read(cls, path: Path) -> "Files":
        """Read a store on disk."""
        found = (file for file in path.rglob("*") if file.is_file())
        files = {file.relative_to(path).as_posix(): file.read_bytes() for file in found}
        # A run's record has a random name, and cases are to be the same each time.
        return cls({re.sub(r"^provenance/.*", "provenance/run.json", n): files[n] for n in files})


def paths_of(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, as keys and indices; hashes by name are many and alike."""
    found = [at]
    if isinstance(value, Mapping):
        for key in list(value)[:12]:
            found += paths_of(value[key], (*at, key))
    elif isinstance(value, list):
        for index in range(min(len(value), 4)):
            found += paths_of(value[index], (*at, index))
    return found


def mutate(base: Files, edits: list[Edit], *, resealed: bool, follow: bool) -> Files:
    """The store after some edits.

    Args:
        base: the store.
        edits: see the functions below.
        resealed: make every hash right that depends on what was changed, as far as it can be.
        follow: also make metadata and names that an altered plan asks for.
    """
    files = Files(base)
    records = {name: json.loads(data) for name, data in base.items() if name.endswith(".json")}
    for name in sealed_names(records):
        records[name].pop("sha256", None)
    raw = [edit for edit in edits if edit[0] != "json"]
    for edit in edits:
        if edit[0] == "json":
            with suppress(*_SHAPED):
                _edit_json(records, *edit[1:])
    if follow:
        with suppress(StoreError, *_SHAPED):
            _follow(files, records)
    for name, record in records.items():
        if name.endswith("zarr.json") and record != json.loads(base.get(name, b"null")):
            files[name] = render(record)
    for edit in raw:
        if edit[1] not in sealed_names(records):
            _edit_bytes(files, edit)
    if resealed:
        _reseal(files, records)
    for name in sealed_names(records):
        files[name] = seal(records[name])
    for edit in raw:
        if edit[1] in sealed_names(records):
            _edit_bytes(files, edit)
    return files


def sealed_names(names: Iterable[str]) -> list[str]:
    """Names of sealed records among `names`."""
    return [name for name in names if name.endswith(".json") and not name.endswith("zarr.json")]


def render(value: Any) -> bytes:
    """Canonical JSON, NaN and nesting included."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    while (at := text.find(f'"{NEST}')) >= 0:
        end = text.index('"', at + 1)
        depth = int(text[at + 1 + len(NEST) : end])
        text = text[:at] + "[" * depth + "]" * depth + text[end + 1 :]
    return text.encode()


def seal(content: Any) -> bytes:
    """A sealed object; what is no object stays without a seal."""
    if not isinstance(content, dict):
        return render(content) + b"\n"
    content = {key: value for key, value in content.items() if key != "sha256"}
    return render({**content, "sha256": hashlib.sha256(render(content)).hexdigest()}) + b"\n"


def _edit_json(
    records: dict[str, Any], name: str, path: tuple[Any, ...], how: str, to: Any
) -> None:
    if not path:
        records[name] = to
        return
    place = records[name]
    for key in path[:-1]:
        place = place[key]
    key = path[-1]
    if how == "set":
        place[key] = to
    elif how == "delete":
        del place[key]
    elif how == "rename":
        place[str(to)] = place.pop(key)
    elif how == "add":
        place[key][str(to)] = to
    elif how == "times" and type(place[key]) is int:
        place[key] *= to


def _edit_bytes(files: Files, edit: Edit) -> None:
    how, name, *rest = edit
    data = bytearray(files.get(name, b""))
    with suppress(*_SHAPED):
        files[name] = bytes(_BYTES[how](data, *rest))


def _splice(data: bytearray, at: int, new: bytes) -> bytearray:
    at %= len(data) or 1
    data[at : at + len(new)] = new
    return data


def _index(data: bytearray, chunk: int, column: int, value: int) -> bytearray:
    """Set an entry of a shard's index, its checksum made right. The shards here have few chunks."""
    num_chunks = _chunks_of(data)
    start = len(data) - 4 - 16 * num_chunks
    at = start + 16 * (chunk % num_chunks) + 8 * column
    data[at : at + 8] = value.to_bytes(8, "little")
    data[-4:] = google_crc32c.value(bytes(data[start:-4])).to_bytes(4, "little")
    return data


def _chunk(data: bytearray, chunk: int, at: int, new: bytes) -> bytearray:
    """Overwrite bytes of a chunk, its checksum made right."""
    num_chunks = _chunks_of(data)
    entry = len(data) - 4 - 16 * num_chunks + 16 * (chunk % num_chunks)
    offset, size = (int.from_bytes(data[entry + i : entry + i + 8], "little") for i in (0, 8))
    if offset + size > len(data):
        return data
    body = _splice(data[offset : offset + size - 4], at, new)[: size - 4]
    checksum = google_crc32c.value(bytes(body)).to_bytes(4, "little")
    data[offset : offset + size] = body + checksum
    return data


def _chunks_of(data: bytearray) -> int:
    """Chunks of a shard, from where its index must begin for the checksum to be right."""
    for num_chunks in range(1, 200):
        start = len(data) - 4 - 16 * num_chunks
        if start < 0:
            break
        if google_crc32c.value(bytes(data[start:-4])).to_bytes(4, "little") == data[-4:]:
            return num_chunks
    raise ValueError("no index")


def _header(data: bytearray, path: tuple[Any, ...], how: str, to: Any) -> bytearray:
    """Edit the header of a safetensors object, its length made right."""
    size = int.from_bytes(data[:8], "little")
    header = {"": json.loads(bytes(data[8 : 8 + size]))}
    _edit_json(header, "", path, how, to)
    text = render(header[""])
    return bytearray(len(text).to_bytes(8, "little") + text + bytes(data[8 + size :]))


_BYTES: dict[str, Callable[..., bytes | bytearray]] = {
    "truncate": lambda data, size: data[: size % (len(data) + 1)],
    "extend": lambda data, new: data + new,
    "splice": _splice,
    "whole": lambda _, new: new,
    "double": lambda data, key, text: data.replace(
        b"{", f"{{{json.dumps(key)}:{text},".encode(), 1
    ),
    "index": _index,
    "chunk": _chunk,
    "header": _header,
}


def _follow(files: Files, records: dict[str, Any]) -> None:
    """Metadata, names and sparse objects that an altered plan asks for."""
    plan = records[PLAN]
    sound = check_plan(plan, "")
    if len(sound.keys) > 50:
        return
    wanted = sound.metadata()
    for name in [name for name in records if name.endswith("zarr.json") and name not in wanted]:
        del records[name], files[name]
    for name, data in wanted.items():
        records[name] = json.loads(data)
        files[name] = data
    records[SETUP]["metadata"] = dict.fromkeys(wanted, "0" * 64)
    records[SETUP]["objects"] = dict.fromkeys(sound.setup_objects(), "0" * 64)


def _reseal(files: Files, records: dict[str, Any]) -> None:
    """Make right whatever depends on plan, metadata, objects and moments."""
    plan = records.get(PLAN)
    plan_id = hashlib.sha256(render(plan)).hexdigest()
    with suppress(*_SHAPED):
        group = json.loads(files["zarr.json"])
        group["attributes"]["mlsae"]["plan_id"] = plan_id
        files["zarr.json"] = render(group)
    objects: dict[str, str] = {}
    for name in sealed_names(records):
        record = records[name]
        if not isinstance(record, dict) or "plan_id" not in record:
            continue
        record["plan_id"] = plan_id
        for key in ("metadata", "objects"):
            named = record.get(key)
            for item in named if isinstance(named, dict) else ():
                if item in files:
                    named[item] = hashlib.sha256(files[item]).hexdigest()
        if isinstance(record.get("objects"), dict):
            objects |= record["objects"]
        moments = name.replace("commits/", "moments/").replace(".json", ".safetensors")
        if name == COMPLETE:
            moments = "moments.safetensors"
        if "moments_sha256" in record and moments in files:
            record["moments_sha256"] = hashlib.sha256(files[moments]).hexdigest()
    if isinstance(records.get(COMPLETE), dict) and "store_id" in records[COMPLETE]:
        pairs = [plan_id, sorted(map(list, objects.items()))]
        records[COMPLETE]["store_id"] = hashlib.sha256(render(pairs)).hexdigest()


def put(files: Files, path: Path, kinds: Mapping[str, str]) -> None:
    """Write a store to an empty directory.

    Args:
        files: name → bytes of the store's objects.
        path: the directory.
        kinds: name → what stands there in the object's place: nothing, a directory, a pipe that
            nobody writes to, a link to a device, to itself or to nowhere.
    """
    for name, data in files.items():
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        kind = kinds.get(name)
        if kind is None:
            target.write_bytes(data)
        elif kind == "directory":
            target.mkdir(exist_ok=True)
        elif kind == "pipe":
            os.mkfifo(target)
        elif kind != "nothing":
            target.symlink_to({"zeros": "/dev/zero", "loop": target.name, "nowhere": "gone"}[kind])
