"""A loaded transformer: blocks, tokenizer, sizes, and its recorded identity."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from mlsae.base.errors import InputError
from mlsae.models.families.kinds import DECODER, max_context_length
from mlsae.models.source.tokenizer import load_tokenizer
from mlsae.models.weights.fingerprint import config_sha256, weights_sha256
from mlsae.models.weights.placement import input_device


@dataclass(frozen=True, kw_only=True, eq=False)
class Transformer:
    """A model from the transformers library, in eval mode, without gradients."""

    model: Any
    """A decoder's `*ForCausalLM` module; the `*Model` module where there is no head."""
    blocks: list[nn.Module]
    """Blocks in order; layer i is block i's output, before any final norm."""
    blocks_path: str
    """Dotted path to the list of blocks in `backbone`."""
    name: str
    """Hub id, or a local directory's absolute path."""
    revision: str | None = None
    """Commit, for a hub model; None for a local directory."""
    kind: str = DECODER
    """Either `decoder` or `encoder`; an encoder has no head and no logits."""
    init: str = "trained"
    """The weights' origin, one of `weights.initialization.INITS`."""
    init_seed: int = 0
    """Seed for the initialisation; without meaning for `trained`."""
    has_head: bool = True
    """False for a decoder that was saved without its language-model head."""
    tokenizer_name: str | None = None
    """Hub id or absolute path of a tokenizer that lies elsewhere; None for the model's own."""
    notes: tuple[str, ...] = ()
    """Lines on weights in the checkpoint for which this model has no use."""

    @property
    def backbone(self) -> nn.Module:
        """The model without its language-model head, which an encoder lacks anyway."""
        return self.model.base_model  # type: ignore[no-any-return]

    @property
    def predicts(self) -> bool:
        """True for a decoder with its head, which gives logits of the next token."""
        return self.kind == DECODER and self.has_head

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self._text_config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """Token ids, counted by the embedding's rows."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def max_context_length(self) -> int | None:
        """Most positions in a sequence; None where there is no limit."""
        return max_context_length(self.model)

    @property
    def device(self) -> torch.device:
        """The token embedding's device, which takes the tokens."""
        return input_device(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The weights' precision."""
        return self.model.dtype  # type: ignore[no-any-return]

    @property
    def config_hash(self) -> str:
        """The config's hex SHA-256; see `weights.fingerprint.config_sha256`."""
        return config_sha256(self.model.config)

    @property
    def attention_implementation(self) -> str:
        """Name of the attention: `sdpa`, `sdpa_by_blocks`, `eager`, `flash_attention_2`, …"""
        return str(self.model.config._attn_implementation)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, read at first use.

        Raises:
            InputError: there is no tokenizer, or it cannot be read.
        """
        if self.tokenizer_name is not None:
            return load_tokenizer(self.tokenizer_name)
        return load_tokenizer(self.name, revision=self.revision)

    @cached_property
    def _fingerprint(self) -> str:
        return weights_sha256(self.model)

    def fingerprint(self) -> str:
        """Hex SHA-256 over the loaded weights; see `weights.fingerprint.weights_sha256`."""
        return self._fingerprint

    def describe(self) -> dict[str, str | int | None]:
        """The model's identity, as the `model` entry in a store's source.

        The files' place is left out, so that harvests on several machines make one store.
        """
        return {
            "fingerprint": self.fingerprint(),
            "config_sha256": self.config_hash,
            "dtype": str(self.dtype).removeprefix("torch."),
            "attention_implementation": self.attention_implementation,
            "kind": self.kind,
            "init": self.init,
            "init_seed": None if self.init == "trained" else self.init_seed,
            "blocks": self.blocks_path,
        }

    def place(self) -> dict[str, str | None]:
        """Name and revision that this model was loaded from, for a store's provenance.

        The tokenizer's place stands beside them where it is another.
        """
        elsewhere = {} if self.tokenizer_name is None else {"tokenizer": self.tokenizer_name}
        return {"name": self.name, "revision": self.revision, **elsewhere}

    def check_layers(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Check the layers asked for and return them sorted.

        Raises:
            InputError: no layer, one twice, or one that the model does not have.
        """
        absent = [layer for layer in layers if not 0 <= layer < self.num_layers]
        if absent:
            raise InputError(
                f"model {self.name} has no layer {absent[0]}: its layers are "
                f"0 to {self.num_layers - 1}"
            )
        if not layers or len(set(layers)) != len(layers):
            raise InputError(f"expected one or more different layers, got {list(layers)}")
        return tuple(sorted(layers))

    @property
    def _text_config(self) -> Any:
        return self.model.config.get_text_config()
