"""What a step reports, and where it goes."""
