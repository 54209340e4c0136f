"""What a harvest is asked to do."""

from dataclasses import dataclass
from pathlib import Path

from mlsae.base.errors import InputError
from mlsae.base.words import SITES
from mlsae.harvest.text.packing import BOS, PACKINGS
from mlsae.harvest.text.sources import TextConfig
from mlsae.models.loading import DTYPES
from mlsae.models.weights.initialization import INITS
from mlsae.store.format.added_fvu import MAX_ADDED_FVU
from mlsae.store.format.layout import SHARD_BYTES
from mlsae.store.format.presets import PRESETS

DEFAULT_CONTEXT_LENGTH = 1024
DEVICE_MAPS = ("auto",)


@dataclass(frozen=True, kw_only=True)
class HarvestConfig:
    """Settings of a harvest; checked when made, against the model and the text when run.

    Raises:
        InputError: a value is out of range.
    """

    model: str
    """Hub id or local directory of a transformer and its tokenizer."""
    dataset: str | tuple[str, ...]
    """Hub id, local directory or file of text; several, each as NAME:SHARE, for a mixture."""
    out: Path
    """Directory of the activation store: absent, empty, or a store of the same plan."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    init: str = "trained"
    """trained, rerandomized, rerandomized-keep-embeddings, random or control (docs/models.md)."""
    init_seed: int = 0
    """Of what `init` draws."""
    blocks: str | None = None
    """Path of the module list that holds the blocks; found by structure if not given."""
    split: str = "train"
    """Split of a hub data set or of a local directory in hub layout."""
    subset: str | None = None
    """Subset (configuration) of a hub data set."""
    shuffle_seed: int | None = None
    """Shuffles a hub data set as it is streamed; None for its own order."""
    text_column: str = "text"
    """Column that holds the text; a .txt file has none."""
    tokens_column: str | None = None
    """Column of token ids, where the text is tokenised already."""
    max_tokens: int | None = None
    """Most tokens to harvest, rounded down to whole sequences; None for all."""
    max_disk: int | None = None
    """Most bytes the store may take; a harvest that would take more is refused."""
    context_length: int | None = None
    """Tokens of a sequence; None for the model's maximum, but no more than 1,024."""
    packing: str = "concatenate"
    """concatenate: documents joined by separators and cut; document: one a sequence, padded."""
    bos: str = "auto"
    """auto, always or never: whether a BOS opens what the model reads at once."""
    isolate_documents: bool = False
    """Attention does not cross documents, and positions restart at each."""
    layers: tuple[int, ...] | None = None
    """Blocks, from 0, whose activations are stored; None for all."""
    sites: tuple[str, ...] = ("resid_post",)
    """Where in a block: resid_pre, resid_mid, resid_post, attn_out, mlp_out."""
    keep_positions: int | None = None
    """Positions of each sequence that are stored, a seeded choice; None for all."""
    keep_seed: int = 0
    """Of that choice."""
    encoding: str = "auto"
    """float16, bfloat16, float32 or int8, each also with -zstd; auto is bfloat16 for a model in
    bfloat16, else float16, which is refused where the first batch has magnitudes over 16,000."""
    max_encoding_fvu: float = MAX_ADDED_FVU
    """Most FVU that the encoding may add to a shard, in total and in each decile of row norm."""
    model_dtype: str = "auto"
    """Precision the model runs in: float32, float16, bfloat16, or auto for its checkpoint's."""
    attention_implementation: str = "auto"
    """eager, sdpa, sdpa_by_blocks, flash_attention_2, …; auto for sdpa_by_blocks where it is
    faster on this machine, else the library's choice."""
    batch_size: int | None = None
    """Sequences of a forward pass; None to choose by memory. It decides bits, so it belongs to the
    store's plan."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto for CUDA where there is any."""
    device_map: str | None = None
    """auto: spread a model over all devices, main memory and disk; None for one device."""
    allow_mixed_hardware: bool = False
    """Continue a store whose shards another kind of device or version of torch computed."""
    shard_size: int | None = None
    """Bytes of one shard object of one layer, about; None for 128 MiB."""
    dry_run: bool = False
    """Say what would be harvested and write nothing."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out))
        object.__setattr__(self, "sites", tuple(self.sites))
        for flag, value, least in (
            ("--max-tokens", self.max_tokens, 1),
            ("--max-disk", self.max_disk, 1),
            ("--context-length", self.context_length, 2),
            ("--keep-positions", self.keep_positions, 1),
            ("--batch-size", self.batch_size, 1),
            ("--shard-size", self.shard_size, 1),
        ):
            if value is not None and value < least:
                raise InputError(f"{flag} must be at least {least}, got {value}")
        if not self.max_encoding_fvu > 0:
            raise InputError(f"--max-encoding-fvu must be above 0, got {self.max_encoding_fvu}")
        for flag, text, choices in (
            ("--encoding", self.encoding, ("auto", *PRESETS)),
            ("--model-dtype", self.model_dtype, ("auto", *DTYPES)),
            ("--init", self.init, INITS),
            ("--packing", self.packing, PACKINGS),
            ("--bos", self.bos, BOS),
            ("--device-map", self.device_map, (None, *DEVICE_MAPS)),
        ):
            if text not in choices:
                names = ", ".join(choice for choice in choices if choice is not None)
                raise InputError(f"{flag} must be {names}, got {text!r}")
        if not self.sites or unknown_or_twice(self.sites):
            raise InputError(
                f"--sites must be different ones of {', '.join(SITES)}, got "
                f"{', '.join(self.sites) or 'none'}"
            )
        if self.device_map is not None and self.device != "auto":
            raise InputError(
                f"--device-map {self.device_map} chooses the devices itself; leave out --device "
                f"{self.device}"
            )

    @property
    def text(self) -> TextConfig:
        """Where the documents come from."""
        return TextConfig(
            datasets=(self.dataset,) if isinstance(self.dataset, str) else tuple(self.dataset),
            split=self.split,
            subset=self.subset,
            shuffle_seed=self.shuffle_seed,
            text_column=self.text_column,
            tokens_column=self.tokens_column,
        )

    @property
    def shard_bytes(self) -> int:
        """`shard_size` with its default resolved."""
        return SHARD_BYTES if self.shard_size is None else self.shard_size

    @property
    def sized_as(self) -> str:
        """The preset whose sizes are those of `encoding`: `auto` is one of two of 16 bits."""
        return "float16" if self.encoding == "auto" else self.encoding


def unknown_or_twice(sites: tuple[str, ...]) -> bool:
    """Whether a site is none of the five or is named twice."""
    return len(set(sites)) != len(sites) or not set(sites) <= set(SITES)
