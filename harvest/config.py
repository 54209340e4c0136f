"""What a harvest is asked to do."""

from dataclasses import dataclass
from pathlib import Path

from mlsae.base.errors import InputError
from mlsae.models.loading import DTYPES
from mlsae.store.encoding import STORED_DTYPE
from mlsae.store.layout import SHARD_BYTES

DEFAULT_CONTEXT_LENGTH = 1024


@dataclass(frozen=True, kw_only=True)
class HarvestConfig:
    """Settings of a harvest; checked when made, against the model and the text when run.

    Raises:
        InputError: a value is out of range.
    """

    model: str
    """Hub id or local directory of a causal language model and its tokenizer."""
    dataset: str
    """Hub id, local directory in hub layout, or a local .txt, .jsonl or .parquet file."""
    out: Path
    """Directory of the activation store: absent, empty, or a store of the same plan."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    split: str = "train"
    """Split of a hub data set or of a local directory in hub layout."""
    text_column: str = "text"
    """Column that holds the text; a .txt file has none."""
    max_tokens: int | None = None
    """Most tokens to harvest, rounded down to whole sequences; None for all."""
    max_disk: int | None = None
    """Most bytes the store may take; a harvest that would take more is refused."""
    context_length: int | None = None
    """Tokens of a sequence; None for the model's maximum, but no more than 1,024."""
    layers: tuple[int, ...] | None = None
    """Blocks, from 0, whose outputs are stored; None for all."""
    encoding: str = "auto"
    """float16, bfloat16 or float32; auto is bfloat16 for a model in bfloat16, else float16, which
    is refused where the first batch has magnitudes over 16,000."""
    model_dtype: str = "auto"
    """Precision the model runs in: float32, float16, bfloat16, or auto for its checkpoint's."""
    batch_size: int = 16
    """Sequences of a forward pass. It decides bits, so it belongs to the store's plan."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto for CUDA where there is any."""
    shard_size: int | None = None
    """Bytes of one shard object of one layer, about; None for 128 MiB."""
    dry_run: bool = False
    """Say what would be harvested and write nothing."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out))
        for flag, value, least in (
            ("--max-tokens", self.max_tokens, 1),
            ("--max-disk", self.max_disk, 1),
            ("--context-length", self.context_length, 2),
            ("--batch-size", self.batch_size, 1),
            ("--shard-size", self.shard_size, 1),
        ):
            if value is not None and value < least:
                raise InputError(f"{flag} must be at least {least}, got {value}")
        for flag, text, choices in (
            ("--encoding", self.encoding, STORED_DTYPE),
            ("--model-dtype", self.model_dtype, DTYPES),
        ):
            if text != "auto" and text not in choices:
                raise InputError(f"{flag} must be auto, {', '.join(choices)}, got {text!r}")

    @property
    def shard_bytes(self) -> int:
        """`shard_size` with its default resolved."""
        return SHARD_BYTES if self.shard_size is None else self.shard_size
