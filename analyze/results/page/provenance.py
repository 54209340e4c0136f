"""An analysis's provenance on the page, as plain text."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from mlsae.analyze.results.page.tables import Row, number
from mlsae.base.units import counted, format_ranges

_STAGES = ("harvest", "train", "analyze")
_SETTINGS = (
    "sae",
    "rows",
    "max_tokens",
    "device",
    "ce_max_tokens",
    "events_max_tokens",
    "decomposition_max_tokens",
    "examples",
)
"""Summary keys that are settings of the analysis."""


def provenance(summary: Row) -> list[tuple[str, str]]:
    """Names and values of an analysis's inputs, in the page's order."""
    model, sae = summary["model"], summary["sae_config"]
    stores = [
        f"{of['store_id']} ({counted(of['num_sequences'], 'sequence')})" for of in summary["stores"]
    ]
    rows: list[tuple[str, object]] = [
        ("transformer", model.get("name") or "not recorded"),
        ("revision", model.get("revision")),
        ("initialisation", _init(model)),
        ("transformer weights (fingerprint)", summary["model_fingerprint"]),
        ("site", summary["site"]),
        ("layers", format_ranges(summary["layers"])),
        ("text", _listed(of.get("name") for of in summary["text"])),
        ("store", _listed(summary["cache"])),
        ("store_id", summary["store_id"]),
        ("stores read as one", _listed(stores) if len(stores) > 1 else None),
        ("plan_id", summary["plan_id"]),
        ("encoding", summary["encoding"]),
        ("SAE", summary["sae"]),
        ("SAE weights (SHA-256)", summary["sae_sha256"]),
        ("SAE kind", _listed(f"{key} {_setting(sae[key])}" for key in _in_order(sae))),
        (
            "rows evaluated",
            f"{number(summary['num_rows'])} over all layers ({summary['rows']}: "
            f"{counted(summary['num_sequences'], 'sequence')} of {summary['context_length']} "
            f"tokens, positions from {summary['skip_positions']})",
        ),
        ("device", summary["device"]),
        ("versions", _listed(f"{key} {value}" for key, value in summary["versions"].items())),
    ]
    return [(name, str(value)) for name, value in rows if value is not None and value != ""]


def _in_order(sae: Row) -> list[str]:
    first = [key for key in ("architecture", "num_latents", "k", "d_in") if key in sae]
    return [*first, *(key for key in sae if key not in first)]


def _init(model: Row) -> str | None:
    init, seed = model.get("init"), model.get("init_seed")
    return None if init is None else f"{init}{'' if seed is None else f', seed {seed}'}"


def _listed(values: Iterable[object]) -> str:
    return ", ".join(str(value) for value in values if value is not None)


def settings_rows(summary: Row) -> list[tuple[str, str]]:
    """Settings of the analysis, then of the training."""
    # An analysis with examples has their numbers under the setting's name.
    rows = [
        (f"analyze: {name}", summary[name])
        for name in _SETTINGS
        if name in summary and not isinstance(summary[name], dict)
    ]
    trained = summary["training"]["settings"] or {}
    rows += [(f"train: {name}", value) for name, value in trained.items()]
    return [(name, _setting(value)) for name, value in rows]


def _setting(value: object) -> str:
    if isinstance(value, list | tuple):
        return _listed(value)
    return "–" if value is None else str(value)


def commands_rows(found: Mapping[str, Sequence[str] | str]) -> list[tuple[str, list[str], str]]:
    """Stage, commands, and the reason where there are none, in stage order."""
    rows: list[tuple[str, list[str], str]] = []
    for stage in (stage for stage in _STAGES if stage in found):
        lines = found[stage]
        if isinstance(lines, str):
            rows.append((stage, [], lines))
        else:
            rows.append((stage, [_broken(line) for line in lines], ""))
    return rows


def _broken(command: str) -> str:
    """A command with each option on its own line, continued for the shell."""
    words = shlex.split(command)
    starts = [n for n, word in enumerate(words) if word.startswith("-")]
    ends = [0, *starts, len(words)]
    return " \\\n    ".join(shlex.join(words[a:b]) for a, b in pairwise(ends))
