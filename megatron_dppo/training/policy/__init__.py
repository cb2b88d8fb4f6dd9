"""The policy in training: wrapped, stepped, its loss, its frozen copies."""
