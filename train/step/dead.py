"""Dead latents: unused by the last rows of the run, over layers and ranks."""

import torch

DEAD_AFTER_ROWS = 10**7


def default_dead_after(num_layers: int, run_rows: int) -> int:
    """Rows after which an unused latent is dead: min(10⁷ a layer, 10% of the run), at least 1."""
    return max(1, min(DEAD_AFTER_ROWS * num_layers, run_rows // 10))


class DeadLatents:
    """When each latent was last used, in rows of the run.

    Args:
        num_latents: N.
        dead_after: rows without use after which a latent is dead.
        device: device of the counters.
    """

    def __init__(self, num_latents: int, dead_after: int, device: torch.device) -> None:
        self.dead_after = dead_after
        self.num_rows = 0
        """Rows seen so far, over layers and ranks."""
        self.last_used = torch.zeros(num_latents, dtype=torch.int64, device=device)
        """(N,) `num_rows` after the batch in which each latent was last used."""

    def update(self, fired: torch.Tensor, num_rows: int) -> None:
        """Count a batch of `num_rows` rows; fired (N,) is above 0 for latents it used anywhere."""
        self.num_rows += num_rows
        self.last_used[fired > 0] = self.num_rows

    def indices(self) -> torch.Tensor:
        """Ascending indices of the latents that are dead now."""
        return torch.nonzero(self.num_rows - self.last_used >= self.dead_after)[:, 0]

    def revive(self, latents: torch.Tensor) -> None:
        """Count latents that were drawn anew as used now."""
        self.last_used[latents] = self.num_rows
