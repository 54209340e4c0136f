"""Opening the objects of a store, wherever they are."""

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from mlsae.base.errors import InputError
from mlsae.store.objects import LocalObjects, Objects
from mlsae.store.retry import Patience

CACHE_BYTES = 10 * 2**30
"""Most bytes of chunks of remote stores that are kept on this machine, unless said otherwise."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_FORMS = (
    "a directory, https://host/path, s3://bucket/prefix or "
    "hf://datasets/owner/name[@revision][/path]"
)


def is_remote(location: str | os.PathLike[str]) -> bool:
    """Whether a location names a place elsewhere: a URL that is not of a file."""
    found = _SCHEME.match(os.fspath(location))
    return found is not None and found[1].lower() != "file"


def open_objects(
    location: str | os.PathLike[str],
    *,
    cache_dir: Path | None = None,  # noqa: ARG001
    cache_bytes: int | None = None,  # noqa: ARG001
    patience: Patience | None = None,
) -> Objects:
    """The objects of a store.

    Args:
        location: a directory, or a URL: `file://…`, `https://host/path` (or `http://`),
            `s3://bucket/prefix`, `hf://datasets/owner/name[@revision][/path]`. S3 and the hub
            take credentials, endpoint and region from where their own tools do.
        cache_dir: where chunks of a remote store are kept; `default_cache_dir()` if not given.
        cache_bytes: most bytes kept there; 10 GiB if not given, and 0 keeps none.
        patience: how long to go on where a request fails.

    Raises:
        InputError: `location` is of no such form.
        RemoteError: the hub cannot be reached, or does not have the data set.
    """
    text = os.fspath(location)
    found = _SCHEME.match(text)
    if found is None:
        return LocalObjects(Path(text))
    scheme, url = found[1].lower(), urlsplit(text)
    if scheme == "file":
        if url.netloc not in ("", "localhost"):
            raise InputError(f"{text}: a file URL has three slashes, file:///path")
        return LocalObjects(Path(unquote(url.path)))
    patience = patience or Patience()
    if scheme in ("http", "https"):
        return _open_http(text, patience)
    raise InputError(f"{text}: expected {_FORMS}")


def _open_http(text: str, patience: Patience) -> Objects:
    from mlsae.store.places import HttpObjects

    url = urlsplit(text)
    if not url.hostname or url.query or url.fragment:
        raise InputError(f"{text}: expected https://host/path, without ? or #")
    path = url.path.rstrip("/")
    # Messages do not show a password.
    place = urlunsplit((url.scheme, url.netloc.rpartition("@")[2], path, "", ""))
    return HttpObjects(place, urlunsplit((url.scheme, url.netloc, path, "", "")), patience)
