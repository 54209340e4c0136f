"""A latent cache for Delphi, made from the events of an analysis, to explain and score latents.

Format: `delphi/latents/cache.py` (its writer) and `loader.py` of https://github.com/EleutherAI/delphi.
A module, here a layer, has a folder with files of ranges of latents and `config.json`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as pd

from mlsae.analyze.interop.delphi_files import (
    EventBatch,
    choose_num_splits,
    count,
    split,
    write_module,
    write_tokens,
)
from mlsae.analyze.results.analysis import Analysis, load
from mlsae.analyze.selection import Int, choose_sequences, first_tokens
from mlsae.analyze.transformer import find_places
from mlsae.base.directories import content_of, require_outside_stores, staged
from mlsae.base.errors import InputError
from mlsae.base.files import full_disk_explained
from mlsae.base.machine.resources import require_disk, require_writable
from mlsae.base.output.console import Progress
from mlsae.base.units import counted, portion
from mlsae.store import PADDING, AnyStore, open_corpus

CONFIG = "config.json"
_OURS = "mlsae"
"""Key of `config.json` that marks a cache written here; Delphi ignores it."""
_MODULES = {"resid_post": "layers.{}", "mlp_out": "layers.{}.mlp"}
"""Site → Delphi's name of the module with that output; other sites keep their own names."""
_MOST_TOKENS = 2**32
_EXAMPLE_TOKENS = 32
"""Delphi's default for the tokens of an example."""
_EVENTS_AT_ONCE = 2**18


@dataclass(frozen=True, kw_only=True)
class DelphiCache:
    """A latent cache that was written."""

    path: Path
    """The `raw_dir` of Delphi's `LatentDataset`."""

    modules: tuple[str, ...]
    """Folders, one a layer."""

    num_events: int
    """Number of events over all modules."""

    num_sequences: int
    """Number of sequences whose tokens the cache holds, which the table `events` covers."""

    context_length: int
    """Tokens of a sequence."""

    notes: tuple[str, ...]
    """Notes for the reader of the cache, one line each."""

    @property
    def lines(self) -> list[str]:
        """Lines to print."""
        tokens = counted(self.num_sequences * self.context_length, "token")
        return [
            f"delphi    {self.path} ({counted(len(self.modules), 'module')}, "
            f"{counted(self.num_events, 'event')} of the {tokens} that the table "
            f"`events` covers)",
            *(f"note: {note}" for note in self.notes),
        ]


