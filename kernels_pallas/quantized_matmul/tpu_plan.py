"""Which calls the TPU kernels take, and in what blocks."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.quantized_matmul.operand import Operand
from kernels_pallas.quantized_matmul.packing import packed_rows, tile_rows
from kernels_pallas.quantized_matmul.sizes import tuning_key
from kernels_pallas.quantized_matmul.tpu_decode import LANES
from kernels_pallas.tpu_topology import GENERATIONS
from kernels_pallas.tuning import best

Array = jax.Array

LOOK_UP = {"v4": "lanes", "v5e": "sublanes", "v5p": "sublanes", "v6e": "bytes", "7x": "bytes"}
"""Generation -> how its kernels look codes up in a table."""

MOST_ROWS = 256
"""Rows of input of a block."""
BLOCK_COLUMNS = 512
BLOCK_WEIGHTS = 2**21
"""Weights of a block: enough that the fixed cost of a step, about 150 cycles, does not count."""
CHUNK_ROWS = {64: 2048, MOST_ROWS: 512}
"""Up to so many rows of input -> most rows of codes that are decoded at a time."""
CHUNK_GROUPS = 16
"""Most groups of a chunk, whose products are written out one by one."""
MOST_CHUNK_ROWS = 4096
RESULT_SHARE = 0.25
"""Part of the chip's memory for a block of the transposed product's result, float32, twice."""
RESIDENT_BYTES = 4 * 2**20
"""The input stays in the chip's memory over all steps up to this size."""


@dataclass(frozen=True)
class Plan:
    """Sizes of a call.

    m, k, n: rows of input, rows of codes and columns of a block.
    chunk: rows of codes that are decoded at a time.
    rows: rows of codes in whole blocks; the input is 0 beyond the last row, whatever is read there.
    group: rows of a group; all of them for a scale a column.
    scaled: whether the tile is scaled before the product, not the product.
    resident: whether the input is one block of all its columns.
    """

    m: int
    k: int
    n: int
    chunk: int
    rows: int
    group: int
    scaled: bool
    resident: bool


def unsupported(x: Array, w: Operand) -> str | None:
    """Why the kernels do not take these arguments; None if they do."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the input is {x.dtype}; the TPU kernel takes bfloat16 and float32"
    if w.select is not None:
        return "the TPU kernel takes one table, not one for each group"
    if w.table is not None and (w.table.shape[0] > 16 or not w.packed):
        return "the TPU kernel looks packed codes up in tables of up to 16 entries"
    if x.shape[0] == 0 or w.columns == 0:
        return "the product is empty"
    if w.groups > 1 and (w.group % 8 or _chunk_rows(w, CHUNK_ROWS[MOST_ROWS]) is None):
        return f"groups of {w.group} rows do not cut {w.bits}-bit codes into whole registers"
    return None


def default_blocks(m: int, w: Operand, generation: str) -> dict[str, int]:
    """The largest blocks where nothing was measured: rows of input, columns, rows of codes that are
    decoded at a time, and weights.
    """
    most = MOST_ROWS * (2 if _is_deep(m, w, generation) else 1)
    rows = min(most, -(-m // 16) * 16)
    chunk = next((chunk for limit, chunk in CHUNK_ROWS.items() if rows <= limit), 512)
    return {"input_rows": most, "columns": BLOCK_COLUMNS, "chunk": chunk, "weights": BLOCK_WEIGHTS}


def fits(blocks: Mapping[str, Any], w: Operand) -> bool:
    """Whether a call can be cut into blocks of these sizes."""
    whole = blocks["input_rows"] % 16 == 0 == blocks["columns"] % LANES
    return whole and min(blocks.values()) > 0 and _chunk_rows(w, blocks["chunk"]) is not None


def make_plan(
    m: int, w: Operand, generation: str, dtype: Any = jnp.bfloat16, transposed: bool = False
) -> Plan:
    """Blocks for `m` rows of input of type `dtype`; measured ones where there are any."""
    kind = GENERATIONS[generation].device_kind
    key = tuning_key("tpu", m, w, dtype, kind, transposed=transposed)
    default = default_blocks(m, w, generation)
    most = best(key, default, fits=functools.partial(fits, w=w))
    deep = _is_deep(m, w, generation)
    block_m = min(most["input_rows"], -(-m // 16) * 16)
    block_n = min(most["columns"], -(-w.columns // LANES) * LANES)
    chunk = _chunk_rows(w, most["chunk"])
    assert chunk is not None
    chunks = -(-w.rows // chunk)
    together = max(min(most["weights"] // (chunk * block_n), chunks), 1)
    if transposed:
        room = int(GENERATIONS[generation].vmem_bytes * RESULT_SHARE)
        together = max(min(together, room // (2 * 4 * block_m * chunk)), 1)
    together = -(-chunks // -(-chunks // together))
    rows = -(-chunks // together) * together * chunk
    return Plan(
        m=block_m,
        k=together * chunk,
        n=block_n,
        chunk=chunk,
        rows=rows,
        group=rows if w.groups == 1 else w.group,
        scaled=w.groups > 1 and (deep or w.group < 16),
        resident=rows * block_m * 2 <= RESIDENT_BYTES,
    )


def _is_deep(m: int, w: Operand, generation: str) -> bool:
    """Whether groups would leave a part of the matrix unit idle, and rows pay for scaled tiles."""
    shallow = w.groups > 1 and w.group < GENERATIONS[generation].matrix_unit
    return m >= MOST_ROWS and shallow


def _chunk_rows(w: Operand, most: int) -> int | None:
    """About `most` rows of codes: whole tiles and registers, and whole groups or an even part of
    one. None if there is no such number up to `MOST_CHUNK_ROWS`.
    """
    unit = math.lcm(tile_rows(w.bits), LANES) if w.packed else LANES
    if w.groups > 1 and w.group > most:
        parts = [rows for rows in range(unit, most + 1, unit) if w.group % rows == 0]
        return parts[-1] if parts else None
    if w.groups > 1:
        unit = math.lcm(unit, w.group)
        most = max(min(most, CHUNK_GROUPS * w.group) // unit * unit, unit)
    if unit > MOST_CHUNK_ROWS:
        return None
    count = -(-w.rows // most)
    return -(-w.rows // (count * unit)) * unit


def stored_rows(w: Operand, rows: int) -> int:
    """Rows that `rows` rows of codes take as they are stored."""
    return packed_rows(rows, w.bits) if w.packed else rows
