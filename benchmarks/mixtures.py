"""What a mixture of experts costs beside a dense model of as many active parameters.

    python benchmarks/mixtures.py [--rounds=10] [--tiny]

The grouped product of 4,096 rows and its gradients beside one matrix product of as many rows; a
training step and decoding at batch 1 of quickstart's Llama with its feed-forward cut into experts
of which each token meets two. Best of the rounds, in which the rows take turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.grouped_matmul import grouped_matmul
from model import ModelConfig, Runtime, Sampling, abstract, count_parameters, generate, init, rules
from training.decoders import decoder
from training.objectives import language_model
from training.optimizers import OptimizerConfig, make_optimizer
from training.schedules import ScheduleConfig, make_schedule
from training.state import init_state
from training.step import make_step

EXPERTS = (8, 64)
DENSE = ModelConfig(
    vocab_size=2048, d_model=192, num_layers=4, num_heads=6, kv_heads=2, tied_embeddings=True
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="small enough for a test")
    known = parser.parse_args()
    rows, batch, tokens = (256, 2, 4) if known.tiny else (4096, 16, 64)
    print("| | dense | " + " | ".join(f"{count} experts" for count in EXPERTS) + " |")
    print("|---|---|" + "---|" * len(EXPERTS))
    for name, jobs in products(rows).items():
        times = best(jobs, known.rounds)
        shown = [f"{1e3 * times[0]:.2f} ms", *(f"{t / times[0]:.2f} x" for t in times[1:])]
        print(f"| {name} | {' | '.join(shown)} |")
    dense = dataclasses.replace(DENSE, num_layers=1) if known.tiny else DENSE
    models = [dense, *(mixture(dense, count) for count in EXPERTS)]
    sizes = [f"{count_parameters(config) / 1e6:.1f} M" for config in models]
    print(f"| parameters | {' | '.join(sizes)} |")
    times = best([step(config, batch) for config in models], known.rounds)
    shown = [f"{batch * 128 / t:,.0f}" for t in times]
    print(f"| training, tokens/s | {' | '.join(shown)} |")
    times = best([decoding(config, tokens) for config in models], known.rounds)
    print(f"| decoding at batch 1, tokens/s | {' | '.join(f'{tokens / t:,.0f}' for t in times)} |")


def best(jobs: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Seconds of each job, the best of the rounds; the first call of each is not counted."""
    for job in jobs:
        jax.block_until_ready(job())
    times = [float("inf")] * len(jobs)
    for _ in range(rounds):
        for index, job in enumerate(jobs):
            start = time.perf_counter()
            jax.block_until_ready(job())
            times[index] = min(times[index], time.perf_counter() - start)
    return times


def products(rows: int) -> dict[str, list[Callable[[], Any]]]:
    """The product, and its two gradients: dense first, then grouped, with uneven groups."""
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=(rows, n)), jnp.float32) for n in (192, 512))

    def gradients(product: Callable[..., Any], x: Any, w: Any, *sizes: Any) -> Any:
        return jax.vjp(lambda x, w: product(x, w, *sizes), x, w)[1](g)

    forward, backward = [], []
    for count in (1, *EXPERTS):
        w = jnp.asarray(rng.normal(size=(count, 192, 512)), jnp.float32)
        sizes = jnp.asarray(rng.multinomial(rows, rng.dirichlet(np.full(count, 3.0))), jnp.int32)
        function, arguments = (grouped_matmul, (x, w, sizes))
        if count == 1:
            function, arguments = (jnp.matmul, (x, w[0]))
        forward.append(functools.partial(jax.jit(function), *arguments))
        backward.append(
            functools.partial(jax.jit(functools.partial(gradients, function)), *arguments)
        )
    return {f"product of {rows:,} rows, 192 x 512": forward, "its gradients": backward}


def mixture(dense: ModelConfig, count: int) -> ModelConfig:
    """As many active parameters as the dense model."""
    return dataclasses.replace(
        dense, feed_forward="experts", num_experts=count, experts_per_token=2, expert_d_ff=256
    )


def step(config: ModelConfig, batch: int) -> Callable[[], Any]:
    """A training step on random tokens, AdamW, with the load-balance loss of a mixture."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (batch, 128)).astype(np.int32)
    auxiliary = (("load_balance", 0.01),) if config.feed_forward == "experts" else ()
    optimizer = make_optimizer(OptimizerConfig(), abstract(config), rules(config))
    run = make_step(
        language_model(auxiliary=auxiliary),
        decoder(config, Runtime(scan_unroll=0)),
        optimizer,
        make_schedule(ScheduleConfig("constant"), 1e-3, 1000),
    )
    state = init_state(functools.partial(init, config), optimizer, jax.random.key(0))

    def job() -> Any:
        nonlocal state
        state, metrics = run(state, {"tokens": tokens, "targets": tokens})
        return metrics

    return job


def decoding(config: ModelConfig, tokens: int) -> Callable[[], Any]:
    """One row, greedy."""
    params = init(config, jax.random.key(0))
    prompt = np.ones((1, 8), np.int32)
    return lambda: (
        generate(
            params, prompt, config, max_new_tokens=tokens, sampling=Sampling(temperature=0.0)
        ).tokens
    )


if __name__ == "__main__":
    main()
