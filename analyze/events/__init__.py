"""Writing every active latent of a store's rows, in parts sorted by latent."""
