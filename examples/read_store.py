"""Read an activation store with zarr and storage_schema.md alone: python read_store.py acts."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import zarr


def open_checked(path):
    """The store's plan and Zarr group; the plan's seal is checked, and that the store is whole."""
    plan = json.loads((Path(path) / "plan.json").read_bytes())
    seal = plan.pop("sha256")
    canonical = json.dumps(plan, sort_keys=True, separators=(",", ":")).encode()
    if hashlib.sha256(canonical).hexdigest() != seal:
        raise ValueError(f"{path}/plan.json is damaged")
    if plan["schema_version"].split(".")[0] != "1":
        raise ValueError(f"{path} follows schema {plan['schema_version']}, this reads 1")
    if not (Path(path) / "complete.json").exists():
        raise ValueError(f"{path} is incomplete")
    return plan, zarr.open_group(path, mode="r")


def activations(plan, group, site, layer, start=0, stop=None):
    """(stop - start, d_model) float32 activations of one site and layer."""
    stored = group[f"activations/{site}/{layer}"][start:stop]
    if plan["encoding"] == "bfloat16":
        return (stored.astype("u4") << 16).view("f4")
    if plan["encoding"] != "int8":
        return stored.astype("f4")
    at = plan["layers"].index(layer)
    exponents = group[f"block_exponents/{site}/{layer}"][start:stop]
    factors = np.exp2(exponents / np.float32(8)).astype("f4")
    factors = np.repeat(factors, 64, axis=1)[:, : plan["d_model"]]
    scale, mean = (group[f"{name}/{site}"][at] for name in ("channel_scale", "channel_mean"))
    return stored * factors * scale + mean


def eligible(plan, group, skip_positions=1):
    """(num_rows,) whether a row has no flag and is not among the first positions."""
    flags = group["token_flags"][:]
    tokens = group["row_token"][:] if plan["keep_positions"] else np.arange(len(flags))
    return (flags[tokens] == 0) & (tokens % plan["context_length"] >= skip_positions)


if __name__ == "__main__":
    plan, group = open_checked(sys.argv[1])
    rows = eligible(plan, group)
    print(f"{len(rows)} rows, {int(rows.sum())} eligible, as {plan['encoding']}")
    for site in plan["sites"]:
        for layer in plan["layers"]:
            x = activations(plan, group, site, layer)[rows].astype("f8")
            norm = np.sqrt((x**2).sum(axis=1)).mean()
            print(f"{site} layer {layer}: mean norm {norm:.4g}, variance {x.var(axis=0).sum():.4g}")
