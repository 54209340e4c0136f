"""Card of a store, README.md: its content and the way to open it, for people and hubs.

It is no part of a store's identity, and its owner may edit it. As it was written it carries its own
checksum in its last line, and a mark at its top that says so, so that damage is told from an edit.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from mlsae.base.units import counted, format_bytes, format_count, format_ranges
from mlsae.store.plan import Plan
from mlsae.store.read.commits import LargestAddedFVU
from mlsae.store.schema import activation_array

MARK = b"mlsae-card"
MAX_CARD_BYTES = 2**24
"""A README.md of more bytes is not looked at: no card is as long."""
_SEAL = re.compile(rb"<!-- mlsae-card sha256=([0-9a-f]{64}) -->\n")
_SHOWN_ROWS = 1000
_MOST_CHARACTERS = 300
_KNOWN_LICENCES = frozenset(
    {"mit", "apache-2.0", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "odc-by", "odbl"}
)
"""Licences that hubs know by these names; any other is given as one of its own."""

Record = Mapping[str, Any]


def card_of(
    plan: Plan,
    *,
    store_id: str,
    num_bytes: int,
    cost: LargestAddedFVU | None,
    provenance: Sequence[Record],
) -> bytes:
    """The card of a complete store: UTF-8, equal for equal arguments.

    Args:
        plan: plan of the store.
        store_id: `store_id` of the store.
        num_bytes: bytes of the objects that decide `store_id`.
        cost: cost of the encoding, where it was measured.
        provenance: records of the runs, oldest first; their keys may be absent.
    """
    model, text = _model(plan, provenance), _text(provenance)
    licence = _licence(plan, provenance)
    body = "\n".join(
        [
            "---",
            "# mlsae-card: whoever edits this page takes out this line and the last one",
            *_licence_keys(licence),
            f"pretty_name: {_quoted(f'Activations of {model}')}",
            "tags:",
            *(f"- {tag}" for tag in ("activations", "sparse-autoencoder", "mlsae", "zarr")),
            "# Its files are arrays, not tables.",
            "viewer: false",
            "---",
            "",
            f"# Activations of {_plain(model)}",
            "",
            "Activations at the layers of a transformer, row by row, for training and analyzing",
            "sparse autoencoders without the transformer: one Zarr v3 group whose every byte can",
            "be checked.",
            "",
            "| | |",
            "|---|---|",
            *(
                f"| {name} | {value} |"
                for name, value in _table(plan, model, text, licence, num_bytes, cost)
            ),
            f"| store_id | `{store_id}` |",
            f"| plan_id | `{plan.id}` |",
            "",
            *_how_to_open(plan),
            "",
        ]
    ).encode()
    return body + b"<!-- mlsae-card sha256=%s -->\n" % hashlib.sha256(body).hexdigest().encode()


def card_problem(data: bytes) -> str | None:
    """Fault in the bytes of a README.md; None for a sound card, and for any other text."""
    if MARK not in data:
        return None
    body, line = data[: data.rfind(b"\n", 0, -1) + 1], data[data.rfind(b"\n", 0, -1) + 1 :]
    seal = _SEAL.fullmatch(line)
    if seal is not None and hashlib.sha256(body).hexdigest().encode() == seal[1]:
        return None
    return (
        "is not as it was written; if somebody edited it, take out its two lines with mlsae-card, "
        "else restore it from a copy"
    )


def _model(plan: Plan, provenance: Sequence[Record]) -> str:
    place = _last(provenance, "model")
    source = _mapping(plan.source.get("model"))
    name = _name(_mapping(place).get("name"))
    revision, init = _mapping(place).get("revision"), source.get("init")
    details = [f"revision {revision}"] if isinstance(revision, str) else []
    if isinstance(init, str) and init != "trained":
        details.append(f"{init} weights, seed {source.get('init_seed')}")
    return ", ".join([name or "a model that was not named", *details])


def _text(provenance: Sequence[Record]) -> str:
    datasets = _last(provenance, "datasets")
    found = [_mapping(taken) for taken in (datasets if isinstance(datasets, list) else [])]
    names = [name for taken in found if (name := _name(taken.get("name")))]
    if len(names) == len(found) > 1:
        shares = [taken.get("share") for taken in found]
        names = [f"{name} (share {share})" for name, share in zip(names, shares, strict=True)]
    return ", ".join(names) or "not recorded"


def _licence(plan: Plan, provenance: Sequence[Record]) -> str | None:
    for given in (plan.source, *reversed(provenance)):
        if isinstance(licence := given.get("license"), str) and licence.strip():
            return licence.strip()
    return None


def _licence_keys(licence: str | None) -> list[str]:
    if licence is None:
        return ["license: unknown"]
    if licence.lower() in _KNOWN_LICENCES:
        return [f"license: {licence.lower()}"]
    slug = re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-")
    return ["license: other", f"license_name: {slug or 'other'}"]


def _table(
    plan: Plan,
    model: str,
    text: str,
    licence: str | None,
    num_bytes: int,
    cost: LargestAddedFVU | None,
) -> list[tuple[str, str]]:
    length, keep = plan.context_length, plan.keep_positions
    compression, derived = plan.compression, plan.derived_from
    rows = format_count(plan.num_rows)
    if keep is not None:
        rows += f": {counted(keep.num, 'position')} of each sequence, seed {keep.seed}"
    encoding: str = plan.encoding
    if compression is not None:
        encoding += f", compressed ({compression.name}, level {compression.level})"
    found = [
        ("model", _plain(model)),
        ("text", _plain(text)),
        (
            "tokens",
            f"{format_count(plan.num_tokens)} in {counted(plan.num_sequences, 'sequence')} "
            f"of {format_count(length)}",
        ),
        ("rows of each layer", rows),
        ("layers (from 0)", format_ranges(plan.layers)),
        ("sites", ", ".join(plan.sites)),
        ("channels (d_model)", format_count(plan.d_model)),
        ("encoding", encoding),
        ("FVU that the encoding adds", _added(cost)),
        ("size", format_bytes(num_bytes)),
        ("licence", _plain(licence or "not stated")),
        ("schema", plan.schema_version),
    ]
    if derived is not None:
        found.append(("made from", _plain(_derived(derived))))
    return found


def _added(cost: LargestAddedFVU | None) -> str:
    if cost is None:
        return "not recorded"
    shown = f"at most {cost.total:.2g} in a shard of a layer"
    return shown if cost.decile is None else f"{shown}, {cost.decile:.2g} in a decile of row norm"


def _derived(derived: Record) -> str:
    line = f"store {derived['store_id']}"
    sequences = derived.get("sequences")
    if isinstance(sequences, list) and len(sequences) == 2:
        line += f", sequences {sequences[0]} to {sequences[1]}"
    if isinstance(encoding := derived.get("encoding"), str):
        line += f", in {encoding}"
    return line


def _how_to_open(plan: Plan) -> list[str]:
    site, layer = plan.sites[0], plan.layers[0]
    stop = min(_SHOWN_ROWS, plan.num_rows)
    array = activation_array(site, layer)
    read = {
        "float32": [f'x = acts["{array}"][:{stop}]'],
        "float16": [f'x = acts["{array}"][:{stop}].astype("float32")'],
        "bfloat16": [
            f'bits = acts["{array}"][:{stop}]  # the upper halves of float32',
            'x = (bits.astype("uint32") << 16).view("float32")',
        ],
        "int8": [
            'names = "activations", "block_exponents"',
            f'q, e = (acts[f"{{name}}/{site}/{layer}"][:{stop}] for name in names)',
            f'mean, scale = (acts[f"channel_{{name}}/{site}"][0] for name in ("mean", "scale"))',
            "x = q * np.repeat(np.exp2(e / 8), 64, axis=1)[:, : q.shape[1]] * scale + mean",
        ],
    }[plan.encoding]
    tokens = (
        [f'token_ids = acts["tokens"][:{stop}]  # of these rows']
        if plan.keep_positions is None
        else [
            f'rows = acts["row_token"][:{stop}]  # the token of each of them',
            'token_ids = acts["tokens"][: int(rows[-1]) + 1][rows]',
        ]
    )
    return [
        "## With mlsae",
        "",
        "In this directory:",
        "",
        "```sh",
        "mlsae store info .",
        "mlsae store verify .",
        "```",
        "",
        "```python",
        "from mlsae.store import open_store",
        "",
        'store = open_store(".")',
        f'x = store.read("{site}", {layer}, 0, {stop})  # float32',
        f"token_ids = store.tokens()[store.row_tokens(0, {stop})]",
        "```",
        "",
        "`mlsae train --cache . --out sae` trains one sparse autoencoder on all layers. A URL of",
        "this directory does as well as its path.",
        "",
        "## Without",
        "",
        "By any Zarr v3 library:",
        "",
        "```python",
        *(["import numpy as np"] if plan.encoding == "int8" else []),
        "import zarr",
        "",
        'acts = zarr.open_group(".", mode="r")',
        *read,
        *tokens,
        "```",
    ]


def _last(provenance: Sequence[Record], key: str) -> object:
    """Value under a key in the latest record that has it."""
    return next((record[key] for record in reversed(provenance) if record.get(key)), None)


def _mapping(value: object) -> Record:
    return value if isinstance(value, Mapping) else {}


def _name(value: object) -> str:
    """A name on the hub as it is; the last part of a path on somebody's machine."""
    if not isinstance(value, str):
        return ""
    return PurePath(value).name if PurePath(value).is_absolute() else value


def _plain(text: str) -> str:
    """One line of Markdown in which nothing is markup."""
    return re.sub(r"([\\`*_{}\[\]<>|#~!&])", r"\\\1", _line(text))


def _quoted(text: str) -> str:
    """One line as a string of YAML, which JSON's are."""
    return json.dumps(_line(text), ensure_ascii=False)


def _line(text: str) -> str:
    """Others' words come from anywhere: one line, printable and short."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= _MOST_CHARACTERS else f"{line[: _MOST_CHARACTERS - 1]}…"
