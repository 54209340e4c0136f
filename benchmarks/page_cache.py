"""A page cache that is full, so that what is measured gets no fresh pages.

A virtual machine that hands freed memory back to its host pays for every page that was never
touched, or not for long, several times what a write to the page cache costs.
"""

import os
from pathlib import Path

import numpy as np


def fill_page_cache(path: Path, num_bytes: int) -> None:
    """Write a file of so many bytes, so that later pages of the cache are no fresh ones."""
    block = np.random.default_rng(0).integers(0, 256, 2**26, np.uint8)
    with path.open("wb") as file:
        for _ in range(-(-num_bytes // len(block))):
            block.tofile(file)
        os.fsync(file.fileno())
