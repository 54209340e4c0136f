"""SAEs that are not converted, and the one line that says why; no foreign code is run."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from mlsae.cli import main
from mlsae.sae import SAE, SAEConfig, TopK, load
from mlsae.sae.formats.common import ConversionError
from mlsae.sae.formats.convert import export_sae

Make = Callable[..., Path]
D, N, K = 12, 48, 5
METADATA = {"sae_lens_version": "6.18.0", "hook_name": "blocks.7.hook_mlp_out"}
CENTRED = {"center_writing_weights": True, "fold_ln": True}


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(result: Result, message: str, out: Path) -> None:
    """One line, exit status 1, nothing made."""
    assert result.exit_code == 1, result.output
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not out.exists()


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        (
            "sparsify",
            {"normalize": "standardize"},
            "cannot be exported to sparsify: the SAE standardises each row, and that format has no "
            "place for a normalisation; saelens and mlsae have",
        ),
        ("dictionary-learning", {"normalize": "standardize"}, "has no place for a normalisation"),
        (
            "mlsae",
            {"bias": True},
            "cannot be exported to mlsae: the SAE has an encoder bias, and that format has no ",
        ),
        (
            "mlsae",
            {"site": "mlp_out"},
            "that format is for resid_post, the outputs of blocks, and the SAE has mlp_out",
        ),
        (
            "sparsify",
            {"site": "resid_mid"},
            "names the module whose output was encoded, and resid_mid is none that is the same in "
            "every transformer; resid_post and mlp_out are",
        ),
        ("gguf", {}, "--to must be one of saelens, sparsify, dictionary-learning, mlsae, gemma-"),
    ],
)
def test_what_a_format_cannot_express(
    to: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Nothing approximate is written."""
    config = SAEConfig(
        d_in=D,
        num_latents=N,
        architecture=TopK(K),
        normalize=options.get("normalize", "none"),
        encoder_bias=options.get("bias", False),
    )
    record = {"site": options.get("site", "resid_post"), "layers": [0, 1]}
    SAE(config).save(tmp_path / "run", record)
    out = tmp_path / "out"
    refused(command("export", tmp_path / "run", out, "--to", to), message, out)


def test_an_sae_without_layers_has_no_place_in_a_format_of_single_layers(
    make_foreign: Make, tmp_path: Path
) -> None:
    """A format with one file for all layers takes it."""
    made = command("import", make_foreign(tmp_path / "theirs", "mlsae"), tmp_path / "sae")
    assert "note: layers not known: to analyze it, import it again with --layers" in made.output
    out = tmp_path / "out"
    message = "does not say its site and layers, and that format holds one layer; import it"
    refused(command("export", tmp_path / "sae", out, "--to", "saelens"), message, out)
    assert command("export", tmp_path / "sae", out, "--to", "mlsae").exit_code == 0


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        ("saelens", {"architecture": "temporal"}, "of architecture 'temporal'; topk and standard"),
        (
            "saelens",
            {"normalize_activations": "expected_average_only_in"},
            "normalised by 'expected_average_only_in', which needs more than its files hold",
        ),
        ("saelens", {"apply_b_dec_to_input": None}, "an SAE with apply_b_dec_to_input None"),
        ("saelens", {"reshape_activations": "hook_z"}, "reshape_activations is 'hook_z'"),
        ("saelens", {"metadata": {}}, "was not written by SAELens 6 or later"),
        ("saelens", {"d_in": D + 1}, f"expected W_enc of shape ({D + 1}, {N}), got ({D}, {N})"),
        ("saelens", {"k": "5"}, "expected k as int, got '5'"),
        ("saelens", {"k": N + 1}, "k must be at most num_latents"),
        ("sparsify", {"activation": "groupmax"}, "activation is 'groupmax', and a TopK SAE has"),
        ("sparsify", {"transcode": True}, "transcode is True"),
        ("sparsify", {"skip_connection": True}, "skip_connection is True"),
        (
            "dictionary-learning",
            {"trainer": {"dict_class": "AutoEncoderNew"}},
            "it is a AutoEncoderNew, and what is understood is AutoEncoderTopK and AutoEnc",
        ),
        (
            "dictionary-learning",
            {"trainer": {"dict_class": "AutoEncoderTopK", "k": K + 1}},
            f"says k {K + 1}, ",
        ),
        ("saelens", {"noise": 0.1}, "noise (0.1) is no entry that is understood, so what the SAE"),
        (
            "saelens",
            {"metadata": METADATA | {"model_from_pretrained_kwargs": CENTRED}},
            "metadata.model_from_pretrained_kwargs.center_writing_weights is True, and an SAE that "
            "is imported has False",
        ),
        (
            "saelens",
            {"metadata": METADATA | {"model_from_pretrained_kwargs": {"checkpoint_value": 1000}}},
            "metadata.model_from_pretrained_kwargs.checkpoint_value (1000) is no entry that is un",
        ),
        (
            "saelens",
            {"metadata": METADATA | {"hook_head_index": 3}},
            "metadata.hook_head_index is 3, and an SAE that is imported has None",
        ),
        (
            "saelens",
            {"metadata": METADATA | {"hook_name_out": "blocks.7.hook_resid_post"}},
            "metadata.hook_name_out is 'blocks.7.hook_resid_post', and an SAE that is imported has",
        ),
        ("sparsify", {"signed": True}, "signed is True, and an SAE that is imported has False"),
        ("sparsify", {"ste_temperature": 1.0}, "ste_temperature (1.0) is no entry that is und"),
        (
            "dictionary-learning",
            {"trainer": {"dict_class": "AutoEncoderTopK", "k": K, "abs": True}},
            "trainer.abs (True) is no entry that is understood",
        ),
        (
            "dictionary-learning",
            {"trainer": {"dict_class": "AutoEncoderTopK", "k": K, "trainer_class": "AbsTopK"}},
            "trainer.trainer_class is 'AbsTopK', and an SAE that is imported has 'TopKTrainer' or",
        ),
        ("dictionary-learning", {"buffer": {"io": "in"}}, "buffer.io is 'in', and an SAE that is"),
        ("mlsae", {"signed": True}, "signed (True) is no entry that is understood"),
        ("mlsae", {"lens": True}, "it has a lens, a transformation of each layer of its own"),
        ("mlsae", {"tuned_lens": True}, "(tuned_lens is true)"),
        ("mlsae", {"standardize": None}, "expected standardize as bool, got None"),
    ],
)
def test_what_is_not_imported(
    form: str, changes: dict[str, Any], message: str, make_foreign: Make, tmp_path: Path
) -> None:
    """The file and the reason are named."""
    theirs, out = make_foreign(tmp_path / "theirs", form, **changes), tmp_path / "sae"
    refused(command("import", theirs, out), message, out)


