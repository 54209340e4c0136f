"""The tokenizer that lies beside a model."""

import hashlib
from pathlib import Path
from typing import Any

import transformers

from mlsae.base.errors import InputError
from mlsae.base.files import canonical_json
from mlsae.models.explanation import explained
from mlsae.models.place import Place


def load_tokenizer(name_or_path: str | Path, *, revision: str | None = None) -> Any:
    """The tokenizer of a hub id or a local directory.

    Raises:
        InputError: there is none, it cannot be reached, or it cannot be read.
    """
    place = Place.of(name_or_path, revision)
    with explained(place, "tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            place.name,
            revision=place.revision,
            trust_remote_code=False,
            local_files_only=place.is_offline,
        )
    # Where its files are absent, some families build a tokenizer that knows no word.
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise InputError(
            f"{place.name} holds no tokenizer: expected tokenizer.json beside the model; save the "
            "model's tokenizer there"
        )
    return tokenizer


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hex SHA-256 of what a tokenizer's ids mean: its vocabulary and its special tokens."""
    return hashlib.sha256(
        canonical_json(
            {
                "vocabulary": tokenizer.get_vocab(),
                "special": sorted(tokenizer.all_special_ids),
                "bos": tokenizer.bos_token_id,
                "eos": tokenizer.eos_token_id,
            }
        )
    ).hexdigest()
