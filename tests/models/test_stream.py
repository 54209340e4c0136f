"""Blocks pass one residual stream at the length that is run, and a pass changes no model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mlsae.base.errors import InputError
from mlsae.models import Inputs, Transformer, load
from mlsae.models.capture import capture
from mlsae.models.sites import check_sites
from mlsae.models.splice import run
from mlsae.models.weights.fingerprint import weights_sha256

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 128, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
XLM: dict[str, Any] = {
    "vocab_size": 64, "emb_dim": 32, "n_layers": 3, "n_heads": 4, "max_position_embeddings": 64,
    "n_langs": 1, "bos_index": 0, "eos_index": 1, "pad_index": 2, "unk_index": 3,
}  # fmt: skip


def longrope() -> Any:
    """Frequencies of the long kind from the ninth position of a pass on."""
    return transformers.Phi3Config(
        **{**SMALL, "max_position_embeddings": 16},
        original_max_position_embeddings=8,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 4.0, 16.0, 60.0],
            "original_max_position_embeddings": 8,
        },
    )


def dynamic() -> Any:
    """Frequencies of the longest pass so far."""
    return transformers.LlamaConfig(
        **{**SMALL, "max_position_embeddings": 8},
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    )


def big_bird() -> Any:
    """Full attention up to 28 tokens, sparse attention beyond."""
    return transformers.BigBirdConfig(
        **SMALL, block_size=4, num_random_blocks=1, attention_type="block_sparse"
    )


@pytest.fixture
def made(tmp_path: Path) -> Callable[[Any], Path]:
    def make(config: Any, auto: Any = transformers.AutoModelForCausalLM) -> Path:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            auto.from_config(config).save_pretrained(tmp_path)
        return tmp_path

    return make


def tokens_of(num: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 64, (num, length), generator=torch.Generator().manual_seed(seed))


def plain(directory: Path, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states between the blocks of a model that has run nothing before."""
    model = transformers.AutoModel.from_pretrained(directory).eval()
    with torch.no_grad():
        return list(model(input_ids=tokens, output_hidden_states=True).hidden_states[1:-1])


def error(x: torch.Tensor, expected: torch.Tensor) -> float:
    return float((x - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("config", "auto", "line"),
    [
        (transformers.XLMConfig(**XLM), transformers.AutoModel, r"ffns of model .* what leaves "
         r"ffns\.0 is not what enters ffns\.1; if another list holds the blocks, name it with"),
        (transformers.FlaubertConfig(**XLM), transformers.AutoModel, r"ffns\.0 is not what enters"),
        (
            transformers.XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48),
            transformers.AutoModelForCausalLM,
            r"layer\.0 of model .* \(XLNetLayer\) returns a tensor \(7, 2, 32\), expected the "
            r"residual stream in the order \(sequences, positions, d_model\) \(2, 7, 32\)",
        ),
        (
            transformers.ReformerConfig(
                vocab_size=64, hidden_size=32, num_attention_heads=2, attention_head_size=16,
                attn_layers=["local"] * 2, axial_pos_embds=False, is_decoder=True,
                max_position_embeddings=64, local_attn_chunk_length=8, feed_forward_size=32,
            ),
            transformers.AutoModelForCausalLM,
            r"layers\.0 is not what enters encoder\.layers\.1",
        ),
    ],
    ids=["XLM", "FlauBERT", "XLNet", "Reformer"],
)  # fmt: skip
def test_models_without_one_stream_from_block_to_block_are_refused(
    config: Any, auto: Any, line: str, made: Callable[..., Path]
) -> None:
    transformer = load(made(config, auto))
    with pytest.raises(InputError, match=line) as info:
        check_sites(transformer, ["resid_post"])
    assert "\n" not in str(info.value)


def test_a_stream_that_breaks_at_the_length_that_is_run_is_refused(
    made: Callable[[Any], Path],
) -> None:
    transformer = load(made(transformers.LlamaConfig(**SMALL)))
    capture(transformer, Inputs(tokens=tokens_of(2, 12)), [0, 2])

    def between(_module: Any, args: Any) -> Any:
        return (args[0] * 2 if args[0].shape[1] > 20 else args[0], *args[1:])

    transformer.blocks[1].register_forward_pre_hook(between)
    capture(transformer, Inputs(tokens=tokens_of(2, 13)), [0, 2])
    with pytest.raises(InputError, match=r"what leaves layers\.0 is not what enters layers\.1"):
        capture(transformer, Inputs(tokens=tokens_of(2, 24)), [0, 2])


def test_a_short_pass_does_not_switch_the_attention_of_later_ones(
    made: Callable[..., Path],
) -> None:
    directory = made(big_bird(), transformers.AutoModel)
    transformer, tokens = load(directory), tokens_of(2, 32)
    for _ in range(2):
        x = capture(transformer, Inputs(tokens=tokens), [0, 1])
        for layer, expected in enumerate(plain(directory, tokens)):
            assert error(x["resid_post", layer], expected) < 1e-6
        capture(transformer, Inputs(tokens=tokens_of(2, 8)), [0])


def test_a_model_that_fills_sequences_up_is_run_at_its_own_lengths(
    made: Callable[..., Path],
) -> None:
    config = transformers.LongformerConfig(**SMALL, attention_window=[4] * 3)
    directory = made(config, transformers.AutoModel)
    transformer, tokens = load(directory), tokens_of(2, 12)
    x = capture(transformer, Inputs(tokens=tokens), [0, 1])
    for layer, expected in enumerate(plain(directory, tokens)):
        assert error(x["resid_post", layer], expected) < 1e-6
    with pytest.raises(InputError) as info:
        capture(transformer, Inputs(tokens=tokens[:, :10]), [0])
    assert str(info.value) == (
        f"the residual stream at encoder.layer.0 of model {directory} is (2, 12, 32), expected "
        "(2, 10, 32); the model fills sequences up to 12: use --context-length 12, without "
        "--isolate-documents"
    )


