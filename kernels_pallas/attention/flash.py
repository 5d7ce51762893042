"""What all kernels of attention have in common: layout and padding on the way in, gradients, and
the choice that is made when the program is lowered.

Queries, keys and values are laid out by head and padded to whole blocks; padding is zeroed, so that
whatever it holds never reaches a product. An engine computes on that. Its two functions are JAX
primitives: under `jax.vmap` the mapped axis joins the batch, and a program that the compiler is to
partition over several devices by itself, which no kernel can follow, gets the chunked engine.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from kernels_pallas.attention import reference
from kernels_pallas.attention.chunked import Chunked
from kernels_pallas.attention.scores import LOG2E, Rules
from kernels_pallas.target import warn_once

Array = jax.Array

RESIDUALS = "attention_residuals"
"""Name under which the output and the log-sum-exp are marked for rematerialisation policies."""


class Engine(Protocol):
    """A pair of kernels with their block sizes; static and hashable."""

    @property
    def heads(self) -> int:
        """Query heads of a block, a divisor of those that share a key head."""
        ...

    @property
    def rows(self) -> int:
        """Queries are padded to a multiple of this."""
        ...

    @property
    def columns(self) -> int:
        """Keys are padded to a multiple of this."""
        ...

    @property
    def platform(self) -> str | None:
        """The platform that it is lowered for; None if any; "simulator" if its callbacks keep it
        from being lowered as a primitive.
        """
        ...

    def forward(
        self, rules: Rules, q: Array, k: Array, v: Array, slopes: Array, query_places: Array,
        key_places: Array,
    ) -> tuple[Array, Array]:  # fmt: skip
        """Attention by head.

        Args:
            rules: what hides and changes scores.
            q: `[batch, kv_heads, blocks of heads, heads of a block, queries, head_dim]`.
            k: `[batch, kv_heads, keys, head_dim]`.
            v: `[batch, kv_heads, keys, value_dim]`.
            slopes: `float32[batch, kv_heads, blocks of heads, heads of a block]`.
            query_places: `int32[batch, 2, queries]`, positions and documents; tokens of no document
                have -1.
            key_places: `int32[batch, 2, keys]`; tokens of no document have 0.

        Returns out, like q with `value_dim`, and the log-sum-exp, float32, like q without
        `head_dim`.
        """
        ...

    def backward(
        self, rules: Rules, q: Array, k: Array, v: Array, slopes: Array, query_places: Array,
        key_places: Array, d_out: Array, lse: Array, delta: Array,
    ) -> tuple[Array, Array, Array, Array]:  # fmt: skip
        """Gradients of `forward`.

        Args:
            d_out: like out.
            lse: the log-sum-exp in base 2, large and positive for a query that sees nothing.
            delta: like lse; the sum of `d_out * out` less the gradient of the log-sum-exp.

        Returns, all float32: d_q like q, d_k like k, d_v like v, and of each query its share of the
        slope's gradient, like lse.
        """
        ...


def attention(
    engine: Engine,
    q: Array,
    k: Array,
    v: Array,
    *,
    query_positions: Array,
    key_positions: Array,
    query_segment_ids: Array | None = None,
    key_segment_ids: Array | None = None,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    soft_cap: float | None = None,
    alibi_slopes: Array | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """`reference.attention` by an engine; q, k and v of one type."""
    reference.check(q, k, v, query_segment_ids, key_segment_ids)
    batch, queries, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    rows, columns = _up(queries, engine.rows), _up(keys, engine.columns)
    segments = query_segment_ids is not None or keys != columns
    factor = head_dim**-0.5 if scale is None else scale
    rules = Rules(causal, window, sinks, soft_cap, factor, alibi_slopes is not None, segments)
    where = (
        _places(query_positions, query_segment_ids, q.shape[:2], rows, padding=-1),
        _places(key_positions, key_segment_ids, k.shape[:2], columns, padding=0),
    )
    blocks = (batch, kv_heads, -1, engine.heads)
    slopes = jnp.zeros(heads) if alibi_slopes is None else alibi_slopes
    slopes = jnp.broadcast_to(slopes.astype(jnp.float32), (batch, heads)).reshape(blocks)
    masked = query_segment_ids is not None
    by_head = [
        _by_head(x, places, masked) for x, places in ((q, where[0]), (k, where[1]), (v, where[1]))
    ]
    by_head[0] = by_head[0].reshape(*blocks, rows, head_dim)
    found: Any = _attention(engine, rules, *by_head, slopes, where)
    out, lse = found
    out = jnp.swapaxes(out.reshape(batch, heads, rows, -1)[:, :, :queries], 1, 2)
    if not return_lse:
        return out
    return out, jnp.swapaxes(lse.reshape(batch, heads, rows)[:, :, :queries], 1, 2)


def chunked(q: Array, k: Array, v: Array, **options: Any) -> Any:
    """`reference.attention` by the chunked engine; q, k and v of any types."""
    kind = jnp.result_type(q, k, v)
    rows, columns = _even(q.shape[1], 512), _even(k.shape[1], 1024)
    engine = Chunked(q.shape[2] // k.shape[2], rows, columns)
    found = attention(engine, *(x.astype(kind) for x in (q, k, v)), **options)
    if options.get("return_lse"):
        return found[0].astype(q.dtype), found[1]
    return found.astype(q.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    engine: Engine, rules: Rules, q: Array, k: Array, v: Array, slopes: Array, where: Any
) -> tuple[Array, Array]:
    return tuple(_run(forward, engine, rules, q, k, v, slopes, *where))


def _attention_forward(
    engine: Engine, rules: Rules, q: Array, k: Array, v: Array, slopes: Array, where: Any
) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    found: Any = _attention(engine, rules, q, k, v, slopes, where)
    out, lse = (checkpoint_name(x, RESIDUALS) for x in found)
    return (out, lse), (q, k, v, slopes, where, out, lse)


def _attention_backward(
    engine: Engine, rules: Rules, saved: tuple[Any, ...], gradients: tuple[Array, Array]
) -> tuple[Any, ...]:
    q, k, v, slopes, where, out, lse = saved
    d_out, d_lse = gradients
    seen = lse > -jnp.inf
    d_out = jnp.where(seen[..., None], d_out, 0)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    delta -= jnp.where(seen, d_lse, 0.0)
    base2 = jnp.where(seen, lse * LOG2E, 1e30)
    d_q, d_k, d_v, d_slopes = _run(
        backward, engine, rules, q, k, v, slopes, *where, d_out.astype(q.dtype), base2, delta
    )
    d_slopes = jnp.sum(d_slopes, axis=-1)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), d_slopes, None


_attention.defvjp(_attention_forward, _attention_backward)


def _run(primitive: Primitive, engine: Engine, rules: Rules, *arrays: Array) -> Any:
    if engine.platform == "simulator":
        function = engine.forward if primitive is forward else engine.backward
        return function(rules, *arrays)
    return primitive.bind(*arrays, engine=engine, rules=rules)


def _places(
    positions: Array, segments: Array | None, shape: tuple[int, ...], length: int, padding: int
) -> Array:
    """`int32[batch, 2, length]`: positions and documents; `padding` for tokens of no document and
    beyond the end.
    """
    segments = jnp.ones(shape, jnp.int32) if segments is None else jnp.asarray(segments)
    documents = jnp.where(segments > 0, segments, padding)
    both = jnp.stack([jnp.broadcast_to(positions, shape), documents], axis=1).astype(jnp.int32)
    beyond = ((0, 0), (0, 0), (0, length - shape[1]))
    return jnp.pad(both, beyond, constant_values=padding)


def _by_head(x: Array, places: Array, masked: bool) -> Array:
    """`[batch, length, heads, dim] -> [batch, heads, blocks, dim]`, zero in padding."""
    x = jnp.swapaxes(x, 1, 2)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, places.shape[2] - x.shape[2]), (0, 0)))
    return jnp.where(places[:, 1][:, None, :, None] > 0, x, 0) if masked else x


def _even(length: int, most: int) -> int:
    """Block size up to `most` that cuts `length` into equal blocks."""
    return max(1, -(-length // max(1, -(-length // most))))


def _up(length: int, block: int) -> int:
    return -(-length // block) * block


forward = Primitive("attention_forward")
backward = Primitive("attention_backward")


def _forward_shapes(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> list[Any]:
    out = ShapedArray((*q.shape[:-1], v.shape[-1]), q.dtype)
    return [out, ShapedArray(q.shape[:-1], jnp.dtype(jnp.float32))]


def _backward_shapes(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> list[Any]:
    shapes = (q.shape, k.shape, v.shape, q.shape[:-1])
    return [ShapedArray(shape, jnp.dtype(jnp.float32)) for shape in shapes]


def _lowered(name: str, context: Any, *arrays: Any, engine: Engine, rules: Rules) -> Any:
    """The engine's function, or the chunked one where the engine cannot serve."""
    reason = _obstacle(context.module_context, engine)
    if reason is not None:
        warn_once("attention", reason)
        engine = Chunked(engine.heads, engine.rows, engine.columns)
    function = functools.partial(getattr(engine, name), rules)
    return mlir.lower_fun(function, multiple_results=True)(context, *arrays)


