"""Where an SAE is: a directory of this machine, or a model repository of the Hugging Face hub."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import huggingface_hub
from huggingface_hub import constants as hub
from huggingface_hub import errors as hub_errors

from mlsae.base.files import local_path
from mlsae.sae.errors import NotAnSAEError

_HUB_ID = re.compile(
    r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?P<folder>(?:/[\w.-]+)*)(?:@(?P<revision>[\w./-]+))?",
    re.ASCII,
)


@dataclass(frozen=True)
class Found:
    """Files of an SAE on this machine."""

    directory: Path
    """Directory that holds the files."""
    source: str
    """The directory itself, or `owner/name[/folder]@commit`."""


def find(path_or_hub_id: str | Path, names: Collection[str]) -> Found:
    """The directory of that name, or else the files `names` of a hub repository.

    Files of the hub are kept in its own cache on this machine, and taken from there where it cannot
    be reached.

    Args:
        path_or_hub_id: a directory, or `owner/name`, `owner/name/folder`, `owner/name@revision`;
            a `Path` is a directory always.
        names: files that may lie there; others are not fetched.

    Raises:
        NotAnSAEError: there is no such directory, and the hub has none of the files there, or it
            cannot be reached.
    """
    path = local_path(path_or_hub_id)
    if path.is_dir():
        return Found(path, str(path.resolve()))
    named = _HUB_ID.fullmatch(path_or_hub_id) if isinstance(path_or_hub_id, str) else None
    if named is None or ".." in path.parts:
        raise NotAnSAEError(f"there is no SAE at {path_or_hub_id}: no such directory")
    repository, revision = named["repository"], named["revision"]
    folder = named["folder"].strip("/")
    prefix = f"{folder}/" if folder else ""
    try:
        snapshot = Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=[f"{prefix}{name}" for name in names]
            )
        )
        source = f"{repository}/{prefix}".rstrip("/") + f"@{snapshot.name}"
        directory = snapshot / folder
        if not any((directory / name).is_file() for name in names):
            listed = huggingface_hub.HfApi().list_repo_files(repository, revision=snapshot.name)
            raise NotAnSAEError(nothing_at(source, listed, names, f"{repository}/"))
    except Exception as error:
        explanation = _explanation(str(path_or_hub_id), repository, error)
        if explanation is None:
            raise
        raise NotAnSAEError(explanation) from error
    return Found(directory, source)


def nothing_at(place: str, files: Iterable[str], names: Collection[str], prefix: str) -> str:
    """The message for a place that holds no SAE itself, with folders below that may.

    Args:
        place: place that was searched.
        files: files there, as paths with `/`.
        names: files that an SAE has.
        prefix: text before the first folder in the location to be typed.
    """
    paths = [PurePosixPath(file) for file in files]
    folders = sorted({str(p.parent) for p in paths if p.name in names and len(p.parts) > 1})
    if not folders:
        return f"there is no SAE at {place}: expected one of {', '.join(sorted(names))}"
    shown = ", ".join(f"{prefix}{folder}" for folder in folders[:4])
    more = f" and {len(folders) - 4} more" if len(folders) > 4 else ""
    return f"there is no SAE at {place} itself but in folders of it: give one of {shown}{more}"


def _explanation(asked: str, repository: str, error: Exception) -> str | None:
    """One line for the user; None for a defect of a program."""
    if isinstance(error, hub_errors.GatedRepoError):
        return (
            f"the SAE {asked} is gated on {hub.ENDPOINT}: ask for access on its page, then log in "
            f"with `hf auth login`"
        )
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return f"{repository} on {hub.ENDPOINT} has no such revision; check what is behind @"
    if isinstance(error, hub_errors.RepositoryNotFoundError | hub_errors.HFValidationError):
        return (
            f"there is no SAE at {asked}: no such directory here and no such model on "
            f"{hub.ENDPOINT}; check the spelling, or log in with `hf auth login` if it is private"
        )
    if isinstance(error, hub_errors.LocalEntryNotFoundError | hub_errors.OfflineModeIsEnabled):
        return (
            f"there is no SAE at {asked}: no such directory here, not in the cache "
            f"{hub.HF_HUB_CACHE}, and {hub.ENDPOINT} cannot be reached; give a directory, or run "
            f"`hf download {repository}` where there is a network and copy the cache"
        )
    if isinstance(error, hub_errors.HfHubHTTPError):
        return f"{hub.ENDPOINT} did not give {asked}: {str(error).strip().splitlines()[0]}"
    # The hub's HTTP client has changed from one library to another, and may again.
    if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "requests"):
        return (
            f"the connection to {hub.ENDPOINT} broke off while {asked} was fetched; run the same "
            f"command again: what has arrived is kept"
        )
    return None