@pytest.mark.parametrize(
    ("config", "filled"),
    [
        (big_bird, 36),
        (lambda: transformers.LongformerConfig(**SMALL, attention_window=[4] * 3), 12),
    ],
)
def test_documents_of_such_a_model_are_refused_before_any_is_run(
    config: Callable[[], Any], filled: int, made: Callable[..., Path]
) -> None:
    transformer = load(made(config(), transformers.AutoModel))
    inputs = Inputs(tokens=tokens_of(1, 64), documents=torch.zeros(1, 64))
    with pytest.raises(InputError) as info:
        capture(transformer, inputs, [0])
    assert str(info.value) == (
        f"model {transformer.name} fills sequences of {33 if filled == 36 else 9} tokens up to "
        f"{filled}, so that documents cannot be run at their own lengths; harvest it from "
        "concatenated text, without --isolate-documents"
    )


@pytest.mark.parametrize("config", [longrope, dynamic])
@pytest.mark.parametrize("given", ["documents", "padding"])
def test_documents_are_run_at_lengths_of_their_own_where_length_matters(
    config: Callable[[], Any], given: str, made: Callable[[Any], Path]
) -> None:
    """Beside a longer document, rotary embeddings of a short one would be those of the longer."""
    directory = made(config())
    transformer, tokens = load(directory), tokens_of(2, 16)
    # A long pass before changes nothing.
    capture(transformer, Inputs(tokens=tokens), [0, 1])
    if given == "documents":
        parts = [(0, slice(0, 7)), (0, slice(7, 16)), (1, slice(0, 16))]
        documents = torch.tensor([[0] * 7 + [1] * 9, [2] * 16])
        inputs = Inputs(tokens=tokens, documents=documents)
    else:
        parts = [(0, slice(0, 7)), (1, slice(0, 9))]
        inputs = Inputs(tokens=tokens, padding=torch.arange(16) >= torch.tensor([[7], [9]]))
    x = capture(transformer, inputs, [0, 1])
    for row, part in parts:
        for layer, expected in enumerate(plain(directory, tokens[row : row + 1, part])):
            assert error(x["resid_post", layer][row, part], expected[0]) < 1e-5
    assert all(bool(values.isfinite().all()) for values in x.values())
    logits = run(transformer, inputs)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    for row, part in parts:
        with torch.no_grad():
            expected = model(input_ids=tokens[row : row + 1, part]).logits[0]
        assert error(logits[row, part], expected) < 1e-5


def test_a_model_that_would_divide_its_weights_does_not(made: Callable[[Any], Path]) -> None:
    config = transformers.RwkvConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=4, attention_hidden_size=32,
        intermediate_size=48, context_length=64, rescale_every=2,
    )  # fmt: skip
    transformer = load(made(config))
    before = transformer.fingerprint()
    sites = ["resid_pre", "resid_post"]
    x = capture(transformer, Inputs(tokens=tokens_of(2, 8)), range(4), sites)
    for layer in range(3):
        assert torch.equal(x["resid_post", layer], x["resid_pre", layer + 1])
    assert weights_sha256(transformer.model) == before


@pytest.mark.parametrize("behind", [False, True])
def test_a_model_that_changes_its_weights_is_refused(
    behind: bool, made: Callable[[Any], Path]
) -> None:
    """In place, or behind the back of autograd's versions."""
    transformer = load(made(transformers.LlamaConfig(**SMALL)))
    weight = transformer.backbone.get_parameter("layers.1.mlp.up_proj.weight")

    def divide(_module: Any, _args: Any) -> None:
        (weight.data if behind else weight).div_(2)

    changing = Transformer(
        model=transformer.model, blocks=transformer.blocks, blocks_path="layers", name="changing"
    )
    transformer.blocks[1].register_forward_pre_hook(divide)
    with pytest.raises(InputError) as info:
        capture(changing, Inputs(tokens=tokens_of(1, 8)), [0])
    assert str(info.value) == (
        "model changing changes its own weights in a forward pass (1 of them, the first "
        "model.layers.1.mlp.up_proj.weight), so it is no longer the checkpoint; such a model is "
        "not supported"
    )


def test_weights_that_begin_within_a_word_are_watched_too(made: Callable[[Any], Path]) -> None:
    """Parts of a larger storage, which begin two bytes behind a word."""
    transformer = load(made(transformers.LlamaConfig(**SMALL)), dtype="bfloat16")
    norm = transformer.backbone.get_submodule("layers.0.input_layernorm")
    norm.weight = torch.nn.Parameter(torch.ones(34, dtype=torch.bfloat16)[1:33], False)
    x = capture(transformer, Inputs(tokens=tokens_of(1, 8)), [0])
    assert bool(x["resid_post", 0].isfinite().all())


def test_a_pass_that_fails_is_one_line(made: Callable[[Any], Path]) -> None:
    transformer = load(made(transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4,
                                                    n_positions=16)))  # fmt: skip
    with pytest.raises(InputError) as info:
        capture(transformer, Inputs(tokens=tokens_of(1, 20)), [0])
    assert str(info.value) == (
        f"model {transformer.name} cannot be run on sequences of 20 tokens by transformers "
        f"{transformers.__version__} (IndexError: index out of range in self); try a smaller "
        "--context-length"
    )
