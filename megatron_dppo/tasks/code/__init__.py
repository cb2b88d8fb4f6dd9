"""The reward of a program: run against tests, in a sandbox."""
