"""Prompts and verifiers: where problems come from and how responses to them are graded."""
