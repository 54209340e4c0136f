"""The control's embeddings: noise for each token of the text, the same however it is cut."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from mlsae.base.errors import InputError
from mlsae.models import INITS, Inputs, Transformer, load
from mlsae.models.passes.control import control_embeddings, control_rows


def rows(start: int, stop: int, seed: int = 0, width: int = 24) -> np.ndarray:
    return control_rows(seed, np.arange(start, stop), width)


def test_any_slice_of_the_text_has_the_rows_of_the_whole() -> None:
    whole = rows(0, 1000)
    for start, stop in ((0, 1), (63, 65), (64, 128), (517, 518), (130, 999)):
        np.testing.assert_array_equal(rows(start, stop), whole[start:stop])
    order = np.random.default_rng(0).permutation(1000)
    np.testing.assert_array_equal(control_rows(0, order, 24), whole[order])


def test_far_into_a_text_of_many_tokens() -> None:
    far = rows(10**12 - 5, 10**12 + 100)
    np.testing.assert_array_equal(control_rows(0, np.array([10**12]), 24)[0], far[5])


def test_standard_normal_and_independent() -> None:
    """Moments within 5 standard errors; no two tokens, no two seeds correlated."""
    x = rows(0, 4000).astype(np.float64)
    n = x.size
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - moment) < 5 * np.sqrt(variance / n)
    assert abs(np.corrcoef(x[:-1].ravel(), x[1:].ravel())[0, 1]) < 5 / np.sqrt(n)
    assert abs(np.corrcoef(x[:-64].ravel(), x[64:].ravel())[0, 1]) < 5 / np.sqrt(n)
    assert len(np.unique(x, axis=0)) == len(x)
    other = rows(0, 4000, seed=1).astype(np.float64)
    assert abs(np.corrcoef(x.ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(n)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def directory(request: pytest.FixtureRequest, make_model_directory: Callable[[str], Path]) -> Path:
    return make_model_directory(request.param)


def first_input(transformer: Transformer, inputs: Inputs) -> torch.Tensor:
    """Output of the embedding in a forward pass within the context."""
    seen = []
    with control_embeddings(transformer, inputs):
        embedding = transformer.model.get_input_embeddings()
        handle = embedding.register_forward_hook(lambda *args: seen.append(args[2]))
        with torch.no_grad():
            transformer.model(input_ids=inputs.tokens)
        handle.remove()
    return seen[0]


def test_the_model_sees_the_rows_of_its_tokens_whatever_they_are(directory: Path) -> None:
    transformer = load(directory, init="control", init_seed=9)
    inputs = Inputs(tokens=torch.full((3, 10), 7), first_token=140)
    seen = first_input(transformer, inputs)
    expected = rows(140, 170, seed=9, width=32).reshape(3, 10, 32)
    np.testing.assert_array_equal(seen.numpy(), expected)
    assert len(np.unique(expected[..., 0])) == 30
    other = Inputs(tokens=torch.arange(30).view(3, 10), first_token=140)
    assert torch.equal(first_input(transformer, other), seen)


def test_rows_follow_the_index_where_tokens_are_not_consecutive(directory: Path) -> None:
    transformer = load(directory, init="control")
    indices = torch.tensor([[5, 700, 3], [0, 64, 63]])
    seen = first_input(transformer, Inputs(tokens=torch.ones(2, 3).long(), indices=indices))
    np.testing.assert_array_equal(seen.numpy(), rows(0, 701, width=32)[indices.numpy()])


def test_positions_and_weights_stay_those_of_the_trained_model(
    make_model_directory: Callable[[str], Path],
) -> None:
    """GPT-2's first block gets noise plus its own position embeddings."""
    transformer = load(make_model_directory("gpt2"), init="control")
    inputs = Inputs(tokens=torch.zeros(2, 6, dtype=torch.long))
    seen = []
    handle = transformer.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with control_embeddings(transformer, inputs), torch.no_grad():
        transformer.model(input_ids=inputs.tokens)
    handle.remove()
    position = transformer.model.transformer.wpe.weight[:6].numpy()
    expected = rows(0, 12, width=32).reshape(2, 6, 32) + position
    np.testing.assert_allclose(seen[0].numpy(), expected, rtol=0, atol=1e-6)


def test_the_modules_precision_is_kept_and_no_hook_is_left(directory: Path) -> None:
    transformer = load(directory, init="control", dtype="bfloat16")
    embedding = transformer.model.get_input_embeddings()
    before = len(embedding._forward_hooks)
    seen = first_input(transformer, Inputs(tokens=torch.ones(1, 4, dtype=torch.long)))
    assert seen.dtype == torch.bfloat16
    expected = torch.from_numpy(rows(0, 4, width=32)).bfloat16().view(1, 4, 32)
    assert torch.equal(seen, expected)
    assert len(embedding._forward_hooks) == before


@pytest.mark.parametrize("init", [init for init in INITS if init != "control"])
def test_nothing_is_done_for_other_inits(directory: Path, init: str) -> None:
    transformer = load(directory, init=init)
    inputs = Inputs(tokens=torch.arange(8).view(2, 4))
    seen = first_input(transformer, inputs)
    assert torch.equal(seen, transformer.model.get_input_embeddings()(inputs.tokens))


def test_an_embedding_narrower_than_the_stream(tmp_path: Path) -> None:
    """ELECTRA embeds in fewer dimensions and projects: the noise takes the place of the former."""
    config = transformers.ElectraConfig(
        vocab_size=61, embedding_size=8, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64, max_position_embeddings=48,
    )  # fmt: skip
    transformers.ElectraModel(config).save_pretrained(tmp_path)
    transformer = load(tmp_path, init="control")
    seen = first_input(transformer, Inputs(tokens=torch.ones(2, 5, dtype=torch.long)))
    np.testing.assert_array_equal(seen.numpy(), rows(0, 10, width=8).reshape(2, 5, 8))


def test_an_embedding_that_does_not_say_which_token_is_where(directory: Path) -> None:
    transformer = load(directory, init="control")
    inputs = Inputs(tokens=torch.ones(2, 5, dtype=torch.long))
    message = r"--init control is not possible with model .*: its embedding returns \(10, 32\) for"
    with control_embeddings(transformer, inputs), pytest.raises(InputError, match=message):
        transformer.model.get_input_embeddings()(inputs.tokens.view(-1))


def test_cheap_beside_a_forward_pass() -> None:
    """10 µs a token at width 512 is the aim; the bound leaves room for a busy machine."""
    started = time.process_time()
    rows(0, 4096, width=512)
    assert (time.process_time() - started) / 4096 < 60e-6
