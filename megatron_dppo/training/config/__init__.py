"""The options of a run: what there is, how it is read, what is refused."""
