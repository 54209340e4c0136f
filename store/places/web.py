"""Objects on a web server or in an S3 bucket.

Only `remote` and `hub` import this module: a store on this machine needs no network library.

No answer is taken in whole before its size is known and allowed, and none of more bytes than were
asked for. The library's own retries are off for reading: they end at a cut in the middle of a body,
and their time would multiply with ours.
"""

import errno
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

import numpy as np
import numpy.typing as npt
import obstore
from obstore.exceptions import BaseError
from obstore.store import HTTPStore, S3Store

from mlsae.store.errors import RemoteError
from mlsae.store.places.credentials import S3_CREDENTIALS, bucket_access
from mlsae.store.places.failures import RequestError, understand
from mlsae.store.places.objects import too_large
from mlsae.store.places.retry import Patience

if TYPE_CHECKING:
    from obstore.store import BackoffConfig, ClientConfig

_PIECE_BYTES = 2**14
"""An answer is taken in pieces of about as many bytes; a cut loses the last one."""
_PART_BYTES = 2**23
_PARTS = 8
"""A large object is put in as many parts of as many bytes at a time."""


class RemoteObjects:
    """The objects of a store that is elsewhere. Threads may share it; forked processes may not.

    Args:
        place: URL, as messages name it.
        client: the library's handle.
        credentials: remedy where credentials are missing or refused.
        patience: limits on trying a failed request again.
    """

    is_local = False

    def __init__(
        self, place: str, client: HTTPStore | S3Store, credentials: str, patience: Patience
    ) -> None:
        self.place = place
        self._client = client
        self._credentials = credentials
        self._patience = patience

    def read(self, name: str, limit: int) -> bytes:
        """See `Objects`."""
        held = bytearray()

        def allocate(num_bytes: int, total: int) -> memoryview:
            nonlocal held
            if total > limit:
                raise too_large(self.place, name, total, limit)
            held = bytearray(num_bytes)
            return memoryview(held)

        self._receive(name, 0, max(limit, 1), allocate)
        return bytes(held)

    def read_into(self, name: str, offset: int, out: npt.NDArray[Any]) -> int:
        """See `Objects`."""
        view = out.reshape(-1).view(np.uint8).data
        if not view.nbytes:
            return 0
        return self._receive(name, offset, offset + view.nbytes, lambda *_: view)

    def forget(self, name: str, offset: int, num_bytes: int) -> bool:  # noqa: ARG002
        """Nothing is kept."""
        return False

    def size(self, name: str) -> int:
        """See `Objects`."""
        size = 0

        def allocate(num_bytes: int, total: int) -> memoryview:
            nonlocal size
            size = total
            return memoryview(bytearray(num_bytes))

        # Not HEAD: an address that was signed for GET refuses it.
        self._receive(name, 0, 1, allocate)
        return size

    def exists(self, name: str) -> bool:
        """See `Objects`."""
        try:
            self.size(name)
        except FileNotFoundError:
            return False
        return True

    def _receive(
        self, name: str, start: int, stop: int, allocate: Callable[[int, int], memoryview]
    ) -> int:
        """Take the bytes start … stop − 1 of an object, as far as it has them.

        Args:
            name: name of the object.
            start: first byte.
            stop: end of the bytes, after `start`.
            allocate: (bytes that will come, bytes of the whole object) → where to put them, at
                least as much; called once.
        """
        out: memoryview | None = None
        done = expected = 0

        def attempt() -> int:
            nonlocal out, done, expected
            try:
                answer = obstore.get(self._client, name, options={"range": (start + done, stop)})
                total = answer.meta["size"]
                num_bytes = min(stop, total) - start
                if out is None:
                    out, expected = allocate(num_bytes, total), num_bytes
                if num_bytes != expected:
                    raise RequestError(
                        "the object was replaced while it was read",
                        remedy="run the same command again when nobody writes to it",
                    )
                for piece in answer.stream(min_chunk_size=_PIECE_BYTES):
                    if len(piece) > expected - done:
                        raise RequestError(
                            "the server sent more bytes than it was asked for",
                            remedy="check the address and the server",
                        )
                    out[done : done + len(piece)] = piece
                    done += len(piece)
            except BaseError as error:
                failure = understand(error, self._credentials)
                if failure.is_past_end and out is None:
                    return 0
                raise failure from None
            if done < expected:
                raise RequestError("the connection was cut", passes=True)
            return done

        try:
            return self._patience.persist(
                f"{self.place}/{name} cannot be read", attempt, lambda: done
            )
        except FileNotFoundError:
            raise FileNotFoundError(
                errno.ENOENT, "no such object", f"{self.place}/{name}"
            ) from None


