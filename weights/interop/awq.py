"""AWQ's layout for matrix products ("gemm"), as AutoAWQ and transformers write it.

    qweight int32[K, N / 8]     8 codes of 4 bits a word, of the columns 8c + ORDER[i]
    qzeros  int32[K / g, N / 8] the same
    scales  float16[K / g, N]

    W[k, n] = scales[k // g, n] * (code[k, n] - zero[k // g, n])

Source: mit-han-lab/llm-awq, `awq/quantize/qmodule.py`; AutoAWQ.
"""

from __future__ import annotations

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
from weights.second_order import values_of

ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])
"""Column of nibble i of a word; it lets two codes be turned into a pair of halves at once."""
NAMES = ("qweight", "qzeros", "scales")
BITS = 4


def read(arrays: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> Grouped:
    """The weight `[K, N]` of one module.

    Args:
        arrays: qweight, qzeros, scales.
        config: bits (4), group_size, version ("gemm"), zero_point.

    Raises:
        LayoutError: a key, value or shape that does not fit.
    """
    take(arrays, NAMES)
    setting(config, "bits", BITS, (BITS,))
    version = str(config.get("version", "gemm")).lower()
    setting({"version": version}, "version", "gemm", ("gemm",))
    codes = _unpack(arrays["qweight"])
    rows, columns = codes.shape
    group = config.get("group_size", 128)
    group = rows if group == -1 else group
    if group < 1 or rows % group:
        raise LayoutError(f"quantization_config.group_size = {group} does not divide {rows} inputs")
    check_shape("scales", arrays["scales"], (rows // group, columns))
    zeros = _unpack(arrays["qzeros"])
    check_shape("qzeros, unpacked,", zeros, (rows // group, columns))
    zero = None if (zeros == 2 ** (BITS - 1)).all() else jnp.asarray(zeros, jnp.int32)
    return grouped.from_codes(
        jnp.asarray(codes), jnp.asarray(arrays["scales"]), zero, bits=BITS, group=group
    )


def write(weight: Grouped) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of one module and its settings.

    Raises:
        LayoutError: not 4 bits, zeros that are no codes, or columns that fill no words.
    """
    if not isinstance(weight, Grouped) or weight.bits != BITS:
        what = f"{weight.bits} bits" if isinstance(weight, Grouped) else type(weight).__name__
        raise LayoutError(f"{what}: AWQ's layout holds Grouped weights of {BITS} bits")
    zeros = np.full((weight.groups, weight.shape[1]), 2 ** (BITS - 1), np.float64)
    if weight.zero is not None:
        zeros = np.asarray(values_of(weight.zero), np.float64)
    whole = np.rint(zeros).astype(np.int64)
    if (whole != zeros).any() or whole.min() < 0 or whole.max() >= 2**BITS:
        raise LayoutError("AWQ's layout holds whole zeros from 0 to 15; these are others")
    arrays = {
        "qweight": _pack(np.asarray(grouped.codes_of(weight))),
        "qzeros": _pack(whole),
        "scales": np.asarray(values_of(weight.scale)).astype(np.float16),
    }
    return arrays, {
        "quant_method": "awq",
        "bits": BITS,
        "group_size": -1 if weight.groups == 1 else weight.group,
        "zero_point": weight.zero is not None,
        "version": "gemm",
    }


def _unpack(words: np.ndarray) -> np.ndarray:
    """`int32[rows, N / 8]` to codes `uint8[rows, N]`."""
    nibbles = unpack_bits(words, BITS, 1).reshape(len(words), -1, 8)
    return nibbles[..., np.argsort(ORDER)].reshape(len(words), -1)


def _pack(codes: np.ndarray) -> np.ndarray:
    """The inverse of `_unpack`."""
    if codes.shape[1] % 8:
        raise LayoutError(f"{codes.shape[1]} outputs do not fill words of 8; a multiple of 8 does")
    ordered = codes.reshape(len(codes), -1, 8)[..., ORDER]
    return pack_bits(ordered.reshape(len(codes), -1), BITS, 1)
