"""A transformer from a hub id or a local directory, in any of its initialisations."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils import logging as transformers_logging

from mlsae.base.errors import InputError
from mlsae.models.families.attention import BY_BLOCKS, blocks_pay, register
from mlsae.models.families.kinds import (
    DECODER,
    ENCODER,
    auto_class,
    construction,
    kind_of,
    settled,
)
from mlsae.models.families.sketch import sketch
from mlsae.models.passes.trial import looks_ahead
from mlsae.models.source.explanation import config_explained, explained
from mlsae.models.source.place import Place
from mlsae.models.structure.blocks import find_blocks
from mlsae.models.transformer import Transformer
from mlsae.models.weights import placement
from mlsae.models.weights.checkpoint import (
    WRAPPERS,
    check_codes,
    check_quantization,
    is_wrapped,
    lacks_head,
    left_out,
)
from mlsae.models.weights.initialization import check_init, needs_redraw, redraw

# The logger is not typed.
_logging: Any = transformers_logging

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    attention_implementation: str = "auto",
    init: str = "trained",
    init_seed: int = 0,
    blocks: str | None = None,
    device_map: str | None = None,
    tokenizer: str | Path | None = None,
) -> Transformer:
    """Load a decoder or an encoder, in eval mode and without gradients.

    Code from a model's repository is never run.

    Args:
        name_or_path: a local directory in the transformers layout, or a hub id.
        revision: branch, tag or commit of a hub model.
        dtype: `float32`, `float16`, `bfloat16`, or `auto` for the checkpoint's own.
        device: where to put the weights.
        attention_implementation: `eager`, `sdpa`, `sdpa_by_blocks`, …; `auto` for
            `sdpa_by_blocks` where it is faster on this machine, else for the library's choice.
        init: one of `weights.initialization.INITS`; `random` needs the config only, no weights.
        init_seed: seed of the random draws, for every init but `trained`.
        blocks: dotted path of the list of blocks in the backbone, where it cannot be found.
        device_map: None, or `auto` to spread the weights over all GPUs, then the CPU's memory,
            then the disk, in place of `device`.
        tokenizer: directory or hub id of the tokenizer, where it does not lie beside the model.

    Raises:
        InputError: the model does not exist, cannot be reached, is damaged, incomplete, not what
            its files hold, or neither a decoder nor an encoder; its blocks cannot be found, it
            cannot be run, or an argument has no such value.
        ResourceError: too little memory for the weights.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(f"--model-dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")
    check_init(init, init_seed)
    placement.check_device_map(device_map)
    place = Place.of(name_or_path, revision)
    attention = None if attention_implementation == "auto" else attention_implementation
    # Random weights are drawn in memory, and spread afterwards.
    spread = None if needs_redraw(init) or init == "random" else device_map
    register()
    with explained(place, "model"), _quiet():
        with config_explained(place):
            config, place = _config(place), place.pinned()
            kind = kind_of(config, place.name)
            drawing = sketch(config, kind, attention)
        headless, unexpected = False, ()
        weights_dtype = DTYPES.get(dtype) or getattr(config, "dtype", None)
        if spread is None:
            placement.require_memory_for(drawing, weights_dtype, place.name)
        if init == "random":
            model = _from_config(config, kind, weights_dtype, attention, init_seed)
        else:
            model, info = _pretrained(place, config, kind, dtype, attention, spread)
            headless, unexpected = lacks_head(model, info, place.name), info["unexpected_keys"]
    if needs_redraw(init):
        redraw(model, init, init_seed)
    if device_map is None:
        placement.move(model, device, place.name)
    elif not hasattr(model, "hf_device_map"):
        placement.dispatch(model, place.name)
    transformer = _transformer(
        place, model, config, kind, blocks, tokenizer, init=init, init_seed=init_seed
    )
    if headless:
        transformer = replace(transformer, model=transformer.backbone, has_head=False)
    note = left_out(
        transformer.backbone,
        model.base_model_prefix,
        transformer.blocks_path,
        unexpected,
        place.name,
    )
    if kind == DECODER and looks_ahead(transformer):
        transformer = replace(transformer, model=transformer.backbone, kind=ENCODER)
    if transformer.predicts and note is not None:
        transformer = replace(transformer, notes=(note,))
    if (
        attention is None
        and transformer.kind == DECODER
        and blocks_pay(transformer.model, transformer.device)
    ):
        transformer.model.set_attn_implementation(BY_BLOCKS)
    return transformer


def outline(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    blocks: str | None = None,
    tokenizer: str | Path | None = None,
) -> Transformer:
    """Build a model from its config alone: blocks, sizes and tokenizer, but no weights.

    Its tensors are on torch's `meta` device; they cost no memory, and the model cannot be run.

    Raises:
        InputError: as `load`, for the config and the blocks.
    """
    place = Place.of(name_or_path, revision)
    with explained(place, "model"), config_explained(place), _quiet():
        config, place = _config(place), place.pinned()
        kind = kind_of(config, place.name)
        model = sketch(config, kind)
    return _transformer(place, model, config, kind, blocks, tokenizer)


