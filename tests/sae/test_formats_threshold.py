"""SAEs with latents above a threshold in other tools' formats, in float64 transcriptions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mlsae.sae import SAE, Architecture, SAEConfig, load
from mlsae.sae.architectures import BatchTopK, JumpReLU
from mlsae.sae.formats.common import ConversionError
from mlsae.sae.formats.convert import export_sae, import_sae

D, N, LAYERS = 12, 48, (0, 3)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LOG = "activation_function.log_jumprelu_threshold"
Tensors = dict[str, torch.Tensor]


def make(path: Path, architecture: Architecture, **settings: Any) -> Path:
    """An SAE with every weight drawn, thresholds among the pre-activations there are."""
    config = SAEConfig(d_in=D, num_latents=N, architecture=architecture, **settings)
    sae = SAE(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.normal_(generator=generator)
            if name == "threshold":
                parameter.abs_()
        if sae.layer_shift is not None:
            sae.layer_shift.normal_(generator=generator)
        if sae.layer_factor is not None:
            sae.layer_factor.copy_(torch.tensor([0.3, 5.0]))
    sae.save(path, {"site": "resid_post", "layers": list(LAYERS)})
    return path


x = torch.from_numpy(np.random.default_rng(1).normal(1, 3, (50, D)))


def jumped(pre: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """H(h − θ) ReLU(h)."""
    return pre.relu() * (pre > threshold)


def saelens(directory: Path) -> torch.Tensor:
    """`jumprelu` and `gated` of SAELens, with its `layer_norm` or none."""
    w = {n: t.double() for n, t in load_file(directory / "sae_weights.safetensors").items()}
    cfg = json.loads((directory / "cfg.json").read_text())
    assert "k" not in cfg
    mean, std = torch.zeros(len(x), 1), torch.ones(len(x), 1)
    u = x
    if cfg["normalize_activations"] == "layer_norm":
        mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        u = (x - mean) / (std + 1e-5)
    c = u - w["b_dec"] if cfg["apply_b_dec_to_input"] else u
    if cfg["architecture"] == "gated":
        magnitude = c @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]
        acts = (c @ w["W_enc"] + w["b_gate"] > 0) * magnitude.relu()
    else:
        assert cfg["architecture"] == "jumprelu"
        acts = jumped(c @ w["W_enc"] + w["b_enc"], w["threshold"])
    return (acts @ w["W_dec"] + w["b_dec"]) * std + mean


def dictionary_learning(directory: Path) -> torch.Tensor:
    """The class that config.json names."""
    w = {n: t.double() for n, t in torch.load(directory / "ae.pt", weights_only=True).items()}
    trainer = json.loads((directory / "config.json").read_text())["trainer"]
    kind = trainer["dict_class"]
    if kind == "JumpReluAutoEncoder":
        assert w.keys() == {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}
        return jumped(x @ w["W_enc"] + w["b_enc"], w["threshold"]) @ w["W_dec"] + w["b_dec"]
    if kind == "GatedAutoEncoder":
        pre = (x - w["decoder_bias"]) @ w["encoder.weight"].T
        magnitude = (w["r_mag"].exp() * pre + w["mag_bias"]).relu()
        acts = (pre + w["gate_bias"] > 0) * magnitude
        return acts @ w["decoder.weight"].T + w["decoder_bias"]
    assert w["k"] == trainer["k"]
    assert w["threshold"].shape == ()
    if kind == "MatryoshkaBatchTopKSAE":
        assert w["group_sizes"].sum() == N
        pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
        return jumped(pre, w["threshold"]) @ w["W_dec"] + w["b_dec"]
    assert kind == "BatchTopKSAE"
    pre = (x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]
    return jumped(pre, w["threshold"]) @ w["decoder.weight"].T + w["b_dec"]


def gemma_scope(directory: Path) -> torch.Tensor:
    """x̂ = a W_dec + b_dec, a = JumpReLU_θ(x W_enc + b_enc)."""
    with np.load(directory / "params.npz") as arrays:
        assert {arrays[name].dtype for name in arrays.files} == {np.dtype(np.float32)}
        w = {name: torch.from_numpy(arrays[name]).double() for name in arrays.files}
    return jumped(x @ w["W_enc"] + w["b_enc"], w["threshold"]) @ w["W_dec"] + w["b_dec"]


def llamascopium(directory: Path) -> torch.Tensor:
    """x̂ = a W_D + b_D, a = JumpReLU_θ(x W_E + b_E) · ‖W_D‖ / ‖W_D‖ where so set."""
    w = {n: t.double() for n, t in load_file(directory / "sae_weights.safetensors").items()}
    cfg = json.loads((directory / "config.json").read_text())
    assert (cfg["act_fn"], cfg["norm_activation"]) == ("jumprelu", "inference")
    norms = w["W_D"].norm(dim=1) if cfg["sparsity_include_decoder_norm"] else torch.ones(())
    return jumped((x @ w["W_E"] + w["b_E"]) * norms, w[LOG].exp()) / norms @ w["W_D"] + w["b_D"]


FORWARD: dict[str, Callable[[Path], torch.Tensor]] = {
    "saelens": saelens,
    "dictionary-learning": dictionary_learning,
    "gemma-scope": gemma_scope,
    "llamascopium": llamascopium,
}
STATE: dict[str, dict[str, Any]] = {
    "none": {"normalize": "none"},
    "standardize": {},
    "scale": {"normalize": "scale", "layers": LAYERS},
    "center": {"normalize": "center", "layers": LAYERS},
}
BY_LAYER = BatchTopK(4, "layer")


@pytest.mark.parametrize("to", FORWARD)
@pytest.mark.parametrize(
    ("architecture", "state"),
    [
        (JumpReLU(), "none"),
        (JumpReLU(), "standardize"),
        (JumpReLU(), "scale"),
        (BatchTopK(4), "center"),
        (BY_LAYER, "scale"),
        (BY_LAYER, "standardize"),
    ],
)
def test_an_export_computes_what_the_sae_does(
    to: str, architecture: Architecture, state: str, tmp_path: Path
) -> None:
    """A folder a layer, thresholds of that layer in it; read again it is the same function."""
    settings = STATE[state] | ({"layers": LAYERS} if architecture == BY_LAYER else {})
    run = make(tmp_path / "run", architecture, **settings)
    if state == "standardize" and to != "saelens":
        with pytest.raises(ConversionError, match="the SAE standardises each row, and that for"):
            export_sae(run, to, tmp_path / "out")
        return
    for directory, layer in zip(export_sae(run, to, tmp_path / "out"), LAYERS, strict=True):
        expected = load(run).double()(x, layer).detach()
        assert (expected != 0).any()
        torch.testing.assert_close(FORWARD[to](directory), expected, **CLOSE)
        again = import_sae(directory, tmp_path / f"again{layer}", site="resid_post")
        torch.testing.assert_close(again.double()(x).detach(), expected, **CLOSE)
        assert layer in again.training_record["layers"]


def test_weights_that_need_no_change_come_back_to_the_bit(tmp_path: Path) -> None:
    """JumpReLU by SAELens, BatchTopK and its prefixes by dictionary_learning."""
    widths = (6, 18, N)
    for place, (to, architecture, settings) in enumerate(
        (
            ("saelens", JumpReLU(), {"encoder_bias": True}),
            ("dictionary-learning", BatchTopK(4), STATE["none"]),
            ("dictionary-learning", BatchTopK(4), STATE["none"] | {"matryoshka_widths": widths}),
        )
    ):
        run = make(tmp_path / f"run{place}", architecture, **settings)
        sae = load(run)
        directory, _ = export_sae(run, to, tmp_path / f"out{place}")
        again = import_sae(directory, tmp_path / f"again{place}")
        assert again.config == sae.config
        assert again.training_record["imported"]["changes"] == []
        for name, tensor in sae.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name


def drawn() -> Tensors:
    """Weights as most tools hold them."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"W_enc": (D, N), "W_dec": (N, D), "b_dec": (D,), "b_enc": (N,), "threshold": (N,)}
    found = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    found["threshold"].abs_()
    for name in ("gate", "mag", "r"):
        found[name] = torch.randn(N, generator=generator)
    return found


