"""Each site of each family holds what the family's own code puts there, and the identities hold."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from mlsae.base.errors import InputError
from mlsae.base.words import SITES
from mlsae.models import Transformer, load, outline
from mlsae.models.capture import capture
from mlsae.models.inputs import Inputs
from mlsae.models.sites import anatomies, check_sites

# By family, as one reads it in the model's code: how blocks are composed, the modules whose output
# is added to the stream, and the norms after attention and MLP (post-norm) or the one that reads
# resid_mid.
BY_HAND = {
    "GPT-NeoX": ("parallel", "attention", "mlp", ()),
    "GPT-NeoX, sequential": ("sequential", "attention", "mlp", ("post_attention_layernorm",)),
    "GPT-2": ("sequential", "attn", "mlp", ("ln_2",)),
    "Llama": ("sequential", "self_attn", "mlp", ("post_attention_layernorm",)),
    "Mistral": ("sequential", "self_attn", "mlp", ("post_attention_layernorm",)),
    "Mixtral": ("sequential", "self_attn", "mlp", ("post_attention_layernorm",)),
    "Gemma 2": (
        "sequential", "post_attention_layernorm", "post_feedforward_layernorm",
        ("pre_feedforward_layernorm",),
    ),
    "Gemma 3": (
        "sequential", "post_attention_layernorm", "post_feedforward_layernorm",
        ("pre_feedforward_layernorm",),
    ),
    "Qwen 2": ("sequential", "self_attn", "mlp", ("post_attention_layernorm",)),
    "Qwen 3": ("sequential", "self_attn", "mlp", ("post_attention_layernorm",)),
    "OPT": ("sequential", "self_attn", "fc2", ("final_layer_norm",)),
    "OPT, post-norm (350m)": (
        "post-norm", "self_attn", "fc2", ("self_attn_layer_norm", "final_layer_norm"),
    ),
    "GPT-J": ("parallel", "attn", "mlp", ()),
    "Phi": ("parallel", "self_attn", "mlp", ()),
    "Falcon": ("parallel", "self_attention", "mlp", ()),
    "Falcon, ALiBi": ("parallel", "self_attention", "mlp", ()),
    "Falcon, two norms": ("parallel", "self_attention", "mlp", ()),
    "Falcon, sequential": ("sequential", "self_attention", "mlp", ("post_attention_layernorm",)),
    "BLOOM": ("sequential", "self_attention", "mlp", ("post_attention_layernorm",)),
    "BERT": (
        "post-norm", "attention.output.dense", "output.dense",
        ("attention.output.LayerNorm", "output.LayerNorm"),
    ),
    "RoBERTa": (
        "post-norm", "attention.output.dense", "output.dense",
        ("attention.output.LayerNorm", "output.LayerNorm"),
    ),
    "DistilBERT": ("post-norm", "attention", "ffn", ("sa_layer_norm", "output_layer_norm")),
    "ModernBERT": ("sequential", "attn", "mlp", ("mlp_norm",)),
    "ELECTRA": (
        "post-norm", "attention.output.dense", "output.dense",
        ("attention.output.LayerNorm", "output.LayerNorm"),
    ),
}  # fmt: skip


def of_block(transformer: Transformer, tokens: torch.Tensor, layer: int) -> dict[str, torch.Tensor]:
    """The sites of a block by plain hooks on the modules named above; copies, as they were then."""
    block = transformer.blocks[layer]
    _, attn, mlp, norms = BY_HAND[family_of(transformer)]
    seen: dict[str, torch.Tensor] = {}

    def keep(site: str, *, minus_residual: bool = False) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            x = output if isinstance(output, torch.Tensor) else output[0]
            seen[site] = (x - args[1]) if minus_residual else x.clone()

        return hook

    def keep_input(site: str) -> Any:
        return lambda _module, args: seen.update({site: args[0].clone()})

    adds_itself = family_of(transformer) == "BLOOM"
    handles = [
        block.register_forward_pre_hook(keep_input("resid_pre")),
        block.register_forward_hook(keep("resid_post")),
        block.get_submodule(attn).register_forward_hook(
            keep("attn_out", minus_residual=adds_itself)
        ),
        block.get_submodule(mlp).register_forward_hook(keep("mlp_out", minus_residual=adds_itself)),
    ]
    if len(norms) == 1:
        reader = block.get_submodule(norms[0])
        handles.append(reader.register_forward_pre_hook(keep_input("resid_mid")))
    if len(norms) == 2:
        handles.append(block.get_submodule(norms[0]).register_forward_hook(keep("resid_mid")))
    with torch.no_grad():
        transformer.model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return {site: x.reshape(*tokens.shape, -1) for site, x in seen.items()}


def family_of(transformer: Transformer) -> str:
    return Path(transformer.name).name


def test_every_family_is_described_here(family_names: list[str]) -> None:
    assert list(BY_HAND) == family_names


def test_every_site_holds_what_plain_hooks_see(
    any_family: Transformer, tokens: torch.Tensor
) -> None:
    sites = list(anatomies(any_family)[0].taps)
    captured = capture(any_family, Inputs(tokens=tokens), range(3), sites)
    for layer in range(3):
        seen = of_block(any_family, tokens, layer)
        assert set(seen) == set(sites)
        for site, x in seen.items():
            rounding = 1e-5 if family_of(any_family) == "BLOOM" else 0
            torch.testing.assert_close(
                captured[site, layer], x, rtol=rounding, atol=10 * rounding, msg=f"{site} {layer}"
            )


def test_identities(any_family: Transformer, tokens: torch.Tensor) -> None:
    """As in the table of docs/models.md, bit for bit; a block begins where the last one ended."""
    form, *_, norms = BY_HAND[family_of(any_family)]
    sites = [site for site in SITES if form != "parallel" or site != "resid_mid"]
    x = capture(any_family, Inputs(tokens=tokens), range(3), sites)
    for layer, block in enumerate(any_family.blocks):
        assert anatomies(any_family)[layer].form == form
        pre, post, attn, mlp = (
            x[site, layer] for site in ("resid_pre", "resid_post", "attn_out", "mlp_out")
        )
        if form == "sequential":
            assert torch.equal(x["resid_mid", layer], pre + attn)
            assert torch.equal(post, x["resid_mid", layer] + mlp)
        elif form == "post-norm":
            first, second = (block.get_submodule(norm) for norm in norms)
            assert torch.equal(x["resid_mid", layer], first(pre + attn))
            assert torch.equal(post, second(x["resid_mid", layer] + mlp))
        else:
            torch.testing.assert_close(post, pre + attn + mlp)
        if layer:
            assert torch.equal(pre, x["resid_post", layer - 1])


def test_last_resid_post_leads_to_the_models_own_output(
    any_family: Transformer, tokens: torch.Tensor
) -> None:
    """Final norm, if any, and head on it: the logits; for an encoder, the last hidden state."""
    x = capture(any_family, Inputs(tokens=tokens), [2])["resid_post", 2]
    inside = any_family.backbone.get_submodule(any_family.blocks_path.rpartition(".")[0])
    names = ("final_layer_norm", "ln_f", "norm", "final_layernorm", "final_norm", "project_out")
    with torch.no_grad():
        expected = any_family.model(input_ids=tokens)
        for module in (getattr(inside, name, None) for name in names):
            x = x if module is None else module(x)
        if any_family.kind == "encoder":
            torch.testing.assert_close(x, expected.last_hidden_state, rtol=0, atol=0)
            return
        logits = any_family.model.get_output_embeddings()(x)
    cap = getattr(any_family.model.config, "final_logit_softcapping", None)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["Llama", "GPT-NeoX", "Gemma 2", "BLOOM", "Falcon", "BERT"])
def test_sums_are_recognised_in_half_precision_too(
    family: str, make_family: Callable[[str], Transformer]
) -> None:
    single = make_family(family)
    for dtype in ("bfloat16", "float16"):
        half = load(single.name, dtype=dtype)
        assert anatomies(half) == anatomies(single)


def test_parallel_blocks_have_no_resid_mid_and_say_so(
    make_family: Callable[[str], Transformer],
) -> None:
    falcon = make_family("Falcon")
    with pytest.raises(InputError) as info:
        check_sites(falcon, ["resid_mid", "mlp_out"])
    assert str(info.value) == (
        f"model {falcon.name} has no resid_mid: in block 0 attention and MLP both read resid_pre "
        "(a parallel residual); its sites are resid_pre, resid_post, attn_out, mlp_out"
    )


def _saved(config: Any, directory: Path) -> Transformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return load(directory)


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "num_key_value_heads": 4, "initializer_range": 0.2,
}  # fmt: skip


def test_what_is_added_is_refused_where_no_sum_comes_out(tmp_path: Path) -> None:
    """Granite adds a multiple of what its modules give, and no module gives the multiple."""
    granite = _saved(transformers.GraniteConfig(**SMALL, residual_multiplier=0.3), tmp_path)
    assert check_sites(granite, ["resid_post", "resid_pre"]) == ("resid_pre", "resid_post")
    for site in ("attn_out", "mlp_out", "resid_mid"):
        with pytest.raises(InputError) as info:
            capture(granite, Inputs(tokens=torch.ones(1, 4)), [0], [site])
        assert str(info.value) == (
            f"model {granite.name} has no {site}: in block 0 (GraniteDecoderLayer) no sum of "
            "resid_pre and what its modules give is resid_post, so what attention and MLP add "
            "cannot be told; its sites are resid_pre, resid_post"
        )


def test_a_parallel_block_that_adds_attention_first_is_no_sequential_one(tmp_path: Path) -> None:
    """Cohere's sum is in a sequential block's order, but nothing reads what would be resid_mid."""
    cohere = _saved(transformers.CohereConfig(**SMALL), tmp_path)
    for anatomy in anatomies(cohere):
        assert anatomy.form == "parallel"
        assert (anatomy.taps["attn_out"].module, anatomy.taps["mlp_out"].module) == (
            "self_attn",
            "mlp",
        )


class _MlpFirst(nn.Module):
    """A block of Llama's parts whose MLP comes before its attention."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.parts = block

    def forward(self, hidden_states: torch.Tensor, **given: Any) -> torch.Tensor:
        parts: Any = self.parts
        x = hidden_states + parts.mlp(parts.post_attention_layernorm(hidden_states))
        added, _ = parts.self_attn(hidden_states=parts.input_layernorm(x), **given)
        return x + added


