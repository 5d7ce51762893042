"""What tuning measures of the grouped product: the rows of a block on a CPU (`blocks`)."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.grouped_matmul import reference
from kernels_pallas.grouped_matmul.api import grouped_matmul, grouped_outer
from kernels_pallas.grouped_matmul.blocks import DEFAULT_ROWS, tuning_key
from kernels_pallas.tuning.key import Key
from kernels_pallas.tuning.tunable import Case, Tunable

GROUPS = 8
SHAPES: dict[str, dict[str, int]] = {
    f"{rows}_rows_of_{d_in}_to_{d_out}": {"rows_per_group": rows, "d_in": d_in, "d_out": d_out}
    for rows in (8, 64, 512)
    for d_in, d_out in ((64, 256), (192, 512), (512, 2048))
}
"""Experts of small models, which is what a CPU trains, at few and at many rows each."""


def keys(sizes: Mapping[str, int], device_kind: str) -> list[Key]:
    """Both types, and the three products of a training step."""
    return [
        tuning_key(product, **sizes, dtype=dtype, device_kind=device_kind)
        for dtype in (jnp.float32, jnp.bfloat16)
        for product in DEFAULT_ROWS
    ]


def default(key: Key) -> dict[str, int]:
    """See `blocks`."""
    return {"rows": DEFAULT_ROWS[dict(key.options)["product"]]}


def candidates(key: Key) -> list[dict[str, int]]:
    """From a vector register's rows to where most of a block is another group's."""
    most = max(4 * dict(key.sizes)["rows_per_group"], 32)
    return [{"rows": rows} for rows in (4, 8, 16, 32, 64, 128, 256, 512) if rows <= most]


def case(key: Key) -> Case:
    """Eight groups of uneven sizes, as a router leaves them."""
    sizes, product = dict(key.sizes), dict(key.options)["product"]
    rows = GROUPS * sizes["rows_per_group"]
    rng = np.random.default_rng(0)
    counts = jnp.asarray(rng.multinomial(rows, rng.dirichlet(np.full(GROUPS, 4.0))), jnp.int32)
    dtype = jnp.dtype(key.dtype)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    x, g = draw(rows, sizes["d_in"]), draw(rows, sizes["d_out"])
    if product == "outer":
        return Case(
            lambda x, g, counts: grouped_outer(
                x, g, counts, dtype=jnp.float32, implementation="blocks"
            ),
            (x, g, counts),
            lambda x, g, counts: reference.grouped_outer(x, g, counts, jnp.float32),
            1e-4,
        )
    transposed = product == "transposed"
    return Case(
        lambda x, w, counts: grouped_matmul(
            x, w, counts, transposed=transposed, implementation="blocks"
        ),
        (g if transposed else x, draw(GROUPS, sizes["d_in"], sizes["d_out"]), counts),
        lambda x, w, counts: reference.grouped_matmul(x, w, counts, transposed, dtype),
        1e-4 if dtype == jnp.float32 else 2e-2,
    )


BLOCKS = Tunable("cpu", SHAPES, keys, default, candidates, case)
