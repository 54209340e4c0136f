"""Transformer and text that come with the package, by the name `demo`."""

import re
from pathlib import Path

MODEL = Path(__file__).resolve().parents[1] / "demo" / "model"
"""Directory of the demo transformer, in Hugging Face format."""
TEXT = MODEL.with_name("text")
"""Directory of the demo's text: train.jsonl and held_out.jsonl."""
_TEXT_NAME = re.compile(r"demo(?::(train|held_out))?(:[0-9.e+-]+)?")


def embedded_model(name: str) -> str:
    """Directory of the demo transformer for `demo`; any other name as it is."""
    return str(MODEL) if name == "demo" else name


def embedded_text(name: str) -> str:
    """Place of the demo's text for `demo:train`, which is `demo`, or `demo:held_out`.

    Another name stays as it is.

    A share of a mixture may follow, as in `demo:train:0.5`, and is kept.
    """
    match = _TEXT_NAME.fullmatch(name)
    if match is None:
        return name
    part, share = match.groups()
    return f"{TEXT / (part or 'train')}.jsonl{share or ''}"