class WebObjects(RemoteObjects):
    """A store on a web server, which answers requests for parts of its files.

    Args:
        url: URL of the store, without a / at its end.
        login: user and password, each percent-encoded, `user:password`; empty for none.
        patience: limits on trying a failed request again.
    """

    def __init__(self, url: str, login: str, patience: Patience) -> None:
        encoded = b64encode(unquote_to_bytes(login)).decode()
        headers = {"Authorization": f"Basic {encoded}"} if login else {}
        client = HTTPStore(
            url, client_options=client_options(patience, headers), retry_config={"max_retries": 0}
        )
        super().__init__(
            url, client, "the server wants a login: https://USER:PASSWORD@… gives one", patience
        )

    def walk(self) -> Iterator[tuple[str, int]]:
        """See `Objects`."""
        raise RemoteError(f"{self.place}: a web server does not list what it holds")


class BucketObjects(RemoteObjects):
    """A store in an S3 bucket, or one to be. Each object appears whole or not at all.

    Credentials, region and endpoint come from the environment (`AWS_…`), then from the profile
    (`mlsae.store.places.credentials`), then from the machine's role.
    """

    def __init__(self, place: str, bucket: str, prefix: str, patience: Patience) -> None:
        self._open = partial(
            S3Store,
            bucket,
            prefix=prefix or None,
            client_options=client_options(patience),
            **bucket_access(place),
        )
        super().__init__(
            place, self._open(retry_config={"max_retries": 0}), S3_CREDENTIALS, patience
        )

    @cached_property
    def _writer(self) -> S3Store:
        """Repeats the part of an object that failed; the server checks each part's SHA-256."""
        patience = self._patience
        backoff: BackoffConfig = {
            "init_backoff": timedelta(seconds=patience.first_wait),
            "max_backoff": timedelta(seconds=patience.longest_wait),
        }
        return self._open(
            config={"checksum_algorithm": "SHA256"},
            retry_config={
                "max_retries": patience.tries - 1,
                "retry_timeout": timedelta(seconds=patience.seconds),
                "backoff": backoff,
            },
        )

    def put(self, name: str, data: bytes) -> None:
        """See `WritableObjects`."""
        self._put(name, data)

    def put_file(self, name: str, path: Path) -> None:
        """See `WritableObjects`."""
        self._put(name, path)

    def _put(self, name: str, source: bytes | Path) -> None:
        def attempt() -> None:
            try:
                obstore.put(
                    self._writer, name, source, chunk_size=_PART_BYTES, max_concurrency=_PARTS
                )
            except BaseError as error:
                raise understand(error, self._credentials) from None

        once = replace(self._patience, tries=1)
        try:
            once.persist(f"{self.place}/{name} cannot be written", attempt)
        except FileNotFoundError:
            raise RemoteError(
                f"{self.place}/{name} cannot be written: there is no such bucket; check its name, "
                f"or create it first"
            ) from None

    def walk(self) -> Iterator[tuple[str, int]]:
        """See `Objects`."""

        def attempt() -> list[tuple[str, int]]:
            try:
                pages = obstore.list(self._client, chunk_size=1000)
                return [(found["path"], found["size"]) for page in pages for found in page]
            except BaseError as error:
                raise understand(error, self._credentials) from None

        yield from self._patience.persist(f"{self.place} cannot be listed", attempt)


def client_options(patience: Patience, headers: dict[str, str] | None = None) -> "ClientConfig":
    """Time limits of one request. A long object may take several: each goes on where one ended."""
    return {
        "allow_http": True,
        "connect_timeout": timedelta(seconds=10),
        "read_timeout": timedelta(seconds=patience.stall_seconds),
        "timeout": timedelta(minutes=5),
        "default_headers": headers or {},
    }
