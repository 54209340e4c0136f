"""A store made: its plan, its shards, its completion."""
