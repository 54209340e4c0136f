"""A store described, verified, removed."""
