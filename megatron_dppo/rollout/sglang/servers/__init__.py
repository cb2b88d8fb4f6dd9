"""The servers' life: where they come from, how they are started, watched, found again and ended."""
