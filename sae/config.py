"""What an SAE is: its shape, its activation function's k, and how it normalises a row."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from mlsae.base.errors import InputError

NORMALIZE = ("standardize", "none")
_WITH_DEFAULT = frozenset({"encoder_bias"})
"""Keys that a file may lack: it is then of an SAE that has no such thing."""


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """Shape and architecture of a TopK sparse autoencoder.

    Raises:
        InputError: a value is out of range, e.g. k larger than num_latents.
    """

    d_in: int
    """Channels of a row."""
    num_latents: int
    """Latents, shared by every layer."""
    k: int
    """Latents a row may use: the k largest pre-activations, those above 0."""
    normalize: str = "standardize"
    """How a row is normalised before encoding: `standardize`, or `none` for rows as they are."""
    encoder_bias: bool = False
    """Whether each latent has a bias of its own, added to its pre-activation."""

    def __post_init__(self) -> None:
        for name in ("d_in", "num_latents", "k"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.d_in < 2:
            raise InputError(
                f"d_in must be at least 2 to standardise a row over its channels, got {self.d_in}"
            )
        if not isinstance(self.encoder_bias, bool):
            raise InputError(f"encoder_bias must be true or false, got {self.encoder_bias!r}")
        if self.k > self.num_latents:
            raise InputError(
                f"k must be at most num_latents: got k {self.k} and {self.num_latents} latents; "
                f"lower -k or raise --num-latents or --expansion-factor"
            )
        if self.normalize not in NORMALIZE:
            raise InputError(
                f"normalize must be one of {', '.join(NORMALIZE)}, got {self.normalize!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        content = asdict(self)
        if not self.encoder_bias:
            del content["encoder_bias"]
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str) -> "SAEConfig":
        """Read back what `to_dict` gave.

        Args:
            content: the mapping.
            where: the file it came from, for error messages.

        Raises:
            InputError: a key is missing, or unknown (it may change what the SAE computes).
        """
        known = {field.name for field in fields(cls)}
        for problem, keys in (
            ("has unknown keys", set(content) - known),
            ("lacks keys", known - _WITH_DEFAULT - set(content)),
        ):
            if keys:
                raise InputError(
                    f"{where} {problem}: {', '.join(sorted(keys))}; expected "
                    f"{', '.join(sorted(known))}; this SAE needs another version of mlsae"
                )
        return cls(**content)
