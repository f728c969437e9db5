"""The runner of CodeQuant for GGUF: file -> checked weights -> program -> native kernels -> logits."""
