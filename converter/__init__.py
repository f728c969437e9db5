"""Checkpoint -> rotated, permuted, clustered GGUF."""

import os

# torch's OpenMP threads and the native library's take turns; spinning while they wait, each would slow the other down.
# Both runtimes read this when they are loaded, so it comes before their imports.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import os

# torch and the native library bring an OpenMP runtime each. Clustering goes back and forth between them thousands of
# times a second, and threads of one that spin would hold up the other: 263 to 234 s for SmolLM2 with 1k tokens.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
