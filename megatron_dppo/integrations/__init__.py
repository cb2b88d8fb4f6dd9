"""Adapters that put the loss into other training pipelines."""
