"""Documents from wherever the text is: a hub data set, a directory like one, or a local file."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mlsae.base.errors import InputError

FILE_KINDS = (".txt", ".jsonl", ".parquet")


def documents(dataset: str, *, split: str, text_column: str) -> Iterator[str]:
    """The documents of a data set in order, one string each; a missing text is an empty one.

    Args:
        dataset: a local .txt file (one document), .jsonl or .parquet file (a document a row), a
            local directory in hub layout, or a hub id (both streamed).
        split: split of a hub data set or directory.
        text_column: column of the text.

    Raises:
        InputError: there is no such data set, split or column, it cannot be reached, or what it
            holds is no text. Raised when the first document is asked for.
    """
    path = Path(dataset).expanduser()
    if path.is_dir():
        rows: Iterable[Mapping[str, Any]] = _hub_rows(str(path), split)
    elif path.suffix in FILE_KINDS and path.is_file():
        rows = _file_rows(path, text_column)
    elif path.is_file():
        raise InputError(
            f"cannot read {dataset}: expected a file ending in {', '.join(FILE_KINDS)}, a "
            "directory in hub layout, or a hub id"
        )
    elif path.is_absolute() or dataset.startswith((".", "~")) or path.suffix in FILE_KINDS:
        raise InputError(f"there is no data set {dataset}; give another path or a hub id")
    else:
        rows = _hub_rows(dataset, split)
    for number, row in enumerate(rows):
        yield _text_of(row, number, dataset, text_column)


def _text_of(row: Mapping[str, Any], number: int, dataset: str, text_column: str) -> str:
    if text_column not in row:
        raise InputError(
            f"data set {dataset} has no column {text_column!r}: row {number} has "
            f"{', '.join(sorted(row)) or 'none'}; name the one that holds the text with "
            "--text-column"
        )
    text = row[text_column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InputError(
            f"column {text_column!r} of data set {dataset} must hold text, got "
            f"{type(text).__name__} in row {number}; name another with --text-column"
        )
    return text


def _file_rows(path: Path, text_column: str) -> Iterable[Mapping[str, Any]]:
    if path.suffix == ".txt":
        return [{text_column: _decoded(path, path.read_bytes())}]
    return _jsonl_rows(path) if path.suffix == ".jsonl" else _parquet_rows(path, text_column)


def _decoded(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text: byte {data[error.start]:#04x} at offset {error.start}; "
            "convert it first"
        ) from error


def _jsonl_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(_decoded(path, line))
            except ValueError as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise InputError(
                    f"{path}, line {number}: expected a JSON object, got {type(row).__name__}"
                )
            yield row


def _parquet_rows(path: Path, text_column: str) -> Iterator[Mapping[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            # Without the column, whole rows are read for the message that names what is there.
            wanted = [text_column] if text_column in file.schema_arrow.names else None
            for batch in file.iter_batches(columns=wanted):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as Parquet: {_first_line(error)}") from error


def _hub_rows(name: str, split: str) -> Iterator[Mapping[str, Any]]:
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield from datasets.load_dataset(name, split=split, streaming=True)
    except ConnectionError as error:
        raise InputError(
            f"cannot reach data set {name!r}: no such file or directory here, and the hub did not "
            f"answer ({_first_line(error)}); give a local .txt, .jsonl or .parquet file"
        ) from error
    except (DatasetsError, HfHubHTTPError, OSError, ValueError) as error:
        raise InputError(
            f"data set {name}, split {split!r}, cannot be read: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
