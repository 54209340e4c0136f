"""Where a model is looked for: a directory of this machine or the hub."""

import socket
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import constants as hub
from huggingface_hub import try_to_load_from_cache

from mlsae.base.errors import InputError

_PATIENCE = 3.0  # seconds for each of the server's addresses


@dataclass(frozen=True)
class Place:
    """Where a model is looked for."""

    name: str
    """Hub id, or the absolute path of a local directory."""
    revision: str | None
    """Branch, tag or commit of a hub model; None for a local directory."""
    is_directory: bool
    """Whether it is a local directory."""
    is_offline: bool = False
    """Whether the hub cannot be reached, so that only its cache on this machine can be asked."""

    @classmethod
    def of(cls, name_or_path: str | Path, revision: str | None) -> "Place":
        """A directory where there is one of that name, else the hub.

        Raises:
            InputError: what can only be a path is no directory.
        """
        text = str(name_or_path)
        path = Path(text).expanduser()
        if path.is_dir():
            return cls(str(path.resolve()), None, True)
        if path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
            raise InputError(f"there is no model directory {text}; give another path or a hub id")
        return cls(text, revision, False, hub.HF_HUB_OFFLINE or not is_reachable(hub.ENDPOINT))

    def pinned(self) -> "Place":
        """This place at the commit that its config, just read, is of.

        What is read next is then of the same commit, whatever its branch has become meanwhile.
        """
        if self.is_directory:
            return self
        config = try_to_load_from_cache(self.name, "config.json", revision=self.revision)
        return replace(self, revision=Path(config).parent.name) if isinstance(config, str) else self


@cache
def is_reachable(endpoint: str) -> bool:
    """Whether a web server takes connections, asked once and answered within seconds.

    The hub's own library tries again and again for half a minute before it says so. Behind a
    proxy the answer is left to it.

    Args:
        endpoint: a URL, such as `https://huggingface.co`.
    """
    url = urlsplit(endpoint)
    if url.hostname is None or (url.scheme in getproxies() and not proxy_bypass(url.hostname)):
        return True
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((url.hostname, port), timeout=_PATIENCE).close()
    except OSError:
        return False
    return True
