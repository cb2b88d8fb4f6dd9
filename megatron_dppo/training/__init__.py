"""The trainer: configuration, batching, update, loop, checkpoints, metrics."""