def test_what_is_said_twice_must_agree(make_foreign: Make, tmp_path: Path) -> None:
    """An option completes what a file says; it does not overrule it."""
    theirs, out = make_foreign(tmp_path / "theirs", "saelens"), tmp_path / "sae"
    message = "records layers 7, but --layers is 0, 1; leave --layers out"
    refused(command("import", theirs, out, "--layers", "0,1"), message, out)
    message = "records site mlp_out, but --site is attn_out; leave --site out"
    refused(command("import", theirs, out, "--site", "attn_out"), message, out)
    message = "--site must be one of resid_pre, resid_mid, resid_post, attn_out, mlp_out, got"
    refused(command("import", theirs, out, "--site", "ln1"), message, out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W_skip": torch.zeros(D, D)}, "has tensors that are not understood, so what the SAE"),
        ({"W_dec": None}, "lacks the tensors W_dec"),
        ({"W_dec": torch.zeros(N, D, dtype=torch.float64)}, "W_dec is float64, which float32"),
        ({"b_dec": torch.full((D,), torch.nan)}, "b_dec holds values that are not finite"),
    ],
)
def test_tensors_that_are_not_as_expected(
    change: dict[str, torch.Tensor | None], message: str, make_foreign: Make, tmp_path: Path
) -> None:
    """Each is named."""
    theirs, out = make_foreign(tmp_path / "layers.1", "sparsify"), tmp_path / "sae"
    path = theirs / "sae.safetensors"
    changed = load_file(path) | change
    save_file({name: t for name, t in changed.items() if t is not None}, path)
    refused(command("import", theirs, out), message, out)


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_pickle_is_never_run(make_foreign: Make, tmp_path: Path) -> None:
    """Neither as torch writes it nor bare."""
    theirs, out = make_foreign(tmp_path / "theirs", "dictionary-learning"), tmp_path / "sae"
    payload, touched = Payload(tmp_path / "touched"), tmp_path / "touched"
    torch.save({"encoder.weight": payload}, theirs / "ae.pt")
    message = "is damaged or holds more than tensors, which is never run"
    refused(command("import", theirs, out), message, out)
    (theirs / "ae.pt").write_bytes(pickle.dumps(payload))
    refused(command("import", theirs, out), message, out)
    assert not touched.exists()
    pickle.loads((theirs / "ae.pt").read_bytes())
    assert touched.exists()


