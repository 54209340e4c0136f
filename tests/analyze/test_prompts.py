"""Prompts against a run of the model through plain torch hooks, in float64; and what is refused."""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from click.testing import CliRunner

from mlsae.analyze import Analysis, AnalyzeConfig, run
from mlsae.analyze.measure.model.prompts import read_texts
from mlsae.analyze.results.figures import registry
from mlsae.base.errors import InputError
from mlsae.cli import main
from mlsae.models import load
from mlsae.models.passes.control import control_rows
from mlsae.models.source.tokenizer import texts_of_tokens, token_ids
from mlsae.sae import load as load_sae
from mlsae.store import open_store

PROMPTS = ("for value in range(10): return", "import self", "class é: not $x$ 日")
LENGTH = 24
Events = dict[tuple[int, int, int], float]
"""(position, layer, latent) → value."""


def _analyzed(store: Path, sae: Path, out: Path, **settings: Any) -> Analysis:
    return run(AnalyzeConfig(cache=store, sae=sae, out=out, max_tokens=LENGTH, **settings))


def _ids(model: Path, text: str) -> list[int]:
    encoding = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json")).encode(
        text, add_special_tokens=False
    )
    return list(encoding.ids)


def _by_plain_hooks(
    model: Any, tokens: list[int], sae: Any, noise: torch.Tensor | None = None
) -> Events:
    """Latents active at the outputs of blocks 0 and 2, by the definition of the SAE."""
    seen: dict[int, Any] = {}

    def hook_of(layer: int) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            x = output if isinstance(output, torch.Tensor) else output[0]
            seen[layer] = x[0].double().numpy()

        return hook

    handles = [model.gpt_neox.layers[n].register_forward_hook(hook_of(n)) for n in (0, 2)]
    if noise is not None:
        embedding = model.gpt_neox.embed_in
        handles.append(embedding.register_forward_hook(lambda _m, _i, _o: noise[None]))
    with torch.no_grad():
        model(torch.tensor([tokens]))
    for handle in handles:
        handle.remove()
    found = {}
    for layer, x in seen.items():
        latents = sae.latents(x)
        for position, latent in zip(*np.nonzero(latents > 0), strict=True):
            found[int(position), layer, int(latent)] = float(latents[position, latent])
    return found


def _events(analysis: Analysis, number: int) -> Events:
    rows = [row for row in analysis.prompts.to_pylist() if row["prompt"] == number]
    found = {(row["position"], row["layer"], row["latent"]): row["value"] for row in rows}
    assert len(found) == len(rows)
    assert list(found) == sorted(found)
    return found


def _agree(found: Events, expected: Events) -> None:
    assert found.keys() == expected.keys()
    assert len(found) > 15
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("bos", ["auto", "always"])
def test_the_table_is_that_of_an_independent_run(
    bos: str,
    demo_model: Path,
    harvested: Callable[..., Path],
    sae_maker: Callable[..., Path],
    dense: Any,
    tmp_path: Path,
) -> None:
    """The demo's tokenizer adds no BOS by itself: only where the harvest was told to."""
    store = harvested(bos=bos)
    directory = sae_maker(store)
    file = tmp_path / "prompts.txt"
    file.write_text(f"{PROMPTS[1]}\n{PROMPTS[2]}\n", encoding="utf-8")
    analysis = _analyzed(
        store, directory, tmp_path / "out", prompts=PROMPTS[:1], prompt_file=file, figures=False
    )
    assert analysis.summary["prompts"] == list(PROMPTS)
    model = transformers.AutoModelForCausalLM.from_pretrained(demo_model).eval()
    sae = dense(load_sae(directory))
    for number, text in enumerate(PROMPTS):
        tokens = [0] * (bos == "always") + _ids(demo_model, text)
        _agree(_events(analysis, number), _by_plain_hooks(model, tokens, sae))
        for row in analysis.prompts.to_pylist():
            if row["prompt"] == number:
                assert row["token_id"] == tokens[row["position"]]
                assert row["eligible"] == (row["position"] > 0)
    rows = [row for row in analysis.prompts.to_pylist() if row["prompt"] == 0]
    pieces = {row["position"]: row["piece"] for row in rows}
    text = "".join(pieces[position] for position in sorted(pieces))
    assert text.removeprefix("<|endoftext|>") == PROMPTS[0]
    assert text.startswith("<|endoftext|>") == (bos == "always")


