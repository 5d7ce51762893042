"""LoRA over any weight (Hu et al. 2021, arXiv 2106.09685); over 4-bit weights it is QLoRA (Dettmers
et al. 2023, arXiv 2305.14314).

    y = x W + scale * (x a) b,   a [d_in, r], b [r, d_out], scale = alpha / r

`attach` puts `weights.LowRank` where the kernels were, whatever these are; `b` begins at zero, so
the model computes the same. Training then chooses `.*/(a|b)`, and the base has no gradient and no
optimizer state.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from weights import LowRank, flatten, from_flat, is_format, map_with_path, nearest

Array = jax.Array
LINEAR = r"layers/.*(attention|feed_forward)/(?!router/|shared_gate/)\w+/kernel"
"""Linear layers of attention and feed-forward; the head, experts and their routers are left out."""


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters beside frozen weights (LoRA, QLoRA).

    rank: columns of `a` and rows of `b`.
    alpha: the adapter is multiplied by alpha / rank.
    rank_stabilized: multiply by alpha / sqrt(rank) instead (arXiv 2312.03732).
    targets: regex that a path, or its end, matches whole: "query|value" or "attention/.*"; empty is
        every linear layer of attention and feed-forward.
    initial: of `a`: "uniform" in +-1 / sqrt(d_in), or "gaussian" of deviation 1 / rank; `b` is 0.
    dropout: share of an adapter's inputs that is left out in training.
    seed: of the initial values.
    """

    rank: int = 8
    alpha: float = 8.0
    rank_stabilized: bool = False
    targets: str = ""
    initial: str = "uniform"
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: an adapter needs a rank of at least 1")
        if self.initial not in ("uniform", "gaussian"):
            raise ValueError(f"initial={self.initial!r}: must be uniform or gaussian")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must be in [0, 1)")

    @property
    def scale(self) -> float:
        """What the adapter's product is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


def attach(params: Any, settings: LoRA | None = None, key: Array | None = None) -> Any:
    """The same params with a `LowRank` around every weight that `settings.targets` matches.

    Args:
        params: of a model; weights may be any format.
        settings: rank, scale, targets.
        key: of the initial values; None makes one of `settings.seed`.

    Raises:
        ValueError: nothing matches (with the nearest paths), a target is no matrix or has an
            adapter already, or the rank is larger than the matrix.
    """
    settings = settings or LoRA()
    key = jax.random.key(settings.seed) if key is None else key
    chosen = targets(params, settings.targets)

    def wrap(path: str, weight: Any) -> Any:
        return _beside(path, weight, settings, key) if path in chosen else weight

    return map_with_path(wrap, params)


def targets(params: Any, pattern: str) -> frozenset[str]:
    """The paths of kernels whose name, or the end of it, matches the whole pattern.

    Raises `ValueError` with the nearest paths if there are none.
    """
    paths = [path for path in flatten(params) if path.endswith("/kernel")]
    try:
        wanted = re.compile(rf"(.*/)?({pattern})(/kernel)?" if pattern else LINEAR)
    except re.error as error:
        raise ValueError(f"targets={pattern!r} is no regex: {error}") from None
    chosen = frozenset(path for path in paths if wanted.fullmatch(path))
    if not chosen:
        close = nearest(f"{pattern}/kernel", paths) or ", ".join(paths[:8])
        raise ValueError(f"targets={pattern!r} matches no kernel; nearest: {close}")
    return chosen


def _beside(path: str, weight: Any, settings: LoRA, key: Array) -> LowRank:
    if isinstance(weight, LowRank):
        raise ValueError(f"{path} has an adapter already; merge it first, or leave it out")
    layers = _layers(path, weight)
    d_in, d_out = weight.shape[-2:]
    if settings.rank > min(d_in, d_out):
        raise ValueError(
            f"rank={settings.rank} is larger than {path} [{d_in}, {d_out}] has; at most "
            f"{min(d_in, d_out)}"
        )
    name, first = _apart(path)
    own = jax.random.fold_in(key, zlib.crc32(name.encode()))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(own, first + jnp.arange(math.prod(layers)))
    a = jax.vmap(lambda key: _initial(key, d_in, settings))(keys).reshape(*layers, d_in, -1)
    return LowRank(
        weight,
        a,
        jnp.zeros((*layers, settings.rank, d_out)),
        jnp.full(layers, settings.scale, jnp.float32),
        settings.dropout,
    )


def _layers(path: str, weight: Any) -> tuple[int, ...]:
    """The axes in front of the matrix: `[layers]` in a stack. Experts have one more."""
    stacked = path.startswith("layers/")
    if is_format(weight):
        matrices = weight.size // math.prod(weight.shape)
        return (matrices,) if stacked else ()
    if weight.ndim != 2 + stacked:
        raise ValueError(
            f"{path} {list(weight.shape)} is no matrix but one an expert; adapters go on single "
            "matrices: leave it out of targets"
        )
    return weight.shape[:-2]


def _apart(path: str) -> tuple[str, int]:
    """The path without its segment, and the segment's first layer, so that initial values do not
    depend on how layers are cut into segments.
    """
    found = re.fullmatch(r"layers/(\d+)-\d+/(.*)", path)
    return (f"layers/{found[2]}", int(found[1])) if found else (path, 0)


def _initial(key: Array, d_in: int, settings: LoRA) -> Array:
    shape = (d_in, settings.rank)
    if settings.initial == "gaussian":
        return jax.random.normal(key, shape) / settings.rank
    edge = 1 / math.sqrt(d_in)
    return jax.random.uniform(key, shape, minval=-edge, maxval=edge)


def adapters(params: Any) -> dict[str, dict[str, Array]]:
    """What is trained, alone: `{path: {"a", "b", "scale"}}`.

    Raises `ValueError` if there is none.
    """
    found = {
        path: {"a": weight.a, "b": weight.b, "scale": weight.scale}
        for path, weight in flatten(params).items()
        if isinstance(weight, LowRank)
    }
    if not found:
        raise ValueError("these params have no adapters; attach makes them")
    return found


def count_adapter_parameters(params: Any) -> int:
    """Numbers in all `a` and `b` (abstract ones too)."""
    return sum(
        math.prod(part[name].shape) for part in adapters(params).values() for name in ("a", "b")
    )


def without_adapters(params: Any) -> Any:
    """The base: every `LowRank` replaced by what it stands beside."""
    return map_with_path(
        lambda path, weight: weight.base if isinstance(weight, LowRank) else weight, params
    )


def merge(params: Any, dtype: Any = None) -> Any:
    """Every adapter added to its base, as plain arrays.

    Over an array the sum has its dtype; over any other format it is dense, in `dtype` or bfloat16.
    """

    def added(path: str, weight: Any) -> Any:
        if not isinstance(weight, LowRank):
            return weight
        own = jnp.bfloat16 if is_format(weight.base) else weight.base.dtype
        return weight.dequantize(dtype or own)

    adapters(params)
    return map_with_path(added, params)


def unmerge(params: Any, parts: Mapping[str, Mapping[str, Array]], dropout: float = 0.0) -> Any:
    """Take adapters out of merged weights again: the base and, beside it, the adapter.

    Equal to what was merged up to one rounding of the merged dtype. `parts` is what `adapters`
    gave. Raises `ValueError` naming the path that is missing or of another shape.
    """
    flat = flatten(params)
    for path, part in parts.items():
        weight = flat.get(path)
        if weight is None or is_format(weight):
            what = "is not there" if weight is None else f"is a {type(weight).__name__}"
            close = nearest(path, flat)
            raise ValueError(f"{path} {what}: unmerge needs plain arrays; nearest: {close}")
        shape = (*part["a"].shape[:-1], part["b"].shape[-1])
        if weight.shape != shape:
            raise ValueError(f"{path} is {list(weight.shape)}, its adapter stands for {shape}")
        whole = LowRank(jnp.zeros(shape, jnp.float32), part["a"], part["b"], part["scale"], dropout)
        base = (weight.astype(jnp.float32) - whole.dequantize()).astype(weight.dtype)
        flat[path] = LowRank(base, part["a"], part["b"], part["scale"], dropout)
    return from_flat(flat)
