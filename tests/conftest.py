"""Eight CPU devices for every test, set before JAX is imported, and programs that compile cheaply.

Tests compile much and run little, so LLVM optimizes less: the HLO and the rounding stay. Level 0
would be cheaper still but fuses no multiply with an add, so it rounds otherwise than for users.
Many tests compile the same tiny step; the cache lives as long as the checkout and is safe to
delete.
"""

import gc
import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# XLA's collectives on a CPU wait inside its thread pool: as many threads as cores would deadlock.
os.environ.setdefault("NPROC", "32")
flags = {"xla_force_host_platform_device_count": 8}
if os.environ["JAX_PLATFORMS"] == "cpu":
    flags["xla_backend_optimization_level"] = 1
for name, value in flags.items():
    if name not in os.environ.setdefault("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] += f" --{name}={value}"


def pytest_addoption(parser):
    text = "of each test with many cases run the first alone, to see that it runs on other versions"
    parser.addoption("--one-case", action="store_true", help=text)


def pytest_collection_modifyitems(config, items):
    """Leave the further cases of a test out, if asked to."""
    if config.getoption("--one-case"):
        first = {item.nodeid.partition("[")[0]: item for item in reversed(items)}
        left_out = [item for item in items if first[item.nodeid.partition("[")[0]] is not item]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if first[item.nodeid.partition("[")[0]] is item]


MOST_MAPPINGS = 20_000
"""Of a process. Each compiled program takes some; at 65,530 Linux refuses more, and XLA crashes."""


@pytest.fixture(autouse=True, scope="module")
def programs_are_forgotten():
    """Forget compiled programs after a file of tests, once there are many."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and len(mappings.read_bytes().splitlines()) > MOST_MAPPINGS:
        import jax

        jax.clear_caches()
        gc.collect()
