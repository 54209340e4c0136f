"""Sizes, limits and identity of a harvest, fixed before its first forward pass."""

import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import mlsae
from mlsae.base.errors import InputError, ResourceError, without_secrets
from mlsae.base.files import local_path
from mlsae.base.machine.resources import require_disk
from mlsae.base.ranks import Ranks
from mlsae.base.units import format_bytes
from mlsae.harvest.compute.batch_size import useful_batch_size
from mlsae.harvest.config import DEFAULT_CONTEXT_LENGTH, HarvestConfig
from mlsae.harvest.text.packing import PackedText
from mlsae.models import Transformer
from mlsae.models.sites import check_sites
from mlsae.models.source.tokenizer import tokenizer_sha256
from mlsae.store import PADDING, PlanMismatchError
from mlsae.store.format.compression import compression_named
from mlsae.store.format.encoding import Encoding, parts_of
from mlsae.store.format.layout import SHARD_BYTES, Layout, plan_layout, shard_bytes_for
from mlsae.store.format.presets import PRESETS, resolve_preset
from mlsae.store.plan import KeptPositions, Plan
from mlsae.store.write.plan import find_plan


@dataclass(frozen=True, kw_only=True)
class Request:
    """Settings resolved against a model's config; known before any text is read."""

    config: HarvestConfig
    context_length: int
    """Tokens of a sequence."""
    layers: tuple[int, ...]
    """Blocks, ascending."""
    sites: tuple[str, ...]
    """Sites in the order of a block."""
    batch_sequences: int
    """Sequences of a forward pass; the most that is useful, as long as `batch_is_free`."""
    batch_is_free: bool
    """Neither the user nor a plan at `out` fixes `batch_sequences`, so memory decides it."""
    row_bytes: int
    """Bytes of a stored row of one site and layer."""
    present: Plan | None
    """Plan of the store at `out`, if one was begun."""


def resolve(config: HarvestConfig, model: Transformer, device_kind: str) -> Request:
    """Resolve a configuration against a model, and against the plan at `out` if there is one.

    Raises:
        InputError: the model has no such layers, sites or positions.
        PlanMismatchError: a store of another plan is at `out`.
    """
    context_length = _context_length(config.context_length, model)
    layers = model.check_layers(range(model.num_layers) if config.layers is None else config.layers)
    sites = check_sites(model, config.sites)
    if config.keep_positions is not None and config.keep_positions > context_length:
        raise InputError(
            f"--keep-positions {config.keep_positions} is more than the {context_length} positions "
            "of a sequence; use fewer, or leave it out to keep all"
        )
    keep = kept_by(config)
    asked: dict[str, Any] = {
        "context_length": context_length,
        "layers": list(layers),
        "sites": list(sites),
        "d_model": model.d_model,
        "keep_positions": None if keep is None else asdict(keep),
    }
    compression = compression_named(resolve_preset(config.sized_as).compression)
    asked["compression"] = None if compression is None else asdict(compression)
    if config.asked_encoding != "auto":
        asked["encoding"] = resolve_preset(config.asked_encoding).encoding
    if config.batch_size is not None:
        asked["batch_sequences"] = config.batch_size
    parts = parts_of(resolve_preset(config.sized_as).encoding, model.d_model)
    kept = context_length if keep is None else keep.num
    shard_sequences = (config.shard_size or SHARD_BYTES) // (kept * parts[0].row_bytes)
    present = find_plan(config.out)
    if present is not None:
        _refuse_difference(config.out, asked, present)
    return Request(
        config=config,
        context_length=context_length,
        layers=layers,
        sites=sites,
        batch_sequences=config.batch_size
        or (present.batch_sequences if present else None)
        or useful_batch_size(device_kind, context_length, shard_sequences),
        batch_is_free=config.batch_size is None and present is None,
        row_bytes=sum(part.row_bytes for part in parts),
        present=present,
    )


def kept_by(config: HarvestConfig) -> KeptPositions | None:
    """Positions whose activations are to be stored; None for all."""
    if config.keep_positions is None:
        return None
    return KeptPositions(num=config.keep_positions, seed=config.keep_seed)


def _refuse_difference(out: Path, asked: dict[str, Any], present: Plan) -> None:
    if lines := present.differences(asked):
        raise PlanMismatchError(
            f"{out} holds a store of another plan ({'; '.join(lines[:3])}); give the settings it "
            "was made with, or another directory"
        )


def _context_length(asked: int | None, model: Transformer) -> int:
    most = model.max_context_length
    if asked is None:
        return DEFAULT_CONTEXT_LENGTH if most is None else min(most, DEFAULT_CONTEXT_LENGTH)
    if most is not None and asked > most:
        raise InputError(
            f"--context-length {asked} is longer than the {most} positions of model {model.name}; "
            f"use {most} or less"
        )
    return asked


