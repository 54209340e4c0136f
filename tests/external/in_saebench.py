"""Run by SAELens's interpreter, with mlsae on its path: SAEBench's measures of `SAE X OUT LAYER`.

X has rows by class, `train/CLASS` and `test/CLASS` (texts, tokens, channels); OUT gets what
SAEBench computed, and inputs that it drew by chance.
"""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import sae_bench.evals.core.main as core
import sae_bench.evals.scr_and_tpp.main as tpp
import sae_bench.evals.sparse_probing.main as probing
import sae_bench.evals.sparse_probing.probe_training as probe_training
import torch
from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig
from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
from sae_bench.sae_bench_utils import activation_collection, general_utils
from sae_lens.analysis.hooked_sae_transformer import HookedSAETransformer
from transformer_lens import HookedTransformerConfig
from transformer_lens.hook_points import HookPoint

from mlsae.sae import load
from mlsae.sae.formats.saebench import SAEBenchModule

DATASET = "LabHC/bias_in_bios_class_set1"
"""Name under which SAEBench knows the classes; their rows are the caller's."""


def measure(tool, rows, folder):
    """Sparse probing and TPP, from activations where SAEBench looks for cached ones."""
    general_utils.load_and_format_sae("ours", tool, "cpu")
    means = {
        part: activation_collection.create_meaned_model_activations(rows[part]) for part in rows
    }
    torch.manual_seed(0)
    probes, accuracies = probe_training.train_probe_on_activations(
        means["train"], means["test"], use_sklearn=False, epochs=30, lr=1e-2
    )
    folder.mkdir()
    name = DATASET.replace("/", "_")
    torch.save(
        rows | {"llm_results": {"llm_test_accuracy": accuracies}}, folder / f"{name}_activations.pt"
    )
    kept = {"llm_probes": probes, "llm_test_accuracies": accuracies}
    (folder / f"{name}_probes.pkl").write_bytes(pickle.dumps(kept))
    settings = {"dataset_names": [DATASET], "model_name": "gpt2"}
    config = SparseProbingEvalConfig(**settings, k_values=[1, 2])
    found = {"probing": probing.run_eval_single_sae(config, tool, None, "cpu", str(folder))[0]}
    config = ScrAndTppEvalConfig(**settings, perform_scr=False, n_values=[1])
    found["tpp"] = tpp.run_eval_single_sae(config, tool, None, "cpu", str(folder))[0]
    found["accuracies"] = accuracies
    return found, probes


def effects(tool, rows, probes):
    """SAEBench's effects of all latents on one probe, one ablation, and the rows that it drew."""
    one = next(iter(rows["train"]))
    torch.manual_seed(1)
    drawn, labels = probe_training.prepare_probe_data(rows["train"], one)
    torch.manual_seed(1)
    found = tpp.get_effects_per_class_precomputed_acts(
        tool, probes[one], one, rows["train"], False, 16
    )
    ablated = tpp.select_top_n_features(found, 3, one)
    return {
        "drawn": drawn,
        "labels": labels,
        "probe": probes[one].net.weight.detach()[0],
        "effects": found,
        "ablated": ablated,
        "without": tpp.ablated_precomputed_activations(rows["test"][one], tool, ablated, 16),
    }


def splice(sae, layer):
    """Differences of logits: spliced by SAELens and by hand, and with the error kept."""
    torch.manual_seed(2)
    width = sae.config.d_in
    shape = {"n_layers": layer + 1, "d_model": width, "n_ctx": 8, "d_head": 8, "d_vocab": 11}
    model = HookedSAETransformer(HookedTransformerConfig(**shape, act_fn="relu")).eval()
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    options = {"layer": layer, "model_name": "tiny", "hook_point": HookPoint}
    whole = SAEBenchModule(sae, purpose="reconstruction", **options)
    latents = SAEBenchModule(sae, purpose="latents", **options)
    hook = whole.cfg.hook_name
    by_hand = model.run_with_hooks(tokens, fwd_hooks=[(hook, lambda x, **_: sae(x))])
    spliced = model.run_with_saes(tokens, saes=[whole])
    plain = model(tokens)
    kept, cache = model.run_with_cache_with_saes(tokens, saes=[latents], use_error_term=True)
    f = cache[f"{hook}.hook_sae_acts_post"]
    strongest = int(f.sum((0, 1)).argmax())

    def remove(f, **_):
        f[..., strongest] = 0
        return f

    with model.saes(saes=[latents], use_error_term=True):
        edited = model.run_with_hooks(tokens, fwd_hooks=[(f"{hook}.hook_sae_acts_post", remove)])
    effect = f[..., strongest, None] * sae.W_dec[strongest]
    expected = model.run_with_hooks(tokens, fwd_hooks=[(hook, lambda x, **_: x - effect)])
    return {
        "spliced": float((spliced - by_hand).abs().max()),
        "kept": float((kept - plain).abs().max()),
        "edited": float((edited - expected).abs().max()),
        "changed": float((edited - plain).abs().max()),
        "active": int((f > 0).sum(-1).max()),
    }


def main(directory, path, out, layer):
    out, layer = Path(out), int(layer)
    arrays = np.load(path)
    rows = {"train": {}, "test": {}}
    for name in arrays.files:
        part, _, kind = name.partition("/")
        rows[part][kind] = torch.from_numpy(arrays[name])
    sae = load(directory)
    tool = SAEBenchModule(sae, layer=layer, model_name="gpt2", purpose="latents")
    found, probes = measure(tool, rows, out / "artifacts")
    found["splice"] = splice(sae, layer)
    whole = SAEBenchModule(sae, layer=layer, model_name="gpt2", purpose="reconstruction")
    general_utils.load_and_format_sae("ours", whole, "cpu")
    weights = [core.get_featurewise_weight_based_metrics(one) for one in (tool, whole)]
    found["weights_finite"] = all(np.isfinite(v).all() for one in weights for v in one.values())
    np.savez(out / "effects.npz", **{k: v.numpy() for k, v in effects(tool, rows, probes).items()})
    (out / "found.json").write_text(json.dumps(found))


main(*sys.argv[1:])
