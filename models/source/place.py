"""Place of a model: a directory of this machine or the hub."""

import json
import socket
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import constants as hub
from huggingface_hub import try_to_load_from_cache
from transformers.utils.peft_utils import find_adapter_config_file

from mlsae.base.errors import InputError
from mlsae.base.files import local_path

_PATIENCE = 3.0  # seconds for each of the server's addresses


@dataclass(frozen=True)
class Place:
    """Place of a model: a directory of this machine, or a repository of the hub."""

    name: str
    """Hub id, or the absolute path of a local directory."""
    revision: str | None
    """Branch, tag or commit of a hub model; None for a local directory."""
    is_directory: bool
    """True for a local directory."""
    is_offline: bool = False
    """True where the hub cannot be reached, and only its cache on this machine can be asked."""

    @classmethod
    def of(cls, name_or_path: str | Path, revision: str | None) -> "Place":
        """Take a directory where there is one of that name, else the hub.

        Raises:
            InputError: the text can only be a path, and there is no such directory.
        """
        text = str(name_or_path)
        path = local_path(text)
        if path.is_dir():
            return cls(str(path.resolve()), None, True)
        if path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
            raise InputError(f"there is no model directory {text}; give another path or a hub id")
        return cls(text, revision, False, hub.HF_HUB_OFFLINE or not is_reachable(hub.ENDPOINT))

    def folder(self) -> Path | None:
        """Directory of the files on this machine, once the config has been read."""
        if self.is_directory:
            return Path(self.name)
        config = try_to_load_from_cache(self.name, "config.json", revision=self.revision)
        return Path(config).parent if isinstance(config, str) else None

    def adapter(self) -> dict[str, Any] | None:
        """Config of an adapter of PEFT that lies there; None where there is none."""
        found = find_adapter_config_file(
            self.name, revision=self.revision, local_files_only=self.is_offline
        )
        if found is None:
            return None
        content: dict[str, Any] = json.loads(Path(found).read_text())
        return content

    def pinned(self) -> "Place":
        """Pin this place to the commit of its config, which has just been read.

        Later reads are then of the same commit, even if its branch has moved meanwhile.
        """
        if self.is_directory:
            return self
        folder = self.folder()
        return self if folder is None else replace(self, revision=folder.name)


@cache
def is_reachable(endpoint: str) -> bool:
    """True if a web server takes connections; asked once and answered within seconds.

    The hub's own library tries for half a minute, but behind a proxy the answer is left to it.

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
