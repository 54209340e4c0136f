"""Text from files, the hub or memory, tokenized and packed into sequences."""
