"""Origin of the store, the SAE and the analysis, for the summary."""

import hashlib
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlsae
from mlsae.analyze.config import AnalyzeConfig
from mlsae.analyze.pairing import Pairing, provenance_of
from mlsae.base.files import canonical_json
from mlsae.base.settings import deciding, words_of
from mlsae.sae import SAEConfig
from mlsae.store import RemoteError, Store

RUN_FILE = "run.yaml"
"""File that `mlsae train` leaves beside an SAE: the run with every default resolved."""

_OUT = "analysis"
_HARVEST_DEFAULTS = {
    "split": None,
    "text_column": "text",
    "bos": "auto",
    "subset": None,
    "shuffle_seed": None,
    "tokens_column": None,
    "max_tokens": None,
}
_LIBRARIES = ("torch", "transformers", "numpy", "pyarrow", "zarr", "matplotlib")


def origin(pairing: Pairing, config: AnalyzeConfig) -> dict[str, Any]:
    """Keys of a summary on the subject of an analysis, and the machine that made it.

    `model`, `text`, `encoding`, `sae_config`, `training`, `device`, `versions`, `commands`; with
    None, or an empty list, where something is not known.
    """
    record, training = _last_run(pairing), pairing.sae.training_record
    known = pairing.store.source.get("model")
    place = record.get("model")
    return {
        "model": {
            **(known if isinstance(known, dict) else {}),
            **(place if isinstance(place, dict) else {"name": None, "revision": None}),
        },
        "text": record.get("datasets") or [],
        "encoding": pairing.store.stores[0].plan.preset.name,
        "sae_config": _flat(pairing.sae.config),
        "training": {key: training.get(key) for key in ("settings", "environment")},
        "device": str(pairing.device),
        "versions": {
            "mlsae": mlsae.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _LIBRARIES},
        },
        "commands": command_lines(pairing, config),
    }


def identify(
    pairing: Pairing,
    config: AnalyzeConfig,
    prompts: Sequence[str],
    missing: Sequence[str | None],
) -> str:
    """Hex SHA-256 of all that decides the tables of an analysis.

    Args:
        pairing: the store and the SAE.
        config: settings of the analysis; ids stand for the places of inputs.
        prompts: texts of the prompts.
        missing: reasons why there is no transformer, and no text of tokens; None where there is.
    """
    places = ("cache", "sae", "prompts", "prompt_file")
    names = [name for name in deciding(AnalyzeConfig) if name not in places]
    content = {
        **{name: str(getattr(config, name)) for name in names},
        **provenance_of(pairing),
        "layers": list(pairing.layers),
        "site": pairing.site,
        "skip_positions": pairing.skip_positions,
        "validation": dict(pairing.validation),
        "device": pairing.device.type,
        "prompts": list(prompts),
        "missing": list(missing),
        "versions": {name: version(name) for name in _LIBRARIES} | {"mlsae": mlsae.__version__},
    }
    return hashlib.sha256(canonical_json(content)).hexdigest()


def _flat(config: SAEConfig) -> dict[str, Any]:
    """Fields and, beside them, those of the architecture, which is named; without None."""
    content = {field.name: getattr(config, field.name) for field in fields(config)}
    content |= config.architecture.to_dict() | {"architecture": config.architecture.name}
    return {key: value for key, value in content.items() if value is not None}


def _last_run(pairing: Pairing) -> dict[str, Any]:
    """Provenance of the store's last harvest, or nothing."""
    try:
        records = [run for store in pairing.store.stores for run in store.provenance()]
    except RemoteError:
        return {}
    return next((run for run in reversed(records) if "model" in run), {})


def command_lines(pairing: Pairing, config: AnalyzeConfig) -> dict[str, list[str] | str]:
    """Stage → command lines that make the analysis again, or why they are not known.

    A repeated harvest came out the same if its plan_id is the same.

    Args:
        pairing: the store, whose plan and provenance name its model and text, and the SAE.
        config: settings of the analysis.
    """
    return {
        "harvest": _harvests(pairing.store.stores),
        "train": _train(config.sae, pairing),
        "analyze": [_analyze(config)],
    }


def _harvests(stores: Sequence[Store]) -> list[str] | str:
    lines = []
    for store in stores:
        try:
            records = [run for run in store.provenance() if run.get("kind") == "harvest"]
        except RemoteError as error:
            return f"how {store.place} was made is not known ({error})"
        if store.plan.derived_from is not None:
            return f"{store.place} was copied from another store, not harvested"
        if not records:
            return f"{store.place} was not made by mlsae harvest"
        try:
            lines.append(_harvest(store, records[-1]))
        except (KeyError, TypeError):
            return f"{store.place} does not say all of how it was harvested"
    return lines


def _harvest(store: Store, record: Mapping[str, Any]) -> str:
    plan = store.plan
    model, packing = plan.source["model"], plan.source["packing"]
    mixed = len(record["datasets"]) > 1
    words: list[object] = ["mlsae", "harvest", "--model", record["model"]["name"]]
    if record["model"]["revision"]:
        words += ["--revision", record["model"]["revision"]]
    if record["model"].get("tokenizer"):
        words += ["--tokenizer", record["model"]["tokenizer"]]
    for text in record["datasets"]:
        words += ["--dataset", f"{text['name']}:{text['share']}" if mixed else text["name"]]
    for name, default in _HARVEST_DEFAULTS.items():
        if record[name] != default:
            words += [_option(name), record[name]]
    words += ["--context-length", plan.context_length]
    if packing["packing"] != "concatenate" or record["tokens_column"] is not None:
        words += ["--packing", packing["packing"]]
    if packing["isolate_documents"]:
        words.append("--isolate-documents")
    words += ["--layers", _listed(plan.layers), "--sites", _listed(plan.sites)]
    if model["init"] != "trained":
        words += ["--init", model["init"], "--init-seed", model["init_seed"]]
    if (kept := plan.keep_positions) is not None:
        words += ["--keep-positions", kept.num, "--keep-seed", kept.seed]
    words += ["--encoding", plan.preset.name, "--model-dtype", model["dtype"]]
    words += ["--attn-implementation", model["attention_implementation"]]
    words += ["--batch-size", plan.batch_sequences, "--out", store.place]
    return _joined(words)


def _train(directory: Path, pairing: Pairing) -> list[str] | str:
    if "settings" not in pairing.sae.training_record:
        return f"{directory} was not made by mlsae train"
    for run in (directory, directory.parent):
        if (run / RUN_FILE).is_file():
            return [_joined(["mlsae", "train", "--config", run / RUN_FILE])]
    return f"{directory} has lost the {RUN_FILE} of its training"


def _analyze(config: AnalyzeConfig) -> str:
    return _joined(["mlsae", "analyze", *words_of(replace(config, out=Path(_OUT)))])


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _listed(values: Sequence[object]) -> str:
    return ",".join(map(str, values))


def _joined(words: Sequence[object]) -> str:
    return shlex.join(map(str, words))
