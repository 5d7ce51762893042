"""The GPU engine of `flash`: kernels for Hopper (H100, H200) in Pallas' Mosaic GPU back end."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.attention import gpu_backward, gpu_forward
from kernels_pallas.attention.chunked import Chunked
from kernels_pallas.attention.gpu_forward import ROWS, WARPGROUPS, Call
from kernels_pallas.attention.scores import Rules
from kernels_pallas.attention.visits import block_kinds, by_row
from kernels_pallas.target import Target

Array = jax.Array

HOPPER = re.compile(r"\b(H100|H200|H800|H20|GH200)\b")
"""In the names of devices whose tensor cores the kernels are written for."""
MISCOMPILES = (12080, 12091)
"""Versions of CUDA, from and below, whose assembler breaks kernels with masks in registers."""
WIDEST, WIDEST_BACKWARD = 256, 128


def obstacle(target: Target, q: Any, k: Any, v: Any) -> str | None:
    """Why the kernels do not serve; None if they do."""
    if not HOPPER.search(target.device_kind):
        return f"the GPU kernels are for Hopper (H100, H200), and this is {target.device_kind}"
    cuda = _cuda_version()
    if cuda is not None and MISCOMPILES[0] <= cuda < MISCOMPILES[1]:
        return f"CUDA {cuda} miscompiles masked kernels; 12.9.1 or newer does not"
    kinds = {x.dtype for x in (q, k, v)}
    if len(kinds) > 1 or not kinds <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}:
        names = ", ".join(sorted(str(kind) for kind in kinds))
        return f"q, k and v are {names}; the GPU kernels take bfloat16 or float16, all the same"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] > WIDEST:
        return f"head_dim {q.shape[-1]} and value_dim {v.shape[-1]} differ or exceed {WIDEST}"
    if 0 in (*q.shape, *k.shape):
        return f"an axis is empty: q {q.shape}, k {k.shape}"
    return None


def _cuda_version() -> int | None:
    """Such as 12091; None where no GPU says."""
    try:
        said = jax.local_devices(backend="gpu")[0].client.platform_version
    except RuntimeError:
        return None
    found = re.search(r"cuda (\d{5})", said)
    return int(found.group(1)) if found else None


@dataclass(frozen=True)
class Hopper:
    """See `flash.Engine`. simulate: run in Pallas' simulator, on a CPU."""

    simulate: bool = False
    heads: int = 1
    rows: int = WARPGROUPS * ROWS
    columns: int = 128

    @property
    def platform(self) -> str | None:
        """See `flash.Engine`."""
        return "simulator" if self.simulate else "cuda"

    def forward(
        self, rules: Rules, q: Array, k: Array, v: Array, slopes: Array, query_places: Array,
        key_places: Array,
    ) -> tuple[Array, Array]:  # fmt: skip
        """See `flash.Engine`."""
        shape, dim = q.shape[:-1], v.shape[-1]
        columns = self.columns if dim <= WIDEST_BACKWARD else self.columns // 2
        arrays = _by_head(slopes, query_places, key_places, q, k, v)
        kinds = block_kinds(rules, query_places, key_places, WARPGROUPS * ROWS, columns)
        call = Call(rules, columns, simulate=self.simulate)
        out, lse = gpu_forward.forward(call, *by_row(kinds), *arrays)
        return out[..., :dim].reshape(*shape, dim), lse.reshape(shape)

    def backward(
        self, rules: Rules, q: Array, k: Array, v: Array, slopes: Array, query_places: Array,
        key_places: Array, d_out: Array, lse: Array, delta: Array,
    ) -> tuple[Array, Array, Array, Array]:  # fmt: skip
        """See `flash.Engine`; heads wider than 128 do not fit into registers and go block by block
        in plain JAX.
        """
        places = (query_places, key_places)
        if max(q.shape[-1], v.shape[-1]) > WIDEST_BACKWARD:
            engine = Chunked(self.heads, self.rows, self.columns)
            return engine.backward(rules, q, k, v, slopes, *places, d_out, lse, delta)
        arrays: Any = (*_by_head(slopes, *places, q, k, v), _joined(_padded(d_out)))
        arrays += (_joined(lse), _joined(delta))
        call = Call(rules, ROWS, simulate=self.simulate)
        rows = block_kinds(rules, *places, WARPGROUPS * ROWS, ROWS)
        d_q, d_slopes = gpu_backward.of_queries(call, *by_row(rows), *arrays)
        columns = block_kinds(rules, *places, ROWS, WARPGROUPS * ROWS)
        d_k, d_v = gpu_backward.of_keys(call, *by_row(jnp.swapaxes(columns, 1, 2)), *arrays)
        d_q = d_q[..., : q.shape[-1]].reshape(q.shape)
        d_k, d_v = d_k[..., : k.shape[-1]], d_v[..., : v.shape[-1]]
        d_q, d_k, d_v = (x.astype(jnp.float32) for x in (d_q, d_k, d_v))
        return d_q, d_k, d_v, d_slopes.reshape(lse.shape)


def _by_head(
    slopes: Array, query_places: Array, key_places: Array, q: Array, k: Array, v: Array
) -> Any:
    """Heads in one axis, and head_dim a multiple of 64."""
    q, k, v = (_padded(x) for x in (q, k, v))
    q = _joined(q)
    return slopes.reshape(q.shape[:2]), query_places, key_places, q, k, v


def _joined(x: Array) -> Array:
    return x.reshape(x.shape[0], -1, *x.shape[4:])


def _padded(x: Array) -> Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % 64)])
