"""How fast text becomes tokens, tokens windows and windows batches, and what that costs a step.

    python benchmarks/data_loading.py [PATH] [--step-seconds=0.5]

Times are CPU seconds of this process, so that other work on the machine does not count; a batch is
8 x 256 tokens unless said otherwise. The goal is a batch in under 2 % of a training step.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from data import DataConfig, TokenizerConfig, build
from data.packing import best_fit, first_fit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", nargs="?", default="stdlib:")
    parser.add_argument("--step-seconds", type=float, default=0.5)
    known = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        for kind in ("bytes", "bpe"):
            config = DataConfig(known.path, tokenizer=TokenizerConfig(kind), cache_dir=cache)
            tokenizing(config)
        for batch_size, length in ((8, 256), (64, 256), (8, 2048)):
            sized = dataclasses.replace(config, batch_size=batch_size, length=length)
            loading(sized, known.step_seconds)
    packing()


def tokenizing(config: DataConfig) -> None:
    dataset, seconds, wall = timed(lambda: build(config, say=lambda line: None))
    counts = dataset.train.components[0].store.manifest["counts"]
    megabytes = counts["text_bytes"] / 1e6
    _, again, _ = timed(lambda: build(config, say=lambda line: None))
    print(
        f"{config.tokenizer.kind:5} {megabytes:.1f} MB: {megabytes / seconds:.1f} MB/s, "
        f"{counts['tokens'] / seconds / 1e6:.2f} M tokens/s ({wall:.1f} s in all, "
        f"training the tokenizer included); found again in {again:.2f} s"
    )


def loading(config: DataConfig, step_seconds: float, steps: int = 300) -> None:
    dataset = build(config, say=lambda line: None)
    _, seconds, _ = timed(lambda: [dataset.train.batch_at(step) for step in range(steps)])
    batches = dataset.train.iterate(0)
    next(batches)
    waits = []
    for _ in range(20):
        time.sleep(0.05)
        next(batches)
        waits.append(batches.waited)
    batches.close()
    each = seconds / steps
    tokens = config.batch_size * config.length
    print(
        f"batch {config.batch_size} x {config.length}: {1e3 * each:.2f} ms, "
        f"{tokens / each / 1e6:.1f} M tokens/s, {100 * each / step_seconds:.2f} % of a step of "
        f"{step_seconds} s; prefetched, a step waits {1e3 * float(np.median(waits)):.2f} ms"
    )


def packing(documents: int = 200_000, length: int = 2048) -> None:
    lengths = np.random.default_rng(0).lognormal(6, 1, documents).astype(int).clip(1, length)
    for fit in (best_fit, first_fit):
        bins, seconds, _ = timed(lambda: fit(lengths.tolist(), length))
        fill = lengths.sum() / (len(bins) * length)
        print(f"{fit.__name__}: {documents / seconds / 1e6:.2f} M documents/s, {fill:.2%} full")


def timed(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """`(result, CPU seconds, wall seconds)`."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return result, time.process_time() - cpu, time.perf_counter() - wall


if __name__ == "__main__":
    main()
