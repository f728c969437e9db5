"""The CUDA backend: a program as launches of kernels that are compiled at run time."""
