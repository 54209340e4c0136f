"""Stores that a hostile hand changed: opened, read and verified, whatever they say.

python tests/faults/fuzz.py --cases 10000 --seed 0 --directory /tmp/fuzz

Every case must end in an error meant for the user or in a sound store, within ten seconds and
within the memory that the process had, plus `MEMORY`. The last line is one JSON object of counts. A
case that does not end is killed by its alarm, and stands in `<directory>/case`.
"""

import argparse
import json
import resource
import shutil
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, composite
from mutations import BASES, KINDS, NEST, Edit, Files, make_store, mutate, paths_of, put

from mlsae.base.errors import InputError
from mlsae.store import Store, open_store
from mlsae.store.tools.info import store_info
from mlsae.store.tools.verify import verify

MEMORY = 2**30
"""Bytes of address space beyond what the process has when the cases begin."""
SECONDS = 10

NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 2, 3, 7, 64, 2**31, 2**32, 2**53, 2**62, 2**63, 2**64, 10**15]),
    st.sampled_from([10**18, -(10**18), 10**400, 1.5, -0.0, 1e308, float("nan"), float("inf")]),
    st.integers(),
)
TEXTS = st.one_of(
    st.sampled_from(
        [
            "",
            "../../etc/passwd",
            "/etc/passwd",
            "activations/../../../etc/passwd",
            "tokens/c.0",
            "resid_post\0",
            "resid_mid",
            "C:\\x",
            "\ud800",
            "١٢",
            "1.0",
            "1.1",
            "9" * 30 + ".0",
            "int8",
            "float16",
            "bfloat16",
            "zstd",
            "0" * 64,
            "x" * 100_000,
            "__class__",
        ]
    ),
    st.text(max_size=20),
)
NESTS = st.sampled_from([NEST + str(depth) for depth in (10, 900, 5_000, 200_000)])
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS, NESTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
BYTES = st.one_of(
    st.binary(min_size=1, max_size=24),
    st.integers(0, 2**64 - 1).map(lambda value: value.to_bytes(8, "little")),
    st.sampled_from([b"\xff" * 64, bytes(64), b"{" * 50_000, b"[" * 200_000, b"\xef\xbb\xbf"]),
)
PLACES = st.integers(0, 2**20)
OFFSETS = st.one_of(st.sampled_from([0, 4, 2**63, 2**64 - 1]), st.integers(0, 4096))
# The header of blosc: version, versionlz, flags, typesize, nbytes, blocksize, cbytes.
BLOSC = st.tuples(st.sampled_from([0, 1, 2, 3, 4, 8, 12]), BYTES)


