"""bitsandbytes' layouts: NF4 and FP4 in blocks, with their scales coded again or not, and 8 bits.

    weight             uint8[(K N + 1) / 2, 1]  rows of [N, K] in a row, two codes a byte, the first
                                               in the high half
    weight.absmax      float32[blocks], or uint8[blocks] with
    weight.nested_absmax, weight.nested_quant_map, and the mean as nested_offset in
    weight.quant_state.bitsandbytes__nf4   uint8, JSON

    8 bits: weight int8[N, K], SCB float32[N];   W[k, n] = weight[n, k] * SCB[n] / 127

A block is `blocksize` neighbours of a row of `[N, K]`, hence inputs of one output, if the block
size divides K. Source: bitsandbytes-foundation/bitsandbytes, `functional.py`, `nn/modules.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from weights import float4, lut, normal_float, second_order
from weights.int8 import Int8
from weights.interop.layout import LayoutError, check_shape, setting, take
from weights.lut import Lut
from weights.second_order import SecondOrder

STATE = "weight.quant_state.bitsandbytes__"
KINDS = ("nf4", "fp4")
NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
NESTED_BLOCK = 256


def read(arrays: Mapping[str, np.ndarray], config: Mapping[str, Any] | None = None) -> Lut | Int8:
    """The weight `[K, N]` of one module, of 4 or of 8 bits, whichever the arrays are of.

    Raises:
        LayoutError: a key, value or shape that does not fit, or a block that crosses two outputs.
    """
    if "SCB" in arrays:
        return _read8(arrays)
    kinds = [kind for kind in KINDS if STATE + kind in arrays]
    if not kinds:
        raise LayoutError(f"neither SCB nor {STATE}nf4 is there, but {', '.join(sorted(arrays))}")
    state = json.loads(bytes(np.asarray(arrays[STATE + kinds[0]], np.uint8)))
    nested = "nested_blocksize" in state
    wanted = ["weight", "weight.absmax", "weight.quant_map", STATE + kinds[0]]
    take(arrays, [*wanted, *(NESTED if nested else ())])
    kind = setting(state, "quant_type", None, KINDS)
    columns, rows = state["shape"]
    block = state["blocksize"]
    if rows % block:
        raise LayoutError(
            f"blocks of {block} do not divide {rows} inputs: a block would cross two outputs"
        )
    packed = np.asarray(arrays["weight"], np.uint8).reshape(-1)
    check_shape("weight, flat,", packed, ((rows * columns + 1) // 2,))
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[: rows * columns]
    table = jnp.asarray(np.asarray(arrays["weight.quant_map"], np.float32))
    blocks = rows * columns // block
    absmax = np.asarray(arrays["weight.absmax"])
    check_shape("weight.absmax", absmax.reshape(-1), (blocks,))
    shape = (rows // block, columns)
    scale: Any = jnp.asarray(absmax.reshape(columns, -1).T.astype(np.float32))
    if nested:
        scale = _nested(arrays, state, absmax.reshape(-1), shape)
    whole = jnp.asarray(codes.reshape(columns, rows).T)
    known = normal_float.TABLE if kind == "nf4" else float4.table()
    if not np.allclose(table, np.asarray(known, np.float32), atol=1e-6):
        raise LayoutError(f"weight.quant_map is not the table of {kind}")
    return lut.from_codes(whole, table, scale, group=block)


def write(
    weight: Lut | Int8, kind: str = "nf4", dtype: str = "bfloat16"
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of one module and its settings; `dtype` is what products are computed in.

    Raises:
        LayoutError: a format, table or scale that the layout cannot say.
    """
    if isinstance(weight, Int8):
        return _write8(weight)
    if not isinstance(weight, Lut) or weight.bits != 4 or weight.offset is not None:
        raise LayoutError(f"a {type(weight).__name__} like this has no bitsandbytes layout")
    rows, columns = weight.shape
    codes = np.asarray(lut.codes_of(weight)).T.reshape(-1)
    codes = np.append(codes, np.zeros(len(codes) % 2, np.uint8))
    state: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": weight.group,
        "dtype": dtype,
        "shape": [columns, rows],
    }
    arrays: dict[str, np.ndarray] = {
        "weight": (codes[::2] << 4 | codes[1::2]).astype(np.uint8)[:, None],
        "weight.quant_map": np.asarray(weight.table[0], np.float32),
    }
    if isinstance(weight.scale, SecondOrder):
        again = weight.scale
        if again.bits != 8 or again.order != "columns" or again.table is None:
            raise LayoutError("scales coded otherwise than in 8 bits by a table have no layout")
        arrays["weight.absmax"] = np.asarray(second_order.codes_of(again))
        arrays["weight.nested_absmax"] = np.asarray(again.scale, np.float32)
        arrays["weight.nested_quant_map"] = np.asarray(again.table, np.float32)
        offset = 0.0 if again.offset is None else float(np.asarray(again.offset))
        state |= {
            "nested_blocksize": again.group,
            "nested_dtype": "float32",
            "nested_offset": offset,
        }
    else:
        arrays["weight.absmax"] = np.asarray(weight.scale, np.float32).T.reshape(-1)
    arrays[STATE + kind] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": isinstance(weight.scale, SecondOrder),
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
    }
    return arrays, config


def _nested(
    arrays: Mapping[str, np.ndarray], state: Mapping[str, Any], codes: np.ndarray, shape: Any
) -> SecondOrder:
    """Scales that are codes: `map[code] * absmax2[i // 256] + offset`, in the order of blocks."""
    group = state["nested_blocksize"]
    scale = np.asarray(arrays["weight.nested_absmax"], np.float32)
    check_shape("weight.nested_absmax", scale, (-(-len(codes) // group),))
    return second_order.from_codes(
        jnp.asarray(codes, jnp.uint8),
        shape,
        bits=8,
        group=group,
        scale=jnp.asarray(scale),
        offset=jnp.asarray(state["nested_offset"], jnp.float32),
        table=jnp.asarray(np.asarray(arrays["weight.nested_quant_map"], np.float32)),
    )


def _read8(arrays: Mapping[str, np.ndarray]) -> Int8:
    take(arrays, ("weight", "SCB"), ("weight_format",))
    form = np.asarray(arrays.get("weight_format", 0)).reshape(-1)
    if form.any():
        raise LayoutError(f"weight_format is {form[0]}: 0, row after row, is read")
    weight = np.asarray(arrays["weight"])
    if weight.dtype != np.int8 or weight.ndim != 2:
        raise LayoutError(f"weight is {weight.dtype}{list(weight.shape)}; int8[N, K] is read")
    largest = np.asarray(arrays["SCB"], np.float32)
    check_shape("SCB", largest, weight.shape[:1])
    return Int8(jnp.asarray(weight.T), jnp.asarray(largest / 127))


def _write8(weight: Int8) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    arrays = {
        "weight": np.ascontiguousarray(np.asarray(weight.q).T),
        "SCB": _largest(np.asarray(weight.scale, np.float32)),
        "weight_format": np.zeros((), np.uint8),
    }
    config = {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": 6.0,
    }
    return arrays, config


def _largest(scale: np.ndarray) -> np.ndarray:
    """The largest value of each output, which read again gives this scale to the bit where one
    does, as for those of float16 weights, which are what bitsandbytes codes.
    """
    product = scale * np.float32(127)
    with np.errstate(over="ignore"):
        half = product.astype(np.float16).astype(np.float32)
    ends = [np.nextafter(product, np.float32(limit)) for limit in (np.inf, 0)]
    found = product
    for candidate in (*ends, product, half):
        found = np.where(candidate / np.float32(127) == scale, candidate, found)
    return found
