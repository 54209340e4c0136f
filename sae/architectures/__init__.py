"""Architectures of an SAE, a file each."""
