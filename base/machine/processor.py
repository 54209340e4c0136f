"""Number formats that this machine's processor computes fast."""

import functools

import torch


def has_fast_bfloat16() -> bool:
    """True for a processor that multiplies bfloat16 faster than float32, summing in float32."""
    return has_matrix_units() or bool(_capabilities().get("avx512_bf16"))


def has_matrix_units() -> bool:
    """True for a processor that multiplies whole tiles of bfloat16 at once."""
    return bool(_capabilities().get("amx_bf16"))


@functools.cache
def _capabilities() -> dict[str, object]:
    # Older versions of torch do not say.
    found: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return found
