"""The structure of a transformer: its blocks, the calls in a block, the sums a block computes."""
