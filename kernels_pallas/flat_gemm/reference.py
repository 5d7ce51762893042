"""The product with a dense matrix in plain `jax.numpy`: the definition, and the library's own."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def matmul(x: Array, w: Array) -> Array:
    """`[M, K] x [K, N] -> float32[M, N]`; `w` is cast to the type of `x`."""
    return jnp.dot(x, w.astype(x.dtype), preferred_element_type=jnp.float32)
