"""docs/evidence/reliability.md from the counts of the fault campaigns, as `make reliability` does.

python -m benchmarks.reliability
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks.markdown import EVIDENCE, paragraph

PAGE = EVIDENCE / "reliability.md"
Row = tuple[str, str, str]

NOT_TESTED = (
    "Power loss below fsync. Disks, controllers and file systems that say that bytes are durable "
    "when they are not. What a power cut may leave is made from the journal of the writer's calls: "
    "names and bytes that were never flushed are taken away, in two ways, and not in every order "
    "that a file system may choose.",
    "Network file systems (NFS, Lustre, GPFS). The campaigns ran on one local file system; two "
    "harvests in one directory need one where a hard link or a rename cannot half happen.",
    "The clouds themselves. S3 is moto's server, the web a small one of the tests, both on this "
    "machine; `make test-external` adds nginx. Long outages, expired credentials in mid-run and "
    "slow networks beyond 50 ms a request are not there.",
    "Memory that flips bits, and processors that compute something else. A checksum is made of "
    "what is in memory, so what was wrong there is stored wrong; numbers that are not finite are "
    "refused.",
    "Killing other commands than `mlsae harvest` at every step of writing. Training and analysis "
    "meet full disks and servers that go away here, and `make test` kills and resumes training.",
    "Large stores and GPUs. The stores of the campaigns have kilobytes to megabytes; every step "
    "of writing is there, thousands of shards are not.",
    "Two objects of one kind in one another's place are not seen by who only reads them: the "
    "checksum of each chunk is right. `mlsae store verify` and `mlsae store copy`, which hash "
    "whole objects, find it.",
)


def reliability(record: dict[str, Any]) -> str:
    """The page, Markdown.

    Args:
        record: file of tests/faults → what its campaigns counted, and how it was run.

    Raises:
        KeyError: a count of a campaign is missing.
    """
    campaigns = {name: of for run in record.values() for name, of in run["campaigns"].items()}
    rows = [("harm", "times", "outcome"), ("---", "---:", "---")]
    about = paragraph(
        "A store takes days of GPU time and is trained on for months, so this project breaks it on "
        "purpose: real processes are killed, real files damaged, real disks filled, real servers "
        "made to fail. These are counts of campaigns in `tests/faults/` that passed: one outcome "
        "other than those named here fails a campaign, and what failed is not recorded."
    )
    same = paragraph(
        "*The same store*: the same `store_id`, that is the same bytes in every array, no rule of "
        "[storage_schema.md](../../storage_schema.md) broken, no temporary file left over."
    )
    return f"""# Reliability

<!-- Made by `make reliability` from reliability.json; edit benchmarks/reliability.py. -->

{about}

{same}

{_lines([*rows, *_rows(campaigns)])}

{(2 * chr(10)).join([_flips_by_kind(campaigns.get("flips by kind", {})), _absent(record)]).strip()}

## What is not tested

{chr(10).join(f"- {_indented(text)}" for text in NOT_TESTED)}

## How it was made

<!-- not run: it takes a quarter of an hour, and the right to mount a small file system -->
```sh
make reliability
```

