"""The product of few rows with a dense matrix, by the route that was measured to be fastest."""

from __future__ import annotations

import difflib
import functools
from typing import Any

import jax

from kernels_pallas.flat_gemm import routes

Array = jax.Array

IMPLEMENTATIONS: tuple[str, ...] = tuple(routes.ROUTES)
"""Names of routes."""


def flat_gemm(x: Array, w: Array, *, dtype: Any = None, implementation: str | None = None) -> Array:
    """`x @ w`, summed in float32; differentiable in both.

    Args:
        x: `[..., K]`; float32 or bfloat16.
        w: `[K, N]`; multiplied in the type of `x`, its gradient comes back in its own.
        dtype: of the result, `[..., N]`. None is `x.dtype`.
        implementation: a name in `IMPLEMENTATIONS`; None looks it up by device, type and sizes
            (`routes.choose`), while tracing. `python -m kernels_pallas tune
            --kernels=flat_gemm.routes` measures this machine.

    Raises `ValueError` naming the argument that does not fit.
    """
    if w.ndim != 2 or x.shape[-1] != w.shape[0]:
        raise ValueError(f"flat_gemm takes x [..., K] and w [K, N]; got {x.shape} and {w.shape}")
    if implementation is not None and implementation not in routes.ROUTES:
        near = ", ".join(difflib.get_close_matches(implementation, routes.ROUTES, cutoff=0.0))
        raise ValueError(
            f"flat_gemm implementation {implementation!r} is not known; nearest: {near}"
        )
    flat = x.reshape(-1, x.shape[-1])
    y: Array = _product(flat, w, implementation or routes.choose(flat, w))  # pyright: ignore
    return y.reshape(*x.shape[:-1], w.shape[1]).astype(dtype or x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _product(x: Array, w: Array, route: str) -> Array:
    return routes.ROUTES[route](x, w)


@_product.defjvp
def _tangent(route: str, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """The library's products: gradients have the rows of a training step."""
    (x, w), (of_x, of_w) = primals, tangents
    library = routes.ROUTES["library"]
    return routes.ROUTES[route](x, w), library(of_x, w) + library(x, of_w)
