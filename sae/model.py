"""The sparse autoencoder: one dictionary for the rows of every layer.

z = act(W_enc (u − b) + b_enc),  û = W_dec z + b,  x̂ = û · s + m, where u = (x − m) / s is the
normalised row (sae/normalize.py) and act is the architecture's (sae/architectures/).
Source of one dictionary for all layers: Lawson et al. (2024), arXiv 2409.04185.

Shape suffixes: B rows, D channels, N latents, K selected latents; L layers; `...` any
leading shape.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mlsae.base.errors import InputError
from mlsae.base.units import counted
from mlsae.sae.architectures.base import Activation, Architecture, TrainingRows, Weights
from mlsae.sae.config import SAEConfig
from mlsae.sae.directory import FILES, read, write
from mlsae.sae.kernels.functions import as_given, bag, selected
from mlsae.sae.kernels.listed import listed
from mlsae.sae.kernels.sparse import FullSupport, Support
from mlsae.sae.linear import LinearForm
from mlsae.sae.location import find
from mlsae.sae.normalize import Standardized, by_layer, restore, standardize


class Latents(NamedTuple):
    """Encoded rows: a few latents each, and the row statistics that decoding needs.

    K is the architecture's limit on the latents of a row, or else the most that any row uses.
    """

    values: torch.Tensor
    """(..., K) in the SAE's dtype; 0 where a row uses fewer than K latents."""
    indices: torch.Tensor
    """(..., K) int64 latent indices, each once a row, in no order."""
    mean: torch.Tensor
    """(..., 1) mean over each row's channels; for centred rows (..., d_in), the layer's mean."""
    scale: torch.Tensor
    """(..., 1) unbiased standard deviation over each row's channels, or 1 / the layer's factor."""


