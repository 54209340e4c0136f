"""An analysis as text for a terminal: its numbers, and its latents and examples on request."""
