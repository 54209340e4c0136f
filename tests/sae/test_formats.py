"""SAEs of other tools: each format against its tool's formulas, transcribed in float64."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
import torch
from safetensors.torch import save_file

from mlsae.base.errors import InputError
from mlsae.sae import SAE, load
from mlsae.sae.formats.convert import export_sae, import_sae

Float = npt.NDArray[np.float64]
Make = Callable[..., Path]
D, N, K = 12, 48, 5
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


def rows() -> Float:
    """Rows of different spread and mean, as layers have them."""
    generator = np.random.default_rng(7)
    return generator.normal(size=(50, D)) * generator.uniform(1, 30, (50, 1)) + 3


def ours(sae: SAE, x: Float) -> Float:
    """x̂ in float64."""
    return np.asarray(sae.double()(torch.from_numpy(x)).detach().numpy())


def top_k(pre: Float, k: int) -> Float:
    """The k largest of each row where they are, 0 elsewhere."""
    return np.where(pre >= np.sort(pre, axis=1)[:, -k][:, None], pre, 0.0)


def read(path: Path) -> dict[str, Float]:
    """Tensors as float64, without this package."""
    tensors = (
        {name: t.numpy() for name, t in torch.load(path, weights_only=True).items()}
        if path.suffix == ".pt"
        else safetensors.numpy.load_file(path)
    )
    return {name: np.asarray(t, dtype=np.float64) for name, t in tensors.items()}


def saelens(directory: Path, x: Float) -> Float:
    """SAELens: x̂ = norm_out(a W_dec + b_dec), a = TopK((norm_in(x) − b_dec) W_enc + b_enc)⁺."""
    w, cfg = read(directory / "sae_weights.safetensors"), config(directory / "cfg.json")
    mean, std = np.zeros((len(x), 1)), np.ones((len(x), 1))
    u = x
    if cfg["normalize_activations"] == "layer_norm":
        mean = x.mean(axis=1, keepdims=True)
        std = (x - mean).std(axis=1, ddof=1, keepdims=True)
        u = (x - mean) / (std + 1e-5)
    pre = (u - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    norms = np.linalg.norm(w["W_dec"], axis=1)
    if cfg["rescale_acts_by_decoder_norm"]:
        pre = pre * norms
    acts = np.maximum(top_k(pre, cfg["k"]), 0)
    if cfg["rescale_acts_by_decoder_norm"]:
        acts = acts / norms
    return np.asarray((acts @ w["W_dec"] + w["b_dec"]) * std + mean)


def sparsify(directory: Path, x: Float) -> Float:
    """Sparsify: x̂ = a W_dec + b_dec, a = TopK(((x − b_dec) Eᵀ + e)⁺)."""
    w, cfg = read(directory / "sae.safetensors"), config(directory / "cfg.json")
    pre = np.maximum((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"], 0)
    assert len(pre[0]) == (cfg["num_latents"] or cfg["d_in"] * cfg["expansion_factor"])
    return np.asarray(top_k(pre, cfg["k"]) @ w["W_dec"] + w["b_dec"])


def dictionary_learning(directory: Path, x: Float) -> Float:
    """AutoEncoderTopK: x̂ = a Dᵀ + b_dec, a = TopK(((x − b_dec) Eᵀ + e)⁺)."""
    w, cfg = read(directory / "ae.pt"), config(directory / "config.json")
    pre = np.maximum((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"], 0)
    return np.asarray(top_k(pre, cfg["trainer"]["k"]) @ w["decoder.weight"].T + w["b_dec"])


def published(directory: Path, x: Float) -> Float:
    """The published module: x̂ = (a Dᵀ + b) σ + μ, a = TopK(((x − μ) / (σ + 1e-5) − b) Eᵀ)⁺."""
    w, cfg = read(directory / "model.safetensors"), config(directory / "config.json")
    w = {name.removeprefix("autoencoder."): tensor for name, tensor in w.items()}
    mean, std = np.zeros((len(x), 1)), np.ones((len(x), 1))
    u = x
    if cfg["standardize"]:
        mean, std = x.mean(axis=1, keepdims=True), x.std(axis=1, ddof=1, keepdims=True)
        u = (x - mean) / (std + 1e-5)
    acts = np.maximum(top_k((u - w["pre_encoder_bias"]) @ w["encoder.weight"].T, cfg["k"]), 0)
    recons = acts @ w["decoder.weight"].T + w["pre_encoder_bias"]
    return np.asarray(recons * std + mean)


def config(path: Path) -> dict[str, Any]:
    """A JSON object."""
    return dict(json.loads(path.read_text()))


FORWARD: dict[str, Callable[[Path, Float], Float]] = {
    "saelens": saelens,
    "sparsify": sparsify,
    "dictionary-learning": dictionary_learning,
    "mlsae": published,
}

EXPRESSIBLE = [
    ("saelens", "standardize", False),
    ("saelens", "standardize", True),
    ("saelens", "none", False),
    ("saelens", "none", True),
    ("sparsify", "none", False),
    ("sparsify", "none", True),
    ("dictionary-learning", "none", False),
    ("dictionary-learning", "none", True),
    ("mlsae", "standardize", False),
    ("mlsae", "none", False),
]


@pytest.mark.parametrize(("to", "normalize", "bias"), EXPRESSIBLE)
def test_an_export_computes_what_the_sae_does(
    to: str, normalize: str, bias: bool, make_sae: Make, tmp_path: Path
) -> None:
    """In float64, at every layer's folder; and imported again it is the same SAE to the bit."""
    run = make_sae(tmp_path / "run", normalize, bias=bias)
    sae, x = load(run), rows()
    for place, directory in enumerate(export_sae(run, to, tmp_path / "out")):
        np.testing.assert_allclose(FORWARD[to](directory, x), ours(load(run), x), **CLOSE)
        again = import_sae(directory, tmp_path / f"again{place}")
        assert again.config == sae.config
        for name, tensor in sae.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
        assert again.training_record["site"] == "resid_post"
        assert again.training_record["layers"] == [0, 3]


