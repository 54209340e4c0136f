"""TopK: a row uses its k largest pre-activations, those above 0.

z = ReLU(TopK_k(W_enc (u − b) + b_enc)). Source: Gao et al. (2024), arXiv 2406.04093.

Shape suffixes: B rows, D channels, N latents, K selected latents.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from mlsae.base.errors import InputError
from mlsae.base.settings import setting, settings
from mlsae.base.units import counted, parse_count
from mlsae.sae.architectures.base import (
    Activation,
    Architecture,
    Conversion,
    Shape,
    TrainingRows,
    Weights,
)
from mlsae.sae.architectures.matryoshka import MatryoshkaSettings
from mlsae.sae.kernels.functions import Choice, preactivations, selected
from mlsae.sae.kernels.select import select, select_mixed
from mlsae.sae.kernels.sparse import Support


@settings
class TopKSettings(MatryoshkaSettings):
    """Training settings of the architecture `topk`."""

    k: int = setting(
        default=32,
        decides=True,
        group="Architecture",
        swept=True,
        short="-k",
        parse=parse_count,
        doc="Latents that a row of topk may use, or one of batchtopk in the mean.",
    )


def check_k(k: object, shape: Shape) -> None:
    """Refuse a k below 1 or above the number of latents.

    Raises:
        InputError: with k.
    """
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise InputError(f"k must be a whole number of at least 1, got {k!r}")
    if k > shape.num_latents:
        raise InputError(
            f"k must be at most num_latents: got k {k} and "
            f"{counted(shape.num_latents, 'latent')}; "
            f"lower -k or raise --num-latents or --expansion-factor"
        )


def with_bias(
    u_BD: torch.Tensor, weights: Weights
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, W_enc and b, with a channel of ones for the encoder bias where there is one.

    The bias goes through the same products so.
    """
    W_enc, b, b_enc = weights["W_enc"], weights["b"], weights.get("b_enc")
    if b_enc is None:
        return u_BD, W_enc, b
    ones = u_BD.new_ones(len(u_BD), 1)
    W_enc = torch.cat([W_enc, b_enc[:, None]], dim=1)
    return torch.cat([u_BD, ones], dim=1), W_enc, torch.cat([b, b.new_zeros(1)])


def _repeated(architecture: "TopK") -> dict[str, torch.Tensor]:
    k = torch.tensor(architecture.k, dtype=torch.int32)
    return {"k": k, "threshold": torch.tensor(-1.0)}


@dataclass(frozen=True)
class TopK(Architecture):
    """The architecture `topk`."""

    name = "topk"
    summary = "the k largest of a row"
    settings = TopKSettings
    revival = "auxk"
    precisions = ("float32", "bfloat16")
    nests = True
    conversions: ClassVar[Mapping[str, Conversion]] = {
        "saelens": Conversion(
            name="topk", settings=("k",), constants={"rescale_acts_by_decoder_norm": False}
        ),
        "sparsify": Conversion(name="topk", settings=("k",)),
        "dictionary-learning": Conversion(
            name="AutoEncoderTopK",
            settings=("k",),
            constants={"trainer_class": "TopKTrainer"},
            copies=_repeated,
        ),
        "mlsae": Conversion(settings=("k",)),
        "llamascopium": Conversion(name="topk", settings=("k",)),
    }

    k: int
    """Latents a row may use."""

    @classmethod
    def wanted(cls, settings: TopKSettings) -> "TopK":
        """TopK with the k of the settings."""
        return cls(settings.k)

    @classmethod
    def check_values(cls, settings: TopKSettings) -> None:
        """Refuse a k below 1."""
        if settings.k < 1:
            raise InputError(f"-k must be at least 1, got {settings.k}")

    def check(self, shape: Shape) -> None:
        """Refuse a k below 1 or above the number of latents."""
        check_k(self.k, shape)

    @property
    def most_active(self) -> int:
        """k."""
        return self.k

    def activate(
        self,
        u_BD: torch.Tensor,
        weights: Weights,
        at: torch.Tensor | int | None,  # noqa: ARG002
    ) -> tuple[torch.Tensor, Support]:
        """The k latents of each row, in no order; with fewer above 0 the others are 0."""
        return self._activate(u_BD, weights, select)

    def activate_in_training(
        self, rows: TrainingRows, weights: Weights, *, mixed: bool
    ) -> Activation:
        """The k latents of each row, perhaps by a bfloat16 product."""
        return Activation(*self._activate(rows.u, weights, select_mixed if mixed else select))

    def _activate(
        self, u_BD: torch.Tensor, weights: Weights, choose: Choice
    ) -> tuple[torch.Tensor, Support]:
        u_BD, W_enc, b = with_bias(u_BD, weights)
        pre_BK, indices_BK = selected(
            lambda c_BD, W: choose(c_BD, W, self.k), u_BD.detach() - b.detach(), W_enc
        )
        support = Support(indices_BK, len(W_enc))
        return preactivations(u_BD, W_enc, b, pre_BK, support).relu(), support

    def describe(self) -> str:
        """State k alone: TopK is meant where no architecture is named."""
        return f"k {self.k}"
