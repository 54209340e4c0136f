"""The strongest and some random examples of each latent, found and written."""
