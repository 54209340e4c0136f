"""Sums over the rows of a store, encoded and reconstructed by an SAE."""
