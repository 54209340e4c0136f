"""Forward passes, and sums over the activations that come out."""
