"""The whole analysis: checks first, then the store, the transformer, the tables, the figures."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from mlsae.analyze.measure.model.prompts import Prompt, prepare, prompts_table, read_texts
from mlsae.analyze.measure.rows.joint import Joint, JointResult
from mlsae.analyze.measure.rows.kept import packed, unpacked
from mlsae.analyze.measure.rows.walk import LayerSums, walk
from mlsae.analyze.measure.tables import latents_tables, layer_means, layers_tables, prefixes_table
from mlsae.analyze.origin import identify, origin
from mlsae.analyze.pairing import Pairing, fingerprint, pair, provenance_of
from mlsae.analyze.results.analysis import Analysis, load
from mlsae.analyze.results.directory import (
    EVENTS_NAME,
    KIND,
    PAGE,
    SUMMARY,
    check_replaceable,
    read_summary,
)
from mlsae.analyze.results.page.pictures import make_pictures, planned_figures
from mlsae.analyze.results.records import totals_of
from mlsae.analyze.results.tables import TABLES_VERSION
from mlsae.analyze.results.text.summary import overall, render
from mlsae.analyze.selection import Int, choose_sequences, first_tokens
from mlsae.analyze.steps import Steps, stops
from mlsae.analyze.transformer import Pieces, Places, find_pieces, find_places, find_transformer
from mlsae.base.devices import resolve_device
from mlsae.base.directories import staged
from mlsae.base.errors import InputError
from mlsae.base.files import seal, write_durably
from mlsae.base.interruption import Interruption, interruptible
from mlsae.base.machine.resources import require_disk
from mlsae.base.output.console import Progress, say
from mlsae.base.units import counted

if TYPE_CHECKING:
    from mlsae.analyze.measure.model.cross_entropy import CrossEntropy
    from mlsae.models import Transformer

STOPPING = "finishing the batch in hand, then stopping; press Ctrl-C again to stop at once"
_ROWS_AT_ONCE = 2**20


@dataclass(frozen=True, kw_only=True)
class _Job:
    """An analysis, once everything that it needs is found and fits."""

    config: AnalyzeConfig
    pairing: Pairing
    sequences: Int
    num_rows: int
    places: Places
    transformer: "Transformer | None"
    reason: str | None
    """Reason why there is no transformer."""
    prompts: list[Prompt]
    text: tuple[Pieces | None, str | None]

    @property
    def analysis_id(self) -> str:
        """Hex digest of inputs, settings and versions, which decide the tables."""
        prompts = [prompt.text for prompt in self.prompts]
        return identify(self.pairing, self.config, prompts, (self.reason, self.text[1]))


def run(config: AnalyzeConfig) -> Analysis:
    """See `mlsae.analyze.run`."""
    nothing = "stopped before anything was kept; run the same command to begin again"
    with interruptible() as interruption, stops(interruption, nothing):
        return _run(config, interruption)


def _run(config: AnalyzeConfig, interruption: Interruption) -> Analysis:
    check_replaceable(config.out)
    job = _prepared(config)
    if _has_tables(config.out, job.analysis_id):
        say(f"the tables are whole in {config.out}: making what is missing beside them")
    else:
        with staged(config.out, SUMMARY, work=job.analysis_id) as directory:
            _measure(job, directory, interruption)
    whole = f"stopped: the tables are whole in {config.out}; run the same command for the rest"
    with stops(interruption, whole):
        analysis = load(config.out)
        cache = None
        if config.to_delphi is not None:
            store, model = job.pairing.store, job.places.first
            cache = to_delphi(analysis, config.to_delphi, store=store, model=model)
        make_pictures(config.out)
    say(render(analysis))
    if cache is not None:
        say("\n".join(cache.lines))
    return analysis


def _prepared(config: AnalyzeConfig) -> _Job:
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
    return _Job(
        config=config,
        pairing=pairing,
        sequences=sequences,
        num_rows=num_rows,
        places=places,
        transformer=transformer,
        reason=reason,
        prompts=prepare(texts, transformer, reason, pairing.store, pairing.skip_positions),
        text=find_pieces(pairing.store, places),
    )


def _has_tables(out: Path, analysis_id: str) -> bool:
    """True where the tables of this very analysis are whole, and the page is missing."""
    if (out / PAGE).exists() or not (out / SUMMARY).exists():
        return False
    return read_summary(out).get("analysis_id") == analysis_id


def _measure(job: _Job, directory: Path, interruption: Interruption) -> None:
    """Fill `directory` with tables and summary; finished steps are kept there until all are."""
    pairing, provenance = job.pairing, provenance_of(job.pairing)
    steps = Steps(directory, interruption)
    sums, joint, told = _walk(job, directory, steps)
    kept = (
        f"stopped: sums over rows and tokens scored are kept in {job.config.out}; run the same "
        f"command to go on"
    )
    with stops(interruption, kept):
        entropy = _cross_entropy(job, steps, interruption)
        num_latents = pairing.sae.config.num_latents
        with _bar("decoder directions", num_latents * (num_latents - 1) // 2, "pair") as progress:
            decoder = describe_decoder(pairing, layer_means(sums), job.transformer, progress)
        tables = _tables(pairing, sums, joint, decoder, entropy, provenance)
        with _bar("prompts", len(job.prompts), "prompt") as progress:
            tables["prompts"] = prompts_table(
                job.prompts, job.transformer, pairing, provenance, progress
            )
        for name, table in tables.items():
            pq.write_table(table, directory / f"{name}.parquet", compression="zstd")
        reason = job.reason
        if job.transformer is not None and entropy is None:
            reason = "the sequences evaluated hold no two tokens of one document"
        content = {
            **_settings(job.config),
            **origin(pairing, job.config),
            "analysis_id": job.analysis_id,
            **_coverage(pairing, job.sequences, sums, entropy),
            "cross_entropy": None if entropy is None else {"num_tokens": entropy.num_tokens},
            "no_cross_entropy_because": reason,
            "layer_variance": joint.layer_variance,
            "decoder": decoder.summary(),
            "overall": overall(tables["layers"], tables["latents"]),
            "examples": told,
            "prompts": [prompt.text for prompt in job.prompts],
        }
        sources = {**tables, "summary": content}
        content["figures"] = planned_figures(sources) if job.config.figures else []
        write_durably(directory / SUMMARY, seal(content))


def _walk(
    job: _Job, directory: Path, steps: Steps
) -> tuple[dict[int, LayerSums], JointResult, dict[str, Any] | None]:
    """Sums over rows and, in `directory`, events and examples; what the summary says of these."""
    if (kept := steps.read("rows")) is not None:
        facts, arrays = kept
        say("going on: the sums over rows are there")
        return *unpacked(facts, arrays), facts["examples"]
    for entry in directory.iterdir():
        # Left by a process that was killed.
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    config, pairing, provenance = job.config, job.pairing, provenance_of(job.pairing)
    events = _plan_events(pairing, job.sequences, config, directory, provenance)
    plan = plan_examples(pairing, job.num_rows, config, directory)
    examples = None if plan is None else Examples(pairing, plan)
    with _bar("rows", job.num_rows * len(pairing.layers), "row") as progress:
        sums, joint = walk(
            pairing,
            job.sequences,
            batch_rows=config.batch_size,
            events=events,
            directory=directory / EVENTS_NAME,
            joint=Joint(pairing, _end_of_joint(pairing, job.sequences, config)),
            examples=examples,
            progress=progress,
        )
    told = write_table(directory, examples, job.text, provenance)
    facts, arrays = packed(sums, joint)
    steps.keep("rows", {**facts, "examples": told}, arrays)
    return sums, joint, told


def _cross_entropy(job: _Job, steps: Steps, interruption: Interruption) -> "CrossEntropy | None":
    if job.transformer is None:
        return None
    from mlsae.analyze.measure.model.cross_entropy import SEQUENCES, measure

    length, step = job.pairing.store.context_length, "cross-entropy"
    scored = first_tokens(job.sequences, max(job.config.ce_max_tokens, length), length)
    _, begun = steps.read(step) or ({}, None)
    done = 0 if begun is None else int(begun[SEQUENCES]) * length
    if done:
        say(f"going on: {counted(done, 'token')} are scored")
    with (
        _bar(step, len(scored) * length, "token", done) as progress,
        interruption.deferred(STOPPING),
    ):
        return measure(
            job.transformer,
            job.pairing,
            scored,
            batch_rows=job.config.batch_size,
            progress=progress,
            begun=begun,
            keep=lambda state: steps.keep_now_and_then(step, state),
        )


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
    joint: JointResult,
    decoder: Decoder,
    entropy: "CrossEntropy | None",
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
        "prefixes": prefixes_table(sums, pairing.sae.config.prefixes, latents, provenance),
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
    entropy: "CrossEntropy | None",
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
def _bar(label: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[[int], object]]:
    with Progress(label, total, unit, done=done) as progress:
        yield progress.update