@pytest.mark.parametrize(
    ("to", "folders"),
    [
        ("saelens", ["blocks.0.hook_resid_post", "blocks.3.hook_resid_post"]),
        ("sparsify", ["layers.0", "layers.3"]),
        ("dictionary-learning", ["resid_post_layer_0/trainer_0", "resid_post_layer_3/trainer_0"]),
        ("mlsae", ["."]),
    ],
)
def test_a_format_of_single_layers_gets_a_folder_a_layer(
    to: str, folders: list[str], make_sae: Make, tmp_path: Path
) -> None:
    """Named as the tool names hook points, all with the same weights, kept once."""
    run = make_sae(tmp_path / "run", "none", bias=False)
    written = export_sae(run, to, tmp_path / "out", model="EleutherAI/pythia-70m")
    assert [path.relative_to(tmp_path / "out").as_posix() for path in written] == folders
    files = [sorted(p for p in path.iterdir() if p.suffix != ".json") for path in written]
    assert len({p.stat().st_ino for (p,) in files}) == 1
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_what_an_export_says_of_the_model_and_the_hook_point(
    make_sae: Make, tmp_path: Path
) -> None:
    """As each tool reads it."""
    run = make_sae(tmp_path / "run", "none", bias=False, layers=(3,))
    name = "EleutherAI/pythia-70m"
    (lens,) = export_sae(run, "saelens", tmp_path / "a", model=name)
    metadata = config(lens / "cfg.json")["metadata"]
    assert metadata["model_name"] == name
    assert metadata["hook_name"] == "blocks.3.hook_resid_post"
    assert metadata["model_from_pretrained_kwargs"] == {"center_writing_weights": False}
    (learned,) = export_sae(run, "dictionary-learning", tmp_path / "b", model=name)
    trainer = config(learned / "config.json")["trainer"]
    assert (trainer["lm_name"], trainer["layer"]) == (name, 3)
    (multi,) = export_sae(run, "mlsae", tmp_path / "c", model=name)
    assert config(multi / "config.json") == {
        "n_inputs": D,
        "n_latents": N,
        "k": K,
        "dead_steps_threshold": 10_000_000,
        "dead_threshold": 1e-3,
        "auxk": N,
        "standardize": False,
        "layers": [3],
    }
    record = import_sae(lens, tmp_path / "d").training_record
    assert record["imported"]["model"] == name


