"""A run of training: ranks, checkpoints, logs, evaluation, output."""
