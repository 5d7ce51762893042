"""What block sizes of the quantized product are looked up by."""

from __future__ import annotations

from typing import Any

from kernels_pallas.quantized_matmul.operand import Operand
from kernels_pallas.tuning import Key


def tuning_key(
    module: str, m: int, w: Operand, dtype: Any, device_kind: str, **options: bool
) -> Key:
    """For `m` rows of input of type `dtype`, in the code of a module of this folder."""
    stored = "words" if w.packed else "elements"
    return Key.of(
        f"quantized_matmul.{module}",
        {"m": m, "rows": w.rows, "columns": w.columns},
        dtype,
        device_kind,
        bits=w.bits,
        group=w.group if w.groups > 1 else 0,
        stored=stored if w.table is None else f"{stored} and a table",
        **options,
    )
