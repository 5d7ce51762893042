"""The TPU engine of `flash`: block sizes for each generation, and its two kernels over sequences of
any length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.attention.scores import Rules
from kernels_pallas.attention.tpu_backward import backward
from kernels_pallas.attention.tpu_forward import LANES, Blocks, Call, forward
from kernels_pallas.attention.visits import block_kinds, visits
from kernels_pallas.target import Target
from kernels_pallas.tpu_topology import GENERATIONS
from kernels_pallas.tuning import Key, best

Array = jax.Array

MOST_VISITS = 1 << 17
"""Visits of one call: their codes lie in scalar memory, of which half a MiB is taken."""


@dataclass(frozen=True)
class Tuning:
    """Block sizes of the two kernels; lengths of blocks of the second divide those of the first.

    keys_resident: keys whose gradients the backward kernel holds in vector memory at a time.
    """

    forward: Blocks
    backward: Blocks
    keys_resident: int


def default_blocks(
    generation: str | None, group: int, head_dim: int
) -> tuple[dict[str, int], dict[str, int]]:
    """The largest blocks of the forward and of the backward kernel, where nothing was measured, for
    `group` query heads to a key head; None takes sizes that fit everywhere.

    Compiled for every generation by `tests/test_attention_tpu.py`; not measured on a TPU.
    """
    small = generation in (None, "v4")
    wide = head_dim > LANES
    heads = 1 if small and wide else max(d for d in range(1, 5) if group % d == 0)
    resident = {"v5e": 16384, "v5p": 8192, "v6e": 16384, "7x": 8192}.get(generation or "", 2048)
    first = {
        "heads": heads,
        "queries": 512 if small or wide else 1024,
        "keys": 512 if small and wide else 1024,
        "keys_at_once": 256 if small and wide else 512,
    }
    second = {
        "queries": 256 if small or wide else 512,
        "keys": 256 if small else 512,
        "keys_resident": resident * LANES // max(LANES, head_dim),
    }
    return first, second


def tuning_for(
    generation: str | None, queries: int, keys: int, group: int, head_dim: int
) -> Tuning:
    """The default block sizes of a call."""
    return fitted(*default_blocks(generation, group, head_dim), queries, keys)


def fitted(first: Mapping[str, int], second: Mapping[str, int], queries: int, keys: int) -> Tuning:
    """Blocks up to the sizes of `default_blocks` that cut these lengths with little padding."""
    rows, columns = _even(queries, first["queries"]), _even(keys, first["keys"])
    at_once = _divisor(columns, first["keys_at_once"])
    back_rows, back_columns = _divisor(rows, second["queries"]), _divisor(columns, second["keys"])
    return Tuning(
        Blocks(first["heads"], rows, columns, at_once),
        Blocks(first["heads"], back_rows, back_columns, back_columns),
        second["keys_resident"],
    )


def tuning_key(
    kernel: str,
    *,
    queries: int,
    keys: int,
    window: int | None,
    group: int,
    head_dim: int,
    dtype: Any,
    device_kind: str,
) -> Key:
    """What the blocks of "tpu_forward" or "tpu_backward" depend on."""
    sizes = {"queries": queries, "keys": keys, "window": min(window or keys, keys)}
    return Key.of(f"attention.{kernel}", sizes, dtype, device_kind, group=group, head_dim=head_dim)


def engine_for(target: Target, q: Any, k: Any, v: Any, window: int | None = None) -> Tpu:
    """The engine for arrays of these shapes, with the block sizes that were measured for them."""
    group = q.shape[2] // k.shape[2]
    width = max(q.shape[-1], v.shape[-1])
    call = {"queries": q.shape[1], "keys": k.shape[1], "window": window, "group": group}
    call |= {"head_dim": width, "dtype": q.dtype, "device_kind": target.device_kind}

    def fits(blocks: Mapping[str, Any]) -> bool:
        lengths = [size for name, size in blocks.items() if name != "heads"]
        return group % blocks.get("heads", 1) == 0 and all(n > 0 == n % LANES for n in lengths)

    defaults = default_blocks(target.generation, group, width)
    first, second = (
        best(tuning_key(kernel, **call), default, fits=fits)
        for kernel, default in zip(("tpu_forward", "tpu_backward"), defaults, strict=True)
    )
    limit = None
    if target.generation not in (None, "v4"):
        limit = GENERATIONS[target.generation].vmem_bytes * 3 // 4
    return Tpu(fitted(first, second, q.shape[1], k.shape[1]), limit)


def obstacle(q: Any, k: Any, v: Any) -> str | None:
    """Why the kernels do not take these arrays; None if they do."""
    kinds = {x.dtype for x in (q, k, v)}
    if len(kinds) > 1 or not kinds <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}:
        names = ", ".join(sorted(str(kind) for kind in kinds))
        return f"q, k and v are {names}; the TPU kernels take bfloat16 or float32, all the same"
    if max(q.shape[-1], v.shape[-1]) > 512:
        return f"head_dim {max(q.shape[-1], v.shape[-1])} is more than 512"
    if 0 in (*q.shape, *k.shape, *v.shape):
        return f"an axis is empty: q {q.shape}, k {k.shape}, v {v.shape}"
    return None


@dataclass(frozen=True)
class Tpu:
    """See `flash.Engine`. interpret: run the kernels as plain JAX, on any platform."""

    tuning: Tuning
    vmem_limit: int | None = None
    interpret: bool = False

    @property
    def heads(self) -> int:
        """See `flash.Engine`."""
        return self.tuning.forward.heads

    @property
    def rows(self) -> int:
        """See `flash.Engine`."""
        return self.tuning.forward.queries

    @property
    def columns(self) -> int:
        """See `flash.Engine`."""
        return self.tuning.forward.keys

    @property
    def platform(self) -> str | None:
        """See `flash.Engine`."""
        return None if self.interpret else "tpu"

    def forward(
        self, rules: Rules, q: Array, k: Array, v: Array, slopes: Array, query_places: Array,
        key_places: Array,
    ) -> tuple[Array, Array]:  # fmt: skip
        """See `flash.Engine`."""
        blocks = self.tuning.forward
        rows, columns = q.shape[4] // blocks.queries, k.shape[2] // blocks.keys
        if q.shape[0] * rows * columns > MOST_VISITS:
            return self._forward_in_pieces(rules, q, k, v, slopes, query_places, key_places)
        where = (query_places, key_places)
        codes, steps = visits(block_kinds(rules, *where, blocks.queries, blocks.keys))
        call = Call(rules, blocks, self.vmem_limit, self.interpret)
        return forward(call, codes.ravel(), steps, slopes.ravel(), where, q, k, v)

    def _forward_in_pieces(
        self, rules: Rules, q: Array, k: Array, v: Array, slopes: Array, query_places: Array,
        key_places: Array,
    ) -> tuple[Array, Array]:  # fmt: skip
        """One sequence at a time, and of one sequence half of the queries at a time."""
        if q.shape[0] > 1:
            single = jax.tree.map(lambda x: x[:, None], (q, k, v, slopes, query_places, key_places))
            out, lse = jax.lax.map(lambda one: self.forward(rules, *one), single)
            return out[:, 0], lse[:, 0]
        half = -(-q.shape[4] // (2 * self.rows)) * self.rows
        parts = [
            self.forward(rules, q[..., at, :], k, v, slopes, query_places[..., at], key_places)
            for at in (slice(None, half), slice(half, None))
        ]
        out, lse = zip(*parts, strict=True)
        return jnp.concatenate(out, axis=4), jnp.concatenate(lse, axis=4)

    def backward(
        self, rules: Rules, q: Array, k: Array, v: Array, slopes: Array, query_places: Array,
        key_places: Array, d_out: Array, lse: Array, delta: Array,
    ) -> tuple[Array, Array, Array, Array]:  # fmt: skip
        """See `flash.Engine`; for as many keys at a time as the kernel can hold gradients of."""
        arrays = (q, k, v, slopes, query_places, key_places, d_out, lse, delta)
        blocks, keys = self.tuning.backward, k.shape[2]
        visited = (
            min(keys, self.tuning.keys_resident) // blocks.keys * (q.shape[4] // blocks.queries)
        )
        if q.shape[0] > 1 and q.shape[0] * visited > MOST_VISITS:
            single = jax.tree.map(lambda x: x[:, None], arrays)
            results = jax.lax.map(lambda one: self.backward(rules, *one), single)
            return jax.tree.map(lambda x: x[:, 0], results)
        pieces = -(-keys // self.tuning.keys_resident)
        piece = -(-keys // (pieces * blocks.keys)) * blocks.keys
        call = Call(rules, blocks, self.vmem_limit, self.interpret)

        def run(k: Array, v: Array, key_places: Array) -> tuple[Array, Array, Array, Array]:
            where = (query_places, key_places)
            codes, steps = visits(block_kinds(rules, *where, blocks.queries, blocks.keys))
            d_q, d_k, d_v, d_slopes = backward(
                call, codes.ravel(), steps, slopes.ravel(), where, q, k, v, d_out, lse, delta
            )
            return d_q, d_k * rules.scale, d_v, d_slopes

        def step(total: Any, part: Any) -> tuple[Any, Any]:
            d_q, d_k, d_v, d_slopes = run(*part)
            return jax.tree.map(jnp.add, total, (d_q, d_slopes)), (d_k, d_v)

        if pieces == 1:
            return run(k, v, key_places)
        start = (jnp.zeros(q.shape, jnp.float32), jnp.zeros(lse.shape, jnp.float32))
        parts = tuple(_pieces(x, pieces, piece) for x in (k, v, key_places))
        (d_q, d_slopes), parts = jax.lax.scan(step, start, parts)
        d_k, d_v = (_whole(x, keys) for x in parts)
        return d_q, d_k, d_v, d_slopes


def _pieces(x: Array, pieces: int, piece: int) -> Array:
    """Axis 2 in pieces, in front; padding is of no document."""
    padding = [(0, 0)] * x.ndim
    padding[2] = (0, pieces * piece - x.shape[2])
    x = jnp.pad(x, padding)
    return jnp.moveaxis(x.reshape(*x.shape[:2], pieces, piece, *x.shape[3:]), 2, 0)


def _whole(x: Array, length: int) -> Array:
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :length]


def _even(length: int, most: int) -> int:
    """Multiple of 128 up to `most` that cuts `length` into blocks with little padding."""
    pieces = -(-length // most)
    return -(-length // (pieces * LANES)) * LANES


def _divisor(length: int, most: int) -> int:
    """The largest multiple of 128 up to `most` that divides `length`."""
    return max(d for d in range(LANES, most + 1, LANES) if length % d == 0)
