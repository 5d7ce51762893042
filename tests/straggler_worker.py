"""One of two processes of a run whose process 1 makes its batches slowly."""

from __future__ import annotations

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from sharding import initialize_distributed
from training import OptimizerConfig, RunConfig, TrainConfig, from_functions, train


def batch(step: int):
    if jax.process_index() == 1:
        time.sleep(0.1)
    x = np.random.default_rng(step).normal(size=(8, 4)).astype(np.float32)
    return {"x": x, "y": x.sum(axis=1)}


def loss(apply, params, batch, rng):
    return jnp.mean((apply(params, batch, rng)[0] - batch["y"]) ** 2), {}


if __name__ == "__main__":
    port, index, workdir = sys.argv[1:]
    initialize_distributed(f"127.0.0.1:{port}", 2, int(index))
    task = from_functions(
        init=lambda key: {"linear": {"kernel": jnp.zeros((4, 1))}},
        apply=lambda params, batch, rng: ((batch["x"] @ params["linear"]["kernel"])[:, 0], {}),
        batch=batch,
        loss=loss,
    )
    config = RunConfig(
        name="slow",
        train=TrainConfig(steps=30, log_every=10),
        optimizer=OptimizerConfig(name="sgd", learning_rate=0.05),
    )
    train(task, config, workdir)
