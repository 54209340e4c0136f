"""Sums that a block adds to the residual stream, and their places, read off one real pass.

Names differ from family to family and prove nothing. While a few tokens pass through a block, the
tensors that enter and leave each module in it are noted and the possible sums of a block are tried
on them. The sum that gives the block's own output *bit for bit* is the block's form:

    sequential   mid = pre + attn         post = mid + mlp           something reads mid
    post-norm    mid = norm(pre + attn)   post = norm(mid + mlp)
    parallel     post = pre + attn + mlp, in any order               nothing reads a mid

`attn` is the output of a module once attention began, `mlp` the output of a later module. A norm
after the attention (Gemma 2), or an attention module that adds the residual itself (BLOOM), is no
special case: the norm's output, or the inner projection's, makes the sum come out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlsae.models.structure.calls import Call, Side


@dataclass(frozen=True, kw_only=True)
class Tap:
    """A point where a tensor of the stream's shape passes: one side of one module in a block."""

    module: str
    """Dotted name inside the block; empty for the block itself."""
    argument: int | str | None
    """Positional or keyword argument of the module's call; None for its output."""
    overwritten: bool
    """True if the model writes into that very tensor later in the pass."""


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Form of a block, and the taps of its sites."""

    form: str | None
    """`sequential`, `post-norm`, `parallel`; None where no sum gives the block's output."""
    taps: Mapping[str, Tap]
    """Tap of each site, by name."""
    mid_readers: tuple[Tap, ...] = ()
    """Every input that is `resid_mid`, in the sequential form."""


def dissect(calls: Mapping[str, Call]) -> Anatomy:
    """Find the anatomy of a block from the calls noted in one pass; see `calls.noted`."""
    block, inner = calls[""], [call for name, call in calls.items() if name]
    assert block.entered is not None
    assert block.left is not None
    ends = {"resid_pre": _tap(block, block.entered), "resid_post": _tap(block, block.left)}
    pre, post = block.entered.value, block.left.value
    for form in (_sequential, _post_norm, _parallel):
        found = form(pre, post, inner)
        if found is not None:
            return Anatomy(
                form=found.form, taps={**ends, **found.taps}, mid_readers=found.mid_readers
            )
    return Anatomy(form=None, taps=ends)


def _sequential(pre: Tensor, post: Tensor, inner: Sequence[Call]) -> Anatomy | None:
    for attn, added in _attention_outputs(inner):
        mid = pre + added.value
        readers = [(c, c.entered) for c in inner if c.entered and _same(c.entered.value, mid)]
        if not readers:
            continue
        for mlp, added_later in _outputs_after(attn, inner):
            if _same(mid + added_later.value, post):
                taps = tuple(_tap(*reader) for reader in readers)
                return Anatomy(
                    form="sequential",
                    taps={
                        "resid_mid": taps[0],
                        "attn_out": _tap(attn, added),
                        "mlp_out": _tap(mlp, added_later),
                    },
                    mid_readers=taps,
                )
    return None


def _post_norm(pre: Tensor, post: Tensor, inner: Sequence[Call]) -> Anatomy | None:
    for attn, added in _attention_outputs(inner):
        for norm, mid in _outputs_of(pre + added.value, inner):
            for mlp, added_later in _outputs_after(attn, inner):
                last = _outputs_of(mid.value + added_later.value, inner)
                if any(_same(normed.value, post) for _, normed in last):
                    return Anatomy(
                        form="post-norm",
                        taps={
                            "resid_mid": _tap(norm, mid),
                            "attn_out": _tap(attn, added),
                            "mlp_out": _tap(mlp, added_later),
                        },
                    )
    return None


def _parallel(pre: Tensor, post: Tensor, inner: Sequence[Call]) -> Anatomy | None:
    for attn, added in _attention_outputs(inner):
        a = added.value
        for mlp, added_later in _outputs_after(attn, inner):
            m = added_later.value
            if any(_same(total, post) for total in (pre + (a + m), (pre + a) + m, (pre + m) + a)):
                return Anatomy(
                    form="parallel",
                    taps={"attn_out": _tap(attn, added), "mlp_out": _tap(mlp, added_later)},
                )
    return None


def _attention_outputs(inner: Sequence[Call]) -> list[tuple[Call, Side]]:
    """Outputs that may be the attention's: all that ended after the first attention began."""
    began = [call.start for call in inner if call.takes_mask]
    return [(c, c.left) for c in inner if began and c.left and c.end > min(began)]


def _outputs_after(attn: Call, inner: Sequence[Call]) -> list[tuple[Call, Side]]:
    """Outputs of modules that began after `attn` ended and after every attention began."""
    over = max(attn.end, *(call.start for call in inner if call.takes_mask))
    return [(c, c.left) for c in inner if c.left and c.start > over]


def _outputs_of(value: Tensor, inner: Sequence[Call]) -> list[tuple[Call, Side]]:
    """Outputs of the modules that were given `value`."""
    return [(c, c.left) for c in inner if c.left and c.entered and _same(c.entered.value, value)]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _tap(call: Call, side: Side) -> Tap:
    return Tap(module=call.name, argument=side.argument, overwritten=side.overwritten())
