"""Forward passes on tokens: documents kept apart, padding unseen, noise in place of embeddings."""