@pytest.mark.parametrize(
    ("form", "changes"),
    [
        ("saelens", {}),
        ("saelens", {"normalize_activations": "layer_norm"}),
        ("sparsify", {}),
        ("sparsify", {"num_latents": 0, "expansion_factor": 4}),
        ("dictionary-learning", {}),
        ("mlsae", {}),
        ("mlsae", {"standardize": False, "layers": None, "skip_special_tokens": True}),
    ],
)
def test_an_import_computes_what_the_tool_does(
    form: str, changes: dict[str, Any], make_foreign: Make, tmp_path: Path
) -> None:
    """In float64, weights as they were; trained encoder biases included."""
    directory = make_foreign(tmp_path / "layers.2", form, **changes)
    sae = import_sae(directory, tmp_path / "sae")
    assert sae.training_record["imported"]["changes"] == []
    np.testing.assert_allclose(ours(sae, rows()), FORWARD[form](directory, rows()), **CLOSE)


def test_decoder_norms_that_saelens_multiplies_by_are_folded(
    make_foreign: Make, tmp_path: Path
) -> None:
    """Rounded to float32 once, and said so; a latent that writes nothing stays silent."""
    directory = make_foreign(tmp_path / "lens", "saelens", rescale_acts_by_decoder_norm=True)
    sae = import_sae(directory, tmp_path / "sae")
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(N))
    expected = saelens(directory, rows())
    np.testing.assert_allclose(ours(sae, rows()), expected, rtol=1e-5, atol=1e-4)
    assert sae.training_record["imported"]["changes"] == [
        "decoder norms folded into the encoder, rounded to float32"
    ]


