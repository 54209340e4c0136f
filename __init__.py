"""Multi-layer sparse autoencoders: harvest once, train and analyze from a shared Zarr store."""

__version__ = "0.1.0"
