"""The CPU backend: a program as operations of the native library over buffers that are planned once."""
