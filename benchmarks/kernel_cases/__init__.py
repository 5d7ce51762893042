"""The cases of `benchmarks/kernels_tpu.py`, a file an operation."""
