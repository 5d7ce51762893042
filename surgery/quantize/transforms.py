"""Equivalent transforms: scales moved from what makes a tensor into what reads it.

    norm(x) / s  and  s * W          the same product, with inputs that are easier to code

A site may be scaled if its tensor is made by a norm with a gain, or by a linear layer without a
non-linearity between: values before the output projection, the up projection of a gated
feed-forward. All that reads the tensor takes the same scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from model import ModelConfig
from surgery.blocks import Site
from surgery.quantize.method import Params
from weights import flatten, from_flat

Array = jax.Array

READERS: dict[str, tuple[str, ...]] = {
    "attention": ("query", "key", "value"),
    "attention_experts": ("router", "experts/query", "key", "value"),
    "gated": ("gate", "up"),
    "plain": ("up",),
    "experts": (
        "router",
        "experts/gate",
        "experts/up",
        "shared/gate",
        "shared/up",
        "shared_gate",
    ),
}
"""Mixer or feed-forward -> its linear layers that read the block's normed input."""


@dataclass(frozen=True)
class Fold:
    """How the tensor of a site may be scaled.

    maker: path of the norm or of the kernel that makes it.
    readers: paths of all kernels that read it.
    kind: "norm", "norm_plus_one" (a gain stored less one) or "linear".
    heads, kv_heads, head_dim: of values that several query heads share; 0 elsewhere.
    """

    maker: str
    readers: tuple[str, ...]
    kind: str
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0

    @property
    def shared(self) -> bool:
        """Whether channels of the tensor come from the same channel of the maker."""
        return self.heads > self.kv_heads


def fold_of(params: Params, config: ModelConfig, site: Site) -> Fold | None:
    """How a site may be scaled; None if what makes its tensor cannot take a scale."""
    found = flatten(params)
    for maker, readers in _norm_readers(config).items():
        readers = tuple(path for path in readers if path in found)
        if set(site.linears) & set(readers):
            folds = _norm_folds(config) and f"{maker}/scale" in found
            kind = "norm_plus_one" if config.norm == "rmsnorm_plus_one" else "norm"
            return Fold(maker, readers, kind) if folds else None
    assert config.kv_heads is not None
    assert config.head_dim is not None
    if site.linears == ("attention/output/kernel",) and config.mixer == "attention":
        sizes = (config.num_heads, config.kv_heads, config.head_dim)
        return Fold("attention/value", site.linears, "linear", *sizes)
    for part in ("feed_forward", "feed_forward/shared"):
        if site.linears == (f"{part}/down/kernel",) and f"{part}/gate/kernel" in found:
            return Fold(f"{part}/up", site.linears, "linear")
    return None


def scale(params: Params, fold: Fold, s: Array) -> Params:
    """The block whose tensor is divided by a positive `s [K]` and whose readers' rows are
    multiplied by it: the same function.

    Of shared values, `s` must be equal for all query heads of a key head (`shared_scale`).
    """
    found = dict(flatten(params))
    for path in fold.readers:
        found[path] = _times(found[path], s[:, None])
    of_maker = s
    if fold.shared:
        by_head = s.reshape(fold.kv_heads, -1, fold.head_dim)
        of_maker = by_head[:, 0].reshape(-1)
    if fold.kind == "linear":
        found[f"{fold.maker}/kernel"] = _times(found[f"{fold.maker}/kernel"], 1 / of_maker)
    else:
        one = 1.0 if fold.kind == "norm_plus_one" else 0.0
        gain = found[f"{fold.maker}/scale"]
        wide = (gain.astype(jnp.float32) + one) / of_maker - one
        found[f"{fold.maker}/scale"] = wide
    if f"{fold.maker}/bias" in found:
        found[f"{fold.maker}/bias"] = _times(found[f"{fold.maker}/bias"], 1 / of_maker)
    return from_flat(found)


def shared_scale(fold: Fold, values: Array) -> Array:
    """`values [K]` of channels, the greatest of those that come from one channel of the maker."""
    if not fold.shared:
        return values
    by_head = values.reshape(fold.kv_heads, -1, fold.head_dim)
    most = jnp.max(by_head, axis=1, keepdims=True)
    return jnp.broadcast_to(most, by_head.shape).reshape(-1)


def _norm_folds(config: ModelConfig) -> bool:
    """Whether norms stand before the parts and only they read them."""
    return config.norm_position in ("pre", "sandwich") and config.residual != "sequential_normed"


def _norm_readers(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """The norm of each part, or of both, and the kernels that read it."""
    mixer = tuple(f"attention/{name}/kernel" for name in READERS[config.mixer])
    rest = tuple(f"feed_forward/{name}/kernel" for name in READERS[config.feed_forward])
    if config.residual == "parallel_one_norm":
        return {"attention_norm": mixer + rest}
    return {"attention_norm": mixer, "feed_forward_norm": rest}


def _times(leaf: Any, factor: Array) -> Array:
    """In float32, so that rounding to the stored type comes with the quantizer's alone."""
    return leaf.astype(jnp.float32) * factor
