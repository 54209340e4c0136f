"""One step of training on one batch."""
