"""Prompts: read, checked, run through the transformer, and the table of their active latents.

Shapes: T tokens of a prompt, D = d_model, K active slots a row.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from mlsae.analyze.pairing import Pairing
from mlsae.analyze.results.tables import schema
from mlsae.base.errors import InputError
from mlsae.base.units import counted
from mlsae.store import AnyStore

if TYPE_CHECKING:
    from mlsae.models import Transformer

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """A prompt, tokenised as the harvest would tokenise the start of a sequence."""

    text: str
    """Text of the prompt, as given."""

    tokens: npt.NDArray[np.int64]
    """(T,) token ids, with the BOS that opens a context where the harvest opened each with one."""

    pieces: tuple[str, ...]
    """Text of each token."""

    eligible: npt.NDArray[np.bool_]
    """(T,) no special token, and a position that training did not skip."""


def read_texts(given: Sequence[str], file: Path | None) -> dict[str, str]:
    """Every prompt by its name in errors: those given, then a file's lines.

    Raises:
        InputError: the file is missing, empty or no UTF-8 text; or a prompt is empty.
    """
    texts = {f"prompt {n} of --prompt": text for n, text in enumerate(given, start=1)}
    if file is not None:
        try:
            content = file.read_text("utf-8")
        except OSError as error:
            raise InputError(f"--prompt-file {file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise InputError(
                f"--prompt-file {file}: expected UTF-8 text, got other bytes at {error.start}"
            ) from None
        if not content:
            raise InputError(f"--prompt-file {file} is empty: expected a prompt a line")
        lines = content.removesuffix("\n").split("\n")
        texts |= {f"line {n} of {file}": text for n, text in enumerate(lines, start=1)}
    for name, text in texts.items():
        if not text.strip():
            raise InputError(f"{name} is empty: give it some text, or leave it out")
    return texts


def prepare(
    texts: Mapping[str, str],
    transformer: "Transformer | None",
    reason: str | None,
    store: AnyStore,
    skip_positions: int,
) -> list[Prompt]:
    """Tokenise prompts as the harvest tokenised documents.

    Args:
        texts: name of each prompt → its text; may be empty.
        transformer: transformer of the store.
        reason: reason why there is no transformer.
        store: says how sequences open.
        skip_positions: tokens at positions below are not eligible.

    Raises:
        InputError: there is no transformer or no tokenizer, or not the recorded one; or a prompt is
            longer than the store's sequences, or has no token.
    """
    if not texts:
        return []
    if transformer is None:
        raise InputError(f"prompts need the transformer, and there is none: {reason}")
    from mlsae.models.source.tokenizer import (
        special_ids,
        texts_of_tokens,
        token_ids,
        tokenizer_sha256,
    )

    tokenizer = transformer.tokenizer
    recorded = store.source.get("tokenizer_sha256")
    if recorded is not None and recorded != (found := tokenizer_sha256(tokenizer)):
        raise InputError(
            f"the tokenizer of {transformer.name} is not the one this store was harvested with: "
            f"expected SHA-256 {recorded[:12]}, got {found[:12]}; put the right one beside the "
            "model, or leave the prompts out"
        )
    packing = store.source.get("packing")
    bos = packing.get("context_bos") if isinstance(packing, Mapping) else None
    opening = bos if isinstance(bos, list) else [] if bos is None else [bos]
    prompts = []
    for name, text in texts.items():
        (ids,) = token_ids(tokenizer, [text], "prompt")
        opens_itself = ids[: len(opening)] == opening
        tokens = np.asarray(ids if opens_itself else [*opening, *ids], dtype=np.int64)
        if len(tokens) > store.context_length:
            opened = ", the BOS that opens it included," if opening else ""
            raise InputError(
                f"{name} is too long: it has {counted(len(tokens), 'token')}{opened} and the "
                f"store's sequences {store.context_length:,}; shorten it"
            )
        if not ids:
            raise InputError(f"{name} has no token: {text!r}; give other text, or leave it out")
        eligible = ~np.isin(tokens, special_ids(tokenizer))
        eligible[:skip_positions] = False
        pieces = tuple(texts_of_tokens(tokenizer, tokens.tolist()))
        prompts.append(Prompt(text=text, tokens=tokens, pieces=pieces, eligible=eligible))
    return prompts


@torch.no_grad()
def prompts_table(
    prompts: Sequence[Prompt],
    transformer: "Transformer | None",
    pairing: Pairing,
    provenance: Mapping[str, str],
    progress: Callable[[int], object],
) -> pa.Table:
    """Run each prompt alone and encode activations at the SAE's site of every layer, in float32.

    Where the store's transformer was given noise for its token embeddings (`--init control`), the
    prompts get that of the tokens behind the store's own.

    Args:
        prompts: in order; without any, the table is empty.
        transformer: the store's, where there are prompts.
        pairing: store and SAE.
        provenance: goes into the schema's metadata.
        progress: told 1 for each finished prompt.
    """
    parts = []
    for number, prompt in enumerate(prompts):
        assert transformer is not None
        from mlsae.models import Inputs
        from mlsae.models.capture import capture

        inputs = Inputs(
            tokens=torch.from_numpy(prompt.tokens)[None].to(transformer.device),
            first_token=pairing.store.num_tokens + number * pairing.store.context_length,
        )
        live = capture(transformer, inputs, pairing.layers, [pairing.site])
        parts.append(_events(number, prompt, pairing, live))
        progress(1)
    whole = schema("prompts", provenance)
    return pa.concat_tables(parts).cast(whole) if parts else whole.empty_table()


def _events(
    number: int, prompt: Prompt, pairing: Pairing, live: Mapping[tuple[str, int], torch.Tensor]
) -> pa.Table:
    """Rows of one prompt, by position, then layer, then latent."""
    found: list[tuple[Array, ...]] = []
    for layer in pairing.layers:
        x_TD = live[pairing.site, layer][0].float().to(pairing.device)
        encoded = pairing.sae.encode(x_TD, layer)
        values, latents = encoded.values.cpu().numpy(), encoded.indices.cpu().numpy()
        positions, slots = np.nonzero(values)
        at = (positions, slots)
        found.append((positions, np.full_like(positions, layer), latents[at], values[at]))
    positions, layers, latents, values = (np.concatenate(of) for of in zip(*found, strict=True))
    order = np.lexsort((latents, layers, positions))
    positions = positions[order]
    pieces = np.asarray(prompt.pieces, dtype=object)
    return pa.table(
        {
            "prompt": pa.array(np.full(len(order), number, np.int32)),
            "position": positions.astype(np.int32),
            "token_id": prompt.tokens[positions].astype(np.int32),
            "piece": pa.array(pieces[positions], pa.string()),
            "eligible": prompt.eligible[positions],
            "layer": layers[order].astype(np.int32),
            "latent": latents[order].astype(np.int32),
            "value": values[order],
        },
        schema=schema("prompts", {}),
    )
