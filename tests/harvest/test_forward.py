"""One batch: padded to full shape, cast on the device, refused where it cannot be stored."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlsae.base.errors import InputError, ResourceError
from mlsae.harvest.compute.batches import Batches, TextBatch
from mlsae.harvest.compute.codecs import codecs_for
from mlsae.harvest.compute.forward import (
    Computed,
    Forward,
    choose_encoding,
    memory_explained,
    preflight,
)
from mlsae.models import Transformer, load
from mlsae.models.capture import capture
from mlsae.store import PADDING, SPECIAL, ActivationError, Calibrator
from mlsae.store.format.encoding import decode
from mlsae.store.format.positions import kept_positions
from mlsae.store.plan import KeptPositions

TOKENS = np.random.default_rng(0).integers(0, 52, (4, 16), dtype=np.uint32)
DOCUMENTS = np.sort(np.random.default_rng(1).integers(0, 9, 64)).astype(np.uint32)
FLAGS = np.where(np.arange(64) % 16 > 11, PADDING, SPECIAL).astype(np.uint8)


@pytest.fixture(scope="module")
def transformer(model: Path) -> Transformer:
    return load(model)


def batch(num_sequences: int = 4, batch_sequences: int = 4, first: int = 0) -> TextBatch:
    cut = Batches(
        tokens=lambda start, stop: TOKENS.reshape(-1)[start:stop],
        documents=None,
        token_flags=None,
        context_length=16,
        batch_sequences=batch_sequences,
    )
    return cut.batch(first, num_sequences)


def begin(
    transformer: Transformer,
    layers: Sequence[int],
    encoding: Any,
    sites: Sequence[str] = ("resid_post",),
) -> Forward:
    codecs = codecs_for(encoding, sites, layers, 32, None)
    return Forward(transformer, layers=layers, sites=sites, codecs=codecs, batch_rows=64)


def stored(
    transformer: Transformer,
    some: TextBatch,
    layers: Sequence[int],
    encoding: str,
    sites: Sequence[str] = ("resid_post",),
) -> dict[tuple[str, int], np.ndarray]:
    computed = measured(begin(transformer, layers, encoding, sites), some)
    return {key: values for key, (values,) in computed.stored().items()}


def measured(forward: Forward, some: TextBatch, group: int = 0) -> Computed:
    computed = forward(some)
    forward.measure(computed, np.full(len(some.rows), group, np.int8))
    computed.check()
    return computed


def hidden_states(transformer: Transformer, tokens: np.ndarray) -> dict[int, torch.Tensor]:
    with torch.no_grad():
        output = transformer.model(
            input_ids=torch.from_numpy(tokens.astype(np.int64)), output_hidden_states=True
        )
    # The last hidden state is after the final norm.
    return {layer: output.hidden_states[layer + 1] for layer in range(3)}


@pytest.mark.parametrize(
    ("encoding", "dtype", "kept"),
    [
        ("float16", torch.float16, np.float16),
        ("bfloat16", torch.bfloat16, np.uint16),
        ("float32", torch.float32, np.float32),
    ],
)
def test_values_are_the_hidden_states_rounded_once(
    transformer: Transformer, encoding: str, dtype: torch.dtype, kept: type
) -> None:
    result = stored(transformer, batch(), (0, 2), encoding)
    expected = hidden_states(transformer, TOKENS)
    assert sorted(result) == [("resid_post", 0), ("resid_post", 2)]
    for (_, layer), values in result.items():
        assert values.dtype == kept
        rounded = expected[layer].reshape(-1, 32).to(dtype).float().numpy()
        np.testing.assert_array_equal(decode(values, encoding), rounded)  # type: ignore[arg-type]


def test_several_sites_come_from_one_pass(transformer: Transformer) -> None:
    result = stored(transformer, batch(), (1,), "float32", ("resid_pre", "resid_post"))
    expected = hidden_states(transformer, TOKENS)
    for site, layer in (("resid_pre", 0), ("resid_post", 1)):
        np.testing.assert_array_equal(result[site, 1], expected[layer].reshape(-1, 32).numpy())


def test_short_batch_runs_in_full_shape_and_its_filling_is_dropped(
    transformer: Transformer,
) -> None:
    seen: list[torch.Size] = []
    handle = transformer.blocks[0].register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape)
    )
    short = stored(transformer, batch(num_sequences=1), (1,), "float32")["resid_post", 1]
    handle.remove()
    assert seen == [(4, 16, 32)]
    assert short.shape == (16, 32)
    full = stored(transformer, batch(), (1,), "float32")["resid_post", 1]
    np.testing.assert_array_equal(short, full[:16])


def test_earlier_batch_is_untouched_by_the_next(transformer: Transformer) -> None:
    """Arrays that the writer still holds are not written into."""
    forward = begin(transformer, (1,), "float32")
    (first,) = measured(forward, batch(1, 4, 0)).stored()["resid_post", 1]
    copy = first.copy()
    for start in (1, 2):
        measured(forward, batch(1, 4, start))
        np.testing.assert_array_equal(first, copy)


def test_batches_carry_what_the_pass_needs() -> None:
    cut = Batches(
        tokens=lambda start, stop: TOKENS.reshape(-1)[start:stop],
        documents=lambda start, stop: DOCUMENTS[start:stop],
        token_flags=lambda start, stop: FLAGS[start:stop],
        context_length=16,
        batch_sequences=3,
        keep=KeptPositions(num=5, seed=7),
    )
    some = cut.batch(2, 2)
    inputs = some.inputs
    assert inputs.first_token == 32
    assert inputs.documents is not None
    assert inputs.padding is not None
    np.testing.assert_array_equal(inputs.tokens[:2].numpy(), TOKENS[2:])
    np.testing.assert_array_equal(inputs.documents[:2].numpy(), DOCUMENTS.reshape(4, 16)[2:])
    np.testing.assert_array_equal(
        inputs.padding[:2].numpy(), (FLAGS.reshape(4, 16)[2:] & PADDING) > 0
    )
    assert not inputs.padding[2].any()
    expected = kept_positions(7, 2, 2, 16, 5)
    np.testing.assert_array_equal(some.rows.reshape(2, 5) - [[0], [16]], expected)


def test_kept_positions_are_those_rows_of_the_whole(transformer: Transformer) -> None:
    whole = stored(transformer, batch(), (0,), "float32")["resid_post", 0]
    cut = Batches(
        tokens=lambda start, stop: TOKENS.reshape(-1)[start:stop],
        documents=None,
        token_flags=None,
        context_length=16,
        batch_sequences=4,
        keep=KeptPositions(num=3, seed=0),
    )
    some = cut.batch(0, 4)
    kept = stored(transformer, some, (0,), "float32")["resid_post", 0]
    assert kept.shape == (12, 32)
    np.testing.assert_array_equal(kept, whole[some.rows])


def test_preflight_measures_the_largest_magnitudes(transformer: Transformer) -> None:
    expected = hidden_states(transformer, TOKENS[:3])
    largest = preflight(transformer, batch(num_sequences=3), (0, 1, 2), ("resid_post",))
    assert largest == {("resid_post", layer): float(x.abs().max()) for layer, x in expected.items()}


def test_values_that_are_not_finite_are_refused_with_layer_and_magnitude(
    model: Path,
) -> None:
    transformer = load(model)
    with torch.no_grad():
        transformer.model.gpt_neox.layers[1].mlp.dense_4h_to_h.bias[3] = float("inf")
    with pytest.raises(ActivationError) as info:
        preflight(transformer, batch(), (0, 1, 2), ("resid_post",))
    x = hidden_states(transformer, TOKENS)[1].abs()
    largest = float(x[x.isfinite()].max())
    assert "layer 1 (resid_post) gives values that are not finite" in str(info.value)
    assert f"its largest finite magnitude is {largest:.5g};" in str(info.value)


def test_encoding_is_chosen_by_precision_and_magnitude() -> None:
    def choose(asked: str, dtype: torch.dtype, largest: float) -> tuple[str, str]:
        preset = choose_encoding(asked, dtype, {("resid_post", 0): largest})
        return preset.encoding, preset.compression

    assert choose("auto", torch.bfloat16, 1e6) == ("bfloat16", "none")
    assert choose("auto", torch.float32, 16_000.0) == ("float16", "none")
    assert choose("auto", torch.float16, 1.0) == ("float16", "none")
    assert choose("float16", torch.float32, 20_000.0) == ("float16", "none")
    assert choose("float32", torch.bfloat16, 1.0) == ("float32", "none")
    assert choose("int8-zstd", torch.bfloat16, 1.0) == ("int8", "zstd")


def test_large_magnitudes_are_not_put_into_float16_unasked() -> None:
    largest = {("resid_post", 0): 12.0, ("mlp_out", 5): 16_001.0, ("resid_post", 6): 3.0}
    with pytest.raises(InputError) as info:
        choose_encoding("auto", torch.float32, largest)
    assert str(info.value) == (
        "layer 5 (mlp_out) reaches 16,001 in the first batch, over the 16,000 up to which float16 "
        "is chosen by itself; use --encoding bfloat16 (as many bytes) or --encoding float32"
    )


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
)
def test_out_of_memory_names_the_batch_size(error: Exception) -> None:
    with (
        pytest.raises(ResourceError, match="forward pass of 7 sequences; use a smaller --batch-si"),
        memory_explained(7),
    ):
        raise error


def test_out_of_memory_after_a_pass_says_so() -> None:
    with (
        pytest.raises(
            ResourceError, match="in measuring the rows of a forward pass; use a smaller --b"
        ),
        memory_explained(),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_moments_are_of_the_stored_values(transformer: Transformer) -> None:
    forward = begin(transformer, (0, 1), "float16")
    computed = measured(forward, batch(), group=19)
    values = decode(computed.stored()["resid_post", 1][0], "float16").astype(float)
    tensors = forward.moments.take()["resid_post"].tensors()
    np.testing.assert_allclose(tensors["mean"][1, 19], values.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        tensors["m2"][1, 19], ((values - values.mean(0)) ** 2).sum(0), rtol=1e-5
    )


def test_overflow_names_layer_row_and_magnitude(model: Path) -> None:
    transformer = load(model)
    with torch.no_grad():
        transformer.model.gpt_neox.layers[1].mlp.dense_4h_to_h.bias[3] = 1e5
    forward = begin(transformer, (0, 1), "float16")
    with pytest.raises(ActivationError) as info:
        measured(forward, batch(2, 4, 1))
    assert "layer 1 (resid_post), row 16: a value is not finite as float16" in str(info.value)
    assert "use --encoding bfloat16 for values over 65,504" in str(info.value)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_int8_names_layer_row_and_magnitude_of_what_it_cannot_hold(bad: float, model: Path) -> None:
    """The stored values alone tell: the floats are gone by the time they are looked at."""
    transformer = load(model)
    rows = capture(transformer, batch().inputs, (0, 1))["resid_post", 1].reshape(-1, 32)
    calibrator = Calibrator([("resid_post", 0), ("resid_post", 1)], 32)
    calibrator.add({("resid_post", layer): rows.numpy() for layer in (0, 1)})
    codecs = codecs_for("int8", ("resid_post",), (0, 1), 32, calibrator.result())
    forward = Forward(
        transformer, layers=(0, 1), sites=("resid_post",), codecs=codecs, batch_rows=64
    )
    handle = transformer.blocks[1].register_forward_hook(
        lambda _module, _arguments, output: output.index_put(
            (torch.tensor(0), torch.tensor(5), torch.tensor(9)), torch.tensor(bad)
        )
    )
    with pytest.raises(ActivationError) as info:
        measured(forward, batch(2, 4, 1))
    handle.remove()
    assert str(info.value).startswith(
        "layer 1 (resid_post), row 21: a value is not finite as int8; the largest finite magnitude "
    )
    largest = float(str(info.value).split("batch is ")[1].split(";")[0])
    sound = rows[16:48].clone()
    sound[5] = 0
    assert largest == pytest.approx(float(sound.abs().max()), rel=0.01)
    assert str(info.value).endswith("; use another --model-dtype")
