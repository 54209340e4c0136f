"""BatchTopK: the rows of a group share a budget of k latents each, in the mean.

In training z holds the k · n largest of a = ReLU(W_enc (u − b) + b_enc) over n rows and all
latents. Afterwards a row stands alone: z = a · [a > θ], θ such that held-out rows use k latents in
the mean. Source: Bussmann et al. (2024), arXiv 2412.06410, where θ is a running mean.

Shape suffixes: B rows, D channels, N latents, L layers, E values.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from mlsae.base.errors import InputError
from mlsae.base.settings import setting, settings
from mlsae.sae.architectures.base import (
    Activation,
    Architecture,
    Conversion,
    Parameter,
    Shape,
    TrainingRows,
    Weights,
)
from mlsae.sae.architectures.topk import TopKSettings, check_k, with_bias
from mlsae.sae.kernels.above import above, of_rows
from mlsae.sae.kernels.budget import select_by_group
from mlsae.sae.kernels.functions import preactivations
from mlsae.sae.kernels.sparse import Entries, Support

ONE, BY_LAYER = "one", "layer"


@settings
class BatchTopKSettings(TopKSettings):
    """Training settings for the architecture `batchtopk`."""

    threshold: str | None = setting(
        default=None,
        unset="one",
        gives_way_to=("architecture",),
        decides=True,
        group="Architecture",
        swept=True,
        doc="Threshold of batchtopk after training: one for all rows, or one a layer.",
    )


@dataclass(frozen=True)
class BatchTopK(Architecture):
    """The architecture `batchtopk`."""

    name = "batchtopk"
    summary = "k in the mean, the largest of many rows together"
    settings = BatchTopKSettings
    revival = "auxk"
    selects_by_group = True
    nests = True
    conversions: ClassVar[Mapping[str, Conversion]] = {
        "saelens": Conversion(name="jumprelu", is_read=False),
        "dictionary-learning": Conversion(
            name="BatchTopKSAE",
            settings=("k",),
            constants={"trainer_class": "BatchTopKTrainer"},
            copies=lambda architecture: {"k": torch.tensor(architecture.k, dtype=torch.int32)},
        ),
        "gemma-scope": Conversion(name="jumprelu", is_read=False),
        "llamascopium": Conversion(name="jumprelu", is_read=False),
    }

    k: int
    """Latents that a row uses in the mean."""
    threshold: str = ONE
    """`one` for all rows, or one a `layer`."""

    @classmethod
    def wanted(cls, settings: BatchTopKSettings) -> "BatchTopK":
        """BatchTopK with the k and the kind of threshold in the settings."""
        return cls(settings.k, settings.threshold or ONE)

    @classmethod
    def check_values(cls, settings: BatchTopKSettings) -> None:
        """Refuse another threshold than one, or one a layer."""
        if settings.threshold not in (None, ONE, BY_LAYER):
            raise InputError(f"--threshold must be {ONE} or {BY_LAYER}, got {settings.threshold!r}")

    @classmethod
    def check_chosen(cls, settings: Any) -> None:
        """Refuse rows as they are: long rows would spend the budget of short ones."""
        if settings.normalize == "none":
            raise InputError(
                f"--architecture {cls.name} shares latents among rows, and of rows as they are the "
                f"longest would take them all: give --normalize standardize, scale or center "
                f"instead of none"
            )

    def check(self, shape: Shape) -> None:
        """Refuse a k below 1 or above the number of latents, and another kind of threshold."""
        check_k(self.k, shape)
        if self.threshold not in (ONE, BY_LAYER):
            raise InputError(f"threshold must be {ONE} or {BY_LAYER}, got {self.threshold!r}")

    def parameters(self, shape: Shape) -> tuple[Parameter, ...]:
        """Parameters, and θ: `threshold`, (1,) or (L,), which is set after training."""
        size = len(shape.layers or ()) if self.depends_on_layer else 1
        theta = Parameter(
            name="threshold", shape=(size,), by_latent=False, trained=False, float32=True
        )
        return (*super().parameters(shape), theta)

    @property
    def most_active(self) -> None:
        """None: a row may use any number of latents."""
        return None

    @property
    def most_in_training(self) -> int:
        """k."""
        return self.k

    @property
    def calibrated_l0(self) -> int:
        """k."""
        return self.k

    @property
    def depends_on_layer(self) -> bool:
        """True with one threshold a layer."""
        return self.threshold == BY_LAYER

    def activate(
        self, u_BD: torch.Tensor, weights: Weights, at: torch.Tensor | int | None
    ) -> tuple[torch.Tensor, Support]:
        """Latents above θ."""
        theta = of_rows(weights["threshold"], at if at is not None and self.depends_on_layer else 0)
        return above(u_BD, weights["W_enc"], weights["b"], weights.get("b_enc"), theta)

    def activate_in_training(
        self,
        rows: TrainingRows,
        weights: Weights,
        *,
        mixed: bool,  # noqa: ARG002
    ) -> Activation:
        """The largest latents of each group together, (E,) values row after row."""
        u_BD, W_enc, b = with_bias(rows.u, weights)
        with torch.no_grad():
            kept = select_by_group(u_BD - b, W_enc, self.k, rows.groups or (len(u_BD),))
        support = Entries.of_rows(kept.rows, kept.latents, len(u_BD), len(W_enc))
        return Activation(preactivations(u_BD, W_enc, b, kept.values, support), support)
