"""What tuning measures of attention to quantized pages on TPUs: the tokens of a block."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.kv_quant import reference, tpu
from kernels_pallas.kv_quant.api import quantized_attention
from kernels_pallas.kv_quant.pages import Int8Pages, KiviPages, QuantizedPages
from kernels_pallas.kv_quant.shapes import SHAPES as CALLS
from kernels_pallas.tuning.key import Key
from kernels_pallas.tuning.tunable import Case, Tunable

SHAPES: dict[str, dict[str, int]] = {
    name: {field: getattr(shape, field) for field in shape.__dataclass_fields__}
    for name, shape in CALLS.items()
}


def _keys(sizes: Mapping[str, int], device_kind: str) -> list[Key]:
    return [tpu.tuning_key(**sizes, dtype=jnp.bfloat16, device_kind=device_kind)]


def _candidates(key: Key) -> list[dict[str, int]]:
    """Whole pages, from a quarter to four times the default."""
    size, length = dict(key.options)["page_size"], dict(key.sizes)["length"]
    tokens = [tpu.KEYS * times // 4 for times in (1, 2, 4, 8, 16)]
    return [{"tokens": n} for n in tokens if size <= n <= max(length, tpu.KEYS)]


def _case(key: Key) -> Case:
    """One query of each head; full pages of any codes, and of scales around one."""
    sizes, options = dict(key.sizes), dict(key.options)
    kv_heads, dim, size = (options[name] for name in ("kv_heads", "head_dim", "page_size"))
    batch, width = sizes["batch"], -(-sizes["length"] // size)
    layout = (1, batch * width, kv_heads, size, dim)

    def empty() -> QuantizedPages:
        if options["bits"] == 8:
            return Int8Pages.empty(*layout)
        return KiviPages.empty(*layout, bits=options["bits"])

    rng = np.random.default_rng(0)

    def draw(shaped: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(shaped.dtype, jnp.integer):
            limits = jnp.iinfo(shaped.dtype)
            codes = rng.integers(limits.min, limits.max, shaped.shape, dtype=shaped.dtype)
            return jnp.asarray(codes)
        return jnp.asarray(rng.uniform(0.5, 1.0, shaped.shape) / 64, shaped.dtype)

    pages = jax.tree.map(draw, jax.eval_shape(empty))
    q = jnp.asarray(rng.normal(size=(batch, 1, sizes["rows"] * kv_heads, dim)), key.dtype)
    table = jnp.asarray(rng.permutation(batch * width).reshape(batch, width), jnp.int32)
    return Case(
        lambda *arrays: quantized_attention(*arrays, implementation="tpu"),
        (q, pages, table, jnp.full(batch, sizes["length"], jnp.int32)),
        reference.quantized_attention,
        2e-2,
    )


TPU = Tunable("tpu", SHAPES, _keys, lambda key: {"tokens": tpu.KEYS}, _candidates, _case)
