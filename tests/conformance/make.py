"""Make the conformance stores: python tests/conformance/make.py DIRECTORY

The directory, which must be absent, then holds the sound stores, `valid/<name>`, and broken ones:
`invalid/<rule>-<what>` differs from a sound one in breaking that rule of storage_schema.md alone.
`cases.json` says which sound one, and the SHA-256 of the broken one; the command fails where
another store was made. Needs numpy, google-crc32c and safetensors, but not mlsae.

Without a directory, `cases.json` itself is written anew.
"""

import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import google_crc32c
import numpy as np
from resealed import COMPLETE, LENGTH, PLAN, SETUP, WIDTH, Files, sha256
from safetensors.numpy import load, save

SOUND = Path(__file__).parent / "valid"
CASES = Path(__file__).parent / "cases.json"
ACTIVATIONS = "activations/resid_post/0"
Broken = Callable[[Files], object]


def patch(files: Files, name: str, at: int, data: bytes, chunk_bytes: int) -> None:
    """Overwrite bytes of a shard's rows, within one chunk, and make its checksum right."""
    shard = bytearray(files[name])
    chunk, inside = divmod(at, chunk_bytes)
    first = chunk * (chunk_bytes + 4)
    shard[first + inside : first + inside + len(data)] = data
    end = first + chunk_bytes
    shard[end : end + 4] = struct.pack("<I", google_crc32c.value(bytes(shard[first:end])))
    files[name] = bytes(shard)


def chunk_bytes(files: Files, name: str) -> int:
    """Bytes of an uncompressed chunk of an array."""
    metadata = json.loads(files[f"{name}/zarr.json"])
    inner = metadata["codecs"][0]["configuration"]["chunk_shape"]
    itemsize = {"float32": 4, "uint32": 4, "uint8": 1, "uint64": 8, "int8": 1}
    return int(np.prod(inner)) * itemsize[metadata["data_type"]]


def index_of(files: Files, name: str) -> list[list[int]]:
    """The index of an activation shard: offset and bytes of each chunk."""
    plan = files.record(PLAN)
    length = plan["shard_rows"] // plan["chunk_rows"] * 16
    raw = np.frombuffer(files[name][-length - 4 : -4], "<u8").reshape(-1, 2)
    return [[int(value) for value in pair] for pair in raw]


def with_index(files: Files, name: str, pairs: list[list[int]], body: bytes) -> None:
    """A shard of this body and index, its checksum right."""
    index = np.array(pairs, np.uint64).astype("<u8").tobytes()
    files[name] = body + index + struct.pack("<I", google_crc32c.value(index))


def plan_with(**changes: Any) -> Broken:
    """Another plan, everything that depends on it made right."""

    def change(files: Files) -> None:
        files.edit(PLAN, lambda plan: plan.update(changes))
        files.reseal()

    return change


def metadata_with(name: str, change: Callable[[dict[str, Any]], object]) -> Broken:
    """Another zarr.json, and its hash in the setup record."""

    def edit(files: Files) -> None:
        files.edit_json(f"{name}zarr.json", change)
        digest = sha256(files[f"{name}zarr.json"])
        files.edit(SETUP, lambda r: r["metadata"].update({f"{name}zarr.json": digest}))

    return edit


def record_with(name: str, change: Callable[[dict[str, Any]], object]) -> Broken:
    """Another record, well sealed."""
    return lambda files: files.edit(name, change)


def moments_with(change: Callable[[dict[str, Any]], object]) -> Broken:
    """Other moments of the whole store, and their hash in the record."""

    def edit(files: Files) -> None:
        tensors = load(files["moments.safetensors"])
        change(tensors)
        files["moments.safetensors"] = save(tensors)
        files.reseal()

    return edit


