"""A process that saves checkpoints and is killed, starved of disk, or one of two; tests start it.

python tests/save_worker.py kill FOLDER STEP EVENT PATTERN
    SIGKILL at the first audit event (open, os.rename, shutil.rmtree) whose first arguments match
    PATTERN while STEP is saved
python tests/save_worker.py limit FOLDER BYTES
    no file may grow beyond BYTES
python tests/save_worker.py join FOLDER COORDINATOR INDEX
    one of two processes that save and restore together
"""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from child_flags import cpu_devices
from jax.sharding import NamedSharding, PartitionSpec

from model.checkpoint_folder import CheckpointError
from model.config import ModelConfig
from training.checkpoints import CheckpointConfig, Checkpoints

CONFIG = ModelConfig(vocab_size=64, d_model=16, num_layers=2, num_heads=4)
KEEP_TWO = CheckpointConfig(keep_last=2)


def state(step: int, size: int = 64, sharding: NamedSharding | None = None) -> dict:
    """A training state that is a function of the step: params, moments, an rng key and the step."""

    def build() -> dict:
        noise = jax.random.normal(jax.random.key(step), (8, size * size))
        moments = {"kernel": noise * 2, "count": jnp.int32(step)}
        return {"params": {"kernel": noise}, "optimizer": moments, "rng": jax.random.key(step + 7)}

    if sharding is None:
        return jax.jit(build)()
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    places = jax.tree.map(
        lambda leaf: sharding if leaf.ndim == 2 else everywhere, jax.eval_shape(build)
    )
    return jax.jit(build, out_shardings=places)()


def start(*arguments: object, devices: int = 1) -> subprocess.Popen[str]:
    """This file in a process of its own, warnings as errors."""
    root = Path(__file__).parent.parent
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "XLA_FLAGS": cpu_devices(devices),
    }
    command = [sys.executable, "-W", "error", __file__, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str, str]:
    """Exit status, output and errors; a process that does not end is killed, which fails a test."""
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
    return process.returncode, output, errors


def equal(left: Any, right: Any) -> None:
    """Two trees hold the same bits in the same types; typed keys are compared by their words."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        a, b = (words(leaf) for leaf in (a, b))
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def words(leaf: Any) -> np.ndarray:
    typed = jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if typed else leaf)


def kill(folder: str, at_step: str, event: str, pattern: str) -> None:
    armed = False

    def watch(name: str, arguments: tuple) -> None:
        text = " -> ".join(str(argument) for argument in arguments[:2])
        if armed and name == event and re.search(pattern, text):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    checkpoints = Checkpoints(folder, KEEP_TWO)
    for step in (1, 2, 3, 3):
        armed = armed or step == int(at_step)
        checkpoints.save(step, state(step), CONFIG, {"tokenizer.json": "{}"}, {"draw": step})
        checkpoints.wait()
    print("survived")


def limit(folder: str, size: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, state(1, 16), CONFIG, cursor={"draw": 1})
        checkpoints.wait()
        checkpoints.save(2, state(2, 256), CONFIG)
        try:
            checkpoints.wait()
        except CheckpointError as error:
            print("failed:", error)


def join(folder: str, coordinator: str, index: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, 2, int(index))
    mesh = jax.make_mesh((8,), ("fsdp",))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    before = state(1, sharding=sharding) | {"host": np.float32(3), "local": jnp.arange(3)}
    with Checkpoints(folder, KEEP_TWO) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, before, CONFIG, cursor={"draw": 5}, metrics={"loss": 1.5})
        after, cursor = checkpoints.restore(None, before)
        assert cursor == {"draw": 5}
        assert after["params"]["kernel"].sharding == sharding
        assert np.array_equal(after["local"], before["local"])
        for old, new in zip(
            jax.tree.leaves(before["params"]), jax.tree.leaves(after["params"]), strict=True
        ):
            for a, b in zip(old.addressable_shards, new.addressable_shards, strict=True):
                assert np.array_equal(a.data, b.data)
        try:
            checkpoints.restore(7, before)
        except CheckpointError as error:
            print("refused:", error)
        assert checkpoints.latest_good() == 3
        assert checkpoints.abandon(2) == [3]
        assert checkpoints.latest_good() == 2
    print("joined")


if __name__ == "__main__":
    {"kill": kill, "limit": limit, "join": join}[sys.argv[1]](*sys.argv[2:])
