"""Fixtures of this room: places on the loopback that hold the same objects."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from mlsae.store.places.remote import open_objects
from mlsae.store.places.retry import Patience


class Located(NamedTuple):
    """Objects of `content` in some place."""

    location: str
    """Location that opens the objects."""
    faults: Any
    """`Faults` of the server that the bytes come from; see tests/servers.py."""
    prefix: str
    """Beginning of every name in `faults`."""


@pytest.fixture(scope="session")
def content() -> dict[str, bytes]:
    """Name → bytes of the objects that every place holds."""
    return {
        "plan.json": b'{"a": 1}\n',
        "empty": b"",
        "activations/resid_post/0/c.0.0": np.random.default_rng(0).bytes(300_000),
        "moments/00000.safetensors": np.random.default_rng(1).bytes(5000),
    }


@pytest.fixture
def write_content(content: dict[str, bytes]) -> Callable[[Path], Path]:
    """Put them into a directory."""

    def write(directory: Path) -> Path:
        for name, data in content.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(data)
        return directory

    return write


@pytest.fixture
def web(servers: Any, write_content: Callable[[Path], Path], tmp_path: Path) -> Iterator[Any]:
    """A web server that holds them under /store."""
    write_content(tmp_path / "served" / "store")
    with servers.serving_files(tmp_path / "served") as web:
        yield web


@pytest.fixture
def s3(
    servers: Any,
    write_content: Callable[[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Any]:
    """An S3 server that holds them under s3://bucket/a b/store, and its environment."""
    with servers.serving_bucket() as s3:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        for name, value in s3.environment().items():
            monkeypatch.setenv(name, value)
        s3.upload(write_content(tmp_path / "uploaded"), "a b/store")
        yield s3


@pytest.fixture
def hub(
    servers: Any,
    write_content: Callable[[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Any]:
    """A hub that holds them under `v 1` of the data set someone/acts, and its environment."""
    write_content(tmp_path / "hub/datasets/someone/acts/v 1")
    with servers.serving_hub(tmp_path / "hub") as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.hub.url)
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield hub


@pytest.fixture
def locate(request: pytest.FixtureRequest) -> Callable[[str], Located]:
    """Where they are of the kind web, s3 or hub."""

    def find(kind: str) -> Located:
        server = request.getfixturevalue(kind)
        if kind == "web":
            return Located(f"{server.url}/store", server.faults, "store/")
        if kind == "s3":
            return Located("s3://bucket/a b/store", server.faults, "bucket/a b/store/")
        prefix = "datasets/someone/acts/v 1/"
        return Located("hf://datasets/someone/acts/v 1", server.files.faults, prefix)

    return find


@pytest.fixture
def quick() -> Patience:
    """Waits that a test has time for."""
    return Patience(first_wait=0.005)


@pytest.fixture
def open_quickly(quick: Patience) -> Callable[..., Any]:
    """`open_objects` with `quick` and without a cache, unless said otherwise."""

    def open_it(location: str, **options: Any) -> Any:
        return open_objects(location, **{"cache_bytes": 0, "patience": quick, **options})

    return open_it
