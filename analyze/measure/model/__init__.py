"""Measurements that run the transformer."""
