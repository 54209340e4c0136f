"""Training an SAE from an activation store; nothing here needs the transformer."""
