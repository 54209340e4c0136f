"""Bytes of a store: layout, encodings, compression, moments."""
