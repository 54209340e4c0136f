"""Rows of a hub data set, or of a local directory laid out like one, as they stream in."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlsae.base.errors import InputError
from mlsae.harvest.text.files import SHUFFLE_BUFFER, TextRow

SPLIT_NAME = re.compile(
    r"(train|training|validation|valid|val|dev|test|testing|eval|evaluation)([-._ 0-9]|$)"
)


def is_hub_layout(directory: Path) -> bool:
    """True for a directory with a README.md (the hub's card), or files or folders named by split.

    Those are names such as `train-00000-of-00002.parquet`, `test.jsonl` or `validation/`.
    """
    return (directory / "README.md").is_file() or any(
        SPLIT_NAME.match(path.name) for path in directory.rglob("*")
    )


def hub_rows(
    name: str, split: str, subset: str | None, shuffle_seed: int | None
) -> Iterator[TextRow]:
    """The rows of one split of a data set, streamed.

    Args:
        name: hub id, or path of a directory in hub layout.
        split: name of the split.
        subset: name of the subset; None for the only or default one.
        shuffle_seed: seed of the order of the files and of the draws from a buffer of 10,000 rows;
            None for the order there is.

    Raises:
        InputError: there is no such data set, subset or split; it may not be read; the hub cannot
            be reached, or the connection was lost for good.
    """
    import datasets

    _bound_retries(datasets.config)
    try:
        rows = datasets.load_dataset(name, subset, split=split, streaming=True)
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


def _bound_retries(config: Any) -> None:
    """Leave it to the hub's own client to try again, which it does for half a minute.

    Around that the library would try 20 times more: a quarter of an hour before it says a word.
    """
    config.STREAMING_READ_MAX_RETRIES = config.STREAMING_OPEN_MAX_RETRIES = 1
    config.STREAMING_READ_RETRY_INTERVAL = config.STREAMING_OPEN_RETRY_INTERVAL = 0


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
