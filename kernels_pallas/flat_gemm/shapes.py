"""Realistic argument shapes of the flat product, shared by tests, benchmarks and tuning."""

from __future__ import annotations

MATRICES: dict[str, tuple[int, int]] = {
    "small_query_key_value": (512, 768),
    "small_up": (512, 1408),
    "small_down": (1408, 512),
    "1b_query_key_value": (2048, 3072),
    "1b_output": (2048, 2048),
    "1b_up": (2048, 8192),
    "1b_down": (8192, 2048),
}
"""Name -> `(k, n)` of a decoder layer's matrices; those of 1B are Llama 3.2's."""
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Rows of input: sequences that are decoded together."""
SHAPES: dict[str, dict[str, int]] = {
    f"{name}_{m}": {"m": m, "k": k, "n": n} for name, (k, n) in MATRICES.items() for m in ROWS
}
"""Name -> sizes of a call."""
