"""Sums over rows and over a live model, and the tables made from them."""
