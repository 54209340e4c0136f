"""Other tools, as they come from the package index, each in a virtual environment of its own.

They are kept in `.external`, which git ignores, and made anew when what is to be installed changes.
"""

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = {
    # SAELens 6 is for TransformerLens below 4; the others are what SAEBench's measures import.
    "saelens": [
        "torch==2.13.0",
        "sae-lens==6.54.12",
        "transformer-lens<4",
        "beartype==0.14.1",
        "einops",
        "jaxtyping==0.3.3",
        "pandas",
        "scikit-learn",
        "tabulate",
    ],
    "sparsify": ["torch==2.13.0", "eai-sparsify==1.3.3"],
    "published": [
        "torch==2.13.0",
        "einops",
        "huggingface_hub",
        "jaxtyping",
        "loguru",
        "numpy",
        "safetensors",
        "torchmetrics",
    ],
    # Imports of Delphi's loader, in place of all it requires: vllm, bitsandbytes and a server.
    "delphi": [
        "torch==2.13.0",
        "transformers==4.57.6",
        "datasets==4.4.1",
        "sentence-transformers==5.1.2",
        "faiss-cpu",
        "asyncer",
        "blobfile",
        "jaxtyping",
        "numpy",
        "orjson",
        "safetensors",
        "simple-parsing",
    ],
    # nnsight imports what transformers 5 no longer has; the others go with transformers 4, named
    # so that pip need not try versions for minutes.
    "dictionary_learning": [
        "torch==2.13.0",
        "dictionary-learning==0.1.0",
        "transformers==4.57.6",
        "huggingface-hub<1",
        "datasets==4.4.1",
        "diffusers==0.35.2",
    ],
    "selenium": ["selenium==4.44.0"],
}
ALONE = {"delphi": ["eai-delphi==0.1.3"], "saelens": ["sae-bench==0.6.0"]}
"""Tool → packages installed without their dependencies."""
ENVIRONMENTS = {"saebench": "saelens", "saelens_training": "saelens"}
"""Tool → another, in whose environment it is installed."""
LIBRARIES = {"wandb": ["wandb==0.31.0"]}
"""Library → packages installed beside mlsae's own environment, in a folder for PYTHONPATH."""
UNWANTED = ["torchvision"]
"""Comes with a dependency, is not used, and fails to load beside a torch without CUDA."""


@pytest.fixture(scope="session")
def peer() -> Callable[..., str]:
    """Run a script of this folder in a tool's environment: `peer("saelens", "forward", path)`.

    The script may import mlsae, as far as the environment has what that needs.
    """
    ready: dict[str, Path] = {}
    package = ROOT / ".external" / "package" / "mlsae"

    def run(tool: str, *arguments: object) -> str:
        if tool not in ready:
            ready[tool] = environment(ENVIRONMENTS.get(tool, tool))
            package.parent.mkdir(exist_ok=True)
            if not package.is_symlink():
                package.symlink_to(ROOT)
        script = Path(__file__).with_name(f"in_{tool}.py")
        done = subprocess.run(
            [str(ready[tool]), str(script), *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT / ".external",
            env=os.environ | {"PYTHONPATH": str(package.parent)},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def libraries() -> Callable[[str], Path]:
    """The folder of a library and what it needs: `libraries("wandb")`."""

    def folder(name: str) -> Path:
        directory = ROOT / ".external" / name
        record, wanted = directory / "installed", "\n".join([sys.version, *LIBRARIES[name]])
        if not (record.is_file() and record.read_text() == wanted):
            shutil.rmtree(directory, ignore_errors=True)
            pip = [sys.executable, "-m", "pip", "--quiet"]
            into = ["--target", str(directory), "--constraint", str(ROOT / "constraints.txt")]
            subprocess.run([*pip, "install", *into, *LIBRARIES[name]], check=True)
            record.write_text(wanted)
        return directory

    return folder


def environment(tool: str) -> Path:
    """The interpreter of the tool's environment, made if it is not there whole."""
    directory = ROOT / ".external" / tool
    python, record = directory / "bin" / "python", directory / "installed"
    wanted = "\n".join([sys.version, *REQUIREMENTS[tool], *ALONE.get(tool, [])])
    if record.is_file() and record.read_text() == wanted:
        return python
    shutil.rmtree(directory, ignore_errors=True)
    venv.create(directory, with_pip=True)
    pip = [str(python), "-m", "pip", "--quiet"]
    subprocess.run([*pip, "install", *REQUIREMENTS[tool]], check=True)
    if tool in ALONE:
        subprocess.run([*pip, "install", "--no-deps", *ALONE[tool]], check=True)
    subprocess.run([*pip, "uninstall", "--yes", *UNWANTED], check=True)
    record.write_text(wanted)
    return python
