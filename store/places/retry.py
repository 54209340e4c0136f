"""Tries of a request: meaning of a failure, and limits on trying again."""

import logging
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from mlsae.store.errors import RemoteError

T = TypeVar("T")
log = logging.getLogger("mlsae")

_PROGRESS_BYTES = 2**16
"""A try that brought as many bytes was no failure: tries are counted anew after it."""


class RequestError(Exception):
    """A request that failed.

    Args:
        cause: the event, as a clause: `it answered 503 Service Unavailable`.
        passes: a second try may well succeed later.
        is_busy: the server asked for fewer requests.
        is_past_end: the object has none of the bytes asked for.
        remedy: advice to the user, other than to try again.
    """

    def __init__(
        self,
        cause: str,
        *,
        passes: bool = False,
        is_busy: bool = False,
        is_past_end: bool = False,
        remedy: str = "",
    ) -> None:
        super().__init__(cause)
        self.cause = cause
        self.passes = passes
        self.is_busy = is_busy
        self.is_past_end = is_past_end
        self.remedy = remedy


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Limits on the number and the time of tries of a request."""

    tries: int = 6
    """Tries in a row that may bring nothing."""
    seconds: float = 60.0
    """Time in a row that may bring nothing."""
    first_wait: float = 0.5
    """Seconds before the second try; twice as many before each that follows."""
    longest_wait: float = 30.0
    """Most seconds between two tries."""
    stall_seconds: float = 20.0
    """Time without a byte after which one try has failed."""
    busy_seconds: float = 600.0
    """Time in a row that a server may ask for fewer requests; hubs count them in windows of
    minutes."""

    def persist(
        self, what: str, attempt: Callable[[], T], progress: Callable[[], int] = lambda: 0
    ) -> T:
        """The result of `attempt`, which is called again while it fails and that may pass.

        Args:
            what: names the request in the message: `https://…/plan.json cannot be read`.
            attempt: raises RequestError where it fails.
            progress: bytes that all attempts so far have brought.

        Raises:
            RemoteError: the last failure, in one line.
        """
        tries, wait, start = 0, self.first_wait, time.monotonic()
        was_busy = False
        while True:
            before = progress()
            try:
                return attempt()
            except RequestError as error:
                failure = error
            if progress() - before >= _PROGRESS_BYTES:
                tries, wait, start = 0, self.first_wait, time.monotonic()
            tries += 1
            elapsed = time.monotonic() - start
            is_over = (
                elapsed >= self.busy_seconds
                if failure.is_busy
                else tries >= self.tries or elapsed >= self.seconds
            )
            if is_over or not failure.passes:
                raise RemoteError(_message(what, failure, tries, elapsed)) from None
            if failure.is_busy and not was_busy:
                log.warning("%s for now: %s; waiting", what, failure.cause)
            was_busy = was_busy or failure.is_busy
            # Half of it at random, so that readers that failed together do not return together.
            time.sleep(wait * random.uniform(0.5, 1.0))
            wait = min(2 * wait, self.longest_wait)


def _message(what: str, failure: RequestError, tries: int, elapsed: float) -> str:
    if not failure.passes:
        return f"{what}: {failure.cause}; {failure.remedy}"
    often = f" ({tries} tries in {elapsed:.0f} s)" if tries > 1 else ""
    return (
        f"{what}: {failure.cause}{often}; nothing was lost: check the address and the network, "
        f"then run the same command again"
    )


_STATUS = re.compile(r"status code: (\d{3}[^:\n]*)(?::\s*(.*?))?(?:\n\nDebug source|$)", re.S)
_DETAIL = re.compile(r'(?:message|error): "([^"]+)"')
_XML = re.compile(r"<(Code|Message)>([^<]*)</")
_KIND = re.compile(r"kind: (Connect|Request|Timeout|Interrupted|Decode|Unknown)\b")


def understand(error: Exception, credentials: str) -> RequestError:
    """Translate an error of the network library, whose classes tell only a few failures apart.

    Args:
        error: a BaseError of obstore.
        credentials: remedy where credentials are missing or refused.
    """
    text = str(error)
    # The library asks for the machine's role last.
    if "/latest/api/token" in text or "/latest/meta-data/" in text:
        return RequestError("no credentials were found", remedy=credentials)
    if status := _STATUS.search(text):
        return _understand_status(status[1].strip(), status[2] or "", credentials)
    if "incorrectly configured region" in text:
        return RequestError("the bucket is in another region", remedy="set AWS_REGION")
    if "Range request not supported" in text:
        return RequestError(
            "the server sends whole objects, or a page in their place, where a part is asked for",
            remedy="use a server that answers HTTP Range requests, or copy the store here",
        )
    if kind := _KIND.search(text):
        if "TooManyRedirects" in text:
            return RequestError("its redirects do not end", remedy="check the address")
        causes = {"Timeout": "no answer in time", "Interrupted": "the connection was cut"}
        details = _DETAIL.findall(text)
        detail = details[-1] if details else text.split("\n")[0]
        return RequestError(causes.get(kind[1], _brief(detail)), passes=True)
    return RequestError(_brief(text.split("\n")[0]), remedy="check the address and the server")


def _understand_status(status: str, body: str, credentials: str) -> RequestError:
    number = int(status[:3])
    told = dict(_XML.findall(body))
    detail = f" ({_brief(told.get('Message') or told['Code'])})" if told else ""
    cause = f"the server answered {status}{detail}"
    if number in (401, 403) or told.get("Code") in ("ExpiredToken", "InvalidToken"):
        return RequestError(cause, remedy=credentials)
    if told.get("Code") == "NoSuchBucket":
        return RequestError("there is no such bucket", remedy="check its name, or create it first")
    if told.get("Code") == "AuthorizationHeaderMalformed":
        return RequestError(cause, remedy="set AWS_REGION")
    return RequestError(
        cause,
        passes=number in (408, 425, 429) or number >= 500,
        is_busy=number == 429,
        is_past_end=number == 416,
        remedy="check the address and the server",
    )


def _brief(text: str) -> str:
    text = re.sub(r"^Generic \w+ error: ", "", text)
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= 160 else f"{line[:159]}…"
