"""What is optimised. Tensors in, tensors out; imports torch and ops/ only."""
