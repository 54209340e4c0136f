"""Lines, progress and pictures: all that a command shows beside the product."""
