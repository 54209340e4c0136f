"""Architecture of an SAE: the map from rows to latents, and everything that follows from it.

An architecture is one class in one file: a frozen dataclass whose fields are the settings that
config.json holds. Every part of the package asks it, so that a new one needs no other file. Common
to all: rows are normalised (sae/normalize.py), û = W_dec z + b is a bag of decoder rows, and a
latent is active where its value is not 0.

Shape suffixes: B rows, D channels, N latents, K latents a row.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self, TypeVar

import torch

from mlsae.base.errors import InputError
from mlsae.sae.kernels.sparse import Support

Revival = Literal["auxk", "resample", "preactivation"]
"""Ways to bring dead latents back: auxiliary.py, resample.py and preactivation.py of train/step."""

Weights = Mapping[str, torch.Tensor]
"""Parameters by name, as `Architecture.parameters` lists them."""


class Shape(Protocol):
    """An SAE's size; an `SAEConfig` is one."""

    @property
    def d_in(self) -> int:
        """D."""

    @property
    def num_latents(self) -> int:
        """N."""

    @property
    def encoder_bias(self) -> bool:
        """True where there is a `b_enc`."""

    @property
    def layers(self) -> tuple[int, ...] | None:
        """Block index for each entry of a parameter by layer; None where nothing is by layer."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One tensor that training changes and an SAE directory holds."""

    name: str
    """Name in sae.safetensors and in checkpoints."""
    shape: tuple[int, ...]
    """Shape."""
    by_latent: bool = True
    """True where the first axis is over latents."""
    unit_rows: bool = False
    """True where each row has unit length after every step."""
    least: float | None = None
    """Smallest value after every step; None for any."""
    trained: bool = True
    """False where no gradient changes it: it is found otherwise, or after training."""
    float32: bool = False
    """True where an SAE in 16 bits keeps it in float32, as thresholds, which move little by
    little."""


class TrainingRows(NamedTuple):
    """A piece of a batch in training."""

    u: torch.Tensor
    """(B, D) normalised rows."""
    layer: torch.Tensor
    """(B,) each row's index among the SAE's layers."""
    step: int
    """Step in the run, from 0."""
    groups: tuple[int, ...] = ()
    """Rows of each group, one after another, where latents are selected by group; () for one."""
    weight: torch.Tensor | float = 1.0
    """(B,) weight of ‖u − û‖² in the loss."""
    settings: Any = None
    """Training settings, as `Architecture.resolved` gives them."""


class Activation(NamedTuple):
    """Latents at a piece of a batch in training."""

    values: torch.Tensor
    """(B, K), 0 where a latent is not active, with gradients; (E,) at `Entries`."""
    support: Support
    """Places of the values, each latent at most once a row."""
    gate: torch.Tensor | None = None
    """Openness of each, of the values' shape, with gradients, for the architecture's term of the
    loss."""


class ExtraLoss(ABC):
    """Term of the loss beside the reconstruction error."""

    @abstractmethod
    def __call__(self, active: Activation, rows: TrainingRows, weights: Weights) -> torch.Tensor:
        """(B,) each row's term, with gradients."""

    def after_step(self, l0: float) -> None:  # noqa: B027
        """Take note of a step's mean number of active latents a row, over all ranks."""

    def state(self) -> dict[str, float]:
        """State that a resumed run needs; empty for none."""
        return {}

    def restore(self, state: Mapping[str, float]) -> None:  # noqa: B027
        """Go on with the state of a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """An architecture's form in another tool's files."""

    name: str = ""
    """The architecture's name there; empty where the format has none."""
    settings: tuple[str, ...] = ()
    """Fields, whole numbers, that the configuration there has under the same names."""
    constants: Mapping[str, object] = field(default_factory=dict)
    """Further entries in the configuration, written and never read."""
    copies: Callable[[Any], dict[str, torch.Tensor]] = lambda _: {}
    """Tensors that repeat an architecture's settings, beside its weights."""
    is_read: bool = True
    """False where SAEs of that name are read as another architecture."""


