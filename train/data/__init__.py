"""Rows of a store in the order of training, read into batches."""
