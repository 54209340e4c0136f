"""The linear form of an SAE: x̂ = f · D for one matrix D, with nothing kept from row to row.

x̂ = (z W_dec + b) s + m, with s and m of the row or its layer (sae/normalize.py), so a latent adds
s z_j W_dec,j to the stream, not z_j W_dec,j. Taken together, f = [s z, s, c] and D = [W_dec; b; C],
where m = c · C:

| normalize | s | c | C | pseudo-latents |
|---|---|---|---|---|
| standardize | standard deviation of the row | mean of the row | ones (1, D) | 2 |
| none | 1 | | | 1 |
| scale, a layer scale | 1 / factor of the layer | | | 1 |
| center | 1 | 1 at the layer, else 0 | mean of each layer (L, D) | 1 + L |

Shape suffixes: F latents and pseudo-latents; D channels, N latents, L layers; `...` any leading
shape.
"""

from typing import TYPE_CHECKING

import torch

from mlsae.base.errors import InputError
from mlsae.base.units import counted
from mlsae.sae.kernels.functions import as_given

if TYPE_CHECKING:
    from mlsae.sae.model import SAE


class LinearForm(torch.nn.Module):
    """An SAE whose reconstruction is a product of latents and decoder rows, made by `SAE.linear`.

    x̂ = `encode(x) @ W_dec`, equal to `sae(x)` up to rounding, with gradients for x and for the
    SAE's parameters, which this module shares. Tools that multiply latents by decoder rows, or
    decode twice, are exact on it.

    The last axis of `encode` has the SAE's latents, in the units of x, and after them
    *pseudo-latents*, which carry the scale and the shift of the row. Pseudo-latents are no
    features: take `f[..., :num_latents]` for L0, rankings, ablations and steering.

    Args:
        sae: the SAE; converting or moving the form converts or moves the SAE.
    """

    sae: "SAE"
    """The SAE itself."""
    num_latents: int
    """Latents that are features, the first of F."""
    pseudo_latents: tuple[str, ...]
    """Names of the others, in order: `scale`; after it `mean`, or `layer 0` and so on for the
    layers of centred rows."""

    def __init__(self, sae: "SAE") -> None:
        super().__init__()
        self.sae = sae
        self.num_latents = sae.config.num_latents
        shifts: tuple[str, ...] = ()
        if sae.config.normalize == "standardize":
            shifts = ("mean",)
        elif sae.config.normalize == "center":
            shifts = tuple(f"layer {layer}" for layer in sae.config.layers or ())
        self.pseudo_latents = ("scale", *shifts)

    @property
    def W_dec(self) -> torch.Tensor:  # noqa: N802
        """D (F, d_in): the SAE's decoder rows, then those of the pseudo-latents; a copy."""
        return torch.cat([self.sae.W_dec, self._rest()])

    def encode(self, x: torch.Tensor, layer: torch.Tensor | int | None = None) -> torch.Tensor:
        """Latents and pseudo-latents f (..., F) of rows, in the SAE's dtype; selection is exact.

        All F are there, most of them 0: a row takes F numbers where `SAE.encode` takes a few.

        Args:
            x: (..., d_in) activations in their own units, any floating dtype.
            layer: the block index of the rows, needed where `SAE.encode` needs it.

        Raises:
            InputError: the last axis is not d_in wide, or a layer is needed and is not given, or is
                none of the SAE's.
        """
        found = self.sae.encode(x, layer)
        with as_given(found.values):
            features = found.values.new_zeros(*found.values.shape[:-1], self.num_latents)
            features = features.scatter(-1, found.indices, found.values * found.scale)
        parts = [features, found.scale]
        if self.sae.config.normalize == "standardize":
            parts.append(found.mean)
        elif self.sae.config.normalize == "center":
            at = torch.as_tensor(layer, device=features.device)[..., None]
            known = torch.tensor(self.sae.config.layers, device=features.device)
            one_hot = (at == known).to(features.dtype)
            parts.append(one_hot.expand(*features.shape[:-1], len(known)))
        return torch.cat(parts, dim=-1)

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        """f · D (..., d_in), in the rows' own units.

        Args:
            f: (..., F), as `encode` gives it, or changed since.

        Raises:
            InputError: the last axis is not F wide.
        """
        width = self.num_latents + len(self.pseudo_latents)
        if f.shape[-1] != width:
            raise InputError(
                f"a linear form of {self._parts()} decodes rows of {width}, got {f.shape[-1]}"
            )
        with as_given(f):
            features, rest = f[..., : self.num_latents], f[..., self.num_latents :]
            return features @ self.sae.W_dec + rest @ self._rest()

    def forward(self, x: torch.Tensor, layer: torch.Tensor | int | None = None) -> torch.Tensor:
        """x̂ for x, both (..., d_in); `layer` as for `SAE.encode`."""
        return self.decode(self.encode(x, layer))

    def extra_repr(self) -> str:
        """Number of latents, and the pseudo-latents, for `repr`."""
        return self._parts()

    def _rest(self) -> torch.Tensor:
        """Rows of D that belong to the pseudo-latents."""
        b_1D = self.sae.b[None]
        if self.sae.config.normalize == "standardize":
            return torch.cat([b_1D, torch.ones_like(b_1D)])
        shift_LD = self.sae.layer_shift
        return b_1D if shift_LD is None else torch.cat([b_1D, shift_LD])

    def _parts(self) -> str:
        latents = counted(self.num_latents, "latent")
        others = counted(len(self.pseudo_latents), "pseudo-latent")
        return f"{latents} and {others} ({', '.join(self.pseudo_latents)})"
