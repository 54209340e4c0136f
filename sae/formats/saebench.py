"""One layer of an SAE as an object for SAEBench, and for SAELens's functions that take objects.

These tools multiply latents by decoder rows and decode twice, so latents are those of the linear
form (sae/linear.py): s z, in units of the row. Where rows are standardised, s and m differ from row
to row, and one object cannot have both of what the tools' measures need:

- `purpose="latents"`: num_latents latents, and decode(f) = f W_dec, x̂ without s b + m, which no
  latent writes. Measures that rank, probe or ablate latents are exact, differences of two
  decodings among them.
- `purpose="reconstruction"`: s and m are two latents more, and decode(encode(x)) = x̂. Measures of
  the reconstruction are exact; those of latents would take pseudo-latents for features.

Other rows have a constant in their place, b_dec, and either purpose gives one object, exact for
both. Sources: `sae_bench/custom_saes/base_sae.py`, `evals/sparse_probing/main.py` and
`evals/scr_and_tpp/main.py` of https://github.com/adamkarvonen/SAEBench,
`sae_lens/analysis/hooked_sae_transformer.py` of https://github.com/jbloomAus/SAELens.

Shape suffixes: D channels, F latents of the object; `...` any leading shape.
"""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from mlsae.base.errors import InputError
from mlsae.base.words import SITES
from mlsae.sae.kernels.functions import as_given
from mlsae.sae.model import SAE

Purpose = Literal["latents", "reconstruction"]
PURPOSES = ("latents", "reconstruction")


@dataclass(kw_only=True)
class ToolConfig:
    """Facts about an SAE under the names that SAEBench and SAELens read, which set some again."""

    model_name: str
    """Name of the transformer."""
    hook_name: str
    """Hook point of TransformerLens."""
    hook_layer: int
    """Block index."""
    d_in: int
    """D."""
    d_sae: int
    """F."""
    dtype: str
    """Name of the weights' dtype."""
    device: str
    """Device of the weights."""
    architecture: str
    """Architecture, in the tools' reports."""
    apply_b_dec_to_input: bool = False
    normalize_activations: str = "none"
    """Rows go in as they are: `encode` normalises them."""
    hook_name_out: str | None = None
    hook_head_index: int | None = None
    context_size: int | None = None
    prepend_bos: bool = True
    seqpos_slice: tuple[int | None, ...] = (None,)
    exclude_special_tokens: bool = False
    dataset_path: str = ""
    dataset_trust_remote_code: bool = False
    model_from_pretrained_kwargs: dict[str, Any] = field(
        default_factory=lambda: {"center_writing_weights": False}
    )
    """Arguments with which a model of TransformerLens has the activations of the model itself."""

    def __post_init__(self) -> None:
        # SAELens, from version 6 on, looks for some of the facts there; SAEBench sets it again.
        self.metadata = self

    def to_dict(self) -> dict[str, Any]:
        """Facts as JSON, for the tools' reports."""
        return asdict(self)


class SAEBenchModule(torch.nn.Module):
    """An SAE at one layer, with the attributes that SAEBench and SAELens use.

    Args:
        sae: the SAE, which is copied: tools convert and move what they are given.
        layer: block index of the rows.
        model_name: transformer, under the tool's name for it.
        purpose: `latents` for sparse probing, TPP, SCR, RAVEL, absorption and steering;
            `reconstruction` for the core evaluation and splicing.
        site: site of the rows; that of the SAE's training record if None.
        hook_point: class of TransformerLens's `HookPoint`, where latents are to be cached or
            changed in a model of SAELens.

    Raises:
        InputError: the purpose or site is none, the site is not known, or the layer is none of the
            SAE's.
    """

    hook_dict: dict[str, torch.nn.Module]
    """Hook points by name, as SAELens looks for them."""
    use_error_term: bool
    """False: SAELens adds the error where it is asked to."""

    def __init__(
        self,
        sae: SAE,
        *,
        layer: int,
        model_name: str,
        purpose: Purpose,
        site: str | None = None,
        hook_point: Callable[[], torch.nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if purpose not in PURPOSES:
            raise InputError(f"purpose must be one of {', '.join(PURPOSES)}, got {purpose!r}")
        site = site or sae.training_record.get("site")
        if site not in SITES:
            raise InputError(f"site must be one of {', '.join(SITES)}, got {site!r}")
        known = sae.config.layers or sae.training_record.get("layers") or [layer]
        if layer not in known:
            shown = ", ".join(map(str, known))
            raise InputError(f"this SAE has layers {shown}, got {layer}")
        self._layer, self._purpose = layer, purpose
        self.form = copy.deepcopy(sae).eval().requires_grad_(False).linear()
        self._of_rows = sae.config.normalize == "standardize"
        self.hook_dict = {}
        self.use_error_term = False
        if hook_point is not None:
            self.hook_sae_acts_post = hook_point()
            self.hook_dict["hook_sae_acts_post"] = self.hook_sae_acts_post
        self.cfg = ToolConfig(
            model_name=model_name,
            hook_name=f"blocks.{layer}.hook_{site}",
            hook_layer=layer,
            d_in=sae.config.d_in,
            d_sae=len(self.W_dec),
            dtype=str(self.dtype).removeprefix("torch."),
            device=str(self.device),
            architecture=sae.architecture.name,
        )

    @property
    def W_enc(self) -> torch.Tensor:  # noqa: N802
        """(D, F) encoder directions, of normalised rows; those of pseudo-latents are the mean's."""
        W = self.form.sae.W_enc
        others = W.new_full((self._num_others, W.shape[1]), 1 / W.shape[1])
        return torch.cat([W, others]).T

    @property
    def W_dec(self) -> torch.Tensor:  # noqa: N802
        """(F, D) rows by which latents are multiplied."""
        return self.form.W_dec if self._num_others else self.form.sae.W_dec

    @property
    def b_enc(self) -> torch.Tensor:
        """(F,) encoder bias of normalised rows."""
        sae = self.form.sae
        bias = sae.W_enc.new_zeros(len(sae.W_enc)) if sae.b_enc is None else sae.b_enc
        return torch.cat([bias, bias.new_zeros(self._num_others)])

    @property
    def b_dec(self) -> torch.Tensor:
        """(D,) added after the decoder: what every row has; 0 where rows are standardised."""
        sae = self.form.sae
        if self._of_rows:
            return torch.zeros_like(sae.b)
        x = sae.b[None]
        normalized = sae.standardize(x, self._at)
        return (x * normalized.scale + normalized.mean)[0]

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.form.sae.b.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.form.sae.b.dtype

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Latents (..., F) of rows (..., D), in the rows' units."""
        f = self.form.encode(x, self._layer)[..., : self.cfg.d_sae]
        return self.hook_sae_acts_post(f) if self.hook_dict else f

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        """f · W_dec + b_dec (..., D)."""
        if self._num_others:
            return self.form.decode(f)
        with as_given(f):
            return f @ self.W_dec + self.b_dec

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """decode(encode(x))."""
        return self.decode(self.encode(x))

    @property
    def _num_others(self) -> int:
        """Latents of the object that are none of the SAE's."""
        is_whole = self._of_rows and self._purpose == "reconstruction"
        return len(self.form.pseudo_latents) if is_whole else 0

    @property
    def _at(self) -> int | None:
        layers = self.form.sae.config.layers
        return None if layers is None else layers.index(self._layer)
