"""A small transformer, its store, SAEs that fit it, and an independent dense SAE in float64."""

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
import transformers

from mlsae.analyze import Analysis, AnalyzeConfig
from mlsae.analyze import run as run_analyze
from mlsae.analyze.results.columns import LATENT_LAYERS, LATENTS
from mlsae.harvest import HarvestConfig
from mlsae.harvest import run as run_harvest
from mlsae.models import load
from mlsae.models.capture import capture
from mlsae.models.inputs import Inputs
from mlsae.sae import SAE, SAEConfig, TopK
from mlsae.store import PADDING, SPECIAL, Store, create, open_store

Float = npt.NDArray[np.float64]
LAYERS = (0, 1, 3)
LENGTH = 24
NUM_SEQUENCES = 37


@dataclass(frozen=True)
class World:
    """A transformer with random weights and the store of its activations."""

    model: Path
    store: Path
    tokens: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int64]
    flags: npt.NDArray[np.uint8]
    activations: dict[int, npt.NDArray[np.float32]]
    """Layer → (num_tokens, 16), as they lie in the store, decoded."""


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A GPT-NeoX of four layers, of which three are stored in float16, with separators."""
    root = tmp_path_factory.mktemp("world")
    config = transformers.GPTNeoXConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.4,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.GPTNeoXForCausalLM(config).save_pretrained(root / "model")
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, 60, NUM_SEQUENCES * LENGTH)
    tokens[generator.random(len(tokens)) < 0.05] = 0
    documents = np.cumsum(tokens == 0)
    flags = np.where(tokens == 0, SPECIAL, 0).astype(np.uint8)
    flags[-5:] = PADDING
    write_store(root / "acts", root / "model", tokens, documents, flags)
    store = open_store(root / "acts")
    activations = {n: store.read("resid_post", n) for n in LAYERS}
    return World(root / "model", root / "acts", tokens, documents, flags, activations)


def write_store(
    path: Path,
    model: Path,
    tokens: npt.NDArray[np.int64],
    documents: npt.NDArray[np.int64],
    flags: npt.NDArray[np.uint8],
) -> None:
    """Harvest four sequences at a time."""
    transformer = load(model)
    with create(
        path,
        tokens=tokens,
        context_length=LENGTH,
        layers=LAYERS,
        d_model=16,
        documents=documents,
        token_flags=flags,
        batch_sequences=4,
        shard_bytes=8000,
        source={"model": transformer.describe()},
        provenance={"model": transformer.place()},
    ) as writer:
        for batch in torch.from_numpy(tokens.reshape(-1, LENGTH)).split(4):
            hidden = capture(transformer, Inputs(tokens=batch), LAYERS)
            writer.append({key: x.reshape(-1, 16).numpy() for key, x in hidden.items()})


@pytest.fixture(scope="session")
def harvested(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A float32 store of 20 sequences of 24 tokens of short documents, layers 0 and 2.

    `harvested(init="control")`: any setting of a harvest may be another.
    """
    text = tmp_path_factory.mktemp("text") / "text.jsonl"
    words = ["for", "value", "in", "range(10)", ":", "return", "self", "class", "import", "not"]
    generator = np.random.default_rng(0)
    documents = [" ".join(generator.choice(words, generator.integers(1, 20))) for _ in range(80)]
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))

    def make(**changes: Any) -> Path:
        settings: dict[str, Any] = {
            "model": str(demo_model),
            "dataset": str(text),
            "out": tmp_path_factory.mktemp("harvested") / "acts",
            "max_tokens": 20 * LENGTH,
            "context_length": LENGTH,
            "layers": (0, 2),
            "encoding": "float32",
            "batch_size": 3,
            "shard_size": 20_000,
            "device": "cpu",
        }
        run_harvest(HarvestConfig(**settings | changes))
        return Path(settings["out"])

    return make


