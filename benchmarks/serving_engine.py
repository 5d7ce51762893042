"""The rows of `serving.py` that need the engine itself: a process that prints one JSON object.

    python -m benchmarks.serving_engine CASE CHECKPOINT

continuous: 64 answers of 8 to 256 tokens in 16 rows, as slots become free and in batches that run
until their longest answer ends. prefix: 32 prompts with 512 tokens in common, with and without the
cache. chunks: a prompt of 1024 tokens that arrives among 8 that decode, in chunks of 128 or whole.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from serving import Engine, EngineSettings, SamplingParams

ROWS, ANSWERS, SHORTEST, LONGEST = 16, 64, 8, 256
SHARED, OWN, SHARERS = 512, 32, 32
LONG, CHUNK, DECODING, AROUND = 1024, 128, 8, 160
VOCAB = 4096


def greedy(tokens: int) -> SamplingParams:
    """So many tokens, the likeliest ones."""
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)


def ids(rng: np.random.Generator, count: int) -> list[int]:
    """A prompt of random tokens."""
    return rng.integers(2, VOCAB, count).tolist()


def continuous(checkpoint: str) -> dict[str, Any]:
    """New tokens a second of both ways; tokens beyond an answer's own length do not count."""
    rng = np.random.default_rng(0)
    prompts = [ids(rng, 16) for _ in range(ANSWERS)]
    lengths = rng.integers(SHORTEST, LONGEST, ANSWERS, endpoint=True).tolist()
    waves = [slice(first, first + ROWS) for first in range(0, ANSWERS, ROWS)]
    settings = EngineSettings(
        max_num_seqs=ROWS, max_model_len=512, decode_sizes=(ROWS,), chunk_sizes=(256,),
        page_widths=(32,), max_num_batched_tokens=256, prefix_caching=False,
    )  # fmt: skip
    with Engine.open(checkpoint, settings) as engine:
        engine.wait_ready()
        engine.generate(prompts[:ROWS], greedy(4))
        began = time.perf_counter()
        engine.generate(prompts, [greedy(length) for length in lengths])
        flowing = time.perf_counter() - began
        began = time.perf_counter()
        for wave in waves:
            engine.generate(prompts[wave], greedy(max(lengths[wave])))
        static = time.perf_counter() - began
    padded = sum(max(lengths[wave]) * ROWS for wave in waves)
    return {
        "continuous": sum(lengths) / flowing,
        "static": sum(lengths) / static,
        "ideal": padded / sum(lengths),
    }


async def first_tokens(engine: Engine, prompts: Sequence[list[int]]) -> list[float]:
    """Seconds to the first token of prompts that arrive together."""

    async def one(prompt: list[int]) -> float:
        began = time.perf_counter()
        answer = engine.submit(prompt, greedy(4))
        await anext(answer)
        seconds = time.perf_counter() - began
        await answer.all()
        return seconds

    return list(await asyncio.gather(*map(one, prompts)))


def prefix(checkpoint: str) -> dict[str, Any]:
    """Median time to the first token and prompt tokens computed, with the cache and without."""
    found = {}
    for name, cached in (("on", True), ("off", False)):
        settings = EngineSettings(
            max_num_seqs=SHARERS, max_model_len=1024, prefix_caching=cached, page_widths=(64,),
            decode_sizes=(SHARERS,), chunk_sizes=(2048,),
        )  # fmt: skip
        with Engine.open(checkpoint, settings) as engine:
            engine.wait_ready()
            for seed in (0, 1):  # The first time warms up.
                rng = np.random.default_rng(seed)
                shared = ids(rng, SHARED)
                before = engine.stats()
                seconds = asyncio.run(
                    first_tokens(engine, [shared + ids(rng, OWN) for _ in range(SHARERS)])
                )
            after = engine.stats()
        hits = after.prefix_hits - before.prefix_hits
        computed = after.prompt_tokens - before.prompt_tokens - hits
        found[name] = {"first": median(seconds), "computed": computed}
    return found


async def gaps(engine: Engine, rng: np.random.Generator) -> list[float]:
    """Times between tokens of those that decode, from when the long prompt arrives on."""
    found: list[float] = []
    arrived = asyncio.Event()

    async def decoding(prompt: list[int]) -> None:
        last = None
        async for output in engine.submit(prompt, greedy(AROUND)):
            now = time.perf_counter()
            if arrived.is_set() and last is not None:
                found.append(now - last)
            last = now
            if output.completion_tokens == AROUND // 4:
                arrived.set()

    async def long() -> None:
        await arrived.wait()
        await engine.submit(ids(rng, LONG), greedy(4)).all()

    await asyncio.gather(long(), *(decoding(ids(rng, 16)) for _ in range(DECODING)))
    return found


def chunks(checkpoint: str) -> dict[str, Any]:
    """The longest gap with chunks of 128 tokens, and with whole prompts."""
    found = {}
    for name, size in (("chunked", CHUNK), ("whole", 2 * LONG)):
        settings = EngineSettings(
            max_num_seqs=16, max_model_len=1280, max_num_batched_tokens=size, prefix_caching=False,
            page_widths=(80,), decode_sizes=(8, 16),
            chunk_sizes=(min(size, LONG + 2 * DECODING),),
        )  # fmt: skip
        with Engine.open(checkpoint, settings) as engine:
            engine.wait_ready()
            rng = np.random.default_rng(0)
            asyncio.run(gaps(engine, rng))
            found[name] = median(max(asyncio.run(gaps(engine, rng))) for _ in range(3))
    return found


CASES = {"continuous": continuous, "prefix": prefix, "chunks": chunks}

if __name__ == "__main__":
    print(json.dumps(CASES[sys.argv[1]](sys.argv[2])))
