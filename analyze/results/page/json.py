"""JSON that can stand in a page."""

import json
from typing import Any


def as_json(value: Any) -> str:
    """Compact JSON for a <script>: no character in it means anything to HTML."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
