"""What a harvest will be, fixed before its first forward pass: sizes, limits, identity."""

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import mlsae
from mlsae.base.errors import InputError, ResourceError
from mlsae.base.resources import require_disk
from mlsae.base.units import format_bytes
from mlsae.harvest.config import DEFAULT_CONTEXT_LENGTH, HarvestConfig
from mlsae.harvest.packing import Joints, PackedText, tokenizer_sha256
from mlsae.harvest.ranks import Ranks
from mlsae.models import Transformer
from mlsae.store.encoding import STORED_DTYPE, check_encoding
from mlsae.store.layout import Layout, plan_layout

SITE = "resid_post"


def choose_context_length(asked: int | None, model: Transformer) -> int:
    """Tokens of a sequence: what was asked for, or the model's maximum but at most 1,024.

    Raises:
        InputError: longer than the model has positions for.
    """
    most = model.max_context_length
    if asked is None:
        return DEFAULT_CONTEXT_LENGTH if most is None else min(most, DEFAULT_CONTEXT_LENGTH)
    if most is not None and asked > most:
        raise InputError(
            f"--context-length {asked} is longer than the {most} positions of model {model.name}; "
            f"use {most} or less"
        )
    return asked


def choose_layers(asked: Sequence[int] | None, model: Transformer) -> tuple[int, ...]:
    """The layers to store: those asked for, or all.

    Raises:
        InputError: a layer that the model does not have.
    """
    return model.check_layers(range(model.num_layers) if asked is None else asked)


def check_vocabulary(packed: PackedText, model: Transformer) -> None:
    """Refuse a tokenizer that knows more tokens than the model.

    Raises:
        InputError: a token of the text has no row in the model's embedding.
    """
    largest = int(packed.tokens.max())
    if largest >= model.vocab_size:
        raise InputError(
            f"the tokenizer of {model.name} gives token {largest}, but the model's embedding has "
            f"{model.vocab_size} rows; model and tokenizer do not belong together"
        )


def layouts(
    config: HarvestConfig, packed: PackedText, layers: Sequence[int], d_model: int
) -> dict[str, Layout]:
    """Rows, shards and bytes of the store in each encoding."""
    return {
        encoding: plan_layout(
            num_tokens=len(packed.tokens),
            context_length=packed.context_length,
            layers=layers,
            sites=(SITE,),
            d_model=d_model,
            encoding=check_encoding(encoding),
            batch_sequences=config.batch_size,
            shard_bytes=config.shard_bytes,
        )
        for encoding in STORED_DTYPE
    }


def require_room(config: HarvestConfig, layout: Layout, num_tokens: int) -> None:
    """Refuse a harvest that does not fit, before it starts.

    What an interrupted harvest has already written at `out` is not needed again.

    Raises:
        ResourceError: the store would be larger than --max-disk or than the disk has free.
    """
    total = layout.total_bytes
    if config.max_disk is not None and total > config.max_disk:
        fits = num_tokens * config.max_disk // total
        raise ResourceError(
            f"the store would take {format_bytes(total)}, over --max-disk "
            f"{format_bytes(config.max_disk)}; use --max-tokens {fits} or fewer --layers"
        )
    present = sum(file.stat().st_size for file in config.out.rglob("*") if file.is_file())
    require_disk(
        config.out, total - present, "the store", "use a smaller --max-tokens or fewer --layers"
    )


def source_of(model: Transformer, packing: Joints) -> dict[str, Any]:
    """What made the values: the harvest's part of the store's plan."""
    return {
        "model": model.describe(),
        "tokenizer_sha256": tokenizer_sha256(model.tokenizer),
        "packing": packing.describe(),
    }


def provenance_of(
    config: HarvestConfig, packed: PackedText, model: Transformer, ranks: Ranks
) -> dict[str, Any]:
    """Under which circumstances: recorded beside the plan, without a part in any identity."""
    dataset = Path(config.dataset).expanduser()
    return {
        "kind": "harvest",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": model.place(),
        "dataset": str(dataset.resolve()) if dataset.exists() else config.dataset,
        "split": config.split,
        "text_column": config.text_column,
        "max_tokens": config.max_tokens,
        "num_documents": packed.num_documents,
        "num_left_over": packed.num_left_over,
        "world_size": ranks.world_size,
        "device": torch.cuda.get_device_name(model.device)
        if model.device.type == "cuda"
        else "cpu",
        "torch_threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": {
            "mlsae": mlsae.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")},
        },
    }
