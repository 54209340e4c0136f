"""A transformer from a hub id or a local directory, and each way that can fail in one line."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants as hub
from huggingface_hub import errors as hub_errors
from transformers.utils import logging as transformers_logging

from mlsae.base.errors import InputError, ResourceError
from mlsae.models.blocks import find_blocks
from mlsae.models.transformer import Transformer

# The auto classes and the logger are typed too loosely, or not at all, to be checked here.
_AutoModel: Any = transformers.AutoModelForCausalLM
_logging: Any = transformers_logging

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    attention_implementation: str | None = None,
) -> Transformer:
    """Load a causal language model, in eval mode and without gradients.

    Code from a model's repository is never run.

    Args:
        name_or_path: a local directory in the transformers layout, or a hub id.
        revision: branch, tag or commit of a hub model.
        dtype: `float32`, `float16`, `bfloat16`, or `auto` for the checkpoint's own.
        device: where to put the weights.
        attention_implementation: `eager`, `sdpa`, …; None for the library's choice.

    Raises:
        InputError: there is no such model, it cannot be reached, it is damaged, incomplete or
            not a causal language model, or its blocks cannot be found.
        ResourceError: the device has too little memory for the weights.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(f"--model-dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")
    place = _Place.of(name_or_path, revision)
    with _explained(place, "model"), _no_progress_bar():
        config = _config(place)
        model, info = _AutoModel.from_pretrained(
            place.name,
            config=config,
            revision=place.revision,
            dtype=DTYPES.get(dtype, dtype),
            attn_implementation=attention_implementation,
            trust_remote_code=False,
            output_loading_info=True,
        )
    lacking = sorted({*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])})
    if lacking:
        raise InputError(
            f"model {place.name} is incomplete: its files lack {len(lacking)} of its weights or "
            f"hold them in another shape, the first {lacking[0]}; fetch the model again"
        )
    try:
        model = model.to(device)
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"not enough memory on {device} for the weights of {place.name}; use a smaller "
            "--model-dtype or another --device"
        ) from error
    return _transformer(place, model.eval().requires_grad_(False), config)


def outline(name_or_path: str | Path, *, revision: str | None = None) -> Transformer:
    """The same model from its config alone: blocks, sizes and tokenizer, but no weights.

    Its tensors are on torch's `meta` device. It costs no memory and cannot be run.

    Raises:
        InputError: as `load`, for the config and the blocks.
    """
    place = _Place.of(name_or_path, revision)
    with _explained(place, "model"):
        config = _config(place)
        with torch.device("meta"):
            model = _AutoModel.from_config(config, trust_remote_code=False)
    return _transformer(place, model.eval().requires_grad_(False), config)


def load_for(
    record: Mapping[str, Any],
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
) -> Transformer:
    """Load the very model that a store was harvested from.

    Args:
        record: `Transformer.describe()` of that model, as in a store's `source["model"]`.
        name_or_path: where it is: a hub id or a local directory.
        revision: branch, tag or commit of a hub id.
        device: where to put the weights.

    Raises:
        InputError: as `load`, or the weights or the config differ from the recorded ones.
    """
    transformer = load(
        name_or_path,
        revision=revision,
        dtype=record["dtype"],
        device=device,
        attention_implementation=record["attention_implementation"],
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


def load_tokenizer(name_or_path: str | Path, *, revision: str | None = None) -> Any:
    """The tokenizer of a hub id or a local directory.

    Raises:
        InputError: there is none, it cannot be reached, or it cannot be read.
    """
    place = _Place.of(name_or_path, revision)
    with _explained(place, "tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            place.name, revision=place.revision, trust_remote_code=False
        )
    # Where its files are absent, some families build a tokenizer that knows no word.
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise InputError(
            f"{place.name} holds no tokenizer: expected tokenizer.json beside the model; save the "
            "model's tokenizer there"
        )
    return tokenizer


@dataclass(frozen=True)
class _Place:
    """Where a model is looked for."""

    name: str
    revision: str | None
    is_directory: bool

    @classmethod
    def of(cls, name_or_path: str | Path, revision: str | None) -> "_Place":
        text = str(name_or_path)
        path = Path(text).expanduser()
        if path.is_dir():
            return cls(str(path.resolve()), None, True)
        if path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
            raise InputError(f"there is no model directory {text}; give another path or a hub id")
        return cls(text, revision, False)


def _config(place: _Place) -> Any:
    if place.is_directory and not (Path(place.name) / "config.json").is_file():
        raise InputError(
            f"{place.name} is no model directory: it holds no config.json; give a directory in "
            "the layout of transformers' save_pretrained, or a hub id"
        )
    return transformers.AutoConfig.from_pretrained(
        place.name, revision=place.revision, trust_remote_code=False
    )


def _transformer(place: _Place, model: Any, config: Any) -> Transformer:
    num_layers = int(config.get_text_config().num_hidden_layers)
    return Transformer(
        model=model,
        blocks=find_blocks(model.base_model, num_layers),
        name=place.name,
        revision=getattr(config, "_commit_hash", None) or place.revision,
    )


@contextmanager
def _explained(place: _Place, what: str) -> Iterator[None]:
    """Turn what transformers and the hub raise into one line for the user."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, hub_errors.HfHubHTTPError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(_explanation(place, what, error)) from error
    except Exception as error:
        # safetensors raises a bare Exception subclass for a damaged file.
        if type(error).__module__.partition(".")[0] not in ("safetensors", "safetensors_rust"):
            raise
        raise InputError(
            f"the weights of model {place.name} are damaged ({_first_line(error)}); fetch the "
            "model again"
        ) from error


def _explanation(place: _Place, what: str, error: BaseException) -> str:
    reasons = [error]
    while (cause := reasons[-1].__cause__ or reasons[-1].__context__) is not None:
        reasons.append(cause)

    def because(*classes: type[BaseException]) -> bool:
        return any(isinstance(reason, classes) for reason in reasons)

    name = place.name
    if "trust_remote_code" in str(error):
        return f"{what} {name} needs code from its own repository, which this package never runs"
    if place.is_directory:
        return f"{what} in {name} cannot be read: {_first_line(error)}"
    if because(hub_errors.GatedRepoError):
        return (
            f"{what} {name} is gated on {hub.ENDPOINT}: ask for access on its page, then log in "
            "with `hf auth login`"
        )
    if because(hub_errors.RevisionNotFoundError):
        return f"{what} {name} has no revision {place.revision!r} on {hub.ENDPOINT}"
    if because(hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError):
        return (
            f"there is no {what} {name!r}: no such directory here and no such model on "
            f"{hub.ENDPOINT}; check the spelling, or log in with `hf auth login` if it is private"
        )
    if because(hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled):
        return (
            f"cannot find {what} {name!r}: no such directory here, not in the cache "
            f"{hub.HF_HUB_CACHE}, and {hub.ENDPOINT} cannot be reached; give a local directory, "
            f"or run `hf download {name}` where there is a network and copy the cache"
        )
    return f"{what} {name} cannot be loaded: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Weights of a local file load in a moment; a bar for it would cut through ours."""
    shown = _logging.is_progress_bar_enabled()
    _logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            _logging.enable_progress_bar()
