"""A model seen block by block: embed, one block, head, and the inputs of a block's linear layers.

Layers of a kind share one compiled function of each sort, since a layer's params come sliced out of
their stack. What a linear layer reads is found by putting a weight in its kernel's place that
notes its input and multiplies as before: no part of the model knows of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from model import Context, ModelConfig, PositionEncoder, Runtime, hidden_states, norms
from model import block as model_block
from model.head import logits
from surgery import calibration, experts
from surgery.calibration import Stats
from weights import dequantize, flatten, from_flat, matmul, nbytes, specs

Array = jax.Array
Params = Mapping[str, Any]
EXPERTS = "experts"


@dataclass(frozen=True)
class Site:
    """A tensor that linear layers of a block read, in the order in which the block makes them.

    linears: paths of their kernels below the block.
    """

    linears: tuple[str, ...]

    @property
    def name(self) -> str:
        """`attention/query+key+value`."""
        parents = [path.removesuffix("/kernel") for path in self.linears]
        folder = parents[0].rpartition("/")[0]
        return f"{folder}/" + "+".join(path.removeprefix(f"{folder}/") for path in parents)


@dataclass(frozen=True)
class Tapped:
    """A weight that calls `note(x)` with what it is asked to multiply; it lives for one trace."""

    base: Any
    note: Callable[[Array], None]

    def matmul(self, x: Array, rng: Array | None = None) -> Array:
        """The product with the weight inside."""
        self.note(x)
        return matmul(x, self.base, rng=rng)

    def dequantize(self, dtype: Any = jnp.float32) -> Array:
        """The matrix of the weight inside."""
        return dequantize(self.base, dtype)

    def nbytes(self) -> int:
        """Bytes of the weight inside."""
        return nbytes(self.base)

    def specs(self, spec: PartitionSpec) -> Any:
        """Specs of the weight inside."""
        return specs(self.base, spec)


def without_layers(params: Params) -> dict[str, Any]:
    """What stands outside the layers: embeddings, final norm, head."""
    return {**params, "layers": {}}


@functools.partial(jax.jit, static_argnums=(2, 3))
def embed(outer: Params, tokens: Array, config: ModelConfig, runtime: Runtime) -> Array:
    """What the first block reads: `int32[batch, length] -> [batch, length, d_model]`."""
    _, aux = hidden_states(outer, tokens, config, runtime, until_layer=0, taps=("embeddings",))
    return aux["taps"]["embeddings"]


@functools.partial(jax.jit, static_argnums=(2, 3))
def block(params: Params, hidden: Array, layer: ModelConfig, runtime: Runtime) -> Array:
    """One block of the resolved config `layer`, on whole windows `[batch, length, d_model]`."""
    return _block(params, hidden, layer, runtime)[0]


@functools.partial(jax.jit, static_argnums=(2, 3))
def head(outer: Params, hidden: Array, config: ModelConfig, runtime: Runtime) -> Array:
    """Final norm and head: `[batch, length, d_model] -> float32[batch, length, vocab]`."""
    if config.final_norm:
        eps = config.norm_eps if config.final_norm_eps is None else config.final_norm_eps
        hidden = norms.normalise(config.norm, outer.get("final_norm", {}), hidden, eps)
    return logits(outer, hidden, config, runtime)


def linear_paths(params: Params) -> list[str]:
    """Kernels of a block's linear layers `[d_in, d_out]`, and of its experts with an axis in
    front.
    """
    return [path for path in flatten(params) if path.endswith("/kernel")]


def is_expert(path: str) -> bool:
    """Whether a kernel is a stack of experts' matrices `[experts, d_in, d_out]`."""
    return EXPERTS in path.split("/")


def sites(params: Params, layer: ModelConfig, runtime: Runtime) -> tuple[Site, ...]:
    """The sites of a block, in order, those of experts last."""
    hidden = jax.ShapeDtypeStruct((1, 2, layer.d_model), runtime.compute_dtype)
    single = Runtime(compute_dtype=runtime.compute_dtype)
    found: list[tuple[Site, ...]] = []

    def trace(params: Params, hidden: Array) -> Array:
        out, noted = _tapped(params, hidden, layer, single)
        found.append(tuple(site for site, _ in noted))
        return out

    jax.eval_shape(trace, params, hidden)
    return found[0]


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6), donate_argnums=2)
def accumulate(
    params: Params,
    hidden: Array,
    stats: Mapping[str, Stats],
    layer: ModelConfig,
    runtime: Runtime,
    wanted: tuple[Site, ...],
    output: bool,
) -> tuple[Array | None, dict[str, Stats]]:
    """The output of one block (None without `output`), and the stacked statistics of its sites
    `{name: stats}` with this batch added.
    """
    out, noted = _tapped(params, hidden, layer, runtime)
    inputs = {site.name: x for site, x in noted}

    def add(name: str) -> Stats:
        x = inputs[name]
        if isinstance(x, experts.Routed):
            return experts.update_parts(stats[name], x)
        return calibration.update_parts(stats[name], x, runtime.layout)

    return out if output else None, {site.name: add(site.name) for site in wanted}


def _tapped(
    params: Params, hidden: Array, layer: ModelConfig, runtime: Runtime
) -> tuple[Array, list[tuple[Site, Any]]]:
    """One block, and its sites with what they read. Linears that are given the same tensor share
    a site; experts' come last.
    """
    noted: list[tuple[list[str], Array]] = []

    def note(path: str, x: Array) -> None:
        for paths, known in noted:
            if known is x:
                paths.append(path)
                return
        noted.append(([path], x))

    weights = flatten(params)
    for path in linear_paths(params):
        if not is_expert(path):
            weights[path] = Tapped(weights[path], functools.partial(note, path))
    mixture = layer.feed_forward == "experts"
    names = frozenset({experts.LOGITS} if mixture else ())
    out, taps = _block(from_flat(weights), hidden, layer, runtime, names)
    found = [(Site(tuple(paths)), x) for paths, x in noted]
    if mixture:
        x = next(x for paths, x in noted if experts.ROUTER in paths)
        read = experts.inputs(weights, x.astype(out.dtype), taps[experts.LOGITS], layer)
        found += [(Site(paths), x) for paths, x in read.items()]
    return out, found


def _block(
    params: Params,
    hidden: Array,
    layer: ModelConfig,
    runtime: Runtime,
    names: frozenset[str] = frozenset(),
) -> tuple[Array, dict[str, Array]]:
    """One block, and the intermediates `names`."""
    batch, length, _ = hidden.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    encoder = PositionEncoder(layer, length).prepared(positions)
    context = Context(positions, None, encoder, runtime, taps=names)
    out, _, aux = model_block(params, hidden, layer, context)
    return out, aux.get("taps", {})