def patched(name: str, shard: str, at: int, data: bytes) -> Broken:
    """Other bytes in the rows of a shard, hashes and checksums right."""

    def edit(files: Files) -> None:
        patch(files, f"{name}/{shard}", at, data, chunk_bytes(files, name))
        if name in ("tokens", "documents", "token_flags"):
            dtype = {"tokens": "<u4", "documents": "<u4", "token_flags": "<u1"}[name]
            num_tokens = files.record(PLAN)["num_tokens"]
            values = files[f"{name}/{shard}"][: num_tokens * np.dtype(dtype).itemsize]
            files.edit(PLAN, lambda plan: plan.update({f"{name}_sha256": sha256(values)}))
        files.reseal()

    return edit


def other_tokens(files: Files) -> None:
    """Tokens that are not those of the hash in the plan."""
    patch(files, "tokens/c.0", 0, b"\x05", chunk_bytes(files, "tokens"))
    files.reseal()


def swapped_chunks(files: Files) -> None:
    """The first two chunks of a shard in the other order, as another writer might have them."""
    name, size = f"{ACTIVATIONS}/c.0.0", chunk_bytes(files, ACTIVATIONS) + 4
    first, second, *others = index_of(files, name)
    body = files[name][size : 2 * size] + files[name][:size] + files[name][2 * size :]
    length = (2 + len(others)) * 16 + 4
    with_index(files, name, [second, first, *others], body[:-length])
    files.reseal()


def chunk_too_many(files: Files) -> None:
    """A last shard with a chunk past the last row."""
    name, size = f"{ACTIVATIONS}/c.1.0", chunk_bytes(files, ACTIVATIONS)
    padding = bytes(size) + struct.pack("<I", google_crc32c.value(bytes(size)))
    pairs = index_of(files, name)
    used = sum(size != 2**64 - 1 for _, size in pairs)
    body = files[name][: used * (size + 4)] + padding
    pairs[used] = [used * (size + 4), size + 4]
    with_index(files, name, pairs, body)
    files.reseal()


def truncated_chunk(files: Files) -> None:
    """A compressed chunk that says it holds a byte less."""
    name = f"{ACTIVATIONS}/c.0.0"
    pairs = index_of(files, name)
    body = bytearray(files[name][: sum(size for _, size in pairs)])
    (num_bytes,) = struct.unpack_from("<I", body, 4)
    struct.pack_into("<I", body, 4, num_bytes - 1)
    packed = pairs[0][1] - 4
    struct.pack_into("<I", body, packed, google_crc32c.value(bytes(body[:packed])))
    with_index(files, name, pairs, bytes(body))
    files.reseal()


def without(key: str) -> Callable[[dict[str, Any]], object]:
    """Take a key away."""
    return lambda record: record.pop(key)


def moved(old: str, new: str) -> Broken:
    """Everything of a folder somewhere else."""

    def move(files: Files) -> None:
        for name in [name for name in files if name.startswith(old)]:
            files[new + name.removeprefix(old)] = files.pop(name)

    return move


def not_the_plans_rows(files: Files) -> None:
    """Rows of other positions, every hash right."""
    patch(files, "row_token/c.0", 0, struct.pack("<Q", 5), chunk_bytes(files, "row_token"))
    files.reseal()


def without_row_token(files: Files) -> None:
    """The array left out, and no record that names it."""
    for name in [name for name in files if name.startswith("row_token/")]:
        del files[name]
    files.edit(SETUP, lambda r: r["objects"].pop("row_token/c.0"))
    files.reseal()


def bad_scale(files: Files) -> None:
    """A scale of 0, and the plan's hash of the calibration right."""
    name = "channel_scale/resid_post/c.0.0"
    size = len(files["channel_mean/resid_post/c.0.0"]) - 4 - 16 - 4
    patch(files, name, 0, struct.pack("<f", 0.0), size)
    digest = sha256(files["channel_mean/resid_post/c.0.0"][:size] + files[name][:size])
    files.edit(PLAN, lambda plan: plan["calibration"].update(sha256=digest))
    files.reseal()


def wrong_store_id(files: Files) -> None:
    """An identity that is another's."""
    files.edit(COMPLETE, lambda record: record.update(store_id="0" * 64))


