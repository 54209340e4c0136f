"""A store and an SAE → tables, figures, a summary."""
