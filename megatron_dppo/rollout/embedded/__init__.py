"""Rollouts from the training model itself, with a KV cache: exact, and no second copy of the weights."""