CARD_CASES: dict[str, Broken] = {
    "R-CARD-1-changed-text": lambda files: files.flip("README.md", 35),
    "R-CARD-1-no-last-line": lambda f: f.update(
        {"README.md": b"\n".join(f["README.md"].split(b"\n")[:-2]) + b"\n"}
    ),
}

INVALID: dict[str, tuple[str, Broken]] = {
    "R-LAYOUT-1-other-plan-id": (
        "float32",
        metadata_with("", lambda g: g["attributes"]["mlsae"].update(plan_id="0" * 64)),
    ),
    "R-LAYOUT-2-another-codec": (
        "float32",
        metadata_with(
            f"{ACTIVATIONS}/",
            lambda a: a["codecs"][0]["configuration"]["codecs"].insert(
                1, {"name": "gzip", "configuration": {"level": 1}}
            ),
        ),
    ),
    "R-LAYOUT-3-foreign-object": ("float32", lambda f: f.update({"activations/notes": b"?"})),
    "R-LAYOUT-3-unfinished-write": ("float32", lambda f: f.update({"x.1.partial": b""})),
    "R-SEAL-1-changed-record": ("float32", lambda f: f.flip("commits/00000.json", 40)),
    "R-SEAL-1-changed-plan": ("float32", lambda f: f.flip(PLAN, 40)),
    "R-SEAL-1-white-space": ("float32", lambda f: f.update({PLAN: f[PLAN] + b" "})),
    "R-SEAL-1-changed-provenance": ("with-company", lambda f: f.flip("provenance/run.json", 3)),
    "R-VERSION-1-one-number": ("float32", plan_with(schema_version="1")),
    "R-VERSION-1-a-number": ("float32", plan_with(schema_version=1.0)),
    "R-VERSION-2-later-major": ("float32", plan_with(schema_version="2.0")),
    "R-VERSION-2-draft": ("float32", plan_with(schema_version="0.2")),
    "R-PLAN-1-unknown-key": ("float32", plan_with(rotation="hadamard")),
    "R-PLAN-1-must-understand": ("float32", plan_with(rotation={"must_understand": True})),
    "R-PLAN-1-missing-key": (
        "float32",
        lambda f: (f.edit(PLAN, without("d_model")), f.reseal()),
    ),
    "R-PLAN-2-no-plan": ("float32", lambda f: f.pop(PLAN)),
    "R-PLAN-3-record-of-another-plan": (
        "float32",
        record_with(SETUP, lambda r: r.update(plan_id="0" * 64)),
    ),
    "R-PLAN-3-complete-of-another-plan": (
        "float32",
        record_with(COMPLETE, lambda r: r.update(plan_id="0" * 64)),
    ),
    "R-PLAN-4-layers-not-ascending": ("float32", plan_with(layers=[2, 0])),
    "R-PLAN-4-unknown-site": ("float32", plan_with(sites=["../../etc"])),
    "R-PLAN-4-unknown-encoding": ("float32", plan_with(encoding="float8")),
    "R-PLAN-4-negative": ("float32", plan_with(d_model=-3)),
    "R-PLAN-4-a-fraction": ("float32", plan_with(chunk_rows=6.0)),
    "R-PLAN-4-unknown-compression": ("float32", plan_with(compression={"name": "lz4"})),
    "R-PLAN-5-shard-of-part-chunks": ("float32", plan_with(chunk_rows=5)),
    "R-PLAN-5-shard-of-part-batches": ("float32", plan_with(batch_sequences=4)),
    "R-PLAN-6-derived-from-nothing": ("derived", plan_with(derived_from={"sequences": [0, 5]})),
    "R-PLAN-7-too-many-shards": (
        "float32",
        plan_with(num_tokens=10**15 * LENGTH, shard_rows=LENGTH, chunk_rows=LENGTH),
    ),
    "R-PLAN-7-object-too-large": (
        "float32",
        plan_with(num_tokens=600, d_model=2**24, shard_rows=600, chunk_rows=1),
    ),
    "R-TOKEN-1-wider-tokens": (
        "float32",
        metadata_with("tokens/", lambda a: a.update(data_type="uint64")),
    ),
    "R-TOKEN-2-part-of-a-sequence": ("float32", plan_with(num_tokens=29)),
    "R-TOKEN-3-unknown-bit": ("float32", patched("token_flags", "c.0", 5, b"\x08")),
    "R-TOKEN-4-other-tokens": ("float32", other_tokens),
    "R-ROW-1-more-than-there-are": (
        "keep-positions",
        plan_with(keep_positions={"num": LENGTH + 1, "seed": 3}),
    ),
    "R-ROW-1-no-seed": ("keep-positions", plan_with(keep_positions={"num": 4})),
    "R-ROW-2-no-row-token": ("keep-positions", without_row_token),
    "R-ROW-3-other-positions": ("keep-positions", not_the_plans_rows),
    "R-ACT-1-other-data-type": (
        "float32",
        metadata_with(f"{ACTIVATIONS}/", lambda a: a.update(data_type="int32")),
    ),
    "R-ACT-2-another-layer": (
        "float32",
        metadata_with(f"{ACTIVATIONS}/", lambda a: a["attributes"]["mlsae"].update(layer=1)),
    ),
    "R-ACT-3-not-a-number": (
        "float32",
        patched(ACTIVATIONS, "c.0.0", 8, struct.pack("<f", float("nan"))),
    ),
    "R-ACT-3-infinity": (
        "float32",
        patched(ACTIVATIONS, "c.0.0", 8, struct.pack("<f", float("inf"))),
    ),
    "R-INT8-1-no-calibration": ("int8", plan_with(calibration=None)),
    "R-INT8-1-calibrated-floats": (
        "float32",
        plan_with(calibration={"num_rows": 9, "sha256": "0" * 64}),
    ),
    "R-INT8-2-other-calibration": (
        "int8",
        plan_with(calibration={"num_rows": 9, "sha256": "0" * 64}),
    ),
    "R-INT8-2-wider-means": (
        "int8",
        metadata_with("channel_mean/resid_post/", lambda a: a.update(data_type="float64")),
    ),
    "R-INT8-3-no-scale": ("int8", bad_scale),
    "R-INT8-4-minus-128": ("int8", patched(ACTIVATIONS, "c.0.0", 5, b"\x80")),
    "R-INT8-5-wider-exponents": (
        "int8",
        metadata_with("block_exponents/resid_post/0/", lambda a: a.update(data_type="int16")),
    ),
    "R-META-1-changed-metadata": ("float32", lambda f: f.flip(f"{ACTIVATIONS}/zarr.json", 4)),
    "R-META-1-unnamed-metadata": (
        "float32",
        record_with(SETUP, lambda r: r["metadata"].pop("tokens/zarr.json")),
    ),
    "R-META-1-a-path-outside": (
        "float32",
        record_with(SETUP, lambda r: r["metadata"].update({"../../etc/passwd": "0" * 64})),
    ),
    "R-META-2-other-fill-value": (
        "float32",
        metadata_with(f"{ACTIVATIONS}/", lambda a: a.update(fill_value=1.0)),
    ),
    "R-SHARD-1-chunks-swapped": ("float32", swapped_chunks),
    "R-SHARD-2-chunk-past-the-end": ("float32", chunk_too_many),
    "R-SHARD-3-changed-chunk": (
        "float32",
        lambda f: (f.flip(f"{ACTIVATIONS}/c.0.0", 9), f.reseal()),
    ),
    "R-SHARD-3-changed-index": (
        "float32",
        lambda f: (f.flip(f"{ACTIVATIONS}/c.0.0", -20), f.reseal()),
    ),
    "R-SHARD-4-padding": (
        "batches-of-two",
        lambda f: (
            patch(f, f"{ACTIVATIONS}/c.0.0", 4 * WIDTH * 31, b"\1", chunk_bytes(f, ACTIVATIONS)),
            f.reseal(),
        ),
    ),
    "R-SHARD-5-chunk-of-other-length": ("float16-zstd", truncated_chunk),
    "R-MOMENT-1-tensor-missing": ("float32", moments_with(without("resid_post/m2"))),
    "R-MOMENT-1-tensor-of-another-shape": (
        "float32",
        moments_with(lambda t: t.update({"resid_post/mean": t["resid_post/mean"][:1]})),
    ),
    "R-MOMENT-2-changed": ("float32", lambda f: f.flip("moments/00001.safetensors", -1)),
    "R-MOMENT-2-missing": ("float32", lambda f: f.pop("moments.safetensors")),
    "R-MOMENT-3-other-values": (
        "float32",
        moments_with(lambda t: t["resid_post/m2"].__imul__(1.001)),
    ),
    "R-SETUP-1-no-record": ("float32", lambda f: f.pop(SETUP)),
    "R-SETUP-1-missing-key": ("float32", record_with(SETUP, without("objects"))),
    "R-SETUP-2-object-unnamed": (
        "float32",
        record_with(SETUP, lambda r: r["objects"].pop("tokens/c.0")),
    ),
    "R-COMMIT-1-no-record": ("float32", lambda f: f.pop("commits/00001.json")),
    "R-COMMIT-2-another-shard": (
        "float32",
        record_with("commits/00001.json", lambda r: r.update(shard=0)),
    ),
    "R-COMMIT-2-missing-key": ("float32", record_with("commits/00001.json", without("producer"))),
    "R-COMMIT-3-object-unnamed": (
        "float32",
        record_with("commits/00001.json", lambda r: r["objects"].pop(f"{ACTIVATIONS}/c.1.0")),
    ),
    "R-COMMIT-4-missing-object": ("float32", lambda f: f.pop(f"{ACTIVATIONS}/c.1.0")),
    "R-COMMIT-4-another-object": (
        "float32",
        lambda f: f.update({f"{ACTIVATIONS}/c.0.0": f["activations/resid_post/2/c.0.0"]}),
    ),
    "R-COMPLETE-1-missing-key": ("float32", record_with(COMPLETE, without("num_shards"))),
    "R-COMPLETE-1-incomplete": ("float32", lambda f: f.pop(COMPLETE)),
    "R-COMPLETE-2-another-id": ("float32", wrong_store_id),
    "R-COMPLETE-3-another-number": (
        "float32",
        record_with(COMPLETE, lambda r: r.update(num_shards=3)),
    ),
    **{name: ("with-company", change) for name, change in CARD_CASES.items()},
}


