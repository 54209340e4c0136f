"""Costs of each `--encoding` on real activations: bytes, added FVU, and time to read.

One text goes through one model once, in float32; its activations then become a store of every
preset. Bytes are those of the activations' files, scales and checksums included, over activations.
Added FVU is Σ‖x − decoded‖² ÷ Σ‖x − mean‖² over the eligible rows, of the worst layer and of the
worst decile of row norm of any layer. Reading is in order, on one thread, from a warm page cache
after every chunk has been checked once: rows as stored, and the same decoded to float32. Rounds
alternate over presets, the first is discarded, buffers are reused; wall and CPU time are printed,
because a busy machine touches the one more than the other.

    python benchmarks/encodings.py [--rounds 7] [--tokens 98304] [--dir DISK]

The model is stories260k on TinyStories where ../shared has them, else the demo's.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsae.demo import model_path, text_path
from mlsae.harvest import HarvestConfig, run
from mlsae.store import Calibrator, Store, create, open_store
from mlsae.store.format.presets import PRESETS

SITE = "resid_post"
PIECE_ROWS = 4096
BATCH_SEQUENCES = 32
SHARED = Path(__file__).resolve().parents[2] / "shared"
ARRAYS = ("activations", "block_exponents", "channel_mean", "channel_scale")


def harvest_exact(out: Path, num_tokens: int) -> tuple[str, Store]:
    """Name of the model, and its activations in float32."""
    model, text = model_path(), text_path("train")
    if (SHARED / "models/stories260k").is_dir():
        model = SHARED / "models/stories260k"
        text = SHARED / "text/tinystories_1000.jsonl"
    run(
        HarvestConfig(
            model=str(model),
            dataset=str(text),
            out=out,
            encoding="float32",
            context_length=256,
            batch_size=BATCH_SEQUENCES,
            max_tokens=num_tokens,
        )
    )
    return model.name, open_store(out)


def store_as(preset: str, exact: Store, path: Path) -> Store:
    """A store of equal activations in a preset."""
    keys = [(SITE, layer) for layer in exact.layers]
    rows = {key: exact.read(*key) for key in keys}
    encoding, compression = PRESETS[preset].encoding, PRESETS[preset].compression
    calibrator = Calibrator(keys, exact.d_model)
    eligible = exact.eligible(1)
    calibrator.add({key: x[eligible][:4096] for key, x in rows.items()})
    with create(
        path,
        tokens=exact.tokens(),
        token_flags=exact.token_flags(),
        context_length=exact.context_length,
        layers=exact.layers,
        d_model=exact.d_model,
        encoding=encoding,
        compression=compression,
        calibration=calibrator.result() if encoding == "int8" else None,
        batch_sequences=BATCH_SEQUENCES,
    ) as writer:
        writer.append(rows)
    return open_store(path)


def num_bytes(store: Store) -> int:
    """Bytes of the objects that hold activations."""
    root = Path(store.place)
    files = [file for folder in ARRAYS for file in (root / folder).rglob("c.*")]
    return sum(file.stat().st_size for file in files)


def added_fvu(exact: Store, store: Store) -> tuple[float, float]:
    """Added FVU of the worst layer, and of the worst decile of any."""
    eligible = exact.eligible(1)
    totals, deciles = [], []
    for layer in exact.layers:
        x = exact.read(SITE, layer)[eligible].astype(np.float64)
        decoded = store.read(SITE, layer)[eligible]
        totals.append(_fvu(x, decoded))
        order = np.argsort(np.linalg.norm(x, axis=1))
        deciles += [_fvu(x[rows], decoded[rows]) for rows in np.array_split(order, 10)]
    return max(totals), max(deciles)


def _fvu(x: npt.NDArray[np.float64], decoded: npt.NDArray[np.float32]) -> float:
    return float(((x - decoded) ** 2).sum() / ((x - x.mean(axis=0)) ** 2).sum())


class Reading:
    """Reads a store from its first row to its last, again and again."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._stored = [np.empty((PIECE_ROWS, part.width), part.dtype) for part in store.parts]
        self._decoded = np.empty((PIECE_ROWS, store.d_model), np.float32)

    def as_stored(self) -> None:
        """Rows as they lie, decompressed."""
        self._read(lambda _parts, _layer, _place: None)

    def decoded(self) -> None:
        """Rows as float32."""
        codec = self._store.codecs[SITE]
        self._read(
            lambda parts, _, place: codec.decode_finite_into(
                tuple(parts), place, self._decoded[: len(parts[0])]
            )
        )

    def _read(self, then: Callable[[list[npt.NDArray[Any]], int, int], None]) -> None:
        store = self._store
        for place, layer in enumerate(store.layers):
            reader = store.reader(SITE, layer)
            for start in range(0, store.num_rows, PIECE_ROWS):
                parts = [buffer[: store.num_rows - start] for buffer in self._stored]
                reader.read_into(parts, start)
                then(parts, layer, place)


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds of the wall and of this process's CPU."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(stores: dict[str, Store], rounds: int) -> dict[str, dict[str, float]]:
    """Nanoseconds an activation of each way of reading, medians over rounds."""
    ways = {
        (preset, way.__name__): way
        for preset, store in stores.items()
        for reading in [Reading(store)]
        for way in (reading.as_stored, reading.decoded)
    }
    seconds: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in ways}
    for number in range(rounds + 1):
        for key in list(ways)[:: -1 if number % 2 else 1]:
            seconds[key].append(timed(ways[key]))
    result: dict[str, dict[str, float]] = {}
    for (preset, way), measured in seconds.items():
        store = stores[preset]
        values = store.num_rows * len(store.layers) * store.d_model
        for kind, times in zip(("ns", "cpu_ns"), zip(*measured[1:], strict=True), strict=True):
            found = statistics.median(times) / values * 1e9
            result.setdefault(preset, {})[f"{way}_{kind}"] = round(found, 3)
    return result


def main() -> None:
    """Print a line a preset, and last one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=98_304)
    parser.add_argument("--dir", type=Path, help="where to write; a temporary directory if absent")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        work = Path(directory)
        model, exact = harvest_exact(work / "exact", options.tokens)
        stores = {name: store_as(name, exact, work / name) for name in PRESETS}
        times = measure(stores, options.rounds)
        num_values = exact.num_rows * len(exact.layers) * exact.d_model
        found = {}
        for name, store in stores.items():
            total, decile = added_fvu(exact, store)
            found[name] = {
                "bytes_an_activation": round(num_bytes(store) / num_values, 4),
                "added_fvu": float(f"{total:.3g}"),
                "added_fvu_worst_decile": float(f"{decile:.3g}"),
                **times[name],
                "time_over_float16": round(
                    times[name]["decoded_cpu_ns"] / times["float16"]["decoded_cpu_ns"], 2
                ),
            }
            print(f"{name}: {found[name]}")
    print(
        json.dumps(
            {
                "benchmark": "encodings",
                "model": model,
                "rows": exact.num_rows,
                "layers": len(exact.layers),
                "d_model": exact.d_model,
                "rounds": options.rounds,
                "numpy": np.__version__,
                "cpu": platform.processor() or platform.machine(),
                "presets": found,
            }
        )
    )


if __name__ == "__main__":
    main()