{_made(record)}
"""


def _made(record: dict[str, Any]) -> str:
    """When, at which commit, for how long and on what each file was run."""
    rows = [("file", "date", "commit", "seconds", "of processor time")]
    rows += [("---", "---", "---", "---:", "---:")]
    machines: dict[str, str] = {}
    for name, run in record.items():
        wall, cpu = f"{run['seconds']:,}", f"{run['cpu_seconds']:,}"
        rows.append((f"`{name}.py`", run["date"], run["commit"][:12], wall, cpu))
        about = _machine(run["machine"])
        machines[about] = f"{machines[about]}, `{name}`" if about in machines else f"`{name}`"
    wall, cpu = (
        f"{sum(run[key] for run in record.values()):,}" for key in ("seconds", "cpu_seconds")
    )
    rows.append(("all", "", "", wall, cpu))
    where = [
        paragraph(about if len(machines) == 1 else f"{names}: {about}")
        for about, names in machines.items()
    ]
    note = paragraph(
        "Campaigns run two processes side by side. Where other programs have the processors too, "
        "as they may have had here, the seconds are many more than on an idle machine, where they "
        "are about half of the processor time."
    )
    return "\n\n".join([_lines(rows), note, *where])


def _lines(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _indented(text: str) -> str:
    return paragraph(text).replace("\n", "\n  ")


def _rows(of: dict[str, dict[str, int]]) -> list[Row]:
    """Rows of every campaign that is in the record."""
    tellers: dict[str, Callable[[dict[str, int]], list[Row]]] = {
        "kills": _kills,
        "steps": _steps,
        "ranks": _ranks,
        "kills of training, one": partial(_training, what="of a training run"),
        "kills of training, sweep": partial(_training, what="of a run that trains several SAEs"),
        "together": _together,
        "flips": _flips,
        "objects": _objects,
        "full disk": _full_disk,
        "read-only disk": _read_only_disk,
        "remote": _remote,
        "fuzz": _fuzz,
    }
    return [row for name, tell in tellers.items() if name in of for row in tell(of[name])]


def _kills(kills: dict[str, int]) -> list[Row]:
    begun = kills["begun"] + kills.get("tokens", 0)
    shards, complete = kills["shards"], kills.get("complete", 0)
    return [
        (
            "`kill -9` of a harvest at random instants",
            f"{kills['kills']:,}",
            f"{kills['absent']:,} before there was anything, {begun:,} before the first shard, "
            f"{shards:,} among shards, {complete:,} after the last record; each of "
            f"{kills['stores']:,} stores, killed again and again, became the same store when the "
            f"command was run once more",
        )
    ]


def _steps(steps: dict[str, int]) -> list[Row]:
    return [
        (
            "`kill -9` before each call that changes the disk, while two small stores are written "
            "(open, write, fsync, rename, link, mkdir, unlink)",
            f"{steps['kills']:,}",
            f"all {steps['steps']:,} steps; absent or visibly incomplete, never a store that is "
            f"wrong; then the same store",
        ),
        ("`kill -9` after half of a write", f"{steps['torn_writes']:,}", "the same"),
        (
            "what a power cut would have left of those: unflushed bytes cut, unflushed names "
            "taken back or kept",
            f"{steps['power_cuts']:,}",
            f"the same; {steps['states']:,} different states in all",
        ),
        (
            "`kill -9` at chosen steps of a real harvest",
            f"{steps['harvest_kills']:,}",
            f"spread over its {steps['harvest_steps']:,} steps; the same store",
        ),
    ]


def _ranks(ranks: dict[str, int]) -> list[Row]:
    return [
        (
            "one of two ranks killed, with torchrun and without",
            f"{ranks['kills']:,}",
            "the other stops or waits, and says so; the same store",
        )
    ]


def _training(runs: dict[str, int], *, what: str) -> list[Row]:
    return [
        (
            f"`kill -9` {what} at random instants",
            f"{runs['kills']:,}",
            f"each of {runs['runs']:,} runs went on with `--resume` and ended with the "
            f"weights, bit for bit, and the metrics of one left alone",
        )
    ]


def _together(together: dict[str, int]) -> list[Row]:
    return [
        (
            "two harvests of one plan in one directory",
            f"{together['one_plan']:,}",
            "both finish; the same store",
        ),
        (
            "one of two killed",
            f"{together['one_killed']:,}",
            "the other finishes; the same store",
        ),
        (
            "a harvest of another plan in a directory that has one",
            f"{together['other_plan']:,}",
            "refused, naming the difference; the first is not harmed",
        ),
    ]


def _flips(flips: dict[str, int]) -> list[Row]:
    return [
        (
            "one bit flipped at a random place of a store",
            f"{flips['flips']:,}",
            f"`mlsae store verify` named the file each time. Read by the library, by training's "
            f"loader and by analysis: {flips['refused']:,} readings refused, naming the file, "
            f"{flips['unharmed']:,} of other parts gave the true values, none gave another; of a "
            f"flip in an activation, training and analysis were refused each time",
        ),
        (
            "the commands `mlsae train` and `mlsae analyze` on such a store",
            f"{flips['train'] + flips['analyze']:,}",
            "exit 1, one line that names the shard, no SAE and no tables written",
        ),
    ]


def _objects(objects: dict[str, int]) -> list[Row]:
    return [
        (
            "an object cut short, emptied, a byte longer, or missing",
            f"{objects['cut_or_missing']:,}",
            "found by verify; what could still be read was true",
        ),
        (
            "an object that does not belong",
            f"{objects['extra']:,}",
            "found by verify; what was read was true",
        ),
        (
            "two objects in one another's place",
            f"{objects['swapped']:,}",
            "found by verify (see below)",
        ),
    ]


def _full_disk(full: dict[str, int]) -> list[Row]:
    return [
        (
            "a disk that fills during a harvest",
            f"{full['harvest']:,}",
            "one line; what was finished is safe; with room again the same store",
        ),
        (
            "a disk that fills during training, and analysis",
            f"{full['train']:,}, {full['analyze']:,}",
            "one line; with room again the same weights; no half an analysis",
        ),
    ]


def _read_only_disk(read_only: dict[str, int]) -> list[Row]:
    return [
        (
            "a disk that cannot be written",
            f"{read_only['refused'] + read_only['worked']:,}",
            f"{read_only['refused']:,} commands that would write to it refused before any work, "
            f"{read_only['worked']:,} that only read from it worked",
        )
    ]


def _remote(remote: dict[str, int]) -> list[Row]:
    return [
        (
            "training from a web server and from S3 that answer 503 to 5% of requests, cut answers "
            "in the middle, and take 50 ms for each",
            f"{remote['runs']:,}",
            f"weights equal, bit by bit, to those trained from disk; {remote['requests']:,} "
            f"requests, {remote['unavailable']:,} of them answered 503, {remote['cut']:,} cut",
        ),
        (
            "a server that goes away during training",
            f"{remote['servers_gone']:,}",
            "one line that names the address; server back, `--resume` ends with equal weights",
        ),
        (
            "a flipped byte on a server",
            f"{remote['flips']:,}",
            "refused, naming the shard, and not kept in the cache",
        ),
    ]


def _fuzz(fuzz: dict[str, int]) -> list[Row]:
    cases = fuzz["refused"] + fuzz["found"] + fuzz["sound"]
    return [
        (
            "stores that a hostile hand changed: records, metadata, indices, headers and bytes, "
            "checksums made right again",
            f"{cases:,}",
            f"{fuzz['refused']:,} refused with a named error, {fuzz['found']:,} found by verify, "
            f"{fuzz['sound']:,} sound; no traceback, none over 10 s; peak memory rose by "
            f"{fuzz['most_memory_mib']:,} MiB",
        )
    ]


def _machine(machine: dict[str, Any]) -> str:
    """The machine and the versions."""
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "numpy", "zarr", "torch"))
    return f"On {machine['processor']}, {machine['cores']} cores; {versions}."


def _absent(record: dict[str, Any]) -> str:
    """The files that this record has nothing of."""
    files = sorted(path.stem for path in (EVIDENCE.parents[1] / "tests/faults").glob("test_*.py"))
    absent = ", ".join(f"`{file}.py`" for file in files if file not in record)
    return paragraph(f"Not in this record: the campaigns of {absent}.") if absent else ""


def _flips_by_kind(kinds: dict[str, int]) -> str:
    if not kinds:
        return ""
    told = ", ".join(f"{kind} {number:,}" for kind, number in sorted(kinds.items()))
    return paragraph(
        f"Half of the flips fall on bytes chosen by their number, half on files chosen by theirs, "
        f"so that small records meet as many as large arrays. By what they hit: {told}."
    )


def main() -> None:
    content = json.loads((EVIDENCE / "reliability.json").read_text())
    PAGE.write_text(reliability(content))


if __name__ == "__main__":
    main()
