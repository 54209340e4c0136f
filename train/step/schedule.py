"""The learning rate: a function of the step alone, so that a resumed run needs no state for it."""

import math
from dataclasses import dataclass

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, a plateau, and a decay to zero, linear or along a half cosine."""

    peak: float
    """Learning rate of the plateau."""
    num_steps: int
    """Steps of the run."""
    warmup: float
    """First share of the steps, over which the rate rises."""
    decay: float
    """Last share of the steps, over which it falls; the step after the last would have 0."""
    shape: str = "linear"
    """Shape of the fall: `linear` or `cosine`; `constant` does not fall."""

    def __call__(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rise = round(self.warmup * self.num_steps)
        fall = round(self.decay * self.num_steps)
        factor = 1.0
        if step < rise:
            factor = (step + 1) / (rise + 1)
        if self.shape != "constant" and step >= self.num_steps - fall:
            left = (self.num_steps - step) / (fall + 1)
            if self.shape == "cosine":
                left = (1 - math.cos(math.pi * left)) / 2
            factor = min(factor, left)
        return self.peak * factor