def test_roles_are_not_swapped_where_the_mlp_comes_first(tmp_path: Path) -> None:
    model = _saved(transformers.LlamaConfig(**SMALL), tmp_path).model
    model.model.layers[1] = _MlpFirst(model.model.layers[1])
    blocks = list(model.model.layers)
    mixed = Transformer(model=model, blocks=blocks, blocks_path="layers", name="mixed")
    assert [anatomy.form for anatomy in anatomies(mixed)] == ["sequential", None]
    with pytest.raises(InputError, match=r"mixed has no attn_out: in block 1 \(_MlpFirst\) no sum"):
        check_sites(mixed, ["attn_out"])


def test_a_model_without_attention_has_the_ends_of_its_blocks(tmp_path: Path) -> None:
    mamba = _saved(
        transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4),
        tmp_path,
    )
    with pytest.raises(InputError, match=r"no attn_out: .* its sites are resid_pre, resid_post$"):
        check_sites(mamba, ["attn_out"])


def test_a_tensor_that_the_model_writes_into_is_captured_as_it_was(
    tmp_path: Path, tokens: torch.Tensor
) -> None:
    """The second block adds to its input in place, which is the first block's output."""
    llama = _saved(transformers.LlamaConfig(**SMALL), tmp_path)

    class WritesInto(nn.Module):
        def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
            return hidden_states.mul_(2).add_(1)

    first = capture(llama, Inputs(tokens=tokens), [0])["resid_post", 0]
    llama.model.model.layers[1] = WritesInto()
    changed = Transformer(
        model=llama.model, blocks=list(llama.model.model.layers), blocks_path="layers", name="in"
    )
    x = capture(changed, Inputs(tokens=tokens), [0, 1], ["resid_pre", "resid_post"])
    assert torch.equal(x["resid_post", 0], first)
    assert torch.equal(x["resid_pre", 1], first)
    assert torch.equal(x["resid_post", 1], first * 2 + 1)


