"""The blocks that decoders are made of: dimensions, rope, and the builder that records a model's operations."""