def test_files_that_are_damaged_or_unfinished(make_foreign: Make, tmp_path: Path) -> None:
    """Cut off, of another content, or not there."""
    learned, out = make_foreign(tmp_path / "learned", "dictionary-learning"), tmp_path / "sae"
    state = torch.load(learned / "ae.pt", weights_only=True)
    torch.save({"step": 3, "ae": state, "optimizer": {}}, learned / "ae.pt")
    refused(command("import", learned, out), "is the backup of a run that did not finish", out)
    torch.save([1, 2], learned / "ae.pt")
    refused(command("import", learned, out), "expected tensors by name, got list", out)
    torch.save(state | {"k": torch.tensor([5, 5])}, learned / "ae.pt")
    refused(command("import", learned, out), f"says k 5, {learned}/ae.pt has [5, 5]", out)
    generator = np.random.default_rng(0)
    for size in range(0, 200, 10):
        (learned / "ae.pt").write_bytes(generator.bytes(size))
        refused(command("import", learned, out), "is damaged or holds more than tensors", out)
    torch.save({"encoder.weight": 1}, learned / "ae.pt")
    refused(command("import", learned, out), "expected tensors by name, and it holds", out)
    lens = make_foreign(tmp_path / "lens", "saelens")
    (lens / "sae_weights.safetensors").write_bytes(b"\x08" + b"\0" * 20)
    refused(command("import", lens, out), "sae_weights.safetensors is damaged (", out)
    (lens / "cfg.json").write_text("{")
    refused(command("import", lens, out), "cfg.json is no JSON: ", out)
    (lens / "cfg.json").write_text("[]")
    refused(command("import", lens, out), "expected a JSON object, got list", out)
    (lens / "cfg.json").unlink()
    refused(command("import", lens, out), f"there is no SAE at {lens}: expected one of ae.pt", out)


def test_where_saes_are_in_folders_they_are_named(
    make_foreign: Make, make_sae: Make, tmp_path: Path
) -> None:
    """A repository of many; an SAE of this package; nothing at all."""
    for layer in range(6):
        make_foreign(tmp_path / "all" / f"layers.{layer}", "sparsify")
    out = tmp_path / "sae"
    folders = ", ".join(f"{tmp_path}/all/layers.{layer}" for layer in range(4))
    message = f"itself but in folders of it: give one of {folders} and 2 more"
    refused(command("import", tmp_path / "all", out), message, out)
    run = make_sae(tmp_path / "run", "none", bias=False)
    refused(command("import", run, out), "is an SAE of mlsae already: use it as it is", out)
    refused(command("import", tmp_path / "no", out), f"no SAE at {tmp_path}/no: no such direc", out)


def test_an_out_that_holds_something_is_left_alone(
    make_sae: Make, make_foreign: Make, tmp_path: Path
) -> None:
    """By either command; an empty directory is as good as none."""
    run, theirs = make_sae(tmp_path / "run", "none", bias=False), tmp_path / "theirs"
    make_foreign(theirs, "saelens")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    for arguments in (("export", run, tmp_path / "out", "--to", "mlsae"), ("import", theirs, run)):
        result = command(*arguments)
        assert result.exit_code == 1
        assert "is in use already: give a directory that is absent or empty" in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    assert load(run).training_record["layers"] == [0, 3]
    (tmp_path / "empty").mkdir()
    assert command("export", run, tmp_path / "empty", "--to", "mlsae").exit_code == 0


def test_what_the_commands_say(make_foreign: Make, tmp_path: Path) -> None:
    """Where everything went."""
    theirs = make_foreign(tmp_path / "theirs", "saelens", rescale_acts_by_decoder_norm=True)
    made = command("import", theirs, tmp_path / "sae")
    assert made.output.splitlines() == [
        "saelens: 48 latents of 12 channels, k 5, normalize none",
        "note: decoder norms folded into the encoder, rounded to float32",
        f"SAE: {tmp_path / 'sae'}",
    ]
    made = command("export", tmp_path / "sae", tmp_path / "out", "--to", "sparsify")
    assert made.output == f"SAE for sparsify: {tmp_path / 'out' / 'layers.7.mlp'}\n"


def test_the_refusal_is_a_class_of_its_own(make_sae: Make, tmp_path: Path) -> None:
    """For programs, which read no text."""
    run = make_sae(tmp_path / "run", "none", bias=True)
    with pytest.raises(ConversionError):
        export_sae(run, "mlsae", tmp_path / "out")


def test_entries_that_say_nothing_of_the_function_are_taken(
    make_foreign: Make, tmp_path: Path
) -> None:
    """Keys of training, and ways to load the model that leave its activations alone."""
    harmless = {
        "model_from_pretrained_kwargs": {"center_writing_weights": False, "dtype": "bfloat16"},
        "hook_head_index": None,
        "context_size": 128,
        "seqpos_slice": [None],
        "training_architecture": "topk",
        "training_architecture_details": {"k": K},
        "l0": 4.5,
        "num_dead_features": 3,
    }
    for form, changes in (
        ("saelens", {"metadata": METADATA | harmless, "aux_loss_coefficient": 1.0}),
        ("sparsify", {"signed": False, "multi_topk": True}),
        ("dictionary-learning", {"buffer": {"io": "out", "ctx_len": 128, "device": "cuda:0"}}),
        ("mlsae", {"auxk": 256, "dead_threshold": 1e-3, "model_name": "EleutherAI/pythia-70m"}),
    ):
        theirs = make_foreign(tmp_path / form, form, **changes)
        assert command("import", theirs, tmp_path / f"{form}-sae").exit_code == 0
