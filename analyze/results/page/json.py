"""JSON for a <script> of a page."""

import json
from typing import Any


def as_json(value: Any) -> str:
    """Compact JSON for a <script>, without a character that HTML interprets."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
