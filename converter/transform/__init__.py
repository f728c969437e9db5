"""Changes of the float model that leave its logits as they are: folded norms, rotation, permutation, weight layout."""
