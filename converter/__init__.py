"""Checkpoint -> rotated, permuted, clustered GGUF."""

import os

# torch's OpenMP threads and the native library's take turns; spinning while they wait, each would slow the other down.
# Both runtimes read this when they are loaded, so it comes before their imports.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Same seed, same bytes: otherwise the last bits of MKL's sums may follow the addresses that the allocator returned.
os.environ.setdefault("MKL_CBWR", "AUTO")