def to_delphi(
    analysis: Analysis | str | Path,
    out: str | Path,
    *,
    store: AnyStore | None = None,
    model: str | Path | None = None,
) -> DelphiCache:
    """Write the events of an analysis as a latent cache of Delphi (`eai-delphi` 0.1).

    The directory appears whole or not at all. Memory: a batch of events, and a count for each
    latent and layer. Disk beside the cache: 8 bytes an event of one layer and 8 a token.

    Args:
        analysis: an analysis, or its directory.
        out: directory to be written: absent, empty, or such a cache, which is then replaced.
        store: the store that was analyzed; None opens the place that the analysis recorded.
        model: default place of the tokenizer in Delphi; None for the place where the store's
            harvest found the transformer.

    Raises:
        InputError: `out` holds other things, or the store is another one or keeps only some
            positions of each sequence.
        ResourceError: too little disk, or `out` cannot be written.
    """
    analysis = analysis if isinstance(analysis, Analysis) else load(analysis)
    summary, out = analysis.summary, Path(out)
    if store is None:
        store = open_corpus(summary["cache"])
    if store.store_id != summary["store_id"]:
        raise InputError(
            f"{store.place} is not the store that {analysis.path} was made from: its store_id is "
            f"{store.store_id[:12]}, expected {summary['store_id'][:12]}"
        )
    check_target(out, store)
    sequences = _covered(summary, store)
    events = {
        layer: LayerEvents(analysis=analysis, layer=layer, sequences=sequences)
        for layer in summary["layers"]
    }
    num_events = analysis.events.count_rows()
    with Progress("delphi", 2 * num_events, "event") as bar, full_disk_explained(out):
        num_latents = len(analysis.latents)
        totals = {layer: count(of, num_latents, bar.update) for layer, of in events.items()}
        num_splits = choose_num_splits(totals.values())
        splits = {
            layer: split(of, num_splits, len(sequences), store.context_length)
            for layer, of in totals.items()
        }
        scratch = 8 * max(of.num_events for of in totals.values())
        scratch += 8 * len(sequences) * store.context_length
        require_disk(
            out,
            sum(file.num_bytes for files in splits.values() for file in files) + scratch,
            "the cache for Delphi",
            f"the analysis {analysis.path} is done: free some space and call "
            f"mlsae.analyze.to_delphi, or analyze again with a smaller --max-tokens",
        )
        config = _config(summary, store, sequences, num_splits, model)
        with staged(out) as directory:
            tokens = directory / "tokens"
            write_tokens(tokens, store, sequences)
            for layer, of in events.items():
                folder = directory / module_name(summary["site"], layer)
                folder.mkdir()
                write_module(folder, totals[layer], splits[layer], of, tokens, bar.update)
                (folder / CONFIG).write_text(json.dumps(config, indent=4))
            tokens.unlink()
    return DelphiCache(
        path=out,
        modules=tuple(module_name(summary["site"], layer) for layer in events),
        num_events=num_events,
        num_sequences=len(sequences),
        context_length=store.context_length,
        notes=tuple(_notes(store, sequences, config["model_name"])),
    )


def module_name(site: str, layer: int) -> str:
    """The name of a layer's folder, such as `layers.3`."""
    return _MODULES.get(site, "layers.{}." + site).format(layer)


def check_target(out: Path, store: AnyStore, analysis: Path | None = None) -> None:
    """Require, before any work, that a cache of a store's events may be written to `out`.

    Args:
        out: an absent or empty directory, or one with a cache written here and nothing else.
        store: the store that is analyzed.
        analysis: the directory of the analysis, which must lie elsewhere.

    Raises:
        InputError: `out` holds other things, or lies in the analysis or around it; or the store
            keeps only some positions.
        ResourceError: `out` cannot be written.
    """
    if store.rows_per_sequence < store.context_length:
        raise InputError(
            f"--to-delphi: {store.place} keeps {store.rows_per_sequence} of the "
            f"{store.context_length} positions of each sequence, and Delphi takes a token without "
            f"an event for one where the latent is inactive: harvest without --keep-positions"
        )
    if analysis is not None:
        here, there = out.resolve(), analysis.resolve()
        if here == there or here in there.parents or there in here.parents:
            raise InputError(
                f"--to-delphi {out} and --out {analysis} lie in one another: give directories "
                f"beside each other"
            )
    require_outside_stores(out, "--to-delphi")
    _check_replaceable(out)
    require_writable(out, "--to-delphi")


def _check_replaceable(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"--to-delphi {out} is a file; give a directory")
    for name in content_of(out):
        if not _is_module(out / name):
            raise InputError(
                f"--to-delphi {out} holds {name}, which is no module of a cache that mlsae "
                f"wrote: give a directory that is empty or absent"
            )


def _is_module(folder: Path) -> bool:
    """True for a folder that `to_delphi` wrote, with nothing beside."""
    try:
        content = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError):
        return False
    return (
        isinstance(content, dict)
        and _OURS in content
        and all(name.endswith(".safetensors") or name == CONFIG for name in content_of(folder))
    )


