"""Batches through the transformer, and sums over the activations that come out."""