@dataclass(frozen=True)
class Architecture(ABC):
    """Map from rows to latents; a subclass's fields are its settings."""

    name: ClassVar[str]
    """Name on the command line and, after `mlsae/`, in config.json."""
    summary: ClassVar[str]
    """Latents that a row uses, in a few words for `--help`, such as `the k largest of a row`."""
    settings: ClassVar[type]
    """Dataclass with the training settings that the architecture reads; `TrainConfig` extends it.

    Where `revival` is `resample`, `resample_every` is one of them."""
    encoder_bias: ClassVar[bool] = False
    """True where an SAE in training has a bias for each latent."""
    unit_decoder: ClassVar[bool] = True
    """True where training keeps decoder rows at unit length."""
    revival: ClassVar[Revival | None] = None
    """Revival of dead latents in training; None for none."""
    precisions: ClassVar[tuple[str, ...]] = ("float32",)
    """Precisions for the encoder product in training."""
    selects_by_group: ClassVar[bool] = False
    """True where a row's latents in training depend on other rows, those of its group."""
    nests: ClassVar[bool] = False
    """True where prefixes of the latents may be trained to reconstruct by themselves."""
    conversions: ClassVar[Mapping[str, Conversion]] = {}
    """Another tool's format → this architecture's form there; absent formats refuse it."""

    @classmethod
    @abstractmethod
    def wanted(cls, settings: Any) -> Self:
        """The architecture that training settings ask for.

        Args:
            settings: an instance of `settings`, such as a `TrainConfig`.
        """

    @classmethod  # noqa: B027
    def check_values(cls, settings: Any) -> None:
        """Refuse training settings out of range, whichever architecture is trained.

        Raises:
            InputError: with the flag.
        """

    @classmethod  # noqa: B027
    def check_chosen(cls, settings: Any) -> None:
        """Refuse training settings that this architecture cannot be trained with.

        Raises:
            InputError: with the flag.
        """

    def check(self, shape: Shape) -> None:  # noqa: B027
        """Refuse settings that an SAE of this size cannot have.

        Raises:
            InputError: with the setting.
        """

    def check_trained(self, settings: Any, shape: Shape) -> None:  # noqa: B027
        """Refuse training settings that an SAE of this size cannot be trained with.

        Raises:
            InputError: with the flag.
        """

    def resolved(self, settings: Any, shape: Shape, unit: float) -> Any:  # noqa: ARG002
        """Training settings with the architecture's defaults filled in.

        Args:
            settings: an instance of `settings`.
            shape: the SAE's size.
            unit: √(E‖u‖² / d) over the rows that the SAE is trained on; 1 where they are
                standardised.
        """
        return settings

    def prepare(self, weights: Weights, settings: Any) -> None:  # noqa: B027
        """Set parameters that depend on training settings, before the first step.

        Args:
            weights: the SAE's parameters, changed in place.
            settings: result of `resolved`.
        """

    def parameters(self, shape: Shape) -> tuple[Parameter, ...]:
        """Parameters, in training order: W_enc and W_dec (N, D), b (D,), b_enc (N,)."""
        matrix = (shape.num_latents, shape.d_in)
        bias = (Parameter(name="b_enc", shape=matrix[:1]),) if shape.encoder_bias else ()
        return (
            Parameter(name="W_enc", shape=matrix),
            Parameter(name="W_dec", shape=matrix, unit_rows=self.unit_decoder),
            Parameter(name="b", shape=matrix[1:], by_latent=False),
            *bias,
        )

    def initial(self, shape: Shape, generator: torch.Generator | None) -> dict[str, torch.Tensor]:
        """Parameters before training, in the shapes that `parameters` gives.

        W_enc is uniform in ±1/√d_in, as torch's linear layers; W_dec its transpose, each row of
        unit length; everything else 0.

        Args:
            shape: the SAE's size.
            generator: source for W_enc; torch's global one if None.
        """
        found = {p.name: torch.zeros(p.shape) for p in self.parameters(shape)[2:]}
        W_enc = (torch.rand(shape.num_latents, shape.d_in, generator=generator) * 2 - 1) / (
            shape.d_in**0.5
        )
        W_dec = W_enc / torch.linalg.vector_norm(W_enc, dim=1, keepdim=True)
        return {"W_enc": W_enc, "W_dec": W_dec, **found}

    @property
    @abstractmethod
    def most_active(self) -> int | None:
        """Most latents that a row may use; None for any number."""

    @property
    def most_in_training(self) -> int | None:
        """Most latents that a row uses in training, in the mean over a step; None for any."""
        return self.most_active

    def expected_in_training(self, settings: Any, shape: Shape) -> int | None:  # noqa: ARG002
        """About the most latents that a row takes memory for in training; None for all.

        Args:
            settings: an instance of `settings`.
            shape: the SAE's size.
        """
        return self.most_in_training

    @property
    def calibrated_l0(self) -> int | None:
        """Mean number of latents a row for which `threshold` is set after training; None without.

        The threshold is a parameter, (1,) or, where latents depend on the layer, (L,)."""
        return None

    def most_rows(self, num_latents: int, element_size: int) -> int | None:  # noqa: ARG002
        """Rows that one gradient is best taken over; None for any number.

        Args:
            num_latents: N.
            element_size: bytes per value.
        """
        return None

    @property
    def depends_on_layer(self) -> bool:
        """True where a row's latents depend on its layer; `Shape.layers` names the layers then."""
        return False

    @abstractmethod
    def activate(
        self, u_BD: torch.Tensor, weights: Weights, at: torch.Tensor | int | None
    ) -> tuple[torch.Tensor, Support]:
        """Latents at normalised rows, with gradients for the encoder's parameters.

        Args:
            u_BD: (B, D) normalised rows.
            weights: the SAE's parameters.
            at: layers of the rows as indices into `Shape.layers`, (B,) or one for all; None only
                where nothing depends on the layer.

        Returns:
            (B, K) values, 0 where a latent is not active, and their places, each latent at most
            once a row.
        """

    def activate_in_training(
        self,
        rows: TrainingRows,
        weights: Weights,
        *,
        mixed: bool,  # noqa: ARG002
    ) -> Activation:
        """Latents as training selects them; as everywhere else, unless an architecture differs.

        Args:
            rows: piece of a batch.
            weights: the SAE's parameters.
            mixed: select with a bfloat16 product and re-scored candidates; only where `precisions`
                has bfloat16.
        """
        return Activation(*self.activate(rows.u, weights, rows.layer))

    def extra_loss(
        self,
        settings: Any,  # noqa: ARG002
        num_steps: int,  # noqa: ARG002
        like: torch.Tensor,  # noqa: ARG002
    ) -> ExtraLoss | None:
        """Term that training minimises beside the reconstruction error; None for nothing.

        Args:
            settings: result of `resolved`, with values by layer for the SAE's layers alone.
            num_steps: steps in the run.
            like: tensor with the weights' device and dtype.
        """
        return None

    def kept(self, weights: Weights) -> "Kept | None":  # noqa: ARG002
        """The SAE after training in another architecture, with equal latents; None for its own.

        Args:
            weights: the SAE's parameters.
        """
        return None

    def describe(self) -> str:
        """Name and settings, for people."""
        return ", ".join(
            [self.name, *(f"{name} {value}" for name, value in self.to_dict().items())]
        )

    def to_dict(self) -> dict[str, Any]:
        """Settings, as JSON."""
        return asdict(self)


class Kept(NamedTuple):
    """An SAE after training, in the form in which it is kept."""

    architecture: Architecture
    """Architecture of that form."""
    weights: dict[str, torch.Tensor]
    """Parameters of that form."""
    record: dict[str, Any]
    """Entries for training.json: what the form does not hold; tensors become lists of numbers."""


Kind = TypeVar("Kind", bound=type[Architecture])

_registered: dict[str, type[Architecture]] = {}


def register(kind: Kind) -> Kind:
    """Make an architecture known under its name; may decorate the class.

    Raises:
        ValueError: another has that name.
    """
    if _registered.setdefault(kind.name, kind) is not kind:
        raise ValueError(f"there is an architecture {kind.name!r} already")
    return kind


def get(name: object) -> type[Architecture]:
    """The architecture by its name.

    Raises:
        InputError: there is none.
    """
    if not isinstance(name, str) or name not in _registered:
        known = ", ".join(_registered)
        raise InputError(f"architecture must be one of {known}, got {name!r}")
    return _registered[name]


def registered() -> tuple[type[Architecture], ...]:
    """All architectures, in the order in which they were registered."""
    return tuple(_registered.values())
