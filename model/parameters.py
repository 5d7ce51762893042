"""Every array of a decoder, described once; abstract params, initial params and sharding rules
follow from that.

Initial values depend on the path and the layer's number only: not on the mesh, nor on how layers
are cut into segments.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from model import norms
from model.arrays import ArraySpec, vector
from model.block import arrays as block_arrays
from model.config import ModelConfig, Segment
from sharding import Rule
from weights import from_flat

Array = jax.Array


def describe(
    config: ModelConfig, segments: Sequence[Segment] | None = None
) -> dict[str, tuple[ArraySpec, Segment | None]]:
    """`{path: (spec of one layer's array, its segment or None)}` for every array of the model.

    `segments` is how params cut the layers (`segments_of`); None is as the config does.
    """
    described: dict[str, tuple[ArraySpec, Segment | None]] = {
        path: (spec, None) for path, spec in _outer_arrays(config).items()
    }
    for segment in segments or config.segments:
        for path, spec in block_arrays(segment.layer).items():
            described[f"layers/{segment.name}/{path}"] = (spec, segment)
    return described


def abstract(
    config: ModelConfig, dtype: Any = jnp.float32, segments: Sequence[Segment] | None = None
) -> dict[str, Any]:
    """The params tree as `jax.ShapeDtypeStruct`, layers stacked by segment (see `describe`)."""
    return from_flat(
        {
            path: jax.ShapeDtypeStruct(_stacked_shape(spec, segment), dtype)
            for path, (spec, segment) in describe(config, segments).items()
        }
    )


def init(
    config: ModelConfig, rng: Array, dtype: Any = jnp.float32, *, branch: str | None = None
) -> dict[str, Any]:
    """Initial params, or only one top-level `branch` of them ("embed", "layers", …).

    Pure, so `sharding.sharded_init` can run it without holding the model on one device.
    """
    return from_flat(
        {
            path: _initial(path, spec, segment, rng, dtype)
            for path, (spec, segment) in describe(config).items()
            if branch is None or path.startswith(f"{branch}/")
        }
    )


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    """One rule for each kind of array: logical axes, initial values and training multipliers."""
    found: dict[str, Rule] = {}
    for path, (spec, segment) in describe(config).items():
        pattern = re.escape(path).replace(r"\-", "-")
        if segment is not None:
            pattern = pattern.replace(segment.name, r"\d+-\d+")
        rule = _rule(pattern, spec)
        found.setdefault(pattern, rule)
    return tuple(found.values())


def count_parameters(config: ModelConfig, *, embeddings: bool = True, active: bool = False) -> int:
    """Number of trained values; without the token and position tables if `embeddings` is False.

    With `active` only those that one token meets: of a mixture's experts, the share it is sent to.
    """
    total = 0
    for path, (spec, segment) in describe(config).items():
        size = math.prod(_stacked_shape(spec, segment))
        if active and segment is not None and "experts" in spec.axes:
            size = size * segment.layer.experts_per_token // segment.layer.num_experts
        total += size if embeddings or not path.endswith("/table") else 0
    return total


def _outer_arrays(config: ModelConfig) -> dict[str, ArraySpec]:
    """The arrays that stand outside the layers."""
    vocab, d_model, std = config.vocab_size, config.d_model, config.init_std
    d_embed = config.d_embed or d_model
    specs = {"embed/table": ArraySpec((vocab, d_embed), ("vocab", "d_model"), scale=std)}
    if config.d_embed is not None:
        shape = (d_embed, d_model)
        specs["embed_projection/kernel"] = ArraySpec(shape, (None, "d_model"), scale=std)
        specs["head_projection/kernel"] = ArraySpec(shape[::-1], ("d_model", None), scale=std)
    if config.positions == "learned":
        rows = config.max_length + config.position_offset
        specs["positions/table"] = ArraySpec((rows, d_model), ("positions", "d_model"), scale=std)
    for name in ["embed_norm"] * config.embed_norm + ["final_norm"] * config.final_norm:
        for path, spec in norms.arrays(config.norm, d_model).items():
            specs[f"{name}/{path}"] = spec
    if not config.tied_embeddings:
        specs["head/kernel"] = ArraySpec((d_embed, vocab), ("d_model", "vocab"), scale=std)
    if config.head_bias:
        specs["head/bias"] = vector(vocab, "vocab")
    return specs


def _stacked_shape(spec: ArraySpec, segment: Segment | None) -> tuple[int, ...]:
    return spec.shape if segment is None else (len(segment), *spec.shape)


def _rule(pattern: str, spec: ArraySpec) -> Rule:
    return Rule(pattern, spec.axes, spec.init, spec.scale, spec.learning_rate, spec.weight_decay)


def _initial(path: str, spec: ArraySpec, segment: Segment | None, rng: Array, dtype: Any) -> Array:
    shape = _stacked_shape(spec, segment)
    if spec.init != "normal":
        return jnp.full(shape, {"zeros": 0.0, "ones": 1.0}[spec.init], dtype)
    if segment is None:
        return _normal(jax.random.fold_in(rng, zlib.crc32(path.encode())), spec, dtype)
    within = path.removeprefix(f"layers/{segment.name}/")
    key = jax.random.fold_in(rng, zlib.crc32(within.encode()))
    layers = jnp.arange(segment.start, segment.stop)
    return jax.vmap(lambda layer: _normal(jax.random.fold_in(key, layer), spec, dtype))(layers)


def _normal(key: Array, spec: ArraySpec, dtype: Any) -> Array:
    return (spec.scale * jax.random.normal(key, spec.shape, jnp.float32)).astype(dtype)
