"""Origin of a result: commit and machine."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Where and with what the runs were made."""
    import torch

    processor = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": processor[0] if processor else platform.processor(),
        "cores": len(processor),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "numpy", "zarr")},
    }


def commit() -> str:
    """The commit that was run, marked where the package differed from it."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=root, check=True, capture_output=True, text=True
        ).stdout.strip()

    rooms = ["models", "harvest", "store", "sae", "train", "analyze", "base"]
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *rooms)
    return git("rev-parse", "HEAD") + (" with uncommitted changes" if changed else "")
