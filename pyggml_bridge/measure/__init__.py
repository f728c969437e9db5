"""Speed, perplexity, sizes, and models of random weights to measure them on."""
