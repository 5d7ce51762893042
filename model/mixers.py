"""Mixers by name: what moves information along the length."""

from __future__ import annotations

from model import attention
from model.arrays import Part

MIXERS: dict[str, Part] = {
    "attention": Part("attention", attention.arrays, attention.apply),
}
"""Name -> mixer."""
