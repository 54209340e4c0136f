"""Read every sound store without mlsae: argv = folder of stores, examples/read_store.py, output.

Decoded activations go to <output>/<store>.npz; what zarrs and tensorstore read of every array is
held against what zarr-python reads.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import tensorstore
import zarr


class Refused:
    """An import hook that refuses mlsae, however it is installed."""

    def find_spec(self, name: str, *_: object) -> None:
        """Say no."""
        if name.split(".")[0] == "mlsae":
            raise ImportError("mlsae cannot be imported here")


def load_example(path: str) -> ModuleType:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("read_store", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_others(directory: Path) -> list[Any]:
    """An array as zarrs and tensorstore read it, found equal."""
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        through_zarrs = zarr.open_array(str(directory), mode="r")[:]
    kvstore = {"driver": "file", "path": str(directory)}
    opened = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result()
    return [through_zarrs, opened.read().result()]


def main() -> None:
    """Read all."""
    stores, example, output = Path(sys.argv[1]), load_example(sys.argv[2]), Path(sys.argv[3])
    for store in sorted(stores.iterdir()):
        plan, group = example.open_checked(str(store))
        for metadata in store.rglob("zarr.json"):
            name = metadata.parent.relative_to(store).as_posix()
            if not isinstance(found := group if name == "." else group[name], zarr.Array):
                continue
            for values in by_others(metadata.parent):
                assert np.array_equal(values, found[:]), f"{store.name}/{name}"
        decoded = {
            f"{site}/{layer}": example.activations(plan, group, site, layer)
            for site in plan["sites"]
            for layer in plan["layers"]
        }
        np.savez(output / f"{store.name}.npz", eligible=example.eligible(plan, group), **decoded)


if __name__ == "__main__":
    sys.meta_path.insert(0, Refused())
    main()
    try:
        import mlsae  # noqa: F401
    except ImportError:
        print("read without mlsae")
