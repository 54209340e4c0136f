"""Files of a directory: those that hold the text, those that do not, and why."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlsae.base.errors import InputError
from mlsae.harvest.text.files import FILE_KINDS, kind_of

_SPLIT_NAME = re.compile(
    r"(train|training|validation|valid|val|dev|test|testing|eval|evaluation)([-._ 0-9]|$)"
)
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
DEFAULT_SPLIT = "train"
_PART = re.compile(r"(?P<head>.*)-(?P<number>\d{5,6})-of-(?P<total>\d{5,6})(?P<tail>\..*)")
_CARD = re.compile(r"^(configs|dataset_info):", re.M)
_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Files of a directory that are read."""

    directory: Path
    files: tuple[Path, ...]
    """Paths in the directory, sorted."""
    left_out: tuple[tuple[Path, str], ...]
    """(path, reason) of each file that is not read."""
    missing: tuple[str, ...]
    """Names of files that the names of others promise."""

    @property
    def paths(self) -> list[Path]:
        """Paths of the files that are read."""
        return [self.directory / file for file in self.files]

    @property
    def line(self) -> str:
        """The files that are read and those that are not, in one line."""
        line = f"packed from {self.directory}: {_listed(self.files)}"
        reasons: dict[str, list[Path]] = {}
        for path, reason in self.left_out:
            reasons.setdefault(reason, []).append(path)
        for reason, paths in reasons.items():
            line += f"; passed over {_listed(paths)} ({reason})"
        if self.missing:
            line += f"; missing: {', '.join(self.missing[:_SHOWN])}"
            if len(self.missing) > _SHOWN:
                line += f" and {len(self.missing) - _SHOWN:,} more"
        return line


def has_card(directory: Path) -> bool:
    """True where a README.md says which files make which subsets and splits, as on the hub."""
    try:
        text = (directory / "README.md").read_text(encoding="utf-8-sig", errors="replace")
    except (FileNotFoundError, IsADirectoryError):
        return False
    header = text.removeprefix("---\n").partition("\n---")[0] if text.startswith("---\n") else ""
    return _CARD.search(header) is not None


def choose_files(directory: Path, split: str | None) -> Choice | None:
    """Choose the files of a directory, and of those in it, that hold its text.

    Hidden files are passed over. Files are named by split if two splits are named, or every file
    by one: then those of `split` are read. Names alone decide, such as
    `train-00000-of-00002.parquet`, `test.jsonl` or `validation/a.txt`.

    Args:
        directory: an existing directory.
        split: name of a split; None for `train` where files are named by split, else for all.

    Returns:
        None where no file is of a kind read here.

    Raises:
        InputError: the directory is empty; holds files of several kinds or of another one, none of
            them named by split; a link to nothing, or a folder that cannot be read; or has no such
            split.
    """
    inside = list(_files_inside(directory))
    if not inside:
        raise InputError(f"{directory} holds no file; expected {', '.join(FILE_KINDS)}")
    left_out = [(path, "no text") for path in inside if _is_about(path)]
    files = [path for path in inside if not _is_about(path)]
    if not any(kind_of(path) for path in files):
        return None
    # Data sets as the hub keeps them have a licence or a description in another form beside them.
    if len(own := {kind_of(path) for path in files if split_of(path)} - {None}) == 1:
        left_out += [(path, "another kind of file") for path in files if kind_of(path) not in own]
        files = [path for path in files if kind_of(path) in own]
    _require_one_kind(directory, files)
    seen: dict[tuple[int, int], Path] = {}
    for path in list(files):
        status = (directory / path).stat()
        first = seen.setdefault((status.st_dev, status.st_ino), path)
        if first != path:
            files.remove(path)
            left_out.append((path, f"the same file as {first}"))
    named = {path: split_of(path) for path in files}
    splits = {name for name in named.values() if name is not None}
    wanted = _SPLITS.get(split or DEFAULT_SPLIT, split)
    if len(splits) > 1 or None not in named.values() or (split is not None and splits):
        if wanted not in splits:
            named_so = next(path for path in files if named[path] is not None)
            raise InputError(
                f"{directory} has no split {wanted!r}: its files are named {_and(sorted(splits))}, "
                f"such as {named_so}; choose one with --split, or rename the files"
            )
        others = [(path, f"split {name}" if name else "no split") for path, name in named.items()]
        left_out += [one for one in others if named[one[0]] != wanted]
        files = [path for path in files if named[path] == wanted]
    elif split is not None:
        raise no_splits(f"--split {split}", str(directory))
    return Choice(
        directory=directory,
        files=tuple(files),
        left_out=tuple(left_out),
        missing=tuple(_missing(files)),
    )


def no_splits(flag: str, name: str) -> InputError:
    """Error for --split or --subset where there is none."""
    return InputError(
        f"{flag} is for hub data sets and directories in hub layout; {name} is plain files, so "
        "leave it out"
    )


def split_of(path: Path) -> str | None:
    """Split named by the outermost part of a path that names one; None where none does."""
    found = next((match for part in path.parts if (match := _SPLIT_NAME.match(part))), None)
    return None if found is None else _SPLITS[found[1]]


def _files_inside(directory: Path) -> Iterator[Path]:
    """Paths of all files in a directory, sorted; links are followed, hidden entries are not."""

    def visit(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
        real = folder.resolve()
        if real in above:
            raise InputError(f"{folder} is a link to a folder around it; remove the link")
        try:
            entries = sorted(folder.iterdir())
        except OSError as error:
            raise InputError(f"{folder} cannot be read: {error.strerror}") from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from visit(entry, (*above, real))
            elif entry.is_file():
                yield entry.relative_to(directory)
            else:
                what = "a link to nothing" if entry.is_symlink() else "no file"
                raise InputError(f"{entry} cannot be read: it is {what}; mend or remove it")

    return iter(sorted(visit(directory, ())))


def _is_about(path: Path) -> bool:
    """True for files about a data set: its card and its licence."""
    return path.suffix.lower() == ".md" or path.name.upper() in {"LICENSE", "LICENCE", "README"}


def _require_one_kind(directory: Path, files: Sequence[Path]) -> None:
    kinds: dict[str | None, Path] = {}
    for path in files:
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


def _missing(files: Sequence[Path]) -> Iterator[str]:
    """Names such as `train-00001-of-00002.jsonl` that others of the series promise."""
    series: dict[tuple[Path, str, str, str], dict[int, int]] = {}
    for path in files:
        if match := _PART.fullmatch(path.name):
            key = (path.parent, match["head"], match["total"], match["tail"])
            series.setdefault(key, {})[int(match["number"])] = len(match["number"])
    for (folder, head, total, tail), numbers in series.items():
        # Some series count from 1.
        first = 1 if int(total) in numbers else 0
        width = next(iter(numbers.values()))
        for number in range(first, first + int(total)):
            if number not in numbers:
                yield str(folder / f"{head}-{number:0{width}}-of-{total}{tail}")


def _listed(paths: Sequence[Path]) -> str:
    shown = ", ".join(map(str, paths[:_SHOWN]))
    if len(paths) <= _SHOWN:
        return shown
    return f"{shown} and {len(paths) - _SHOWN:,} more"


def _and(words: Sequence[str]) -> str:
    return " and ".join(words)
