"""The published method's fine-tuning of centroids (--method paper)."""
