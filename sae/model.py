"""The TopK sparse autoencoder: one dictionary for the rows of every layer.

z = ReLU(TopK_k(W_enc (u − b))),  û = W_dec z + b,  x̂ = û · s(x) + m(x), where u is the standardised
row; where rows are not normalised, u = x, s = 1 and m = 0. SAEs of other tools may have an encoder
bias as well: z = ReLU(TopK_k(W_enc (u − b) + b_enc)). Source: Gao et al. (2024), arXiv 2406.04093;
one dictionary for all layers: Lawson et al. (2024), arXiv 2409.04185.

Shape suffixes: B rows, D channels, N latents, K selected latents; `...` any leading shape.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mlsae.base.errors import InputError
from mlsae.sae.config import SAEConfig
from mlsae.sae.directory import FILES, read, write
from mlsae.sae.functions import bag, preactivations
from mlsae.sae.location import find
from mlsae.sae.normalize import Standardized, leave, restore, standardize
from mlsae.sae.select import select, select_mixed
from mlsae.sae.sparse import Support


class Latents(NamedTuple):
    """What rows become: at most k latents each, and the row statistics that decoding needs."""

    values: torch.Tensor
    """(..., K) ≥ 0; 0 where fewer than k pre-activations were positive. The SAE's dtype."""
    indices: torch.Tensor
    """(..., K) int64 latent indices, each once a row, in no order."""
    mean: torch.Tensor
    """(..., 1) mean over each row's channels."""
    scale: torch.Tensor
    """(..., 1) unbiased standard deviation over each row's channels."""


class SAE(torch.nn.Module):
    """A TopK SAE with unit decoder rows.

    Args:
        config: shape and k.
        generator: source of the initial encoder (uniform in ±1/√d_in, as torch's linear layers);
            the global one if None. The decoder starts as the encoder's transpose, b at 0.
    """

    def __init__(self, config: SAEConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.training_record: dict[str, Any] = {}
        """training.json, after `load`; `training` is torch's own flag."""
        shape = (config.num_latents, config.d_in)
        W_enc = (torch.rand(shape, generator=generator) * 2 - 1) / config.d_in**0.5
        self.W_enc = torch.nn.Parameter(W_enc)
        self.W_dec = torch.nn.Parameter(W_enc.clone())
        self.b = torch.nn.Parameter(torch.zeros(config.d_in))
        self.b_enc = (
            torch.nn.Parameter(torch.zeros(config.num_latents)) if config.encoder_bias else None
        )
        self.normalize_decoder()

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale every decoder row to unit length."""
        self.W_dec.div_(torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True))

    def standardize(self, x_BD: torch.Tensor) -> Standardized:
        """Rows as the encoder takes them, in the SAE's dtype: standardised, or as they are."""
        x_BD = x_BD.to(self.W_enc.dtype)
        return leave(x_BD) if self.config.normalize == "none" else standardize(x_BD)

    def activate(self, u_BD: torch.Tensor, *, mixed: bool = False) -> tuple[torch.Tensor, Support]:
        """The latents of standardised rows, with gradients for the encoder and b.

        Args:
            u_BD: (B, D) standardised rows, in the SAE's dtype.
            mixed: select with a bfloat16 product and re-scored candidates instead of exactly.

        Returns:
            (B, K) values ≥ 0 and their places.
        """
        choose = select_mixed if mixed else select
        W_enc: torch.Tensor = self.W_enc
        b: torch.Tensor = self.b
        if self.b_enc is not None:
            # A channel of ones carries the bias through the same products.
            W_enc = torch.cat([W_enc, self.b_enc[:, None]], dim=1)
            b = torch.cat([b, b.new_zeros(1)])
            u_BD = torch.cat([u_BD, u_BD.new_ones(len(u_BD), 1)], dim=1)
        with torch.no_grad():
            pre_BK, indices_BK = choose(u_BD - b, W_enc, self.config.k)
        support = Support(indices_BK, self.config.num_latents)
        return preactivations(u_BD, W_enc, b, pre_BK, support).relu(), support

    def reconstruct(self, values_BK: torch.Tensor, support: Support) -> torch.Tensor:
        """û = W_dec z + b, (B, D) standardised, with gradients for values, decoder and b."""
        return bag(values_BK, self.W_dec, support) + self.b

    def encode(self, x: torch.Tensor) -> Latents:
        """The latents of rows; selection is exact.

        Args:
            x: (..., d_in) activations in their own units, any floating dtype.

        Raises:
            InputError: the last axis is not d_in wide.
        """
        if x.shape[-1] != self.config.d_in:
            raise InputError(
                f"rows of {x.shape[-1]} channels do not fit this SAE: expected {self.config.d_in}"
            )
        lead = x.shape[:-1]
        u_BD, mean_B1, scale_B1 = self.standardize(x.reshape(-1, self.config.d_in))
        values_BK, support = self.activate(u_BD)
        k = self.config.k
        return Latents(
            values_BK.view(*lead, k),
            support.indices_BK.view(*lead, k),
            mean_B1.view(*lead, 1),
            scale_B1.view(*lead, 1),
        )

    def decode(self, latents: Latents) -> torch.Tensor:
        """x̂ (..., d_in) in the rows' own units, in the SAE's dtype."""
        lead, k = latents.values.shape[:-1], latents.values.shape[-1]
        support = Support(latents.indices.reshape(-1, k), self.config.num_latents)
        u_hat_BD = self.reconstruct(latents.values.reshape(-1, k), support)
        return restore(u_hat_BD, latents.mean.reshape(-1, 1), latents.scale.reshape(-1, 1)).view(
            *lead, self.config.d_in
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x̂ for x, both (..., d_in)."""
        return self.decode(self.encode(x))

    def save(self, directory: Path, training: Mapping[str, Any]) -> None:
        """Write the SAE directory: sae.safetensors, training.json and, last, config.json.

        Args:
            directory: made if it is not there; files of an SAE already there are replaced.
            training: how the SAE came about, as JSON.
        """
        write(directory, self.config, self.state_dict(), training)


def load(path_or_hub_id: str | Path, device: str | torch.device = "cpu") -> SAE:
    """Read an SAE directory, checking every byte of it.

    Args:
        path_or_hub_id: what `SAE.save` or `mlsae train` wrote: a directory, or, as a `str`, where
            it lies on the Hugging Face hub: `owner/name[/folder][@revision]`.
        device: where the weights go.

    Returns:
        The SAE in float32, in evaluation mode, its training.json in `training_record`.

    Raises:
        NotAnSAEError: there is no SAE there.
        DamagedSAEError: a file is missing or does not hold the bytes that were written.
        InputError: its configuration is not one this version knows.
    """
    config, tensors, training = read(find(path_or_hub_id, FILES).directory)
    with torch.device("meta"):
        sae = SAE(config)
    sae.load_state_dict({name: t.to(device) for name, t in tensors.items()}, assign=True)
    sae.training_record = training
    return sae.eval()
