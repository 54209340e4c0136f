"""Tokenizer of a model, from the same directory or repository."""

import hashlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers

from mlsae.base.errors import InputError
from mlsae.base.files import canonical_json
from mlsae.models.source.explanation import explained
from mlsae.models.source.place import Place


def load_tokenizer(name_or_path: str | Path, *, revision: str | None = None) -> Any:
    """Load the tokenizer of a hub id or a local directory.

    Raises:
        InputError: there is no tokenizer, or it cannot be reached or read.
    """
    place = Place.of(name_or_path, revision)
    with explained(place, "tokenizer"):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                place.name,
                revision=place.revision,
                trust_remote_code=False,
                local_files_only=place.is_offline,
            )
        except (ValueError, ImportError) as error:
            if (lacking := _lacking(place)) is not None:
                raise InputError(lacking) from error
            raise
    # Where its files are absent, some families build a tokenizer that knows no word.
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise InputError(_absent(place))
    return tokenizer


def _lacking(place: Place) -> str | None:
    """Line on the files or the package without which there is no tokenizer; None for others."""
    folder = place.folder()
    if folder is None or (folder / "tokenizer.json").exists():
        return None
    pieces = sorted(folder.glob("*.model"))
    if pieces and find_spec("sentencepiece") is None:
        return (
            f"tokenizer {pieces[0].name} of {place.name} is read by sentencepiece, which is not "
            "installed: pip install sentencepiece protobuf"
        )
    known = [
        *pieces,
        *folder.glob("vocab*"),
        *folder.glob("merges.txt"),
        *folder.glob("*.tiktoken"),
    ]
    return None if known else _absent(place)


def _absent(place: Place) -> str:
    return (
        f"{place.name} holds no tokenizer: expected tokenizer.json beside the model; save the "
        "model's tokenizer there, or name the place of one with --tokenizer"
    )


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hex SHA-256 of a tokenizer's vocabulary and special tokens, which give ids their meaning."""
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


def special_ids(tokenizer: Any) -> list[int]:
    """Ids of all tokens that a tokenizer leaves out of its text on request, ascending.

    Beside BOS, EOS and their like those are tokens that were added as special ones, such as the
    marks of a chat template.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = {index for index, token in added.items() if token.special}
    return sorted(marked | set(tokenizer.all_special_ids))


def token_ids(tokenizer: Any, texts: Sequence[str], what: str) -> list[list[int]]:
    """Token ids of texts, without any special token.

    Args:
        tokenizer: a transformers tokenizer.
        texts: at least one.
        what: word for one of the texts in messages, such as `document`.

    Raises:
        InputError: a text is not valid Unicode, or the tokenizer fails on one, whatever it raises.
    """
    try:
        return _ids_of(texts, tokenizer)
    except BaseException as error:
        _require_failure(error)
        for text in texts:
            _check_unicode(text, what)
            try:
                _ids_of([text], tokenizer)
            except BaseException as alone:
                _require_failure(alone)
                raise InputError(_failed(tokenizer, alone, text, what)) from error
        raise InputError(_failed(tokenizer, error, texts[0], what)) from error


def _ids_of(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    # `verbose` off: texts longer than the model's context are the rule here.
    encoded = tokenizer(
        list(texts), add_special_tokens=False, verbose=False, return_attention_mask=False
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _require_failure(error: BaseException) -> None:
    """Pass on any end but a tokenizer's failure; a panic of one in Rust is no `Exception`."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def _failed(tokenizer: Any, error: BaseException, text: str, what: str) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"the tokenizer {tokenizer.name_or_path} fails on a {what} that begins {text[:40]!r}: "
        f"{reason}; leave the {what} out, or mend the tokenizer"
    )


def _check_unicode(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"a {what} is not valid Unicode: {text[error.start]!r} after "
            f"{text[max(error.start - 40, 0) : error.start]!r}; repair it or leave it out"
        ) from error


def texts_of_tokens(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Text of each token as it stands after another, with the space before a word.

    A token that is part of a character, or that the tokenizer cannot decode, gives U+FFFD.
    """
    try:
        return _second_texts(tokenizer, ids)
    except BaseException as error:
        _require_failure(error)
        if len(ids) <= 1:
            return ["\N{REPLACEMENT CHARACTER}"] * len(ids)
    return [text for token in ids for text in texts_of_tokens(tokenizer, [token])]


def _second_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    # Decoders drop the space that opens a text, or the mark of a word's continuation: a token that
    # stands second keeps them.
    once, twice = (
        tokenizer.batch_decode(
            [[token] * count for token in ids], clean_up_tokenization_spaces=False
        )
        for count in (1, 2)
    )
    return [two[len(one) :] for one, two in zip(once, twice, strict=True)]
