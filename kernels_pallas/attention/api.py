"""Attention by the name of its implementation; every implementation computes what
`reference.attention` defines.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import jax

from kernels_pallas.attention import cudnn, flash, gpu, reference, tpu
from kernels_pallas.target import current_target, warn_once

Array = jax.Array

MOST_SCORE_BYTES = 4 * 2**30
"""Scores of a whole call beyond which they are computed block by block."""
NOT_RUN_YET = (
    "the Hopper kernels lower for CUDA and agree with it in Pallas' simulator, but have not run on "
    "a device; implementation='hopper' asks for them"
)
FEWEST_QUERIES = 32
"""With fewer queries a row of scores is small, and blocks of queries mostly padding."""


def _tpu(q: Array, k: Array, v: Array, **options: Any) -> Any:
    target, obstacle = current_target(), tpu.obstacle(q, k, v)
    if target.platform != "tpu":
        obstacle = f"this program is compiled for {target.platform}"
    if obstacle is not None:
        raise ValueError(f"attention implementation 'tpu': {obstacle}")
    engine = tpu.engine_for(target, q, k, v, options.get("window"))
    return flash.attention(engine, q, k, v, **options)


def _hopper(q: Array, k: Array, v: Array, **options: Any) -> Any:
    target = current_target()
    obstacle = gpu.obstacle(target, q, k, v)
    if target.platform != "gpu":
        obstacle = f"this program is compiled for {target.platform}"
    if obstacle is not None:
        raise ValueError(f"attention implementation 'hopper': {obstacle}")
    return flash.attention(gpu.Hopper(), q, k, v, **options)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "plain": reference.attention,
    "chunked": flash.chunked,
    "tpu": _tpu,
    "hopper": _hopper,
    "cudnn": cudnn.attention,
}
"""Name -> function with the signature of `reference.attention`."""


def attention(
    q: Array, k: Array, v: Array, *, implementation: str | None = None, **options: Any
) -> Any:
    """`reference.attention` by a named implementation; None picks the best one for the device that
    the program is traced for, by shape and type. Where no kernel serves, the plain function does,
    with one warning.

    Raises `ValueError` naming the nearest known implementation.
    """
    if implementation is None:
        reference.check(q, k, v, options.get("query_segment_ids"), options.get("key_segment_ids"))
        implementation = _best(q, k, v)
    if implementation not in IMPLEMENTATIONS:
        near = ", ".join(difflib.get_close_matches(implementation, IMPLEMENTATIONS, cutoff=0.0))
        raise ValueError(
            f"attention implementation {implementation!r} is not known; nearest: {near}"
        )
    return IMPLEMENTATIONS[implementation](q, k, v, **options)


def _best(q: Array, k: Array, v: Array) -> str:
    batch, queries, heads, _ = q.shape
    target = current_target()
    if target.platform == "tpu" and queries >= FEWEST_QUERIES:
        obstacle = tpu.obstacle(q, k, v)
        if obstacle is None:
            return "tpu"
        warn_once("attention", obstacle)
    if target.platform == "gpu" and queries >= FEWEST_QUERIES:
        warn_once("attention", gpu.obstacle(target, q, k, v) or NOT_RUN_YET)
    scores = 4 * batch * heads * queries * k.shape[1]
    return "chunked" if scores > MOST_SCORE_BYTES else "plain"
