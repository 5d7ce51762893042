"""Eight CPU devices for every test, set before JAX is imported, and programs that compile cheaply.

Tests compile much and run little, so LLVM optimizes less: the HLO and the rounding stay. Level 0
would be cheaper still but fuses no multiply with an add, so it rounds otherwise than for users.
The older JAX also still has the code generator that compiles fusions in a third less time.
Many tests compile the same tiny step; the cache lives as long as the checkout and is safe to
delete.
"""

import gc
import os
from importlib.metadata import version
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
    if version("jaxlib").startswith("0.10."):
        flags["xla_cpu_use_fusion_emitters"] = "false"
for name, value in flags.items():
    if name not in os.environ.setdefault("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] += f" --{name}={value}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Hide a flag of CPUs alone from the compiler for TPUs, which reads the same variable and ends
    the process over it. The CPU's own has read it by then, and children of other tests need it, to
    round as this process does.
    """
    hidden = " --xla_cpu_use_fusion_emitters=false"
    if item.get_closest_marker("tpu_aot") is None or hidden not in os.environ["XLA_FLAGS"]:
        return (yield)
    import jax

    jax.devices()
    given = os.environ["XLA_FLAGS"]
    os.environ["XLA_FLAGS"] = given.replace(hidden, "")
    try:
        return (yield)
    finally:
        os.environ["XLA_FLAGS"] = given


def pytest_addoption(parser):
    text = (
        "of each file run so many tests, and of each test its first case: to see that all parts run"
    )
    parser.addoption("--sample", type=int, metavar="N", help=text)


def pytest_collection_modifyitems(config, items):
    """Leave out what a sample does not ask for."""
    count = config.getoption("--sample")
    if count is None:
        return
    kept: dict[str, dict[str, pytest.Item]] = {}
    for item in items:
        tests = kept.setdefault(item.nodeid.partition("::")[0], {})
        if len(tests) < count:
            tests.setdefault(item.nodeid.partition("[")[0], item)
    sample = {id(item) for tests in kept.values() for item in tests.values()}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in sample])
    items[:] = [item for item in items if id(item) in sample]


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
