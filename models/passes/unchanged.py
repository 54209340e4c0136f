"""A model left by a forward pass as it was before.

Some families adapt to an input and stay so: BigBird turns to full attention after a short one,
rotary embeddings keep the frequencies of the longest. A pass would depend on those before it, so
that a probe would change the model, and a harvest that is continued would differ.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mlsae.base.errors import InputError
from mlsae.models.transformer import Transformer

_SMALL = 16 * 2**20
"""Bytes of the largest buffer that is copied."""


@dataclass(frozen=True, eq=False)
class _Entry:
    """A value that a module or a config held before a pass."""

    holder: dict[str, Any]
    name: str
    value: Any
    content: Tensor | None = None
    """Copy of a small buffer, which may be written into; large ones hold quantised weights."""

    def is_changed(self) -> bool:
        return self.holder.get(self.name, self) is not self.value or self._is_overwritten()

    def put_back(self) -> None:
        if self.content is not None and self._is_overwritten():
            self.value.copy_(self.content)
        self.holder[self.name] = self.value

    def _is_overwritten(self) -> bool:
        return self.content is not None and not torch.equal(self.value, self.content)


@dataclass
class _Known:
    """Knowledge of a model from its passes so far."""

    kinds: set[tuple[int, bool, int | None]] = field(default_factory=set)
    """Length, padding and extent of the passes that have been watched."""
    changing: dict[tuple[int, str], _Entry] = field(default_factory=dict)
    """Entries that some pass changed, by holder and name, as they are before every pass."""


_known: WeakKeyDictionary[Transformer, _Known] = WeakKeyDictionary()


def adapts_itself(transformer: Transformer) -> bool:
    """True for a model that some pass so far has changed, so that its length may matter."""
    return transformer in _known and bool(_known[transformer].changing)


@contextmanager
def unchanged(
    transformer: Transformer, length: int, *, is_padded: bool, extent: int | None
) -> Iterator[None]:
    """Undo all changes that a pass of sequences of a length makes to the model.

    The first pass of each kind is watched whole; later ones undo the changes known by then.

    Args:
        transformer: the model.
        length: tokens of a sequence.
        is_padded: True if some sequences end with padding.
        extent: the block after which the pass is left; None for a whole pass.

    Raises:
        InputError: the pass changed weights.
    """
    known = _known.setdefault(transformer, _Known())
    kind = (length, is_padded, extent)
    if kind in known.kinds:
        try:
            yield
        finally:
            for entry in known.changing.values():
                entry.put_back()
        return
    # Sums of all bits once: a weight may be changed behind its version.
    summed = not known.kinds
    weights = _weights(transformer.model, summed=summed)
    entries = list(_entries(transformer.model))
    try:
        yield
    finally:
        for entry in entries:
            if entry.is_changed():
                known.changing.setdefault((id(entry.holder), entry.name), entry)
                entry.put_back()
        _check_weights(transformer, weights, _weights(transformer.model, summed=summed))
        known.kinds.add(kind)


def _entries(model: Any) -> Iterator[_Entry]:
    """Attributes, buffers and parts of each module, and entries of each config."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            # Private names belong to torch, accelerate and transformers.
            if not name.startswith("_") and name != "training":
                yield _Entry(vars(module), name, value)
        for name, part in module._modules.items():
            yield _Entry(module._modules, name, part)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                is_small = buffer.nbytes <= _SMALL
                copy = buffer.detach().clone() if is_small else None
                yield _Entry(module._buffers, name, buffer, copy)
        if hasattr(module, "config"):
            configs[id(module.config)] = module.config
    for config in configs.values():
        for name, value in vars(config).items():
            if not name.startswith("_"):
                yield _Entry(vars(config), name, value)


def _weights(model: Any, *, summed: bool) -> dict[str, tuple[int, int, int]]:
    """Address, version and, if asked for, the sum of all bits of each weight in memory."""
    return {
        name: (weight.data_ptr(), _version(weight), _sum_of_bits(weight) if summed else 0)
        for name, weight in model.named_parameters()
        if weight.device.type != "meta"
    }


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def _sum_of_bits(weight: Tensor) -> int:
    data = weight.detach().contiguous().reshape(-1).view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()
    whole = len(data) // 8 * 8
    return int(data[:whole].view(torch.int64).sum()) + int(data[whole:].sum())


def _check_weights(transformer: Transformer, before: Any, after: Any) -> None:
    changed = [name for name, state in before.items() if after.get(name) != state]
    if changed:
        raise InputError(
            f"model {transformer.name} changes its own weights in a forward pass ("
            f"{len(changed)} of them, the first {changed[0]}), so it is no longer the checkpoint; "
            "such a model is not supported"
        )
