"""Eight CPU devices for every test, set before JAX is imported, and programs that compile cheaply.

Tests compile much and run little, so XLA makes machine code of its programs without LLVM's
optimizations: the HLO is the same, `JAX_DISABLE_MOST_OPTIMIZATIONS=0` tests what users run. Many
tests compile the same tiny step; the cache lives as long as the checkout and is safe to delete.
"""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# XLA's collectives on a CPU wait inside its thread pool: as many threads as cores would deadlock.
os.environ.setdefault("NPROC", "32")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"
