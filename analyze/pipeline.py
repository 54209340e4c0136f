"""The whole analysis: checks first, then the store, the transformer, the tables, the figures."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mlsae import __version__
from mlsae.analyze.config import PART_EVENTS, AnalyzeConfig
from mlsae.analyze.events.plan import EventsPlan, estimate_bytes, plan_events
from mlsae.analyze.examples.collect import Examples
from mlsae.analyze.examples.run import plan_examples, write_table
from mlsae.analyze.interop.delphi import check_target, to_delphi
from mlsae.analyze.measure.decoder import Decoder, describe_decoder
from mlsae.analyze.measure.directions import check_memory
from mlsae.analyze.measure.histograms import histograms_table, layer_cosine_table
from mlsae.analyze.measure.model.cross_entropy import CrossEntropy, measure
from mlsae.analyze.measure.model.prompts import prepare, prompts_table, read_texts
from mlsae.analyze.measure.rows.joint import Joint
from mlsae.analyze.measure.rows.walk import LayerSums, walk
from mlsae.analyze.measure.tables import latents_tables, layer_means, layers_tables
from mlsae.analyze.origin import origin
from mlsae.analyze.pairing import Pairing, fingerprint, pair, provenance_of
from mlsae.analyze.results.analysis import Analysis, load
from mlsae.analyze.results.directory import (
    EVENTS_NAME,
    KIND,
    SUMMARY,
    check_replaceable,
)
from mlsae.analyze.results.page.pictures import make_pictures, planned_figures
from mlsae.analyze.results.records import totals_of
from mlsae.analyze.results.tables import TABLES_VERSION
from mlsae.analyze.results.text.summary import overall, render
from mlsae.analyze.selection import Int, choose_sequences, first_tokens
from mlsae.analyze.transformer import find_pieces, find_places, find_transformer
from mlsae.base.devices import resolve_device
from mlsae.base.directories import staged
from mlsae.base.errors import InputError
from mlsae.base.files import seal, write_durably
from mlsae.base.machine.resources import require_disk
from mlsae.base.output.console import Progress, say

_ROWS_AT_ONCE = 2**20


def run(config: AnalyzeConfig) -> Analysis:
    """See `mlsae.analyze.run`."""
    check_replaceable(config.out)
    texts = read_texts(config.prompts, config.prompt_file)
    device = resolve_device(config.device)
    pairing = pair(
        config.cache,
        config.sae,
        device,
        cache_dir=config.cache_dir,
        cache_bytes=config.cache_size,
    )
    for warning in pairing.warnings:
        say(f"warning: {warning}", err=True)
    check_memory(pairing.sae.W_dec)
    if config.to_delphi is not None:
        check_target(config.to_delphi, pairing.store, config.out)
    sequences = choose_sequences(pairing.store, config.rows, pairing.validation, config.max_tokens)
    num_rows = _count_rows(pairing, sequences)
    places = find_places(pairing.store, config.model)
    transformer, reason = find_transformer(pairing.store, pairing.site, places, device)
    prompts = prepare(texts, transformer, reason, pairing.store, pairing.skip_positions)
    text = find_pieces(pairing.store, places)
    with staged(config.out, SUMMARY) as directory:
        provenance = provenance_of(pairing)
        events = _plan_events(pairing, sequences, config, directory, provenance)
        examples_plan = plan_examples(pairing, num_rows, config, directory)
        examples = None if examples_plan is None else Examples(pairing, examples_plan)
        joint = Joint(pairing, _end_of_joint(pairing, sequences, config))
        with _bar("rows", num_rows * len(pairing.layers), "row") as progress:
            sums = walk(
                pairing,
                sequences,
                batch_rows=config.batch_size,
                events=events,
                directory=directory / EVENTS_NAME,
                joint=joint,
                examples=examples,
                progress=progress,
            )
        entropy = None
        if transformer is not None:
            length = pairing.store.context_length
            scored = first_tokens(sequences, max(config.ce_max_tokens, length), length)
            with _bar("cross-entropy", len(scored) * length, "token") as progress:
                entropy = measure(
                    transformer, pairing, scored, batch_rows=config.batch_size, progress=progress
                )
            if entropy is None:
                reason = "the sequences evaluated hold no two tokens of one document"
        num_latents = pairing.sae.config.num_latents
        with _bar("decoder directions", num_latents * (num_latents - 1) // 2, "pair") as progress:
            decoder = describe_decoder(pairing, layer_means(sums), transformer, progress)
        tables = _tables(pairing, sums, joint, decoder, entropy, provenance)
        with _bar("prompts", len(prompts), "prompt") as progress:
            tables["prompts"] = prompts_table(prompts, transformer, pairing, provenance, progress)
        for name, table in tables.items():
            pq.write_table(table, directory / f"{name}.parquet", compression="zstd")
        told = write_table(directory, examples, text, provenance)
        content = {
            **_settings(config),
            **origin(pairing, config),
            **_coverage(pairing, sequences, sums, entropy),
            "cross_entropy": None if entropy is None else {"num_tokens": entropy.num_tokens},
            "no_cross_entropy_because": reason,
            "layer_variance": joint.decomposition.summary(),
            "decoder": decoder.summary(),
            "overall": overall(tables["layers"], tables["latents"]),
            "examples": told,
            "prompts": [prompt.text for prompt in prompts],
        }
        sources = {**tables, "summary": content}
        content["figures"] = planned_figures(sources) if config.figures else []
        write_durably(directory / SUMMARY, seal(content))
    analysis = load(config.out)
    cache = None
    if config.to_delphi is not None:
        cache = to_delphi(analysis, config.to_delphi, store=pairing.store, model=places.first)
    make_pictures(config.out)
    say(render(analysis))
    if cache is not None:
        say("\n".join(cache.lines))
    return analysis


def _count_rows(pairing: Pairing, sequences: Int) -> int:
    """Unflagged rows of `sequences`.

    Raises:
        InputError: none of them is eligible.
    """
    store, length = pairing.store, pairing.store.rows_per_sequence
    num_rows, num_eligible = 0, 0
    at_once = max(1, _ROWS_AT_ONCE // length)
    for first in range(0, store.num_sequences, at_once):
        last = min(first + at_once, store.num_sequences)
        low, high = np.searchsorted(sequences, [first, last])
        if low == high:
            continue
        chosen, span = sequences[low:high] - first, (first * length, last * length)
        unflagged = store.row_flags(*span).reshape(-1, length)[chosen] == 0
        positions = store.positions(*span).reshape(-1, length)[chosen]
        num_rows += int(unflagged.sum())
        num_eligible += int((unflagged & (positions >= pairing.skip_positions)).sum())
    if num_eligible == 0:
        raise InputError(
            f"none of the {len(sequences) * length} rows chosen is eligible (no flag, position at "
            f"least {pairing.skip_positions}): choose others with --rows or more with --max-tokens"
        )
    return num_rows


def _plan_events(
    pairing: Pairing,
    sequences: Int,
    config: AnalyzeConfig,
    directory: Path,
    provenance: Mapping[str, str],
) -> EventsPlan:
    covered = first_tokens(sequences, config.events_max_tokens, pairing.store.context_length)
    plan = plan_events(pairing, covered, PART_EVENTS, provenance)
    require_disk(
        directory,
        sum(estimate_bytes(plan, config.batch_size).values()),
        "the table of events",
        "lower --max-tokens or choose another --out",
    )
    (directory / EVENTS_NAME).mkdir()
    return plan


def _end_of_joint(pairing: Pairing, sequences: Int, config: AnalyzeConfig) -> int:
    """The token before which tokens are added up over all layers."""
    length = pairing.store.context_length
    covered = first_tokens(sequences, max(config.decomposition_max_tokens, length), length)
    return (int(covered[-1]) + 1) * length


def _tables(
    pairing: Pairing,
    sums: Mapping[int, LayerSums],
    joint: Joint,
    decoder: Decoder,
    entropy: CrossEntropy | None,
    provenance: Mapping[str, str],
) -> dict[str, pa.Table]:
    moments = pairing.store.moments(pairing.site, pairing.skip_positions)
    norms = dict(zip(moments.layers, moments.norm_mean.tolist(), strict=True))
    # The last layer has no next one; a layer that does not vary has no cosine.
    pairs = zip(moments.layers[:-1], moments.adjacent_cosine().tolist(), strict=True)
    cosines = {layer: cosine for layer, cosine in pairs if np.isfinite(cosine)}
    latents, latent_layers = latents_tables(sums, joint, decoder, provenance)
    pca = _pca_on_these_rows(pairing.sae.training_record, sums)
    layers, over_layers = layers_tables(sums, norms, cosines, pca, entropy, provenance)
    return {
        "layers": layers,
        "overall": over_layers,
        "latents": latents,
        "latent_layers": latent_layers,
        "histograms": histograms_table(
            layer_means(sums), pairing.layers, decoder.pairs.counts, provenance
        ),
        "layer_cosine": layer_cosine_table(decoder.pairs.counts, provenance),
    }


def _pca_on_these_rows(
    training: Mapping[str, Any], sums: Mapping[int, LayerSums]
) -> dict[int, tuple[int, float]]:
    """PCA's directions and FVU by layer as training measured them, where on as many rows."""
    entries = ((training.get("metrics") or {}).get("position_0_out") or {}).get("layers", [])
    return {
        entry["layer"]: (entry["pca_directions"], entry["fvu_pca"])
        for entry in entries
        if entry.get("fvu_pca") is not None
        and entry["layer"] in sums
        and entry["num_rows"] == sums[entry["layer"]].eligible.num_rows
    }


