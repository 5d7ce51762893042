"""Decode attention by the best implementation for the device; every one computes what
`reference.decode_attention` defines.
"""

from __future__ import annotations

from typing import Any

import jax

from kernels_pallas import door
from kernels_pallas.decode_attention import gpu, reference, tpu
from kernels_pallas.decode_attention.softmax import Softmax, Unified

Array = jax.Array

OPERATION = door.Operation(
    "decode_attention",
    reference.decode_attention,
    {"tpu": tpu.decode_attention, "gpu": gpu.decode_attention},
    {"tpu": tpu.obstacle, "gpu": gpu.obstacle},
)
IMPLEMENTATIONS = ("plain", *OPERATION.kernels)


def decode_attention(
    q: Array,
    k: Array,
    v: Array,
    lengths: Array,
    *,
    layer: Any = None,
    window: int | None = None,
    sinks: int = 0,
    rolling: bool = False,
    soft_cap: float | None = None,
    alibi_slopes: Array | None = None,
    scale: float | None = None,
    softmax: Softmax = "online",
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """See `reference.decode_attention`. implementation: a name in `IMPLEMENTATIONS`; None takes the
    kernel of the platform where it serves, else the plain function with one warning.
    """
    reference.check(q, k, v, lengths, layer, sinks, rolling, softmax)
    arguments = {"q": q, "k": k, "v": v, "lengths": lengths, "alibi_slopes": alibi_slopes}
    options = {"window": window, "sinks": sinks, "rolling": rolling, "soft_cap": soft_cap}
    options |= {"scale": scale, "return_lse": return_lse}
    return door.call(OPERATION, implementation, *split(arguments, options, layer, softmax))


def split(
    arguments: dict[str, Any], options: dict[str, Any], layer: Any, softmax: Softmax
) -> tuple[dict[str, Any], dict[str, Any]]:
    """With the layer and the softmax where they belong: among arrays, or what is static."""
    if layer is not None:
        arguments = {**arguments, "layer": layer}
    if isinstance(softmax, Unified):
        return {**arguments, "softmax": softmax}, options
    return arguments, {**options, "softmax": softmax}
