"""Opening the objects of a store, wherever they are."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from mlsae.base.directories import require_outside_stores
from mlsae.base.errors import InputError, without_secrets
from mlsae.base.units import parse_location
from mlsae.store.places.cache import CachedObjects, ChunkCache, default_cache_dir
from mlsae.store.places.credentials import S3_CREDENTIALS
from mlsae.store.places.objects import LocalObjects, Objects
from mlsae.store.places.retry import Patience

CACHE_BYTES = 10 * 2**30
"""Most bytes of remote stores that are kept on this machine, unless said otherwise."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_FORMS = (
    "a directory, https://host/path, s3://bucket/prefix or "
    "hf://datasets/owner/name[@revision][/path]"
)


def is_remote(location: str | os.PathLike[str]) -> bool:
    """True for a location elsewhere: a URL of another scheme than `file`."""
    return _scheme(os.fspath(location)) not in (None, "file")


class WritableObjects(Objects, Protocol):
    """Objects of a store elsewhere that can be added to, or replaced by name.

    The place checks incoming bytes, and an object appears whole or not at all.
    """

    def put(self, name: str, data: bytes) -> None:
        """Write an object.

        Raises:
            RemoteError: the place cannot be reached, or refuses it.
        """
        ...

    def put_file(self, name: str, path: Path) -> None:
        """Write an object that holds the bytes of a file.

        Raises:
            RemoteError: the place cannot be reached, or refuses it.
        """
        ...


def open_objects(
    location: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_bytes: int | None = None,
    patience: Patience | None = None,
) -> Objects:
    """The objects of a store.

    Args:
        location: a directory, or a URL: `file://…`, `https://host/path` (or `http://`),
            `s3://bucket/prefix`, `hf://datasets/owner/name[@revision][/path]`. S3 and the hub
            take credentials, endpoint and region from where their own tools do.
        cache_dir: where parts of a remote store are kept; `default_cache_dir()` if not given.
        cache_bytes: most bytes kept there; 10 GiB if not given, and 0 keeps and uses none.
        patience: limits on trying a failed request again.

    Raises:
        InputError: `location` is of no such form.
        RemoteError: the hub cannot be reached, or does not have the data set.
    """
    text = parse_location(os.fspath(location))
    if cache_dir is not None:
        require_outside_stores(Path(cache_dir) / "chunks", "--cache-dir")
    scheme = _scheme(text)
    if scheme is None:
        return LocalObjects(Path(text))
    if scheme == "file":
        return LocalObjects(_path_of(text))
    if scheme not in _READERS:
        raise InputError(f"{text}: expected {_FORMS}")
    objects = _READERS[scheme](text, patience or Patience())
    cache_bytes = CACHE_BYTES if cache_bytes is None else cache_bytes
    if cache_bytes == 0:
        return objects
    return CachedObjects(objects, ChunkCache(Path(cache_dir or default_cache_dir()), cache_bytes))


def open_writable(location: str, *, patience: Patience | None = None) -> WritableObjects:
    """The objects of a store to be, elsewhere.

    Args:
        location: `s3://bucket/prefix`.
        patience: limits on trying a failed request again.

    Raises:
        InputError: nothing can be written there.
    """
    scheme = _scheme(location)
    if scheme in _WRITERS:
        return _WRITERS[scheme](location, patience or Patience())
    if scheme in _NOT_WRITTEN:
        raise InputError(f"{location}: {_NOT_WRITTEN[scheme]}")
    raise InputError(f"{location}: expected s3://bucket/prefix")


def _scheme(text: str) -> str | None:
    found = _SCHEME.match(text)
    return found[1].lower() if found else None


def _path_of(text: str) -> Path:
    url = urlsplit(text)
    if url.netloc not in ("", "localhost"):
        raise InputError(f"{text}: a file URL has three slashes, as in file:///path")
    return Path(unquote(url.path))


def _open_web(text: str, patience: Patience) -> Objects:
    from mlsae.store.places.web import WebObjects

    try:
        url = urlsplit(text)
        is_address = bool(url.hostname) and url.port != 0
    except ValueError:
        is_address = False
    if not is_address or url.query or url.fragment:
        hint = "; in a password / is written %2F" if not is_address and "@" in text else ""
        raise InputError(
            f"{without_secrets(text)}: expected https://host/path or https://host:port/path, "
            f"without ? or #{hint}"
        )
    path = quote(url.path.rstrip("/"), safe="/%:@!$&'()*+,;=~")
    # Apart from the address, which messages show.
    login, _, host = url.netloc.rpartition("@")
    return WebObjects(urlunsplit((url.scheme, host, path, "", "")), login, patience)


def _open_bucket(text: str, patience: Patience) -> WritableObjects:
    from mlsae.store.places.web import BucketObjects

    bucket, _, prefix = text.partition("://")[2].partition("/")
    if not bucket:
        raise InputError(f"{text}: expected s3://bucket/prefix")
    prefix = prefix.strip("/")
    if "@" in bucket or ":" in bucket or {"", ".", ".."} & set(prefix.split("/") if prefix else ()):
        shown = without_secrets(text)
        raise InputError(
            f"{shown}: expected s3://bucket/prefix, without // in the prefix; credentials come "
            f"from the environment: {S3_CREDENTIALS}"
        )
    return BucketObjects(f"s3://{bucket}/{prefix}".rstrip("/"), bucket, prefix, patience)


def _open_hub(text: str, patience: Patience) -> Objects:
    from mlsae.store.places.hub import HubObjects

    return HubObjects(text, patience)


_READERS: dict[str, Callable[[str, Patience], Objects]] = {
    "http": _open_web,
    "https": _open_web,
    "s3": _open_bucket,
    "hf": _open_hub,
}
"""Scheme → how objects there are read; a new kind of place is entered here."""
_WRITERS: dict[str, Callable[[str, Patience], WritableObjects]] = {"s3": _open_bucket}
"""Scheme → how objects there are written."""
_WEB = "a web server takes no uploads; copy to a directory that it serves"
_NOT_WRITTEN = {
    "hf": "cannot be written directly; copy to a directory, then run `hf upload owner/name "
    "DIRECTORY . --repo-type dataset`",
    "http": _WEB,
    "https": _WEB,
}
"""Scheme → why nothing is written there, and the way round."""
