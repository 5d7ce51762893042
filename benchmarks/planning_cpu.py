"""The analytical model of planning/ beside step times of this machine's CPU.

    python benchmarks/planning_cpu.py [--rounds=5] [--json=FILE]

Training steps, prefills and decoding steps of different widths, depths, batches and lengths, each
predicted from the model's config and two figures that are measured first (float32 matrix product,
copying), and then timed. A prediction is a lower bound, so its share of the measured time is how
efficient the program is; what must hold is the order: rank correlation above 0.9. The shapes take
turns, and the fastest turn of each counts, since other work on the machine only makes it slower.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from scipy.stats import spearmanr

from model import ModelConfig, Runtime, count_parameters, hidden_states, init, init_cache, logits
from planning import HARDWARE, Bits, Hardware, Work, decode, operators, prefill, seconds, timed
from planning.show import duration, table
from training.decoders import decoder
from training.objectives import language_model
from training.optimizers import OptimizerConfig, make_optimizer
from training.schedules import ScheduleConfig, make_schedule
from training.state import init_state
from training.step import make_step

BITS = Bits(32, 32, 32, 32)
OPTIMIZER_ARRAYS = 7
"""AdamW reads parameter, gradient and both moments, and writes all but the gradient."""
ROOM = 64
"""Tokens that a decoding step may add to its context; more than are timed."""
TURNS = 3
WANTED = 0.9


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of step: of `batch` sequences, `length` tokens of each (decoding: of context)."""

    kind: str
    d_model: int
    layers: int
    batch: int
    length: int

    @property
    def model(self) -> ModelConfig:
        """A Llama of that size."""
        return ModelConfig(
            vocab_size=2048,
            d_model=self.d_model,
            num_layers=self.layers,
            num_heads=self.d_model // 64,
            max_length=2048,
        ).resolve()

    @property
    def name(self) -> str:
        """What the table calls it."""
        return f"{self.kind}, {self.layers} x {self.d_model}, {self.batch} x {self.length} tokens"


CASES = (
    Case("train", 128, 4, 8, 128),
    Case("train", 256, 2, 2, 128),
    Case("train", 256, 6, 4, 256),
    Case("train", 512, 2, 4, 128),
    Case("prefill", 256, 4, 1, 128),
    Case("prefill", 512, 4, 1, 512),
    Case("prefill", 512, 8, 4, 256),
    Case("decode", 256, 4, 8, 512),
    Case("decode", 512, 8, 1, 128),
    Case("decode", 512, 8, 16, 512),
    Case("decode", 768, 12, 1, 256),
)


def measured_cpu() -> Hardware:
    """This machine: twice the rate of its float32 product stands for bfloat16, as the table has it,
    and the bandwidth is that of reading and writing an array in place.
    """
    side, count = 1536, 2**26
    x, y = jnp.ones((side, side)), jnp.ones(count)
    product = _best(functools.partial(jax.jit(jnp.matmul), x, x), turns=TURNS)
    negated = jax.jit(jnp.negative, donate_argnums=0)

    def turn() -> jax.Array:
        nonlocal y
        y = negated(y)
        return y

    copying = _best(turn, turns=TURNS)
    return dataclasses.replace(
        HARDWARE["cpu-2-cores"],
        bf16_flops=2 * 2 * side**3 / product,
        bandwidth=2 * 4 * count / copying,
    )


def predicted(case: Case, device: Hardware) -> float:
    """Seconds of a step by the operator table and the roofline; three forwards are a gradient."""
    if case.kind == "train":
        work = Work(case.batch, case.length, case.length, all_logits=True)
        update = 4 * OPTIMIZER_ARRAYS * count_parameters(case.model) / device.bandwidth
        return 3 * seconds(timed(operators(case.model, work, BITS), device, BITS)) + update
    make = prefill if case.kind == "prefill" else decode
    work = make(case.batch, case.length)
    return seconds(timed(operators(case.model, work, BITS), device, BITS))


def stepper(case: Case) -> Callable[[], Any]:
    """What starts one more step of a kind; its first call compiles."""
    params = init(case.model, jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 2048, (case.batch, case.length)))
    make = {"train": _train, "prefill": _prefill, "decode": _decode}[case.kind]
    return make(case, params, tokens)


