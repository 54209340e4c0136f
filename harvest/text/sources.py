"""Documents from wherever the text is: a hub data set, a directory like one, or local files."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsae.base.embedded import embedded_text
from mlsae.base.errors import InputError
from mlsae.base.files import local_path
from mlsae.base.settings import setting, settings
from mlsae.base.units import check_seed
from mlsae.harvest.text.files import FILE_KINDS, TextRow, file_rows, kind_of
from mlsae.harvest.text.folder import DEFAULT_SPLIT, choose_files, has_card, no_splits
from mlsae.harvest.text.hub import hub_rows
from mlsae.harvest.text.mixture import parse_mixture

Document = str | npt.NDArray[np.uint32]
"""A text, or the token ids of one: (n,)."""
MOST_TOKEN = 2**32 - 1


@settings
class TextSettings:
    """Places and columns that documents are read from, which a harvest's settings contain.

    Raises:
        InputError: the data sets and their weights are not usable together.
    """

    dataset: str | tuple[str, ...] = setting(
        decides=True,
        group="Text",
        again=True,
        doc="Hub id, directory or file of text, or demo, demo:train or demo:held_out; given again "
        "as NAME:SHARE, a mixture.",
    )
    split: str | None = setting(
        default=None,
        unset="train, where there are splits",
        decides=True,
        group="Text",
        doc="Split of a hub data set, or of a directory whose files are named by split.",
    )
    subset: str | None = setting(
        default=None,
        unset="the only one",
        decides=True,
        group="Text",
        doc="Subset (configuration) of a hub data set, or of a directory with such a card.",
    )
    shuffle_seed: int | None = setting(
        default=None,
        unset="the data set's own order",
        decides=True,
        group="Text",
        doc="Seed of the order in which documents are taken.",
    )
    text_column: str = setting(
        default="text",
        decides=True,
        group="Text",
        doc="Column that holds the text; a .txt file has none.",
    )
    tokens_column: str | None = setting(
        default=None,
        unset="the text is tokenised",
        decides=True,
        group="Text",
        doc="Column of token ids, where the text is tokenised already.",
    )

    def __post_init__(self) -> None:
        given = self.dataset
        if isinstance(given, str):
            object.__setattr__(self, "dataset", embedded_text(given))
        else:
            object.__setattr__(self, "dataset", tuple(embedded_text(name) for name in given))
        parse_mixture(self.datasets)
        check_seed("--shuffle-seed", self.shuffle_seed)

    @property
    def datasets(self) -> tuple[str, ...]:
        """Every data set, each of several with its weight."""
        return (self.dataset,) if isinstance(self.dataset, str) else self.dataset

    @property
    def column(self) -> str:
        """The column that is read."""
        return self.tokens_column or self.text_column


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data set, opened."""

    name: str
    """Name as given, without the weight."""
    share: float
    """Share of the tokens that the source is to have; the shares of all sources sum to 1."""
    documents: Iterator[Document]
    """Documents in order; a missing one is an empty one."""
    note: str | None = None
    """Files of a directory that are read and those that are not, in a line."""


def open_sources(config: TextSettings) -> tuple[Source, ...]:
    """Find every data set; documents are read as they are asked for.

    A path is a .txt file (one document), a .jsonl or .parquet file (a document a row), the first
    two compressed by gzip or zstd if they end in .gz or .zst; or a directory of such files, or one
    with the card of a hub data set. What is no path is a hub id.

    Raises:
        InputError: there is no such path, or it is nothing that can be read. What only shows in
            reading (no such hub data set, split or column; damage; no text) is raised when
            documents are asked for.
    """
    return tuple(
        _opened(name, share, config) for name, share in parse_mixture(config.datasets).items()
    )


def _opened(name: str, share: float, config: TextSettings) -> Source:
    rows, note = _rows(name, config)
    return Source(name=name, share=share, documents=_documents(name, rows, config), note=note)


def _rows(name: str, config: TextSettings) -> tuple[Iterable[TextRow], str | None]:
    """Rows of a data set, and a note on the files they come from."""
    path, split = local_path(name), config.split or DEFAULT_SPLIT
    note = None
    if path.is_dir():
        choice = None
        if has_card(path):
            note = f"packed from {path}: split {split} of the files that its README.md names"
        elif choice := choose_files(path, config.split):
            note = choice.line
        if choice is None:
            return hub_rows(
                str(path), split, config.subset, config.column, config.shuffle_seed
            ), note
        files = choice.paths
    elif path.is_file():
        if kind_of(path) is None:
            raise InputError(
                f"cannot read {name}: expected a file ending in {', '.join(FILE_KINDS)}, a "
                "directory of such files or with the card of a hub data set, or a hub id"
            )
        if config.split is not None:
            raise no_splits(f"--split {config.split}", name)
        files = [path]
    elif path.exists():
        raise InputError(
            f"{name} is a pipe or device, which cannot be read again where a harvest goes on; "
            "write the text to a file first, such as text.jsonl"
        )
    elif path.is_absolute() or name.startswith((".", "~")) or kind_of(path) is not None:
        raise InputError(f"there is no data set {name}; give another path or a hub id")
    else:
        return hub_rows(name, split, config.subset, config.column, config.shuffle_seed), None
    if config.subset is not None:
        raise no_splits(f"--subset {config.subset}", name)
    if config.tokens_column is not None and kind_of(files[0]) == ".txt":
        raise InputError(
            f"--tokens-column {config.tokens_column}: {name} is plain text and has no columns; "
            "give token ids as .jsonl, .parquet or a hub data set"
        )
    return file_rows(files, config.column, config.shuffle_seed), note


def _documents(name: str, rows: Iterable[TextRow], config: TextSettings) -> Iterator[Document]:
    convert = _text_of if config.tokens_column is None else _tokens_of
    for number, row in enumerate(rows):
        if config.column not in row:
            flag = "--text-column" if config.tokens_column is None else "--tokens-column"
            raise InputError(
                f"data set {name} has no column {config.column!r}: row {number} has "
                f"{', '.join(sorted(row)) or 'none'}; name the one to read with {flag}"
            )
        value = row[config.column]
        where = f"column {config.column!r} of data set {name}"
        yield "" if value is None else convert(value, where, number)


def _text_of(value: Any, where: str, number: int) -> Document:
    if not isinstance(value, str):
        raise InputError(
            f"{where} must hold text, got {type(value).__name__} in row {number}; name another "
            "with --text-column, or with --tokens-column if it holds token ids"
        )
    return value


def _tokens_of(value: Any, where: str, number: int) -> Document:
    ids = _integers(value)
    if ids is None:
        got = "a list that holds other things" if isinstance(value, list) else type(value).__name__
        raise InputError(
            f"{where} must hold lists of token ids, got {got} in row {number}; name another with "
            "--tokens-column, or with --text-column if it holds text"
        )
    wrong = ids[(ids < 0) | (ids > MOST_TOKEN)]
    if len(wrong):
        raise InputError(
            f"{where} must hold token ids from 0 to {MOST_TOKEN}, got {wrong[0]} in row {number}"
        )
    return ids.astype(np.uint32)


def _integers(value: Any) -> npt.NDArray[Any] | None:
    """A list of whole numbers as an array; None for anything else."""
    if not isinstance(value, list):
        return None
    try:
        ids = np.asarray(value) if value else np.empty(0, np.uint32)
    except ValueError:  # Lists of different lengths.
        return None
    return ids if ids.ndim == 1 and ids.dtype.kind in "iu" else None