def of_saelens(path: Path, **changes: Any) -> Path:
    w = drawn()
    cfg = {
        "architecture": "jumprelu",
        "d_in": D,
        "d_sae": N,
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.7.hook_mlp_out"},
    } | changes
    kept = ("W_enc", "W_dec", "b_dec", "b_enc", "threshold")
    tensors = {name: w[name] for name in kept}
    if cfg["architecture"] == "gated":
        tensors = {name: w[name] for name in kept[:3]}
        tensors |= {"b_gate": w["gate"], "b_mag": w["mag"], "r_mag": w["r"]}
    path.mkdir()
    (path / "cfg.json").write_text(json.dumps(cfg))
    save_file(tensors, path / "sae_weights.safetensors")
    return path


def of_dictionary_learning(path: Path, kind: str, **changes: Any) -> Path:
    w = drawn()
    linear = {"encoder.weight": w["W_enc"].T, "decoder.weight": w["W_dec"].T}
    one = {"k": torch.tensor(4, dtype=torch.int32), "threshold": torch.tensor(0.7)}
    matrices = {name: w[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    gates = {"gate_bias": w["gate"], "mag_bias": w["mag"], "r_mag": w["r"]}
    tensors = {
        "BatchTopKSAE": linear | {"encoder.bias": w["b_enc"], "b_dec": w["b_dec"]} | one,
        "MatryoshkaBatchTopKSAE": matrices | one | {"group_sizes": torch.tensor([6, 12, 30])},
        "JumpReluAutoEncoder": matrices | {"threshold": w["threshold"]},
        "GatedAutoEncoder": linear | {"decoder_bias": w["b_dec"]} | gates,
    }[kind] | changes
    path.mkdir()
    torch.save({n: t.clone() for n, t in tensors.items()}, path / "ae.pt")
    trainer = {"dict_class": kind, "layer": 4, "submodule_name": "resid_post_layer_4"}
    if "k" in tensors:
        trainer["k"] = 4
    (path / "config.json").write_text(json.dumps({"trainer": trainer}))
    return path


def of_gemma_scope(path: Path, **changes: Any) -> Path:
    w = drawn()
    arrays = {name: w[name].numpy() for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    path.mkdir(parents=True)
    np.savez(path / "params.npz", **(arrays | changes))
    return path


def imported(directory: Path, forward: Callable[[Path], torch.Tensor], out: Path) -> SAE:
    """The SAE, which computes what the tool does."""
    sae = import_sae(directory, out)
    expected = forward(directory)
    torch.testing.assert_close(sae.double()(x).detach(), expected, rtol=1e-4, atol=1e-4)
    return sae


@pytest.mark.parametrize("architecture", ["jumprelu", "gated"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"apply_b_dec_to_input": False}, {"normalize_activations": "layer_norm"}],
)
def test_an_sae_of_saelens_is_imported(
    architecture: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Gates become thresholds; a bias that is not subtracted goes into the encoder's."""
    directory = of_saelens(tmp_path / "theirs", architecture=architecture, **changes)
    sae = imported(directory, saelens, tmp_path / "sae")
    assert sae.architecture == JumpReLU()
    said = sae.training_record["imported"]["changes"]
    assert any("gates made thresholds, rounded" in change for change in said) == (
        architecture == "gated"
    )


@pytest.mark.parametrize(
    ("kind", "architecture", "widths"),
    [
        ("BatchTopKSAE", BatchTopK(4), None),
        ("MatryoshkaBatchTopKSAE", BatchTopK(4), (6, 18, 48)),
        ("JumpReluAutoEncoder", JumpReLU(), None),
        ("GatedAutoEncoder", JumpReLU(), None),
    ],
)
def test_an_sae_of_dictionary_learning_is_imported(
    kind: str, architecture: Architecture, widths: tuple[int, ...] | None, tmp_path: Path
) -> None:
    """Each of its classes with a threshold; one that was never set is 0."""
    directory = of_dictionary_learning(tmp_path / "theirs", kind)
    sae = imported(directory, dictionary_learning, tmp_path / "sae")
    assert (sae.architecture, sae.config.matryoshka_widths) == (architecture, widths)
    if kind == "BatchTopKSAE":
        unset = of_dictionary_learning(tmp_path / "unset", kind, threshold=torch.tensor(-1.0))
        assert imported(unset, dictionary_learning, tmp_path / "sae0").weights["threshold"] == 0


def test_an_sae_of_gemma_scope_is_imported(tmp_path: Path) -> None:
    """Site and layer from the names of repository and folders, as far as those are there."""
    place = "google--gemma-scope-2b-pt-mlp/snapshots/0/layer_20/width_16k/average_l0_71"
    record = imported(
        of_gemma_scope(tmp_path / place), gemma_scope, tmp_path / "sae"
    ).training_record
    assert (record["site"], record["layers"]) == ("mlp_out", [20])
    assert record["imported"]["sha256"].keys() == {"params.npz"}
    nameless = import_sae(of_gemma_scope(tmp_path / "plain"), tmp_path / "sae2").training_record
    assert not {"site", "layers"} & nameless.keys()


def test_an_sae_of_llamascopium_is_imported(tmp_path: Path) -> None:
    """Logarithms of thresholds, one of them of 0."""
    w = drawn()
    cfg = {
        "sae_type": "sae",
        "d_model": D,
        "expansion_factor": N / D,
        "act_fn": "jumprelu",
        "norm_activation": "inference",
        "sparsity_include_decoder_norm": True,
        "hook_point_in": "blocks.7.hook_mlp_out",
        "hook_point_out": "blocks.7.hook_mlp_out",
    }
    tensors = {"W_E": w["W_enc"], "b_E": w["b_enc"], "W_D": w["W_dec"], "b_D": w["b_dec"]}
    tensors[LOG] = w["threshold"].log()
    tensors[LOG][3] = -torch.inf
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(cfg))
    save_file(tensors, tmp_path / "theirs" / "sae_weights.safetensors")
    sae = imported(tmp_path / "theirs", llamascopium, tmp_path / "sae")
    assert sae.weights["threshold"][3] == 0
    changes = sae.training_record["imported"]["changes"]
    assert changes[-1] == "thresholds taken from logarithms, rounded to float32"


@pytest.mark.parametrize(
    ("make_theirs", "message"),
    [
        (
            lambda path: of_dictionary_learning(
                path, "MatryoshkaBatchTopKSAE", group_sizes=torch.tensor([6, 12])
            ),
            "matryoshka_widths must end with num_latents",
        ),
        (
            lambda path: of_dictionary_learning(
                path, "MatryoshkaBatchTopKSAE", group_sizes=torch.tensor(0.5)
            ),
            "expected group_sizes, a list of whole numbers",
        ),
        (
            lambda path: of_dictionary_learning(path, "BatchTopKSAE", threshold=torch.ones(N)),
            r"expected threshold of shape \(\), got \(48,\)",
        ),
        (lambda path: of_gemma_scope(path, W_enc=np.zeros(3)), "has no W_enc of shape"),
        (lambda path: of_gemma_scope(path, noise=np.zeros(3)), "not understood.*: noise"),
        (
            lambda path: of_gemma_scope(path, threshold=np.array([{}])),
            "is damaged or holds more than numbers",
        ),
        (
            lambda path: of_gemma_scope(path / "gemma-scope-2b-pt-att" / "layer_1"),
            "it is an SAE of gemma-scope's att, whose rows are of no site here; res and mlp are",
        ),
    ],
)
def test_what_is_not_imported(
    make_theirs: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    """The file and the reason are named."""
    with pytest.raises(ValueError, match=message):
        import_sae(make_theirs(tmp_path / "theirs"), tmp_path / "sae")


def test_an_archive_that_is_cut_off_is_damaged(tmp_path: Path) -> None:
    """At any byte."""
    directory = of_gemma_scope(tmp_path / "theirs")
    content = (directory / "params.npz").read_bytes()
    for size in (0, 1, 100, len(content) // 2, len(content) - 1):
        (directory / "params.npz").write_bytes(content[:size])
        with pytest.raises(ConversionError, match=r"params\.npz is "):
            import_sae(directory, tmp_path / "sae")


def test_formats_of_topk_refuse_thresholds(tmp_path: Path) -> None:
    """They have no place for them."""
    run = make(tmp_path / "run", JumpReLU(), normalize="none")
    for to in ("sparsify", "mlsae"):
        message = f"to {to}: the SAE has architecture jumprelu, and that format can hold only topk"
        with pytest.raises(ConversionError, match=message):
            export_sae(run, to, tmp_path / "out")
