"""A store copied whole, in part, or in another encoding."""
