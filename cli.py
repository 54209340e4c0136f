"""mlsae command line."""
