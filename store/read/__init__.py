"""A store, or several as one, opened and read."""