def check_vocabulary(packed: PackedText, model: Transformer) -> None:
    """Refuse text with tokens that the model does not know.

    Raises:
        InputError: a token of the text has no row in the model's embedding.
    """
    largest = int(packed.tokens.max())
    if largest >= model.vocab_size:
        # Padding is seen by no token, so that any id serves for it.
        largest = int(packed.tokens[packed.token_flags & PADDING == 0].max())
    if largest >= model.vocab_size:
        raise InputError(
            f"the text holds token {largest}, but the embedding of {model.name} has "
            f"{model.vocab_size} rows; model and tokenizer (or --tokens-column) do not belong "
            "together"
        )


def layouts(request: Request, packed: PackedText, d_model: int) -> dict[str, Layout]:
    """Rows, shards and bytes of the store in each encoding; upper bounds where it is compressed."""
    return {
        name: plan_layout(
            num_tokens=len(packed.tokens),
            context_length=packed.context_length,
            layers=request.layers,
            sites=request.sites,
            d_model=d_model,
            encoding=preset.encoding,
            compressed=preset.compression != "none",
            batch_sequences=request.batch_sequences,
            keep_positions=request.config.keep_positions,
            shard_bytes=shard_bytes(request, len(packed.tokens), d_model, preset.encoding),
        )
        for name, preset in PRESETS.items()
    }


def shard_bytes(request: Request, num_tokens: int, d_model: int, encoding: Encoding) -> int:
    """Bytes of a shard: those asked for, those of a store begun before, or the default."""
    config, length = request.config, request.context_length
    if config.shard_size is not None:
        return config.shard_size
    num_rows = num_tokens // length * (config.keep_positions or length)
    default = shard_bytes_for(num_rows, parts_of(encoding, d_model)[0].row_bytes)
    present = request.present
    if present is None:
        return default
    former = plan_layout(
        num_tokens=num_tokens,
        context_length=length,
        layers=request.layers,
        sites=request.sites,
        d_model=d_model,
        encoding=encoding,
        compressed=present.compression is not None,
        batch_sequences=request.batch_sequences,
        keep_positions=config.keep_positions,
        shard_bytes=SHARD_BYTES,
    )
    # Earlier versions made them as large whatever the size of the store.
    is_former = (former.chunk_rows, former.shard_rows) == (present.chunk_rows, present.shard_rows)
    return SHARD_BYTES if is_former else default


def require_room(config: HarvestConfig, layout: Layout, num_tokens: int) -> None:
    """Refuse a harvest that does not fit, before it starts.

    Files that an interrupted harvest has already written at `out` are not needed again.

    Raises:
        ResourceError: the store would be larger than --max-disk or than the disk has free.
    """
    total = layout.total_bytes
    if config.max_disk is not None and total > config.max_disk:
        fits = num_tokens * config.max_disk // total
        bound = "" if resolve_preset(config.sized_as).compression == "none" else "up to "
        raise ResourceError(
            f"the store would take {bound}{format_bytes(total)}, over --max-disk "
            f"{format_bytes(config.max_disk)}; use --max-tokens {fits}, fewer --layers or "
            "--keep-positions"
        )
    present = sum(file.stat().st_size for file in config.out.rglob("*") if file.is_file())
    require_disk(
        config.out,
        total - present,
        "the store",
        "use a smaller --max-tokens, fewer --layers or --keep-positions",
    )


def source_of(model: Transformer, packed: PackedText) -> dict[str, Any]:
    """Model, tokenizer and packing that made the values: the harvest's part of a store's plan."""
    return {
        "model": model.describe(),
        "tokenizer_sha256": tokenizer_sha256(model.tokenizer),
        "packing": packed.joints.describe(),
    }


def producer_of(model: Transformer) -> dict[str, str]:
    """Influences on bits beside the plan: the kind of device and the version of torch."""
    if model.device.type == "cuda":
        device = torch.cuda.get_device_name(model.device)
    else:
        device = f"cpu {torch.backends.cpu.get_cpu_capability()}"
    return {"device": device, "torch": torch.__version__}


def provenance_of(
    config: HarvestConfig, packed: PackedText, model: Transformer, ranks: Ranks
) -> dict[str, Any]:
    """Under which circumstances: recorded beside the plan, without a part in any identity."""
    return {
        "kind": "harvest",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": model.place(),
        "datasets": [
            {
                "name": _resolved(taken.name),
                "share": taken.share,
                "num_documents": taken.num_documents,
                "num_tokens": taken.num_tokens,
            }
            for taken in packed.taken
        ],
        **{
            name: getattr(config, name)
            for name in (
                "split", "subset", "shuffle_seed", "text_column", "tokens_column", "bos",
                "max_tokens",
            )
        },
        "num_documents": packed.num_documents,
        "num_left_over": packed.num_left_over,
        "num_cut": packed.num_cut,
        "world_size": ranks.world_size,
        **producer_of(model),
        "torch_threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": {
            "mlsae": mlsae.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")},
        },
    }  # fmt: skip


def _resolved(name: str) -> str:
    name = without_secrets(name)
    path = local_path(name)
    return str(path.resolve()) if path.exists() else name
