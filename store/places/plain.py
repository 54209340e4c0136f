"""Objects of web servers whose answers the network library does not take.

HTTP allows an answer without its length, a part without the size of the whole, and the whole in
place of a part. Python's own client takes them all; one request at a time, it is slower.
"""

import re
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

from mlsae.store.places.failures import RequestError, understand_status

_PART = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_PIECE_BYTES = 2**16
_LAST = 2**62
"""Byte that no object has, for which a server puts the last one."""


@dataclass(frozen=True)
class Answer:
    """Bytes of an object as they come."""

    num_bytes: int | None
    """Bytes that will come; None where the server does not say."""
    total: int | None
    """Bytes of the whole object; None where the server does not say."""
    pieces: Generator[Any]
    """The bytes."""


@dataclass
class _Stream:
    """A whole object on its way, of which some bytes have been taken."""

    name: str
    position: int
    total: int | None
    response: HTTPResponse

    def __del__(self) -> None:
        self.response.close()


class PlainWeb:
    """Objects below a URL. Threads may share it.

    Args:
        url: URL, without a / at its end.
        headers: headers of every request; they are not sent to another address that one leads to.
        seconds: time without a byte after which a request has failed.
    """

    def __init__(self, url: str, headers: dict[str, str], seconds: float) -> None:
        self._url, self._headers, self._seconds = url, headers, seconds
        self._local = threading.local()
        self.sends_whole = False
        """True once the server has sent a whole object in place of a part."""

    def get(self, name: str, start: int, stop: int) -> Answer:
        """Ask for the bytes start … stop − 1 of an object, at least one.

        Where the server sends the whole instead, the bytes before are passed by, and those behind
        are left for the next call of the same thread, which may go on with them.

        Raises:
            RequestError: the request failed.
            FileNotFoundError: there is no such object.
        """
        stream: _Stream | None = getattr(self._local, "stream", None)
        if stream is None or stream.name != name or stream.position != start:
            self._local.stream = None
            response = self._open(name, f"bytes={start}-{stop - 1}")
            if response.status == 206:
                return _part(response, start, stop)
            self.sends_whole = True
            stream = _Stream(name, 0, _length(response), response)
        total = stream.total
        if total is not None and start > 0 and start >= total:
            raise RequestError("the object ends before", is_past_end=True)
        num_bytes = None if total is None else min(stop, total) - start
        return Answer(num_bytes, total, self._take(stream, start, stop))

    def size(self, name: str) -> int:
        """Bytes of an object, counted where the server does not say.

        Raises:
            RequestError, FileNotFoundError: as `get`.
        """
        # A part that goes to the end, whose place says where that is.
        with self._open(name, f"bytes=0-{_LAST}") as response:
            if found := _PART.fullmatch(response.headers.get("Content-Range", "")):
                return int(found[2]) + 1
            length = _length(response)
            if length is not None:
                return length
            return sum(len(piece) for piece in _pieces(response, None))

    def _take(self, stream: _Stream, start: int, stop: int) -> Generator[bytes]:
        for _ in _pieces(stream.response, start - stream.position):
            pass
        stream.position = start
        for piece in _pieces(stream.response, stop - start):
            stream.position += len(piece)
            yield piece
        self._local.stream = stream

    def _open(self, name: str, part: str) -> HTTPResponse:
        headers = {"Accept-Encoding": "identity", "Range": part}
        request = Request(f"{self._url}/{quote(name)}", headers=headers)
        for key, value in self._headers.items():
            request.add_unredirected_header(key, value)
        try:
            response: HTTPResponse = urlopen(request, timeout=self._seconds)
        except HTTPError as error:
            with error:
                if error.code == 404:
                    raise FileNotFoundError(name) from None
                body = error.read(2**14).decode(errors="replace")
            status = f"{error.code} {error.reason}"
            raise understand_status(status, body, "check the address") from None
        except (URLError, HTTPException, OSError) as error:
            raise _failed(error) from None
        return response


def _part(response: HTTPResponse, start: int, stop: int) -> Answer:
    found = _PART.fullmatch(response.headers.get("Content-Range", ""))
    if found is None or int(found[1]) != start or int(found[2]) >= stop:
        response.close()
        raise RequestError(
            "the server sent another part than it was asked for",
            remedy="check the address and the server",
        )
    num_bytes = int(found[2]) + 1 - start
    total = None if found[3] == "*" else int(found[3])

    def pieces() -> Generator[bytes]:
        with response:
            yield from _pieces(response, num_bytes)

    return Answer(num_bytes, total, pieces())


def _pieces(response: HTTPResponse, most: int | None) -> Iterator[bytes]:
    """At most so many bytes of an answer, piece by piece."""
    try:
        while most is None or most > 0:
            piece = response.read(_PIECE_BYTES if most is None else min(most, _PIECE_BYTES))
            if not piece:
                return
            most = None if most is None else most - len(piece)
            yield piece
    except (HTTPException, OSError) as error:
        raise _failed(error) from None


def _length(response: HTTPResponse) -> int | None:
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _failed(error: Exception) -> RequestError:
    reason = getattr(error, "reason", None) or error
    return RequestError(str(reason) or type(error).__name__, passes=True)
