"""Checkpoints that any layout resumes from."""
