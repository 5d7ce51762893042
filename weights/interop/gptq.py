"""GPTQ's layout, as GPTQModel, AutoGPTQ and transformers write it.

    qweight int32[K bits / 32, N]   codes along K, lowest bits first
    qzeros  int32[G, N bits / 32]   zeros along N; less one in the first version
    scales  float16[G, N]
    g_idx   int32[K]                the group of each input

    W[k, n] = scales[g_idx[k], n] * (code[k, n] - zero[g_idx[k], n])

Source: ModelCloud/GPTQModel, `nn_modules/qlinear`. Inputs that are not in the order of their groups
(`desc_act`) become `Permuted(Grouped)`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from weights import grouped
from weights.grouped import Grouped
from weights.interop.layout import (
    LayoutError,
    check_shape,
    pack_bits,
    setting,
    take,
    unpack_bits,
)
from weights.permuted import Permuted
from weights.second_order import values_of

BITS = (2, 3, 4, 8)
NAMES = ("qweight", "qzeros", "scales")


def read(arrays: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> Grouped | Permuted:
    """The weight `[K, N]` of one module.

    Args:
        arrays: qweight, qzeros, scales, and g_idx (absent: groups in order).
        config: bits, group_size (-1 is all inputs), checkpoint_format ("gptq", whose zeros are
            stored less one, or "gptq_v2"), sym, desc_act.

    Raises:
        LayoutError: a key, value or shape that does not fit; irregular groups.
    """
    take(arrays, NAMES, ("g_idx",))
    bits = setting(config, "bits", None, BITS)
    version = setting(config, "checkpoint_format", "gptq", ("gptq", "gptq_v2"))
    codes = unpack_bits(arrays["qweight"], bits, 0)
    rows, columns = codes.shape
    group = config.get("group_size", -1)
    group = rows if group == -1 else group
    if group < 1 or rows % group:
        raise LayoutError(f"quantization_config.group_size = {group} does not divide {rows} inputs")
    groups = rows // group
    scales = arrays["scales"]
    check_shape("scales", scales, (groups, columns))
    zeros = unpack_bits(arrays["qzeros"], bits, 1)
    check_shape("qzeros, unpacked,", zeros, (groups, columns))
    if version == "gptq":
        if not config.get("sym", True) and (zeros == 2**bits - 1).any():
            warnings.warn(
                f"qzeros holds {2**bits - 1}, which in a file of the first version stands for "
                f"{2**bits} or a zero of 0 that wrapped around; it is read as {2**bits}",
                stacklevel=2,
            )
        zeros = zeros.astype(np.int32) + 1
    order = _order(arrays.get("g_idx"), rows, group)
    base = grouped.from_codes(
        jnp.asarray(codes if order is None else codes[order]),
        jnp.asarray(scales),
        _zero(zeros, bits),
        bits=bits,
        group=group,
    )
    return base if order is None else Permuted(base, jnp.asarray(order, jnp.int32))


def write(
    weight: Grouped | Permuted, version: str = "gptq"
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of one module and its settings.

    Raises:
        LayoutError: bits, zeros or an order that the layout cannot say.
    """
    base = weight.base if isinstance(weight, Permuted) else weight
    if not isinstance(base, Grouped):
        raise LayoutError(f"a {type(base).__name__} has no GPTQ layout; Grouped has")
    bits, (rows, columns) = base.bits, base.shape
    if bits not in BITS:
        raise LayoutError(f"{bits} bits have no GPTQ layout; {', '.join(map(str, BITS))} have")
    symmetric = base.zero is None
    zeros = np.full((base.groups, columns), 2 ** (bits - 1), np.int32)
    if not symmetric:
        real = np.asarray(values_of(base.zero), np.float64)
        zeros = np.rint(real).astype(np.int32)
        if (zeros != real).any():
            raise LayoutError("zeros that are no whole numbers have no GPTQ layout")
    stored = zeros - 1 if version == "gptq" else zeros
    if version == "gptq" and (zeros == 0).any():
        raise LayoutError('a zero of 0 has no place in version "gptq"; write "gptq_v2"')
    if (stored < 0).any() or (stored >= 2**bits).any():
        raise LayoutError(f"zeros from {zeros.min()} to {zeros.max()} do not fit in {bits} bits")
    codes = np.asarray(grouped.codes_of(base))
    index = np.arange(rows, dtype=np.int32) // base.group
    if isinstance(weight, Permuted):
        order = np.asarray(weight.perm)
        codes, index = _scattered(codes, order), _scattered(index, order)
    arrays = {
        "qweight": pack_bits(codes, bits, 0),
        "qzeros": pack_bits(stored, bits, 1),
        "scales": np.asarray(values_of(base.scale)).astype(np.float16),
        "g_idx": index,
    }
    return arrays, {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": -1 if base.groups == 1 else base.group,
        "desc_act": isinstance(weight, Permuted),
        "sym": symmetric,
        "checkpoint_format": version,
    }


def _zero(zeros: np.ndarray, bits: int) -> Any:
    """None where all are in the middle; packed where they fit; else as numbers."""
    if (zeros == 2 ** (bits - 1)).all():
        return None
    if zeros.max() < 2**bits:
        return jnp.asarray(zeros, jnp.int32)
    return jnp.asarray(zeros, jnp.float16)


def _order(index: np.ndarray | None, rows: int, group: int) -> np.ndarray | None:
    """The inputs in the order of their groups; None if that is how they stand."""
    if index is None:
        return None
    check_shape("g_idx", index, (rows,))
    counts = np.bincount(index, minlength=rows // group) if (index >= 0).all() else np.zeros(1)
    if len(counts) != rows // group or (counts != group).any():
        raise LayoutError(
            f"g_idx does not put {group} inputs in each of {rows // group} groups; groups of other "
            "sizes are not read"
        )
    if (np.diff(index) >= 0).all():
        return None
    return np.argsort(index, kind="stable")


def _scattered(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Row `order[j]` of the result is row j."""
    result = np.empty_like(values)
    result[order] = values
    return result
