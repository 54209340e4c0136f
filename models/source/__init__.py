"""Where a model and its tokenizer come from: a directory of this machine or the hub."""
