"""Harvest settings."""

from pathlib import Path

from mlsae.base.embedded import embedded_model
from mlsae.base.errors import InputError
from mlsae.base.settings import device_setting, setting, settings
from mlsae.base.units import (
    parse_bytes,
    parse_count,
    parse_count_or_auto,
    parse_layers,
    parse_names,
)
from mlsae.base.words import SITES
from mlsae.harvest.text.joints import BOS, PACKINGS
from mlsae.harvest.text.sources import TextSettings
from mlsae.store.format.added_fvu import MAX_ADDED_FVU
from mlsae.store.format.presets import PRESETS

DEFAULT_CONTEXT_LENGTH = 1024
DEVICE_MAPS = ("auto",)
ALL_ENCODINGS = "all"
"""Encodings of a dry run that prints the size in each."""


@settings
class _ModelSettings:
    """Settings about the model, whose options come first."""

    model: str = setting(
        decides=True,
        group="Model",
        doc="Hub id or local directory of a transformer with its tokenizer, or demo.",
    )
    revision: str | None = setting(
        default=None,
        unset="the newest",
        decides=True,
        group="Model",
        doc="Branch, tag or commit of a hub model.",
    )
    init: str = setting(
        default="trained",
        decides=True,
        group="Model",
        doc="Weights: trained, rerandomized, rerandomized-keep-embeddings, random or control.",
    )
    init_seed: int = setting(
        default=0, decides=True, group="Model", doc="Seed for the weights that --init draws."
    )
    blocks: str | None = setting(
        default=None,
        unset="found by structure",
        decides=True,
        group="Model",
        doc="Path to the module list that holds the blocks, such as transformer.h.",
    )
    tokenizer: str | None = setting(
        default=None,
        unset="the model's",
        decides=True,
        group="Model",
        doc="Hub id or local directory of a tokenizer, for a model that lies without one.",
    )
    model_dtype: str = setting(
        default="auto",
        decides=True,
        group="Model",
        doc="Precision the model runs in: float32, float16, bfloat16, or auto for the "
        "checkpoint's.",
    )
    attention_implementation: str = setting(
        default="auto",
        decides=True,
        group="Model",
        option="--attn-implementation",
        doc="Attention in the model: eager, sdpa, sdpa_by_blocks, flash_attention_2, …; auto is "
        "sdpa_by_blocks where it is faster on this machine, else the library's choice.",
    )


