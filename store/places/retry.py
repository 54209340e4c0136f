"""Limits on trying a request again that failed."""

import logging
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit
from urllib.request import proxy_bypass

from mlsae.base.errors import without_secrets
from mlsae.store.errors import RemoteError
from mlsae.store.places.failures import RequestError

T = TypeVar("T")
log = logging.getLogger("mlsae")

_PROGRESS_BYTES = 2**16
"""A try that brought as many bytes was no failure: tries are counted anew after it."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Limits on how often and how long a request is tried."""

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


def proxy_for(address: str) -> str:
    """Remark that requests to a URL go through a proxy; empty where they do not."""
    url = urlsplit(address)
    host = url.hostname or ""
    for name in (f"{url.scheme}_proxy", "all_proxy"):
        for variable in (name, name.upper()):
            proxy = os.environ.get(variable)
            if proxy and not proxy_bypass(host):
                proxy = proxy if "://" in proxy else proxy.rpartition("@")[2]
                return (
                    f" (through the proxy {without_secrets(proxy)} of {variable}; NO_PROXY={host} "
                    f"goes round it)"
                )
    return ""


def _message(what: str, failure: RequestError, tries: int, elapsed: float) -> str:
    if not failure.passes:
        return f"{what}: {failure.cause}; {failure.remedy}"
    often = f" ({tries} tries in {elapsed:.0f} s)" if tries > 1 else ""
    return (
        f"{what}: {failure.cause}{often}; nothing was lost: check the address and the network, "
        f"then run the same command again"
    )
