"""Rows of local files: plain text, JSON lines and Parquet, one file or a directory of them."""

import io
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlsae.base.errors import InputError
from mlsae.base.resources import require_memory

FILE_KINDS = (
    ".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz", ".txt.zst", ".jsonl.zst",
)  # fmt: skip
SHUFFLE_BUFFER = 10_000
"""Documents that the next one is drawn from, where they are shuffled."""
ROWS_AT_ONCE = 256
"""Rows of a Parquet file; each may be a whole book, or a Python number for each token."""
TextRow = Mapping[str, Any]


def kind_of(path: Path) -> str | None:
    """.txt, .jsonl or .parquet, by the name, compressed or not; None for any other file."""
    if not path.name.endswith(FILE_KINDS):
        return None
    plain = path.with_suffix("") if path.suffix in {".gz", ".zst"} else path
    return plain.suffix


def files_in(directory: Path) -> list[Path]:
    """The files of a directory and of those in it, sorted by path; hidden ones are left out.

    Raises:
        InputError: the directory holds no file, files of several kinds, or one that cannot be read.
    """
    inside = sorted(
        relative
        for relative in (path.relative_to(directory) for path in directory.rglob("*"))
        if not any(part.startswith(".") for part in relative.parts)
        and (directory / relative).is_file()
    )
    if not inside:
        raise InputError(f"{directory} holds no file; expected {', '.join(FILE_KINDS)}")
    kinds: dict[str | None, Path] = {}
    for path in inside:
        kinds.setdefault(kind_of(path), path)
    if None in kinds:
        raise InputError(
            f"{directory} holds {kinds[None]}, which is not one of {', '.join(FILE_KINDS)}; move "
            "other files out of it"
        )
    if len(kinds) > 1:
        raise InputError(
            f"{directory} holds files of several kinds, such as "
            f"{' and '.join(map(str, kinds.values()))}; give it one kind only"
        )
    return [directory / path for path in inside]


def file_rows(files: Sequence[Path], column: str, shuffle_seed: int | None) -> Iterator[TextRow]:
    """The rows of files of one kind, one file after another, or shuffled.

    Args:
        files: paths of the files.
        column: the column that will be read; a text file's only one.
        shuffle_seed: seed of the order of the files and of the draws from a buffer of rows; None
            for the order there is.

    Raises:
        InputError: a file is damaged, or not of the kind that its name says.
        ResourceError: a text file is too large for the memory.
    """
    if shuffle_seed is None:
        return _rows_in_order(files, column)
    draw = random.Random(shuffle_seed)
    files = draw.sample(files, len(files))
    return _shuffled(_rows_in_order(files, column), draw)


def _rows_in_order(files: Iterable[Path], column: str) -> Iterator[TextRow]:
    for path in files:
        kind = kind_of(path)
        if kind == ".parquet":
            yield from _parquet_rows(path, column)
        elif kind == ".jsonl":
            yield from _jsonl_rows(path)
        else:
            yield {column: _text(path)}


def _shuffled(rows: Iterable[TextRow], draw: random.Random) -> Iterator[TextRow]:
    buffer: list[TextRow] = []
    for row in rows:
        if len(buffer) < SHUFFLE_BUFFER:
            buffer.append(row)
            continue
        index = draw.randrange(SHUFFLE_BUFFER)
        yield buffer[index]
        buffer[index] = row
    draw.shuffle(buffer)
    yield from buffer


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedIOBase]:
    """The bytes of a file, decompressed if its name says so.

    Raises:
        InputError: a compressed file is damaged or ends too early.
    """
    if path.suffix not in {".gz", ".zst"}:
        with path.open("rb") as plain:
            yield plain
        return
    import pyarrow

    compression = {".gz": "gzip", ".zst": "zstd"}[path.suffix]
    with path.open("rb") as raw:
        try:
            stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), compression)
            with io.BufferedReader(stream) as file:
                yield file
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(
                f"{path} cannot be decompressed: {_first_line(error)}; the file is damaged or was "
                "not copied whole"
            ) from error


def _text(path: Path) -> str:
    require_memory(
        2 * path.stat().st_size,
        f"reading {path}, which is one document",
        "split it into several files, or make each of its texts a line of a .jsonl file",
    )
    with _opened(path) as file:
        return _decoded(file.read(), f"{path}")


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where} is not UTF-8 text: byte {data[error.start]:#04x} at offset {error.start}; "
            "convert it first"
        ) from error


def _jsonl_rows(path: Path) -> Iterator[TextRow]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(_decoded(line, where))
            except json.JSONDecodeError as error:
                raise InputError(f"{where}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise InputError(f"{where}: expected a JSON object, got {type(row).__name__}")
            yield row


def _parquet_rows(path: Path, column: str) -> Iterator[TextRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            # Without the column, whole rows are read for the message that names the columns.
            wanted = [column] if column in file.schema_arrow.names else None
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=wanted):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as Parquet: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
