"""SAE configuration: shape, architecture, and normalisation of rows."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from mlsae.base.errors import InputError
from mlsae.sae.architectures import Architecture, TopK, get
from mlsae.sae.architectures.matryoshka import check_widths
from mlsae.sae.normalize import EPS

NORMALIZE = ("standardize", "none", "scale", "center")
LAYER_SCALES = ("none", "log", "sqrt", "linear")
_DEFAULTS = {
    "architecture": TopK.name,
    "encoder_bias": False,
    "layer_scale": "none",
    "layers": None,
    "eps": EPS,
    "matryoshka_widths": None,
}
"""Values for keys that a file lacks."""


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """A sparse autoencoder's shape, architecture and normalisation.

    Raises:
        InputError: a value is out of range, e.g. k larger than num_latents, or two exclude each
            other.
    """

    d_in: int
    """Channels per row."""
    num_latents: int
    """Latents, shared by every layer."""
    architecture: Architecture
    """Map from rows to latents, such as `TopK(k=32)` or `ReLU()`."""
    normalize: str = "standardize"
    """Normalisation before encoding: `standardize`, `none` for rows as they are, `scale`
    by one factor a layer, or `center` by the layer's mean."""
    encoder_bias: bool = False
    """True where each latent has its own bias, added to its pre-activation."""
    layer_scale: str = "none"
    """Function of mean norms that put layers on one scale: `none`, `log`, `sqrt` or `linear`."""
    layers: tuple[int, ...] | None = None
    """Block index for each row of the state that depends on the layer; None without any."""

    eps: float = EPS
    """Added to a row's standard deviation where the row is standardised: 1e-5 as published, less
    for rows that are not far larger."""
    matryoshka_widths: tuple[int, ...] | None = None
    """Widths of the prefixes of latents that were trained to reconstruct rows by themselves, the
    last of them all latents; None without."""

    def __post_init__(self) -> None:
        if not isinstance(self.architecture, Architecture):
            raise InputError(
                f"architecture must be an Architecture, such as TopK(k=32), got "
                f"{self.architecture!r}"
            )
        for name, choices in (("normalize", NORMALIZE), ("layer_scale", LAYER_SCALES)):
            if getattr(self, name) not in choices:
                raise InputError(
                    f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        for name in ("d_in", "num_latents"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.d_in < 2:
            raise InputError(
                f"d_in must be at least 2 to standardise a row over its channels, got {self.d_in}"
            )
        if not (isinstance(self.eps, float) and 0 < self.eps <= EPS):
            raise InputError(f"eps must be above 0 and at most {EPS:g}, got {self.eps!r}")
        if self.eps != EPS and self.normalize != "standardize":
            raise InputError(f"eps is for normalize standardize, got {self.normalize}")
        if not isinstance(self.encoder_bias, bool):
            raise InputError(f"encoder_bias must be true or false, got {self.encoder_bias!r}")
        self.architecture.check(self)
        if self.matryoshka_widths is not None:
            self._check_prefixes(self.matryoshka_widths)
        if self.layer_scale != "none" and self.normalize != "none":
            raise InputError(
                f"a layer scale takes rows as they are: layer_scale {self.layer_scale} needs "
                f"normalize none, got {self.normalize}"
            )
        if self.depends_on_layer != bool(self.layers):
            raise InputError(
                f"layers name the rows of state that depends on the layer: with architecture "
                f"{self.architecture.name}, normalize {self.normalize} and layer_scale "
                f"{self.layer_scale} there is "
                f"{'such state' if self.depends_on_layer else 'none'}, got layers {self.layers}"
            )

    def _check_prefixes(self, widths: tuple[int, ...]) -> None:
        if not self.architecture.nests:
            raise InputError(f"architecture {self.architecture.name} has no prefixes, got {widths}")
        check_widths("matryoshka_widths", widths, self.num_latents)
        if widths[-1] != self.num_latents:
            raise InputError(
                f"matryoshka_widths must end with num_latents, {self.num_latents}, got {widths}"
            )

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Widths of prefixes that reconstruct rows by themselves; all latents are the last."""
        return self.matryoshka_widths or (self.num_latents,)

    @property
    def depends_on_layer(self) -> bool:
        """True where encoding a row takes its layer."""
        by_layer = self.normalize in ("scale", "center") or self.layer_scale != "none"
        return by_layer or self.architecture.depends_on_layer

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON, with the architecture's name and settings among them."""
        content = {
            "d_in": self.d_in,
            "num_latents": self.num_latents,
            **self.architecture.to_dict(),
            "normalize": self.normalize,
            "encoder_bias": self.encoder_bias,
            "architecture": self.architecture.name,
            "layer_scale": self.layer_scale,
            "layers": None if self.layers is None else list(self.layers),
            "eps": self.eps,
            "matryoshka_widths": self.matryoshka_widths and list(self.matryoshka_widths),
        }
        return {
            key: value
            for key, value in content.items()
            if key not in _DEFAULTS or value != _DEFAULTS[key]
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str) -> "SAEConfig":
        """Configuration from the mapping that `to_dict` gives.

        Args:
            content: the mapping.
            where: the file it came from, for error messages.

        Raises:
            InputError: a key is missing, or unknown: the SAE may compute something else with it.
        """
        kind = get(content.get("architecture", _DEFAULTS["architecture"]))
        settings = {field.name for field in fields(kind)}
        known = {field.name for field in fields(cls)} | settings
        for problem, keys in (
            ("has unknown keys", set(content) - known),
            ("lacks keys", known - _DEFAULTS.keys() - set(content)),
        ):
            if keys:
                raise InputError(
                    f"{where} {problem}: {', '.join(sorted(keys))}; expected "
                    f"{', '.join(sorted(known))}; this SAE needs another version of mlsae"
                )
        rest = {key: value for key, value in content.items() if key not in settings}
        rest["architecture"] = kind(**{name: content[name] for name in settings})
        for name in ("layers", "matryoshka_widths"):
            if rest.get(name) is not None:
                rest[name] = tuple(rest[name])
        return cls(**rest)
