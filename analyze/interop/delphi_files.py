"""Files of a module in Delphi's latent cache: ranges of latents, written in constant memory.

A file holds `locations` (N, 3): sequence, position, latent − first latent of the file;
`activations` (N,); and `tokens` (sequences, context length). Events lie by latent, then token:
Delphi's loader sorts stably by latent and needs no other order.
"""

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from mlsae.analyze.selection import Int
from mlsae.store import AnyStore

EventBatch = tuple[Int, Int, npt.NDArray[np.float32]]
"""Place among the cache's tokens, latent and value, event by event."""

_FEWEST_SPLITS = 5
"""Delphi's default."""
_SPLIT_EVENTS = 2**23
"""Most events a file, on average: Delphi's loader takes about 100 bytes an event."""
_AT_ONCE = 2**18
"""Events or tokens in memory at a time."""
_SMALLEST = float(np.finfo(np.float16).smallest_subnormal)
_LARGEST = float(np.finfo(np.float16).max)
_TAGS = {"int64": "I64", "uint16": "U16", "uint32": "U32", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Totals:
    """Counts and range of a layer's events, needed before they are written."""

    counts: Int
    """(num_latents,) events by latent."""

    smallest: float
    """The smallest value."""

    largest: float
    """The largest value."""

    @property
    def num_events(self) -> int:
        """Events over all latents."""
        return int(self.counts.sum())


def count(
    events: Iterable[EventBatch], num_latents: int, progress: Callable[[int], object]
) -> Totals:
    """Count a layer's events."""
    counts = np.zeros(num_latents, dtype=np.int64)
    smallest, largest = np.inf, -np.inf
    for places, latents, values in events:
        counts += np.bincount(latents, minlength=num_latents)
        smallest = min(smallest, float(values.min()))
        largest = max(largest, float(values.max()))
        progress(len(places))
    return Totals(counts=counts, smallest=smallest, largest=largest)


@dataclass(frozen=True, kw_only=True)
class Split:
    """A file with the events in a range of latents."""

    start: int
    """First latent."""

    end: int
    """Last latent."""

    num_events: int
    """Events at these latents."""

    locations: np.dtype[Any]
    """Type of `locations`: uint16, Delphi's own, where every number fits, else uint32."""

    activations: np.dtype[Any]
    """Type of `activations`: float16, Delphi's own, or float32 where a value at the layer is
    outside float16's range. Delphi's loader reads both."""

    num_sequences: int
    """Sequences in `tokens`."""

    context_length: int
    """Tokens per sequence."""

    @property
    def name(self) -> str:
        """File name."""
        return f"{self.start}_{self.end}.safetensors"

    @property
    def tensors(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Type and shape by tensor, in the file's order."""
        return {
            "tokens": (np.dtype(np.int64), (self.num_sequences, self.context_length)),
            "locations": (self.locations, (self.num_events, 3)),
            "activations": (self.activations, (self.num_events,)),
        }

    @property
    def num_bytes(self) -> int:
        """Bytes that the tensors take."""
        return sum(_bytes(dtype, shape) for dtype, shape in self.tensors.values())


def split(
    totals: Totals, num_splits: int, num_sequences: int, context_length: int
) -> tuple[Split, ...]:
    """A layer's files: Delphi's ranges, with those without events joined to a neighbour.

    Delphi's own writer fails on a range without events.
    """
    num_latents = len(totals.counts)
    borders = torch.linspace(0, num_latents, steps=num_splits + 1).long().tolist()
    before = np.concatenate([[0], np.cumsum(totals.counts)])
    starts = [0]
    for low, high in pairwise(borders[1:]):
        if before[low] > before[starts[-1]] and before[high] > before[low]:
            starts.append(low)
    fits = totals.smallest >= _SMALLEST and totals.largest <= _LARGEST
    splits = []
    for start, end in zip(starts, [*starts[1:], num_latents], strict=True):
        most = max(num_sequences, context_length, end - start) - 1
        splits.append(
            Split(
                start=start,
                end=end - 1,
                num_events=int(before[end] - before[start]),
                locations=np.dtype(np.uint16 if most < 2**16 else np.uint32),
                activations=np.dtype(np.float16 if fits else np.float32),
                num_sequences=num_sequences,
                context_length=context_length,
            )
        )
    return tuple(splits)


def choose_num_splits(totals: Collection[Totals]) -> int:
    """Files a layer: five as in Delphi, or more where its loader's memory needs it."""
    most = max(total.num_events for total in totals)
    num_latents = max(len(total.counts) for total in totals)
    return min(num_latents, max(_FEWEST_SPLITS, -(-most // _SPLIT_EVENTS)))


def write_tokens(path: Path, store: AnyStore, sequences: Int) -> None:
    """Write the token ids of `sequences`, int64, one sequence after another."""
    length = store.context_length
    with path.open("wb") as file:
        for run in np.split(sequences, np.flatnonzero(np.diff(sequences) != 1) + 1):
            start, stop = int(run[0]) * length, (int(run[-1]) + 1) * length
            for first in range(start, stop, _AT_ONCE):
                ids = store.tokens(first, min(first + _AT_ONCE, stop))
                file.write(ids.astype(np.int64).tobytes())


def write_module(
    folder: Path,
    totals: Totals,
    splits: Iterable[Split],
    events: Iterable[EventBatch],
    tokens: Path,
    progress: Callable[[int], object],
) -> None:
    """Write a layer's files into `folder`, which exists.

    Args:
        folder: the module's folder.
        totals: counts and range of `events`.
        splits: the files.
        events: all events at the layer, in any order.
        tokens: the file that `write_tokens` wrote.
        progress: called with the number of events in each batch.
    """
    starts = np.concatenate([[0], np.cumsum(totals.counts)])
    scratch = folder / "events"
    ordered = _order(scratch, starts, events, progress)
    for of in splits:
        first, last = int(starts[of.start]), int(starts[of.end + 1])
        with (folder / of.name).open("wb") as file, tokens.open("rb") as source:
            _write_header(file, of)
            shutil.copyfileobj(source, file, 8 * _AT_ONCE)
            for at, keys in _blocks(ordered, first, last):
                places = (keys >> 32).astype(np.int64)
                latents = np.searchsorted(starts, np.arange(at, at + len(keys)), side="right") - 1
                sequence, position = np.divmod(places, of.context_length)
                columns = [sequence, position, latents - of.start]
                file.write(np.stack(columns, axis=1).astype(of.locations).tobytes())
            for _, keys in _blocks(ordered, first, last):
                values = (keys & 0xFFFFFFFF).astype(np.uint32).view(np.float32)
                file.write(values.astype(of.activations).tobytes())
    scratch.unlink(missing_ok=True)


def _order(
    path: Path, starts: Int, events: Iterable[EventBatch], progress: Callable[[int], object]
) -> npt.NDArray[np.uint64]:
    """A file's events by latent, then place; an entry is place << 32 | bits of the value."""
    num_events = int(starts[-1])
    if num_events == 0:
        return np.empty(0, dtype=np.uint64)
    # On a full disk, a mapped file with holes would end the process.
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 8 * num_events)
    keys = np.memmap(path, dtype=np.uint64, mode="r+", shape=(num_events,))
    free = starts[:-1].copy()
    for places, latents, values in events:
        order = np.argsort(latents, kind="stable")
        found, first, counts = np.unique(latents[order], return_index=True, return_counts=True)
        at = np.repeat(free[found] - first, counts) + np.arange(len(order))
        packed = places.astype(np.uint64) << np.uint64(32) | values.view(np.uint32)
        keys[at] = packed[order]
        free[found] += counts
        progress(len(places))
    for latent in _unsorted(keys, starts):
        keys[starts[latent] : starts[latent + 1]].sort()
    return keys


def _unsorted(keys: npt.NDArray[np.uint64], starts: Int) -> list[int]:
    """Latents whose events are out of order."""
    latents: set[int] = set()
    for at, block in _blocks(keys, 0, len(keys), overlap=1):
        falls = at + 1 + np.flatnonzero(block[1:] < block[:-1])
        found = np.searchsorted(starts, falls, side="right") - 1
        # A fall at the border between two latents does not count.
        latents.update(found[starts[found] < falls].tolist())
    return sorted(latents)


def _blocks(
    keys: npt.NDArray[np.uint64], first: int, last: int, overlap: int = 0
) -> Iterator[tuple[int, npt.NDArray[np.uint64]]]:
    for at in range(first, last, _AT_ONCE):
        yield at, np.asarray(keys[at : min(at + _AT_ONCE + overlap, last)])


def _write_header(file: BinaryIO, of: Split) -> None:
    """Write a safetensors header: https://github.com/huggingface/safetensors#format."""
    header, offset = {}, 0
    for name, (dtype, shape) in of.tensors.items():
        end = offset + _bytes(dtype, shape)
        tag = _TAGS[dtype.name]
        header[name] = {"dtype": tag, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def _bytes(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    return dtype.itemsize * int(np.prod(shape, dtype=np.int64))