def _settings(config: AnalyzeConfig) -> dict[str, Any]:
    return {
        "kind": KIND,
        "tables_version": TABLES_VERSION,
        "mlsae_version": __version__,
        "sae": str(config.sae),
        "rows": config.rows,
        "max_tokens": config.max_tokens,
        "ce_max_tokens": config.ce_max_tokens,
        "events_max_tokens": config.events_max_tokens,
        "decomposition_max_tokens": config.decomposition_max_tokens,
    }


def _coverage(
    pairing: Pairing,
    sequences: Int,
    sums: Mapping[int, LayerSums],
    entropy: CrossEntropy | None,
) -> dict[str, Any]:
    notes = list(pairing.notes)
    if entropy is not None and entropy.ce_store is None:
        notes.append(
            "ce_store was not measured: it takes the stored activations of every eligible token; "
            "ce_sae, delta_ce and kl splice them all, recomputed by the transformer"
        )
    events = totals_of([record for of in sums.values() for record in of.events])
    return {
        **provenance_of(pairing),
        "cache": [member.place for member in pairing.store.stores],
        "stores": [
            {"store_id": member.store_id, "num_sequences": member.num_sequences}
            for member in pairing.store.stores
        ],
        "model_fingerprint": fingerprint(pairing.store),
        "site": pairing.site,
        "layers": list(pairing.layers),
        "skip_positions": pairing.skip_positions,
        "validation": {key: pairing.validation[key] for key in ("fraction", "seed")},
        "context_length": pairing.store.context_length,
        "rows_per_sequence": pairing.store.rows_per_sequence,
        "num_sequences": len(sequences),
        "num_rows": sum(of.eligible.num_rows for of in sums.values()),
        "num_latents": pairing.sae.config.num_latents,
        "num_events": events["num_events"],
        "events": events,
        "notes": notes,
    }


@contextmanager
def _bar(label: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
    with Progress(label, total, unit) as progress:
        yield progress.update
