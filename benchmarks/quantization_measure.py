"""What `benchmarks/quantization.py` measures of a model beside the unquantized one: losses on the
same held-out windows, agreement, bytes, and speed with the two in turns.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model import ModelConfig, Runtime, checkpoint, generate, hidden_states
from model.head import logits
from surgery.blocks import without_layers
from weights import is_format, map_with_path, prepare

Array = jax.Array
Params = Mapping[str, Any]
MICRO_BATCH = 4
"""Windows that are run at a time, at most."""
DRAWS = 2000
"""Of the bootstrap."""
PROMPT = 16
"""Tokens of the prompt that is continued."""


@dataclass(frozen=True)
class Losses:
    """Of each held-out window, the mean over its predictions: `float64[windows]`.

    nll: of the next token, in nats.
    kl: of the unquantized model's distribution to this one's, in nats.
    same: share of predictions whose likeliest token is the unquantized model's.
    """

    nll: np.ndarray
    kl: np.ndarray
    same: np.ndarray


class Reference:
    """The unquantized model, what it makes of the held-out windows `int32[windows, length]`."""

    def __init__(
        self, config: ModelConfig, params: Params, tokens: np.ndarray, runtime: Runtime
    ) -> None:
        self.config, self.params = config, params
        self.tokens, self.runtime = tokens, runtime

    @functools.cached_property
    def ready(self) -> Params:
        """Its params as they run."""
        return ready(self.params, self.runtime)

    @functools.cached_property
    def hidden(self) -> np.ndarray:
        """What its head reads `[windows, length, d_model]`: small beside the logits."""
        parts = [
            np.asarray(_hidden(self.ready, self.tokens[rows], self.config, self.runtime))
            for rows in self.batches()
        ]
        return np.concatenate(parts)

    @functools.cached_property
    def losses(self) -> Losses:
        """Its own."""
        return self.compare(self.ready)

    def compare(self, params: Params) -> Losses:
        """The losses of a model of the same config, whose params are `ready`."""
        outer = without_layers(self.ready)
        parts = [
            _compare(outer, params, self.hidden[rows], self.tokens[rows], self.config, self.runtime)
            for rows in self.batches()
        ]
        return Losses(
            *(np.concatenate(part).astype(np.float64) for part in zip(*parts, strict=True))
        )

    def batches(self) -> Iterator[slice]:
        """Equal parts of the windows."""
        count = len(self.tokens)
        size = max(n for n in range(1, MICRO_BATCH + 1) if count % n == 0)
        return (slice(start, start + size) for start in range(0, count, size))


def ready(params: Params, runtime: Runtime) -> Params:
    """On the device in the form that is multiplied fastest there; arrays in the compute type."""
    backend = jax.default_backend()

    def one(path: str, leaf: Any) -> Any:
        leaf = jax.tree.map(jnp.asarray, leaf)
        if is_format(leaf):
            return prepare(leaf, backend)
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(runtime.compute_dtype) if floating else leaf

    return map_with_path(one, params)


def quality(found: Losses, reference: Losses) -> dict[str, Any]:
    """The columns of a row; `window_nll` lets rows be compared in pairs later."""
    differences = found.nll - reference.nll
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(found.nll.mean()))
    return {
        "nll": float(found.nll.mean()),
        "delta_nll": float(differences.mean()),
        "delta_error": bootstrap_error(differences),
        "perplexity": perplexity,
        "kl": float(found.kl.mean()),
        "top1": float(found.same.mean()),
        "window_nll": [round(float(value), 5) for value in found.nll],
    }


def bootstrap_error(differences: np.ndarray, seed: int = 0) -> float:
    """Standard error of the mean of paired differences `[windows]`, windows drawn anew `DRAWS`
    times; 0 of a single one.
    """
    count = len(differences)
    drawn = np.random.default_rng(seed).integers(count, size=(DRAWS, count))
    return float(np.std(differences[drawn].mean(axis=1)))


def bytes_on_disk(config: ModelConfig, params: Params, files: Mapping[str, bytes]) -> int:
    """Of the checkpoint folder that the model makes."""
    with tempfile.TemporaryDirectory() as folder:
        saved = checkpoint.save(Path(folder) / "model", config, params, files)
        return sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())


def decode_speed(
    reference: Reference, params: Params, tokens: int, rounds: int
) -> dict[str, float]:
    """Tokens/s that `generate` adds to one prompt, and how many times as many as the unquantized
    model's: the two take turns, the ratio is the median of the rounds.
    """
    prompt = reference.tokens[:1, :PROMPT]
    sides = (reference.ready, params)
    times: list[tuple[float, ...]] = []
    for _ in range(rounds + 1):
        times.append(tuple(seconds(reference, side, prompt, tokens) for side in sides))
    times = times[1:]  # the first compiles
    return {
        "decode_tokens_per_s": tokens / median(mine for _, mine in times),
        "decode_ratio": median(theirs / mine for theirs, mine in times),
    }


def seconds(reference: Reference, params: Params, prompt: np.ndarray, tokens: int) -> float:
    """Of one call."""
    began = time.perf_counter()
    made = generate(
        params, prompt, reference.config, max_new_tokens=tokens, runtime=reference.runtime
    )
    jax.block_until_ready(made.tokens)
    return time.perf_counter() - began


@functools.partial(jax.jit, static_argnums=(2, 3))
def _hidden(params: Params, tokens: Array, config: ModelConfig, runtime: Runtime) -> Array:
    return hidden_states(params, tokens, config, runtime)[0]


@functools.partial(jax.jit, static_argnums=(4, 5))
def _compare(
    outer: Params,
    params: Params,
    hidden: Array,
    tokens: Array,
    config: ModelConfig,
    runtime: Runtime,
) -> tuple[Array, Array, Array]:
    """NLL, KL and agreement of each window, against the model whose head reads `hidden`."""
    mine = hidden_states(params, tokens, config, runtime)[0]
    found = jax.nn.log_softmax(logits(params, mine, config, runtime)[:, :-1])
    truth = jax.nn.log_softmax(logits(outer, hidden, config, runtime)[:, :-1])
    nll = -jnp.take_along_axis(found, tokens[:, 1:, None], axis=-1)[..., 0]
    kl = jnp.sum(jnp.exp(truth) * (truth - found), axis=-1)
    same = jnp.argmax(found, axis=-1) == jnp.argmax(truth, axis=-1)
    return jnp.mean(nll, axis=1), jnp.mean(kl, axis=1), jnp.mean(same, axis=1)
