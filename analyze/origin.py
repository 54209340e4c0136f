"""What the store, the SAE and this machine say of themselves, for the summary."""

import platform
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import mlsae
from mlsae.analyze.commands import commands
from mlsae.analyze.config import AnalyzeConfig
from mlsae.analyze.pairing import Pairing
from mlsae.store import RemoteError
from mlsae.store.format.presets import preset_of

_LIBRARIES = ("torch", "transformers", "numpy", "pyarrow", "zarr", "matplotlib")


def origin(pairing: Pairing, config: AnalyzeConfig) -> dict[str, Any]:
    """Keys of a summary that say what an analysis is of, and where it was made.

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
        "encoding": preset_of(pairing.store.stores[0].plan),
        "sae_config": {
            key: value for key, value in asdict(pairing.sae.config).items() if value is not None
        },
        "training": {key: training.get(key) for key in ("settings", "environment")},
        "device": str(pairing.device),
        "versions": {
            "mlsae": mlsae.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _LIBRARIES},
        },
        "commands": commands(pairing, config),
    }


def _last_run(pairing: Pairing) -> dict[str, Any]:
    """What the last harvest of the store noted, or nothing."""
    try:
        records = [run for store in pairing.store.stores for run in store.provenance()]
    except RemoteError:
        return {}
    return next((run for run in reversed(records) if "model" in run), {})