class Base:
    """A sound store, and where in it there is something to change."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.names = sorted(files)
        self.shards = [name for name in self.names if name.rsplit("/", 1)[-1].startswith("c.")]
        self.records = [name for name in self.names if name.endswith(".json")]
        self.tensors = [name for name in self.names if name.endswith(".safetensors")]
        headers = {name: _header(files[name]) for name in self.tensors}
        contents = {name: json.loads(files[name]) for name in self.records} | headers
        self.paths = {name: paths_of(content) for name, content in contents.items()}


def _header(data: bytes) -> Any:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


@composite
def edits(draw: DrawFn, base: Base) -> Edit:
    """One change of one object."""
    kind = draw(st.sampled_from(["record", "record", "record", "shard", "tensors", "bytes"]))
    if kind == "record":
        # The plan decides most.
        name = draw(st.one_of(st.just("plan.json"), st.sampled_from(base.records)))
        how = draw(st.sampled_from(["set", "set", "set", "delete", "rename", "add", "times"]))
        to = draw(NUMBERS if how == "times" else VALUES)
        return ("json", name, draw(st.sampled_from(base.paths[name])), how, to)
    if kind == "tensors":
        name = draw(st.sampled_from(base.tensors))
        how = draw(st.sampled_from(["set", "set", "delete", "rename", "add"]))
        return ("header", name, draw(st.sampled_from(base.paths[name])), how, draw(VALUES))
    if kind == "shard":
        name, chunk = draw(st.sampled_from(base.shards)), draw(st.integers(0, 3))
        if draw(st.booleans()):
            return ("index", name, chunk, draw(st.integers(0, 1)), draw(OFFSETS))
        return ("chunk", name, chunk, *draw(st.one_of(BLOSC, st.tuples(PLACES, BYTES))))
    name = draw(st.sampled_from(base.names))
    how = draw(st.sampled_from(["truncate", "extend", "splice", "whole", "double"]))
    if how == "truncate":
        return (how, name, draw(PLACES))
    if how == "splice":
        return (how, name, draw(PLACES), draw(BYTES))
    if how == "double":
        key = draw(st.sampled_from(["plan_id", "num_tokens", "sha256"]))
        return (how, name, key, draw(st.sampled_from(["1", "1e999", "NaN", "[" * 5000])))
    return (how, name, draw(st.one_of(BYTES, st.sampled_from(base.names).map(base.files.get))))


@composite
def cases(draw: DrawFn, base: Base) -> dict[str, Any]:
    """Draw arguments of `mutate` and `put`."""
    kinds = {}
    if draw(st.integers(0, 9)) == 0:
        kinds[draw(st.sampled_from(base.names))] = draw(st.sampled_from(KINDS))
    return {
        "edits": draw(st.lists(edits(base), min_size=1, max_size=3)),
        "resealed": draw(st.integers(0, 4)) > 0,
        "follow": draw(st.integers(0, 2)) == 0,
        "kinds": kinds,
    }


def examine(path: Path) -> str:
    """Open, read, verify: `refused`, `found` or `sound`.

    Raises:
        AssertionError: a sound store cannot be read.
        Exception: anything but an error for the user: a defect.
    """
    refusals: list[str] = []

    def attempt(what: Callable[[], Any]) -> Any:
        try:
            return what()
        except InputError as error:
            refusals.append(str(error))
            return None

    store = attempt(lambda: open_store(path, incomplete=True))
    if store is not None:
        read_all(store, attempt)
    attempt(lambda: str(store_info(path)))
    report = attempt(lambda: verify(path))
    if store is None or not store.is_complete:
        return "refused"
    assert report is not None, f"opened, but verify says {refusals[-1]}"
    if report.problems:
        return "found"
    assert not refusals, f"sound, but {refusals}"
    return "sound"


def read_all(store: Store, attempt: Callable[[Callable[[], Any]], Any]) -> None:
    """Every value of every array, and all that is made of them."""
    for read in (store.tokens, store.documents, store.token_flags, store.provenance):
        attempt(read)
    for read in (store.row_tokens, store.row_flags, store.row_groups, store.positions):
        attempt(read)
    attempt(store.eligible)
    for site in store.sites:
        for layer in store.layers[:20]:
            attempt(lambda: store.read(site, layer))  # noqa: B023
        for skip in (0, 1, 16):
            attempt(lambda: store.moments(site, skip).adjacent_cosine())  # noqa: B023


class Campaign:
    """Cases of one store after another, and what became of them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.counts: Counter[str] = Counter()
        self.slowest = 0.0

    def run(self, base: Base, num_cases: int, number: int) -> None:
        """Run `num_cases` cases of a store."""

        @seed(number)
        @settings(
            max_examples=num_cases,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=cases(base))
        def one(case: dict[str, Any]) -> None:
            (self.directory / "case").write_text(repr(case))
            target = self.directory / "acts"
            shutil.rmtree(target, ignore_errors=True)
            kinds = case.pop("kinds")
            put(mutate(base.files, **case), target, kinds)
            signal.alarm(SECONDS)
            began = time.monotonic()
            self.counts[examine(target)] += 1
            signal.alarm(0)
            self.slowest = max(self.slowest, time.monotonic() - began)

        one()


def main() -> None:
    """Run the cases, of each store equally many."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--directory", type=Path, required=True)
    options = parser.parse_args()
    # A warning would be a second line, and not for the user.
    warnings.simplefilter("error")
    bases = [
        Base(Files.read(make_store(options.directory / str(number), **choices)))
        for number, choices in enumerate(BASES.values())
    ]
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    campaign = Campaign(options.directory)
    for base in bases:
        campaign.run(base, -(-options.cases // len(bases)), options.seed)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures = {
        "slowest_seconds": round(campaign.slowest, 3),
        "most_memory_mib": round((after - before) / 1024),
    }
    print(json.dumps({**campaign.counts, **figures}))


if __name__ == "__main__":
    main()
