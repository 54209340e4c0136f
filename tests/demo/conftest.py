"""The shipped model as plain arrays, and a forward pass of its own that shares no code with it."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from mlsae.demo import model_path, text_path

Array = npt.NDArray[Any]

STEPS = 4096


@cache
def _normal_cdf() -> tuple[Array, Array]:
    """Φ at −9, −9 + 1/STEPS, …, 9, and its differences.

    Between those places a straight line is off by less than 2e-9.
    """
    grid = np.arange(-9 * STEPS, 9 * STEPS + 1) / STEPS
    phi = np.array([0.5 * (1 + math.erf(x / math.sqrt(2))) for x in grid])
    return phi, np.diff(phi)


def _gelu(x: Array) -> Array:
    """x Φ(x), by the table."""
    phi, slope = _normal_cdf()
    at = np.clip(x, -8.9, 8.9)
    at += 9
    at *= STEPS
    i = at.astype(np.int64)
    at -= i
    at *= slope.take(i)
    at += phi.take(i)
    at *= x
    return np.asarray(at)


def _layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return np.asarray(scaled * weight + bias)


@dataclass(frozen=True)
class NumpyNeoX:
    """GPT-NeoX in float64 numpy, from its paper: rotary embedding, parallel residual."""

    config: dict[str, Any]
    weights: dict[str, Array]

    def nats(self, ids_BT: Array) -> Array:
        """Negative log-likelihood of every token but the first of each sequence, (B, T - 1)."""
        eps = self.config["layer_norm_eps"]
        w = self.weights
        x = w["gpt_neox.embed_in.weight"][ids_BT]
        for layer in range(self.config["num_hidden_layers"]):
            name = f"gpt_neox.layers.{layer}."
            block = {key.removeprefix(name): w[key] for key in w if key.startswith(name)}
            attended = self._attention(x, block, eps)
            normed = _layer_norm(
                x,
                block["post_attention_layernorm.weight"],
                block["post_attention_layernorm.bias"],
                eps,
            )
            hidden = _gelu(_linear(normed, block, "mlp.dense_h_to_4h"))
            x = x + attended + _linear(hidden, block, "mlp.dense_4h_to_h")
        x = _layer_norm(
            x, w["gpt_neox.final_layer_norm.weight"], w["gpt_neox.final_layer_norm.bias"], eps
        )
        logits = x[:, :-1] @ w["embed_out.weight"].T
        target = np.take_along_axis(logits, ids_BT[:, 1:, None], -1)[..., 0]
        largest = logits.max(-1, keepdims=True)
        logits -= largest
        np.exp(logits, out=logits)
        return np.asarray(np.log(logits.sum(-1)) + largest[..., 0] - target)

    def _attention(self, x: Array, block: dict[str, Array], eps: float) -> Array:
        B, T, D = x.shape
        heads = self.config["num_attention_heads"]
        size = D // heads
        normed = _layer_norm(x, block["input_layernorm.weight"], block["input_layernorm.bias"], eps)
        fused = _linear(normed, block, "attention.query_key_value").reshape(B, T, heads, 3 * size)
        q, k, v = (fused[..., i * size : (i + 1) * size].swapaxes(1, 2) for i in range(3))
        q, k, mixed = self._rotate(q) / math.sqrt(size), self._rotate(k), np.empty_like(v)
        # A few queries at a time need no more keys than those before the last of them.
        for first in range(0, T, 32):
            end = min(first + 32, T)
            weights = q[..., first:end, :] @ k[..., :end, :].swapaxes(-1, -2)
            weights += np.triu(np.full((end - first, end), -np.inf), first + 1)
            weights -= weights.max(-1, keepdims=True)
            np.exp(weights, out=weights)
            mixed[..., first:end, :] = weights @ v[..., :end, :] / weights.sum(-1, keepdims=True)
        return _linear(mixed.swapaxes(1, 2).reshape(B, T, D), block, "attention.dense")

    def _rotate(self, x: Array) -> Array:
        rope = self.config["rope_parameters"]
        rotary = int(x.shape[-1] * rope["partial_rotary_factor"])
        half = rotary // 2
        rate = rope["rope_theta"] ** (-2 * np.arange(half) / rotary)
        angle = np.arange(x.shape[-2])[:, None] * rate
        a, b, rest = x[..., :half], x[..., half:rotary], x[..., rotary:]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)


def _linear(x: Array, block: dict[str, Array], name: str) -> Array:
    return np.asarray(x @ block[f"{name}.weight"].T + block[f"{name}.bias"])


@pytest.fixture(scope="session")
def numpy_model() -> NumpyNeoX:
    """The shipped weights, read and run without torch or transformers."""
    weights = load_file(model_path() / "model.safetensors")
    return NumpyNeoX(
        json.loads((model_path() / "config.json").read_text()),
        {name: tensor.astype(np.float64) for name, tensor in weights.items()},
    )


@pytest.fixture(scope="session")
def training() -> dict[str, Any]:
    """The package's record of the model's training."""
    record: dict[str, Any] = json.loads((model_path() / "training.json").read_text())
    return record


def read_lines(path: Path) -> list[dict[str, str]]:
    """The lines of one part of the shipped text."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def lines() -> Callable[[str], list[dict[str, str]]]:
    """Read a part of the shipped text by the name of its file."""
    return lambda name: read_lines(text_path() / name)


@pytest.fixture(scope="session")
def packed() -> dict[str, Array]:
    """Both parts as sequences of 256 tokens, EOS (id 0) after each module; whole sequences only."""
    tokenizer = Tokenizer.from_file(str(model_path() / "tokenizer.json"))
    sequences = {}
    for name in ("train.jsonl", "held_out.jsonl"):
        ids: list[int] = []
        for line in read_lines(text_path() / name):
            ids += [*tokenizer.encode(line["text"]).ids, 0]
        sequences[name] = np.array(ids[: len(ids) // 256 * 256]).reshape(-1, 256)
    return sequences
