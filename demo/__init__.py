"""The embedded default: a small trained transformer and its text, made by this project."""

from pathlib import Path
from typing import Literal

from mlsae.base.embedded import MODEL, TEXT

__all__ = ["model_path", "run", "text_path"]


def model_path() -> Path:
    """Directory of the demo transformer, in Hugging Face format: a GPT-NeoX with its tokenizer."""
    return MODEL


def text_path(part: Literal["train", "held_out"] | None = None) -> Path:
    """The demo's text, one module of the Python standard library a line, in column `text`.

    Args:
        part: `train`, the modules that the transformer was trained on, or `held_out`, those that
            neither it nor its tokenizer has seen.

    Returns:
        The .jsonl file of the part; without one, the directory of both.
    """
    return TEXT if part is None else TEXT / f"{part}.jsonl"


def run(out: Path) -> None:
    """Harvest, train and analyze the demo transformer, in a few minutes on two cores.

    Run again, it keeps what is finished, continues what is not, and analyzes anew.

    Args:
        out: directory of the store (`acts`), the SAE (`sae`) and the analysis (`analysis`).

    Raises:
        InputError: `out` holds something else under one of these names, or what other settings
            made.
        ResourceError: too little memory or disk.
    """
    from mlsae.demo.walk import stage_settings, walk

    walk(*stage_settings(out))