def _train(case: Case, params: Any, tokens: jax.Array) -> Callable[[], Any]:
    optimizer = make_optimizer(OptimizerConfig(name="adamw"), params, ())
    schedule = make_schedule(ScheduleConfig("constant", warmup=0), 1e-3, 100)
    apply = decoder(case.model, Runtime(scan_unroll=0))
    step = make_step(language_model(), apply, optimizer, schedule, clip_norm=1.0)
    state = init_state(lambda key: params, optimizer, jax.random.key(0))
    batch = {"tokens": tokens, "targets": tokens}

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return state, metrics

    return run


def _prefill(case: Case, params: Any, tokens: jax.Array) -> Callable[[], Any]:
    @jax.jit
    def step(params: Any, tokens: jax.Array) -> jax.Array:
        hidden, _ = hidden_states(params, tokens, case.model)
        return logits(params, hidden[:, -1:], case.model)

    return lambda: step(params, tokens)


def _decode(case: Case, params: Any, tokens: jax.Array) -> Callable[[], Any]:
    """The context grows by a token a step, in a cache that is written in place."""

    @functools.partial(jax.jit, donate_argnums=1)
    def step(params: Any, cache: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        hidden, aux = hidden_states(params, tokens, case.model, cache=cache)
        return logits(params, hidden[:, -1:], case.model), aux["cache"]

    cache = init_cache(case.model, case.batch, case.length + ROOM)
    _, cache = step(params, cache, tokens[:, 1:])

    def run() -> Any:
        nonlocal cache
        scores, cache = step(params, cache, tokens[:, :1])
        return scores, cache

    return run


def _best(run: Callable[[], Any], turns: int) -> float:
    """Seconds of the fastest turn; the first, which may compile, does not count."""
    jax.block_until_ready(run())
    taken = []
    for _ in range(turns):
        began = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - began)
    return min(taken)


def compare(cases: tuple[Case, ...], rounds: int) -> tuple[Hardware, list[tuple[float, float]]]:
    """The machine, and `(predicted, measured)` seconds of each case."""
    steppers = [stepper(case) for case in cases]
    device, fastest = measured_cpu(), [float("inf")] * len(cases)
    for _ in range(rounds):
        for index, run in enumerate(steppers):
            fastest[index] = min(fastest[index], _best(run, turns=TURNS))
        again = measured_cpu()
        device = dataclasses.replace(
            device,
            bf16_flops=max(device.bf16_flops, again.bf16_flops),
            bandwidth=max(device.bandwidth, again.bandwidth),
        )
    return device, [
        (predicted(case, device), took) for case, took in zip(cases, fastest, strict=True)
    ]


def main() -> int:
    """Print the table; exit status 1 if the order is not the predicted one."""
    parser = argparse.ArgumentParser(description="Predicted and measured step times.")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each shape (default: 5)")
    parser.add_argument("--json", help="also write the figures to this file")
    known = parser.parse_args()
    if not 1 <= known.rounds <= ROOM // (TURNS + 1):
        parser.error(f"--rounds={known.rounds}; 1 to {ROOM // (TURNS + 1)}")
    device, found = compare(CASES, known.rounds)
    rank = float(spearmanr(np.asarray(found)).statistic)  # pyright: ignore[reportAttributeAccessIssue]
    rows = [
        (case.name, duration(least), duration(took), f"{least / took:.0%}")
        for case, (least, took) in zip(CASES, found, strict=True)
    ]
    machine = (
        f"{os.cpu_count()} CPU cores, float32: {device.bf16_flops / 2e9:.0f} GFLOP/s of a product, "
        f"{device.bandwidth / 1e9:.1f} GB/s of copying"
    )
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(machine)
    console.print(table("", ("step", "predicted", "measured", "share"), rows))
    console.print(f"rank correlation (Spearman) of {len(rows)} shapes: {rank:.3f}")
    if known.json:
        figures = [dataclasses.asdict(case) for case in CASES]
        for figure, (least, took) in zip(figures, found, strict=True):
            figure |= {"predicted": least, "measured": took}
        Path(known.json).write_text(json.dumps({"rank": rank, "steps": figures}, indent=1))
    return 0 if rank > WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
