"""Errors of transformers and the hub while a model is loaded, in one line for the user."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers
from huggingface_hub import constants as hub
from huggingface_hub import errors as hub_errors

from mlsae.base.errors import InputError, MlsaeError
from mlsae.base.files import stand_in
from mlsae.models.source.place import Place

_UNUSABLE = (OSError, ValueError, KeyError, ImportError, hub_errors.HfHubHTTPError)


@contextmanager
def explained(place: Place, what: str) -> Iterator[None]:
    """Turn an exception raised inside the block into one line.

    Args:
        place: directory or hub repository that should hold the model.
        what: `model` or `tokenizer`.

    Raises:
        InputError: the model does not exist, cannot be reached, is damaged, or needs code from its
            repository.
    """
    try:
        yield
    except (MlsaeError, MemoryError, Warning):
        raise
    except BaseException as error:
        # A panic in Rust is no `Exception`.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        line = _impostor(place) if place.is_directory else None
        raise InputError(line or _explanation(place, what, error)) from error


@contextmanager
def config_explained(place: Place) -> Iterator[None]:
    """Turn any exception of the library about a config into one line.

    Exceptions about reaching the config are left to `explained`.

    Raises:
        InputError: no model can be built from the config.
    """
    try:
        yield
    except (MlsaeError, OSError, ImportError, hub_errors.HfHubHTTPError):
        raise
    except Exception as error:
        if isinstance(error, hub_errors.HFValidationError) or "trust_remote_code" in str(error):
            raise
        raise InputError(
            f"the config of model {place.name} describes no model that transformers can build: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error


def first_line(error: BaseException) -> str:
    """First line of an error's text, with the second after a colon; its class where it has none."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].endswith(":") and len(lines) > 1:
        return f"{lines[0]} {lines[1].strip()}"
    return lines[0]


def _impostor(place: Place) -> str | None:
    """Line on a file that is something else than its name says; None without such a file."""
    folder = Path(place.name)
    for file in sorted(folder.iterdir()):
        if file.suffix not in (".json", ".safetensors", ".bin", ".model", ".txt"):
            continue
        with file.open("rb") as opened:
            begins = opened.read(64).lstrip().lower()
        if begins.startswith(b"version https://git-lfs"):
            return (
                f"{file} is a pointer of Git LFS, not the file itself; fetch it with git lfs pull "
                f"in {folder}"
            )
        if begins.startswith((b"<!doctype html", b"<html")):
            return (
                f"{file} is a web page, such as a server sends where one has to log in; fetch the "
                "file again, with hf download"
            )
    return None


def _explanation(place: Place, what: str, error: BaseException) -> str:
    """One line for the user."""
    reasons = [error]
    while (cause := reasons[-1].__cause__ or reasons[-1].__context__) is not None:
        reasons.append(cause)

    def because(*classes: type[BaseException]) -> bool:
        return any(isinstance(reason, classes) for reason in reasons)

    name = place.name
    # A damaged file comes as a bare exception of the library below.
    if _origin(error) in ("safetensors", "safetensors_rust"):
        for path in sorted(Path(name).glob("*.safetensors")) if place.is_directory else ():
            if found := stand_in(path):
                return f"{path} {found}"
        return (
            f"the weights of model {name} are damaged ({first_line(error)}); fetch the model again"
        )
    if what == "tokenizer" and (
        type(error) is Exception or type(error).__name__ == "PanicException"
    ):
        return f"the tokenizer of {name} is damaged ({first_line(error)}); fetch it again"
    broken = next((reason for reason in reasons if _is_broken_connection(reason)), None)
    if broken is None and not isinstance(error, _UNUSABLE):
        return (
            f"{what} {name} cannot be loaded by transformers {transformers.__version__}: "
            f"{type(error).__name__}: {first_line(error)}"
        )
    if "trust_remote_code" in str(error):
        return f"{what} {name} needs code from its own repository, which this package never runs"
    if place.is_directory:
        return f"{what} in {name} cannot be read: {first_line(error)}"
    if because(hub_errors.GatedRepoError):
        return (
            f"{what} {name} is gated on {hub.ENDPOINT}: ask for access on its page, then log in "
            "with `hf auth login`"
        )
    if because(hub_errors.RevisionNotFoundError):
        return f"{what} {name} has no revision {place.revision!r} on {hub.ENDPOINT}"
    if because(hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError):
        return (
            f"there is no {what} {name!r}: no such directory here and no such model on "
            f"{hub.ENDPOINT}; check the spelling, or log in with `hf auth login` if it is private"
        )
    if because(hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled):
        return (
            f"cannot find {what} {name!r}: no such directory here, not in the cache "
            f"{hub.HF_HUB_CACHE}, and {hub.ENDPOINT} cannot be reached; give a local directory, "
            f"or run `hf download {name}` where there is a network and copy the cache"
        )
    if broken is not None:
        return (
            f"the connection to {hub.ENDPOINT} broke off while {what} {name} was fetched "
            f"({first_line(broken)}); run the same command again: what has arrived is kept"
        )
    return f"{what} {name} cannot be loaded: {first_line(error)}"


def _origin(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _is_broken_connection(error: BaseException) -> bool:
    """True for an error of the hub's HTTP client that came instead of an answer."""
    answered = type(error).__name__ in ("HTTPError", "HTTPStatusError")
    return _origin(error) in ("httpx", "httpx2", "requests") and not answered