def _obstacle(module: Any, engine: Engine) -> str | None:
    if engine.platform is None:
        return None
    if tuple(module.platforms) != (engine.platform,):
        return f"it was traced for {engine.platform} and is compiled for {module.platforms}"
    axes = module.axis_context
    devices = getattr(axes, "num_devices", None)
    if devices is None and hasattr(axes, "mesh"):
        manual = set(axes.manual_axes) | set(getattr(axes.mesh, "manual_axes", ()))
        devices = 1 if manual == set(axes.mesh.axis_names) else axes.mesh.size
    if devices == 1:
        return None
    return (
        "the compiler partitions this program over several devices, which it cannot do to a "
        "kernel; call attention inside jax.shard_map, as sharding.context_attention does"
    )


def _mapped(primitive: Primitive, arrays: Any, axes: Any, **options: Any) -> tuple[Any, Any]:
    """The mapped axis joins the batch."""
    size = next(x.shape[a] for x, a in zip(arrays, axes, strict=True) if a is not None)
    whole = [
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(arrays, axes, strict=True)
    ]
    results = primitive.bind(*(x.reshape(-1, *x.shape[2:]) for x in whole), **options)
    return [x.reshape(size, -1, *x.shape[1:]) for x in results], [0] * len(results)


for _primitive, _shapes, _name in (
    (forward, _forward_shapes, "forward"),
    (backward, _backward_shapes, "backward"),
):
    _primitive.multiple_results = True
    _primitive.def_abstract_eval(_shapes)
    _primitive.def_impl(jax.jit(_primitive.bind, static_argnames=("engine", "rules")))
    mlir.register_lowering(_primitive, functools.partial(_lowered, _name))
    batching.primitive_batchers[_primitive] = functools.partial(_mapped, _primitive)