def load_for(
    record: Mapping[str, Any],
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    device_map: str | None = None,
    tokenizer: str | Path | None = None,
) -> Transformer:
    """Load the model that a store was harvested from, initialisation included.

    Args:
        record: `Transformer.describe()` of that model, as in a store's `source["model"]`.
        name_or_path: a hub id or a local directory.
        revision: branch, tag or commit of a hub id.
        device: where to put the weights.
        device_map: None or `auto`, as for `load`.
        tokenizer: directory or hub id, as for `load`.

    Raises:
        InputError: as `load`; or weights or config differ from the recorded ones.
        ResourceError: as `load`.
    """
    seed = record["init_seed"]
    transformer = load(
        name_or_path,
        revision=revision,
        dtype=record["dtype"],
        device=device,
        attention_implementation=record["attention_implementation"],
        init=record["init"],
        init_seed=0 if seed is None else seed,
        blocks=record["blocks"],
        device_map=device_map,
        tokenizer=tokenizer,
    )
    found = transformer.describe()
    for key, what in (("fingerprint", "weights"), ("config_sha256", "config")):
        if found[key] != record[key]:
            raise InputError(
                f"model {transformer.name} is not the one this store was harvested from: expected "
                f"{what} with SHA-256 {str(record[key])[:12]}, got {str(found[key])[:12]}; give "
                "the right one with --model"
            )
    return transformer


def _config(place: Place) -> Any:
    if (adapter := place.adapter()) is not None:
        raise InputError(
            f"{place.name} holds an adapter ({adapter.get('peft_type', 'of PEFT')}) of "
            f"{adapter.get('base_model_name_or_path') or 'the model beside it'}, whose weights "
            "would be left out; merge it (merge_and_unload of peft, then save_pretrained) and give "
            "the merged model, or move adapter_config.json away to take the model without it"
        )
    if place.is_directory and not (Path(place.name) / "config.json").is_file():
        raise InputError(
            f"{place.name} is no model directory: it holds no config.json; give a directory in "
            "the layout of transformers' save_pretrained, or a hub id"
        )
    config = transformers.AutoConfig.from_pretrained(
        place.name,
        revision=place.revision,
        trust_remote_code=False,
        local_files_only=place.is_offline,
    )
    return settled(config)


def _pretrained(
    place: Place, config: Any, kind: str, dtype: str, attention: str | None, device_map: str | None
) -> tuple[Any, dict[str, Any]]:
    """Load a model with its trained weights, to the CPU or spread by `device_map`.

    Returns:
        The model and its loading info, as transformers returns it.
    """

    def loaded(**more: Any) -> tuple[Any, dict[str, Any]]:
        model, info = auto_class(config, kind).from_pretrained(
            place.name,
            config=config,
            revision=place.revision,
            dtype=DTYPES.get(dtype, dtype),
            attn_implementation=attention,
            device_map=device_map,
            trust_remote_code=False,
            local_files_only=place.is_offline,
            # Said below, in one line.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **construction(config, kind),
            **more,
        )
        return model, info

    check_quantization(config, place.name)
    with placement.full_memory_explained(place.name, "of the GPUs", "fewer processes"):
        model, info = loaded()
        if is_wrapped(info["unexpected_keys"]):
            model, info = loaded(key_mapping=dict.fromkeys(WRAPPERS, ""))
    check_codes(model, place.folder(), place.name)
    return model, info


def _from_config(
    config: Any, kind: str, dtype: torch.dtype | None, attention: str | None, seed: int
) -> Any:
    """Build a model with the random weights of its own config, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto_class(config, kind).from_config(
            config,
            dtype=torch.float32 if dtype is None else dtype,
            attn_implementation=attention,
            trust_remote_code=False,
            **construction(config, kind),
        )


def _transformer(
    place: Place,
    model: Any,
    config: Any,
    kind: str,
    blocks: str | None,
    tokenizer: str | Path | None,
    **drawn: Any,
) -> Transformer:
    backbone, text = model.base_model, config.get_text_config()
    num_layers = getattr(text, "num_hidden_layers", None)
    if not (num_layers and getattr(text, "hidden_size", None)):
        raise InputError(
            f"the config of model {place.name} ({config.model_type}) has no num_hidden_layers or "
            "no hidden_size: expected one stack of blocks with one residual stream"
        )
    decoder = model.get_decoder()
    within = decoder if isinstance(decoder, nn.Module) else backbone
    path, modules = find_blocks(backbone, int(num_layers), blocks, within=within)
    return Transformer(
        model=model.eval().requires_grad_(False),
        blocks=modules,
        blocks_path=path,
        name=place.name,
        revision=place.revision,
        kind=kind,
        tokenizer_name=None if tokenizer is None else Place.of(tokenizer, None).name,
        **drawn,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the bars and reports of transformers; `_pretrained` checks and reports itself."""
    shown, level = _logging.is_progress_bar_enabled(), _logging.get_verbosity()
    _logging.disable_progress_bar()
    _logging.set_verbosity_error()
    try:
        yield
    finally:
        _logging.set_verbosity(level)
        if shown:
            _logging.enable_progress_bar()
