"""How far a quantized matrix is from what it replaces, and what it costs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from surgery.calibration import Stats
from weights import bits_per_weight, dequantize, nominal_bits

Array = jax.Array


def errors(w: Array, weight: Any, stats: Stats | None) -> dict[str, Any]:
    """Of a matrix `w [K, N]` (or a stack) and the weight that replaces it.

    weight_error: `|W' - W|^2 / |W|^2`.
    proxy_loss: `tr(D^T H D) / tr(W^T H W)` with `D = W' - W`, the relative squared error of the
        output, if there are statistics.
    output_error: the mean squared error of an output.
    bits, nominal_bits: a weight, all stored arrays counted, and codes only.
    """
    found = dict(_errors(w, weight, stats))
    return {**found, "bits": bits_per_weight(weight), "nominal_bits": nominal_bits(weight)}


@jax.jit
def _errors(w: Array, weight: Any, stats: Stats | None) -> dict[str, Array]:
    delta = dequantize(weight, jnp.float32) - w
    found = {"weight_error": jnp.sum(delta**2) / jnp.maximum(jnp.sum(w**2), 1e-30)}
    if stats is not None:
        lost, whole = _energy(delta, stats.gram), _energy(w, stats.gram)
        found["proxy_loss"] = lost / jnp.maximum(whole, 1e-30)
        found["output_error"] = lost / (jnp.maximum(jnp.sum(stats.count), 1) * w.shape[-1])
    return found


def _energy(matrix: Array, gram: Array) -> Array:
    """`tr(M^T G M)`."""
    return jnp.sum(matrix * jnp.matmul(gram, matrix, precision=jax.lax.Precision.HIGHEST))
