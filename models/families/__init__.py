"""Differences between families of transformers: kind, outline from a config, attention."""
