"""Products that are left to XLA on TPUs: grouped ones, and flat ones of dense weights; beside the
library's kernels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks.kernel_case import Case, Rival
from kernels_pallas import flat_gemm, grouped_matmul

GROUPED = ("mixtral_8x7b", "qwen15_moe_a27b", "mixtral_8x7b_decode")
FLAT = ("1b_up_16",)


def cases() -> list[Case]:
    """In bfloat16."""
    return [*(grouped(name) for name in GROUPED), *(flat(name) for name in FLAT)]


def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def grouped(name: str) -> Case:
    """Rows of tokens by the matrices of their experts, beside megablox."""
    s = grouped_matmul.SHAPES[name]
    x, w = array(s.rows, s.d_in), array(s.groups, s.d_in, s.d_out)
    sizes = jax.ShapeDtypeStruct((s.groups,), jnp.int32)
    moved = s.rows * (s.d_in + s.d_out) + s.groups * s.d_in * s.d_out

    def megablox(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        from jax.experimental.pallas.ops.tpu.megablox import gmm

        tiling = (min(512, s.rows), 1024, 1024 if s.d_out % 1024 == 0 else 128)
        return gmm(x, w, sizes, jnp.bfloat16, tiling)

    return Case(
        f"grouped product, {name}",
        grouped_matmul.grouped_matmul,
        (x, w, sizes),
        flops=2 * s.rows * s.d_in * s.d_out,
        bytes=2 * moved,
        library=Rival("megablox gmm", megablox),
    )


def flat(name: str) -> Case:
    """Few rows by a dense matrix, beside the library's blocked product."""
    s = flat_gemm.SHAPES[name]

    def blocked(x: jax.Array, w: jax.Array) -> jax.Array:
        from jax.experimental.pallas.ops.tpu.matmul import matmul

        return matmul(x, w, block_shape=(s["m"], 512), block_k=1024, out_dtype=jnp.bfloat16)

    return Case(
        f"flat product, {name}",
        flat_gemm.flat_gemm,
        (array(s["m"], s["k"]), array(s["k"], s["n"])),
        *flat_gemm.cost(**s),
        library=Rival("pallas.ops.tpu.matmul", blocked),
    )
