"""From float matrices to codebooks and indices: the plan, the budget, one matrix, one layer."""
