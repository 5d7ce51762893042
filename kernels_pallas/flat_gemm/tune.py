"""What tuning measures of the flat product: which route is fastest, on a CPU."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from kernels_pallas.flat_gemm import reference
from kernels_pallas.flat_gemm.api import flat_gemm
from kernels_pallas.flat_gemm.routes import PADDED_ROWS, ROUTES, default_route, tuning_key
from kernels_pallas.flat_gemm.shapes import SHAPES
from kernels_pallas.tuning.key import Key
from kernels_pallas.tuning.tunable import Case, Tunable


def keys(sizes: Mapping[str, int], device_kind: str) -> list[Key]:
    """Both types."""
    return [
        tuning_key(**sizes, dtype=dtype, device_kind=device_kind)
        for dtype in (jnp.float32, jnp.bfloat16)
    ]


def default(key: Key) -> dict[str, str]:
    """See `routes`."""
    return {"route": default_route(dict(key.sizes)["m"], key.dtype, "cpu")}


def candidates(key: Key) -> list[dict[str, str]]:
    """Every route that is another with so many rows."""
    m, most = dict(key.sizes)["m"], {"padded": PADDED_ROWS - 1, "vector": 1}
    return [{"route": route} for route in ROUTES if m <= most.get(route, m)]


def case(key: Key) -> Case:
    """One call."""
    sizes, rng = dict(key.sizes), np.random.default_rng(0)
    dtype = jnp.dtype(key.dtype)
    x = jnp.asarray(rng.normal(size=(sizes["m"], sizes["k"])), dtype)
    w = jnp.asarray(rng.normal(size=(sizes["k"], sizes["n"])), dtype)
    return Case(
        lambda x, w: flat_gemm(x, w, dtype=jnp.float32),
        (x, w),
        reference.matmul,
        1e-4 if dtype == jnp.float32 else 2e-2,
    )


ROUTE = Tunable("cpu", SHAPES, keys, default, candidates, case)
