"""Objects on a web server or in an S3 bucket.

Only `remote` and `hub` import this module: a store on this machine needs no network library.

No answer is taken in whole before its size is known and allowed, and none of more bytes than were
asked for. The library's own retries are off for reading: they end at a cut in the middle of a body,
and their time would multiply with ours.
"""

import errno
import logging
import threading
from abc import ABC, abstractmethod
from base64 import b64encode
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
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

from mlsae.base.errors import InputError
from mlsae.store.errors import RemoteError
from mlsae.store.places.credentials import S3_CREDENTIALS, bucket_access
from mlsae.store.places.failures import RequestError, understand
from mlsae.store.places.objects import too_large
from mlsae.store.places.plain import Answer, PlainWeb
from mlsae.store.places.relay import FORKS, Relay
from mlsae.store.places.retry import Patience, proxy_for

if TYPE_CHECKING:
    from obstore.store import BackoffConfig, ClientConfig

log = logging.getLogger("mlsae")

_PIECE_BYTES = 2**14
"""An answer is taken in pieces of about as many bytes; a cut loses the last one."""
_PART_BYTES = 2**23
_PARTS = 8
"""A large object is put in as many parts of as many bytes at a time."""


class RemoteObjects(ABC):
    """The objects of a store that is elsewhere. Threads may share it, and forked processes.

    Args:
        place: URL, as messages name it.
        client: the library's handle.
        credentials: remedy where credentials are missing or refused.
        patience: limits on trying a failed request again.
        address: URL of the server.
    """

    is_local = False

    def __init__(
        self,
        place: str,
        client: HTTPStore | S3Store,
        credentials: str,
        patience: Patience,
        address: str,
    ) -> None:
        self.place = place
        self._address = address
        self._client = client
        self._credentials = credentials
        self._patience = patience
        self._has_read = False
        self._relay: Relay | None = None
        self._relay_lock = threading.Lock()

    def read(self, name: str, limit: int) -> bytes:
        """See `Objects`."""
        if (relay := self._elsewhere()) is not None:
            return bytes(relay.call("read", name, limit))
        held = bytearray()

        def allocate(num_bytes: int, total: int | None) -> memoryview:
            nonlocal held
            if total is not None and total > limit:
                raise too_large(self.place, name, total, limit)
            held = bytearray(num_bytes)
            return memoryview(held)

        done = self._receive(name, 0, max(limit, 1), allocate, may_be_absent=True)
        if done > limit:
            raise too_large(self.place, name, done, limit)
        return bytes(held[:done])

    def read_into(self, name: str, offset: int, out: npt.NDArray[Any]) -> int:
        """See `Objects`."""
        view = out.reshape(-1).view(np.uint8).data
        if not view.nbytes:
            return 0
        if (relay := self._elsewhere()) is not None:
            data = relay.call("read_part", name, offset, view.nbytes)
            view[: len(data)] = data
            return len(data)
        return self._receive(name, offset, offset + view.nbytes, lambda *_: view)

    def read_part(self, name: str, offset: int, num_bytes: int) -> bytes:
        """Bytes of an object from `offset` on, fewer than `num_bytes` only where the object ends.

        Raises:
            FileNotFoundError, RemoteError: as `read_into`.
        """
        out = np.empty(num_bytes, np.uint8)
        return out[: self.read_into(name, offset, out)].tobytes()

    def forget(self, name: str, offset: int, num_bytes: int) -> bool:  # noqa: ARG002
        """Nothing is kept."""
        return False

    def size(self, name: str) -> int:
        """See `Objects`."""
        if (relay := self._elsewhere()) is not None:
            return int(relay.call("size", name))
        return self._size(name)

    def _size(self, name: str, *, may_be_absent: bool = False) -> int:
        size: int | None = 0

        def allocate(num_bytes: int, total: int | None) -> memoryview:
            nonlocal size
            size = total
            return memoryview(bytearray(num_bytes))

        # Not HEAD: an address that was signed for GET refuses it.
        self._receive(name, 0, 1, allocate, may_be_absent=may_be_absent)
        return self._counted_size(name) if size is None else size

    def _counted_size(self, name: str) -> int:
        """Bytes of an object whose answers do not say so.

        Raises:
            RemoteError: they cannot be counted here.
        """
        raise RemoteError(
            f"{self.place}/{name} cannot be read: the server does not say how many bytes it has; "
            f"copy the store to a disk by other means"
        )

    def exists(self, name: str) -> bool:
        """See `Objects`."""
        if (relay := self._elsewhere()) is not None:
            return bool(relay.call("exists", name))
        try:
            self._size(name, may_be_absent=True)
        except FileNotFoundError:
            return False
        return True

    @abstractmethod
    def walk(self) -> Iterator[tuple[str, int]]:
        """See `Objects`."""

    def listed(self) -> list[tuple[str, int]]:
        """(name, bytes) of every object; see `Objects.walk`."""
        return list(self.walk())

    def _elsewhere(self) -> Relay | None:
        """A process that asks in place of this one, which was forked."""
        if not FORKS.is_forked:
            return None
        with self._relay_lock:
            if self._relay is None or not self._relay.is_own:
                self._relay = Relay(self)
            return self._relay

    def _get(self, name: str, start: int, stop: int) -> Answer:
        """Ask for the bytes start … stop − 1 of an object."""
        with self._requesting():
            answer = obstore.get(self._client, name, options={"range": (start, stop)})
        total = answer.meta["size"]

        def pieces() -> Generator[Any]:
            with self._requesting():
                yield from answer.stream(min_chunk_size=_PIECE_BYTES)

        return Answer(min(stop, total) - start, total, pieces())

    @contextmanager
    def _requesting(self) -> Iterator[None]:
        """A stretch in which the network library is used.

        Raises:
            RequestError: the request failed, or cannot be made.
        """
        FORKS.use()
        try:
            yield
        except BaseError as error:
            raise self._understood(error) from None
        except ValueError as error:
            raise RequestError(f"{error}", remedy="check the address") from None

    def _understood(self, error: BaseError) -> RequestError:
        failure = understand(error, self._credentials)
        if failure.is_unreached:
            failure.cause += proxy_for(self._address)
        return failure

    def _receive(
        self,
        name: str,
        start: int,
        stop: int,
        allocate: Callable[[int, int | None], memoryview],
        *,
        may_be_absent: bool = False,
    ) -> int:
        """Take the bytes start … stop − 1 of an object, as far as it has them.

        Args:
            name: name of the object.
            start: first byte.
            stop: end of the bytes, after `start`.
            allocate: (most bytes that will come, bytes of the whole object, None where the server
                does not say) → where to put them; called once.
            may_be_absent: take a refusal that servers give for absent objects too for one, once
                another object was read.
        """
        out: memoryview | None = None
        done = expected = 0

        def attempt() -> int:
            nonlocal out, done, expected
            try:
                answer = self._get(name, start + done, stop)
                self._has_read = True
                left = stop - start - done if answer.num_bytes is None else answer.num_bytes
                if out is None:
                    out, expected = allocate(left, answer.total), left
                if done + left != expected:
                    raise RequestError(
                        "the object was replaced while it was read",
                        remedy="run the same command again when nobody writes to it",
                    )
                with closing(answer.pieces) as pieces:
                    for piece in pieces:
                        if len(piece) > expected - done:
                            raise RequestError(
                                "the server sent more bytes than it was asked for",
                                remedy="check the address and the server",
                            )
                        out[done : done + len(piece)] = piece
                        done += len(piece)
            except RequestError as failure:
                if failure.is_past_end and out is None:
                    return 0
                if failure.may_be_absent and may_be_absent and self._has_read:
                    raise FileNotFoundError from None
                raise
            if done < expected and answer.num_bytes is not None:
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
        self._url, self._login = url, login
        encoded = b64encode(unquote_to_bytes(login)).decode()
        headers = {"Authorization": f"Basic {encoded}"} if login else {}
        try:
            client = HTTPStore(
                url,
                client_options=client_options(patience, headers),
                retry_config={"max_retries": 0},
            )
        except (BaseError, ValueError) as error:
            raise InputError(f"{url} is no address ({error}): expected https://host/path") from None
        self._plain = PlainWeb(url, headers, patience.stall_seconds)
        self._is_plain = self._tells_whole = False
        super().__init__(
            url,
            client,
            "the server wants a login: https://USER:PASSWORD@… gives one",
            patience,
            url,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process asks for itself."""
        return WebObjects, (self._url, self._login, self._patience)

    def walk(self) -> Iterator[tuple[str, int]]:
        """See `Objects`."""
        raise RemoteError(f"{self.place}: a web server does not list what it holds")

    def _get(self, name: str, start: int, stop: int) -> Answer:
        if not self._is_plain:
            try:
                return super()._get(name, start, stop)
            except RequestError as failure:
                if not failure.is_plain:
                    raise
            self._is_plain = True
        answer, told = self._plain.get(name, start, stop), self._tells_whole
        if self._plain.sends_whole and not told:
            self._tells_whole = True
            log.warning(
                "%s sends whole objects where parts are asked for, which takes long for all but a "
                "copy: copy the store here first (mlsae store copy), or use a server that answers "
                "HTTP Range requests",
                self.place,
            )
        return answer

    def _counted_size(self, name: str) -> int:
        return self._patience.persist(
            f"{self.place}/{name} cannot be read", lambda: self._plain.size(name)
        )


class BucketObjects(RemoteObjects):
    """A store in an S3 bucket, or one to be. Each object appears whole or not at all.

    Credentials, region and endpoint come from the environment (`AWS_…`), then from the profile
    (`mlsae.store.places.credentials`), then from the machine's role.
    """

    def __init__(self, place: str, bucket: str, prefix: str, patience: Patience) -> None:
        self._bucket, self._prefix = bucket, prefix
        access = bucket_access(place)
        self._open = partial(
            S3Store,
            bucket,
            prefix=prefix or None,
            client_options=client_options(patience),
            **access,
        )
        try:
            client = self._open(retry_config={"max_retries": 0})
        except (BaseError, ValueError) as error:
            failure = understand(error, S3_CREDENTIALS)
            raise RemoteError(
                f"{place} cannot be opened: {failure.cause}; {failure.remedy}"
            ) from None
        endpoint = access.get("endpoint", f"https://{bucket}.s3.amazonaws.com")
        super().__init__(place, client, S3_CREDENTIALS, patience, endpoint)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process asks for itself, with credentials of its own environment."""
        return BucketObjects, (self.place, self._bucket, self._prefix, self._patience)

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
        if (relay := self._elsewhere()) is not None:
            relay.call("put" if isinstance(source, bytes) else "put_file", name, source)
            return

        def attempt() -> None:
            with self._requesting():
                obstore.put(
                    self._writer, name, source, chunk_size=_PART_BYTES, max_concurrency=_PARTS
                )

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

        if (relay := self._elsewhere()) is not None:
            yield from relay.call("listed")
            return

        def attempt() -> list[tuple[str, int]]:
            with self._requesting():
                pages = obstore.list(self._client, chunk_size=1000)
                return [(found["path"], found["size"]) for page in pages for found in page]

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
