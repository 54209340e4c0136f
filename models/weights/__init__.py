"""The weights of a transformer: their place in memory, random draws, fingerprint."""
