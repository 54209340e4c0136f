"""One page of an analysis that needs no network."""
