"""The door to kernels that need no gradients: the choice that is made when a program is lowered.

Only then is it known for which platform the program is compiled, and whether the compiler is to
partition it over several devices by itself, which it cannot do to a kernel. Where the kernel cannot
serve, the plain function does, with one warning.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from kernels_pallas.target import Target, current_target, warn_once

Array = jax.Array
PLATFORMS = {"tpu": ("tpu",), "gpu": ("cuda",)}


@dataclass(frozen=True)
class Operation:
    """An operation and its kernels.

    plain: the definition. kernels: "tpu" and "gpu" -> a function of the same arguments and a
    `target`. obstacles: the same -> function of `(target, arguments, options)` that says why the
    kernel does not serve, or None.
    """

    name: str
    plain: Callable[..., Any]
    kernels: Mapping[str, Callable[..., Any]]
    obstacles: Mapping[str, Callable[[Target, dict[str, Any], dict[str, Any]], str | None]]

    def __hash__(self) -> int:
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Operation) and other.name == self.name


def call(
    operation: Operation,
    implementation: str | None,
    arguments: dict[str, Any],
    options: dict[str, Any],
) -> Any:
    """An operation by its best, or a named, implementation.

    Args:
        operation: which.
        implementation: "plain", "tpu" or "gpu"; None takes the kernel of the device that the
            program is traced for, if there is one that serves.
        arguments: pytrees of arrays by name.
        options: static and hashable, by name.

    Raises `ValueError` if the named implementation is not known or does not serve.
    """
    target = current_target()
    known = ("plain", *operation.kernels)
    if implementation is not None and implementation not in known:
        near = ", ".join(difflib.get_close_matches(implementation, known, cutoff=0.0))
        raise ValueError(
            f"{operation.name} implementation {implementation!r} is not known; nearest: {near}"
        )
    platform = implementation or target.platform
    if platform not in operation.kernels:
        return operation.plain(**arguments, **options)
    reason = operation.obstacles[platform](target, arguments, options)
    if target.platform != platform:
        reason = f"this program is compiled for {target.platform}"
    if reason is not None and implementation is not None:
        raise ValueError(f"{operation.name} implementation {implementation!r}: {reason}")
    if reason is not None:
        warn_once(operation.name, reason)
        return operation.plain(**arguments, **options)
    leaves, tree = jax.tree.flatten(jax.tree.map(jnp.asarray, arguments))
    static = tuple(sorted(options.items()))
    found = jax.eval_shape(functools.partial(operation.plain, **options), **arguments)
    shapes, out_tree = jax.tree.flatten(found)
    out = lowered.bind(
        *leaves,
        operation=operation,
        target=target,
        tree=tree,
        options=static,
        shapes=tuple((x.shape, x.dtype) for x in shapes),
    )
    return jax.tree.unflatten(out_tree, out)


def why_not_here(module: Any, platform: str) -> str | None:
    """Why a kernel for a platform has no place in a program, from its `mlir.ModuleContext`."""
    if tuple(module.platforms) != PLATFORMS[platform]:
        return f"it was traced for {platform} and is compiled for {', '.join(module.platforms)}"
    axes = module.axis_context
    devices = getattr(axes, "num_devices", None)
    if devices is None and hasattr(axes, "mesh"):
        manual = set(axes.manual_axes) | set(getattr(axes.mesh, "manual_axes", ()))
        devices = 1 if manual == set(axes.mesh.axis_names) else axes.mesh.size
    if devices == 1:
        return None
    return (
        "the compiler partitions this program over several devices, which it cannot do to a "
        "kernel; call it inside jax.shard_map"
    )


lowered = Primitive("kernel_or_plain")
lowered.multiple_results = True


def _lower(
    context: Any,
    *leaves: Any,
    operation: Operation,
    target: Target,
    tree: Any,
    options: tuple[tuple[str, Any], ...],
    shapes: Any,
) -> Any:
    reason = why_not_here(context.module_context, target.platform)
    function = functools.partial(operation.kernels[target.platform], target=target)
    if reason is not None:
        warn_once(operation.name, reason)
        function = operation.plain

    def flat(*leaves: Any) -> list[Any]:
        return jax.tree.leaves(function(**jax.tree.unflatten(tree, leaves), **dict(options)))

    return mlir.lower_fun(flat, multiple_results=True)(context, *leaves)


def _outputs(*given: Any, shapes: Any, **_: Any) -> list[ShapedArray]:
    """Outputs vary over the axes of a `jax.shard_map` that any input varies over."""
    kinds = [leaf.manual_axis_type for leaf in given]
    varying = frozenset().union(*(kind.varying for kind in kinds))
    if not varying:
        return [ShapedArray(shape, dtype) for shape, dtype in shapes]
    kind = type(kinds[0])(varying=varying)
    mesh = next(leaf.sharding.mesh for leaf in given if leaf.manual_axis_type.varying)

    def output(shape: tuple[int, ...], dtype: Any) -> ShapedArray:
        spread = NamedSharding(mesh, PartitionSpec(*[None] * len(shape)))
        return ShapedArray(shape, dtype, sharding=spread, manual_axis_type=kind)

    return [output(shape, dtype) for shape, dtype in shapes]


def _mapped(leaves: Any, axes: Any, **parameters: Any) -> tuple[Any, Any]:
    """One after the other."""
    mapped = [
        jnp.moveaxis(leaf, axis, 0)
        for leaf, axis in zip(leaves, axes, strict=True)
        if axis is not None
    ]

    def one(pieces: list[Array]) -> list[Array]:
        left = iter(pieces)
        whole = [
            leaf if axis is None else next(left) for leaf, axis in zip(leaves, axes, strict=True)
        ]
        return lowered.bind(*whole, **parameters)

    out = jax.lax.map(one, mapped)
    return out, [0] * len(out)


lowered.def_abstract_eval(_outputs)
lowered.def_impl(
    jax.jit(lowered.bind, static_argnames=("operation", "target", "tree", "options", "shapes"))
)
mlir.register_lowering(lowered, _lower)
batching.primitive_batchers[lowered] = _mapped