def _covered(summary: Mapping[str, Any], store: AnyStore) -> Int:
    """The sequences that the table `events` covers."""
    sequences = choose_sequences(
        store, summary["rows"], summary["validation"], summary["max_tokens"]
    )
    sequences = first_tokens(sequences, summary["events_max_tokens"], store.context_length)
    num_tokens = len(sequences) * store.context_length
    if not 0 < num_tokens <= _MOST_TOKENS:
        raise InputError(
            f"the table `events` covers {counted(num_tokens, 'token')}, expected at least a "
            f"sequence, "
            f"{store.context_length}, and at most {_MOST_TOKENS}: analyze again with another "
            f"AnalyzeConfig.events_max_tokens"
        )
    return sequences


@dataclass(frozen=True, kw_only=True)
class LayerEvents:
    """The events of a layer, to be read any number of times."""

    analysis: Analysis
    """The analysis with the events."""

    layer: int
    """A layer id."""

    sequences: Int
    """Sorted indices of the sequences that the events cover."""

    def __iter__(self) -> Iterator[EventBatch]:
        """Place among the cache's tokens, latent and value of each event, batch by batch."""
        length = self.analysis.summary["context_length"]
        batches = self.analysis.events.to_batches(
            columns=["token", "latent", "value"],
            filter=pc.field("layer") == self.layer,
            batch_size=_EVENTS_AT_ONCE,
            batch_readahead=1,
            use_threads=False,
            fragment_readahead=1,
            # With reading ahead, a file would stay in memory up to its end.
            fragment_scan_options=pd.ParquetFragmentScanOptions(pre_buffer=False),
        )
        for batch in batches:
            if not len(batch):
                continue
            tokens, latents, values = (batch[name].to_numpy() for name in batch.schema.names)
            places = np.searchsorted(self.sequences, tokens // length)
            found = self.sequences[np.minimum(places, len(self.sequences) - 1)]
            if (found != tokens // length).any():
                token = int(tokens[found != tokens // length][0])
                raise InputError(
                    f"{self.analysis.path} is damaged: token {token} of its table `events` "
                    f"is none of those that it covers; make it again with mlsae analyze"
                )
            yield places * length + tokens % length, latents.astype(np.int64), values


def _config(
    summary: Mapping[str, Any],
    store: AnyStore,
    sequences: Int,
    num_splits: int,
    model: str | Path | None,
) -> dict[str, Any]:
    """Delphi's record of a cache; Delphi's loader uses the name of the model alone."""
    if model is None:
        model = find_places(store, None).first
    return {
        "dataset_repo": f"mlsae store {summary['store_id']}",
        "dataset_split": "",
        "dataset_name": "",
        "dataset_column": "",
        "batch_size": 1,
        "cache_ctx_len": store.context_length,
        "n_tokens": len(sequences) * store.context_length,
        "n_splits": num_splits,
        "model_name": "" if model is None else str(model),
        _OURS: {
            **{key: summary[key] for key in ("store_id", "plan_id", "sae_sha256", "rows", "site")},
            "skip_positions": summary["skip_positions"],
            "num_sequences": len(sequences),
        },
    }


def _notes(store: AnyStore, sequences: Int, model: str) -> Iterator[str]:
    length = store.context_length
    if length % _EXAMPLE_TOKENS:
        fitting = max(n for n in range(1, _EXAMPLE_TOKENS) if length % n == 0)
        yield (
            f"Delphi cuts sequences into examples of {_EXAMPLE_TOKENS} tokens, which does not "
            f"divide {length}: give it ConstructorConfig(example_ctx_len={fitting})"
        )
    if num_padding := _count_padding(store, sequences):
        yield (
            f"{portion(num_padding, len(sequences) * length, 'token')} padding, which "
            f"Delphi may show as text where a latent is inactive"
        )
    if not model:
        yield "where the transformer lay is not known: give Delphi's loader a tokenizer"


def _count_padding(store: AnyStore, sequences: Int) -> int:
    length = store.context_length
    return sum(
        int((store.token_flags(first * length, (first + 1) * length) & PADDING != 0).sum())
        for first in sequences.tolist()
    )