@pytest.mark.parametrize("init", ["rerandomized", "control"])
def test_prompts_run_through_the_initialisation_that_was_harvested(
    init: str,
    demo_model: Path,
    harvested: Callable[..., Path],
    sae_maker: Callable[..., Path],
    dense: Any,
    tmp_path: Path,
) -> None:
    """The control's noise for them is that of the tokens behind the text, a context each."""
    store = harvested(init=init, init_seed=3)
    directory = sae_maker(store)
    analysis = _analyzed(
        store, directory, tmp_path / "out", prompts=(PROMPTS[0], PROMPTS[0]), figures=False
    )
    model = load(demo_model, init=init, init_seed=3).model
    tokens = _ids(demo_model, PROMPTS[0])
    sae = dense(load_sae(directory))
    for number in range(2):
        noise = None
        if init == "control":
            first = open_store(store).num_tokens + number * LENGTH
            noise = torch.from_numpy(control_rows(3, first + np.arange(len(tokens)), 64))
        _agree(_events(analysis, number), _by_plain_hooks(model, tokens, sae, noise))
    assert (_events(analysis, 0) == _events(analysis, 1)) == (init != "control")


def test_each_prompt_has_a_heat_map_of_its_eligible_tokens(
    harvested_once: Path,
    sae_maker: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After the other figures, of which one is drawn here."""
    monkeypatch.setattr(registry, "FIGURES", {"sparsity": registry.FIGURES["sparsity"]})
    store = harvested_once
    analysis = _analyzed(store, sae_maker(store), tmp_path / "out", prompts=PROMPTS)
    assert analysis.figures == ("sparsity", "prompt_0", "prompt_1", "prompt_2")
    totals: dict[int, dict[int, float]] = defaultdict(lambda: {0: 0.0, 2: 0.0})
    for (position, layer, latent), value in _events(analysis, 1).items():
        if position > 0:
            totals[latent][layer] += value
    probs = sorted(
        (at[0] / (at[0] + at[2]) for at in totals.values()),
        reverse=True,
    )
    axes = analysis.figure("prompt_1").axes[0]
    image = np.asarray(axes.images[0].get_array())
    assert image.shape == (2, len(totals))
    np.testing.assert_allclose(image[0], probs, rtol=1e-5, atol=1e-6)
    assert f"{len(totals)} latents of “import self”" in axes.get_title(loc="left")
    for n in range(3):
        for suffix in ("png", "svg"):
            assert f"figures/prompt_{n}.{suffix}" in analysis.summary["figures"]
            assert (analysis.path / "figures" / f"prompt_{n}.{suffix}").stat().st_size > 3000
    # Dollar signs are no formula, and any script is text.
    assert "class é: not $x$ 日”</text>" in (analysis.path / "figures/prompt_2.svg").read_text(
        "utf-8"
    )


def test_without_a_prompt_the_table_is_empty(
    world: Any, sae_maker: Callable[..., Path], tmp_path: Path
) -> None:
    analysis = _analyzed(world.store, sae_maker(world.store), tmp_path / "out", figures=False)
    assert len(analysis.prompts) == 0
    assert analysis.summary["prompts"] == []
    assert not [name for name in analysis.figures if name.startswith("prompt")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": ("a", "")}, "prompt 2 of --prompt is empty: give it some text, or leave it"),
        ({"prompts": (" \n",)}, "prompt 1 of --prompt is empty: give it some text"),
        (
            {"prompts": (" return" * 30,)},
            "prompt 1 of --prompt is too long: it has 30 tokens and the store's sequences 24; ",
        ),
        ({"prompt_file": "absent"}, "--prompt-file .*absent: No such file or directory"),
        ({"prompt_file": "."}, "--prompt-file .*: Is a directory"),
        ({"prompt_file": "empty"}, "--prompt-file .*empty is empty: expected a prompt a line"),
        ({"prompt_file": "gap"}, "line 2 of .*gap is empty: give it some text, or leave it out"),
        ({"prompt_file": "latin"}, "--prompt-file .*latin: expected UTF-8 text, got other bytes"),
    ],
)
def test_prompts_that_cannot_be_run_are_refused_before_any_work(
    settings: dict[str, Any],
    message: str,
    harvested_once: Path,
    sae_maker: Callable[..., Path],
    tmp_path: Path,
) -> None:
    (tmp_path / "empty").write_text("")
    (tmp_path / "gap").write_text("one\n\nthree\n")
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    if "prompt_file" in settings:
        settings = {"prompt_file": tmp_path / settings["prompt_file"]}
    with pytest.raises(InputError, match=message):
        _analyzed(harvested_once, sae_maker(harvested_once), tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def harvested_once(harvested: Callable[..., Path]) -> Path:
    return harvested()


def test_the_command_takes_prompts_and_says_in_a_line_what_is_wrong(
    harvested: Callable[..., Path], sae_maker: Callable[..., Path], tmp_path: Path
) -> None:
    """A BOS counts; a prompt as long as a sequence is not too long."""
    store = harvested(bos="always")
    arguments = ["analyze", "--cache", str(store), "--sae", str(sae_maker(store))]
    arguments += ["--out", str(tmp_path / "out"), "--max-tokens", "24", "--no-figures"]
    long = CliRunner().invoke(main, [*arguments, "--prompt", "a", "--prompt", " return" * 24])
    assert long.exit_code == 1
    assert long.stderr == (
        "Error: prompt 2 of --prompt is too long: it has 25 tokens, the BOS that opens it "
        "included, and the store's sequences 24; shorten it\n"
    )
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(main, [*arguments, "--prompt", " return" * 23])
    assert done.exit_code == 0, done.stderr
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["figures"] == []
    assert "\nfigures " not in done.stdout


def test_prompts_without_their_transformer_or_its_tokenizer_are_refused(
    world: Any,
    demo_model: Path,
    harvested_once: Path,
    sae_maker: Callable[..., Path],
    sample: Any,
    tmp_path: Path,
) -> None:
    ask: dict[str, Any] = {"prompts": ("a",), "out": tmp_path / "out"}
    with pytest.raises(InputError, match=r"model holds no tokenizer: expected tokenizer\.json bes"):
        _analyzed(world.store, sae_maker(world.store), **ask)
    with pytest.raises(
        InputError,
        match="prompts need the transformer, and there is none: the store records no transformer",
    ):
        _analyzed(sample.path, sae_maker(sample.path), **ask)
    other = shutil.copytree(demo_model, tmp_path / "model")
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    words = vocabulary["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(InputError, match="is not the one this store was harvested with: expected"):
        _analyzed(harvested_once, sae_maker(harvested_once), model=other, **ask)
    assert not (tmp_path / "out").exists()


def test_pieces_keep_the_space_that_a_tokenizer_of_words_drops() -> None:
    words = {"▁a": 0, "▁Lily": 1, "play": 2, "ed": 3, "<s>": 4}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<s>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")
    assert tokenizer.decode([1]) == "Lily"
    assert texts_of_tokens(tokenizer, [4, 1, 2, 3, 1]) == ["<s>", " Lily", "play", "ed", " Lily"]


def test_token_that_a_tokenizer_cannot_decode_costs_no_other() -> None:
    class Decoder:
        def batch_decode(self, rows: list[list[int]], **_: Any) -> list[str]:
            return ["".join(["a", "b"][token] for token in row) for row in rows]

    assert texts_of_tokens(Decoder(), [0, 9, 1]) == ["a", "\ufffd", "b"]


def test_prompt_that_is_no_text_is_refused() -> None:
    """A terminal of another encoding hands it over so."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE())
    )
    with pytest.raises(InputError, match=r"a prompt is not valid Unicode: '\\udcff' after 'ab'"):
        token_ids(tokenizer, ["ab\udcff"], "prompt")


def test_prompts_of_a_file_come_after_those_given_and_keep_their_spaces(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b" one \r\ntwo")
    assert list(read_texts(("zero",), tmp_path / "file").values()) == ["zero", " one ", "two"]
