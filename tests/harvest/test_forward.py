"""One batch: padded to full shape, cast on the device, refused where it cannot be stored."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mlsae.base.errors import InputError, ResourceError
from mlsae.harvest.forward import (
    _batch_size_explained,
    choose_encoding,
    preflight,
    stored_activations,
)
from mlsae.models import Transformer, load
from mlsae.store import ActivationError
from mlsae.store.encoding import decode

TOKENS = np.random.default_rng(0).integers(0, 52, (4, 16), dtype=np.uint32)


@pytest.fixture(scope="module")
def transformer(model: Path) -> Transformer:
    return load(model)


def hidden_states(transformer: Transformer, tokens: np.ndarray) -> dict[int, torch.Tensor]:
    with torch.no_grad():
        output = transformer.model(
            input_ids=torch.from_numpy(tokens.astype(np.int64)), output_hidden_states=True
        )
    # The last hidden state is after the final norm.
    return {layer: output.hidden_states[layer + 1] for layer in range(3)}


@pytest.mark.parametrize(
    ("encoding", "dtype", "stored"),
    [
        ("float16", torch.float16, np.float16),
        ("bfloat16", torch.bfloat16, np.uint16),
        ("float32", torch.float32, np.float32),
    ],
)
def test_values_are_the_hidden_states_rounded_once(
    transformer: Transformer, encoding: str, dtype: torch.dtype, stored: type
) -> None:
    result = stored_activations(transformer, TOKENS, (0, 2), encoding, 4)
    expected = hidden_states(transformer, TOKENS)
    assert list(result) == [0, 2]
    for layer, values in result.items():
        assert values.dtype == stored
        rounded = expected[layer].reshape(-1, 32).to(dtype).float().numpy()
        np.testing.assert_array_equal(decode(values, encoding), rounded)  # type: ignore[arg-type]


def test_short_batch_runs_in_full_shape_and_its_filling_is_dropped(
    transformer: Transformer,
) -> None:
    seen: list[torch.Size] = []
    handle = transformer.blocks[0].register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape)
    )
    short = stored_activations(transformer, TOKENS[:1], (1,), "float32", 4)[1]
    handle.remove()
    assert seen == [(4, 16, 32)]
    assert short.shape == (16, 32)
    full = stored_activations(transformer, TOKENS, (1,), "float32", 4)[1]
    np.testing.assert_array_equal(short, full[:16])


def test_preflight_measures_the_largest_magnitudes(transformer: Transformer) -> None:
    expected = hidden_states(transformer, TOKENS[:3])
    largest = preflight(transformer, TOKENS[:3], (0, 1, 2), 4)
    assert largest == {layer: float(x.abs().max()) for layer, x in expected.items()}


def test_values_that_are_not_finite_are_refused_with_layer_and_magnitude(
    model: Path,
) -> None:
    transformer = load(model)
    with torch.no_grad():
        transformer.model.gpt_neox.layers[1].mlp.dense_4h_to_h.bias[3] = float("inf")
    with pytest.raises(ActivationError) as info:
        preflight(transformer, TOKENS, (0, 1, 2), 4)
    x = hidden_states(transformer, TOKENS)[1].abs()
    largest = float(x[x.isfinite()].max())
    assert "layer 1 (resid_post) gives values that are not finite" in str(info.value)
    assert f"its largest finite magnitude is {largest:.5g};" in str(info.value)


def test_encoding_is_chosen_by_precision_and_magnitude() -> None:
    assert choose_encoding("auto", torch.bfloat16, {0: 1e6}) == "bfloat16"
    assert choose_encoding("auto", torch.float32, {0: 16_000.0}) == "float16"
    assert choose_encoding("auto", torch.float16, {0: 1.0}) == "float16"
    assert choose_encoding("float16", torch.float32, {0: 20_000.0}) == "float16"
    assert choose_encoding("float32", torch.bfloat16, {0: 1.0}) == "float32"


def test_large_magnitudes_are_not_put_into_float16_unasked() -> None:
    with pytest.raises(InputError) as info:
        choose_encoding("auto", torch.float32, {0: 12.0, 5: 16_001.0, 6: 3.0})
    assert str(info.value) == (
        "layer 5 reaches 16,001 in the first batch, over the 16,000 up to which float16 is chosen "
        "by itself; use --encoding bfloat16 (as many bytes) or --encoding float32"
    )


def test_out_of_memory_names_the_batch_size() -> None:
    with (
        pytest.raises(
            ResourceError, match=r"forward pass of 64 sequences; use a smaller --batch-s"
        ),
        _batch_size_explained(64),
    ):
        torch.empty(2**60)


def test_other_errors_pass_through() -> None:
    with pytest.raises(RuntimeError, match="shapes"), _batch_size_explained(64):
        torch.ones(2, 3) @ torch.ones(2, 3)
