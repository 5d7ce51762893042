"""Arrays and folders for the tests of weight files."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from model.families.reader import open_weights
from model.families.writer import write_weights

ROOT = Path(__file__).parents[1]
INDEX = "model.safetensors.index.json"
WORKER = [sys.executable, str(ROOT / "tests" / "hf_files_worker.py")]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
PIPES: dict[str, Any] = {"capture_output": True, "text": True}


def array(shape, dtype, seed=0):
    """Random bytes, so every bit pattern that a dtype has, those of NaN included."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    return (raw % 2 if dtype == np.dtype(bool) else raw).view(dtype).reshape(shape)


def write(folder, arrays, **options):
    entries = [(name, a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()]
    write_weights(folder, entries, **options)


def same(found, wanted):
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    assert found.tobytes() == wanted.tobytes()


def check(folder, arrays, **options):
    with open_weights(folder, **options) as files:
        assert files.tensors.keys() == arrays.keys()
        for name, wanted in arrays.items():
            same(files.read(name), wanted)
