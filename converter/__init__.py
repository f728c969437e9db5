"""Checkpoint -> rotated, permuted, clustered GGUF."""
