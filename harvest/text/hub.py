"""Rows of a hub data set, or of a local directory with a card like one, as they stream in."""

import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlsae.base.errors import InputError
from mlsae.harvest.text.files import SHUFFLE_BUFFER, TextRow, decompressed

_PATTERN_SIGNS = frozenset("[]*?")


def hub_rows(
    name: str, split: str, subset: str | None, column: str, shuffle_seed: int | None
) -> Iterator[TextRow]:
    """The rows of one split of a data set, streamed.

    Args:
        name: hub id, or path of a directory.
        split: name of the split.
        subset: name of the subset; None for the only or default one.
        column: the column that will be read; others, such as pictures, are not decoded.
        shuffle_seed: seed of the order of the files and of the draws from a buffer of 10,000 rows;
            None for the order there is.

    Raises:
        InputError: there is no such data set, subset or split; it may not be read; the hub cannot
            be reached, or the connection was lost for good.
    """
    import datasets

    _bound_retries(datasets.config)
    _read_zstd()
    try:
        with _without_pattern_signs(name) as place:
            rows = datasets.load_dataset(place, subset, split=split, streaming=True)
            if column in (rows.column_names or ()):
                rows = rows.select_columns([column])
            if shuffle_seed is not None:
                rows = rows.shuffle(shuffle_seed, buffer_size=SHUFFLE_BUFFER)
            yield from rows
    except ConnectionError as error:
        if "Disconnected" in str(error):
            raise InputError(
                f"the connection to the hub was lost while data set {name} was read, and trying "
                f"again for half a minute did not help ({_first_line(error)}); run the same "
                "command again"
            ) from error
        raise InputError(
            f"cannot reach data set {name!r}: no such file or directory here, and the hub did not "
            f"answer ({_first_line(error)}); give a local .txt, .jsonl or .parquet file"
        ) from error
    except Exception as error:  # Libraries for tables, file systems and HTTP raise many kinds.
        which = f"split {split!r}" if subset is None else f"subset {subset!r}, split {split!r}"
        raise InputError(
            f"data set {name}, {which}, cannot be read: {_first_line(error)}"
        ) from error


@contextmanager
def _without_pattern_signs(name: str) -> Iterator[str]:
    """Another path of a directory whose own the library would take for a pattern."""
    if not _PATTERN_SIGNS & set(name):
        yield name
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, "data")
        link.symlink_to(Path(name).resolve(), target_is_directory=True)
        yield str(link)


def _read_zstd() -> None:
    """Let the library read .zst files, of several frames too, whatever else is installed."""
    from fsspec.compression import register_compression

    def opened(file: Any, mode: str = "rb", **_: Any) -> io.BufferedReader:  # noqa: ARG001
        return io.BufferedReader(decompressed(file, "zstd"))

    register_compression("zstd", opened, "zst", force=True)


def _bound_retries(config: Any) -> None:
    """Leave it to the hub's own client to try again, which it does for half a minute.

    Around that the library would try 20 times more: a quarter of an hour before it says a word.
    """
    config.STREAMING_READ_MAX_RETRIES = config.STREAMING_OPEN_MAX_RETRIES = 1
    config.STREAMING_READ_RETRY_INTERVAL = config.STREAMING_OPEN_RETRY_INTERVAL = 0


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
