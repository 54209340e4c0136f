"""An SAE's weights in other terms, so that formats without its state can hold them.

All are the same function of the activations. They are computed in float64 and rounded to float32
once. Tensors have the names W_enc (N, D), W_dec (N, D), b (D,), b_enc (N,) and, of latents above a
threshold, threshold (N,).

Shape suffixes: D channels, N latents.
"""

from collections.abc import Mapping

import torch

from mlsae.sae.model import SAE

Tensors = dict[str, torch.Tensor]


def at_layer(sae: SAE, layer: int | None) -> Tensors:
    """Weights that take rows of one layer without state of that layer.

    A shift μ of the rows goes into b; a factor f of them divides b, b_enc and threshold, so that
    latents are in units of the rows (the linear form's s z, sae/linear.py). Rows that are
    standardised are so still.

    Args:
        sae: the SAE; without a b_enc it gets one of zeros.
        layer: block index; None only where nothing depends on the layer.
    """
    config = sae.config
    at = 0 if config.layers is None or layer is None else config.layers.index(layer)
    b_enc = sae.W_enc.new_zeros(config.num_latents) if sae.b_enc is None else sae.b_enc
    found = {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b": sae.b, "b_enc": b_enc}
    if (theta := sae.weights.get("threshold")) is not None:
        of_layer = theta[at] if config.architecture.depends_on_layer else theta
        found["threshold"] = of_layer.clamp(min=0).expand(config.num_latents)
    found = {name: tensor.detach() for name, tensor in found.items()}
    if sae.layer_factor is not None:
        found |= divided(found, sae.layer_factor[at])
    if sae.layer_shift is not None:
        found["b"] = found["b"] + sae.layer_shift[at]
    return found


def divided(tensors: Mapping[str, torch.Tensor], factor: torch.Tensor) -> Tensors:
    """b, b_enc and threshold of rows x, from those of rows f · x."""
    names = tensors.keys() & {"b", "b_enc", "threshold"}
    return {name: (tensors[name].double() / factor.double()).float() for name in names}


def not_subtracting(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Weights of an encoder that takes rows as they are: b_enc − W_enc b in place of b_enc."""
    return {**tensors, "b_enc": _moved(tensors, -1)}


def subtracting(tensors: Mapping[str, torch.Tensor]) -> tuple[Tensors, tuple[str, ...]]:
    """Weights of an encoder that subtracts b, from those of one that does not; and what changed."""
    if not tensors["b"].any():
        return dict(tensors), ()
    changes = ("the decoder's bias, now subtracted from rows, added to the encoder's",)
    return {**tensors, "b_enc": _moved(tensors, 1)}, changes


def _moved(tensors: Mapping[str, torch.Tensor], sign: int) -> torch.Tensor:
    through_N = tensors["W_enc"].double() @ tensors["b"].double()
    return (tensors["b_enc"].double() + sign * through_N).float()


def with_norms(tensors: Mapping[str, torch.Tensor]) -> tuple[Tensors, tuple[str, ...]]:
    """Weights of an encoder whose pre-activations are not multiplied by the decoder's norms.

    From one whose are, and whose latents are divided by them. Rounded as SAELens does when it saves
    an SAE for inference.
    """
    norms_N1 = torch.linalg.vector_norm(tensors["W_dec"].double(), dim=1, keepdim=True)
    if (norms_N1 == 1).all():
        return dict(tensors), ()
    # A latent that writes nothing never reads either: its pre-activation is multiplied by 0.
    divisors_N1 = torch.where(norms_N1 > 0, norms_N1, 1)
    folded = {
        **tensors,
        "W_enc": (tensors["W_enc"] * norms_N1).float(),
        "b_enc": (tensors["b_enc"] * norms_N1[:, 0]).float(),
        "W_dec": (tensors["W_dec"] / divisors_N1).float(),
    }
    return folded, ("decoder norms folded into the encoder",)


def ungated(
    W_enc_ND: torch.Tensor, b_gate_N: torch.Tensor, b_mag_N: torch.Tensor, r_N: torch.Tensor
) -> tuple[Tensors, tuple[str, ...]]:
    """W_enc, b_enc and threshold of the JumpReLU that a gated encoder is.

    H(W_enc c + b_gate) ReLU(e^r ⊙ W_enc c + b_mag) has pre-activations with e^r ⊙ W_enc and b_mag,
    above θ = max(b_mag − e^r b_gate, 0). Source: Rajamanoharan et al. (2024), arXiv 2404.16014, §3.
    """
    stretch_N = r_N.double().exp()
    theta_N = (b_mag_N.double() - stretch_N * b_gate_N.double()).clamp(min=0)
    found = {
        "W_enc": (stretch_N[:, None] * W_enc_ND.double()).float(),
        "b_enc": b_mag_N,
        "threshold": theta_N.float(),
    }
    return found, ("gates made thresholds",)
