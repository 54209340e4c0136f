"""Fixtures that several rooms share."""

import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mlsae.store import SPECIAL, create

# Tests work on tiny tensors and start processes side by side: more threads only get in the way.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest comes first: begun last, it would keep one worker alone busy."""
    items.sort(
        key=lambda item: item.path.name != "test_docs.py" or item.path.parent.name != "house"
    )


@dataclass(frozen=True)
class Sample:
    """A store made without a transformer, and the arrays that went into it."""

    path: Path
    tokens: npt.NDArray[Any]
    documents: npt.NDArray[Any]
    token_flags: npt.NDArray[np.uint8]
    activations: dict[int, npt.NDArray[np.float32]]
    """Layer → (num_tokens, d_model) float32, before encoding."""


def make_sample(
    path: Path,
    *,
    num_sequences: int = 37,
    context_length: int = 24,
    layers: tuple[int, ...] = (0, 1, 3),
    d_model: int = 20,
    encoding: str = "float16",
    batch_sequences: int = 4,
    shard_bytes: int = 8000,
    seed: int = 0,
    **options: Any,
) -> Sample:
    """A store of random activations whose first position is an outlier and that has separators."""
    generator = np.random.default_rng(seed)
    num_tokens = num_sequences * context_length
    tokens = generator.integers(0, 100, num_tokens)
    flags = np.where(tokens < 5, SPECIAL, 0).astype(np.uint8)
    documents = np.cumsum(tokens < 5)
    position = np.arange(num_tokens) % context_length
    activations = {}
    stream = generator.normal(size=(num_tokens, d_model))
    for layer in layers:
        stream = stream + 0.5 * generator.normal(size=stream.shape) + 0.3 * np.arange(d_model)
        values = stream * np.where(position == 0, 30.0, 1.0)[:, None]
        activations[layer] = values.astype(np.float32)
    with create(
        path,
        tokens=tokens,
        context_length=context_length,
        layers=layers,
        d_model=d_model,
        documents=documents,
        token_flags=flags,
        encoding=encoding,
        batch_sequences=batch_sequences,
        shard_bytes=shard_bytes,
        **options,
    ) as writer:
        step = batch_sequences * context_length
        for start in range(0, num_tokens, step):
            writer.append(
                {("resid_post", i): x[start : start + step] for i, x in activations.items()}
            )
    return Sample(path, tokens, documents, flags, activations)


@pytest.fixture(scope="session")
def copied_sample(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Sample]:
    """`make_sample`, which makes equal samples once and copies them."""
    directory = tmp_path_factory.mktemp("samples")
    made: dict[bytes, bytes] = {}

    def copy(path: Path, **options: Any) -> Sample:
        key = pickle.dumps(sorted(options.items()))
        if key not in made:
            made[key] = pickle.dumps(make_sample(directory / str(len(made)), **options))
        first: Sample = pickle.loads(made[key])
        shutil.copytree(first.path, path)
        return replace(first, path=path)

    return copy


@pytest.fixture
def sample(tmp_path: Path, copied_sample: Callable[..., Sample]) -> Sample:
    """A small complete float16 store of several shards."""
    return copied_sample(tmp_path / "acts")


@pytest.fixture
def sample_maker(tmp_path: Path, copied_sample: Callable[..., Sample]) -> Callable[..., Sample]:
    """Make a store below the test's directory: `sample_maker("name", encoding="float32")`."""

    def make(name: str = "acts", **options: Any) -> Sample:
        return copied_sample(tmp_path / name, **options)

    return make


@pytest.fixture(autouse=True, scope="session")
def _no_curves() -> Iterator[None]:
    """Drawing the curves of a tiny run takes longer than the run; `curves` has them drawn."""
    from mlsae.train import pipeline

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "draw_curves", lambda *given: given[-1].touch())
        yield


@pytest.fixture(scope="session")
def drawing_curves() -> Callable[[], AbstractContextManager[None]]:
    """Runs draw their curves within it, as they do outside of tests."""
    from mlsae.train import pipeline
    from mlsae.train.running.log import draw_curves

    @contextmanager
    def drawing() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "draw_curves", draw_curves)
            yield

    return drawing


@pytest.fixture
def curves(drawing_curves: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Runs of this test draw their curves."""
    with drawing_curves():
        yield


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The trained transformer that comes with the package."""
    from mlsae.demo import model_path

    return model_path()


def beside(name: str) -> Any:
    """A file of this directory as a module; the tests are no package."""
    spec = spec_from_file_location(f"beside_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def servers() -> Any:
    """tests/servers.py."""
    return beside("servers")


@pytest.fixture(scope="session")
def forking() -> Any:
    """tests/forking.py."""
    return beside("forking")


@pytest.fixture
def serve(
    servers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str, Path], str]]:
    """Put a store on a server of its own: `serve("web", path)`, or "s3" or "hub", gives its URL."""
    with ExitStack() as running:

        def start(kind: str, store: Path) -> str:
            if kind == "web":
                web = running.enter_context(servers.serving_files(store.parent))
                return f"{web.url}/{store.name}"
            if kind == "s3":
                s3 = running.enter_context(servers.serving_bucket())
                for name in [name for name in os.environ if name.startswith("AWS_")]:
                    monkeypatch.delenv(name)
                for name, value in s3.environment().items():
                    monkeypatch.setenv(name, value)
                s3.upload(store, store.name)
                return f"s3://bucket/{store.name}"
            shutil.copytree(store, tmp_path / f"hub/datasets/someone/{store.name}")
            hub = running.enter_context(servers.serving_hub(tmp_path / "hub"))
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.hub.url)
            monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
            return f"hf://datasets/someone/{store.name}"

        yield start
