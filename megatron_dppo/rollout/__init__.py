"""Rollouts: what a sample is, the engines that draw samples, and how weights reach them."""
