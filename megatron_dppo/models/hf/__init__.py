"""Hugging Face checkpoints: configuration, names, weights in and out."""