@pytest.mark.parametrize("of", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_widened(
    of: torch.dtype, make_foreign: Make, tmp_path: Path
) -> None:
    """Exactly."""
    directory = make_foreign(tmp_path / "layers.1", "sparsify", of=of)
    sae = import_sae(directory, tmp_path / "sae")
    assert sae.W_dec.dtype == torch.float32
    widened = safetensors.torch.load_file(directory / "sae.safetensors")["W_dec"].float()
    assert torch.equal(sae.W_dec, widened)


@pytest.mark.parametrize(
    ("form", "folder", "site", "layers"),
    [
        ("saelens", "any", "mlp_out", [7]),
        ("sparsify", "layers.11", "resid_post", [11]),
        ("sparsify", "h.11.mlp", "mlp_out", [11]),
        ("sparsify", "layers.2.self_attn", "attn_out", [2]),
        ("sparsify", "embed_tokens", None, None),
        ("dictionary-learning", "trainer_0", "resid_post", [4]),
        ("mlsae", "any", "resid_post", None),
    ],
)
def test_where_an_imported_sae_belongs(
    form: str,
    folder: str,
    site: str | None,
    layers: list[int] | None,
    make_foreign: Make,
    tmp_path: Path,
) -> None:
    """As its files or its folder say; what they do not say is left out."""
    record = import_sae(make_foreign(tmp_path / folder, form), tmp_path / "sae").training_record
    assert record.get("site") == site
    assert record.get("layers") == layers


def test_a_published_sae_with_its_transformer(make_foreign: Make, tmp_path: Path) -> None:
    """Tensors under `autoencoder.` alone are read; the transformer says how many layers."""
    directory = make_foreign(tmp_path / "plain", "mlsae")
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    whole = {f"autoencoder.{name}": tensor for name, tensor in tensors.items()}
    for layer in range(6):
        whole[f"transformer.model.gpt_neox.layers.{layer}.mlp.bias"] = torch.zeros(2)
    save_file(whole, directory / "model.safetensors")
    said = {"model_name": "EleutherAI/pythia-70m-deduped", "layers": None, "tuned_lens": False}
    path = directory / "config.json"
    path.write_text(json.dumps(config(path) | said))
    sae = import_sae(directory, tmp_path / "sae")
    assert sae.training_record["layers"] == [0, 1, 2, 3, 4, 5]
    assert sae.training_record["imported"]["model"] == "EleutherAI/pythia-70m-deduped"
    np.testing.assert_allclose(ours(sae, rows()), published(directory, rows()), **CLOSE)


def test_what_the_record_of_an_imported_sae_says(make_foreign: Make, tmp_path: Path) -> None:
    """Where it came from, and null where nothing is known."""
    directory = make_foreign(tmp_path / "lens", "saelens")
    record = import_sae(directory, tmp_path / "sae", site="mlp_out", layers=(7,)).training_record
    imported = record["imported"]
    assert (imported["format"], imported["source"]) == ("saelens", str(directory))
    assert imported["configuration"] == config(directory / "cfg.json")
    assert imported["sha256"].keys() == {"cfg.json", "sae_weights.safetensors"}
    unknown = ("store_id", "plan_id", "model_fingerprint", "metrics")
    assert [record[key] for key in unknown] == [None] * 4
    assert record["validation"] == {"fraction": 0.0, "seed": 0, "tokens_sha256": None}


def test_an_imported_sae_is_analyzed_with_a_store_that_fits(
    sample_maker: Callable[..., Any], make_foreign: Make, tmp_path: Path
) -> None:
    """On trust, which the notes say; where site or layers are not known, what to give."""
    from mlsae.analyze.pairing import pair

    store = sample_maker(d_model=D, source={"model": {"fingerprint": "f" * 64}}).path
    directory = make_foreign(tmp_path / "hub", "mlsae")
    import_sae(directory, tmp_path / "unsaid")
    with pytest.raises(InputError, match=r"lacks layers; import it again with --layers$"):
        pair(store, tmp_path / "unsaid", torch.device("cpu"))
    import_sae(directory, tmp_path / "sae", layers=(0, 1))
    pairing = pair(store, tmp_path / "sae", torch.device("cpu"))
    assert (pairing.site, pairing.layers, pairing.skip_positions) == ("resid_post", (0, 1), 1)
    (note,) = pairing.notes
    assert note == (
        f"the SAE was imported from {directory}: that its transformer (which it does not name) is "
        f"the store's, and which text it was trained on, has not been checked"
    )


@pytest.mark.parametrize("normalize", ["standardize", "none"])
@pytest.mark.parametrize("bias", [False, True])
def test_encode_and_decode_take_any_leading_shape(
    normalize: str, bias: bool, make_sae: Make, tmp_path: Path
) -> None:
    """On whatever device there is, in any floating dtype: what flat float32 rows give."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sae = load(make_sae(tmp_path / "run", normalize, bias=bias), device=device)
    flat = torch.from_numpy(rows()).to(device).half()
    expected = sae.decode(sae.encode(flat.float()))
    assert expected.device.type == device
    for shape in ((50,), (5, 10), (2, 5, 5), (1, 1, 50, 1)):
        latents = sae.encode(flat.view(*shape, D))
        assert latents.values.shape == latents.indices.shape == (*shape, K)
        torch.testing.assert_close(sae.decode(latents).view(50, D), expected)
    assert sae.decode(sae.encode(flat[0])).shape == (D,)
    assert sae.decode(sae.encode(flat[:0].view(0, 3, D))).shape == (0, 3, D)


def test_odd_values_in_a_foreign_configuration(make_foreign: Make, tmp_path: Path) -> None:
    """Layers that are none are not known; numbers that JSON has no place for are kept as text."""
    for place, layers in enumerate((["x"], [], [1, 1], [-1], [True], "all", 3)):
        theirs = make_foreign(tmp_path / f"a{place}", "mlsae", layers=layers)
        assert "layers" not in import_sae(theirs, tmp_path / f"b{place}").training_record
    theirs = make_foreign(tmp_path / "theirs", "mlsae")
    path = theirs / "config.json"
    path.write_text(path.read_text().replace("{", '{"lr": 1e999, "auxk_coef": NaN, ', 1))
    imported = import_sae(theirs, tmp_path / "sae").training_record["imported"]
    assert imported["configuration"]["lr"] == "1e999"
    assert imported["configuration"]["auxk_coef"] == "NaN"
