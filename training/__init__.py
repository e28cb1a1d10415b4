"""Data, collation, metrics and checkpoints for training."""