@pytest.mark.parametrize("path", ["layers.0.mlp.experts_list", "layers.0.mlp.twice"])
def test_a_list_that_holds_no_blocks_is_refused(
    make_family: Callable[[str], Transformer], path: str
) -> None:
    """Neither modules that never run nor one that runs for several layers is a block."""
    model = load(make_family("Llama").name).model
    mlp = model.model.layers[0].mlp
    mlp.experts_list = nn.ModuleList([nn.Linear(32, 32)])
    mlp.twice = nn.ModuleList([model.model.layers[1]])
    model.model.layers[2] = model.model.layers[1]
    named = Transformer(
        model=model, blocks=list(model.model.get_submodule(path)), blocks_path=path, name="odd"
    )
    with pytest.raises(InputError) as info:
        capture(named, Inputs(tokens=torch.ones(1, 4)), [0])
    assert str(info.value) == (
        f"{path}.0 of model odd is no block: expected a module that runs once in a forward pass, "
        "is given the residual stream (d_model 32) and returns it; name the list that holds the "
        "blocks with --blocks PATH"
    )


@pytest.mark.parametrize(
    ("sites", "line"),
    [
        (["resid"], r"no site 'resid': the sites are resid_pre, resid_mid, resid_post, attn_out, "),
        ([], r"expected one or more different sites, got \[\]"),
        (["mlp_out"] * 2, r"expected one or more different sites, got \['mlp_out', 'mlp_out'\]"),
    ],
)
def test_sites_that_can_be_no_models(transformer: Transformer, sites: list[str], line: str) -> None:
    with pytest.raises(InputError, match=line):
        check_sites(transformer, sites)


def test_of_an_outline_the_names_are_checked(model_directory: Path) -> None:
    sketch = outline(model_directory)
    assert check_sites(sketch, ["mlp_out", "resid_mid"]) == ("resid_mid", "mlp_out")
    with pytest.raises(InputError, match="there is no site 'middle'"):
        check_sites(sketch, ["middle"])
