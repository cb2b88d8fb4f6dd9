"""From samples to the micro-batches of an optimizer step."""
