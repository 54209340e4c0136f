"""Rows of local files: plain text, JSON lines and Parquet."""

import io
import json
import random
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlsae.base.errors import InputError
from mlsae.base.machine.resources import require_memory

FILE_KINDS = (
    ".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz", ".txt.zst", ".jsonl.zst",
)  # fmt: skip
SHUFFLE_BUFFER = 10_000
"""Documents that the next one is drawn from, where they are shuffled."""
ROWS_AT_ONCE = 256
"""Rows of a Parquet file; each may be a whole book, or a Python number for each token."""
TextRow = Mapping[str, Any]
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def kind_of(path: Path) -> str | None:
    """.txt, .jsonl or .parquet, by the name, compressed or not; None for any other file."""
    name = path.name.lower()
    if not name.endswith(FILE_KINDS):
        return None
    return Path(name.removesuffix(".gz").removesuffix(".zst")).suffix


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
        InputError: the file cannot be opened, or a compressed one is damaged or ends too early.
    """
    with _raw(path) as raw:
        compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
        if compression is None:
            yield raw
            return
        try:
            with io.BufferedReader(decompressed(raw, compression)) as file:
                yield file
        except OSError as error:  # Errors of pyarrow are such, too.
            reason = _first_line(error)
            if "too much memory" in reason:
                raise InputError(
                    f"{path} was compressed with a window over 128 MiB, as by zstd --long=31; "
                    f"decompress it first, by zstd -d --long=31 {shlex.quote(str(path))}"
                ) from error
            raise InputError(
                f"{path} cannot be decompressed: {reason}; the file is damaged or was not copied "
                "whole"
            ) from error


@contextmanager
def _raw(path: Path) -> Iterator[io.BufferedReader]:
    """The bytes of a file as they are on the disk, if they are its own."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    with file:
        if file.peek(len(_LFS_POINTER)).startswith(_LFS_POINTER):
            raise InputError(
                f"{path} is a pointer of Git LFS, not the text itself; fetch that with git lfs pull"
            )
        yield file


def decompressed(file: Any, compression: str) -> Any:
    """A stream of the content of an open file, which may be of several parts, one after another.

    Args:
        file: opened for reading bytes.
        compression: `gzip` or `zstd`.
    """
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), compression)


def _text(path: Path) -> str:
    require_memory(
        2 * path.stat().st_size,
        f"reading {path}, which is one document",
        "split it into several files, or make each of its texts a line of a .jsonl file",
    )
    with _opened(path) as file:
        return _decoded(file.read(), f"{path}")


def _decoded(data: bytes, where: str) -> str:
    """Text of UTF-8, without a mark of the byte order at its beginning."""
    try:
        return data.decode("utf-8-sig")
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
            row = _json(_decoded(line, where), where)
            if not isinstance(row, dict):
                raise InputError(f"{where}: expected a JSON object, got {type(row).__name__}")
            yield row


def _json(text: str, where: str) -> Any:
    try:
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: not JSON ({error})") from error
        except ValueError:
            # A number of thousands of digits, which Python refuses to make.
            return json.loads(text, parse_int=float)
    except RecursionError as error:
        raise InputError(f"{where}: brackets are nested too deep to be read") from error


def _parquet_rows(path: Path, column: str) -> Iterator[TextRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with _raw(path), pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                # The names alone go into the message: values may be none that Python has.
                yield from [dict.fromkeys(names)] * min(file.metadata.num_rows, 1)
                return
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=[column]):
                for value in batch.column(0):
                    yield {column: value.as_py()}
                    number += 1
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}, row {number}: column {column!r} is not UTF-8 text: byte "
            f"{error.object[error.start]:#04x} at offset {error.start}; convert it first"
        ) from error
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as Parquet: {_first_line(error)}") from error
    except OverflowError as error:
        raise InputError(
            f"{path}, row {number}: column {column!r} cannot be read: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
