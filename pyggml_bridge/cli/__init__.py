"""Command lines of the runner, one module each."""
