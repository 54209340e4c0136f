"""Every active latent of a store's rows, written in parts sorted by latent."""