class SAE(torch.nn.Module):
    """A sparse autoencoder.

    Args:
        config: shape, architecture and normalisation.
        generator: source of the initial weights (`Architecture.initial`); torch's global one if
            None.
        weights: initial parameters by name, in place of drawn ones.
    """

    W_enc: torch.nn.Parameter
    """(N, D) encoder directions."""
    W_dec: torch.nn.Parameter
    """(N, D) decoder directions."""
    b: torch.nn.Parameter
    """(D,) subtracted before the encoder, added after the decoder."""
    b_enc: torch.nn.Parameter | None
    """(N,) added to the pre-activations; None for nothing."""
    layer_factor: torch.Tensor | None
    """(L,) factor of rows at each of `config.layers`; None for 1."""
    layer_shift: torch.Tensor | None
    """(L, D) vector subtracted from rows at each of `config.layers`; None for 0."""

    def __init__(
        self,
        config: SAEConfig,
        generator: torch.Generator | None = None,
        *,
        weights: Weights | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.training_record: dict[str, Any] = {}
        """training.json, after `load`; `training` is torch's own flag."""
        if weights is None:
            weights = config.architecture.initial(config, generator)
        self._parts = {part.name: part for part in config.architecture.parameters(config)}
        for name, tensor in weights.items():
            is_trained = self._parts[name].trained
            self.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=is_trained))
        if not config.encoder_bias:
            self.register_parameter("b_enc", None)
        num_layers = len(config.layers or ())
        has_factor = config.normalize == "scale" or config.layer_scale != "none"
        has_shift = config.normalize == "center"
        self.register_buffer("layer_factor", torch.ones(num_layers) if has_factor else None)
        shift = torch.zeros(num_layers, config.d_in) if has_shift else None
        self.register_buffer("layer_shift", shift)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "SAE":
        """Move or cast the module, as torch does; some parameters are float32 at least."""
        kept = {name: p.detach() for name, p in self._parameters.items() if p is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            parameter = self.get_parameter(name)
            if self._parts[name].float32 and parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = before.to(parameter.device, torch.float32)
        return self

    @property
    def architecture(self) -> Architecture:
        """Map from rows to latents."""
        return self.config.architecture

    @property
    def expected_active(self) -> int:
        """About how many latents a row uses.

        The architecture's most; where a row may use any number, the L0 that training saw last, or
        all latents.
        """
        if (most := self.architecture.most_active) is not None:
            return most
        seen = self.training_record.get("training")
        if isinstance(seen, Mapping) and "l0" in seen:
            return math.ceil(float(seen["l0"]))
        return self.config.num_latents

    @property
    def weights(self) -> Weights:
        """The parameters by name."""
        return dict(self.named_parameters(recurse=False))

    @torch.no_grad()
    def kept(self) -> tuple["SAE", dict[str, Any]]:
        """The SAE in the form in which it is kept after training, and entries of its record."""
        found = self.architecture.kept(self.weights)
        if found is None:
            return self, {}
        config = replace(
            self.config, architecture=found.architecture, encoder_bias="b_enc" in found.weights
        )
        kept = SAE(config, weights={name: t.detach().clone() for name, t in found.weights.items()})
        kept.layer_factor, kept.layer_shift = self.layer_factor, self.layer_shift
        return kept.to(self.b.device), found.record

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale every decoder row to unit length."""
        self.W_dec.div_(torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True))

    def standardize(self, x_BD: torch.Tensor, at: torch.Tensor | int | None = None) -> Standardized:
        """Rows as the encoder takes them, in the SAE's dtype: normalised.

        Args:
            x_BD: (B, D) rows, any floating dtype.
            at: layers of the rows as indices into `config.layers`, (B,) or one for all; needed if
                the normalisation depends on the layer.
        """
        x_BD = x_BD.to(self.W_enc.dtype)
        if self.config.normalize == "standardize":
            with as_given(x_BD):
                return standardize(x_BD, self.config.eps)
        if at is None:
            self._check_layer_given(at)
            at = 0
        return by_layer(x_BD, at, self.layer_shift, self.layer_factor)

    def activate(
        self, u_BD: torch.Tensor, at: torch.Tensor | int | None = None
    ) -> tuple[torch.Tensor, Support]:
        """The latents of normalised rows, with gradients for the encoder and its biases.

        Args:
            u_BD: (B, D) normalised rows, in the SAE's dtype.
            at: layers of the rows, as for `standardize`; needed if the architecture depends on
                the layer.

        Returns:
            (B, K) values, 0 where a latent is not active, and their places.
        """
        if self.architecture.depends_on_layer:
            self._check_layer_given(at)
        with as_given(u_BD):
            return self.architecture.activate(u_BD, self.weights, at)

    def activate_in_training(self, rows: TrainingRows, *, mixed: bool = False) -> Activation:
        """The latents of normalised rows as training selects them, with gradients.

        Args:
            rows: piece of a batch, in the SAE's dtype.
            mixed: select with a bfloat16 product and re-scored candidates instead of exactly.
        """
        with as_given(rows.u):
            return self.architecture.activate_in_training(rows, self.weights, mixed=mixed)

    def reconstruct(self, values_BK: torch.Tensor, support: Support) -> torch.Tensor:
        """û = W_dec z + b, (B, D) normalised, with gradients for values, decoder and b."""
        with as_given(values_BK):
            return bag(values_BK, self.W_dec, support) + self.b

    def reconstructions(self, values: torch.Tensor, support: Support) -> torch.Tensor:
        """û by each of `config.prefixes`, (B, G, D), with gradients as `reconstruct`.

        Decoder rows are added once, each to the part between two widths, and then the parts.
        """
        prefixes = self.config.prefixes
        if len(prefixes) == 1:
            return self.reconstruct(values, support)[:, None]
        values_E, parts = support.nested(values, prefixes)
        with as_given(values_E):
            parts_BGD = bag(values_E, self.W_dec, parts).view(-1, len(prefixes), self.config.d_in)
            return parts_BGD.cumsum(dim=1) + self.b

    def encode(self, x: torch.Tensor, layer: torch.Tensor | int | None = None) -> Latents:
        """The latents of rows; selection is exact.

        Args:
            x: (..., d_in) activations in their own units, any floating dtype.
            layer: the block index of the rows: one, or a tensor that broadcasts to (...). Needed
                where the normalisation depends on the layer, and of no account elsewhere.

        Raises:
            InputError: the last axis is not d_in wide, or a layer is needed and is not given, or is
                none of the SAE's.
        """
        if x.shape[-1] != self.config.d_in:
            raise InputError(
                f"rows of {x.shape[-1]} channels do not fit this SAE: expected {self.config.d_in}"
            )
        lead = x.shape[:-1]
        at = self._at(layer, lead)
        u_BD, mean_BD, scale_B1 = self.standardize(x.reshape(-1, self.config.d_in), at)
        values_BK, support = self.activate(u_BD, at)
        indices_BK = support.indices_BK
        if isinstance(support, FullSupport):
            _, indices_BK = selected(
                lambda values_BN: listed([(values_BN, values_BN != 0)], values_BN.shape[1]),
                values_BK,
            )
            values_BK = values_BK.gather(1, indices_BK)
        k = indices_BK.shape[1]
        return Latents(
            values_BK.view(*lead, k),
            indices_BK.view(*lead, k),
            mean_BD.reshape(*lead, mean_BD.shape[1]),
            scale_B1.reshape(*lead, 1),
        )

    def _at(self, layer: torch.Tensor | int | None, lead: torch.Size) -> torch.Tensor | int | None:
        """Block indices as indices into `config.layers`, one or one a row."""
        known = self.config.layers
        if known is None:
            return None
        self._check_layer_given(layer)
        if not isinstance(layer, torch.Tensor):
            if layer not in known:
                raise InputError(f"{self._its_layers()}, got {layer}")
            return known.index(layer)
        layers = torch.tensor(known, device=self.b.device)
        found = layer.to(layers.device)[..., None] == layers
        if not found.any(dim=-1).all():
            others = layer[~found.any(dim=-1).to(layer.device)]
            raise InputError(f"{self._its_layers()}, got {others.reshape(-1)[0].item()}")
        return found.long().argmax(dim=-1).expand(lead).reshape(-1)

    def _check_layer_given(self, layer: object) -> None:
        if layer is None and self.config.layers is not None:
            raise InputError(
                f"this SAE encodes the rows of each layer by themselves: give the layer of the "
                f"rows, encode(x, layer), one of {', '.join(map(str, self.config.layers))}"
            )

    def _its_layers(self) -> str:
        return f"this SAE has layers {', '.join(map(str, self.config.layers or ()))}"

    def decode(self, latents: Latents) -> torch.Tensor:
        """x̂ (..., d_in) in the rows' own units, in the SAE's dtype."""
        lead, k = latents.values.shape[:-1], latents.values.shape[-1]
        support = Support(latents.indices.reshape(-1, k), self.config.num_latents)
        u_hat_BD = self.reconstruct(latents.values.reshape(-1, k), support)
        mean_BD = latents.mean.reshape(-1, latents.mean.shape[-1])
        x_hat_BD = restore(u_hat_BD, mean_BD, latents.scale.reshape(-1, 1))
        return x_hat_BD.view(*lead, self.config.d_in)

    def decode_prefixes(self, latents: Latents) -> torch.Tensor:
        """x̂ by each of `config.prefixes`, (..., G, d_in); the last is that by all latents."""
        prefixes = self.config.prefixes
        if len(prefixes) == 1:
            return self.decode(latents)[..., None, :]
        lead, k = latents.values.shape[:-1], latents.values.shape[-1]
        support = Support(latents.indices.reshape(-1, k), self.config.num_latents)
        u_hat_BGD = self.reconstructions(latents.values.reshape(-1, k), support)
        mean_B1D = latents.mean.reshape(-1, 1, latents.mean.shape[-1])
        x_hat_BGD = restore(u_hat_BGD, mean_B1D, latents.scale.reshape(-1, 1, 1))
        return x_hat_BGD.view(*lead, len(prefixes), self.config.d_in)

    def forward(self, x: torch.Tensor, layer: torch.Tensor | int | None = None) -> torch.Tensor:
        """x̂ for x, both (..., d_in); `layer` as for `encode`."""
        return self.decode(self.encode(x, layer))

    def linear(self) -> LinearForm:
        """The SAE as one product, x̂ = f · D, for tools that multiply latents by decoder rows.

        Parameters are shared. A latent's effect on x̂ is f_j W_dec,j there, which includes the
        scale of the row; here `values` do not.
        """
        return LinearForm(self)

    def extra_repr(self) -> str:
        """Size, architecture and normalisation, for `repr`."""
        config = self.config
        return (
            f"{counted(config.num_latents, 'latent')} of {config.d_in} channels, "
            f"{self.architecture.describe()}, normalize {config.normalize}, {self.b.dtype}"
        )

    def save(self, directory: str | Path, training: Mapping[str, Any]) -> None:
        """Write the SAE directory: sae.safetensors, training.json and, last, config.json.

        Args:
            directory: made if it is not there; files of an SAE already there are replaced.
            training: record of the training, as JSON.
        """
        write(Path(directory), self.config, self.state_dict(), training)


def load(path_or_hub_id: str | Path, device: str | torch.device = "cpu") -> SAE:
    """Read an SAE directory, checking every byte of it.

    Args:
        path_or_hub_id: directory that `SAE.save` or `mlsae train` wrote, or, as a `str`, a
            place on the Hugging Face hub: `owner/name[/folder][@revision]`.
        device: device of the weights.

    Returns:
        The SAE in float32, whatever it was saved in, in evaluation mode, its training.json in
        `training_record`.

    Raises:
        NotAnSAEError: there is no SAE there.
        DamagedSAEError: a file is missing or does not hold the bytes that were written.
        InputError: this version does not know such a configuration.
    """
    config, tensors, training = read(find(path_or_hub_id, FILES).directory)
    # Only shapes: arithmetic on this device, such as a draw, would import torch's compiler.
    shapes = config.architecture.parameters(config)
    sae = SAE(config, weights={p.name: torch.empty(p.shape, device="meta") for p in shapes})
    state = {name: t.to(device, torch.float32) for name, t in tensors.items()}
    sae.load_state_dict(state, assign=True)
    sae.training_record = training
    return sae.eval()