def digest(store: Path) -> str:
    """SHA-256 of `<sha256>  <name>\\n` for each file of a store, by name: as sha256sum has it."""
    lines = [f"{sha256(data)}  {name}\n" for name, data in sorted(Files.read(store).items())]
    return sha256("".join(lines).encode())


def make(root: Path) -> dict[str, dict[str, str]]:
    """Every store, below `root`, which must not hold any; cases by name, as in `cases.json`."""
    cases = {}
    shutil.copytree(SOUND, root / "valid")
    for name, (sound, change) in INVALID.items():
        files = Files.read(SOUND / sound)
        change(files)
        files.write(root / "invalid" / name)
        cases[name] = {"sound": sound, "sha256": digest(root / "invalid" / name)}
    return cases


def main(target: str | None) -> str | None:
    """Make the stores in a directory, or `cases.json` anew; what went wrong."""
    if target is None:
        with TemporaryDirectory() as root:
            cases = make(Path(root) / "stores")
        CASES.write_text(json.dumps(cases, indent=2) + "\n")
        return None
    expected = json.loads(CASES.read_text())
    found = make(Path(target))
    wrong = sorted(case for case in {**found, **expected} if found.get(case) != expected.get(case))
    return f"not as in cases.json: {', '.join(wrong)}" if wrong else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else None))
