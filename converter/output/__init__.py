"""The GGUF file: its keys, its tensors, and the check at the end."""
