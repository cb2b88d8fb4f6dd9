"""What starts, plans and reads runs: on top of everything else, which knows nothing of it."""
