"""SAEs of other tools, read and written."""
