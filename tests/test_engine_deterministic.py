"""`deterministic`: results that are equal to the bit, whatever else runs, in bfloat16 too."""

import dataclasses
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_engine import SETTINGS, TOKENIZER

from model import ModelConfig, abstract
from model.checkpoint import Checkpoint
from serving import Engine, SamplingParams

NEW, COUNT = 8, 8
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW, logprobs=2, ignore_eos=True)
HOT = dataclasses.replace(GREEDY, temperature=1.1, top_p=0.9, seed=3, n=2)
SHARED = list(b"a prefix that many share")
CONFIG = ModelConfig(
    vocab_size=TOKENIZER.vocab_size, d_model=128, num_layers=2, num_heads=4, kv_heads=2, d_ff=256
)
"""Wide enough that products of other shapes sum in another order."""


def engine_of(**changes):
    rng = np.random.default_rng(1)
    draw = lambda leaf: jnp.asarray(rng.normal(scale=0.1, size=leaf.shape), leaf.dtype)  # noqa: E731
    params = jax.tree.map(draw, abstract(CONFIG))
    made = Checkpoint(CONFIG, params, TOKENIZER.files(), {}, Path("runs/tiny"))
    return Engine(made, dataclasses.replace(SETTINGS, decode_sizes=(1, 4), **changes))


def prompts():
    rng = random.Random(0)
    tails = [[rng.randrange(256) for _ in range(rng.randint(1, 9))] for _ in range(COUNT)]
    return [SHARED[: rng.choice([0, 8, 13, 24])] + tail for tail in tails]


def told(results):
    """Tokens and their log-probabilities, every bit of them."""
    return [
        [(each.token, each.logprob, each.top) for each in choice.logprobs]
        for result in results
        for choice in result.choices
    ]


def in_a_crowd(engine):
    params = [GREEDY if i % 2 else HOT for i in range(COUNT)]
    return told(engine.generate(prompts(), params))


def by_itself(engine):
    found = []
    for i, prompt in enumerate(prompts()):
        found += engine.generate([prompt], GREEDY if i % 2 else HOT)
        engine.reset_prefix_cache()
    return told(found)


@pytest.mark.parametrize("kind", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_bits_do_not_depend_on_what_else_runs(kind):
    """Alone; in a crowd; with all prefixes cached; in chunks of other sizes, after losing pages."""
    common = {"deterministic": True, "compute_dtype": kind}
    with engine_of(**common) as engine:
        alone = by_itself(engine)
        assert in_a_crowd(engine) == alone
        hits = engine.stats().prefix_hits
        assert in_a_crowd(engine) == alone
        assert engine.stats().prefix_hits > hits
        assert engine.stats().compilations == {"warmup": 0, "serving": 1}
    with engine_of(**common, num_pages=13, long_prefill_token_threshold=5) as engine:
        assert in_a_crowd(engine) == alone
        assert engine.stats().preemptions > 0


def test_without_it_they_do():
    with engine_of(compute_dtype="float32") as engine:
        assert by_itself(engine) != in_a_crowd(engine)