@pytest.fixture(scope="session")
def sae_maker(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save an untrained SAE for a store: `sae_maker(store_path, k=3, skip_positions=0)`."""

    def make(
        store_path: Path,
        *,
        num_latents: int = 48,
        k: int = 4,
        seed: int = 0,
        d_in: int | None = None,
        **record: Any,
    ) -> Path:
        store = open_store(store_path)
        config = SAEConfig(
            d_in=d_in or store.d_model, num_latents=num_latents, architecture=TopK(k)
        )
        generator = torch.Generator().manual_seed(seed)
        sae = SAE(config, generator)
        with torch.no_grad():
            sae.b.copy_(0.1 * torch.randn(config.d_in, generator=generator))
        directory = tmp_path_factory.mktemp("sae")
        sae.save(directory, training_record(store) | record)
        return directory

    return make


@dataclass(frozen=True)
class Drawn:
    """An analysis with every figure, and the lines that it printed."""

    analysis: Analysis
    printed: str


@pytest.fixture(scope="session")
def drawn(
    world: World, sae_maker: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Drawn:
    """The world and an SAE analyzed with default settings; not to be changed."""
    out = tmp_path_factory.mktemp("drawn") / "deep" / "out"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        analysis = run_analyze(
            AnalyzeConfig(cache=world.store, sae=sae_maker(world.store), out=out)
        )
    return Drawn(analysis, printed.getvalue())


def training_record(store: Store) -> dict[str, Any]:
    """Training's record of a store, as far as an analysis asks for it."""
    return {
        "store_id": store.store_id,
        "plan_id": store.plan_id,
        "stores": [{"store_id": store.store_id, "tokens_sha256": store.plan.tokens_sha256}],
        "model_fingerprint": store.source.get("model", {}).get("fingerprint"),
        "site": "resid_post",
        "layers": list(store.layers),
        "skip_positions": 1,
        "validation": {
            "fraction": 0.2,
            "seed": 3,
            "num_sequences": store.num_sequences,
        },
    }


@dataclass(frozen=True)
class DenseSAE:
    """An SAE by its definition: dense, in float64, of its weights alone."""

    sae: SAE

    def latents(self, x: Float) -> Float:
        """Every latent of every row, (rows, num_latents)."""
        u, _, _ = self._standardized(x)
        w_enc, b = self._weights("W_enc")
        pre = (u - b) @ w_enc.T
        chosen = np.argsort(-pre, axis=1)[:, : self.sae.architecture.most_active]
        latents = np.zeros_like(pre)
        np.put_along_axis(latents, chosen, np.take_along_axis(pre, chosen, axis=1), axis=1)
        return np.maximum(latents, 0)

    def reconstruction(self, x: Float) -> Float:
        """x̂ of every row."""
        _, mean, std = self._standardized(x)
        w_dec, b = self._weights("W_dec")
        return np.asarray((self.latents(x) @ w_dec + b) * std + mean)

    def _weights(self, name: str) -> tuple[Float, Float]:
        w, b = (p.detach().double().numpy() for p in (getattr(self.sae, name), self.sae.b))
        return w, b

    def _standardized(self, x: Float) -> tuple[Float, Float, Float]:
        mean, std = x.mean(axis=1, keepdims=True), x.std(axis=1, ddof=1, keepdims=True)
        return (x - mean) / (std + 1e-5), mean, std


@pytest.fixture(scope="session")
def dense() -> Callable[[SAE], DenseSAE]:
    """`DenseSAE`, for tests, which cannot import this file."""
    return DenseSAE


@pytest.fixture(scope="session", name="training_record")
def training_record_() -> Callable[[Store], dict[str, Any]]:
    """`training_record`, for tests, which cannot import this file."""
    return training_record


@pytest.fixture(scope="session")
def random_tables() -> Callable[[int, int], tuple[pa.Table, pa.Table]]:
    """Tables `latents` and `latent_layers` of random numbers, of (num_latents, num_layers)."""
    return _random_tables


def _random_tables(num_latents: int, num_layers: int) -> tuple[pa.Table, pa.Table]:
    """`latents` and `latent_layers`, of random numbers."""
    generator = np.random.default_rng(0)
    counts = generator.integers(0, 10**6, (num_latents, num_layers))
    counts[::17] = 0
    prob = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    index = np.arange(num_latents)
    latents = {
        column.name: pa.array(generator.random(num_latents) * 10, column.type, safe=False)
        for column in LATENTS
        if column.name not in {"latent", "count", "dead"}
    }
    latents |= {
        "latent": pa.array(index, pa.int32()),
        "count": pa.array(counts.sum(axis=1)),
        "dead": pa.array(counts.sum(axis=1) == 0),
    }
    layers = {
        "latent": pa.array(np.repeat(index, num_layers), pa.int32()),
        "layer": pa.array(np.tile(np.arange(num_layers), num_latents), pa.int32()),
        "count": pa.array(counts.ravel()),
        "prob": pa.array(prob.ravel()),
    }
    for column in LATENT_LAYERS:
        layers.setdefault(column.name, pa.nulls(num_latents * num_layers, column.type))
    return pa.table(latents), pa.table(layers)
