"""The emulator needs glibc's contexts, and NVIDIA's compiler has no wheels for macOS."""

import sys

collect_ignore_glob = [] if sys.platform == "linux" else ["test_*.py"]