@settings
class HarvestConfig(TextSettings, _ModelSettings):
    """Settings for a harvest; checked when made, against the model and the text when run.

    Raises:
        InputError: a value is out of range.
    """

    out: Path = setting(
        decides=False,
        group="Store",
        doc="Directory for the activation store: absent, empty, or a store with the same plan.",
    )
    max_tokens: int | None = setting(
        default=None,
        unset="all",
        decides=True,
        group="Text",
        parse=parse_count,
        doc="Most tokens to harvest, such as 10M, rounded down to whole sequences.",
    )
    max_disk: int | None = setting(
        default=None,
        unset="free space of the disk",
        decides=False,
        group="Store",
        parse=parse_bytes,
        doc="Most bytes that the store may take, such as 200GB; a larger harvest is refused.",
    )
    context_length: int | None = setting(
        default=None,
        unset="the model's maximum, at most 1,024",
        decides=True,
        group="Sequences",
        parse=parse_count,
        doc="Tokens a sequence.",
    )
    packing: str = setting(
        default="auto",
        decides=True,
        group="Sequences",
        doc="concatenate: documents joined by separators and cut; document: one a sequence, "
        "padded; rows: token ids that are sequences already; auto: rows where the first ones have "
        "the context length, else concatenate.",
    )
    bos: str = setting(
        default="auto",
        decides=True,
        group="Sequences",
        doc="A BOS token before everything that the model reads at once: always, never, or auto "
        "for what the tokenizer puts before a text.",
    )
    isolate_documents: bool = setting(
        default=False,
        decides=True,
        group="Sequences",
        doc="Keep attention inside each document and restart positions there.",
    )
    layers: tuple[int, ...] | None = setting(
        default=None,
        unset="all",
        decides=True,
        group="Store",
        parse=parse_layers,
        doc="Blocks to store, from 0, such as 0-5 or 0,2,4.",
    )
    sites: tuple[str, ...] = setting(
        default=("resid_post",),
        decides=True,
        group="Store",
        parse=parse_names,
        doc="Places in a block to store: resid_pre, resid_mid, resid_post, attn_out, mlp_out.",
    )
    keep_positions: int | None = setting(
        default=None,
        unset="all",
        decides=True,
        group="Store",
        parse=parse_count,
        doc="Positions in each sequence to store, drawn at random by --keep-seed.",
    )
    keep_seed: int = setting(
        default=0,
        decides=True,
        group="Store",
        doc="Seed for the positions that --keep-positions draws.",
    )
    encoding: str = setting(
        default="auto",
        decides=True,
        group="Store",
        doc="float16, bfloat16, float32 or int8, each also with -zstd; auto is bfloat16 for a "
        "model in bfloat16, else float16, which refuses magnitudes over 16,000 in the first "
        "batch; all, with --dry-run, prints the size in each.",
    )
    max_encoding_fvu: float = setting(
        default=MAX_ADDED_FVU,
        decides=False,
        group="Store",
        doc="Most FVU that the encoding may add to a shard, in total and in each decile of row "
        "norm.",
    )
    batch_size: int | None = setting(
        default=None,
        unset="auto",
        decides=True,
        group="Run",
        parse=parse_count_or_auto,
        metavar="COUNT",
        doc="Sequences a forward pass, or auto to choose by memory; part of the store's plan, "
        "because a pass's shape decides last bits.",
    )
    device: str = device_setting(gives_way_to=("device_map",))
    device_map: str | None = setting(
        default=None,
        unset="one device",
        gives_way_to=("device",),
        decides=False,
        group="Run",
        doc="auto: spread a large model over GPUs, main memory and disk.",
    )
    allow_mixed_hardware: bool = setting(
        default=False,
        decides=False,
        group="Run",
        doc="Continue a store whose shards another kind of device or version of torch computed.",
    )
    shard_size: int | None = setting(
        default=None,
        unset="128MiB, less where that makes under 16 files",
        decides=True,
        group="Store",
        parse=parse_bytes,
        doc="Bytes per file, about; a file holds one layer.",
    )
    dry_run: bool = setting(
        default=False,
        decides=False,
        group="Run",
        doc="Pack the text, try one batch, print what the harvest would take, and write nothing.",
    )

    def __post_init__(self) -> None:
        # Here, so that help and wrong usage do not wait for torch and transformers.
        from mlsae.models.loading import DTYPES
        from mlsae.models.weights.initialization import INITS

        super().__post_init__()
        object.__setattr__(self, "model", embedded_model(self.model))
        if self.tokenizer is not None:
            object.__setattr__(self, "tokenizer", embedded_model(self.tokenizer))
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
        for flag, name, choices in (
            ("--encoding", self.asked_encoding, ("auto", *PRESETS)),
            ("--model-dtype", self.model_dtype, ("auto", *DTYPES)),
            ("--init", self.init, INITS),
            ("--packing", self.packing, PACKINGS),
            ("--bos", self.bos, BOS),
            ("--device-map", self.device_map, (None, *DEVICE_MAPS)),
        ):
            if name not in choices:
                names = ", ".join(choice for choice in choices if choice is not None)
                raise InputError(f"{flag} must be {names}, got {name!r}")
        if not self.sites or unknown_or_twice(self.sites):
            raise InputError(
                f"--sites must be different ones of {', '.join(SITES)}, got "
                f"{', '.join(self.sites) or 'none'}"
            )
        if self.packing == "rows" and (self.tokens_column is None or self.bos == "always"):
            raise InputError(
                "--packing rows takes token ids as they are: it needs --tokens-column, and no "
                "--bos always"
            )
        if self.device_map is not None and self.device != "auto":
            raise InputError(
                f"--device-map {self.device_map} chooses the devices itself; leave out --device "
                f"{self.device}"
            )

    @property
    def asked_encoding(self) -> str:
        """`encoding`; `auto` for a dry run of all."""
        return "auto" if self.dry_run and self.encoding == ALL_ENCODINGS else self.encoding

    @property
    def sized_as(self) -> str:
        """Preset with the sizes for `encoding`: for `auto`, one of the two with 16 bits."""
        return "float16" if self.asked_encoding == "auto" else self.asked_encoding


def unknown_or_twice(sites: tuple[str, ...]) -> bool:
    """True where a site is unknown or named twice."""
    return len(set(sites)) != len(sites) or not set(sites) <= set(SITES)
